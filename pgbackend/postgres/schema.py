"""The log's tables: which revision they are at, and bringing them to another one.

`init()` asks `found()`, one query, and either stops there or calls `migrate()`; everything else relies on the tables
being at `head()`. Its promise: a schema is at one revision or another, never between, however many migrate it at once.

The only importer of Alembic, which runs here without its process-wide proxies (`alembic.op`, `alembic.context`): the
host may run its own Alembic in another thread at the same time. The revision is kept in a table of our own name,
because the host's `alembic_version` may stand in the same schema.
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
from pgbackend.postgres.pool import INSUFFICIENT_PRIVILEGE, STATEMENT_TIMEOUT, Connection, repeat, translate
from pgbackend.postgres.sql import load, quote_ident, quote_literal
from pgbackend.postgres.sql.statements import SchemaSql

VERSION_TABLE = "pgbackend_revision"
# Logs of these revisions kept them in Alembic's own table.
_KEPT_IN_ALEMBIC_VERSION = ("0001", "0002", "0003", "0004")
_LOCK_NOT_AVAILABLE = "55P03"


def head() -> str:
    """The revision that this version of pgbackend works with."""
    return revisions()[-1]


@cache
def _scripts() -> ScriptDirectory:
    return ScriptDirectory(_location())


@cache
def _revisions() -> tuple[str, ...]:
    return tuple(revision.revision for revision in reversed(list(_scripts().walk_revisions())))


def revisions() -> list[str]:
    """All revisions, oldest first."""
    return list(_revisions())


async def found(fetch: Callable[[str], Awaitable[Sequence[Any]]], schema: str) -> str | None:
    """The stored revision; None when there is none. `fetch` is `Database.fetch`: one query in its own transaction."""
    try:
        rows = await fetch(load(SchemaSql, "schema", schema=schema).find_revision)
    except SchemaError:
        return None
    return rows[0][0] if rows else None


def check(found: str | None, schema: str) -> None:
    """Raises SchemaError, with the next step, unless `found` is the revision that this version works with."""
    expected = head()
    if found == expected:
        return
    if found is None:
        message = f"Schema {quote_ident(schema)} holds no log. Run `pgbackend migrate`."
    elif found in revisions():
        message = f"Schema {quote_ident(schema)} is at {found}, this version needs {expected}. Run `pgbackend migrate`."
    else:
        message = (
            f"Schema {quote_ident(schema)} is at {found}, this version knows revisions up to {expected}. "
            "This schema was migrated by a newer pgbackend; upgrade it."
        )
    raise SchemaError(message, found=found, expected=expected)


async def migrate(connect: Callable[[], Awaitable[Connection]], schema: str, *, to: str = "head") -> None:
    """Return once the schema is at revision `to`, which may be an older one, or "base" for no tables at all.

    `connect` opens a connection of the caller's kind. Concurrent calls are safe, in one process and from many: one
    works, the others wait and find nothing left to do. Cancelled, it returns when the transaction is rolled back.

    Raises ConfigError for an unknown `to`, SchemaError when a newer pgbackend has migrated this schema, DatabaseError
    when PostgreSQL refuses; nothing was changed then.
    """
    quote_ident(schema)
    _check_known(to)
    await repeat(lambda: _migrate_once(connect, schema, to), STATEMENT_TIMEOUT)


async def _migrate_once(connect: Callable[[], Awaitable[Connection]], schema: str, to: str) -> None:
    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=connect,
        poolclass=NullPool,
        # Behind a transaction pooler another client's statement may already have a name that is counted up.
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
    # Under a stricter level the snapshot would be taken before the wait for the lock, and show the past.
    connection = connection.execution_options(isolation_level="READ COMMITTED")
    with connection.begin():
        options = {"fn": lambda heads, _: _steps(heads, schema, to), **version_table(schema)}
        run(MigrationContext.configure(connection, opts=options), schema)


def offline_sql(schema: str, to: str = "head") -> str:
    """The SQL that brings a schema without a log to revision `to`; with `to` = "0002:0001", from the one to the other.

    Raises ConfigError for an unknown revision.
    """
    quote_ident(schema)
    start, _, end = to.rpartition(":")
    start = start or "base"
    _check_known(start)
    _check_known(end)
    text = io.StringIO()
    options = {
        "fn": lambda heads, _: _steps(heads, schema, end),
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


OFFLINE_DIALECT = {"paramstyle": "named"}
"""The only style that leaves percent signs in names alone."""


def version_table(schema: str) -> dict[str, Any]:
    """The options of an Alembic context that say where the revision is kept."""
    return {"version_table": VERSION_TABLE, "version_table_schema": quoted_name(schema, quote=True)}


def run(context: MigrationContext, schema: str) -> None:
    """Run the steps that `context` was configured with, in the transaction that is open.

    Several migrators run one after the other: the lock is taken before the stored revision is read, and held until the
    commit. The `alembic` command comes here too, from migrations/env.py.
    """
    for statement in _preparation(schema):
        ddl.execute(context, statement)
    context.run_migrations(op=Operations(context))


def _steps(heads: Sequence[str], schema: str, to: str) -> Iterable[RevisionStep]:
    """The way from the stored revision to `to`, forwards or backwards."""
    known = ["base", *revisions()]
    stored = heads[0] if heads else "base"
    if stored not in known:
        check(stored, schema)
    start, end = known.index(stored), known.index(head() if to == "head" else to)
    revision_map = _scripts().revision_map
    if start <= end:
        return [RevisionStep.upgrade_from_script(revision_map, _script(name)) for name in known[start + 1 : end + 1]]
    return [RevisionStep.downgrade_from_script(revision_map, _script(name)) for name in known[start:end:-1]]


def _script(revision: str) -> Script:
    script = _scripts().get_revision(revision)
    assert script is not None  # noqa: S101 - None stands for base only
    return script


def _preparation(schema: str) -> tuple[str, ...]:
    """What comes before the first step, in the same transaction."""
    lock = quote_literal(f"pgbackend migrate {schema}")
    return (
        # A role's own limits are made for requests, not for waiting for another migrator.
        "SET LOCAL statement_timeout = 0",
        "SET LOCAL idle_in_transaction_session_timeout = 0",
        "SET LOCAL lock_timeout = 0",
        # Citus would carry the tables to other nodes. A log is local to one, which may be any.
        "SELECT set_config(name, 'off', true) FROM pg_catalog.pg_settings WHERE name = 'citus.enable_ddl_propagation'",
        # Transaction-level: a pooler may stand between.
        f"SELECT pg_advisory_xact_lock(hashtextextended({lock}, 0))",
        # A DDL statement that waits for a table makes everybody else wait behind it: rather give up and be run again.
        "SET LOCAL lock_timeout = '5s'",
        f"DO {quote_literal(_create_schema(schema))}",
        f"DO {quote_literal(_adopt_revision(schema))}",
    )


def _create_schema(schema: str) -> str:
    # It asks first: CREATE SCHEMA IF NOT EXISTS demands the right to create one even where there is nothing to create.
    return f"""
