"""Tells the kind of a connection without importing its library, and has the errors for one that cannot be used.

An application has only some of the libraries installed. A library that nobody has imported has no connections, so
looking into `sys.modules` is enough.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

from pgbackend.errors import ConfigError, SchemaError
from pgbackend.postgres.sql import quote_ident

_MISSING = frozenset({"42P01", "3F000"})
"""undefined table and schema"""


class Kind(Enum):
    """How events are produced on a connection. The values are classes, each "module:Class"."""

    ASYNCPG = ("asyncpg:Connection",)  # also for the proxies of its pools, by its metaclass
    PSYCOPG_ASYNC = ("psycopg:AsyncConnection",)
    SQLALCHEMY_ASYNC = ("sqlalchemy.ext.asyncio:AsyncConnection",)
    SESSION_ASYNC = ("sqlalchemy.ext.asyncio:AsyncSession", "sqlalchemy.ext.asyncio:async_scoped_session")
    PSYCOPG = ("psycopg:Connection",)
    SQLALCHEMY = ("sqlalchemy.engine:Connection",)
    SESSION = ("sqlalchemy.orm:Session", "sqlalchemy.orm:scoped_session")
    # The second one is the class of `django.db.connection`.
    DJANGO = ("django.db.backends.base.base:BaseDatabaseWrapper", "django.utils.connection:ConnectionProxy")


_ASYNCHRONOUS = frozenset({Kind.ASYNCPG, Kind.PSYCOPG_ASYNC, Kind.SQLALCHEMY_ASYNC, Kind.SESSION_ASYNC})


def kind_of(value: object) -> Kind | None:
    """The kind of a connection; None for anything else."""
    for kind in Kind:
        for path in kind.value:
            module, _, name = path.partition(":")
            found = getattr(sys.modules.get(module), name, None)
            if found is not None and isinstance(value, found):
                return kind
    return None


def unfit(connection: object) -> ConfigError:
    """The error for something that is no connection, or not of a kind that the called function takes."""
    name = f"{type(connection).__module__}.{type(connection).__qualname__}"
    kind = kind_of(connection)
    if kind in _ASYNCHRONOUS:
        return ConfigError(
            f"The connection is asynchronous ({name}): call `await backend.produce(event, connection=connection)`. "
            "Nothing was sent."
        )
    if kind is not None:
        return ConfigError(
            f"The connection is synchronous ({name}): call `pgbackend.outbox.produce(connection, event)`. "
            "Nothing was sent."
        )
    return ConfigError(
        f"A {name} is no connection that events can be produced on: expected one of asyncpg, psycopg 3, SQLAlchemy or "
        "Django. Nothing was sent."
    )


def other_database(name: object) -> ConfigError:
    """The error for a connection of SQLAlchemy or Django that does not lead to PostgreSQL."""
    return ConfigError(f"The connection leads to {name}: the log is in PostgreSQL. Nothing was sent.")


def no_transaction(remedy: str) -> ConfigError:
    """The error for a connection that would commit each statement by itself."""
    return ConfigError(f"The connection is in no transaction, so nothing was sent. {remedy}")


@contextmanager
def naming_missing_log(schema: str) -> Iterator[None]:
    """Raise SchemaError for a driver's error that says that its database has no such log. Others pass unchanged."""
    try:
        yield
    except Exception as error:
        if sqlstate_of(error) not in _MISSING:
            raise
        # Without the driver's text, which may have the whole event in it.
        raise SchemaError(
            f"The database of this connection has no log in schema {quote_ident(schema)}. Run `pgbackend migrate`, or "
            "name the log's schema. The transaction has failed: roll it back."
        ) from error


def sqlstate_of(error: BaseException | None) -> str | None:
    """The SQLSTATE of a driver's error, also when SQLAlchemy or Django have wrapped it."""
    while error is not None:
        for state in (getattr(error, "sqlstate", None), getattr(error, "pgcode", None)):
            if isinstance(state, str):
                return state
        if error.args and isinstance(error.args[0], dict):
            return error.args[0].get("C")  # pg8000
        original = getattr(error, "orig", None)
        error = original if isinstance(original, BaseException) else error.__cause__
    return None
