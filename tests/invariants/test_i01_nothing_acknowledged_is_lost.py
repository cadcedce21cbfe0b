"""I1. Every acknowledged event is handled, whatever is killed. I6: only unsettled events are handled twice."""

import asyncio
import time
from contextlib import suppress
from dataclasses import replace

import pytest

from pgbackend import Backend, PgBackendError, ProduceTimeoutError, ProduceUncertainError
from pgbackend.torture.plan import Plan, Step
from pgbackend.torture.proxy import Proxy
from pgbackend.torture.run import run
from tests.support.databases import Sql
from tests.support.dispatchers import Catch
from tests.support.events import make_event
from tests.support.figures import report
from tests.support.polling import eventually

PRODUCE_TIMEOUT = 1.0


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_killing_workers_and_the_server_loses_nothing(long: bool) -> None:
    """Kills only. tests/cli/test_torture.py has the run in which everything else goes wrong as well."""
    kills = 30 if long else 3
    plan = Plan.make(1, 3.0 * kills + 3.0, server=True)
    steps = (
        Step(2.0 + 3.0 * number, "server kill", "server")
        if number % 3 == 1
        else Step(2.0 + 3.0 * number, "kill", plan.workers[number % len(plan.workers)])
        for number in range(kills)
    )
    result = await run(replace(plan, steps=(Step(0.5, "subscribe", ""), *steps)))
    report(result.text())
    assert result.verdict.kept


@pytest.mark.slow
async def test_a_failing_network_under_load_loses_no_event_and_hangs_no_caller(database: str, sql: Sql) -> None:
    stored, unknown, refused = [], [], []
    plain, keyed, strict = Catch(), Catch(), Catch()
    enough = asyncio.Event()

    async def produce(backend: Backend, number: int) -> None:
        turn = 0
        while not enough.is_set():
            turn += 1
            id_ = f"{number}-{turn}"
            began = time.monotonic()
            try:
                await backend.produce(make_event(id_, key=str(number)))
            except ProduceUncertainError:
                unknown.append(id_)
            except PgBackendError:
                refused.append(id_)
            else:
                stored.append(id_)
            assert time.monotonic() - began < PRODUCE_TIMEOUT + 15.0, "produce() took longer than its timeout"
            await asyncio.sleep(0.005)

    async def some_progress(events: int = 50) -> None:
        goal = len(stored) + events

        async def reached() -> bool:
            return len(stored) >= goal

        await eventually("events are stored again", reached, 60)

    async def for_seconds(seconds: float) -> None:
        began = time.monotonic()

        async def passed() -> bool:
            return time.monotonic() - began >= seconds

        await eventually("the failure has lasted", passed)

    async with Proxy(database) as proxy:
        settings = {"produce_timeout": PRODUCE_TIMEOUT, "lease_timeout": 3.0, "hole_wait": 0.3}
        async with Backend(proxy.dsn, **settings) as backend:  # type: ignore[arg-type] # numbers
            await backend.subscribe("plain", plain)
            await backend.subscribe("keyed", keyed, order="key")
            await backend.subscribe("strict", strict, order="strict")
            producers = [asyncio.create_task(produce(backend, number)) for number in range(4)]
            for _ in range(3):
                await some_progress()
                proxy.reset()
                await some_progress()
                proxy.cut()
                await for_seconds(0.3)
                proxy.restore()
            await some_progress()
            proxy.stall()
            # Longer than `produce_timeout` and the lease.
            given_up = len(unknown) + len(refused)
            await for_seconds(3.5)

            async def are_answered() -> bool:
                return len(unknown) + len(refused) >= given_up + 4

            await eventually("every caller gets its timeout", are_answered)
            proxy.restore()
            await some_progress()
            enough.set()
            await asyncio.gather(*producers)
            for catch in (plain, keyed, strict):
                await catch.has(*stored, timeout=30)
    in_log = [row["id"] for row in await sql.fetch("SELECT id FROM pgbackend.events ORDER BY position")]

    report(f"network: {len(stored)} events acknowledged, {len(unknown)} uncertain, {len(refused)} refused")
    assert len(in_log) == len(set(in_log)), "an event was stored twice"
    assert set(stored) <= set(in_log)
    assert not set(refused) & set(in_log), "an event is stored though an error said that it is not"
    # Only connections break, so events that were settled and not committed are committed later, not handled again.
    for catch in (plain, keyed, strict):
        assert set(catch.ids) <= set(in_log)
    assert list(dict.fromkeys(strict.ids)) == [id_ for id_ in in_log if id_ in set(strict.ids)]


