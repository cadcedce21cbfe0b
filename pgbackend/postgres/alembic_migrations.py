"""Runs the migrations with Alembic, or prints their SQL. `schema` calls it, and nothing else imports Alembic.

It runs without Alembic's process-wide proxies (`alembic.op`, `alembic.context`), because the host may run its own
Alembic in another thread at the same time. The revision is stored in a table named `pgbackend_revision`, because the
host's `alembic_version` may be in the same schema.
"""

import io
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import cache
from typing import Any

from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext, RevisionStep
from alembic.script import Script, ScriptDirectory
from sqlalchemy import Connection as SyncConnection
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool
from sqlalchemy.sql import quoted_name

from pgbackend.errors import DatabaseError
from pgbackend.postgres import ddl
from pgbackend.postgres import schema as schemas
from pgbackend.postgres.connections import Connection
from pgbackend.postgres.errors import INSUFFICIENT_PRIVILEGE, translate
from pgbackend.postgres.sql import load, quote_ident, quote_literal
from pgbackend.postgres.sql.statements import SchemaSql

VERSION_TABLE = "pgbackend_revision"
OFFLINE_DIALECT = {"paramstyle": "named"}
"""Options of the dialect for printed SQL. Other styles double the percent signs in names."""

_LOCK_NOT_AVAILABLE = "55P03"
_CHANGED_SETTINGS = """
    SELECT name, setting
    FROM pg_catalog.pg_settings
    WHERE name IN (
        'search_path', 'statement_timeout', 'idle_in_transaction_session_timeout', 'lock_timeout',
        'citus.enable_ddl_propagation'
    )"""
"""The settings that `_preparation()` changes until the end of the transaction."""
_RESTORE = text("SELECT pg_catalog.set_config(:name, :setting, true)")


async def migrate(connect: Callable[[], Awaitable[Connection]], schema: str, to: str) -> None:
    """The schema is at revision `to`. Raises DatabaseError and SchemaError; then nothing has changed."""
    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=connect,
        poolclass=NullPool,
        # Numbered names collide with those of other clients behind a transaction pooler.
        connect_args={"prepared_statement_cache_size": 0, "prepared_statement_name_func": lambda: ""},
    )
    try:
        async with engine.connect() as connection:
            await connection.run_sync(_migrate, schema, to)
    except DBAPIError as error:
        raise _translated(error, schema) from error
    finally:
        await engine.dispose()


def _migrate(connection: SyncConnection, schema: str, to: str) -> None:
    # Under a stricter level the snapshot would be older than the wait for the lock.
    connection = connection.execution_options(isolation_level="READ COMMITTED")
    with connection.begin():
        _run_to(connection, schema, to)


def migrate_within(connection: SyncConnection, schema: str, to: str) -> None:
    """The schema is at revision `to`, in the open transaction of `connection`, whose settings are as they were."""
    kept = connection.exec_driver_sql(_CHANGED_SETTINGS).all()
    _run_to(connection, schema, to)
    for setting in kept:
        connection.execute(_RESTORE, setting._asdict())


def _run_to(connection: SyncConnection, schema: str, to: str) -> None:
    options = {"fn": lambda heads, _: _steps(heads, to), **version_table(schema)}
    run(MigrationContext.configure(connection, opts=options), schema)


def offline_sql(schema: str, start: str, end: str) -> str:
    """The SQL that brings a schema from revision `start` to `end`."""
    output = io.StringIO()
    options = {
        "fn": lambda heads, _: _steps(heads, end),
        "as_sql": True,
        "output_buffer": output,
        "literal_binds": True,
        "starting_rev": start,
        **version_table(schema),
    }
    context = MigrationContext.configure(dialect_name="postgresql", dialect_opts=OFFLINE_DIALECT, opts=options)
    with context.begin_transaction():
        run(context, schema)
    return output.getvalue()


def version_table(schema: str) -> dict[str, Any]:
    """The options of an Alembic context that say where the revision is stored."""
    return {"version_table": VERSION_TABLE, "version_table_schema": quoted_name(schema, quote=True)}


