"""I2. No event is skipped by commit order: positions are assigned before commit, and commits come in any order."""

import asyncio
import statistics
from collections import Counter

import asyncpg

from pgbackend import Backend, Event
from tests.support.dispatchers import Catch
from tests.support.figures import report
from tests.support.polling import eventually
from tests.support.producers import INSERT, Crowd


async def test_24_producers_with_rollbacks_lose_and_repeat_nothing_beside_an_open_transaction(
    database: str, long: bool
) -> None:
    crowd = Crowd(database, producers=24, transactions=1000 if long else 40, pause=0.05)
    unrelated = await asyncpg.connect(database)
    await unrelated.execute("CREATE TABLE unrelated (n int)")
    held = unrelated.transaction(isolation="repeatable_read")
    await held.start()
    # It has an xid and a snapshot, which would hold back a fence that looks at transactions instead of locks.
    await unrelated.execute("INSERT INTO unrelated VALUES (1)")
    plain, keyed, strict = Catch(), Catch(), Catch()
    async with Backend(database, hole_wait=60.0) as backend:
        await backend.subscribe("plain", plain)
        await backend.subscribe("keyed", keyed, order="key", shards=2)
        await backend.subscribe("strict", strict, order="strict")
        await crowd.run()
        for catch in (plain, keyed, strict):
            await catch.has(*crowd.committed, timeout=30)
    await held.rollback()
    await unrelated.close()

    for catch in (plain, keyed, strict):
        assert Counter(catch.ids) == Counter(crowd.committed.keys()), (
            "an event was lost, handled twice, or never committed"
        )
    assert strict.positions == sorted(strict.positions)
    delays = sorted(plain.at[id_] - done for id_, done in crowd.committed.items())
    median, p99 = statistics.median(delays), delays[int(len(delays) * 0.99)]
    report(
        f"{len(crowd.committed)} events, {crowd.rolled_back} rolled back; delivery after commit: "
        f"median {median * 1000:.1f} ms, p99 {p99 * 1000:.1f} ms, max {delays[-1] * 1000:.1f} ms"
    )
    # Far below hole_wait, so nothing waited for the unrelated transaction. The promise is 0.1 s on a quiet machine.
    assert median < 5


async def test_events_that_commit_against_the_order_of_their_positions_are_delivered(database: str) -> None:
    connections = [await asyncpg.connect(database) for _ in range(4)]
    transactions = [connection.transaction() for connection in connections]
    for number, (connection, transaction) in enumerate(zip(connections, transactions, strict=True)):
        await transaction.start()
        await connection.execute(INSERT, str(number))
    plain, strict = Catch(), Catch()
    async with Backend(database, hole_wait=0.2) as backend:
        await backend.subscribe("plain", plain, start="earliest")
        await backend.subscribe("strict", strict, start="earliest", order="strict")
        await transactions[3].commit()
        await plain.has("3")
        await transactions[1].rollback()
        await transactions[2].commit()
        await plain.has("2")
        await transactions[0].commit()
        await plain.has("0")
        await strict.has("0", "2", "3")
    for connection in connections:
        await connection.close()

    assert plain.ids == ["3", "2", "0"]
    assert strict.ids == ["0", "2", "3"]


async def test_an_event_whose_appender_was_open_during_subscribe_latest_is_delivered(database: str) -> None:
    producer = await asyncpg.connect(database)
    await producer.execute(INSERT, "before")
    transaction = producer.transaction()
    await transaction.start()
    await producer.execute(INSERT, "open")
    other = await asyncpg.connect(database)
    await other.execute(INSERT, "also before")
    catch = Catch()
    async with Backend(database, hole_wait=0.2) as backend:
        await backend.subscribe("late", catch, start="latest")
        await transaction.commit()
        await other.execute(INSERT, "after")
        await catch.has("open", "after")
    await producer.close()
    await other.close()

    assert sorted(catch.ids) == ["after", "open"]


async def test_the_next_owner_delivers_pending_events(database: str) -> None:
    producer = await asyncpg.connect(database)
    transaction = producer.transaction()
    await transaction.start()
    await producer.execute(INSERT, "open")
    other = await asyncpg.connect(database)
    await other.execute(INSERT, "after")
    first = Catch()
    async with Backend(database, hole_wait=0.1) as backend:
        await backend.subscribe("billing", first, start="earliest")
        await first.has("after")
    pending = await other.fetchval("SELECT pending::text FROM pgbackend.offsets")
    await transaction.commit()
    second = Catch()
    async with Backend(database, hole_wait=0.1) as backend:
        await backend.subscribe("billing", second)
        await second.has("open")
    left = await other.fetchval("SELECT pending::text FROM pgbackend.offsets")
    await producer.close()
    await other.close()

    assert (pending, left) == ("{[1,2)}", "{}")
    assert (first.ids, second.ids) == (["after"], ["open"])


async def test_a_rolled_back_bulk_load_is_one_range_of_pending_until_it_is_dropped(database: str) -> None:
    producer = await asyncpg.connect(database)
    transaction = producer.transaction()
    await transaction.start()
    await producer.execute(
        "INSERT INTO pgbackend.events (id, source, type) SELECT n, 'test', 'test' FROM generate_series(1, 50000) n"
    )
    other = await asyncpg.connect(database)
    await other.execute(INSERT, "after")
    catch = Catch()
    async with Backend(database, hole_wait=0.1) as backend:
        await backend.subscribe("billing", catch, start="earliest")
        await catch.has("after")

        async def offset() -> tuple[int, str]:
            row = await other.fetchrow("SELECT position, pending::text FROM pgbackend.offsets")
            assert row
            return row["position"], row["pending"]

        async def is_pending() -> bool:
            return await offset() == (50001, "{[1,50001)}")

        async def is_dropped() -> bool:
            return await offset() == (50001, "{}")

        await eventually("the hole is pending", is_pending)
        await transaction.rollback()
        await eventually("the hole is no longer pending", is_dropped)
    await producer.close()
    await other.close()

    assert catch.ids == ["after"]


async def test_subscriptions_that_move_between_readers_lose_nothing(database: str) -> None:
    """Slow ones leave the shared buffer for readers of their own, quick ones share, and each keeps its holes."""
    crowd = Crowd(database, producers=8, transactions=60, pause=0.05)
    catches = [Catch() for _ in range(4)]

    async def slowly(catch: Catch, event: Event) -> None:
        await asyncio.sleep(0.002)
        await catch(event)

    async with Backend(database, hole_wait=0.02, buffer_bytes=20_000, window_events=20) as backend:
        await backend.subscribe("quick", catches[0])
        await backend.subscribe("slow", lambda event: slowly(catches[1], event), concurrency=1)
        load = asyncio.create_task(crowd.run())
        await catches[0].has(timeout=10)
        await backend.subscribe("from the start", catches[2], start="earliest")
        await backend.subscribe("keyed", lambda event: slowly(catches[3], event), start="earliest", order="key")
        await load
        for catch in catches:
            await catch.has(*crowd.committed, timeout=30)

    for catch in catches:
        assert Counter(catch.ids) == Counter(crowd.committed.keys())