async def test_produce_raises_uncertain_when_the_answer_to_its_commit_is_lost(database: str) -> None:
    catch = Catch()
    async with Proxy(database) as proxy, Backend(proxy.dsn) as backend:
        await backend.subscribe("billing", catch)
        proxy.lose_reply_to(b"a certain event")
        with pytest.raises(ProduceUncertainError, match="may or may not be stored"):
            await backend.produce(make_event("a certain event"))
        await catch.has("a certain event")
        await backend.produce(make_event("another"))
        await catch.has("another")

    assert catch.ids == ["a certain event", "another"]


async def test_produce_without_a_server_fails_in_time_and_stores_nothing(database: str, sql: Sql) -> None:
    async def stored(id_: str) -> None:
        async def is_stored() -> bool:
            # A busy machine may need more than one timeout.
            with suppress(ProduceTimeoutError, ProduceUncertainError):
                await backend.produce(make_event(id_))
                return True
            return False

        await eventually(f"{id_} is stored", is_stored)

    async with Proxy(database) as proxy:
        backend = Backend(proxy.dsn, produce_timeout=0.5)
        await backend.init()
        await stored("before")
        proxy.cut()
        began = time.monotonic()
        with pytest.raises((ProduceTimeoutError, ProduceUncertainError)):
            await backend.produce(make_event("first"))
        with pytest.raises(ProduceTimeoutError, match="is not stored"):
            await backend.produce(make_event("second"))
        took = time.monotonic() - began
        proxy.restore()
        await stored("after")
        await backend.stop()
    ids = {row["id"] for row in await sql.fetch("SELECT id FROM pgbackend.events")}

    assert took < 20
    assert ids - {"first"} == {"before", "after"}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(300)
async def test_connections_that_die_silently_are_replaced(database: str) -> None:
    """As when a firewall drops them: not even an error comes back. The statement timeout bounds the wait."""
    catch = Catch()
    async with Proxy(database) as proxy, Backend(proxy.dsn, produce_timeout=3.0, lease_timeout=3.0) as backend:
        await backend.subscribe("billing", catch)
        await backend.produce(make_event("before"))
        await catch.has("before")
        proxy.strand()
        with pytest.raises(ProduceUncertainError):
            await backend.produce(make_event("lost"))

        async def works_again() -> bool:
            try:
                await backend.produce(make_event("after"))
            except PgBackendError:
                return False
            return True

        began = time.monotonic()
        await eventually("produce() works again", works_again, 60)
        await catch.has("after", timeout=60)
        report(f"stranded connections: everything works again after {time.monotonic() - began:.1f} s")


@pytest.mark.parametrize("running", [False, True], ids=["producing only", "running"])
async def test_subscribe_and_seek_work_in_a_new_incarnation(database: str, sql: Sql, running: bool) -> None:
    catch = Catch()
    backend = Backend(database)
    await backend.init()
    task = asyncio.create_task(backend.start()) if running else None
    # A crash empties an unlogged table.
    await sql.execute("DELETE FROM pgbackend.incarnation")
    await backend.subscribe("billing", catch)
    await sql.execute("DELETE FROM pgbackend.incarnation")
    await backend.seek("billing", "latest")
    await backend.produce(make_event("after"))
    if task is None:
        task = asyncio.create_task(backend.start())
    await catch.has("after")
    await backend.stop()
    await task
