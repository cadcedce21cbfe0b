"""I7, where an event's handling kills the process: it is found, given up like any other, and the others are handled."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from pgbackend import Backend, Event, Pause, Retry
from pgbackend.facts import Recorder
from tests.support.backends import worker_of
from tests.support.dispatchers import Catch, Gate
from tests.support.events import make_event
from tests.support.ledger import Ledger
from tests.support.polling import eventually
from tests.support.worker import Worker

# Through a pooler each death is noticed by the lease alone.
SETTINGS: dict[str, object] = {"commit_interval": 0.02, "poll_interval": 0.1, "lease_timeout": 5.0}
ATTEMPTS = 3


class Fleet:
    """A process that is started again whenever it dies, as whoever runs it would."""

    def __init__(self) -> None:
        self.deaths = 0

    async def run(self, database: str, ledger: Ledger, **options: Any) -> None:
        while True:
            async with Worker(database, ledger, settings=SETTINGS, **options) as worker:
                await worker.process.wait()
            self.deaths += 1


@asynccontextmanager
async def fleet(database: str, ledger: Ledger, **options: Any) -> AsyncIterator[Fleet]:
    running = Fleet()
    task = asyncio.create_task(running.run(database, ledger, **options))
    try:
        yield running
    finally:
        task.cancel()
        await asyncio.wait({task})


async def settled(observer: "asyncpg.Connection[asyncpg.Record]", head: int) -> None:
    async def is_settled() -> bool:
        return bool(
            await observer.fetchval("SELECT bool_and(position >= $1 AND isempty(pending)) FROM pgbackend.offsets", head)
            and not await observer.fetchval("SELECT count(*) FROM pgbackend.redeliveries")
            and not await observer.fetchval("SELECT count(due_at) FROM pgbackend.dead_letters")
        )

    await eventually("everything is settled", is_settled, 90, interval=0.05)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("order", ["none", "key", "strict"])
async def test_it_is_given_up_after_its_attempts_and_everything_else_is_handled(
    database: str, tmp_path: Path, order: str
) -> None:
    ledger = Ledger(tmp_path / "ledger")
    observer = await asyncpg.connect(database)
    producer = Backend(database)
    await producer.init()
    ids = [str(number) for number in range(300)]
    await producer.produce_many([make_event(id_, key=str(int(id_) % 10)) for id_ in ids])
    ledger.produced += ids
    async with fleet(
        database, ledger, order=order, poison=["100"], retry={"attempts": ATTEMPTS, "delay": 0.1, "max_delay": 0.2}
    ) as running:
        await settled(observer, len(ids))
        letters = [(letter.event.id, letter.failure) async for letter in producer.dead_letters()]
        deaths = running.deaths
        # An operator who does not believe it.
        await producer.redeliver(subscription="test")
        await settled(observer, len(ids))
        deaths_again = running.deaths - deaths
        again = [(letter.event.id, letter.failure.attempts) async for letter in producer.dead_letters()]
        await producer.produce(make_event("after"))
        ledger.produced.append("after")
        await settled(observer, len(ids) + 1)
    await producer.stop()
    await observer.close()

    ((id_, failure),) = letters
    assert id_ == "100"
    assert "ProcessDied" in failure.error
    assert failure.attempts == ATTEMPTS
    assert ledger.lost() == []
    # Two before anybody is suspected, then its attempts. By the second time the crashes may not be forgotten yet.
    assert deaths <= 2 + ATTEMPTS
    assert deaths_again <= 2 + ATTEMPTS
    assert [id_ for id_, _ in again] == ["100"]
    assert again[0][1] == 2 * ATTEMPTS
    if order != "none":
        assert ledger.reordered(by_key=True) == []
    # What was in flight beside it comes again, no more often than the process died.
    assert max(count for id_, count in ledger.doubled().items()) <= deaths + deaths_again


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_an_event_that_kills_later_than_the_others_need_is_found_too(database: str, tmp_path: Path) -> None:
    """The offsets of the others are committed by then: each life makes progress, and it alone stays."""
    ledger = Ledger(tmp_path / "ledger")
    observer = await asyncpg.connect(database)
    producer = Backend(database)
    await producer.init()
    ids = [str(number) for number in range(50)]
    await producer.produce_many([make_event(id_) for id_ in ids])
    async with fleet(
        database, ledger, delay=0.3, poison=["7", "20"], retry={"attempts": 2, "delay": 0.1, "max_delay": 0.1}
    ):
        await settled(observer, len(ids))
        letters = sorted([letter.event.id async for letter in producer.dead_letters()])
    await producer.stop()
    await observer.close()
    ledger.produced += ids

    assert letters == ["20", "7"]
    assert ledger.lost() == []


async def test_a_shard_whose_owners_died_of_something_else_is_only_slower(database: str) -> None:
    """Each of its events is dispatched alone, and noted before; nothing of it stays."""
    observer = await asyncpg.connect(database)
    at_work: list[str] = []
    most, handled = 0, Counter[str]()

    async def handle(event: Any) -> None:
        nonlocal most
        at_work.append(event.id)
        most = max(most, len(at_work))
        await asyncio.sleep(0.005)
        at_work.remove(event.id)
        handled[event.id] += 1

    backend = Backend(database, commit_interval=0.01, window_events=20)
    await backend.init()
    await backend.subscribe("s", handle, start="earliest")
    await observer.execute("UPDATE pgbackend.offsets SET crashes = 5")
    ids = [str(number) for number in range(60)]
    await backend.produce_many([make_event(id_) for id_ in ids])
    noted = asyncio.create_task(backend.start())
    await settled(observer, len(ids))
    await backend.stop()
    await noted
    letters = await observer.fetchval("SELECT count(*) FROM pgbackend.dead_letters")
    await observer.close()

    assert handled == Counter(ids)
    assert letters == 0
    assert most > 1, "it was run with care for longer than a window"


async def test_crashes_are_forgotten_once_all_is_settled(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgbackend.delivery.care._SETTLED_AFTER", 0.0)
    observer = await asyncpg.connect(database)
    async with Backend(database, commit_interval=0.01, poll_interval=0.1) as backend:
        await backend.produce(make_event("a"))
        await backend.subscribe("s", lambda _: None, start="earliest")
        await settled(observer, 1)
        await backend.unsubscribe("s")
        await observer.execute("UPDATE pgbackend.offsets SET crashes = 3")
        await backend.subscribe("s", lambda _: None)
        await backend.produce(make_event("b"))

        async def are_forgotten() -> bool:
            return bool(await observer.fetchval("SELECT crashes = 0 FROM pgbackend.offsets"))

        await eventually("the crashes are forgotten", are_forgotten)
    await observer.close()


@asynccontextmanager
async def with_care(database: str, **settings: Any) -> AsyncIterator[Backend]:
    """A backend whose subscription's owners have died, events "a" and "b" in its log; start it, it is stopped here."""
    backend = Backend(database, **{"commit_interval": 0.01, "poll_interval": 0.1, **settings})
    await backend.init()
    await backend.subscribe("s", Catch(), start="earliest")
    await backend.unsubscribe("s")
    await backend.produce_many([make_event("a"), make_event("b")])
    observer = await asyncpg.connect(database)
    await observer.execute("UPDATE pgbackend.offsets SET crashes = 5")
    await observer.close()
    started = asyncio.create_task(backend.start())
    try:
        yield backend
    finally:
        await backend.stop()
        await started


