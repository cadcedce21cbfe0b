"""Executes an append on a synchronous connection: one small function for each kind.

The promise: the transaction stays the caller's. Nothing here commits or rolls back, and the driver's errors are raised
as they are.
"""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pgbackend import facts
from pgbackend.outbox.appends import Append, Marker, notification
from pgbackend.outbox.connections import Kind, kind_of, naming_missing_log, no_transaction, other_database, unfit


def execute(connection: object, append: Append) -> None:
    """The append was executed in the connection's transaction.

    Raises ConfigError for a connection that cannot be used, SchemaError when its database has no such log, and what the
    driver raises.
    """
    run = _EXECUTORS.get(kind_of(connection))
    if run is None:
        raise unfit(connection)
    with naming_missing_log(append.schema):
        run(connection, append)


def _on_psycopg(connection: Any, append: Append) -> None:
    if is_psycopg_unsure(connection):
        with connection.pipeline() as pipeline:
            pipeline.sync()
    check_psycopg(connection)
    with connection.cursor() as cursor:
        for statement, value in append.steps(psycopg_marker(cursor)):
            cursor.execute(statement, (value,))


def is_psycopg_unsure(connection: Any) -> bool:
    """Whether this connection of psycopg cannot tell yet if it is in a transaction: its pipeline has to sync first."""
    return bool(connection.autocommit and connection.info.pipeline_status and _status(connection) == "ACTIVE")


def check_psycopg(connection: Any) -> None:
    """Raise ConfigError unless the statements of this connection of psycopg, of either kind, share a transaction."""
    if connection.autocommit and _status(connection) == "IDLE":
        raise no_transaction("It is in autocommit mode: open a transaction with `connection.transaction()` first.")


def psycopg_marker(cursor: object) -> Marker:
    """How this cursor of psycopg, of either kind, marks a parameter. The connection's `cursor_factory` decides."""
    # Psycopg 3.1 has no raw cursors.
    raw = [getattr(sys.modules["psycopg"], name, ()) for name in ("RawCursor", "AsyncRawCursor")]
    return "$1" if isinstance(cursor, tuple(raw)) else "%s"


def _status(connection: Any) -> str:
    name: str = connection.info.transaction_status.name
    return name


def on_sqlalchemy(connection: Any, append: Append) -> None:
    """Execute on a Connection of SQLAlchemy, also inside the `run_sync()` of an AsyncConnection."""
    if connection.dialect.name != "postgresql":
        raise other_database(connection.dialect.name)
    # The driver's own word: asking SQLAlchemy for the level takes a query.
    if getattr(connection.connection.dbapi_connection, "autocommit", False):
        raise no_transaction(
            'Its isolation level is AUTOCOMMIT: use a connection without `isolation_level="AUTOCOMMIT"`.'
        )
    for statement, value in append.steps(":value"):
        connection.execute(_text(statement), {"value": value}, execution_options=_AT_ONCE).close()


_AT_ONCE = {"stream_results": False, "yield_per": None}
"""Overrides options of the engine or connection: a server-side cursor takes no INSERT, and would send no NOTIFY."""


@lru_cache(maxsize=256)
def _text(statement: str) -> Any:
    """SQLAlchemy's form of a statement. Making it anew for each event costs 50 µs."""
    from sqlalchemy import text  # noqa: PLC0415 - only where the caller has it loaded anyway

    return text(statement)


def _on_session(session: Any, append: Append) -> None:
    on_sqlalchemy(session.connection(), append)


def _on_django(connection: Any, append: Append) -> None:
    # A proxy of Django's may also stand for a cache.
    vendor = getattr(connection, "vendor", "no database")
    if vendor != "postgresql":
        raise other_database(vendor)
    if not connection.in_atomic_block and connection.get_autocommit():
        raise no_transaction("Open one with `transaction.atomic()` first.")
    with connection.cursor() as cursor:
        for statement, value in append.steps("%s"):
            cursor.execute(statement, [value])
    if connection.in_atomic_block and not append.notify:
        _NotifyAfterCommit(connection, append.schema).register()


@dataclass(frozen=True, slots=True)
class _NotifyAfterCommit:
    """Django calls this after the commit, and not at all after a rollback."""

    connection: Any
    schema: str

    def register(self) -> None:
        """It is called once for the transaction, however often it is registered."""
        inside = set(self.connection.savepoint_ids)
        for savepoints, registered, *_ in self.connection.run_on_commit:
            # A call that was registered in another savepoint may be gone when this event commits.
            if isinstance(registered, _NotifyAfterCommit) and registered == self and savepoints <= inside:
                return
        self.connection.on_commit(self)

    def __call__(self) -> None:
        from django.db import Error  # noqa: PLC0415 - only where the caller has it loaded anyway

        statement, value = notification(self.schema, "%s")
        try:
            with self.connection.cursor() as cursor:
                cursor.execute(statement, [value])
        except Error as error:
            # The caller's transaction is committed, and must not look failed for want of a hint.
            facts.emit(
                "notify failed", level=logging.WARNING, error=str(error),
                effect="Other processes find events by polling meanwhile.",
            )  # fmt: skip


_EXECUTORS: dict[Kind | None, Callable[[Any, Append], None]] = {
    Kind.PSYCOPG: _on_psycopg,
    Kind.SQLALCHEMY: on_sqlalchemy,
    Kind.SESSION: _on_session,
    Kind.DJANGO: _on_django,
}
