"""For applications with an Alembic of their own: our migrations inside theirs, and our tables left alone by theirs.

In a revision of the application:

    def upgrade() -> None:
        schema.upgrade(op.get_bind())

In its env.py:

    context.configure(connection=connection, target_metadata=metadata, include_object=schema.include_object())

The promise: the two Alembics do not disturb each other, in threads either. Ours uses none of Alembic's process-wide
proxies, and keeps its revision in a table of its own, `pgbackend_revision`.
"""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pgbackend.errors import ConfigError
from pgbackend.postgres import schema as schemas
from pgbackend.postgres.sql import quote_ident

if TYPE_CHECKING:
    from sqlalchemy import Connection, Table

__all__ = ["downgrade", "include_object", "upgrade"]

IncludeObject = Callable[[Any, str | None, str, bool, Any], bool]
"""A hook of Alembic's autogenerate: object, name, kind, whether it is the database's, and what it is compared to."""

_PARTITION = re.compile(r"(events|recent_events)_\d+")


def upgrade(connection: "Connection", *, schema: str = "pgbackend") -> None:
    """Return once the log in `schema` is at the revision of this version, in the transaction of `connection`.

    `connection` is SQLAlchemy's, with any driver; for an AsyncConnection use `await connection.run_sync(upgrade)`.
    Nothing is committed here: if the transaction rolls back, the log is as it was. The schema is created where it is
    missing. Of several that migrate at once, each waits until the transaction of the one before has ended; under
    REPEATABLE READ or SERIALIZABLE it may fail then, and changes nothing.

    Raises ConfigError for a connection that commits each statement, SchemaError when a newer pgbackend migrated the
    log, and SQLAlchemy's errors as they are.
    """
    _check(connection)
    schemas.migrate_within(connection, schema)


def downgrade(connection: "Connection", *, schema: str = "pgbackend", to: str = "base") -> None:
    """Return once the log in `schema` is back at revision `to`, in the transaction of `connection`.

    "base" deletes the log with all its events. Raises as `upgrade()` does, and ConfigError for an unknown revision.
    """
    _check(connection)
    schemas.migrate_within(connection, schema, to=to)


def include_object(*, schema: str = "pgbackend", then: IncludeObject | None = None) -> IncludeObject:
    """A hook for `context.configure(include_object=…)` that keeps autogenerate from the tables of the log in `schema`.

    Without it, autogenerate would drop them where it looks at their schema. It also works where the log shares a schema
    with other tables. `then` is a hook of your own, which decides about everything else.
    """
    # They import SQLAlchemy and Alembic.
    from pgbackend.postgres.alembic_migrations import VERSION_TABLE  # noqa: PLC0415
    from pgbackend.postgres.tables import metadata  # noqa: PLC0415

    quote_ident(schema)
    columns = {table.name: set(table.columns.keys()) for table in metadata(schema).tables.values()}

    def is_ours(table: "Table") -> bool:
        if table.schema not in (schema, None):
            return False
        if table.name == VERSION_TABLE:
            return True
        partition = _PARTITION.fullmatch(table.name)
        ours = columns.get(partition[1] if partition else table.name)
        if ours is None or table.schema == schema:
            return ours is not None
        # Tables of the connection's default schema come without its name, so their columns tell them from tables of the
        # application. Most of them are enough, because the log may be at another revision.
        return 2 * len(ours & set(table.columns.keys())) > len(ours)

    def decide(item: Any, name: str | None, kind: str, reflected: bool, compare_to: Any) -> bool:  # noqa: FBT001 - Alembic's
        table = item if kind == "table" else getattr(item, "table", None)
        if table is not None and is_ours(table):
            return False
        return then is None or then(item, name, kind, reflected, compare_to)

    return decide


def _check(connection: object) -> None:
    from sqlalchemy import Connection  # noqa: PLC0415 - as in `include_object()`

    if not isinstance(connection, Connection) or connection.dialect.name != "postgresql":
        raise ConfigError(
            f"{connection!r:.100} is no connection of SQLAlchemy to PostgreSQL. Give it `op.get_bind()`; for an "
            "AsyncConnection use `await connection.run_sync(schema.upgrade)`. `pgbackend migrate --sql` prints the SQL."
        )
    if getattr(connection.connection.dbapi_connection, "autocommit", False):
        raise ConfigError(
            "The connection is in no transaction, because its isolation level is AUTOCOMMIT: a failed migration could "
            'not be taken back. Use a connection without `isolation_level="AUTOCOMMIT"`.'
        )
