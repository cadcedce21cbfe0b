"""Translates asyncpg's errors: their kind, by SQLSTATE, and the error of this package for each.

The promise: `translate()` turns every failure of the driver, the socket or the clock into one of pgbackend.errors, and
no predicate reads an error's text, which is in the server's language.
"""

import re

import asyncpg

from pgbackend.errors import ConfigError, ConnectionLostError, DatabaseError, SchemaError

STANDBY = "25006"
"""read_only_sql_transaction: a write on a standby, and this package's errors that say that a server is one."""
INSUFFICIENT_PRIVILEGE = "42501"
CONFLICTS = frozenset({"40001", "40P01"})
"""serialization_failure and deadlock_detected: the statement is fine, and nothing of it has happened."""

# Errors of statements whose server, or the way to it, is going away.
_LOST = frozenset({
    "57P01",  # admin_shutdown: also what pg_terminate_backend sends
    "57P02",  # crash_shutdown
    "57P03",  # cannot_connect_now: starting up, or in recovery
    "57P05",  # idle_session_timeout
    STANDBY,  # a primary that became a standby
    "0A000",  # feature_not_supported: reading the incarnation, an unlogged table, on a standby
    "25P03",  # idle_in_transaction_session_timeout
    "53300",  # too_many_connections
})  # fmt: skip
_LOST_IN_WORK = frozenset({"57P01", "57P02", "57P05", "25P03"})
"""The statement may have been committed before."""
_SCHEMA = frozenset({"3F000", "42P01", "42703", "42883"})
"""undefined schema, table, column and function"""
_POOLER = "08P01"
"""protocol_violation: pgbouncer gives it to each error of its own."""
LOCK_NOT_AVAILABLE = "55P03"
_LIMIT_EXCEEDED = "54000"
_CHECK_VIOLATION = "23514"
_UNIQUE_VIOLATION = "23505"
_OUT_OF_MEMORY = "53200"
_CONNECTION, _DATA, _CONSTRAINT, _LIMIT = "08", "22", "23", "54"
"""Classes: connection exception, data exception, integrity constraint violation, program limit exceeded."""


def is_cut_off(error: BaseException) -> bool:
    """Whether a statement may still be running, or its connection be useless, after this error."""
    if isinstance(error, asyncpg.PostgresError):
        return error.sqlstate in _LOST
    return not isinstance(error, DatabaseError)


def is_definite(error: BaseException) -> bool:
    """Whether the server itself said that the statement had no effect."""
    if not isinstance(error, asyncpg.PostgresError) or error.sqlstate is None:
        return False
    return error.sqlstate[:2] != _CONNECTION and error.sqlstate not in _LOST_IN_WORK


def is_conflict(error: BaseException) -> bool:
    """Whether PostgreSQL rolled a transaction back because of others: the same again may succeed."""
    return issubclass(type(error), asyncpg.PostgresError) and getattr(error, "sqlstate", None) in CONFLICTS


def is_refused_for_data(error: BaseException) -> bool:
    """Whether an event was refused for its values, so that other events may pass."""
    if isinstance(error, UnicodeEncodeError):
        # COPY encodes rows as it sends them, and was called off.
        return True
    return isinstance(error, asyncpg.PostgresError) and (error.sqlstate or "")[:2] in (_DATA, _CONSTRAINT)


def is_refused_for_data_or_size(error: DatabaseError) -> bool:
    """Whether a statement was refused for the values or the size of its arguments, so that smaller ones may pass."""
    state = error.sqlstate or ""
    return state[:2] in (_DATA, _CONSTRAINT, _LIMIT) or state == _OUT_OF_MEMORY


def is_out_of_segments(error: BaseException) -> bool:
    """Whether a position was drawn that no segment of the log holds."""
    # It has the SQLSTATE of a CHECK's refusal, but names no constraint.
    return (
        isinstance(error, asyncpg.PostgresError)
        and error.sqlstate == _CHECK_VIOLATION
        and error.constraint_name is None
    )


