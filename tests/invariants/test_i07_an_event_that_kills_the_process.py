"""I7, where an event's handling kills the process: it becomes a dead letter, and all others are handled."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from pgbackend import Backend, Event, Pause, Retry, facts
from pgbackend.facts import Recorder
from pgbackend.torture.proxy import Proxy
from tests.support.backends import worker_of
from tests.support.databases import Sql
from tests.support.dispatchers import Catch, Gate
from tests.support.events import make_event
from tests.support.ledger import Ledger
from tests.support.polling import eventually
from tests.support.worker import Worker

# Through a pooler only the lease shows that a worker died.
SETTINGS: dict[str, object] = {"commit_interval": 0.02, "poll_interval": 0.1, "lease_timeout": 2.0}
ATTEMPTS = 3


class Fleet:
    """A process that is started again whenever it dies, as a supervisor does it."""

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
async def test_an_event_that_kills_becomes_a_dead_letter_after_its_attempts(
    database: str, sql: Sql, tmp_path: Path, order: str
) -> None:
    ledger = Ledger(tmp_path / "ledger")
    producer = Backend(database)
    await producer.init()
    ids = [str(number) for number in range(300)]
    await producer.produce_many([make_event(id_, key=str(int(id_) % 10)) for id_ in ids])
    ledger.produced += ids
    async with fleet(
        database, ledger, order=order, poison=["100"], retry={"attempts": ATTEMPTS, "delay": 0.1, "max_delay": 0.2}
    ) as running:
        await settled(sql, len(ids))
        letters = [(letter.event.id, letter.failure) async for letter in producer.dead_letters()]
        (history,) = [letter.history async for letter in producer.dead_letters()]
        deaths = running.deaths
        # An operator redelivers it all the same.
        await producer.redeliver(subscription="test")
        await settled(sql, len(ids))
        deaths_again = running.deaths - deaths
        again = [(letter.event.id, letter.failure.attempts) async for letter in producer.dead_letters()]
        (history_again,) = [letter.history async for letter in producer.dead_letters()]
        await producer.produce(make_event("after"))
        ledger.produced.append("after")
        await settled(sql, len(ids) + 1)
    await producer.stop()

    ((id_, failure),) = letters
    assert id_ == "100"
    assert "ProcessDied" in failure.error
    assert failure.attempts == ATTEMPTS
    tries = [("failed", attempt) for attempt in range(1, ATTEMPTS + 1)]
    whole = [*tries, ("buried", None), ("redelivered", None), *tries, ("buried", None)]
    assert [(entry.what, entry.attempt) for entry in history] == whole[: ATTEMPTS + 1]
    assert [(entry.what, entry.attempt) for entry in history_again] == whole
    assert ledger.lost() == []
    # Two deaths before careful dispatch begins, then the attempts. The crash count may outlast the redelivery.
    assert deaths <= 2 + ATTEMPTS
    assert deaths_again <= 2 + ATTEMPTS
    assert [id_ for id_, _ in again] == ["100"]
    assert again[0][1] == 2 * ATTEMPTS
    if order != "none":
        assert ledger.reordered(by_key=True) == []
    # Events in flight beside it are dispatched again, at most once for each death.
    assert max(count for id_, count in ledger.doubled().items()) <= deaths + deaths_again


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_an_event_that_kills_late_becomes_a_dead_letter(database: str, sql: Sql, tmp_path: Path) -> None:
    """Each process commits some of the others before it dies, until only this event is left."""
    ledger = Ledger(tmp_path / "ledger")
    producer = Backend(database)
    await producer.init()
    ids = [str(number) for number in range(50)]
    await producer.produce_many([make_event(id_) for id_ in ids])
    async with fleet(
        database, ledger, delay=0.3, poison=["7", "20"], retry={"attempts": 2, "delay": 0.1, "max_delay": 0.1}
    ):
        await settled(sql, len(ids))
        letters = sorted([letter.event.id async for letter in producer.dead_letters()])
    await producer.stop()
    ledger.produced += ids

    assert letters == ["20", "7"]
    assert ledger.lost() == []


async def test_careful_dispatch_of_harmless_events_is_only_slower(database: str, sql: Sql) -> None:
    """Each event is dispatched alone and recorded before, for one window. Nothing of that stays."""
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
    await sql.execute("UPDATE pgbackend.offsets SET crashes = 5")
    ids = [str(number) for number in range(60)]
    await backend.produce_many([make_event(id_) for id_ in ids])
    noted = asyncio.create_task(backend.start())
    await settled(sql, len(ids))
    await backend.stop()
    await noted
    letters = await sql.fetchval("SELECT count(*) FROM pgbackend.dead_letters")

    assert handled == Counter(ids)
    assert letters == 0
    assert most > 1, "dispatch was careful for longer than a window"


async def test_the_crash_count_is_reset_once_all_is_settled(
    database: str, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgbackend.delivery.care._SETTLED_AFTER", 0.0)
    async with Backend(database, commit_interval=0.01, poll_interval=0.1) as backend:
        await backend.produce(make_event("a"))
        await backend.subscribe("s", lambda _: None, start="earliest")
        await settled(sql, 1)
        await backend.unsubscribe("s")
        await sql.execute("UPDATE pgbackend.offsets SET crashes = 3")
        await backend.subscribe("s", lambda _: None)
        await backend.produce(make_event("b"))

        async def is_reset() -> bool:
            return bool(await sql.fetchval("SELECT crashes = 0 FROM pgbackend.offsets"))

        await eventually("the crash count is reset", is_reset)


@asynccontextmanager
async def careful(database: str, **settings: Any) -> AsyncIterator[Backend]:
    """A started backend whose subscription "s" had five crashes, on a log with the events "a" and "b"."""
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


async def handled_by_the_next_owner(database: str) -> None:
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


async def test_a_careful_dispatch_that_is_cut_short_by_a_stop_is_no_attempt(database: str) -> None:
    gate = Gate()
    async with careful(database, drain_timeout=0.0) as backend:
        await backend.subscribe("s", gate, retry=Retry(attempts=1))
        await gate.holds(1)
    await handled_by_the_next_owner(database)


async def test_an_attempt_that_a_living_process_loses_with_its_lease_does_not_count(database: str, sql: Sql) -> None:
    gate = Gate()
    attempts: list[tuple[str, int]] = []

    async def handle(event: Event) -> None:
        attempts.append((event.id, event.attempt))
        await gate(event)

    async with careful(database, lease_timeout=1.0) as backend:
        with Recorder() as recorder:
            await backend.subscribe("s", handle, retry=Retry(attempts=1, delay=0.1))
            await gate.holds(1)
            await sql.execute("UPDATE pgbackend.offsets SET owner = NULL, epoch = nextval('pgbackend.epochs')")
            await recorder.wait("lease lost")
            gate.open()
            await settled(sql, 2)
        assert [letter.event.id async for letter in backend.dead_letters()] == []

    assert Counter(attempts) == {("a", 1): 2, ("b", 1): 1}


async def unreported(sql: Sql) -> list[int]:
    """The events with an attempt on record as started whose end nobody reported."""
    rows = await sql.fetch("SELECT position FROM pgbackend.redeliveries WHERE started_by IS NOT NULL ORDER BY position")
    return [row["position"] for row in rows]


async def test_an_attempt_whose_outcome_was_lost_with_the_lease_does_not_count(database: str, sql: Sql) -> None:
    gate = Gate()
    async with careful(database) as backend:
        await backend.subscribe("s", gate, retry=Retry(attempts=1))
        await gate.holds(1)
        assert await unreported(sql) == [1]
        # The commit waits for the row, and finds another owner there.
        async with sql.transaction():
            await sql.execute(
                """
                WITH other AS (
                    INSERT INTO pgbackend.workers (id, name, lease_timeout)
                    VALUES (gen_random_uuid(), 'other', interval '1 hour')
                    RETURNING id
                )
                UPDATE pgbackend.offsets
                SET owner = other.id, epoch = nextval('pgbackend.epochs')
                FROM other
                """
            )
            gate.open()
            await eventually("the event is handled", lambda: gate.handled == ["a"])

        async def is_reported() -> bool:
            return await unreported(sql) == []

        await eventually("the worker reports that it lives", is_reported)


async def test_a_process_that_stops_reports_what_it_did_not_die_of(database: str, sql: Sql) -> None:
    """As soon as the server is back, and with it the way to report."""
    gate = Gate()
    async with Proxy(database) as proxy, careful(proxy.dsn) as backend:
        with Recorder() as recorder:
            await backend.subscribe("s", gate, retry=Retry(attempts=1))
            await gate.holds(1)
            assert await unreported(sql) == [1]
            proxy.cut()
            gate.open()
            stopping = asyncio.create_task(backend.stop())
            await recorder.wait("release failed")
            proxy.restore()
            await stopping
    assert await unreported(sql) == []


async def test_a_process_that_stops_in_a_new_life_of_the_server_reports_what_it_did_not_die_of(
    database: str, sql: Sql
) -> None:
    gate, changed = Gate(), asyncio.Event()

    def observe(name: str, _: Mapping[str, object]) -> None:
        if name == "incarnation changed":
            changed.set()

    async with careful(database) as backend:
        with facts.observe(observe):
            await backend.subscribe("s", gate, retry=Retry(attempts=1))
            await gate.holds(1)
            assert await unreported(sql) == [1]
            # As a crash leaves it.
            await sql.execute("UPDATE pgbackend.incarnation SET id = gen_random_uuid()")
            await changed.wait()
            await backend.stop()
    assert await unreported(sql) == []


async def test_an_event_at_work_when_three_lives_of_the_server_ended_is_a_suspect(database: str, sql: Sql) -> None:
    gate = Gate()
    attempts: list[int] = []

    async def handle(event: Event) -> None:
        if event.id == "a":
            attempts.append(event.attempt)
            await gate(event)

    async with careful(database, lease_timeout=0.5) as backend:
        await backend.subscribe("s", handle, retry=Retry(attempts=1, delay=0.1))
        for life in range(1, 4):

            async def is_dispatched(life: int = life) -> bool:
                return len(attempts) == life

            await eventually("it is dispatched", is_dispatched)
            assert [letter.event.id async for letter in backend.dead_letters()] == []
            # As a crash leaves it.
            await sql.execute("UPDATE pgbackend.incarnation SET id = gen_random_uuid()")
        await settled(sql, 2)
        letters = [(letter.event.id, letter.failure.attempts) async for letter in backend.dead_letters()]

    assert attempts == [1, 1, 1]
    assert letters == [("a", 1)]


async def test_a_careful_dispatch_that_raises_pause_is_no_attempt(database: str, sql: Sql) -> None:

    async def gone(_: Event) -> None:
        raise Pause("gone")

    async with careful(database) as backend:
        await backend.subscribe("s", gone, retry=Retry(attempts=1))

        async def is_not_counted() -> bool:
            rows = await sql.fetch("SELECT attempt, started_by FROM pgbackend.redeliveries")
            return [tuple(row) for row in rows] == [(0, None)]

        await eventually("the attempt does not count", is_not_counted)
    async with Backend(database) as operator:
        await operator.resume("s")
    await handled_by_the_next_owner(database)


async def test_an_event_with_more_attempts_than_there_are_now_is_tried_once_more(database: str, sql: Sql) -> None:
    attempts: list[tuple[str, int]] = []

    async def handle(event: Event) -> None:
        attempts.append((event.id, event.attempt))

    async with careful(database) as backend:
        await sql.execute("UPDATE pgbackend.offsets SET position = 2")
        await sql.execute(
            """
            INSERT INTO pgbackend.redeliveries (subscription, position, key_hash, attempt, due_at, last_error)
            SELECT 's', position, pgbackend.key_hash(partitionkey, subject, source, id), 3, now(), 'it failed'
            FROM pgbackend.events
            WHERE id = 'a'
            """
        )
        await backend.subscribe("s", handle, retry=Retry(attempts=2))
        await settled(sql, 2)
        assert [letter.event.id async for letter in backend.dead_letters()] == []

    assert attempts == [("a", 4)]


async def test_a_refused_commit_of_another_subscription_does_not_stop_careful_dispatch(database: str, sql: Sql) -> None:
    """Each careful dispatch begins with a commit of everything that there is to commit."""
    catch = Catch()
    async with careful(database) as backend:
        await sql.execute(
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


async def test_the_crash_count_is_reset_where_a_subscription_ends_before_the_log(
    database: str, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgbackend.delivery.care._SETTLED_AFTER", 0.0)
    async with Backend(database, commit_interval=0.01, poll_interval=0.1) as backend:
        await backend.produce_many([make_event(str(number)) for number in range(3)])
        # Once with something to do, once when it is complete.
        for _ in range(2):
            await backend.subscribe("s", Catch(), start="earliest", end=2)
            await backend.unsubscribe("s")
            await sql.execute("UPDATE pgbackend.offsets SET crashes = 2")
            await backend.subscribe("s", Catch(), start="earliest", end=2)

            async def is_reset() -> bool:
                return bool(
                    await sql.fetchval("SELECT completed_at IS NOT NULL AND crashes = 0 FROM pgbackend.offsets")
                )

            await eventually("the crash count is reset", is_reset)
            await backend.unsubscribe("s")


async def test_an_event_that_waits_for_careful_dispatch_goes_to_the_new_dispatcher(database: str, sql: Sql) -> None:
    gate, catch = Gate(), Catch()
    async with careful(database) as backend:
        await backend.subscribe("s", gate)
        await gate.holds(1)
        (at_work,) = gate.waiting

        async def another_waits() -> bool:
            await backend.produce(make_event("c"))
            return bool(worker_of(backend).pumps._care.alone._waiters)

        await eventually("another event waits for its end", another_waits)
        await backend.reconfigure("s", catch, filter=lambda event: event.id == "new")
        await backend.produce(make_event("new"))
        gate.open()
        await catch.has("new")
        await settled(sql, await sql.fetchval("SELECT max(position) FROM pgbackend.events"))

    assert gate.handled == [at_work]
    assert catch.attempts == ["new"]


async def test_a_careful_dispatch_that_hangs_does_not_hold_up_other_subscriptions(
    database: str, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dispatch of every subscription is careful, because their process died twice."""
    monkeypatch.setattr("pgbackend.delivery.care._LONGEST", 0.0)
    gate, catch = Gate(), Catch()
    async with careful(database) as backend:
        await backend.subscribe("other", Catch(), start="earliest", order="key")
        await backend.unsubscribe("other")
        await sql.execute("UPDATE pgbackend.offsets SET crashes = 2, position = 0")
        await backend.subscribe("s", gate)
        await gate.holds(1)
        await backend.subscribe("other", catch, start="earliest", order="key")
        await catch.has("a", "b")
        assert not gate.handled
        gate.open()
