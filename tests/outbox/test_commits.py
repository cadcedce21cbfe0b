"""Readers hear of a commit soon, without a NOTIFY in the transaction and without any I/O while it is open."""

import asyncio
import itertools
from collections.abc import AsyncIterator

import asyncpg
import pytest

from pgbackend import Backend
from pgbackend.log.log import Log
from pgbackend.log.notify import Notifier, Wakeup, channel
from pgbackend.outbox.commits import Commits, Transaction
from pgbackend.postgres.pool import Database
from tests.support.backends import running
from tests.support.databases import Sql, connected
from tests.support.dispatchers import Catch
from tests.support.events import make_event
from tests.support.outbox import KINDS, opened
from tests.support.polling import eventually

pytestmark = [pytest.mark.direct, pytest.mark.owner]

NEVER = 3600.0
"""A poll_interval that no test waits for."""


class Clock:
    """A transaction that a test ends, and how often it was looked at."""

    def __init__(self) -> None:
        self.over = False
        self.looks = 0
        self.transaction = Transaction(self, self.look)

    def look(self) -> bool:
        self.looks += 1
        return self.over


@pytest.fixture
async def heard(database: str) -> AsyncIterator[list[object]]:
    """The payloads of notifications about the log."""
    heard: list[object] = []
    async with connected(database) as listener:
        await listener.add_listener(channel("pgbackend"), lambda *args: heard.append(args[-1]))
        yield heard


@pytest.fixture
async def wakeup() -> Wakeup:
    return Wakeup()


@pytest.fixture
async def commits(database: str, wakeup: Wakeup) -> AsyncIterator[Commits]:
    opened = Database(database)
    await opened.open()
    log = Log(opened, schema="pgbackend", hole_wait=0.1)
    notifier = Notifier(opened, log.sql, channel=channel("pgbackend"), sender="me", idle=lambda: 0.0)
    notifying = asyncio.create_task(notifier.run())
    commits = Commits(wakeup, notifier)
    yield commits
    commits.close()
    notifying.cancel()
    await asyncio.wait({notifying})
    await opened.close()


async def test_the_end_of_a_transaction_wakes_this_process_and_others(
    commits: Commits, wakeup: Wakeup, heard: list[object]
) -> None:
    clock = Clock()
    commits.watch(clock.transaction)
    await eventually("it is looked at", lambda: clock.looks >= 3, interval=0.001)
    assert (wakeup.count, heard) == (0, [])

    clock.over = True

    await eventually("others are notified", lambda: heard == ["me"])
    assert wakeup.count == 1


async def test_many_events_of_a_transaction_wake_readers_once(commits: Commits, wakeup: Wakeup) -> None:
    clock, other = Clock(), Clock()
    for _ in range(100):
        commits.watch(clock.transaction)
    clock.over = True
    await eventually("readers are woken", lambda: wakeup.count > 0, interval=0.001)
    other.over = True
    commits.watch(other.transaction)

    await eventually("the other one has ended", lambda: other.looks > 0, interval=0.001)
    assert (wakeup.count, clock.looks) == (2, 1)


async def test_the_waits_grow_and_another_event_shortens_them(commits: Commits) -> None:
    clock = Clock()
    commits.watch(clock.transaction)

    def wait() -> float:
        return commits._watched[id(clock)][1].when() - asyncio.get_running_loop().time()

    await eventually("the waits have grown", lambda: wait() > 0.02, interval=0.001)

    commits.watch(clock.transaction)

    assert wait() <= 0.001


async def test_events_that_keep_coming_do_not_put_off_the_look(commits: Commits, wakeup: Wakeup) -> None:
    clock = Clock()

    def produce() -> bool:
        commits.watch(clock.transaction)
        clock.over = clock.looks >= 2
        return wakeup.count > 0

    await eventually("readers are woken", produce, interval=0)


async def test_nothing_is_watched_after_the_end(commits: Commits) -> None:
    clock, late = Clock(), Clock()
    commits.watch(clock.transaction)
    _, timer = commits._watched[id(clock)]

    commits.close()
    commits.watch(late.transaction)

    assert timer.cancelled()
    assert not commits._watched


async def test_a_connection_that_is_gone_ends_its_transaction(commits: Commits, wakeup: Wakeup) -> None:
    def look() -> bool:
        raise asyncpg.InterfaceError("released back to the pool")

    commits.watch(Transaction(object(), look))

    await eventually("readers are woken", lambda: wakeup.count == 1, interval=0.001)


@pytest.mark.parametrize("kind", [kind for kind, client in KINDS.items() if client.is_async])
async def test_readers_of_this_process_and_of_others_hear_of_a_commit(kind: str, database: str) -> None:
    here, elsewhere = Catch(), Catch()
    async with (
        running(database, poll_interval=NEVER) as consumer,
        opened(kind, database) as harness,
        running(database, poll_interval=NEVER) as other,
    ):
        await consumer.subscribe("here", here)
        await other.subscribe("elsewhere", elsewhere)
        await harness.begin()
        await harness.produce(make_event("a"))
        await harness.commit()

        await here.has("a")
        await elsewhere.has("a")


async def test_a_reader_of_the_same_backend_hears_of_a_commit_without_a_listener(database: str) -> None:
    catch = Catch()
    async with running(database, poll_interval=NEVER) as backend, connected(database) as connection:
        await backend.subscribe("here", catch)
        for id_ in ("a", "b", "c"):
            async with connection.transaction():
                await backend.produce(make_event(id_), connection=connection)
        await catch.has("a", "b", "c")


async def test_readers_hear_of_commits_while_a_connection_goes_from_transaction_to_transaction(database: str) -> None:
    catch = Catch()
    async with running(database, poll_interval=NEVER) as backend, connected(database) as connection:
        await backend.subscribe("here", catch)

        async def work() -> None:
            for number in itertools.count():
                async with connection.transaction():
                    await backend.produce(make_event(str(number)), connection=connection)

        working = asyncio.create_task(work())
        await catch.has("0", "100")
        working.cancel()
        await asyncio.wait({working})


async def test_a_rolled_back_transaction_wakes_readers_and_harms_nothing(database: str, sql: Sql) -> None:
    catch = Catch()
    async with running(database, poll_interval=NEVER) as backend:
        await backend.subscribe("here", catch)
        transaction = sql.transaction()
        await transaction.start()
        await backend.produce(make_event("a"), connection=sql)
        await transaction.rollback()
        async with sql.transaction():
            await backend.produce_many([make_event("b"), make_event("c")], connection=sql)

        await catch.has("b", "c")
        assert catch.ids == ["b", "c"]


async def test_a_backend_stops_while_a_callers_transaction_is_open(database: str, sql: Sql) -> None:
    backend = Backend(database)
    await backend.init()
    async with sql.transaction():
        await backend.produce(make_event("a"), connection=sql)
        await backend.stop()

    assert await sql.fetchval("SELECT count(*) FROM pgbackend.events") == 1


async def test_a_connection_that_goes_back_to_its_pool_has_ended_its_transaction(database: str) -> None:
    catch = Catch()
    async with (
        running(database, poll_interval=NEVER) as backend,
        asyncpg.create_pool(database, min_size=1, max_size=1) as pool,
    ):
        await backend.subscribe("here", catch)
        for id_ in ("a", "b"):
            async with pool.acquire() as connection, connection.transaction():
                await backend.produce(make_event(id_), connection=connection)
        await catch.has("a", "b")
