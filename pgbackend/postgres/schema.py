"""The revision of the log's tables, and migrating them to another one.

`init()` calls `find_revision()`, one query, and calls `migrate()` unless the schema is at `head()`. The promise: a
schema is at one revision or another, never in between, however many processes migrate it at once.

Only this module imports Alembic. It runs without Alembic's process-wide proxies (`alembic.op`, `alembic.context`),
because the host may run its own Alembic in another thread at the same time. The revision is stored in a table named
`pgbackend_revision`, because the host's `alembic_version` may be in the same schema.
"""

import io
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext, RevisionStep
from alembic.script import Script, ScriptDirectory
from sqlalchemy import Connection as SyncConnection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool
from sqlalchemy.sql import quoted_name

from pgbackend.errors import ConfigError, DatabaseError, SchemaError
from pgbackend.postgres import ddl
from pgbackend.postgres.connections import Connection
from pgbackend.postgres.errors import INSUFFICIENT_PRIVILEGE, translate
from pgbackend.postgres.pool import STATEMENT_TIMEOUT
from pgbackend.postgres.reconnect import repeat
from pgbackend.postgres.sql import load, quote_ident, quote_literal
from pgbackend.postgres.sql.statements import SchemaSql

VERSION_TABLE = "pgbackend_revision"
OFFLINE_DIALECT = {"paramstyle": "named"}
"""Options of the dialect for printed SQL. Other styles double the percent signs in names."""

_UNVERSIONED = "unknown"
_UNRELEASED = frozenset({_UNVERSIONED, *(f"{number:04}" for number in range(1, 11))})
"""The revisions of versions before the first release. The first ones had no version table of our name."""
_LOCK_NOT_AVAILABLE = "55P03"


def head() -> str:
    """The revision that this version of pgbackend works with."""
    return revisions()[-1]


def revisions() -> list[str]:
    """All revisions, oldest first."""
    return list(_revisions())


@cache
def _revisions() -> tuple[str, ...]:
    return tuple(revision.revision for revision in reversed(list(_scripts().walk_revisions())))


@cache
def _scripts() -> ScriptDirectory:
    installed = Path(str(files("pgbackend"))) / "_migrations"
    return ScriptDirectory(installed if installed.is_dir() else Path(__file__).parents[2] / "migrations")


async def find_revision(fetch: Callable[[str], Awaitable[Sequence[Any]]], schema: str) -> str | None:
    """The stored revision; None when the schema holds no log. `fetch` is `Database.fetch`.

    One query where there is a log, two where there is none.
    """
    sql = load(SchemaSql, "schema", schema=schema)
    try:
        rows = await fetch(sql.find_revision)
    except SchemaError:
        rows = await fetch(sql.find_unversioned)
        return _UNVERSIONED if rows[0]["has_log"] else None
    return rows[0]["version_num"] if rows else None


def check(found: str | None, schema: str) -> None:
    """Raise SchemaError, with the next step, unless `found` is the revision that this version works with."""
    name, expected = quote_ident(schema), head()
    if found == expected:
        return
    if found is None:
        message = f"Schema {name} holds no log. Run `pgbackend migrate`."
    elif found in revisions():
        message = f"Schema {name} is at {found}, this version needs {expected}. Run `pgbackend migrate`."
    elif found in _UNRELEASED:
        message = (
            f"Schema {name} holds a log of a version before the first release (revision {found}), which cannot be "
            "upgraded. Make a new log in another schema, and copy the events: INSERT … SELECT … ORDER BY position."
        )
    else:
        message = (
            f"Schema {name} is at {found}, this version knows revisions up to {expected}. "
            "This schema was migrated by a newer pgbackend; upgrade it."
        )
    raise SchemaError(message, found=found, expected=expected)


async def migrate(connect: Callable[[], Awaitable[Connection]], schema: str, *, to: str = "head") -> None:
    """Return once the schema is at revision `to`, which may be an older one, or "base" for no tables at all.

    `connect` opens a connection that the migration closes. Concurrent calls are safe, in one process and in many: one
    works, the others wait and find nothing left to do. A cancelled call returns when its transaction is rolled back.

    Raises ConfigError for an unknown `to`, SchemaError when this version cannot migrate from the stored revision, and
    DatabaseError when PostgreSQL refuses. After an error nothing has changed.
    """
    quote_ident(schema)
    _check_known(to)
    await repeat(lambda: _migrate_once(connect, schema, to), STATEMENT_TIMEOUT)


async def _migrate_once(connect: Callable[[], Awaitable[Connection]], schema: str, to: str) -> None:
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
        options = {"fn": lambda heads, _: _steps(heads, to), **version_table(schema)}
        run(MigrationContext.configure(connection, opts=options), schema)


def offline_sql(schema: str, to: str = "head") -> str:
    """The SQL that brings a schema without a log to revision `to`, or with `to` = "START:END" from one to the other.

    Raises ConfigError for an unknown revision.
    """
    quote_ident(schema)
    start, _, end = to.rpartition(":")
    start = start or "base"
    _check_known(start)
    _check_known(end)
    text = io.StringIO()
    options = {
        "fn": lambda heads, _: _steps(heads, end),
        "as_sql": True,
        "output_buffer": text,
        "literal_binds": True,
        "starting_rev": head() if start == "head" else start,
        **version_table(schema),
    }
    context = MigrationContext.configure(dialect_name="postgresql", dialect_opts=OFFLINE_DIALECT, opts=options)
    with context.begin_transaction():
        run(context, schema)
    return text.getvalue()


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
        if stored is not None and stored not in revisions():
            check(stored, schema)
    context.run_migrations(op=Operations(context))


def _stored_revision(context: MigrationContext, connection: SyncConnection, schema: str) -> str | None:
    if stored := context.get_current_revision():
        return stored
    find_unversioned = load(SchemaSql, "schema", schema=schema).find_unversioned
    return _UNVERSIONED if connection.exec_driver_sql(find_unversioned).scalar_one() else None


def _steps(heads: Sequence[str], to: str) -> Iterable[RevisionStep]:
    """The steps from the stored revision to `to`, forwards or backwards."""
    known = ["base", *revisions()]
    start, end = known.index(heads[0] if heads else "base"), known.index(head() if to == "head" else to)
    revision_map = _scripts().revision_map
    if start <= end:
        return [RevisionStep.upgrade_from_script(revision_map, _script(name)) for name in known[start + 1 : end + 1]]
    return [RevisionStep.downgrade_from_script(revision_map, _script(name)) for name in known[start:end:-1]]


def _script(revision: str) -> Script:
    script = _scripts().get_revision(revision)
    assert script is not None  # noqa: S101 - None stands for base only
    return script


def _preparation(schema: str) -> tuple[str, ...]:
    """The statements before the first step, in the same transaction."""
    lock = quote_literal(f"pgbackend migrate {schema}")
    return (
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


def _check_known(revision: str) -> None:
    if revision not in ("base", "head", *revisions()):
        raise ConfigError(f"There is no revision {revision!r}: expected head, base or one of {', '.join(revisions())}.")
