"""The revision of the log's tables, and migrating them to another one.

`init()` calls `find_revision()`, one query, and calls `migrate()` unless the schema is at `head()`. The promise: a
schema is at one revision or another, never in between, however many processes migrate it at once.

`alembic_migrations` does the migrating, and is imported only then.
"""

from collections.abc import Awaitable, Callable, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgbackend.errors import ConfigError, SchemaError
from pgbackend.postgres.connections import Connection
from pgbackend.postgres.pool import STATEMENT_TIMEOUT
from pgbackend.postgres.reconnect import repeat
from pgbackend.postgres.sql import load, quote_ident
from pgbackend.postgres.sql.statements import SchemaSql

if TYPE_CHECKING:
    import sqlalchemy

UNVERSIONED = "unknown"
"""The revision of a log that has no version table of ours."""
_UNRELEASED = frozenset({UNVERSIONED, *(f"{number:04}" for number in range(1, 11))})
"""The revisions of versions before the first release. The first ones had no version table of our name."""


def head() -> str:
    """The revision that this version of pgbackend works with."""
    return revisions()[-1]


def revisions() -> list[str]:
    """All revisions, oldest first."""
    return list(_revisions())


@cache
def _revisions() -> tuple[str, ...]:
    # The number that a file's name begins with is its revision's: r0001 is in 0001_the_log.py.
    numbers = sorted(file.name.partition("_")[0] for file in (directory() / "versions").glob("[0-9]*.py"))
    return tuple(f"r{number}" for number in numbers)


def directory() -> Path:
    """Where the migrations are: in an installed package, or in a checkout."""
    installed = Path(str(files("pgbackend"))) / "_migrations"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "migrations"


async def find_revision(fetch: Callable[[str], Awaitable[Sequence[Any]]], schema: str) -> str | None:
    """The stored revision; None when the schema holds no log. `fetch` is `Database.fetch`.

    One query where there is a log, two where there is none.
    """
    sql = load(SchemaSql, "schema", schema=schema)
    try:
        rows = await fetch(sql.find_revision)
    except SchemaError:
        rows = await fetch(sql.find_unversioned)
        return UNVERSIONED if rows[0]["has_log"] else None
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
    # Alembic and SQLAlchemy take half a second to import, and only a log that is not at head needs them.
    from pgbackend.postgres import alembic_migrations  # noqa: PLC0415

    quote_ident(schema)
    _check_known(to)
    await repeat(lambda: alembic_migrations.migrate(connect, schema, to), STATEMENT_TIMEOUT)


def migrate_within(connection: "sqlalchemy.Connection", schema: str, *, to: str = "head") -> None:
    """The schema is at revision `to` in the open transaction of the caller's connection.

    Raises ConfigError and SchemaError as `migrate()` does, and SQLAlchemy's errors.
    """
    from pgbackend.postgres import alembic_migrations  # noqa: PLC0415 - as in `migrate()`

    quote_ident(schema)
    _check_known(to)
    alembic_migrations.migrate_within(connection, schema, to)


def offline_sql(schema: str, to: str = "head") -> str:
    """The SQL that brings a schema without a log to revision `to`, or with `to` = "START:END" from one to the other.

    Raises ConfigError for an unknown revision.
    """
    from pgbackend.postgres import alembic_migrations  # noqa: PLC0415 - as in `migrate()`

    quote_ident(schema)
    start, _, end = to.rpartition(":")
    start = start or "base"
    _check_known(start)
    _check_known(end)
    return alembic_migrations.offline_sql(schema, head() if start == "head" else start, end)


def _check_known(revision: str) -> None:
    if revision not in ("base", "head", *revisions()):
        raise ConfigError(f"There is no revision {revision!r}: expected head, base or one of {', '.join(revisions())}.")
