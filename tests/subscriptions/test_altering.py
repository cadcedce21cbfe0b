"""`Backend.alter_subscription`: a new order, end or start loses and repeats nothing."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from pgbackend import (
    Backend,
    ConfigError,
    DatabaseError,
    Event,
    Reject,
    Retry,
    SubscriptionMismatchError,
    SubscriptionNotFoundError,
)
from pgbackend.facts import Recorder
from pgbackend.log.notify import Notifier
from pgbackend.postgres.pool import Database
from tests.support.backends import complete, failed, produce, running, settled, worker_of
from tests.support.databases import clock, query_rows
from tests.support.dispatchers import Catch, Gate
from tests.support.events import make_event
from tests.support.polling import eventually
from tests.support.producers import INSERT

SOON = Retry(delay=0.2, backoff="constant", attempts=50)
FAR = Retry(delay=60.0)
LATER = 1.5
"""Seconds before a retry, in which a test does something else."""


async def alter(backend: Backend, **terms: Any) -> None:
    await backend.alter_subscription("s", **{"order": "none", "end": None, "start": "latest", **terms})


# Order.


class Flaky:
    """Fails for `bad` events before attempt `until`, records every attempt, and accepts no event twice."""

    def __init__(self, *bad: str, until: int = 2) -> None:
        self.bad = bad
        self.until = until
        self.attempts: dict[str, list[int]] = {}
        self.handled: list[str] = []

    async def __call__(self, event: Event) -> None:
        self.attempts.setdefault(event.id, []).append(event.attempt)
        assert event.id not in self.handled, "the event was handled twice"
        if event.id in self.bad and event.attempt < self.until:
            raise RuntimeError("not yet")
        self.handled.append(event.id)


@pytest.mark.parametrize("order", ["key", "strict"])
async def test_after_none_to_ordered_a_failed_event_keeps_its_attempts_and_blocks_its_key(
    database: str, order: Any
) -> None:
    flaky = Flaky("bad")
    async with running(database) as backend:
        await backend.subscribe("s", flaky, retry=FAR)
        await produce(backend, "bad", "good", key="k")
        await failed(backend)
        await alter(backend, order=order)
        await produce(backend, "behind", key="k")
        await backend.retry_now("s")
        await settled(backend)
        assert (await backend.status()).subscriptions[0].order == order

    assert flaky.handled == ["good", "bad", "behind"]
    assert flaky.attempts["bad"] == [1, 2]


@pytest.mark.parametrize(("order", "shards"), [("key", 1), ("key", 3), ("strict", 1)])
async def test_after_ordered_to_none_a_failed_event_keeps_its_attempts_and_blocks_nothing(
    database: str, order: Any, shards: int
) -> None:
    """The failed event may be above the offset, with the others behind it."""
    flaky = Flaky("bad")
    async with running(database) as backend:
        await backend.subscribe("s", flaky, order=order, shards=shards, retry=FAR)
        await produce(backend, "bad", "a", "b", key="k")
        await produce(backend, "other", key="j")
        await failed(backend)
        await alter(backend, order="none")

        async def has_overtaken() -> bool:
            return {"a", "b"} <= set(flaky.handled)

        await eventually("the events behind the failed one are handled", has_overtaken, interval=0.005)
        assert "bad" not in flaky.handled
        await backend.retry_now("s")
        await settled(backend)

    assert sorted(flaky.handled) == ["a", "b", "bad", "other"]
    assert flaky.attempts["bad"] == [1, 2]


async def test_after_none_to_key_failed_events_of_one_key_wait_at_the_same_time(database: str) -> None:
    flaky = Flaky(*"abcdefgh")
    async with running(database) as backend:
        await backend.subscribe("s", flaky, retry=Retry(delay=LATER))
        await produce(backend, *"abcdefgh", key="k")
        await failed(backend, 8)
        await alter(backend, order="key")
        async with asyncio.timeout(7 * LATER):
            await settled(backend)

    assert flaky.handled == list("abcdefgh")


@pytest.mark.parametrize("shards", [1, 4])
async def test_changing_the_order_back_and_forth_loses_and_repeats_no_failed_event(database: str, shards: int) -> None:
    ids = [str(number) for number in range(200)]
    flaky = Flaky(*ids[::8], until=1_000_000)
    async with running(database) as backend:
        retry = Retry(delay=0.05, max_delay=0.05, attempts=1_000_000)
        await backend.subscribe("s", flaky, retry=retry, shards=shards)
        await backend.produce_many([make_event(id_, key=str(int(id_) % 7)) for id_ in ids])
        for order in ("key", "none", "key", "none", "key", "none"):
            await failed(backend)
            await alter(backend, order=order)
        flaky.until = 0
        await settled(backend)

    assert sorted(flaky.handled) == sorted(ids)
    assert all(attempts == list(range(1, len(attempts) + 1)) for attempts in flaky.attempts.values())


async def test_an_event_on_its_way_to_the_dead_letter_dispatcher_stays_on_it(database: str) -> None:
    got: list[tuple[str, int]] = []

    async def dead(event: Event) -> None:
        assert event.failure is not None
        got.append((event.id, event.attempt))
        if event.attempt == 1:
            raise RuntimeError("not yet")

    async def refuse(event: Event) -> None:
        raise Reject("no")

    async with running(database) as backend:
        await backend.subscribe("s", refuse, retry=Retry(attempts=2, delay=60.0), dead_letter=dead)
        await produce(backend, "a", key="k")

        async def was_tried() -> bool:
            return bool(got)

        await eventually("the dead-letter dispatcher has failed", was_tried)
        await failed(backend)
        await alter(backend, order="key")
        await backend.retry_now("s")
        await settled(backend)

    assert got == [("a", 1), ("a", 2)]


async def test_running_dispatches_end_first_and_no_other_starts(database: str) -> None:
    gate = Gate()
    async with running(database) as backend:
        await backend.subscribe("s", gate, concurrency=2)
        await produce(backend, "a", "b", "c")
        await gate.holds(2)
        altering = asyncio.create_task(alter(backend, order="key"))
        await asyncio.wait({altering}, timeout=0.3)
        assert not altering.done()
        assert len(gate.waiting) == 2
        gate.open()
        await altering
        await settled(backend)

    assert sorted(gate.handled) == ["a", "b", "c"]


async def test_a_failure_committed_while_the_alteration_waits_is_not_overlooked(database: str) -> None:
    """The commit holds the row's lock and schedules a redelivery, so the alteration must read again."""
    owner = await asyncpg.connect(database)
    async with running(database) as backend:
        await backend.subscribe("s", Catch(), start="earliest")
        await settled(backend)
        await backend.unsubscribe("s")
        await produce(backend, "a", key="k")
        await owner.execute("BEGIN")
        await owner.execute("UPDATE pgbackend.offsets SET position = 1")
        await owner.execute(
            "INSERT INTO pgbackend.redeliveries (subscription, position, key_hash, attempt, due_at, last_error)"
            " SELECT 's', position, pgbackend.key_hash(partitionkey, subject, source, id),"
            " 1, now(), 'no' FROM pgbackend.events"
        )
        altering = asyncio.create_task(alter(backend, order="key"))

        async def waits() -> bool:
            return bool(await query_rows(database, "SELECT FROM pg_locks WHERE NOT granted"))

        await eventually("the alteration waits for the row", waits)
        await owner.execute("COMMIT")
        await altering
        flaky = Flaky()
        await backend.subscribe("s", flaky, order="key")
        await settled(backend)
    await owner.close()

    assert flaky.attempts == {"a": [2]}


