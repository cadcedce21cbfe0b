"""`pgbackend dead-letters`: lists, shows, dispatches again and deletes the events that were given up."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from functools import wraps
from json import dumps
from typing import Any

import click

from pgbackend.backend import Backend
from pgbackend.cli.history import history_json, history_line
from pgbackend.cli.options import LogAddress, connected, log_options, table
from pgbackend.cli.reading import selecting_options
from pgbackend.cli.terminal import Progress, counted, ending_on_signals, printable, shortened
from pgbackend.codec.wire import write_structured
from pgbackend.model import DeadLetter, DeadLetterGroup, EventFilter

_CHUNK = 500
"""The most dead letters that one statement changes."""
_STEPS = 10
"""Statements a second, at a rate that allows several letters in each."""


@click.group("dead-letters")
def dead_letters() -> None:
    """List and show events that were given up, dispatch them again, or delete them."""


@dead_letters.command("list")
@log_options
@click.option("--subscription", metavar="NAME", help="Only dead letters of this subscription.")
@click.option("--group", metavar="GROUP", help="Only dead letters of this failure group.")
@click.option("--by-group", is_flag=True, help="Count those with the same error, and list the groups, largest first.")
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True, help="The most to list.")
@click.option("--json", is_flag=True, help="Print one JSON object a line, with the whole event.")
def list_(
    *, log: LogAddress, subscription: str | None, group: str | None, by_group: bool, limit: int, json: bool
) -> None:
    """List dead letters, oldest first."""
    if by_group:
        if group is not None:
            raise click.UsageError("Give --group or --by-group, not both.")
        _list_groups(asyncio.run(_read_groups(log, subscription)), json=json)
        return
    letters = asyncio.run(_read(log, subscription=subscription, group=group, limit=limit + 1))
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
            printable(letter.event.type),
            printable(letter.event.id),
            letter.failure.attempts,
            "again soon" if letter.due_at else letter.buried_at.isoformat(sep=" ", timespec="seconds"),
            shortened(letter.failure.error, 60),
        )
        for letter in letters[:limit]
    ]
    click.echo(table(("ID", "SUBSCRIPTION", "TYPE", "EVENT ID", "ATTEMPTS", "BURIED", "ERROR"), rows))
    if len(letters) > limit:
        click.echo(f"There are more: raise --limit {limit}.", err=True)


@dead_letters.command()
@click.argument("letter_id", metavar="ID", type=int)
@log_options
@click.option("--json", is_flag=True, help="Print one JSON object, with the whole event.")
@click.option("--data", is_flag=True, help="Print only the event's data, byte for byte.")
def show(letter_id: int, *, log: LogAddress, json: bool, data: bool) -> None:
    """Show one dead letter: its event, its failure, and the history of its attempts."""
    letters = asyncio.run(_read(log, letter_id=letter_id, limit=1))
    if not letters:
        raise click.ClickException(f"There is no dead letter {letter_id}. Run `pgbackend dead-letters list`.")
    (letter,) = letters
    if data:
        click.echo(letter.event.data_bytes or b"", nl=False)
    else:
        click.echo(_to_json(letter) if json else _render(letter))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    """The dead letters that a command is for: those with these ids, or all that have the rest."""

    ids: tuple[int, ...]
    subscription: str | None
    group: str | None
    wanted: EventFilter | None

    async def find(self, backend: Backend) -> list[int]:
        """The ids of those that are not on their way again."""
        if self.ids:
            return list(dict.fromkeys(self.ids))
        return [
            letter.id
            async for letter in backend.dead_letters(self.subscription, group=self.group)
            if letter.due_at is None and (self.wanted is None or self.wanted(letter.event))
        ]

    def missing(self, count: int) -> click.ClickException | None:
        """The error if fewer letters were found than were named."""
        missing = len(set(self.ids)) - count
        if not self.ids or not missing:
            return None
        return click.ClickException(
            f"{missing} of these ids do not exist, or are dispatched again at the moment. "
            "Run `pgbackend dead-letters list`."
        )


def _choosing(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command takes ids, or options that choose dead letters, as one argument, `choice`."""

    @wraps(command)
    def with_choice(
        letter_ids: tuple[int, ...], *, subscription: str | None, group: str | None, wanted: EventFilter | None,
        **options: Any,
    ) -> Any:  # fmt: skip
        every = options.pop("all")
        is_narrowed = subscription is not None or group is not None or wanted is not None
        if bool(letter_ids) + is_narrowed + every != 1:
            raise click.UsageError(
                "Give ids, or a choice by --subscription, --group, --filter, --type and --source together, or --all."
            )
        choice = _Choice(ids=letter_ids, subscription=subscription, group=group, wanted=wanted)
        return command(choice=choice, **options)

    decorated = selecting_options(with_choice)
    for option in (
        click.option("--all", is_flag=True, help="All dead letters of all subscriptions."),
        click.option("--group", metavar="GROUP", help="Those of one failure group: see `list --by-group`."),
        click.option("--subscription", metavar="NAME", help="Those of one subscription."),
        click.argument("letter_ids", metavar="[ID]...", type=int, nargs=-1),
    ):
        decorated = option(decorated)
    return decorated


