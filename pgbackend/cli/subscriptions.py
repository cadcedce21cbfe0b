"""`pgbackend subscriptions`: lists, moves, reshards and deletes subscriptions."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime

import click

from pgbackend.backend import Backend
from pgbackend.cli.options import backend_options, connected, table
from pgbackend.model import MAX_SHARDS, ShardStatus
from pgbackend.subscriptions.places import Place


@click.group()
def subscriptions() -> None:
    """List, move, reshard and delete subscriptions, wherever they run."""


@subscriptions.command("list")
@backend_options()
def list_(dsn: str, listen_dsn: str | None, schema: str) -> None:
    """List every shard, with its position and its owner."""

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
    """Move a subscription: its next event is the first one after PLACE.

    PLACE is a position, a date with its time zone (2026-01-31T12:00:00Z), "earliest" or "latest". Failed events that
    wait to be tried again are dropped; dead letters stay.
    """
    where, head = _place(place), 0

    async def move(backend: Backend) -> None:
        nonlocal head
        await backend.seek(name, where)
        head = (await backend.status()).head

    _do(dsn, listen_dsn, schema, move)
    click.echo(f"{name} goes on after {place}.")
    if isinstance(where, int) and where > head:
        click.echo(f"The log is at {head:,}. Events up to {where:,} will not be delivered to {name}.")


@subscriptions.command()
@click.argument("name")
@click.argument("shards", type=click.IntRange(1, MAX_SHARDS))
@backend_options()
def reshard(name: str, shards: int, dsn: str, listen_dsn: str | None, schema: str) -> None:
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

    _do(dsn, listen_dsn, schema, change)
    click.echo(f"{name} has {shards} shard{'s' * (shards != 1)}.")
    if old:
        click.echo(f"They begin when the {len(old)} old ones have reached position {old[0].until:,}.")


@subscriptions.command()
@click.argument("name")
@click.confirmation_option(prompt="This deletes its offset, its events to retry and its dead letters for good. Delete?")
@backend_options()
def delete(name: str, dsn: str, listen_dsn: str | None, schema: str) -> None:
    """Delete a subscription, with its dead letters."""
    _do(dsn, listen_dsn, schema, lambda backend: backend.delete_subscription(name))
    click.echo(f"{name} is deleted.")


def _do(dsn: str, listen_dsn: str | None, schema: str, call: Callable[[Backend], Awaitable[None]]) -> None:
    async def do() -> None:
        async with connected(dsn, listen_dsn=listen_dsn, schema=schema) as backend:
            await call(backend)

    asyncio.run(do())


def _place(text: str) -> Place:
    """The place that the text names.

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
