"""Giving a shard up never cuts a dispatcher short, and never has an event at work twice. Only stopping cancels."""

import asyncio
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import pytest

from pgbackend import Backend, Event, SubscriptionBusyError
from pgbackend.delivery.claims import Claims
from pgbackend.facts import Recorder
from tests.support.backends import worker_of
from tests.support.events import make_event
from tests.support.polling import eventually

SETTINGS: dict[str, Any] = {"commit_interval": 0.01, "poll_interval": 0.1, "drain_timeout": 0.3}


class Slow:
    """A dispatcher whose events named "slow…" wait until it is opened, in a thread or in the loop."""

    def __init__(self, *, plain: bool) -> None:
        self.begun: list[str] = []
        self.ended: list[str] = []
        self._open = threading.Event()
        self.handle: Any = self._handle_plain if plain else self._handle

    def _handle_plain(self, event: Event) -> None:
        self.begun.append(event.id)
        if event.id.startswith("slow"):
            assert self._open.wait(60)
        self.ended.append(event.id)

    async def _handle(self, event: Event) -> None:
        self.begun.append(event.id)
        while event.id.startswith("slow") and not self._open.is_set():
            await asyncio.sleep(0.005)
        self.ended.append(event.id)

    def open(self) -> None:
        self._open.set()

    async def has_begun(self, *ids: str) -> None:
        await holds(f"{ids} have begun", lambda: set(ids) <= set(self.begun))

    async def has_ended(self, *ids: str) -> None:
        await holds(f"{ids} have ended", lambda: set(ids) <= set(self.ended))


async def holds(what: str, condition: Callable[[], bool]) -> None:
    async def look() -> bool:
        return condition()

    await eventually(what, look)


async def stored(database: str) -> list[Any]:
    connection = await asyncpg.connect(database)
    try:
        return [
            tuple(row)
            for row in await connection.fetch(
                "SELECT ordering, subscription.shards, stored.shards, epoch, draining_until IS NULL "
                "FROM pgbackend.subscriptions AS subscription "
                "JOIN pgbackend.offsets AS stored ON subscription = name ORDER BY stored.shard"
            )
        ]
    finally:
        await connection.close()


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> Counter[Claims]:
    """How many rounds of sharing out each worker has made."""
    counts, run_round = Counter[Claims](), Claims.run_once

    async def counted(self: Claims) -> None:
        await run_round(self)
        counts[self] += 1

    monkeypatch.setattr(Claims, "run_once", counted)
    return counts


@pytest.mark.parametrize("plain", [False, True])
async def test_a_worker_that_joins_waits_for_slow_dispatchers_and_the_shard_goes_on_meanwhile(
    database: str, rounds: Counter[Claims], plain: bool
) -> None:
    slow, other = Slow(plain=plain), Slow(plain=plain)
    other.open()
    async with Backend(database, **SETTINGS) as one, Backend(database, **SETTINGS) as two:
        await one.subscribe("s", slow.handle, start="earliest", shards=2, concurrency=16)
        await one.produce_many([make_event(f"slow {key}", key=str(key)) for key in range(8)])
        await slow.has_begun(*(f"slow {key}" for key in range(8)))
        await two.subscribe("s", other.handle, shards=2)
        joined, seen = worker_of(two)._claims, rounds.copy()
        # Longer than any drain_timeout: a round lasts 0.1 s.
        await holds("it has asked for long", lambda: rounds[joined] >= seen[joined] + 15)
        await one.produce_many([make_event(f"quick {key}", key=str(key)) for key in range(20)])
        await slow.has_ended(*(f"quick {key}" for key in range(20)))
        assert other.begun == []
        slow.open()
        await slow.has_ended(*(f"slow {key}" for key in range(8)))

        async def is_shared() -> bool:
            return len({shard.owner for shard in (await one.status()).subscriptions[0].shards} - {None}) == 2

        await eventually("each has a shard", is_shared)

    assert Counter(slow.begun + other.begun).most_common(1)[0][1] == 1


Change = Callable[[Backend], Awaitable[None]]


def reshard(backend: Backend) -> Awaitable[None]:
    return backend.reshard("s", 4)


def alter(backend: Backend) -> Awaitable[None]:
    return backend.alter_subscription("s", order="key", end=None, start="earliest")


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("change", [reshard, alter])
async def test_a_change_that_would_take_too_long_is_refused_and_the_worker_goes_on(
    database: str, change: Change, elsewhere: bool, plain: bool
) -> None:
    slow = Slow(plain=plain)
    caller = Backend(database, drain_timeout=60.0)
    await caller.init()
    async with Backend(database, **SETTINGS) as backend:
        await backend.subscribe("s", slow.handle, start="earliest", concurrency=4)
        await backend.produce(make_event("slow"))
        await slow.has_begun("slow")
        before = await stored(database)
        with pytest.raises(SubscriptionBusyError, match="was not changed") as caught:
            # Sooner than the caller's own patience ends.
            async with asyncio.timeout(30):
                await change(caller if elsewhere else backend)
        assert len(caught.value.workers) == 1
        await backend.produce(make_event("quick"))
        await slow.has_ended("quick")
        (row,) = await stored(database)
        assert row[:3] == before[0][:3]
        assert row[4], "it need not rest any more"
        slow.open()
        await slow.has_ended("slow")
        await change(caller if elsewhere else backend)
        assert (await stored(database))[0][:3] != before[0][:3]
    await caller.stop()

    assert slow.begun == slow.ended[::-1] == ["slow", "quick"]


async def test_a_slow_dispatcher_is_waited_for_once_however_often_a_change_is_asked_for(database: str) -> None:
    slow = Slow(plain=False)
    with Recorder() as recorder:
        async with Backend(database, **SETTINGS | {"drain_timeout": 0.5}) as backend:
            await backend.subscribe("s", slow.handle, start="earliest", concurrency=4)
            await backend.produce(make_event("slow"))
            await slow.has_begun("slow")
            for turn in range(5):
                with pytest.raises(SubscriptionBusyError):
                    await reshard(backend)
                await backend.produce(make_event(f"quick {turn}"))
                await slow.has_ended(f"quick {turn}")
            assert len(recorder.all("shard kept")) == 1
            slow.open()


@pytest.mark.parametrize("elsewhere", [False, True])
async def test_a_seek_neither_cancels_what_is_at_work_nor_has_it_at_work_twice(database: str, elsewhere: bool) -> None:
    slow = Slow(plain=True)
    operator = Backend(database)
    await operator.init()
    with Recorder() as recorder:
        async with Backend(database, **SETTINGS) as backend:
            await backend.subscribe("s", slow.handle, start="earliest")
            await backend.produce(make_event("slow"))
            await slow.has_begun("slow")
            await (operator if elsewhere else backend).seek("s", "earliest")
            # After `drain_timeout`.
            await recorder.wait("lost shard is still at work")
            assert slow.begun == ["slow"]
            slow.open()
            await holds("it comes again, from the new place", lambda: slow.ended == ["slow", "slow"])
    await operator.stop()


async def test_unsubscribing_cancels_what_is_at_work_for_too_long(database: str) -> None:
    slow = Slow(plain=False)
    async with Backend(database, **SETTINGS) as backend:
        await backend.subscribe("s", slow.handle, start="earliest")
        await backend.produce(make_event("slow"))
        await slow.has_begun("slow")
        await backend.unsubscribe("s")
        (status,) = (await backend.status()).subscriptions
        assert (status.lag, status.shards[0].owner) == (1, None)

    assert slow.ended == []
