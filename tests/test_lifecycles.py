"""Every actor keeps the one contract of tests/support/lifecycle.py."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import timedelta
from uuid import uuid4

import pytest

from pgbackend import Backend
from pgbackend.delivery.committer import Committer
from pgbackend.delivery.offsets import Offsets
from pgbackend.log.appender import Appender
from pgbackend.log.deduplication import Deduplication
from pgbackend.log.log import Log
from pgbackend.log.maintenance import Maintenance
from pgbackend.log.notify import Notifier, Wakeup, channel
from pgbackend.log.ranges import RangeSet
from pgbackend.log.requirements import Requirements
from pgbackend.log.retention import Retainer
from pgbackend.log.segments import Segments
from pgbackend.log.tail import Tail
from pgbackend.model import Retention
from pgbackend.postgres.pool import Database
from pgbackend.subscriptions.presence import Presence, Tenure
from tests.support import lifecycle
from tests.support.backends import SOON
from tests.support.databases import connected
from tests.support.dispatchers import Catch
from tests.support.events import make_event
from tests.support.lifecycle import Lifecycle
from tests.support.polling import eventually

ROW = ("1.0", "a", "test", "test", None, None, None, None, None, "{}", b"data", None)


@dataclass(frozen=True, slots=True)
class World:
    """Everything that the actors of one test share."""

    dsn: str
    database: Database
    log: Log


def appender(world: World) -> Lifecycle:
    async def make_room() -> None: ...

    def make() -> Appender:
        return Appender(
            world.database,
            world.log.sql,
            schema="pgbackend",
            produce_timeout=5.0,
            wakeup=Wakeup(),
            notifier=Notifier(world.database, world.log.sql, channel="test", sender="me", idle=lambda: 0.0),
            on_full=make_room,
            deduplication=Deduplication(world.database, schema="pgbackend"),
        )

    async def use(appender: Appender) -> None:
        await appender.append([ROW], 100)
        await appender.append([ROW, ROW], 200)

    return Lifecycle(make, use)


def notifier(world: World) -> Lifecycle:
    def make() -> Notifier:
        return Notifier(world.database, world.log.sql, channel=channel("pgbackend"), sender="me", idle=lambda: 0.0)

    async def use(notifier: Notifier) -> None:
        heard: list[object] = []
        async with connected(world.dsn) as listener:
            await listener.add_listener(channel("pgbackend"), lambda *args: heard.append(args[-1]))
            notifier.notify()
            await eventually("the NOTIFY is heard", lambda: "me" in heard, interval=0.001)

    return Lifecycle(make, use)


def maintenance(world: World) -> Lifecycle:
    def make() -> Maintenance:
        segments = Segments(world.database, schema="pgbackend")
        return Maintenance(Requirements(world.log, schema="pgbackend"), segments, Wakeup())

    async def use(maintenance: Maintenance) -> None:
        await maintenance.run_once()

    return Lifecycle(make, use)


def deduplication(world: World) -> Lifecycle:
    async def use(deduplication: Deduplication) -> None:
        await deduplication.enter(timedelta(seconds=0.1))
        await deduplication.run_once()

    return Lifecycle(lambda: Deduplication(world.database, schema="pgbackend"), use)


def retainer(world: World) -> Lifecycle:
    def make() -> Retainer:
        return Retainer(world.database, Segments(world.database, schema="pgbackend"), schema="pgbackend")

    async def use(retainer: Retainer) -> None:
        await retainer.store(Retention(keep=timedelta(seconds=1)))
        async with connected(world.dsn) as owner:
            await owner.execute("INSERT INTO pgbackend.events (id, source, type) VALUES ('1', '/s', 't')")
            await owner.execute("UPDATE pgbackend.events SET recorded_at = recorded_at - interval '1 minute'")
            retainer._remove_at = 0.0
            await retainer.run_once()

    return Lifecycle(make, use)


class RunTail:
    """A tail with one cursor that reads on."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.read: set[str] = set()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tail = Tail(self.log, Wakeup(), poll_interval=0.01, buffer_bytes=1 << 20)
            tasks.create_task(tail.run(), name="tail")
            cursor = tail.cursor(after=0)
            while True:
                batch = await cursor.next(RangeSet())
                self.read.update(event.id for event in batch.events)
                cursor.advance(batch.upto)


def tail(world: World) -> Lifecycle:
    async def use(running: RunTail) -> None:
        id_ = str(uuid4())
        async with connected(world.dsn) as producer:
            await producer.execute("INSERT INTO pgbackend.events (id, source, type) VALUES ($1, '/s', 't')", id_)
        await eventually("it is read", lambda: id_ in running.read, interval=0.001)

    return Lifecycle(lambda: RunTail(world.log), use)


def committer(world: World) -> Lifecycle:
    def make() -> Committer:
        offsets = Offsets(world.log, schema="pgbackend", worker=uuid4())
        return Committer(offsets, commit_interval=0.01, apply=lambda committed: None)

    async def use(committer: Committer) -> None:
        await committer.flush()
        await committer.flush()

    return Lifecycle(make, use)


