"""Runs the `alembic` command in a checkout, on the log that PGBACKEND_DSN and PGBACKEND_SCHEMA name.

`pgbackend migrate` and `Backend.init()` do without this file. All three call `run()` in
`pgbackend/postgres/alembic_migrations.py`.
"""

import asyncio
import logging.config
import os

from alembic import context
from alembic.util import CommandError
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from pgbackend.errors import PgBackendError
from pgbackend.postgres import alembic_migrations
from pgbackend.postgres.dsn import normalize_dsn
from pgbackend.postgres.pool import Database

schema = os.environ.get("PGBACKEND_SCHEMA") or "pgbackend"


def offline() -> None:
    """Print the statements instead of running them."""
    context.configure(
        dialect_name="postgresql",
        dialect_opts=alembic_migrations.OFFLINE_DIALECT,
        literal_binds=True,
        **alembic_migrations.version_table(schema),
    )
    with context.begin_transaction():
        alembic_migrations.run(context.get_context(), schema)


def online(connection: Connection) -> None:
    """Bring the schema to the requested revision and commit, or change nothing."""
    # Under a stricter level the snapshot would be older than the wait for the lock.
    connection = connection.execution_options(isolation_level="READ COMMITTED")
    with connection.begin():
        context.configure(connection=connection, **alembic_migrations.version_table(schema))
        alembic_migrations.run(context.get_context(), schema)


async def connect_and_run() -> None:
    """Connect to PGBACKEND_DSN, as all of pgbackend does, and migrate."""
    dsn = os.environ.get("PGBACKEND_DSN")
    if not dsn:
        raise CommandError("Set PGBACKEND_DSN, like postgresql://user@host/database, or add --sql to only see the SQL.")
    connect = Database(normalize_dsn(dsn)).connect
    engine = create_async_engine("postgresql+asyncpg://", async_creator=connect, poolclass=NullPool)
    async with engine.connect() as connection:
        await connection.run_sync(online)


if context.config.config_file_name is not None:
    logging.config.fileConfig(context.config.config_file_name, disable_existing_loggers=False)
try:
    if context.is_offline_mode():
        offline()
    else:
        asyncio.run(connect_and_run())
except PgBackendError as error:
    raise CommandError(str(error)) from error
