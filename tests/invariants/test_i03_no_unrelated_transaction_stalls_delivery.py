"""I3. An open appender delays others by at most `hole_wait`, once. Its own event is delivered when it appears."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import pytest

from pgbackend import Backend, Event, facts
from pgbackend.model import Order
from tests.support.dispatchers import Catch
from tests.support.events import make_event
from tests.support.figures import report
from tests.support.polling import eventually
from tests.support.producers import INSERT, Crowd

HOLE_WAIT = 0.5


class Load:
    """Events by `produce()`, one after the other, and when each was acknowledged."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.done: dict[str, float] = {}

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self._run(), name="load")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait({task})

    async def _run(self) -> None:
        while True:
            id_ = f"load-{len(self.done)}"
            await self.backend.produce(make_event(id_))
            self.done[id_] = time.monotonic()
            await asyncio.sleep(0.005)

    async def runs_for(self, seconds: float) -> None:
        began = time.monotonic()

        async def passed() -> bool:
            return time.monotonic() - began > seconds

        await eventually(f"{seconds} s of load", passed, seconds + 10)


@pytest.mark.slow
@pytest.mark.parametrize("prepared", [False, True], ids=["open", "prepared"])
async def test_an_open_appender_delays_others_once_and_its_event_is_delivered_after_its_commit(
    database: str, long: bool, prepared: bool
) -> None:
    seconds = 60.0 if long else 2.5
    catch = Catch()
    producer = await asyncpg.connect(database)
    async with Backend(database, hole_wait=HOLE_WAIT) as backend:
        await backend.subscribe("plain", catch)
        load = Load(backend)
        async with load.running():
            await producer.execute("BEGIN")
            await producer.execute(INSERT, "late")
            if prepared:
                await producer.execute("PREPARE TRANSACTION 'late'")
            await load.runs_for(seconds)
            await producer.execute("COMMIT PREPARED 'late'" if prepared else "COMMIT")
            committed = time.monotonic()
            await catch.has("late")
        # The last event of the load may be stored without an answer.
        await catch.has(*load.done)
    await producer.close()

    delays = sorted(catch.at[id_] - done for id_, done in load.done.items())
    late = catch.at["late"] - committed
    waited = sum(delay > 0.1 for delay in delays)
    report(
        f"{len(delays)} events beside an appender open for {seconds:g} s, hole_wait {HOLE_WAIT} s: "
        f"median {delays[len(delays) // 2] * 1000:.1f} ms, {waited} took over 100 ms, the longest "
        f"{delays[-1] * 1000:.0f} ms; its own event came {late * 1000:.0f} ms after its commit"
    )
    # `hole_wait` counts once for the appender, not for each hole. A quarter leaves room for a busy machine.
    assert sum(delay >= HOLE_WAIT for delay in delays) < len(delays) / 4
    assert len(catch.ids) == len(set(catch.ids))


async def test_a_strict_subscription_waits_for_the_appender_and_names_it(database: str) -> None:
    plain, strict = Catch(), Catch()
    producer = await asyncpg.connect(database, server_settings={"application_name": "nightly import"})
    await producer.execute("BEGIN")
    await producer.execute(INSERT, "late")
    with facts.Recorder() as recorder:
        async with Backend(database, hole_wait=0.1) as backend:
            await backend.subscribe("plain", plain, start="earliest")
            await backend.subscribe("strict", strict, start="earliest", order="strict")
            await backend.produce(make_event("after"))
            await plain.has("after")
            waiting = await recorder.wait("reading waits for an open transaction")
            status = await backend.status()
            assert strict.ids == []
            await producer.execute("COMMIT")
            await strict.has("late", "after")
    await producer.close()

    assert strict.ids == ["late", "after"]
    assert "nightly import" in str(waiting)
    assert [appender.application for appender in status.appenders] == ["nightly import"]
    assert {found.name: found.state for found in status.subscriptions}["strict"] == "waiting for an open transaction"


