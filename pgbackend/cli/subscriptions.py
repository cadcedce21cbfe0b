"""`pgbackend subscriptions`: lists, moves, pauses, repairs, reshards and deletes subscriptions."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from json import dumps

import click

from pgbackend.backend import Backend
from pgbackend.cli.history import history_json
from pgbackend.cli.options import LogAddress, connected, log_options, parsed_place, table
from pgbackend.cli.terminal import counted, printable, shortened
from pgbackend.model import MAX_POSITION, MAX_SHARDS, SeekPreview, ShardStatus, WaitingEvent
from pgbackend.subscriptions.places import Place


@click.group()
def subscriptions() -> None:
    """List, move, pause, repair, reshard and delete subscriptions, wherever they run."""


@subscriptions.command("list")
@log_options
def list_(*, log: LogAddress) -> None:
    """List every shard, with its position, its owner, and who has paused it."""

    async def ask() -> list[tuple[object, ...]]:
        async with connected(log) as backend:
            status = await backend.status()
        return [
            (
                one.name,
                one.order,
                _name(shard),
                int(shard.position),
                shard.pending,
                shard.owner_name or "-",
                one.paused.by if one.paused is not None else "-",
            )
            for one in status.subscriptions
            for shard in one.shards
        ]

    rows = asyncio.run(ask())
    headings = ("SUBSCRIPTION", "ORDER", "SHARD", "POSITION", "PENDING", "OWNER", "PAUSED BY")
    click.echo(table(headings, rows) if rows else "no subscriptions")


@subscriptions.command()
@click.argument("name")
@click.argument("place")
@log_options
@click.option("--dry-run", is_flag=True, help="Change nothing: only say how many events would come again.")
def seek(name: str, place: str, *, log: LogAddress, dry_run: bool) -> None:
    """Move a subscription: its next event is the first one after PLACE.

    PLACE is a position, a date with its time zone (2026-01-31T12:00:00Z), "earliest" or "latest". Failed events that
    wait to be tried again are dropped; dead letters stay. The numbers of a --dry-run are those of all events: processes
    that run the subscription may filter them.
    """
    where = parsed_place(place, option="PLACE")
    if dry_run:
        found = asyncio.run(_preview(log, name, where))
        click.echo(
            f"{name} would go on after {place}: {counted(found.again, 'event')} would come again, and "
            f"{counted(found.skipped, 'event')} that it has not handled would be skipped. Nothing has changed."
        )
        return
    head = 0

    async def move(backend: Backend) -> None:
        nonlocal head
        await backend.seek(name, where)
        head = (await backend.status()).head

    _do(log, move)
    click.echo(f"{name} goes on after {place}.")
    if isinstance(where, int) and where > head:
        click.echo(f"The log is at {head:,}. Events up to {where:,} will not be delivered to {name}.")


async def _preview(log: LogAddress, name: str, place: Place) -> SeekPreview:
    async with connected(log) as backend:
        return await backend.preview_seek(name, place)


@subscriptions.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.option("--reason", help="For people who look at the status. Default: your database role and this process.")
@log_options
def pause(names: tuple[str, ...], *, reason: str | None, log: LogAddress) -> None:
    """Pause subscriptions: their events wait, wherever they run, until they are resumed.

    It is stored, so no restart ends it. Dispatches that run at the moment may end. The log keeps the events that wait.
    """

    async def pause_all(backend: Backend) -> None:
        for name in names:
            await backend.pause(name, reason=reason)
            click.echo(f"{name} is paused.")

    _do(log, pause_all)


@subscriptions.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@log_options
def resume(names: tuple[str, ...], *, log: LogAddress) -> None:
    """Resume subscriptions, whoever has paused them."""

    async def resume_all(backend: Backend) -> None:
        for name in names:
            await backend.resume(name)
            click.echo(f"{name} goes on.")

    _do(log, resume_all)


@subscriptions.command()
@click.argument("name")
@log_options
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True, help="The most to list.")
@click.option("--json", is_flag=True, help="Print one JSON object a line.")
def waiting(name: str, *, log: LogAddress, limit: int, json: bool) -> None:
    """List the failed events that wait to be tried again, in log order.

    With --json, each has the history of its attempts.
    """

    async def read() -> list[WaitingEvent]:
        found: list[WaitingEvent] = []
        async with connected(log) as backend:
            async for event in backend.waiting(name):
                found.append(event)
                if len(found) > limit:
                    break
        return found

    found = asyncio.run(read())
    if json:
        for event in found[:limit]:
            history = [history_json(entry) for entry in event.history]
            click.echo(dumps({**asdict(event), "due_at": event.due_at.isoformat(), "history": history}))
        return
    if not found:
        click.echo("no events wait to be tried again")
        return
    rows: list[tuple[object, ...]] = [
        (
            str(event.position),
            printable(event.type or "-"),
            printable(event.id or "-"),
            event.attempts,
            event.due_at.isoformat(sep=" ", timespec="seconds"),
            shortened(event.error, 60),
        )
        for event in found[:limit]
    ]
    click.echo(table(("POSITION", "TYPE", "EVENT ID", "ATTEMPTS", "DUE", "LAST ERROR"), rows))
    if len(found) > limit:
        click.echo(f"There are more: raise --limit {limit}.", err=True)


@subscriptions.command()
@click.argument("name")
@click.option("--position", type=click.IntRange(1, MAX_POSITION), help="Only the event at this position.")
@log_options
def retry(name: str, *, log: LogAddress, position: int | None) -> None:
    """Try failed events again now, and not at their time.

    Their attempts count on. A target that is down is probed at once. `pgbackend subscriptions waiting` lists the events
    that wait.
    """

    async def make_due() -> int:
        async with connected(log) as backend:
            return await backend.retry_now(name, position=position)

    count = asyncio.run(make_due())
    if position is not None and not count:
        raise click.ClickException(
            f"The event at position {position} does not wait to be tried again in {name}. "
            f"Run `pgbackend subscriptions waiting {name}`."
        )
    click.echo(f"{counted(count, 'event')} {'is' if count == 1 else 'are'} tried again now.")


@subscriptions.command()
@click.argument("name")
@click.argument("position", type=click.IntRange(1, MAX_POSITION))
@click.confirmation_option(prompt="The subscription will not handle this event. It becomes a dead letter. Skip?")
@log_options
def skip(name: str, position: int, *, log: LogAddress) -> None:
    """Skip one event: it becomes a dead letter of the subscription, on record.

    It may wait to be tried again, block others, or be unread. The command waits until running dispatches have ended,
    half a minute perhaps. If one takes longer, its worker loses the shard of the event, and what is at work there is
    dispatched again. `pgbackend dead-letters redeliver` takes a skip back.
    """
    _do(log, lambda backend: backend.skip(name, position))
    click.echo(f"{name} skips the event at position {position}, which is a dead letter now.")


@subscriptions.command()
@click.argument("name")
@click.argument("shards", type=click.IntRange(1, MAX_SHARDS))
@log_options
def reshard(name: str, shards: int, *, log: LogAddress) -> None:
    """Change the number of shards of a subscription, while it runs.

    Nothing is lost or repeated, and events of one key stay in order. From now on, processes must subscribe with this
    number. The command waits until running dispatches have ended, half a minute perhaps. Old shards that lag behind go
    on to where the farthest one stands; then the new ones begin. Until then, `pgbackend subscriptions list` shows both.
    """
    old: list[ShardStatus] = []

    async def change(backend: Backend) -> None:
        await backend.reshard(name, shards)
        status = await backend.status()
        old.extend(shard for one in status.subscriptions if one.name == name for shard in one.shards if shard.until)

    _do(log, change)
    click.echo(f"{name} has {shards} shard{'s' * (shards != 1)}.")
    if old:
        click.echo(f"They begin when the {len(old)} old ones have reached position {old[0].until:,}.")


@subscriptions.command()
@click.argument("name")
@click.confirmation_option(prompt="This deletes its offset, its events to retry and its dead letters for good. Delete?")
@log_options
def delete(name: str, *, log: LogAddress) -> None:
    """Delete a subscription, with its dead letters."""
    _do(log, lambda backend: backend.delete_subscription(name))
    click.echo(f"{name} is deleted.")


def _do(log: LogAddress, call: Callable[[Backend], Awaitable[None]]) -> None:
    async def do() -> None:
        async with connected(log) as backend:
            await call(backend)

    asyncio.run(do())


def _name(shard: ShardStatus) -> str:
    until = "" if shard.until is None else f", until {shard.until:,}"
    return f"{shard.shard} of {shard.shards}{until}"
