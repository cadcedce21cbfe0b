"""Runs the migrations of one log: everything in its own schema, the version table included, in one transaction.

Two callers: `pgbackend.schema` hands over a connection and the schema's name in `config.attributes`; the `alembic`
command in a checkout takes PGBACKEND_DSN and PGBACKEND_SCHEMA from the environment. Both hold the same advisory lock
from before the stored revision is read until the commit, so that of several migrators one works and the others find
nothing left to do.
"""

import asyncio
import logging.config
import os
import re

import asyncpg
from alembic import context
from alembic.util import CommandError
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool
from sqlalchemy.sql import quoted_name

config = context.config
# Only the command reads alembic.ini; a host application keeps its own logging.
if config.config_file_name is not None:
    logging.config.fileConfig(config.config_file_name, disable_existing_loggers=False)

schema: str = config.attributes.get("schema") or os.environ.get("PGBACKEND_SCHEMA") or "pgbackend"


def literal(text: str) -> str:
    quoted = "'" + text.replace("'", "''") + "'"
    return " E" + quoted.replace("\\", "\\\\") if "\\" in text else quoted


IDENTIFIER = '"' + schema.replace('"', '""') + '"'

# Asked first: CREATE SCHEMA IF NOT EXISTS demands the right to create one even where there is nothing to create.
CREATE_SCHEMA = f"""
BEGIN
    IF NOT EXISTS (SELECT FROM pg_namespace WHERE nspname = {literal(schema)}) THEN
        CREATE SCHEMA {IDENTIFIER};
    END IF;
END"""

PREPARE = (
    # A role's own limits are made for requests, not for waiting for another migrator.
    "SET LOCAL statement_timeout = 0",
    "SET LOCAL idle_in_transaction_session_timeout = 0",
    "SET LOCAL lock_timeout = 0",
    # Transaction-level: a pooler may stand between.
    f"SELECT pg_advisory_xact_lock(hashtextextended({literal('pgbackend migrate ' + schema)}, 0))",
    # A DDL statement that waits for a table makes everybody else wait behind it: rather give up and be run again.
    "SET LOCAL lock_timeout = '5s'",
    f"DO {literal(CREATE_SCHEMA)}",
)


def offline() -> None:
    """Write the statements instead of running them."""
    # "named" is the only style that leaves percent signs in names alone.
    context.configure(
        dialect_name="postgresql",
        dialect_opts={"paramstyle": "named"},
        literal_binds=True,
        version_table_schema=quoted_name(schema, quote=True),
    )
    with context.begin_transaction():
        for statement in PREPARE:
            context.get_context().impl.static_output(f"{statement};")
        context.run_migrations()


def online(connection: Connection) -> None:
    """Bring the schema to the revision asked for and commit, or change nothing."""
    # Under a stricter level the snapshot would be taken before the wait for the lock, and show the past.
    connection = connection.execution_options(isolation_level="READ COMMITTED")
    context.configure(connection=connection, version_table_schema=quoted_name(schema, quote=True))
    with connection.begin():
        for statement in PREPARE:
            connection.exec_driver_sql(statement)
        with context.begin_transaction():
            context.run_migrations()


async def connect_and_run() -> None:
    """The command's way: a connection of its own, to the DSN of the environment."""
    dsn = os.environ.get("PGBACKEND_DSN")
    if not dsn:
        raise CommandError("Set PGBACKEND_DSN, like postgresql://user@host/database, or add --sql to only see the SQL.")

    async def connect() -> asyncpg.Connection:
        # By the driver itself, because SQLAlchemy's URL takes neither several hosts nor all of its options.
        return await asyncpg.connect(re.sub(r"^(postgres(?:ql)?)\+asyncpg:", r"\1:", dsn), statement_cache_size=0)

    engine = create_async_engine("postgresql+asyncpg://", async_creator=connect, poolclass=NullPool)
    async with engine.connect() as connection:
        await connection.run_sync(online)


if context.is_offline_mode():
    offline()
elif "connection" in config.attributes:
    online(config.attributes["connection"])
else:
    asyncio.run(connect_and_run())
