"""Events that were removed before a subscription handled them: recorded as skipped, and never half delivered."""

import asyncio
from typing import Any

import asyncpg
import pytest

from pgbackend import Backend, Event, Reject, Retry
from pgbackend.facts import Recorder
from pgbackend.model import Order
from pgbackend.postgres.pool import Database
from tests.support.backends import settled, status_of, waiting
from tests.support.dispatchers import Catch, Gate
from tests.support.events import make_event
from tests.support.polling import eventually
from tests.support.producers import INSERT

SETTINGS: dict[str, Any] = {"commit_interval": 0.01, "poll_interval": 0.1, "hole_wait": 0.1}
OFTEN = Retry(attempts=1000, delay=0.05, backoff="constant")
pytestmark = pytest.mark.owner


@pytest.fixture
async def narrow(sql: Any) -> None:
    """The log has two segments: one 100 positions wide, and one so wide that no more are made."""
    for name in await sql.fetch(
        "SELECT inhrelid::regclass FROM pg_inherits WHERE inhparent = 'pgbackend.events'::regclass"
    ):
        await sql.execute(f"DROP TABLE {name[0]}")
    for lower, upper in ((0, 100), (100, 300_000_000)):
        await sql.execute(f"""
            CREATE TABLE pgbackend.events_{lower} PARTITION OF pgbackend.events
            FOR VALUES FROM ({lower}) TO ({upper})""")


async def remove_first_segment(sql: Any, how: str) -> None:
    if how == "concurrently":
        await sql.execute("ALTER TABLE pgbackend.events DETACH PARTITION pgbackend.events_0 CONCURRENTLY")
    elif how == "detach":
        await sql.execute("ALTER TABLE pgbackend.events DETACH PARTITION pgbackend.events_0")
    else:
        await sql.execute("DROP TABLE pgbackend.events_0")


@pytest.mark.parametrize("how", ["DELETE FROM", "TRUNCATE"])
async def test_failed_events_that_were_deleted_do_not_hold_up_other_retries(database: str, sql: Any, how: str) -> None:
    retries: list[str] = []

    async def flaky(event: Event) -> None:
        if event.id.startswith("old") and int(event.id[3:]) % 5:
            raise RuntimeError("never")
        if event.id.startswith("new"):
            if event.attempt == 1:
                raise RuntimeError("once")
            retries.append(event.id)

    with Recorder() as recorder:
        async with Backend(database, **SETTINGS) as backend:
            await backend.subscribe("s", flaky, retry=Retry(attempts=9, delay=1.0, backoff="constant"))
            await backend.produce_many([make_event(f"old{number}") for number in range(600)])
            await waiting(backend, 480)
            await sql.execute(f"{how} pgbackend.events")
            await backend.produce_many([make_event(f"new{number}") for number in range(5)])
            found = await settled(backend)

    assert sorted(retries) == [f"new{number}" for number in range(5)]
    assert found.skipped == 480
    assert found.dead_letters == 0
    facts = recorder.all("events skipped")
    assert sum(int(str(one["positions"])) for one in facts) == 480
    assert len(facts) < 10


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("how", ["drop", "detach", "concurrently"])
async def test_a_segment_that_was_removed_before_it_was_read_counts_as_skipped(
    database: str, sql: Any, how: str
) -> None:
    catch = Catch()
    idle = Backend(database, **SETTINGS)
    await idle.init()
    await idle.subscribe("s", catch, start="earliest")
    await idle.produce_many([make_event(str(number)) for number in range(5)])
    await idle.stop()
    await sql.execute("SELECT setval('pgbackend.events_position_seq', 100)")
    await remove_first_segment(sql, how)
    with Recorder() as recorder:
        async with Backend(database, **SETTINGS) as backend:
            await backend.subscribe("s", catch, shards=1)
            await backend.produce(make_event("after"))
            await catch.has("after")
            found = await settled(backend)

    assert catch.ids == ["after"]
    assert found.skipped == 99
    assert [str(one["ranges"]) for one in recorder.all("events skipped")] == ["{[1,100)}"]


