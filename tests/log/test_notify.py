import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgbackend import Backend
from pgbackend.codec.attributes import Row
from pgbackend.facts import Recorder
from pgbackend.log.appender import Appender
from pgbackend.log.deduplication import Deduplication
from pgbackend.log.notify import Budget, Notifier, Wakeup, channel
from pgbackend.postgres.pool import Database
from pgbackend.postgres.sql import load
from pgbackend.postgres.sql.statements import LogSql
from pgbackend.torture.proxy import Proxy
from tests.support.databases import execute, query_value
from tests.support.dispatchers import Catch
from tests.support.events import make_event
from tests.support.polling import eventually

ROW: Row = ("1.0", "i", "/s", "t", None, None, None, None, None, "{}", None, None)


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


def make_notifier(database: Database, idle: Callable[[], float] = lambda: 0.0) -> Notifier:
    """By default one whose process is busy all the time."""
    sql = load(LogSql, "log", schema="pgbackend")
    return Notifier(database, sql, channel=channel("pgbackend"), sender="me", idle=idle)


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
    notifier = make_notifier(opened)
    running = asyncio.create_task(notifier.run())
    for _ in range(10):
        for _ in range(100):
            notifier.notify()
        await asyncio.sleep(0)
    before = len(heard)
    notifier.notify()

    async def one_more() -> bool:
        return len(heard) > before

    await eventually("the last one is heard", one_more)
    running.cancel()
    await asyncio.wait({running})
    await opened.close()

    assert set(heard) == {"me"}
    assert len(heard) <= 11


@pytest.mark.parametrize(("standbys", "is_joined"), [("", True), ("nobody", False)])
async def test_a_lone_append_notifies_in_its_own_transaction_unless_it_may_wait_for_a_standby(
    database: str, heard: list[object], standbys: str, is_joined: bool
) -> None:
    """The notifier does not run, so what is heard was part of an append."""
    sql = load(LogSql, "log", schema="pgbackend")
    standby_names = "current_setting('synchronous_standby_names')"
    assert standby_names in sql.append_one_and_notify
    sql = replace(sql, append_one_and_notify=sql.append_one_and_notify.replace(standby_names, f"'{standbys}'"))
    opened = Database(database)
    await opened.open()
    notifier = make_notifier(opened)
    appender = Appender(
        opened, sql, schema="pgbackend", produce_timeout=30.0, wakeup=Wakeup(), notifier=notifier,
        on_full=asyncio.Event().wait, deduplication=Deduplication(opened, schema="pgbackend"),
    )  # fmt: skip
    running = asyncio.create_task(appender.run())
    await appender.append([ROW], 1)
    assert notifier._due.is_set() != is_joined
    await appender.append([ROW, ROW], 1)
    await execute(database, "SELECT pg_notify($1, 'last')", channel("pgbackend"))
    await eventually("the last one is heard", lambda: "last" in heard)
    await appender.drain()
    await running
    await opened.close()

    assert heard == (["me", "last"] if is_joined else ["last"])
    assert notifier._due.is_set()
    assert await query_value(database, "SELECT count(*) FROM pgbackend.events") == 3


@pytest.mark.owner
@pytest.mark.parametrize("sqlstate", ["55P03", "54000"])
async def test_a_lone_append_whose_notify_is_refused_is_stored_once_and_notified_later(
    database: str, heard: list[object], sqlstate: str
) -> None:
    """Another commit keeps the lock of all NOTIFYs, or their queue is full."""
    await execute(
        database,
        "CREATE FUNCTION refuse() RETURNS boolean LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION USING ERRCODE = '{sqlstate}'; END $$",
    )
    sql = load(LogSql, "log", schema="pgbackend")
    sql = replace(sql, append_one_and_notify=f"{sql.append_one_and_notify} AND refuse()")
    opened = Database(database)
    await opened.open()
    notifier = make_notifier(opened)
    appender = Appender(
        opened, sql, schema="pgbackend", produce_timeout=30.0, wakeup=Wakeup(), notifier=notifier,
        on_full=asyncio.Event().wait, deduplication=Deduplication(opened, schema="pgbackend"),
    )  # fmt: skip
    running = [asyncio.create_task(appender.run()), asyncio.create_task(notifier.run())]
    await appender.append([ROW], 1)
    await eventually("the event is heard of", lambda: heard == ["me"])
    await appender.drain()
    running[1].cancel()
    await asyncio.wait(running)
    await opened.close()

    assert await query_value(database, "SELECT count(*) FROM pgbackend.events") == 1


# A busy process may notify for 5 % of its time, and for what it saved up before.


def seconds_sent(*, busy: float, notify_takes: float, every: float, seconds: float) -> tuple[float, float]:
    """The time of all NOTIFYs, and the longest pause before one, in a process that appends for `busy` of its time."""
    budget, now, spent, longest = Budget(), 0.0, 0.0, 0.0
    while now < seconds:
        pause = budget.pause(now, now * (1 - busy))
        longest = max(longest, pause)
        now += pause
        budget.spend(notify_takes)
        spent += notify_takes
        now += max(notify_takes, every)
    return spent, longest


@given(st.floats(0.0001, 0.002), st.floats(0.0001, 0.01))
def test_a_busy_process_notifies_for_a_twentieth_of_its_time(takes: float, every: float) -> None:
    spent, longest = seconds_sent(busy=1.0, notify_takes=takes, every=every, seconds=20.0)
    assert spent <= 0.05 * 20.0 + 0.005 + 2 * takes
    assert longest <= takes / 0.05 + 1e-9


@given(st.floats(0.0, 0.25), st.floats(0.0001, 0.0003))
def test_a_process_that_is_mostly_idle_notifies_at_once(busy: float, takes: float) -> None:
    _, longest = seconds_sent(busy=busy, notify_takes=takes, every=0.001, seconds=5.0)
    assert longest == 0.0


def test_a_slow_network_costs_no_more_than_a_fast_one() -> None:
    _, longest = seconds_sent(busy=1.0, notify_takes=0.3, every=0.3, seconds=20.0)
    assert longest < 0.05


async def test_a_failed_notification_does_not_stop_later_ones(database: str, heard: list[object]) -> None:
    async with Proxy(database) as proxy:
        opened = Database(proxy.dsn)
        await opened.open()
        notifier = make_notifier(opened)
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
