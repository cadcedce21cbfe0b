"""A value that is no usable connection is refused before anything is sent, and the error says what to do."""

import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import psycopg
import pytest
import sqlalchemy
from django.core.cache import cache
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.pool import NullPool

import tests.support.outbox  # noqa: F401 - configures Django, or pytest cannot look at its cache
from pgbackend import Backend, ConfigError, EventError, NotRunningError, outbox
from pgbackend.outbox.connections import sqlstate_of
from tests.support.databases import Sql
from tests.support.events import make_event

pytestmark = [pytest.mark.direct, pytest.mark.owner]


@pytest.fixture
async def lite() -> AsyncIterator[sqlalchemy.Connection]:
    engine = sqlalchemy.create_engine("sqlite://")
    with engine.connect() as connection:
        yield connection
    engine.dispose()


@pytest.mark.parametrize("value", [None, "postgresql://localhost/app", object(), sqlalchemy])
def test_something_that_is_no_connection_is_refused_by_its_type(value: object) -> None:
    with pytest.raises(ConfigError, match=rf"A {type(value).__module__}\.{type(value).__name__} is no connection"):
        outbox.produce(value, make_event("a"))


async def test_a_backend_refuses_something_that_is_no_connection(backend: Backend) -> None:
    with pytest.raises(ConfigError, match=r"A builtins\.str is no connection"):
        await backend.produce(make_event("a"), connection="postgresql://localhost/app")


async def test_an_asynchronous_connection_belongs_to_the_backend(sql: Sql) -> None:
    with pytest.raises(ConfigError, match=r"asynchronous \(asyncpg.*`await backend\.produce\(event, connection="):
        outbox.produce(sql, make_event("a"))


async def test_a_synchronous_connection_belongs_to_the_outbox(backend: Backend, database: str) -> None:
    with (
        psycopg.connect(database) as connection,
        pytest.raises(ConfigError, match=r"synchronous \(psycopg.*`pgbackend\.outbox\.produce\(connection, event\)`"),
    ):
        await backend.produce(make_event("a"), connection=connection)


async def test_a_session_inside_run_sync_is_a_synchronous_one(database: str, sql: Sql) -> None:
    engine = create_async_engine(
        "postgresql+asyncpg://", async_creator=lambda: asyncpg.connect(database), poolclass=NullPool
    )
    async with AsyncSession(engine) as session, session.begin():
        await session.run_sync(outbox.produce, make_event("a"))
    await engine.dispose()

    assert await sql.fetchval("SELECT id FROM pgbackend.events") == "a"


def test_another_database_is_refused_by_its_name(lite: sqlalchemy.Connection) -> None:
    with pytest.raises(ConfigError, match="leads to sqlite: the log is in PostgreSQL"):
        outbox.produce(lite, make_event("a"))


def test_another_proxy_of_django_is_refused() -> None:
    with pytest.raises(ConfigError, match="leads to no database"):
        outbox.produce(cache, make_event("a"))


async def test_a_schema_that_cannot_exist_is_refused(database: str) -> None:
    with psycopg.connect(database) as connection, pytest.raises(ConfigError, match="not a name in PostgreSQL"):
        outbox.produce(connection, make_event("a"), schema="")


async def test_a_backend_that_is_not_initialized_says_so(database: str, sql: Sql) -> None:
    async with sql.transaction():
        with pytest.raises(NotRunningError):
            await Backend(database).produce(make_event("a"), connection=sql)


@pytest.mark.parametrize("options", [{"deduplicate": False}, {"on_repeats": print}])
async def test_options_for_repeats_are_refused_with_a_connection(
    backend: Backend, sql: Sql, options: dict[str, Any]
) -> None:
    async with sql.transaction():
        with pytest.raises(ConfigError, match=f"`{next(iter(options))}.* does not go with `connection`"):
            await backend.produce_many([make_event("a")], connection=sql, **options)


async def test_the_backends_own_limit_counts(database: str, sql: Sql) -> None:
    backend = Backend(database, max_event_bytes=100)
    await backend.init()
    async with sql.transaction():
        with pytest.raises(EventError, match="max_event_bytes is 100"):
            await backend.produce(make_event("a", b"." * 100), connection=sql)
    await backend.stop()


def test_no_library_of_connections_is_imported_by_looking_for_it() -> None:
    code = """
import sys
from pgbackend import outbox
try:
    outbox.produce(object(), b'{"specversion": "1.0", "id": "1", "source": "s", "type": "t"}')
except ValueError:
    print({"psycopg", "sqlalchemy", "django", "alembic"} & {*sys.modules})
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout == "set()\n"


def _wrapped(state: str, *, by: str) -> Exception:
    if by == "pg8000":
        return sqlalchemy.exc.ProgrammingError("INSERT", {}, Exception({"S": "ERROR", "C": state}))
    original = psycopg.errors.lookup(state)()
    if by == "sqlalchemy":
        return sqlalchemy.exc.ProgrammingError("INSERT", {}, original)
    error = Exception("of Django's")
    error.__cause__ = original
    return error


@pytest.mark.parametrize("by", ["sqlalchemy", "pg8000", "django"])
def test_a_sqlstate_is_found_in_a_wrapped_error(by: str) -> None:
    assert sqlstate_of(_wrapped("42P01", by=by)) == "42P01"


def test_an_error_of_the_network_has_no_sqlstate() -> None:
    assert sqlstate_of(OSError("connection reset")) is None
    assert sqlstate_of(asyncpg.UndefinedTableError("events")) == "42P01"
