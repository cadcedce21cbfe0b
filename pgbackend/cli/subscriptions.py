"""`pgbackend subscriptions`: those there are; moved, spread over another number of shards, forgotten."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime

import click

from pgbackend.backend import Backend
from pgbackend.cli.options import backend_options, connected, table
from pgbackend.model import MAX_SHARDS, ShardStatus
from pgbackend.subscriptions.definitions import Place


@click.group()
def subscriptions() -> None:
    """List, move, reshard and delete subscriptions, wherever they run."""


@subscriptions.command("list")
@backend_options()
def list_(dsn: str, listen_dsn: str | None, schema: str) -> None:
    """List every shard, with its place and who runs it."""

    async def ask() -> list[tuple[object, ...]]:
        async with connected(dsn, listen_dsn=listen_dsn, schema=schema) as backend:
            status = await backend.status()
        return [
            (one.name, one.order, _name(shard), int(shard.position), shard.pending, shard.owner_name or "-")
            for one in status.subscriptions
            for shard in one.shards
        ]

    rows = asyncio.run(ask())
    headings = ("SUBSCRIPTION", "ORDER", "SHARD", "POSITION", "PENDING", "OWNER")
    click.echo(table(headings, rows) if rows else "no subscriptions")


@subscriptions.command()
@click.argument("name")
@click.argument("place")
@backend_options()
def seek(name: str, place: str, dsn: str, listen_dsn: str | None, schema: str) -> None:
    """Move a subscription: its next event is the first behind PLACE.

    PLACE is a position, a date with its time zone (2026-01-31T12:00:00Z), "earliest" or "latest". What was waiting to
    be tried again is dropped; dead letters stay.
    """
    where, head = _place(place), 0

    async def move(backend: Backend) -> None:
        nonlocal head
        await backend.seek(name, where)
        head = (await backend.status()).head

    _do(dsn, listen_dsn, schema, move)
    click.echo(f"{name} goes on behind {place}.")
    if isinstance(where, int) and where > head:
        click.echo(f"The log is at {head:,}: what comes until then is not for {name}.")


@subscriptions.command()
@click.argument("name")
@click.argument("shards", type=click.IntRange(1, MAX_SHARDS))
@backend_options()
def reshard(name: str, shards: int, dsn: str, listen_dsn: str | None, schema: str) -> None:
    """Spread a subscription over another number of shards, while it runs.

    Nothing is lost or repeated, and events of one key stay in order. Have the processes that run it subscribe with this
    number from now on. Waits until they have ended what is at work, half a minute perhaps. Old shards that lag behind
    go on to where the farthest one stands, before the new ones begin: `pgbackend subscriptions list` shows both till
    then.
    """
    old: list[ShardStatus] = []

    async def change(backend: Backend) -> None:
        await backend.reshard(name, shards)
        status = await backend.status()
        old.extend(shard for one in status.subscriptions if one.name == name for shard in one.shards if shard.until)

    _do(dsn, listen_dsn, schema, change)
    click.echo(f"{name} has {shards} shard{'s' * (shards != 1)}.")
    if old:
        click.echo(f"They begin once the {len(old)} old ones have come to position {old[0].until:,}.")


@subscriptions.command()
@click.argument("name")
@click.confirmation_option(prompt="Its offset, what it has to try again and its dead letters go for good. Delete it?")
@backend_options()
def delete(name: str, dsn: str, listen_dsn: str | None, schema: str) -> None:
    """Forget a subscription, with its dead letters."""
    _do(dsn, listen_dsn, schema, lambda backend: backend.delete_subscription(name))
    click.echo(f"{name} is deleted.")


def _do(dsn: str, listen_dsn: str | None, schema: str, call: Callable[[Backend], Awaitable[None]]) -> None:
    async def do() -> None:
        async with connected(dsn, listen_dsn=listen_dsn, schema=schema) as backend:
            await call(backend)

    asyncio.run(do())


def _place(text: str) -> Place:
    """What `seek()` takes, from the text for it.

    >>> _place("17"), _place("latest"), _place("2026-01-31T12:00:00Z").isoformat()
    (17, 'latest', '2026-01-31T12:00:00+00:00')
    """
    if text in ("earliest", "latest"):
        return "earliest" if text == "earliest" else "latest"
    if text.isdecimal():
        return int(text)
    try:
        date = datetime.fromisoformat(text)
    except ValueError:
        date = None
    if date is None or date.tzinfo is None:
        raise click.BadParameter(
            f'{text!r} is no place: expected a position, a date with its time zone, "earliest" or "latest".',
            param_hint="PLACE",
        )
    return date


def _name(shard: ShardStatus) -> str:
    until = "" if shard.until is None else f", until {shard.until:,}"
    return f"{shard.shard} of {shard.shards}{until}"
