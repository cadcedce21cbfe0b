"""`Backend.reshard`: a running subscription gets another number of shards and loses and repeats nothing."""

import asyncio
import os
import socket
from collections import Counter
from typing import Any

import asyncpg
import pytest

from pgbackend import Backend, ConfigError, Event, Retry, SubscriptionBusyError, SubscriptionNotFoundError
from pgbackend.facts import Recorder
from pgbackend.log.ranges import RangeSet
from tests.support.dispatchers import Catch, Gate
from tests.support.events import make_event
from tests.support.ledger import Ledger
from tests.support.polling import eventually
from tests.support.producers import INSERT
from tests.support.worker import Worker

SETTINGS: dict[str, Any] = {"commit_interval": 0.01, "poll_interval": 0.2, "hole_wait": 0.2}


async def rows(observer: "asyncpg.Connection[asyncpg.Record]") -> list[tuple[int, int, int | None, int, str]]:
    return [
        tuple(row)
        for row in await observer.fetch(
            "SELECT shards, shard, until, position, pending::text FROM pgbackend.offsets ORDER BY 1, 2"
        )
    ]


async def settled(observer: "asyncpg.Connection[asyncpg.Record]", position: int, shards: int) -> None:
    async def are_settled() -> bool:
        return await rows(observer) == [(shards, shard, None, position, "{}") for shard in range(shards)]

    try:
        await eventually(f"all {shards} shards are settled at {position}", are_settled, 20)
    except TimeoutError as error:
        raise TimeoutError(f"{error}: {await rows(observer)}") from None


@pytest.mark.parametrize("order", ["none", "key"])
async def test_the_number_of_shards_goes_up_and_down_under_load(database: str, order: Any) -> None:
    observer = await asyncpg.connect(database)
    handled: list[tuple[str, int]] = []

    async def handle(event: Event) -> None:
        await asyncio.sleep(0.002)
        handled.append((event.attributes_text["partitionkey"], event.position))

    async with Backend(database, **SETTINGS) as one, Backend(database, **SETTINGS) as two:
        for backend in (one, two):
            await backend.subscribe("s", handle, start="earliest", order=order)
        count = 0
        for shards in (4, 2, 8, 3, 1):
            producing = asyncio.create_task(
                one.produce_many([make_event(str(count + n), key=f"k{n % 10}") for n in range(300)])
            )
            count += 300
            await two.reshard("s", shards)
            await producing
            # The next change may come before the new shards have started.
        await settled(observer, count, 1)
    await observer.close()

    assert Counter(position for _, position in handled).most_common(1)[0][1] == 1, "an event was repeated"
    assert len(handled) == count
    if order == "key":
        for key in {key for key, _ in handled}:
            positions = [position for other, position in handled if other == key]
            assert positions == sorted(positions)


async def test_calls_at_once_for_different_numbers_succeed_one_after_another(database: str) -> None:
    observer = await asyncpg.connect(database)
    handled: list[str] = []

    async def handle(event: Event) -> None:
        await asyncio.sleep(0.05)
        handled.append(event.id)

    async with Backend(database, **SETTINGS) as one, Backend(database, **SETTINGS) as two:
        for backend in (one, two):
            await backend.subscribe("s", handle, start="earliest", shards=2, concurrency=4)
        await one.produce_many([make_event(str(number), key=str(number)) for number in range(300)])
        with Recorder() as recorder:
            await asyncio.gather(*((one, two)[shards % 2].reshard("s", shards) for shards in (3, 4, 5, 6, 7)))
            changes = [int(str(fact["shards"])) for fact in recorder.all("subscription resharded")]
        # The calls need not return in the order of their changes.
        last = await observer.fetchval("SELECT shards FROM pgbackend.subscriptions")
        await settled(observer, 300, last)
    await observer.close()

    assert sorted(changes) == [3, 4, 5, 6, 7]
    assert sorted(handled) == sorted(str(number) for number in range(300))