def run(context: MigrationContext, schema: str) -> None:
    """Run the steps that `context` was configured with, in the open transaction.

    Migrators run one after the other: each takes the lock before it reads the stored revision, and holds it until the
    commit. The `alembic` command calls this too, from migrations/env.py. Raises SchemaError as `migrate()` does.
    """
    for statement in _preparation(schema):
        ddl.execute(context, statement)
    if context.connection is not None and not context.as_sql:
        stored = _stored_revision(context, context.connection, schema)
        if stored is not None and stored not in schemas.revisions():
            schemas.check(stored, schema)
    context.run_migrations(op=Operations(context))


def _stored_revision(context: MigrationContext, connection: SyncConnection, schema: str) -> str | None:
    if stored := context.get_current_revision():
        return stored
    find_unversioned = load(SchemaSql, "schema", schema=schema).find_unversioned
    found = connection.exec_driver_sql(find_unversioned, execution_options={"no_parameters": True})
    return schemas.UNVERSIONED if found.scalar_one() else None


@cache
def scripts() -> ScriptDirectory:
    """The migrations as Alembic knows them."""
    directory = ScriptDirectory(schemas.directory())
    # Read all files before threads share the object, which would read them lazily.
    directory.get_heads()
    return directory


def _steps(heads: Sequence[str], to: str) -> Iterable[RevisionStep]:
    """The steps from the stored revision to `to`, forwards or backwards."""
    known = ["base", *schemas.revisions()]
    start, end = known.index(heads[0] if heads else "base"), known.index(schemas.head() if to == "head" else to)
    revision_map = scripts().revision_map
    if start <= end:
        return [RevisionStep.upgrade_from_script(revision_map, _script(name)) for name in known[start + 1 : end + 1]]
    return [RevisionStep.downgrade_from_script(revision_map, _script(name)) for name in known[start:end:-1]]


def _script(revision: str) -> Script:
    script = scripts().get_revision(revision)
    assert script is not None  # noqa: S101 - None stands for base only
    return script


def _preparation(schema: str) -> tuple[str, ...]:
    """The statements before the first step, in the same transaction."""
    lock = quote_literal(f"pgbackend migrate {schema}")
    return (
        # A function that another role has put into `public` may fit an argument better than PostgreSQL's own.
        "SET LOCAL search_path = pg_catalog, pg_temp",
        # A role's own limits are meant for requests, not for waiting for another migrator.
        "SET LOCAL statement_timeout = 0",
        "SET LOCAL idle_in_transaction_session_timeout = 0",
        "SET LOCAL lock_timeout = 0",
        # A log is local to one node. Citus would create its tables on the others as well.
        "SELECT set_config(name, 'off', true) FROM pg_catalog.pg_settings WHERE name = 'citus.enable_ddl_propagation'",
        # Transaction-level, because a pooler may be in between.
        f"SELECT pg_advisory_xact_lock(hashtextextended({lock}, 0))",
        # Everyone else queues behind a DDL statement that waits for a table. Give up instead, and be run again.
        "SET LOCAL lock_timeout = '5s'",
        f"DO {quote_literal(_create_schema(schema))}",
    )


def _create_schema(schema: str) -> str:
    # CREATE SCHEMA IF NOT EXISTS needs the right to create schemas even where the schema exists.
    return f"""
BEGIN
    IF NOT EXISTS (SELECT FROM pg_namespace WHERE nspname = {quote_literal(schema)}) THEN
        CREATE SCHEMA {quote_ident(schema)};
    END IF;
END"""


def _translated(error: DBAPIError, schema: str) -> Exception:
    cause = error.orig.__cause__ if error.orig is not None else None
    translated = translate(cause) if isinstance(cause, Exception) else error
    if isinstance(translated, DatabaseError) and translated.sqlstate == _LOCK_NOT_AVAILABLE:
        return DatabaseError(
            f"Schema {quote_ident(schema)} was not migrated, because a transaction keeps one of its tables "
            "locked. End that transaction, or run `pgbackend migrate` again later.",
            sqlstate=_LOCK_NOT_AVAILABLE,
        )
    if isinstance(translated, DatabaseError) and translated.sqlstate == INSUFFICIENT_PRIVILEGE:
        return DatabaseError(
            f"Schema {quote_ident(schema)} was not migrated: {cause}. Run `pgbackend migrate` as the owner "
            "of its tables, or where there are none as a role that may create them.",
            sqlstate=INSUFFICIENT_PRIVILEGE,
        )
    return translated
