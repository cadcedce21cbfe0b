import asyncio
import time
from typing import Any

import asyncpg
import pytest

from pgbackend import Backend
from pgbackend.facts import Recorder
from pgbackend.log.notify import _INTERVALS, Notifier, Wakeup, channel
from pgbackend.postgres.pool import Database
from pgbackend.postgres.sql import load
from pgbackend.postgres.sql.statements import LogSql
from pgbackend.torture.proxy import Proxy
from tests.support.dispatchers import Catch
from tests.support.events import make_event
from tests.support.polling import eventually


async def test_a_wake_up_before_the_wait_is_not_missed() -> None:
    wakeup = Wakeup()
    known = wakeup.count
    wakeup.wake()

    async with asyncio.timeout(10):
        await wakeup.wait(since=known, timeout=60)


async def test_a_wake_up_wakes_all_tasks_and_none_waits_longer_than_its_timeout() -> None:
    wakeup = Wakeup()
    waiting = [asyncio.create_task(wakeup.wait(since=wakeup.count, timeout=60)) for _ in range(3)]
    await asyncio.sleep(0)
    wakeup.wake()
    async with asyncio.timeout(10):
        await asyncio.gather(*waiting)
        await wakeup.wait(since=wakeup.count, timeout=0.01)
        await wakeup.wait(since=wakeup.count, timeout=-1.0)


async def test_a_wake_up_after_a_cancelled_wait_does_no_harm() -> None:
    wakeup = Wakeup()
    waiting = asyncio.create_task(wakeup.wait(since=wakeup.count, timeout=60))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait({waiting})

    wakeup.wake()


@pytest.mark.parametrize("name", ["pgbackend", "x" * 53, "x" * 54, "x" * 63, "ö" * 31, 'Quo"ted'])
def test_a_channel_has_a_name_that_postgresql_takes_whole(name: str) -> None:
    assert len(channel(name).encode()) <= 63
    assert channel(name) != channel(name[:-1] + "y")


@pytest.fixture
async def heard(database: str) -> Any:
    """The payloads on the channel, as they come."""
    payloads: list[object] = []
    connection = await asyncpg.connect(database)
    await connection.add_listener(channel("pgbackend"), lambda *args: payloads.append(args[3]))
    yield payloads
    await connection.close()


async def test_many_appends_make_few_notifications_and_the_last_is_not_lost(database: str, heard: list[object]) -> None:
    opened = Database(database)
    await opened.open()
    notifier = Notifier(opened, load(LogSql, "log", schema="pgbackend"), channel=channel("pgbackend"), sender="me")
    running = asyncio.create_task(notifier.run())
    began = time.monotonic()
    for _ in range(100):
        notifier.notify()
        await asyncio.sleep(0.001)
    before = len(heard)
    notifier.notify()

    async def one_more() -> bool:
        return len(heard) > before

    await eventually("the last one is heard", one_more)
    took = time.monotonic() - began
    running.cancel()
    await asyncio.wait({running})
    await opened.close()

    assert set(heard) == {"me"}
    # A few at first, and then one per interval, however long the machine took.
    assert len(heard) < 20 + took / _INTERVALS[1]


async def test_a_failed_notification_does_not_stop_later_ones(database: str, heard: list[object]) -> None:
    async with Proxy(database) as proxy:
        opened = Database(proxy.dsn)
        await opened.open()
        notifier = Notifier(opened, load(LogSql, "log", schema="pgbackend"), channel=channel("pgbackend"), sender="me")
        running = asyncio.create_task(notifier.run())
        with Recorder() as recorder:
            proxy.cut()
            notifier.notify()
            await recorder.wait("notify failed")
            proxy.restore()

        async def is_heard() -> bool:
            notifier.notify()
            return bool(heard)

        await eventually("the next one is heard", is_heard)
        running.cancel()
        await asyncio.wait({running})
        await opened.close()


@pytest.mark.direct
async def test_an_event_of_another_process_is_noticed_long_before_the_next_poll(database: str) -> None:
    catch = Catch()
    with Recorder() as recorder:
        async with Backend(database, poll_interval=60.0) as backend, Backend(database) as other:
            await backend.subscribe("s", catch)
            await recorder.wait("lease claimed")
            for number in range(5):
                await other.produce(make_event(str(number)))
                await catch.has(str(number))


async def test_without_any_notification_polling_finds_events(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Notifier, "notify", lambda _: None)
    catch = Catch()
    async with Backend(database, poll_interval=0.1) as backend, Backend(database) as other:
        await backend.subscribe("s", catch)
        await other.produce(make_event("a"))
        await catch.has("a")


async def test_unknown_payloads_on_the_channel_do_no_harm(database: str) -> None:
    catch = Catch()
    connection = await asyncpg.connect(database)
    with Recorder() as recorder:
        async with Backend(database, poll_interval=60.0) as backend:
            await backend.subscribe("s", catch)
            await recorder.wait("lease claimed")
            for payload in ("", "leases", "echo of somebody", "x" * 7000, "🦆"):
                await connection.execute("SELECT pg_notify($1, $2)", channel("pgbackend"), payload)
            await backend.produce(make_event("a"))
            await catch.has("a")
    await connection.close()