@pytest.mark.usefixtures("narrow")
async def test_a_removed_segment_counts_once_for_all_shards_from_where_each_stood(database: str, sql: Any) -> None:
    catch = Catch()
    async with Backend(database, **SETTINGS) as backend:
        await backend.subscribe("s", catch, start="earliest", shards=3)
        await backend.produce_many([make_event(str(number)) for number in range(9)])
        await settled(backend)
    idle = Backend(database, **SETTINGS)
    await idle.init()
    await idle.produce_many([make_event(f"gone{number}") for number in range(9)])
    await idle.stop()
    await sql.execute("SELECT setval('pgbackend.events_position_seq', 100)")
    await remove_first_segment(sql, "detach")
    async with Backend(database, **SETTINGS) as backend:
        await backend.subscribe("s", catch, shards=3)
        await backend.produce_many([make_event(f"after{number}") for number in range(9)])
        found = await settled(backend)

    assert sorted(catch.ids) == sorted([*map(str, range(9)), *(f"after{number}" for number in range(9))])
    assert found.skipped == 99 - 9


@pytest.mark.usefixtures("narrow")
async def test_events_removed_before_a_subscription_began_or_moved_are_not_skipped(database: str, sql: Any) -> None:
    catch = Catch()
    async with Backend(database, **SETTINGS) as backend:
        await backend.produce(make_event("before"))
        await sql.execute("SELECT setval('pgbackend.events_position_seq', 100)")
        await remove_first_segment(sql, "drop")
        await backend.subscribe("s", catch, start="earliest")
        await backend.produce(make_event("after"))
        await catch.has("after")
        first = await settled(backend)
        await backend.seek("s", 3)

        async def came_again() -> bool:
            return catch.ids == ["after", "after"]

        await eventually("the event comes again", came_again)
        moved = await settled(backend)

    assert (first.skipped, moved.skipped) == (0, 0)


async def test_an_event_in_flight_that_is_deleted_before_the_next_owner_comes_counts_as_skipped(
    database: str, sql: Any
) -> None:
    gate = Gate()

    async def handle(event: Event) -> None:
        if event.id != "handled":
            await gate(event)

    async with Backend(database, **SETTINGS, drain_timeout=0.1) as backend:
        await backend.subscribe("s", handle)
        await backend.produce_many([make_event("stuck"), make_event("handled"), make_event("also stuck")])
        await gate.holds(2)

        async def is_committed() -> bool:
            return bool((await status_of(backend)).shards[0].pending)

        await eventually("the event in flight is pending", is_committed)
    await sql.execute("DELETE FROM pgbackend.events WHERE id = 'stuck'")
    catch = Catch()
    async with Backend(database, **SETTINGS) as backend:
        await backend.subscribe("s", catch)
        await catch.has("also stuck")
        found = await settled(backend)

    assert catch.ids == ["also stuck"]
    assert found.skipped == 1


async def test_a_position_that_was_rolled_back_does_not_count_as_skipped(database: str) -> None:
    catch = Catch()
    producer = await asyncpg.connect(database)
    async with Backend(database, **SETTINGS) as backend:
        await backend.subscribe("s", catch)
        await producer.execute("BEGIN")
        await producer.execute(INSERT, "never")
        await backend.produce(make_event("a"))
        await catch.has("a")

        async def is_passed() -> bool:
            return bool((await status_of(backend)).shards[0].pending)

        await eventually("the hole is pending", is_passed)
    await producer.close()
    async with Backend(database, **SETTINGS) as backend:
        await backend.subscribe("s", catch)
        found = await settled(backend)

    assert found.skipped == 0


@pytest.mark.parametrize("order", ["key", "strict"])
async def test_a_deleted_event_no_longer_holds_up_the_events_behind_it(database: str, sql: Any, order: Order) -> None:
    failing = Catch(fails=lambda event: event.id == "first")
    async with Backend(database, **SETTINGS) as backend:
        await backend.subscribe("s", failing, order=order, retry=Retry(attempts=9, delay=60.0))
        await backend.produce_many(
            [make_event("other", key="x"), make_event("first", key="k"), make_event("second", key="k")]
        )

        async def has_failed() -> bool:
            return bool((await status_of(backend)).redeliveries)

        await eventually("it has failed", has_failed)
        await backend.produce(make_event("third", key="y"))
        if order == "key":
            await failing.has("third")
    await sql.execute("DELETE FROM pgbackend.events WHERE id = 'first'")
    catch = Catch()
    async with Backend(database, **SETTINGS) as backend:
        await backend.subscribe("s", catch, order=order)
        await catch.has("second")
        found = await settled(backend)

    assert "first" not in catch.attempts
    assert found.skipped == 1


