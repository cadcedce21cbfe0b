"""I10. Nothing depends on a NOTIFY arriving."""

import time

import asyncpg
import pytest

from pgbackend import Backend, facts
from pgbackend.torture.proxy import Proxy
from tests.support.databases import Sql
from tests.support.dispatchers import Catch
from tests.support.events import make_event
from tests.support.polling import eventually
from tests.support.producers import INSERT


@pytest.mark.direct
@pytest.mark.slow
async def test_polling_delivers_when_every_notify_is_lost_and_the_listener_reports_it(database: str) -> None:
    catch, delays = Catch(), []
    producer = Backend(database)
    await producer.init()
    async with Proxy(database, swallow_notifies=True) as proxy:
        with facts.Recorder() as recorder:
            async with Backend(database, listen_dsn=proxy.dsn, poll_interval=0.1, lease_timeout=1.5) as backend:
                await backend.subscribe("billing", catch)
                for number in range(20):
                    await producer.produce(make_event(str(number)))
                    produced = time.monotonic()
                    await catch.has(str(number))
                    delays.append(catch.at[str(number)] - produced)
                await recorder.wait("listener is deaf", timeout=20)
                # It listens again, in vain. Leases stay, and events are delivered.
                await producer.produce(make_event("after"))
                await catch.has("after")
    await producer.stop()

    assert sorted(delays)[len(delays) // 2] < 0.1 + 1.0
    assert catch.ids == [*map(str, range(20)), "after"]


@pytest.mark.direct
async def test_a_notify_comes_long_before_the_next_poll(database: str) -> None:
    catch = Catch()
    producer = Backend(database)
    await producer.init()
    async with Backend(database, poll_interval=60.0) as backend:
        await backend.subscribe("billing", catch)
        for number in range(5):
            await producer.produce(make_event(str(number)))
            await catch.has(str(number))
    await producer.stop()


async def test_polling_finds_events_from_plain_sql(database: str) -> None:
    catch = Catch()
    connection = await asyncpg.connect(database)
    async with Backend(database, poll_interval=0.2) as backend:
        await backend.subscribe("billing", catch)
        for number in range(5):
            await connection.execute(INSERT, str(number))
            await catch.has(str(number))
    await connection.close()


async def test_polling_finds_shards_that_become_free(database: str, sql: Sql) -> None:
    """As when the owner's backend dies, without a NOTIFY."""
    first, second = Catch(), Catch()
    async with Backend(database, poll_interval=0.2) as waiting, Backend(database) as owner:
        await owner.subscribe("billing", first)
        await owner.produce(make_event("1"))
        await first.has("1")
        await waiting.subscribe("billing", second)
        await sql.execute("UPDATE pgbackend.offsets SET owner = NULL, epoch = nextval('pgbackend.epochs')")
        await waiting.produce_many([make_event(str(number)) for number in range(2, 20)])

        async def all_handled() -> bool:
            return len({*first.ids, *second.ids}) == 19

        await eventually("the shard's owner handles all events", all_handled)