async def test_lagging_shards_go_on_to_the_barrier(database: str) -> None:
    observer = await asyncpg.connect(database)
    producer = Backend(database)
    await producer.init()
    handled: list[str] = []

    async def handle(event: Event) -> None:
        handled.append(event.id)

    await producer.subscribe("s", handle, start="earliest", shards=2)
    await producer.produce_many([make_event(str(number), key=str(number)) for number in range(100)])
    # As if only one of the shards had been run.
    of_one = [
        row["id"]
        for row in await observer.fetch(
            "SELECT id FROM pgbackend.events"
            " WHERE pgbackend.key_hash(partitionkey, subject, source, id) % 2 = 1 AND position <= 80"
        )
    ]
    await observer.execute("UPDATE pgbackend.offsets SET position = 80 WHERE shard = 1")
    await producer.reshard("s", 3)
    assert await rows(observer) == [
        (2, 0, 80, 0, "{}"),
        (2, 1, 80, 80, "{}"),
        *((3, n, None, 80, "{}") for n in range(3)),
    ]
    running = asyncio.create_task(producer.start())
    await settled(observer, 100, 3)
    await producer.stop()
    await running
    await observer.close()

    assert sorted(handled + of_one) == sorted(str(number) for number in range(100))


async def test_the_number_can_be_changed_again_before_the_old_shards_have_finished(database: str) -> None:
    observer = await asyncpg.connect(database)
    backend = Backend(database, **SETTINGS)
    await backend.init()
    catch = Catch()
    await backend.subscribe("s", catch, start="earliest", shards=2)
    ids = [str(number) for number in range(50)]
    await backend.produce_many([make_event(id_, key=id_) for id_ in ids])
    await observer.execute("UPDATE pgbackend.offsets SET position = 10 WHERE shard = 1")
    gone = [
        r["id"]
        for r in await observer.fetch(
            "SELECT id FROM pgbackend.events"
            " WHERE pgbackend.key_hash(partitionkey, subject, source, id) % 2 = 1 AND position <= 10"
        )
    ]
    await backend.reshard("s", 3)
    await backend.reshard("s", 5)
    assert [row[:4] for row in await rows(observer)] == [
        (2, 0, 10, 0),
        (2, 1, 10, 10),
        *((5, n, None, 10) for n in range(5)),
    ]
    await backend.reshard("s", 2)
    assert [row[:4] for row in await rows(observer)] == [(2, 0, None, 0), (2, 1, None, 10)]
    await backend.reshard("s", 4)
    running = asyncio.create_task(backend.start())
    await settled(observer, 50, 4)
    await backend.stop()
    await running
    await observer.close()

    assert sorted(catch.ids + gone) == sorted(ids)


async def test_an_open_appender_does_not_delay_the_change_and_its_event_is_handled_once(database: str) -> None:
    observer, appender = await asyncpg.connect(database), await asyncpg.connect(database)
    catch = Catch()
    async with Backend(database, **SETTINGS) as backend:
        await backend.subscribe("s", catch, start="earliest", shards=2)
        transaction = appender.transaction()
        await transaction.start()
        await appender.execute(INSERT, "late")
        await backend.produce_many([make_event(str(number), key=str(number)) for number in range(20)])
        await catch.has(*(str(number) for number in range(20)))

        async def is_pending() -> bool:
            return all(row[3:] == (21, "{[1,2)}") for row in await rows(observer))

        await eventually("the hole is pending in both shards", is_pending)
        await backend.reshard("s", 5)

        async def has_new_shards() -> bool:
            return [row[:3] for row in await rows(observer)] == [(5, shard, None) for shard in range(5)]

        await eventually("the new shards are there", has_new_shards)
        await transaction.commit()
        await catch.has("late")
        await settled(observer, 21, 5)
    await appender.close()
    await observer.close()

    assert Counter(catch.ids).most_common(1)[0][1] == 1


async def test_pending_events_go_to_the_new_shard_of_their_key(database: str) -> None:
    observer = await asyncpg.connect(database)
    backend = Backend(database)
    await backend.init()
    await backend.subscribe("s", Catch(), start="earliest", shards=2)
    await backend.produce_many([make_event(str(number), key=str(number)) for number in range(60)])
    hashes = {
        row["position"]: row["key_hash"]
        for row in await observer.fetch(
            "SELECT position, pgbackend.key_hash(partitionkey, subject, source, id) AS key_hash FROM pgbackend.events"
        )
    }
    # Each shard has handled every third event, and a hole is open.
    hole = 61
    owed = {position for position in hashes if position % 3}
    for shard in range(2):
        mine = "".join(f",[{position},{position + 1})" for position in sorted(owed) if hashes[position] % 2 == shard)
        await observer.execute(
            "UPDATE pgbackend.offsets SET position = $1, pending = $2::text::int8multirange WHERE shard = $3",
            hole, f"{{[{hole},{hole + 1}){mine}}}", shard,
        )  # fmt: skip
    await backend.reshard("s", 5)
    left = {
        row["shard"]: {position for position in range(1, hole + 1) if position in RangeSet.parse(row["pending"])}
        for row in await observer.fetch("SELECT shard, pending::text FROM pgbackend.offsets")
    }
    await backend.stop()
    await observer.close()

    assert left == {n: {hole, *(position for position in owed if hashes[position] % 5 == n)} for n in range(5)}


