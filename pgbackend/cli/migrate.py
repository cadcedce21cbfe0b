"""`pgbackend migrate`: creates the log's tables, brings them to a revision, checks them, or prints the SQL."""

import asyncio

import click

from pgbackend.cli.options import ANSWER_TIMEOUT, backend_options
from pgbackend.postgres import schema as revisions
from pgbackend.postgres.dsn import describe_dsn
from pgbackend.postgres.pool import Database


@click.command()
@backend_options(dsn_required=False)
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
def migrate(dsn: str | None, listen_dsn: str | None, schema: str, *, to: str, sql: bool, check: bool) -> None:
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
    if dsn is None:
        raise click.UsageError("Missing option '--dsn' (env var: 'PGBACKEND_DSN').")
    click.echo(asyncio.run(_migrate(dsn, listen_dsn, schema, to, check=check)))


async def _migrate(dsn: str, listen_dsn: str | None, schema: str, to: str, *, check: bool) -> str:
    database = Database(dsn, listen_dsn=listen_dsn, pool_size=1)
    await database.open(ANSWER_TIMEOUT)
    try:
        before = await revisions.find_revision(database.fetch, schema)
        if check:
            revisions.check(before, schema)
            return f"Schema {schema} on {describe_dsn(dsn)} is at {before}, as this version needs it."
        await revisions.migrate(database.connect, schema, to=to)
        after = await revisions.find_revision(database.fetch, schema)
        if before == after:
            return f"Schema {schema} on {describe_dsn(dsn)} is at {after or 'base'} already."
        return f"Schema {schema} on {describe_dsn(dsn)} went from {before or 'nothing'} to {after or 'nothing'}."
    finally:
        await database.close()