async def test_an_event_deleted_while_it_was_handled_is_skipped_and_not_buried(database: str, sql: Any) -> None:
    async def lose(event: Event) -> None:
        await sql.execute("DELETE FROM pgbackend.events WHERE position = $1", event.position)
        raise Reject("no")

    with Recorder() as recorder:
        async with Backend(database, **SETTINGS) as backend:
            await backend.subscribe("s", lose, concurrency=1)
            await backend.produce(make_event("a"))
            await recorder.wait("events skipped")
            found = await settled(backend)

    assert (found.skipped, found.dead_letters) == (1, 0)
    assert not recorder.all("event buried")


async def test_an_event_deleted_before_its_retry_is_stored_is_skipped(database: str, sql: Any) -> None:
    async def lose(event: Event) -> None:
        await sql.execute("DELETE FROM pgbackend.events WHERE position = $1", event.position)
        raise RuntimeError("once")

    async with Backend(database, **SETTINGS) as backend:
        await backend.subscribe("s", lose, concurrency=1, retry=OFTEN)
        await backend.produce(make_event("a"))

        async def is_skipped() -> bool:
            return (await status_of(backend)).skipped == 1

        await eventually("it is skipped", is_skipped)
        found = await settled(backend)

    assert found.redeliveries == 0


async def test_a_large_event_that_is_deleted_while_it_is_read_is_not_delivered_without_its_data(
    database: str, sql: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = Database.fetch

    async def delete_before(self: Database, statement: str, *args: Any, **options: Any) -> Any:
        if "read_large" in statement:
            await sql.execute("DELETE FROM pgbackend.events WHERE id = 'gone'")
        return await fetch(self, statement, *args, **options)

    monkeypatch.setattr(Database, "fetch", delete_before)
    got: dict[str, bytes | None] = {}

    async def keep(event: Event) -> None:
        got[event.id] = event.data_bytes

    data = b"x" * 20_000
    async with Backend(database, **SETTINGS) as backend:
        await backend.subscribe("s", keep)
        await backend.produce_many([make_event("a", data), make_event("gone", data), make_event("b", data)])
        await asyncio.wait_for(_has(got, "a", "b"), 30)
        found = await settled(backend)

    assert got == {"a": data, "b": data}
    assert found.skipped == 1


async def _has(got: dict[str, Any], *ids: str) -> None:
    async def has() -> bool:
        return set(ids) <= got.keys()

    await eventually("they came", has)


async def test_a_dead_letter_is_redelivered_from_its_copy_when_the_event_was_deleted(database: str, sql: Any) -> None:
    catch = Catch(fails=lambda _: True)
    async with Backend(database, **SETTINGS) as backend:
        await backend.subscribe("s", catch, retry=Retry(attempts=1))
        await backend.produce(make_event("a"))

        async def is_buried() -> bool:
            return (await status_of(backend)).dead_letters == 1

        await eventually("it is buried", is_buried)
        await sql.execute("DELETE FROM pgbackend.events")
        catch.fails = lambda _: False
        assert await backend.redeliver(subscription="s") == 1
        await catch.has("a")
        found = await settled(backend)

    assert found.skipped == 0


@pytest.mark.parametrize("bounds", ["DEFAULT", "FOR VALUES FROM (MINVALUE) TO (0)"])
async def test_a_partition_that_is_no_segment_is_ignored(database: str, sql: Any, bounds: str) -> None:
    await sql.execute(f"CREATE TABLE pgbackend.events_other PARTITION OF pgbackend.events {bounds}")
    catch = Catch()
    async with Backend(database, **SETTINGS) as backend:
        await backend.subscribe("s", catch, start="earliest")
        async with asyncio.timeout(10):
            await backend.produce(make_event("before"))
            rolled_back = sql.transaction()
            await rolled_back.start()
            await sql.execute(INSERT, "never")
            await rolled_back.rollback()
            await backend.produce(make_event("after"))
            await catch.has("before", "after")
        status = await settled(backend)

    assert status.skipped == 0