def is_notify_refused(error: BaseException) -> bool:
    """Whether a transaction had no effect because its NOTIFY was refused: the queue is full, or its lock was taken."""
    return isinstance(error, asyncpg.PostgresError) and error.sqlstate in (LOCK_NOT_AVAILABLE, _LIMIT_EXCEEDED)


def is_lock_refused(error: BaseException) -> bool:
    """Whether a statement had no effect because another transaction keeps a lock for longer than it may wait."""
    return isinstance(error, asyncpg.PostgresError) and error.sqlstate == LOCK_NOT_AVAILABLE


def is_repeat(error: BaseException) -> bool:
    """Whether a key could not be claimed, because the log has its event."""
    return (
        isinstance(error, asyncpg.PostgresError)
        and error.sqlstate == _UNIQUE_VIOLATION
        and str(error.constraint_name).startswith("recent_events")
    )


def is_position_taken(error: BaseException) -> bool:
    """Whether the sequence gave out the position of an existing event: the primary key of a segment refused it."""
    return (
        isinstance(error, asyncpg.PostgresError)
        and error.sqlstate == _UNIQUE_VIOLATION
        and re.fullmatch(r"events(_\d+)?_pkey", str(error.constraint_name)) is not None
    )


def translate(error: Exception, *, where: str | None = None) -> Exception:
    """The error of this package for one of asyncpg, the socket or the clock; any other error as it is.

    `where` names the server when it is the connecting that failed.
    """
    server = f"PostgreSQL at {where}" if where else "PostgreSQL"
    if isinstance(error, DatabaseError | ConfigError):
        return error
    if isinstance(error, asyncpg.ConnectionDoesNotExistError) and isinstance(
        error.__cause__, asyncpg.ProtocolViolationError
    ):
        # pgbouncer said why before it closed the connection.
        error = error.__cause__
    text = str(error).strip() or type(error).__name__
    if isinstance(error, asyncpg.PostgresError):
        return _translate_refusal(error, text, server, connecting=where is not None)
    if isinstance(error, asyncpg.exceptions.ClientConfigurationError):
        return ConfigError(f"The DSN is not usable: {text}.")
    if isinstance(error, TimeoutError):
        return ConnectionLostError(f"{server} did not answer in time. Check that it runs and can be reached.")
    if isinstance(error, asyncpg.InterfaceError | OSError | asyncpg.InternalClientError):
        return ConnectionLostError(f"{server} cannot be reached: {text}. Check that it runs, and the DSN.")
    return error


def _translate_refusal(error: asyncpg.PostgresError, text: str, server: str, *, connecting: bool) -> DatabaseError:
    state = error.sqlstate
    if state == _POOLER:
        return ConnectionLostError(
            f"{server} is not available: {text}. The connection pooler says so: "
            "look in its configuration for what it names, and in its log.",
            sqlstate=state,
        )
    if isinstance(error, asyncpg.PostgresConnectionError) or state in _LOST:
        return ConnectionLostError(f"{server} is not available: {text}. Try again when it is back.", sqlstate=state)
    if state in _SCHEMA:
        return SchemaError(f"The log's tables are not as expected: {text}. Run `pgbackend migrate`.")
    if state == INSUFFICIENT_PRIVILEGE:
        return DatabaseError(
            f"This role lacks a privilege: {text} (SQLSTATE {state}). `pgbackend grants` prints the SQL that gives "
            "it: --producer to append, --consumer to run subscriptions, --reader to follow and export the log, "
            "--operator to look at subscriptions and to move them.",
            sqlstate=state,
        )
    if connecting:
        return DatabaseError(
            f"{server} refused the connection: {text} (SQLSTATE {state}). Check user, password and database.",
            sqlstate=state,
        )
    return DatabaseError(f"PostgreSQL refused the statement: {text} (SQLSTATE {state}).", sqlstate=state)