async def handled_after_all(database: str) -> None:
    """Both events are handled by the next owner, as first attempts."""
    observer = await asyncpg.connect(database)
    attempts: list[tuple[str, int]] = []

    async def handle(event: Event) -> None:
        attempts.append((event.id, event.attempt))

    async with Backend(database, commit_interval=0.01, poll_interval=0.1) as backend:
        await backend.subscribe("s", handle, retry=Retry(attempts=1))
        await settled(observer, 2)
        assert [letter.event.id async for letter in backend.dead_letters()] == []
    await observer.close()
    assert sorted(attempts) == [("a", 1), ("b", 1)]


async def test_what_is_cut_short_by_the_end_of_its_process_has_killed_nobody(database: str) -> None:
    gate = Gate()
    async with with_care(database, drain_timeout=0.0) as backend:
        await backend.subscribe("s", gate, retry=Retry(attempts=1))
        await gate.holds(1)
    await handled_after_all(database)


async def test_a_target_that_wants_nothing_more_has_killed_nobody(database: str) -> None:
    observer = await asyncpg.connect(database)

    async def gone(_: Event) -> None:
        raise Pause("gone")

    async with with_care(database) as backend:
        await backend.subscribe("s", gone, retry=Retry(attempts=1))

        async def is_taken_back() -> bool:
            rows = await observer.fetch("SELECT attempt, begun FROM pgbackend.redeliveries")
            return [tuple(row) for row in rows] == [(0, False)]

        await eventually("its attempt is taken back", is_taken_back)
    await observer.close()
    await handled_after_all(database)