@dead_letters.command()
@log_options
@_choosing
@click.option(
    "--rate", type=click.FloatRange(min=0, min_open=True), metavar="NUMBER", help="At most so many a second, in order."
)
@click.option("--quiet", is_flag=True, help="Print no progress.")
def redeliver(*, log: LogAddress, choice: _Choice, rate: float | None, quiet: bool) -> None:
    """Dispatch dead letters again: those with the given ids, or those that the options choose.

    The workers of their subscriptions dispatch them, with all attempts anew. A letter that is handled is deleted; one
    that fails again stays. If the command is stopped, it says how many it has sent, and leaves the others as they are.
    """

    async def send() -> tuple[int, bool]:
        async with connected(log) as backend:
            ids = await choice.find(backend)
            with Progress("sent", "dead letter", total=len(ids), is_quiet=quiet) as progress:
                is_complete = await _in_steps(ids, backend.redeliver, rate=rate, progress=progress)
            return progress.count, is_complete

    count, is_complete = asyncio.run(send())
    click.echo(f"{counted(count, 'dead letter')} will be dispatched again.")
    if not is_complete:
        raise click.ClickException("Stopped. The others stay as they are.")
    if (error := choice.missing(count)) is not None:
        raise error


@dead_letters.command()
@log_options
@_choosing
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--quiet", is_flag=True, help="Print no progress.")
def purge(*, log: LogAddress, choice: _Choice, yes: bool, quiet: bool) -> None:
    """Delete dead letters for good: those with the given ids, or those that the options choose.

    Those that are dispatched again at the moment stay. The events stay in the log.
    """

    async def delete() -> tuple[int, bool]:
        async with connected(log) as backend:
            ids = await choice.find(backend)
            if ids and not yes:
                click.confirm(f"This deletes {counted(len(ids), 'dead letter')} for good. Delete?", abort=True)
            with Progress("deleted", "dead letter", total=len(ids), is_quiet=quiet) as progress:
                is_complete = await _in_steps(ids, backend.purge_dead_letters, rate=None, progress=progress)
            return progress.count, is_complete

    count, is_complete = asyncio.run(delete())
    click.echo(f"{counted(count, 'dead letter')} {'is' if count == 1 else 'are'} deleted.")
    if not is_complete:
        raise click.ClickException("Stopped. The others stay as they are.")
    if (error := choice.missing(count)) is not None:
        raise error


async def _in_steps(
    ids: Sequence[int], change: Callable[..., Awaitable[int]], *, rate: float | None, progress: Progress
) -> bool:
    """Change dead letters in their order; `progress` has counted them. Returns False when a signal has stopped it.

    `rate`: letters a second at most.
    """
    step = _CHUNK if rate is None else max(1, min(_CHUNK, int(rate / _STEPS)))
    with ending_on_signals() as ending:
        for start in range(0, len(ids), step):
            if rate is not None and start:
                # From the end of the last step, so that no two come faster.
                await asyncio.sleep(step / rate)
            progress.add(await change(*ids[start : start + step]), reached=start + step)
    return not ending.is_told


async def _read(
    log: LogAddress, *, limit: int, subscription: str | None = None, group: str | None = None,
    letter_id: int | None = None,
) -> list[DeadLetter]:  # fmt: skip
    found: list[DeadLetter] = []
    async with connected(log) as backend:
        async for letter in backend.dead_letters(subscription, group=group):
            if letter_id is None or letter.id == letter_id:
                found.append(letter)
                if len(found) == limit:
                    break
    return found


async def _read_groups(log: LogAddress, subscription: str | None) -> list[DeadLetterGroup]:
    async with connected(log) as backend:
        return await backend.dead_letter_groups(subscription)


def _list_groups(groups: Sequence[DeadLetterGroup], *, json: bool) -> None:
    if json:
        for group in groups:
            dates = {"first_at": group.first_at.isoformat(), "last_at": group.last_at.isoformat()}
            click.echo(dumps({**asdict(group), **dates}))
        return
    if not groups:
        click.echo("no dead letters")
        return
    rows: list[tuple[object, ...]] = [
        (
            group.name,
            group.subscription,
            group.letters,
            group.due,
            group.first_at.isoformat(sep=" ", timespec="seconds"),
            group.last_at.isoformat(sep=" ", timespec="seconds"),
            shortened(group.error, 60),
        )
        for group in groups
    ]
    click.echo(table(("GROUP", "SUBSCRIPTION", "LETTERS", "AGAIN SOON", "FIRST", "LAST", "ERROR OF ONE"), rows))


def _to_json(letter: DeadLetter) -> str:
    about = dumps(
        {
            "id": letter.id,
            "subscription": letter.subscription,
            "group": letter.group,
            "position": letter.event.position,
            "buried_at": letter.buried_at.isoformat(),
            "due_at": letter.due_at.isoformat() if letter.due_at else None,
            "attempts": letter.failure.attempts,
            "error": letter.failure.error,
            "details": dict(letter.failure.details),
            "history": [history_json(entry) for entry in letter.history],
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
        "group": letter.group,
        "position": f"{letter.event.position:,}",
        "buried": letter.buried_at.isoformat(sep=" ", timespec="seconds"),
        "due again": letter.due_at.isoformat(sep=" ", timespec="seconds") if letter.due_at else "-",
        "attempts": str(failure.attempts),
        "error": failure.error,
        **{f"  {name}": value for name, value in failure.details.items()},
    }
    parts = [_list(facts), "event\n" + _list(letter.event.attributes_text), _data(letter.event.data_bytes)]
    if letter.history:
        parts.insert(1, "\n".join(["history", *map(history_line, letter.history)]))
    return "\n\n".join(parts)


def _list(facts: dict[str, str]) -> str:
    width = max(map(len, facts))
    return "\n".join(f"{name.ljust(width)}  {printable(value)}" for name, value in facts.items())


def _data(data: bytes | None) -> str:
    if data is None:
        return "no data"
    heading = f"data, {len(data):,} bytes"
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return f"{heading}, binary: print it with --data"
    return f"{heading}\n{printable(text)}"