BEGIN
    IF NOT EXISTS (SELECT FROM pg_namespace WHERE nspname = {quote_literal(schema)}) THEN
        CREATE SCHEMA {quote_ident(schema)};
    END IF;
END"""


def _adopt_revision(schema: str) -> str:
    """Early logs kept their revision in `alembic_version`: copy it, where the tables of a log stand beside it.

    A copy, because that table may be the host's: without our tables, or with another content, it says nothing of a log.
    """
    where = quote_ident(schema)
    old = f"{where}.alembic_version"
    tables = [f"{where}.{name}" for name in ("events_position_seq", "epochs", "incarnation", "offsets")]
    present = " AND ".join(f"to_regclass({quote_literal(name)}) IS NOT NULL" for name in (old, *tables))
    known = ", ".join(map(quote_literal, _KEPT_IN_ALEMBIC_VERSION))
    new = f"{where}.{VERSION_TABLE}"
    return f"""
DECLARE
    owner regrole := (SELECT relowner FROM pg_class WHERE oid = to_regclass({quote_literal(f"{where}.offsets")}));
BEGIN
    IF to_regclass({quote_literal(new)}) IS NULL AND {present} THEN
        IF (SELECT count(*) = 1 AND bool_and(version_num IN ({known})) FROM {old}) THEN
            CREATE TABLE {new} (LIKE {old} INCLUDING ALL);
            INSERT INTO {new} SELECT version_num FROM {old};
            -- When a superuser migrates, the log's owner must still be able to read it.
            EXECUTE format('ALTER TABLE %s OWNER TO %s', {quote_literal(new)}, owner);
        END IF;
    END IF;
END"""  # noqa: S608 - names are quoted


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


def _location() -> Path:
    installed = Path(str(files("pgbackend"))) / "_migrations"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "migrations"
