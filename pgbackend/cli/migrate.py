"""`pgbackend migrate`: creates the log's tables, brings them to a revision, checks them, or prints the SQL."""

import asyncio
from pathlib import Path

import click

from pgbackend.cli.options import ANSWER_TIMEOUT, LogAddress, server_options
from pgbackend.postgres import schema as revisions
from pgbackend.postgres.pool import Database


@click.command()
@server_options
@click.option(
    "--to",
    metavar="REVISION",
    default="head",
    show_default=True,
    show_envvar=True,
    help="The revision to bring the schema to. An older one drops what came after it; `base` drops the log.",
)
@click.option(
    "--sql", is_flag=True, help="Print the SQL that creates the log, for somebody else to run. Needs no database."
)
@click.option("--check", is_flag=True, help="Change nothing. Exit with 1 unless this version can work with the schema.")
def migrate(
    *, dsn: str | None, listen_dsn: str | None, schema: str, data_dir: Path | None, to: str, sql: bool, check: bool
) -> None:
    """Create the log's tables, or bring them to what this version needs.

    It is safe to run again, and several times at once.
    """
    if sql and check:
        raise click.UsageError("Give --sql or --check, not both.")
    if check and to != "head":
        raise click.UsageError("--check always compares with the newest revision: leave out --to.")
    if sql:
        click.echo(revisions.offline_sql(schema, to))
        return
    log = LogAddress.of(dsn=dsn, listen_dsn=listen_dsn, schema=schema, data_dir=data_dir)
    click.echo(asyncio.run(_migrate(log, to, check=check)))


async def _migrate(log: LogAddress, to: str, *, check: bool) -> str:
    async with log.served() as dsn:
        database = Database(dsn, listen_dsn=log.listen_dsn, pool_size=1)
        await database.open(ANSWER_TIMEOUT)
        try:
            before = await revisions.find_revision(database.fetch, log.schema)
            if check:
                revisions.check(before, log.schema)
                return f"Schema {log} is at {before}, as this version needs it."
            await revisions.migrate(database.connect, log.schema, to=to)
            after = await revisions.find_revision(database.fetch, log.schema)
            if before == after:
                return f"Schema {log} is at {after or 'base'} already."
            return f"Schema {log} went from {before or 'nothing'} to {after or 'nothing'}."
        finally:
            await database.close()
