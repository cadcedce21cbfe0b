"""`pgbackend status`: where the log and its subscriptions stand."""

import asyncio
from dataclasses import asdict
from json import dumps

import click

from pgbackend.cli.options import backend_options, connected, table
from pgbackend.model import Info, Status


@click.command()
@backend_options()
@click.option("--json", is_flag=True, help="Print one JSON object.")
def status(dsn: str, listen_dsn: str | None, schema: str, *, json: bool) -> None:
    """Show the head of the log, and what each subscription has behind and before it."""

    async def ask() -> tuple[Info, Status]:
        async with connected(dsn, listen_dsn=listen_dsn, schema=schema) as backend:
            return backend.info(), await backend.status()

    info, found = asyncio.run(ask())
    click.echo(dumps(asdict(found), indent=2) if json else _render(info, found))


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
            "PENDING",
            "REDELIVERIES",
            "DEAD LETTERS",
            "STATE",
            "OWNER",
        )
        rows = [
            (
                subscription.name,
                subscription.order,
                len(subscription.shards),
                subscription.lag,
                sum(shard.pending for shard in subscription.shards),
                subscription.redeliveries,
                subscription.dead_letters,
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