async def test_one_that_has_more_attempts_behind_it_than_there_are_now_gets_its_turn(database: str) -> None:
    observer = await asyncpg.connect(database)
    attempts: list[tuple[str, int]] = []

    async def handle(event: Event) -> None:
        attempts.append((event.id, event.attempt))

    async with with_care(database) as backend:
        await observer.execute("UPDATE pgbackend.offsets SET position = 2")
        await observer.execute(
            """
            INSERT INTO pgbackend.redeliveries (subscription, position, key_hash, attempt, due_at, last_error)
            SELECT 's', position, key_hash, 3, now(), 'it failed'
            FROM pgbackend.events
            WHERE id = 'a'
            """
        )
        await backend.subscribe("s", handle, retry=Retry(attempts=2))
        await settled(observer, 2)
        assert [letter.event.id async for letter in backend.dead_letters()] == []
    await observer.close()

    assert attempts == [("a", 4)]


async def test_what_is_refused_of_another_subscription_does_not_keep_it_from_being_dispatched(database: str) -> None:
    """Before each event that is dispatched with care, the attempt is committed together with all that there is."""
    observer = await asyncpg.connect(database)
    catch = Catch()
    async with with_care(database) as backend:
        await observer.execute(
            """
            CREATE FUNCTION pgbackend.refuse() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                IF new.subscription = 'refused' THEN
                    RAISE 'as planned';
                END IF;
                RETURN new;
            END $$;
            CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON pgbackend.redeliveries
                FOR EACH ROW EXECUTE FUNCTION pgbackend.refuse();
            """
        )
        with Recorder() as recorder:
            await backend.subscribe("refused", Catch(fails=lambda _: True), start="earliest", retry=Retry(delay=0.0))
            await recorder.wait("commit failed")
            await backend.subscribe("s", catch)
            await catch.has("a", "b")
    await observer.close()


async def test_crashes_are_forgotten_where_a_subscription_ends_before_the_log(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgbackend.delivery.care._SETTLED_AFTER", 0.0)
    observer = await asyncpg.connect(database)
    async with Backend(database, commit_interval=0.01, poll_interval=0.1) as backend:
        await backend.produce_many([make_event(str(number)) for number in range(3)])
        # Once with something to do, once when it is complete.
        for _ in range(2):
            await backend.subscribe("s", Catch(), start="earliest", end=2)
            await backend.unsubscribe("s")
            await observer.execute("UPDATE pgbackend.offsets SET crashes = 2")
            await backend.subscribe("s", Catch(), start="earliest", end=2)

            async def are_forgotten() -> bool:
                return bool(
                    await observer.fetchval("SELECT completed_at IS NOT NULL AND crashes = 0 FROM pgbackend.offsets")
                )

            await eventually("its owners' deaths are forgotten", are_forgotten)
            await backend.unsubscribe("s")
    await observer.close()


async def test_what_waits_to_be_alone_goes_the_new_way_or_none(database: str) -> None:
    gate, catch = Gate(), Catch()
    observer = await asyncpg.connect(database)
    async with with_care(database) as backend:
        await backend.subscribe("s", gate)
        await gate.holds(1)
        (at_work,) = gate.waiting

        async def another_waits() -> bool:
            await backend.produce(make_event("c"))
            return bool(worker_of(backend).pumps._alone._waiters)

        await eventually("another one waits for its end", another_waits)
        await backend.reconfigure("s", catch, filter=lambda event: event.id == "new")
        await backend.produce(make_event("new"))
        gate.open()
        await catch.has("new")
        await settled(observer, await observer.fetchval("SELECT max(position) FROM pgbackend.events"))
    await observer.close()

    assert gate.handled == [at_work]
    assert catch.attempts == ["new"]


async def test_a_dispatcher_that_hangs_does_not_hold_up_other_subscriptions(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When all of them are run with care, their process having died twice."""
    monkeypatch.setattr("pgbackend.delivery.care._LONGEST", 0.0)
    gate, catch = Gate(), Catch()
    async with with_care(database) as backend:
        await backend.subscribe("other", Catch(), start="earliest", order="key")
        await backend.unsubscribe("other")
        observer = await asyncpg.connect(database)
        await observer.execute("UPDATE pgbackend.offsets SET crashes = 2, position = 0")
        await observer.close()
        await backend.subscribe("s", gate)
        await gate.holds(1)
        await backend.subscribe("other", catch, start="earliest", order="key")
        await catch.has("a", "b")
        assert not gate.handled
        gate.open()