async def test_status_names_a_prepared_transaction_that_the_log_waits_for(database: str) -> None:
    producer = await asyncpg.connect(database)
    await producer.execute("BEGIN")
    await producer.execute(INSERT, "late")
    await producer.execute("PREPARE TRANSACTION 'forgotten by its owner'")
    async with Backend(database) as backend:
        appenders = (await backend.status()).appenders
    await producer.execute("ROLLBACK PREPARED 'forgotten by its owner'")
    await producer.close()

    assert [(appender.pid, appender.gid) for appender in appenders] == [(None, "forgotten by its owner")]


async def test_a_transaction_that_locks_the_log_and_never_inserts_delays_others_once(database: str) -> None:
    """An UPDATE or DELETE without a match takes such a lock."""
    idler = await asyncpg.connect(database)
    await idler.execute("BEGIN")
    await idler.execute("LOCK TABLE pgbackend.events IN ROW EXCLUSIVE MODE")
    producer = await asyncpg.connect(database)
    catch = Catch()
    async with Backend(database, hole_wait=1.0) as backend:
        await backend.subscribe("plain", catch, start="earliest")
        for number in range(100):
            # Each leaves a hole that the idle transaction might still fill.
            await producer.execute("BEGIN")
            await producer.execute(INSERT, f"rolled back {number}")
            await producer.execute("ROLLBACK")
            await producer.execute(INSERT, str(number))
        began = time.monotonic()
        await catch.has(*map(str, range(100)))
        took = time.monotonic() - began
        await idler.execute("ROLLBACK")
    await idler.close()
    await producer.close()

    assert took < 100 * 1.0 / 2, "each hole cost the wait"


async def test_a_transaction_that_does_not_lock_the_log_delays_nothing(database: str) -> None:
    other = await asyncpg.connect(database)
    await other.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    await other.execute("SELECT count(*) FROM pgbackend.events")
    await other.execute("SELECT pg_current_xact_id()")
    got: list[Event] = []
    async with Backend(database, hole_wait=60.0) as backend:
        await backend.subscribe("strict", got.append, order="strict")
        producer = await asyncpg.connect(database)
        await producer.execute("BEGIN")
        await producer.execute(INSERT, "rolled back")
        await producer.execute("ROLLBACK")
        await backend.produce(make_event("after"))

        async def arrived() -> bool:
            return [event.id for event in got] == ["after"]

        await eventually("the event is dispatched", arrived)
        await producer.close()
    await other.close()


@pytest.mark.parametrize("order", ["none", pytest.param("key", marks=pytest.mark.long), "strict"])
async def test_a_reader_waits_when_pending_is_full_and_loses_nothing(database: str, order: Order) -> None:
    """`pending` holds 1,000 ranges at most, and one open appender has 1,500 positions between those of others."""
    catch = Catch()
    slow, quick = await asyncpg.connect(database), await asyncpg.connect(database)
    await slow.execute("BEGIN")
    for number in range(1500):
        await slow.execute(INSERT, f"slow {number}")
        await quick.execute(INSERT, f"quick {number}")
    async with Backend(database, hole_wait=0.1) as backend:
        with facts.Recorder() as recorder:
            await backend.subscribe("billing", catch, start="earliest", order=order)
            await recorder.wait("reading waits for an open transaction")

        async def ranges() -> int:
            return int(await quick.fetchval("SELECT count(*) FROM pgbackend.offsets, unnest(pending)"))

        async def is_full() -> bool:
            return await ranges() >= 999

        if order != "strict":
            await eventually("`pending` is full", is_full)
        assert await ranges() <= 1000
        handled = len(catch.ids)
        await slow.execute("COMMIT")
        await catch.has(*(f"{name} {number}" for name in ("slow", "quick") for number in range(1500)), timeout=30)
    await slow.close()
    await quick.close()

    assert handled == (0 if order == "strict" else 1000)
    assert len(catch.ids) == 3000
    if order == "strict":
        assert catch.positions == sorted(catch.positions)