async def test_a_deadlock_with_a_commit_is_retried(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit of a worker that keeps its shards locks them in another order."""
    fetch, victims = Database.fetch, 1

    async def sometimes_the_victim(self: Database, statement: str, *args: Any, **options: Any) -> Any:
        nonlocal victims
        if "swap_shards" in statement and victims:
            victims -= 1
            raise DatabaseError("deadlock detected", sqlstate="40P01")
        return await fetch(self, statement, *args, **options)

    monkeypatch.setattr(Database, "fetch", sometimes_the_victim)
    async with running(database) as backend:
        await backend.subscribe("s", Catch())
        await alter(backend, order="key")
        assert (await backend.status()).subscriptions[0].order == "key"

    assert victims == 0


async def test_strict_with_several_shards_is_refused(database: str) -> None:
    async with running(database) as backend:
        await backend.subscribe("s", Catch(), shards=2)
        with pytest.raises(ConfigError, match="single"):
            await alter(backend, order="strict")
        assert (await backend.status()).subscriptions[0].order == "none"


@pytest.mark.parametrize("terms", [{"order": "fifo"}, {"end": 0}, {"end": datetime(2026, 1, 1)}, {"start": "now"}])  # noqa: DTZ001 - the point
async def test_invalid_terms_are_refused(database: str, terms: dict[str, Any]) -> None:
    async with running(database) as backend:
        await backend.subscribe("s", Catch())
        with pytest.raises(ConfigError):
            await alter(backend, **terms)


async def test_an_unknown_subscription_is_refused(database: str) -> None:
    async with running(database) as backend:
        with pytest.raises(SubscriptionNotFoundError):
            await alter(backend)


async def test_the_same_terms_change_nothing_and_no_shard_is_released(database: str) -> None:
    end = datetime(2100, 1, 1, tzinfo=UTC)
    with Recorder() as recorder:
        async with running(database) as backend:
            await backend.subscribe("s", Catch(), order="key", end=end, start=0)
            await recorder.wait("lease claimed")
            await alter(backend, order="key", end=end.astimezone(), start=0)
            await alter(backend, order="key", end=end, start="latest")
            await alter(backend, order="key", end=end, start="earliest")
            assert not recorder.all("lease released")
        assert not recorder.all("subscription altered")


async def test_the_error_about_a_mismatch_names_alter_subscription(database: str) -> None:
    async with running(database) as backend:
        await backend.subscribe("s", Catch())
        await backend.unsubscribe("s")
        with pytest.raises(SubscriptionMismatchError, match="alter_subscription"):
            await backend.subscribe("s", Catch(), order="key")


# End.


async def test_a_complete_subscription_goes_on_when_its_end_is_moved_back(database: str) -> None:
    catch = Catch()
    async with running(database) as backend:
        await backend.subscribe("s", catch, start="earliest", end=4, order="strict")
        await produce(backend, *map(str, range(1, 10)))
        await complete(backend)
        assert catch.ids == ["1", "2", "3"]
        await alter(backend, order="strict", end=7)
        await catch.has("6")
        await complete(backend)
        assert catch.ids == list(map(str, range(1, 7)))
        await alter(backend, order="strict")
        await settled(backend)

    assert catch.ids == list(map(str, range(1, 10)))


@pytest.mark.parametrize("order", ["none", "key"])
@pytest.mark.parametrize("shards", [1, 3])
async def test_events_recorded_after_an_end_date_are_delivered_once_the_end_is_later(
    database: str, order: Any, shards: int
) -> None:
    """The clock reaches the end while events are appended. None of those may count as settled."""
    catch = Catch()
    first, second = [f"a{number}" for number in range(20)], [f"b{number}" for number in range(40)]
    async with running(database) as backend:
        await backend.subscribe("s", catch, order=order, shards=shards)
        await backend.produce_many([make_event(id_, key=id_) for id_ in first])
        await settled(backend)
        end = await clock(database)
        producer = await asyncpg.connect(database)
        await producer.execute("BEGIN")
        await producer.execute(INSERT, "open")
        await backend.produce_many([make_event(id_, key=id_) for id_ in second])
        await alter(backend, order=order, end=end, start="latest")
        await producer.execute("COMMIT")
        await producer.close()
        await complete(backend)
        assert sorted(catch.ids) == sorted(first)
        await backend.produce_many([make_event(id_, key=id_) for id_ in ("c", "d")])
        # A new owner finds the subscription complete, too.
        await backend.unsubscribe("s")
        await backend.subscribe("s", catch, order=order, shards=shards, end=end)
        await complete(backend)
        await alter(backend, order=order, end=await clock(database))
        await complete(backend)
        assert sorted(catch.ids) == sorted([*first, *second, "open", "c", "d"])
        await alter(backend, order=order)
        await produce(backend, "e")
        await settled(backend)

    assert sorted(catch.ids) == sorted([*first, *second, "open", "c", "d", "e"])


async def test_everything_behind_an_end_date_is_one_pending_range(database: str) -> None:
    """Also with rolled-back positions and events of other shards in between."""
    async with running(database) as backend:
        end = await clock(database)
        await backend.subscribe("s", Catch(), start="earliest", shards=3, end=end + timedelta(seconds=1.0))
        connection = await asyncpg.connect(database)
        for number in range(30):
            await connection.execute("BEGIN")
            await connection.execute(INSERT, f"dead{number}")
            await connection.execute("ROLLBACK")
            await connection.execute(INSERT, f"early{number}")
        await connection.execute("SELECT pg_sleep_until($1)".replace("$1", f"'{end + timedelta(seconds=1.0)}'"))
        for number in range(30):
            await connection.execute("BEGIN")
            await connection.execute(INSERT, f"dead{number}")
            await connection.execute("ROLLBACK")
            await connection.execute(INSERT, f"late{number}")
        await connection.close()
        await complete(backend)
    pending = await query_rows(
        database, "SELECT count(range) FROM pgbackend.offsets, unnest(pending) AS range GROUP BY shard"
    )

    assert all(count == 1 for (count,) in pending)


async def test_pending_events_behind_an_earlier_end_are_not_read(database: str) -> None:
    """Once everything up to the end is read, reading stops, however long settling takes."""
    async with running(database) as backend:
        await backend.subscribe("s", Flaky("before", "behind"), order="key", retry=FAR)
        await backend.produce_many([make_event(id_, key=id_) for id_ in ("before", "behind", "good")])
        await failed(backend, 2)
        await alter(backend, order="key", end=2)

        async def reads_no_more() -> bool:
            worker = worker_of(backend)
            return bool(worker.pumps) and not worker.pumps._tail._streams

        await eventually("no stream is open", reads_no_more)
        (status,) = (await backend.status()).subscriptions

    assert not status.complete
    assert (status.shards[0].position, status.shards[0].pending) == (3, 2)


@pytest.mark.parametrize("order", ["none", "key"])
async def test_an_earlier_end_completes_the_subscription_and_keeps_what_it_owes_behind_it(
    database: str, order: Any
) -> None:
    gate, catch = Gate(), Catch()
    ids = [str(number) for number in range(1, 21)]
    async with running(database) as backend:
        await backend.subscribe("s", gate, order=order, concurrency=4)
        await produce(backend, *ids)
        await gate.holds(4)
        altering = asyncio.create_task(alter(backend, order=order, end=3))

        async def nothing_more_begins() -> bool:
            return all(pump.gate.halted for pump in worker_of(backend).pumps)

        await eventually("no dispatch starts", nothing_more_begins)
        gate.open()
        await altering
        await complete(backend)
        before = sorted(gate.handled, key=int)
        assert before == ["1", "2", "3", "4"]
        await backend.reconfigure("s", catch)
        await alter(backend, order=order, end=16)
        await complete(backend)
        assert sorted(catch.ids, key=int) == [str(number) for number in range(5, 16)]
        await alter(backend, order=order)
        await settled(backend)

    assert sorted([*before, *catch.ids], key=int) == ids


async def test_a_complete_subscription_retries_its_failed_events_in_another_order(database: str) -> None:
    flaky = Flaky("1")
    async with running(database) as backend:
        await backend.subscribe("s", flaky, start="earliest", end=3, retry=Retry(delay=0.5))
        await produce(backend, "1", "2", "3", key="k")
        await complete(backend)
        await alter(backend, order="key", end=3)

        async def is_handled() -> bool:
            return "1" in flaky.handled

        await eventually("the failed event is handled", is_handled)
        await complete(backend)

    assert flaky.attempts == {"1": [1, 2], "2": [1]}


# Start.


async def test_another_start_moves_the_subscription_once(database: str) -> None:
    catch = Catch()
    async with running(database) as backend:
        await backend.subscribe("s", catch, start="earliest", order="strict")
        await produce(backend, "1", "2", "3", "4")
        await settled(backend)
        for start in (2, 2, "latest", "earliest"):
            await alter(backend, order="strict", start=start)
            await settled(backend)
        assert catch.ids == ["1", "2", "3", "4", "3", "4"]
        await alter(backend, order="strict", start=3)
        await settled(backend)
        assert catch.ids[6:] == ["4"]
        date = await clock(database)
        await produce(backend, "5")
        await settled(backend)
        for _ in range(2):
            await alter(backend, order="strict", start=date)
            await settled(backend)
        # The same moment in another time zone.
        await alter(backend, order="strict", start=date.astimezone())
        await settled(backend)

    assert catch.ids[7:] == ["5", "5"]


async def test_after_alter_and_reconfigure_the_old_dispatcher_gets_nothing_of_the_new_start(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if notifying the other processes in between takes long."""
    notify = Notifier.notify_leases

    async def slowly(self: Notifier) -> None:
        await asyncio.sleep(0.3)
        await notify(self)

    old, new = Catch(), Catch()
    async with running(database) as backend:
        await backend.subscribe("s", old, start="earliest", order="strict")
        await produce(backend, "1", "2", "3")
        await settled(backend)
        monkeypatch.setattr(Notifier, "notify_leases", slowly)
        await alter(backend, order="strict", start=1)
        await backend.reconfigure("s", new)
        await settled(backend)

    assert old.ids == ["1", "2", "3"]
    assert new.ids == ["2", "3"]


async def test_the_start_of_the_creation_moves_nothing_and_does_not_undo_a_seek(database: str) -> None:
    catch = Catch()
    async with running(database) as backend:
        await produce(backend, "1", "2", "3")
        await backend.subscribe("s", catch, start=1, order="strict")
        await settled(backend)
        await backend.seek("s", 2)
        await settled(backend)
        await alter(backend, order="strict", start=1)
        await settled(backend)

    assert catch.ids == ["2", "3", "3"]


async def test_a_start_ahead_of_the_log_is_waited_for(database: str) -> None:
    catch = Catch()
    async with running(database) as backend:
        await backend.subscribe("s", catch)
        await alter(backend, order="key", start=2)
        await produce(backend, "1", "2", "3", "4")
        await catch.has("4")

    assert catch.ids == ["3", "4"]


async def test_another_start_drops_the_redeliveries(database: str) -> None:
    flaky = Flaky("1", until=100)
    async with running(database) as backend:
        await backend.subscribe("s", flaky, start="earliest", retry=FAR)
        await produce(backend, "1", "2")
        await failed(backend)
        await alter(backend, order="key", start=2)
        await settled(backend)

    assert flaky.attempts == {"1": [1], "2": [1]}


# Several processes.


async def test_equal_calls_of_many_processes_alter_the_subscription_once(database: str) -> None:
    catch = Catch()
    with Recorder() as recorder:
        async with running(database) as one, running(database) as two, running(database) as three:
            backends = [one, two, three]
            for backend in backends:
                await backend.subscribe("s", catch, start="earliest", shards=6)
            await produce(one, *map(str, range(30)))
            await settled(one)
            catch.ids.clear()
            async with asyncio.timeout(60):
                await asyncio.gather(*(alter(backend, order="key", start=20, end=1000) for backend in backends))
            await settled(two)
        assert len(recorder.all("subscription altered")) == 1

    assert sorted(catch.ids, key=int) == [str(number) for number in range(20, 30)]


@pytest.mark.direct
async def test_a_process_that_subscribed_with_the_old_order_follows_the_stored_one(database: str) -> None:
    flaky = Flaky("bad")
    async with running(database, drain_timeout=0.2) as owner, running(database, drain_timeout=0.2) as other:
        await owner.subscribe("s", flaky, retry=Retry(delay=0.6))
        await produce(owner, "x")
        await settled(owner)
        # The caller does not run the subscription itself.
        await alter(other, order="key")
        await produce(owner, "bad", "behind", key="k")
        await settled(owner)

    assert flaky.handled == ["x", "bad", "behind"]


async def test_running_dispatches_of_another_process_end_first(database: str) -> None:
    gate, catch = Gate(), Catch()
    async with running(database) as owner, running(database) as other:
        await owner.subscribe("s", gate)
        await produce(owner, "a")
        await gate.holds(1)
        altering = asyncio.create_task(alter(other, order="key"))
        await asyncio.wait({altering}, timeout=0.2)
        assert not altering.done()
        gate.open()
        await altering
        await owner.reconfigure("s", catch)
        await produce(owner, "b")
        await settled(owner)

    assert (gate.handled, catch.ids) == (["a"], ["b"])


async def test_another_process_releases_its_shard_and_does_not_lose_it(database: str) -> None:
    with Recorder() as recorder:
        async with running(database) as owner, running(database) as other:
            catch = Catch()
            await owner.subscribe("s", catch)
            await produce(owner, "a")
            await catch.has("a")
            # Before the lease could end.
            async with asyncio.timeout(20):
                await alter(other, order="key")
            await produce(other, "b")
            await catch.has("b")
        assert not recorder.all("lease lost")

    assert catch.attempts == ["a", "b"]


async def test_a_subscription_that_no_worker_runs_is_altered(database: str) -> None:
    backend = Backend(database)
    await backend.init()
    await backend.subscribe("s", print)
    await backend.unsubscribe("s")
    await alter(backend, order="strict", end=17)
    (stored,) = await query_rows(database, "SELECT ordering, end_position, start_bound FROM pgbackend.subscriptions")
    await backend.stop()

    assert stored == ("strict", 17, None)
