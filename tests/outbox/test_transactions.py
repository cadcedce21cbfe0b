"""An event is part of the caller's transaction, on each kind of connection."""

from collections.abc import AsyncIterator

import asyncpg
import pytest

from pgbackend import ConfigError, EventError, PgBackendError, SchemaError
from pgbackend.log.notify import channel
from pgbackend.postgres import schema
from pgbackend.postgres.sql import quote_ident
from pgbackend.torture.proxy import Proxy
from tests.support.backends import running
from tests.support.databases import Sql, connected
from tests.support.dispatchers import Catch
from tests.support.events import make_event
from tests.support.outbox import KINDS, Harness, opened
from tests.support.polling import eventually

# Sessions of other drivers need the owner's own tables, and a pooler of their configuration.
pytestmark = [pytest.mark.direct, pytest.mark.owner]

STRANGE = "Of \"many\" 'words': 100%s $1 :value \\:x {schema} %%"


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
async def orders(database: str) -> None:
    """The caller's own table."""
    async with connected(database) as connection:
        await connection.execute("CREATE TABLE orders (id int PRIMARY KEY)")


@pytest.fixture
async def harness(kind: str, database: str, orders: None) -> AsyncIterator[Harness]:
    async with opened(kind, database) as harness:
        yield harness


async def stored(sql: Sql, name: str = "pgbackend") -> list[str]:
    """The ids of all events in the log, in its order."""
    return [row["id"] for row in await sql.fetch(f"SELECT id FROM {quote_ident(name)}.events ORDER BY position")]


async def ordered(sql: Sql) -> list[int]:
    """The caller's orders."""
    return [row["id"] for row in await sql.fetch("SELECT id FROM orders ORDER BY id")]


async def test_an_event_appears_with_the_commit_and_is_dispatched(harness: Harness, database: str, sql: Sql) -> None:
    catch = Catch()
    async with running(database) as consumer:
        await consumer.subscribe("billing", catch)
        await harness.begin()
        await harness.execute("INSERT INTO orders VALUES (1)")
        await harness.produce(make_event("a"))
        assert await stored(sql) == []

        await harness.commit()

        assert (await stored(sql), await ordered(sql)) == (["a"], [1])
        await catch.has("a")


async def test_nothing_appears_after_a_rollback(harness: Harness, sql: Sql) -> None:
    await harness.begin()
    await harness.execute("INSERT INTO orders VALUES (1)")
    await harness.produce(make_event("a"))

    await harness.rollback()

    assert (await stored(sql), await ordered(sql)) == ([], [])


async def test_a_savepoint_that_is_rolled_back_takes_only_its_own_events(harness: Harness, sql: Sql) -> None:
    await harness.begin()
    await harness.execute("INSERT INTO orders VALUES (1)")
    await harness.produce(make_event("a"))
    await harness.savepoint()
    await harness.execute("INSERT INTO orders VALUES (2)")
    await harness.produce(make_event("b"))

    await harness.rollback_to_savepoint()

    await harness.produce(make_event("c"))
    await harness.commit()
    assert (await stored(sql), await ordered(sql)) == (["a", "c"], [1])


async def test_an_error_in_the_middle_is_the_drivers_and_takes_all_events(harness: Harness, sql: Sql) -> None:
    await harness.begin()
    await harness.execute("INSERT INTO orders VALUES (1)")
    await harness.produce(make_event("a"))
    with pytest.raises(harness.conflict):
        await harness.execute("INSERT INTO orders VALUES (1)")
    with pytest.raises(harness.errors):
        await harness.produce(make_event("b"))
    await harness.rollback()

    assert (await stored(sql), await ordered(sql)) == ([], [])
    await harness.begin()
    await harness.produce(make_event("c"))
    await harness.commit()
    assert await stored(sql) == ["c"]