@pytest.mark.parametrize("order", ["none", "key"])
async def test_failed_events_keep_their_attempts_and_their_key_waits_for_them(database: str, order: Any) -> None:
    observer = await asyncpg.connect(database)
    seen: list[tuple[str, int]] = []

    async def handle(event: Event) -> None:
        seen.append((event.id, event.attempt))
        if event.id.startswith("bad") and event.attempt < 3:
            raise RuntimeError("not yet")

    async with Backend(database, **SETTINGS) as backend:
        await backend.subscribe(
            "s", handle, start="earliest", order=order, retry=Retry(delay=0.3, backoff="constant", attempts=5)
        )
        for number in range(4):
            await backend.produce_many(
                [make_event(f"bad{number}", key=str(number)), make_event(f"{number}", key=str(number))]
            )

        async def have_failed() -> bool:
            return bool(await observer.fetchval("SELECT count(*) = 4 FROM pgbackend.redeliveries"))

        await eventually("the bad events have failed once", have_failed)
        await backend.reshard("s", 3)
        await settled(observer, 8, 3)

        async def nothing_is_due() -> bool:
            return not await observer.fetchval("SELECT count(*) FROM pgbackend.redeliveries")

        await eventually("no redelivery is left", nothing_is_due)
    await observer.close()

    for number in range(4):
        attempts = [(id_, attempt) for id_, attempt in seen if id_.endswith(str(number))]
        of_bad = [attempt for id_, attempt in attempts if id_.startswith("bad")]
        assert of_bad == [1, 2, 3]
        if order == "key":
            assert attempts[-1] == (str(number), 1), "an event overtook the failed one of its key"


async def test_running_dispatches_of_another_process_end_before_the_change(database: str) -> None:
    observer = await asyncpg.connect(database)
    gate = Gate()
    caller = Backend(database, drain_timeout=20.0)
    await caller.init()
    async with Backend(database, **SETTINGS) as backend:
        await backend.subscribe("s", gate, start="earliest", concurrency=3)
        await backend.produce_many([make_event(str(number), key=str(number)) for number in range(10)])
        await gate.holds(3)
        with Recorder() as recorder:
            resharding = asyncio.create_task(caller.reshard("s", 4))

            async def is_draining() -> bool:
                return bool(await observer.fetchval("SELECT draining_until IS NOT NULL FROM pgbackend.subscriptions"))

            await eventually("a drain is requested", is_draining)
            assert len(await rows(observer)) == 1
            gate.open()
            await resharding
            assert not recorder.all("lease lost")
        await settled(observer, 10, 4)
    await caller.stop()
    await observer.close()

    assert sorted(gate.handled, key=int) == [str(number) for number in range(10)]


@pytest.mark.slow
async def test_a_frozen_process_delays_the_change_no_longer_than_its_lease(database: str, tmp_path: Any) -> None:
    ledger = Ledger(tmp_path / "ledger")
    observer = await asyncpg.connect(database)
    caller = Backend(database)
    await caller.init()
    async with Worker(database, ledger, subscription="s", settings={**SETTINGS, "lease_timeout": 2.0}) as worker:

        async def is_owned() -> bool:
            return bool(await observer.fetchval("SELECT count(owner) FROM pgbackend.offsets"))

        await eventually("the worker has its shard", is_owned)
        worker.freeze()
        await caller.reshard("s", 2)
        assert [row[:2] for row in await rows(observer)] == [(2, 0), (2, 1)]
        worker.thaw()
        await caller.produce_many([make_event(str(number), key=str(number)) for number in range(20)])
        await settled(observer, 20, 2)
    await caller.stop()
    await observer.close()
    ledger.produced += [str(number) for number in range(20)]

    assert ledger.lost() == []
    assert ledger.doubled() == {}


