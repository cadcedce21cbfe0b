"""`pgbackend dead-letters`: lists and shows the events that were given up, and dispatches them again."""

import asyncio
from json import dumps

import click

from pgbackend.cli.options import backend_options, connected, table
from pgbackend.codec.wire import write_structured
from pgbackend.model import DeadLetter


@click.group("dead-letters")
def dead_letters() -> None:
    """List and show events that were given up, and dispatch them again."""


@dead_letters.command("list")
@backend_options()
@click.option("--subscription", metavar="NAME", help="Only dead letters of this subscription.")
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True, help="The most to list.")
@click.option("--json", is_flag=True, help="Print one JSON object a line, with the whole event.")
def list_(dsn: str, listen_dsn: str | None, schema: str, *, subscription: str | None, limit: int, json: bool) -> None:
    """List dead letters, oldest first."""
    letters = asyncio.run(_read(dsn, listen_dsn=listen_dsn, schema=schema, subscription=subscription, limit=limit + 1))
    if json:
        for letter in letters[:limit]:
            click.echo(_to_json(letter))
        return
    if not letters:
        click.echo("no dead letters")
        return
    rows: list[tuple[object, ...]] = [
        (
            str(letter.id),
            letter.subscription,
            _printable(letter.event.type),
            _printable(letter.event.id),
            letter.failure.attempts,
            "again soon" if letter.due_at else letter.buried_at.isoformat(sep=" ", timespec="seconds"),
            _shortened(letter.failure.error, 60),
        )
        for letter in letters[:limit]
    ]
    click.echo(table(("ID", "SUBSCRIPTION", "TYPE", "EVENT ID", "ATTEMPTS", "BURIED", "ERROR"), rows))
    if len(letters) > limit:
        click.echo(f"There are more: raise --limit {limit}.", err=True)


@dead_letters.command()
@click.argument("letter_id", metavar="ID", type=int)
@backend_options()
@click.option("--json", is_flag=True, help="Print one JSON object, with the whole event.")
@click.option("--data", is_flag=True, help="Print only the event's data, byte for byte.")
def show(letter_id: int, dsn: str, listen_dsn: str | None, schema: str, *, json: bool, data: bool) -> None:
    """Show one dead letter: its event and its failure."""
    letters = asyncio.run(_read(dsn, listen_dsn=listen_dsn, schema=schema, letter_id=letter_id, limit=1))
    if not letters:
        raise click.ClickException(f"There is no dead letter {letter_id}. Run `pgbackend dead-letters list`.")
    (letter,) = letters
    if data:
        click.echo(letter.event.data_bytes or b"", nl=False)
    else:
        click.echo(_to_json(letter) if json else _render(letter))


@dead_letters.command()
@click.argument("letter_ids", metavar="[ID]...", type=int, nargs=-1)
@backend_options()
@click.option("--subscription", metavar="NAME", help="All dead letters of this subscription.")
def redeliver(
    letter_ids: tuple[int, ...], dsn: str, listen_dsn: str | None, schema: str, *, subscription: str | None
) -> None:
    """Dispatch dead letters again: those with the given ids, or all of one subscription.

    The workers of the subscription dispatch them, with all attempts anew.
    """
    if bool(letter_ids) == (subscription is not None):
        raise click.UsageError("Give either ids or --subscription NAME.")

    async def redeliver() -> int:
        async with connected(dsn, listen_dsn=listen_dsn, schema=schema) as backend:
            if subscription is not None:
                return await backend.redeliver(subscription=subscription)
            return await backend.redeliver(*letter_ids)

    count = asyncio.run(redeliver())
    missing = len(set(letter_ids)) - count
    click.echo(f"{count} dead letter{'s' * (count != 1)} will be dispatched again.")
    if letter_ids and missing:
        raise click.ClickException(f"{missing} of these ids do not exist. Run `pgbackend dead-letters list`.")


async def _read(
    dsn: str,
    *,
    listen_dsn: str | None,
    schema: str,
    limit: int,
    subscription: str | None = None,
    letter_id: int | None = None,
) -> list[DeadLetter]:
    found: list[DeadLetter] = []
    async with connected(dsn, listen_dsn=listen_dsn, schema=schema) as backend:
        async for letter in backend.dead_letters(subscription):
            if letter_id is None or letter.id == letter_id:
                found.append(letter)
                if len(found) == limit:
                    break
    return found


def _to_json(letter: DeadLetter) -> str:
    about = dumps(
        {
            "id": letter.id,
            "subscription": letter.subscription,
            "position": letter.event.position,
            "buried_at": letter.buried_at.isoformat(),
            "due_at": letter.due_at.isoformat() if letter.due_at else None,
            "attempts": letter.failure.attempts,
            "error": letter.failure.error,
            "details": dict(letter.failure.details),
        },
        ensure_ascii=False,
    )
    # The event's own text, so that its numbers and spacing stay as they came. A raw line break in JSON is only spacing,
    # because strings escape theirs.
    event = write_structured(letter.event).decode().replace("\n", " ").replace("\r", " ")
    return f'{about[:-1]}, "event": {event}}}'


def _render(letter: DeadLetter) -> str:
    failure = letter.failure
    facts = {
        "dead letter": str(letter.id),
        "subscription": letter.subscription,
        "position": f"{letter.event.position:,}",
        "buried": letter.buried_at.isoformat(sep=" ", timespec="seconds"),
        "due again": letter.due_at.isoformat(sep=" ", timespec="seconds") if letter.due_at else "-",
        "attempts": str(failure.attempts),
        "error": failure.error,
        **{f"  {name}": value for name, value in failure.details.items()},
    }
    return "\n\n".join((_list(facts), "event\n" + _list(letter.event.attributes_text), _data(letter.event.data_bytes)))


def _list(facts: dict[str, str]) -> str:
    width = max(map(len, facts))
    return "\n".join(f"{name.ljust(width)}  {_printable(value)}" for name, value in facts.items())


def _data(data: bytes | None) -> str:
    if data is None:
        return "no data"
    heading = f"data, {len(data):,} bytes"
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return f"{heading}, binary: print it with --data"
    return f"{heading}\n{_printable(text)}"


def _printable(text: str) -> str:
    """The text without what would control a terminal: senders choose it."""
    return "".join(one if one.isprintable() or one in "\n\t" else repr(one)[1:-1] for one in text)


def _shortened(text: str, length: int) -> str:
    line = _printable(" ".join(text.split()))
    return line if len(line) <= length else line[: length - 1] + "…"