async def test_an_invalid_event_leaves_the_transaction_as_it_was(harness: Harness, sql: Sql) -> None:
    await harness.begin()
    await harness.execute("INSERT INTO orders VALUES (1)")
    with pytest.raises(EventError):
        await harness.produce(b'{"specversion": "1.0"}')
    with pytest.raises(EventError, match="max_event_bytes"):
        await harness.produce(make_event("a"), make_event("large", b"." * (1 << 20)))

    await harness.produce(make_event("b"))
    await harness.commit()

    assert (await stored(sql), await ordered(sql)) == (["b"], [1])


async def test_a_connection_that_commits_each_statement_is_refused(kind: str, database: str, sql: Sql) -> None:
    async with opened(kind, database, autocommit=True) as harness:
        with pytest.raises(ConfigError, match=r"in no transaction, so nothing was sent\. "):
            await harness.produce(make_event("a"))

        await harness.execute("SELECT 1")  # the connection is as good as before
    assert await stored(sql) == []


async def test_a_database_without_the_log_is_named(kind: str, database: str, empty_database: str) -> None:
    async with opened(kind, empty_database, log=database) as harness:
        await harness.begin()
        with pytest.raises(SchemaError, match=r'no log in schema "pgbackend"\. Run `pgbackend migrate`') as refused:
            await harness.produce(make_event("a"))

        assert isinstance(refused.value.__cause__, harness.errors)
        await harness.rollback()


@pytest.mark.parametrize("kind", [kind for kind, client in KINDS.items() if not client.reconnects], indirect=True)
async def test_a_closed_connection_raises_the_drivers_error(harness: Harness) -> None:
    await harness.close()

    with pytest.raises(harness.errors):
        await harness.produce(make_event("a"))


@pytest.mark.parametrize("arrives", [True, False], ids=["commit-arrives", "commit-is-lost"])
async def test_an_event_shares_the_fate_of_a_commit_whose_answer_is_lost(
    kind: str, database: str, orders: None, sql: Sql, *, arrives: bool
) -> None:
    async with Proxy(database) as proxy, opened(kind, proxy.dsn, log=database) as harness:
        await harness.begin()
        await harness.execute("INSERT INTO orders VALUES (1)")
        await harness.produce(make_event("a"))
        if arrives:
            proxy.lose_reply_to(b"COMMIT")
        else:
            proxy.cut()

        with pytest.raises(harness.errors) as lost:
            await harness.commit()

        assert not isinstance(lost.value, PgBackendError)

    async def is_over() -> bool:
        others = "SELECT count(*) FROM pg_locks WHERE relation = 'orders'::regclass AND pid <> pg_backend_pid()"
        return not await sql.fetchval(others)

    await eventually("the transaction has ended", is_over)
    assert (await stored(sql), await ordered(sql)) == ((["a"], [1]) if arrives else ([], []))


async def test_positions_follow_the_order_of_a_list_in_a_schema_of_any_name(kind: str, empty_database: str) -> None:
    await schema.migrate(lambda: asyncpg.connect(empty_database), STRANGE)
    async with connected(empty_database) as connection:
        async with opened(kind, empty_database, schema=STRANGE) as harness:
            await harness.begin()
            await harness.produce(make_event("first"), notify=True)
            await harness.produce_many(make_event(str(number)) for number in range(1500))
            await harness.produce()
            await harness.commit()

        assert await stored(connection, STRANGE) == ["first", *map(str, range(1500))]


async def test_a_notify_in_the_transaction_is_heard_with_its_commit(harness: Harness, database: str) -> None:
    heard: list[object] = []
    async with connected(database) as listener:
        await listener.add_listener(channel("pgbackend"), lambda *args: heard.append(args[-1]))
        await harness.begin()
        await harness.produce(make_event("a"), notify=True)
        await harness.produce(make_event("b"), notify=True)
        await listener.execute("SELECT 1")
        assert heard == []

        await harness.commit()

        await eventually("the NOTIFY is heard", lambda: heard == ["outbox"])