HOLES = """
DO $$
BEGIN
    FOR number IN 1..1100 LOOP
        BEGIN
            INSERT INTO pgbackend.events (id, source, type) VALUES ('never', 'test', 'test');
            RAISE EXCEPTION 'no';
        EXCEPTION WHEN raise_exception THEN
        END;
        INSERT INTO pgbackend.events (id, source, type) VALUES ('quick ' || number, 'test', 'test');
    END LOOP;
END $$"""


async def test_an_appender_that_may_own_too_many_holes_is_reported_once_until_it_ends(database: str) -> None:
    """For example an open DELETE while others roll back: each of their holes might belong to it."""
    catch = Catch()
    idler = await asyncpg.connect(database, server_settings={"application_name": "nightly cleaning"})
    early, quick = await asyncpg.connect(database), await asyncpg.connect(database)
    await idler.execute("BEGIN")
    await idler.execute("LOCK TABLE pgbackend.events IN ROW EXCLUSIVE MODE")
    await early.execute("BEGIN")
    await early.execute(INSERT, "early")
    await quick.execute(INSERT, "quick 0")
    await quick.execute(HOLES)
    with facts.Recorder() as recorder:
        async with Backend(database, hole_wait=0.1, poll_interval=0.1) as backend:
            await backend.subscribe("billing", catch, start="earliest")
            told = await recorder.wait("reading waits for an open transaction")
            status = await backend.status()
            assert len(catch.ids) == 1000
            # One hole less, so it reads up to the next one.
            await early.execute("COMMIT")
            await catch.has("early", "quick 1000")

            async def waits_again() -> bool:
                (found,) = (await backend.status()).subscriptions
                return found.state == "waiting for an open transaction"

            await eventually("it waits again", waits_again)
            await idler.execute("ROLLBACK")
            await catch.has(*(f"quick {number}" for number in range(1101)))
    for connection in (idler, early, quick):
        await connection.close()

    assert "nightly cleaning" in str(told["appenders"])
    assert status.appenders[0].application == "nightly cleaning"
    assert [found.state for found in status.subscriptions] == ["waiting for an open transaction"]
    assert len(recorder.all("reading waits for an open transaction")) == 1


async def test_the_room_in_pending_of_an_appender_that_commits_goes_to_another(database: str) -> None:
    catch = Catch()
    first, second, quick = [await asyncpg.connect(database) for _ in range(3)]
    for number in range(1200):
        slow = first if number < 600 else second
        if number in (0, 600):
            await slow.execute("BEGIN")
        await slow.execute(INSERT, f"slow {number}")
        await quick.execute(INSERT, f"quick {number}")
    with facts.Recorder() as recorder:
        async with Backend(database, hole_wait=0.1, poll_interval=0.1) as backend:
            await backend.subscribe("billing", catch, start="earliest")
            await recorder.wait("reading waits for an open transaction")
            assert "quick 1199" not in catch.ids
            await first.execute("COMMIT")
            await catch.has(*(f"quick {number}" for number in range(1200)))
            await second.execute("COMMIT")
            await catch.has(*(f"slow {number}" for number in range(1200)))
    for connection in (first, second, quick):
        await connection.close()

    assert len(catch.ids) == 2400
    assert len(recorder.all("reading waits for an open transaction")) == 1


async def test_many_short_appenders_are_not_reported_as_one_that_stays_open(database: str) -> None:
    """The reader always waits for some appender, but never long for one: no reason for a warning."""
    crowd, catch = Crowd(database, producers=12, transactions=300, pause=0.03), Catch()
    with facts.Recorder() as recorder:
        # Longer than a busy machine pauses, shorter than the crowd works.
        async with Backend(database, hole_wait=1.5) as backend:
            await backend.subscribe("billing", catch)
            await crowd.run()
            await catch.has(*crowd.committed)

    assert not recorder.all("reading waits for an open transaction")