class RunPresence:
    """A worker's presence from its start to its stop."""

    def __init__(self, world: World) -> None:
        self.registered = asyncio.Event()
        self.presence = Presence(
            world.database,
            schema="pgbackend",
            worker=uuid4(),
            name="test",
            lease_timeout=15.0,
            channel=channel("pgbackend"),
            notify=world.log.sql.notify,
            tenure=Tenure(),
            on_hint=lambda payload: None,
            on_held=lambda epochs: None,
        )

    async def run(self) -> None:
        try:
            await self.presence.start()
            self.registered.set()
            await self.presence.watch()
        finally:
            await self.presence.stop()


def presence(world: World) -> Lifecycle:
    # A cancelled `stop()` only stops waiting for the thread, so wait for it again.
    return Lifecycle(
        lambda: RunPresence(world),
        lambda running: running.registered.wait(),
        end=lambda running: running.presence.stop(),
    )


class RunBackend:
    """A backend's whole life in one `run()`."""

    def __init__(self, dsn: str) -> None:
        self.backend = Backend(dsn, **SOON, drain_timeout=1.0)
        self.catch = Catch()
        self.subscribed = asyncio.Event()

    async def run(self) -> None:
        try:
            await self.backend.init()
            await self.backend.subscribe("s", self.catch, start="earliest")
            self.subscribed.set()
            await self.backend.start()
        finally:
            await self.backend.stop()

    async def drain(self) -> None:
        await self.backend.stop()


def backend(world: World) -> Lifecycle:
    async def use(running: RunBackend) -> None:
        await running.subscribed.wait()
        await running.backend.produce(make_event("a"))
        await running.catch.has("a")

    # A cancelled `stop()` only stops waiting for the end, so wait for it again.
    return Lifecycle(lambda: RunBackend(world.dsn), use, end=lambda running: running.backend.stop())


ACTORS: dict[str, Callable[[World], Lifecycle]] = {
    "appender": appender,
    "notifier": notifier,
    "tail": tail,
    "maintenance": maintenance,
    "deduplication": deduplication,
    "retainer": retainer,
    "committer": committer,
    "presence": presence,
    "backend": backend,
}
DRAINED = ("appender", "backend")
"""Those that have `drain()`."""
OPEN = """
    SELECT pid, state, wait_event_type, wait_event, left(query, 200) AS query FROM pg_stat_activity
    WHERE datname = current_database() AND application_name = 'pgbackend'"""


@pytest.fixture
async def world(database: str) -> AsyncIterator[World]:
    """At the end, when the pool is closed, no other connection to the database is left."""
    opened = Database(database)
    await opened.open()
    log = Log(opened, schema="pgbackend", hole_wait=0.1)
    await log.incarnation.enter()
    yield World(database, opened, log)
    await opened.close()
    async with connected(database, application_name="observer") as observer:

        async def find_open() -> list[str]:
            return [
                f"pid {row['pid']}: {row['state']}, {row['wait_event_type']} {row['wait_event']}, {row['query']}"
                for row in await observer.fetch(OPEN)
            ]

        async def are_closed() -> bool:
            return not await find_open()

        try:
            await eventually("no connection is left", are_closed)
        except TimeoutError as error:
            error.add_note("\n".join(await find_open()))
            raise


@pytest.fixture(params=ACTORS)
def actor(request: pytest.FixtureRequest, world: World) -> Lifecycle:
    return ACTORS[request.param](world)


async def test_an_actor_can_be_cancelled_before_it_starts(actor: Lifecycle) -> None:
    await lifecycle.cancel_before_it_starts(actor)


@pytest.mark.parametrize("again", [False, True], ids=["once", "twice"])
async def test_an_actor_can_be_cancelled_at_every_await(actor: Lifecycle, *, again: bool, long: bool) -> None:
    """The first steps one by one, later ones farther and farther apart; all of them with --long."""
    stride = (lambda step: 1) if long else (lambda step: 1 + step // 8)
    assert await lifecycle.cancel_at_every_step(actor, again=again, stride=stride) > 1


async def test_an_actor_can_be_run_again_or_says_no(actor: Lifecycle) -> None:
    await lifecycle.run_again(actor)


@pytest.mark.parametrize("actor", DRAINED, indirect=True)
async def test_an_actor_can_be_drained_before_it_runs(actor: Lifecycle) -> None:
    await lifecycle.drain_before_it_runs(actor)


@pytest.mark.parametrize("actor", DRAINED, indirect=True)
async def test_an_actor_can_be_drained_twice(actor: Lifecycle) -> None:
    await lifecycle.drain_twice(actor)


@pytest.mark.parametrize("actor", DRAINED, indirect=True)
async def test_an_actor_can_be_drained_while_it_is_cancelled(actor: Lifecycle) -> None:
    await lifecycle.drain_while_it_is_cancelled(actor)