async def test_a_worker_that_does_not_release_its_shard_is_named_and_goes_on(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgbackend.delivery.changes._HANDOVER", 0.0)
    gate, observer = Gate(), await asyncpg.connect(database)
    caller = Backend(database, drain_timeout=0.1, lease_timeout=0.1)
    await caller.init()
    async with Backend(database, **SETTINGS) as backend:
        await backend.subscribe("s", gate, start="earliest", concurrency=1)
        await backend.produce(make_event("a"))
        await gate.holds(1)
        with pytest.raises(SubscriptionBusyError, match=rf":{os.getpid()} that take longer") as caught:
            await caller.reshard("s", 4)
        assert caught.value.workers == (f"{socket.gethostname()}:{os.getpid()}",)
        gate.open()
        await backend.produce(make_event("b"))
        await settled(observer, 2, 1)
    await caller.stop()
    await observer.close()

    assert gate.handled == ["a", "b"]


async def test_a_cancelled_call_leaves_the_subscription_running(database: str) -> None:
    gate, observer = Gate(), await asyncpg.connect(database)
    caller = Backend(database)
    await caller.init()
    async with Backend(database, **SETTINGS) as backend:
        await backend.subscribe("s", gate, start="earliest", concurrency=1)
        await backend.produce(make_event("a"))
        await gate.holds(1)
        resharding = asyncio.create_task(caller.reshard("s", 4))

        async def is_draining() -> bool:
            return bool(await observer.fetchval("SELECT draining_until IS NOT NULL FROM pgbackend.subscriptions"))

        await eventually("a drain is requested", is_draining)
        resharding.cancel()
        await asyncio.wait({resharding})
        assert not await is_draining()
        gate.open()
        await backend.produce(make_event("b"))
        await settled(observer, 2, 1)
    await caller.stop()
    await observer.close()

    assert gate.handled == ["a", "b"]


async def test_a_complete_subscription_stays_complete(database: str) -> None:
    observer = await asyncpg.connect(database)
    catch = Catch()
    async with Backend(database, **SETTINGS) as backend:
        await backend.subscribe("s", catch, start="earliest", end=6, shards=2)
        await backend.produce_many([make_event(str(number), key=str(number)) for number in range(10)])

        async def is_complete() -> bool:
            (status,) = (await backend.status()).subscriptions
            return status.complete

        await eventually("the subscription is complete", is_complete)
        await backend.reshard("s", 3)
        await eventually("the subscription is complete with three shards", is_complete)
        assert len(await rows(observer)) == 3
    await observer.close()

    assert sorted(catch.ids) == ["0", "1", "2", "3", "4"]


async def test_a_seek_ends_a_change_of_the_number_and_an_alteration_does_not(database: str) -> None:
    observer = await asyncpg.connect(database)
    catch = Catch()
    backend = Backend(database, **SETTINGS)
    await backend.init()
    await backend.subscribe("s", catch, start="earliest", shards=2)
    await backend.produce_many([make_event(str(number), key=str(number)) for number in range(10)])
    await observer.execute("UPDATE pgbackend.offsets SET position = 5 WHERE shard = 0")
    await backend.reshard("s", 3)
    await backend.alter_subscription("s", order="key", end=None, start="latest")
    assert [row[:4] for row in await rows(observer)] == [
        (2, 0, 5, 5),
        (2, 1, 5, 0),
        *((3, n, None, 5) for n in range(3)),
    ]
    await backend.seek("s", 8)
    assert [row[:4] for row in await rows(observer)] == [(3, shard, None, 8) for shard in range(3)]
    running = asyncio.create_task(backend.start())
    await catch.has("8", "9")
    await backend.stop()
    await running
    await observer.close()

    assert sorted(catch.ids) == ["8", "9"]


async def test_invalid_terms_are_refused(database: str) -> None:
    backend = Backend(database)
    await backend.init()
    await backend.subscribe("s", Catch(), order="strict")
    with pytest.raises(ConfigError, match="single shard"):
        await backend.reshard("s", 2)
    with pytest.raises(ConfigError, match="from 1 to 1024"):
        await backend.reshard("s", 0)
    with pytest.raises(SubscriptionNotFoundError):
        await backend.reshard("unknown", 2)
    await backend.reshard("s", 1)
    await backend.stop()


async def test_events_between_an_earlier_end_and_the_barrier_are_kept_for_a_later_end(database: str) -> None:
    """A lagging old shard is finished at the earlier end, and never reads up to the barrier."""
    observer = await asyncpg.connect(database)
    catch = Catch()
    backend = Backend(database, **SETTINGS)
    await backend.init()
    await backend.subscribe("s", catch, start="earliest", shards=2)
    await backend.produce_many([make_event(str(number), key=str(number)) for number in range(30)])
    gone = await observer.fetch(
        """
        SELECT event.id
        FROM pgbackend.events AS event
        JOIN (VALUES (0, 12), (1, 25)) AS stand (shard, position)
            ON pgbackend.key_hash(partitionkey, subject, source, id) % 2 = shard
        WHERE event.position <= stand.position
        """
    )
    await observer.execute("UPDATE pgbackend.offsets SET position = CASE shard WHEN 0 THEN 12 ELSE 25 END")
    await backend.alter_subscription("s", order="none", end=10, start="earliest")
    await backend.reshard("s", 3)
    assert [row[:4] for row in await rows(observer)] == [(3, shard, None, 25) for shard in range(3)]
    await backend.alter_subscription("s", order="none", end=None, start="earliest")
    running = asyncio.create_task(backend.start())
    await settled(observer, 30, 3)
    await backend.stop()
    await running
    await observer.close()

    assert sorted([*catch.ids, *(row["id"] for row in gone)], key=int) == [str(number) for number in range(30)]


async def test_going_back_to_the_old_number_waits_for_running_dispatches_of_old_shards(database: str) -> None:
    observer = await asyncpg.connect(database)
    gate = Gate()
    caller = Backend(database, drain_timeout=20.0)
    await caller.init()
    await caller.produce_many([make_event(str(number), key=str(number)) for number in range(20)])
    async with Backend(database, **SETTINGS, window_events=2) as backend:
        await backend.subscribe("s", Catch(), start="earliest", shards=2)
        await settled(observer, 20, 2)
        await backend.unsubscribe("s")
        # As if one shard had fallen behind.
        await observer.execute("UPDATE pgbackend.offsets SET position = 0 WHERE shard = 0")
        lagging = await observer.fetch(
            "SELECT id FROM pgbackend.events"
            " WHERE pgbackend.key_hash(partitionkey, subject, source, id) % 2 = 0 ORDER BY position"
        )
        await caller.reshard("s", 3)
        await backend.subscribe("s", gate, shards=3, concurrency=2)
        await gate.holds(2)
        with Recorder() as recorder:
            resharding = asyncio.create_task(caller.reshard("s", 2))

            async def is_draining() -> bool:
                return bool(await observer.fetchval("SELECT draining_until IS NOT NULL FROM pgbackend.subscriptions"))

            await eventually("a drain is requested", is_draining)
            gate.open()
            await resharding
            assert not recorder.all("lease lost")
        await settled(observer, 20, 2)
    await caller.stop()
    await observer.close()

    assert Counter(gate.handled) == Counter(row["id"] for row in lagging)


async def test_an_event_that_failed_in_order_above_the_barrier_is_not_delivered_twice(database: str) -> None:
    observer = await asyncpg.connect(database)
    catch = Catch()
    backend = Backend(database, **SETTINGS)
    await backend.init()
    await backend.subscribe("s", catch, start="earliest", order="key", shards=2)
    await backend.produce_many([make_event(str(number), key=str(number)) for number in range(20)])
    gone = await observer.fetch(
        "SELECT id FROM pgbackend.events"
        " WHERE pgbackend.key_hash(partitionkey, subject, source, id) % 2 = 1 AND position <= 10"
    )
    await observer.execute("UPDATE pgbackend.offsets SET position = 10 WHERE shard = 1")
    # One failed in the farthest shard, above its offset, and one in the other shard.
    await observer.execute(
        """
        INSERT INTO pgbackend.redeliveries (subscription, position, key_hash, attempt, due_at, last_error)
        SELECT 's', position, pgbackend.key_hash(partitionkey, subject, source, id), 1, now(), 'it failed'
        FROM pgbackend.events
        WHERE position IN (
            SELECT min(position) FROM pgbackend.events
            WHERE pgbackend.key_hash(partitionkey, subject, source, id) % 2 = 1 AND position > 12
            UNION
            SELECT min(position) FROM pgbackend.events
            WHERE pgbackend.key_hash(partitionkey, subject, source, id) % 2 = 0 AND position > 2
        )
        """
    )
    await backend.reshard("s", 3)
    await backend.alter_subscription("s", order="none", end=None, start="earliest")
    running = asyncio.create_task(backend.start())
    await settled(observer, 20, 3)

    async def nothing_is_due() -> bool:
        return not await observer.fetchval("SELECT count(*) FROM pgbackend.redeliveries")

    await eventually("no redelivery is left", nothing_is_due)
    await backend.stop()
    await running
    await observer.close()

    assert sorted([*catch.ids, *(row["id"] for row in gone)], key=int) == [str(number) for number in range(20)]
