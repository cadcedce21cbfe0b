"""`pgbackend status`: shows the head of the log, its open appenders and its subscriptions."""

import asyncio
from dataclasses import asdict
from itertools import pairwise
from json import dumps

import click

from pgbackend.cli.options import backend_options, connected, table
from pgbackend.model import Info, Status, SubscriptionStatus


@click.command()
@backend_options()
@click.option("--json", is_flag=True, help="Print one JSON object.")
def status(dsn: str, listen_dsn: str | None, schema: str, *, json: bool) -> None:
    """Show the head of the log, and the state and lag of each subscription."""

    async def ask() -> tuple[Info, Status]:
        async with connected(dsn, listen_dsn=listen_dsn, schema=schema) as backend:
            return backend.info(), await backend.status()

    info, found = asyncio.run(ask())
    click.echo(dumps(asdict(found), indent=2) if json else _render(info, found))


def _shards(subscription: SubscriptionStatus) -> str:
    """The number of shards; during a reshard the old and the new number."""
    old = sum(shard.until is not None for shard in subscription.shards)
    new = len(subscription.shards) - old
    return " → ".join(str(count) for count in (old, new) if count)


def _duration(seconds: float | None) -> str:
    """Seconds in their two largest units.

    >>> [_duration(seconds) for seconds in (None, 0.0, 0.25, 75.0, 3600.0, 200_000.0)]
    ['-', '0 s', '0.2 s', '1 min 15 s', '1 h', '2 d 7 h']
    """
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s" if 0 < seconds < 10 else f"{seconds:.0f} s"
    for (size, name), (smaller, lesser) in pairwise(_UNITS):
        if seconds >= size:
            rest = int(seconds % size // smaller)
            return f"{int(seconds // size)} {name}" + (f" {rest} {lesser}" if rest else "")
    raise AssertionError(seconds)


_UNITS = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))


def _render(info: Info, status: Status) -> str:
    blocks = [f"log {info.schema} on {info.server}\nhead {status.head:,}, segments until {status.segments_until:,}"]
    if status.appenders:
        rows: list[tuple[object, ...]] = [
            (
                str(appender.pid or appender.gid or appender.virtual_transaction),
                appender.application or "?",
                "?" if appender.age is None else f"{appender.age:.1f} s",
            )
            for appender in status.appenders
        ]
        blocks.append(table(("OPEN APPENDER", "APPLICATION", "AGE"), rows))
    if status.subscriptions:
        headings = (
            "SUBSCRIPTION",
            "ORDER",
            "SHARDS",
            "LAG",
            "BEHIND",
            "PENDING",
            "REDELIVERIES",
            "DEAD LETTERS",
            "SKIPPED",
            "STATE",
            "OWNER",
        )
        rows = [
            (
                subscription.name,
                subscription.order,
                _shards(subscription),
                subscription.lag,
                _duration(subscription.lag_seconds),
                sum(shard.pending for shard in subscription.shards),
                subscription.redeliveries,
                subscription.dead_letters,
                subscription.skipped,
                "complete" if subscription.complete else subscription.state,
                ", ".join(sorted({shard.owner_name for shard in subscription.shards if shard.owner_name})) or "-",
            )
            for subscription in status.subscriptions
        ]
        blocks.append(table(headings, rows))
    else:
        blocks.append("no subscriptions")
    errors = [f"{each.name}: {' '.join(each.last_error.split())}" for each in status.subscriptions if each.last_error]
    if errors:
        blocks.append("last errors\n" + "\n".join(f"  {error}" for error in errors))
    return "\n\n".join(blocks)
