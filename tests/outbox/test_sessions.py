"""An event goes into the transaction of any session, however the application has set up its driver and its session."""

from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import psycopg
import pytest
import sqlalchemy
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from pgbackend import Backend, ConfigError, outbox
from pgbackend.log.notify import channel
from tests.support.databases import Sql, connected
from tests.support.events import make_event
from tests.support.polling import eventually

pytestmark = [pytest.mark.direct, pytest.mark.owner]


@pytest.fixture
async def heard(database: str) -> AsyncIterator[list[object]]:
    """The payloads of notifications about the log."""
    heard: list[object] = []
    async with connected(database) as listener:
        await listener.add_listener(channel("pgbackend"), lambda *args: heard.append(args[-1]))
        yield heard


async def stored(sql: Sql) -> list[str]:
    return [row["id"] for row in await sql.fetch("SELECT id FROM pgbackend.events ORDER BY position")]


# Cursors of psycopg that take parameters in their own way.


@pytest.mark.parametrize("factory", [psycopg.Cursor, psycopg.ClientCursor, psycopg.RawCursor])
def test_any_cursor_of_psycopg_will_do(database: str, factory: Any) -> None:
    with psycopg.connect(database, cursor_factory=factory) as connection:
        outbox.produce(connection, make_event("100%s $1 'of' \\x"), notify=True)

        found = psycopg.Cursor(connection).execute("SELECT id FROM pgbackend.events").fetchall()
    assert found == [("100%s $1 'of' \\x",)]


@pytest.mark.parametrize("factory", [psycopg.AsyncCursor, psycopg.AsyncClientCursor, psycopg.AsyncRawCursor])
async def test_any_asynchronous_cursor_of_psycopg_will_do(backend: Backend, database: str, factory: Any) -> None:
    async with await psycopg.AsyncConnection.connect(database, cursor_factory=factory) as connection:
        await backend.produce(make_event("100%s $1"), connection=connection, notify=True)

        found = await (await psycopg.AsyncCursor(connection).execute("SELECT id FROM pgbackend.events")).fetchall()
    assert found == [("100%s $1",)]


# Pipelines of psycopg, in which a statement is sent before the answers to those before it.


async def test_a_pipeline_that_commits_each_statement_is_refused(backend: Backend, database: str, sql: Sql) -> None:
    with psycopg.connect(database, autocommit=True) as connection, connection.pipeline():
        connection.execute("SELECT 1")
        with pytest.raises(ConfigError, match="in no transaction"):
            outbox.produce(connection, make_event("a"))
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as other, other.pipeline():
        await other.execute("SELECT 1")
        with pytest.raises(ConfigError, match="in no transaction"):
            await backend.produce(make_event("a"), connection=other)

    assert await stored(sql) == []


@pytest.mark.parametrize("autocommit", [False, True])
async def test_a_transaction_in_a_pipeline_takes_events(
    backend: Backend, database: str, sql: Sql, *, autocommit: bool
) -> None:
    with psycopg.connect(database, autocommit=autocommit) as connection, connection.pipeline():
        with connection.transaction():
            outbox.produce(connection, make_event("a"))
        with connection.transaction(force_rollback=True):
            outbox.produce(connection, make_event("rolled back"))
    async with (
        await psycopg.AsyncConnection.connect(database, autocommit=autocommit) as other,
        other.pipeline(),
        other.transaction(),
    ):
        await backend.produce(make_event("b"), connection=other)

    assert await stored(sql) == ["a", "b"]


# Sessions with settings of their own.


@pytest.mark.parametrize("encoding", ["LATIN1", "EUC_JP", "SQL_ASCII", "UTF8"])
async def test_a_client_encoding_that_lacks_characters_of_an_event_takes_it(
    database: str, sql: Sql, encoding: str
) -> None:
    ids = ["ü", "€", "日本", "🐘", "\\u00fc"]
    with psycopg.connect(database, client_encoding=encoding) as connection:
        outbox.produce_many(connection, [make_event(id_, "€ü日本🐘".encode()) for id_ in ids])

    assert await stored(sql) == ids
    assert await sql.fetchval("SELECT DISTINCT convert_from(data, 'UTF8') FROM pgbackend.events") == "€ü日本🐘"


@pytest.mark.parametrize("name", ["text", "jsonb"])
async def test_a_temporary_table_that_is_named_like_a_type_is_left_alone(database: str, sql: Sql, name: str) -> None:
    """PostgreSQL looks for types among temporary tables first."""
    with psycopg.connect(database) as connection:
        connection.execute(f"CREATE TEMPORARY TABLE {name} (id int)")
        outbox.produce(connection, b'{"specversion":"1.0","id":"a","source":"s","type":"t","level":1}')
        connection.execute("SELECT pgbackend.produce('t', 's', '{}', id => 'b', extensions => '{\"level\": 1}')")

    assert await stored(sql) == ["a", "b"]


@pytest.mark.parametrize("options", [{"stream_results": True}, {"yield_per": 10}])
async def test_an_engine_that_streams_results_takes_events_and_notifies(
    backend: Backend, database: str, heard: list[object], sql: Sql, options: dict[str, Any]
) -> None:
    engine = sqlalchemy.create_engine(
        "postgresql+psycopg://",
        creator=lambda: psycopg.connect(database),
        poolclass=NullPool,
        execution_options=options,
    )
    with engine.begin() as connection:
        outbox.produce(connection, make_event("a"), notify=True)
    engine.dispose()
    async_engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=lambda: asyncpg.connect(database),
        poolclass=NullPool,
        execution_options=options,
    )
    async with async_engine.begin() as async_connection:
        await backend.produce(make_event("b"), connection=async_connection, notify=True)
    await async_engine.dispose()

    assert await stored(sql) == ["a", "b"]
    await eventually("both are heard of", lambda: heard == ["outbox", "outbox"])
