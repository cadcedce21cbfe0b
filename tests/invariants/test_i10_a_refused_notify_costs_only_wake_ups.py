"""I10. When PostgreSQL refuses NOTIFY, for reasons outside the log, only wake-ups are lost."""

import asyncio
import logging
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import pytest

from pgbackend import Backend
from pgbackend.embedded.server import EmbeddedServer
from pgbackend.facts import Recorder
from tests.support.dispatchers import Catch
from tests.support.events import make_event
from tests.support.polling import eventually

pytestmark = [pytest.mark.direct, pytest.mark.slow]

# The listener tests itself every third of this, and is reported deaf 5 s after a test that failed.
LEASE_TIMEOUT = 6.0
LOST = ("presence lost", "lease lost", "listener is deaf", "claim failed")


@asynccontextmanager
async def server(**settings: str) -> AsyncIterator[str]:
    with tempfile.TemporaryDirectory(prefix="pgbackend-test-", ignore_cleanup_errors=True) as directory:
        running = EmbeddedServer(directory, settings={"fsync": "off", **settings})
        try:
            yield await running.start()
        finally:
            await running.stop()


async def fill(connection: "asyncpg.Connection[asyncpg.Record]", statement: str) -> None:
    for _ in range(100_000):
        try:
            await connection.execute(statement)
        except asyncpg.ProgramLimitExceededError:
            return
    raise AssertionError("the queue is never full")


async def test_a_full_notify_queue_costs_neither_leases_nor_events(caplog: pytest.LogCaptureFixture) -> None:
    catch = Catch()
    async with server(max_notify_queue_pages="64") as dsn:
        idle, noisy = await asyncpg.connect(dsn), await asyncpg.connect(dsn)
        async with Backend(dsn, lease_timeout=LEASE_TIMEOUT) as one, Backend(dsn, lease_timeout=LEASE_TIMEOUT) as other:
            with Recorder() as recorder, caplog.at_level(logging.DEBUG, "pgbackend"):
                for backend in (one, other):
                    await backend.subscribe("s", catch, shards=4)
                await recorder.wait("lease claimed", count=4)
                # All databases share the queue. One listener that never ends its transaction fills it.
                await idle.execute("LISTEN something")
                await idle.execute("BEGIN")
                await idle.execute("SELECT 1")
                await fill(noisy, "SELECT pg_notify('something', repeat('x', 7900) || random())")
                await fill(noisy, "SELECT pg_notify('something', '')")

            with Recorder() as recorder, caplog.at_level(logging.DEBUG, "pgbackend"):
                caplog.clear()
                for number in range(20):
                    await (one, other)[number % 2].produce_many([make_event(f"{number}-{i}") for i in range(50)])
                await catch.has(*(f"{number}-{i}" for number in range(20) for i in range(50)))
                await recorder.wait("notify failed")
                # Long enough to be reported deaf, if an echo were expected.
                await recorder.wait("echo refused", timeout=60, count=10)
                await one.produce(make_event("late"))
                await catch.has("late")

                assert not [fact for fact in recorder.facts if fact.name in LOST]
                assert len(catch.ids) == len(set(catch.ids)) == 1001
                told = [record for record in caplog.records if getattr(record, "fact", "") == "notify failed"]
                warnings = [record for record in told if record.levelno == logging.WARNING]
                assert len(told) > len(warnings)
                assert len(warnings) <= 2 * (1 + (told[-1].created - told[0].created) // 30)
                assert "pg_stat_activity" in warnings[0].getMessage()

                await idle.execute("COMMIT")

                async def is_told_again() -> bool:
                    await one.produce(make_event("again"))
                    return bool(recorder.all("notify works again"))

                await eventually("wake-ups are sent again", is_told_again)
        for connection in (idle, noisy):
            await connection.close()


async def test_a_commit_that_holds_the_lock_of_all_notifies_costs_no_lease() -> None:
    """Its transaction has sent a NOTIFY and waits for a standby that is gone."""
    catch = Catch()
    async with server(synchronous_standby_names="nobody", synchronous_commit="local") as dsn:
        holder, observer = await asyncpg.connect(dsn), await asyncpg.connect(dsn)
        await holder.execute("SET synchronous_commit = on")
        holding = asyncio.create_task(holder.execute("CREATE TABLE written (); NOTIFY something"))
        held = """
            SELECT count(*) > 0 FROM pg_locks
            WHERE locktype = 'object' AND classid = 'pg_database'::regclass AND objid = 0 AND granted"""
        await eventually("the lock is held", lambda: observer.fetchval(held))

        with Recorder() as recorder:
            async with Backend(dsn, lease_timeout=LEASE_TIMEOUT, drain_timeout=1.0) as backend:
                await backend.subscribe("s", catch)
                await recorder.wait("echo refused", timeout=60, count=3)
                await backend.produce(make_event("a"))
                await catch.has("a")
            assert not [fact for fact in recorder.facts if fact.name in LOST]

        await observer.execute("SELECT pg_cancel_backend($1)", holder.get_server_pid())
        await holding
        for connection in (holder, observer):
            await connection.close()
