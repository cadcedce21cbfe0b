import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import asyncpg
import pytest

from pgbackend import Backend, Event, Retry
from pgbackend.facts import Recorder
from pgbackend.subscriptions.leases import Leases
from tests.support.backends import worker_of
from tests.support.dispatchers import Catch
from tests.support.events import make_event

SETTINGS: dict[str, Any] = {"commit_interval": 0.01, "poll_interval": 0.2}


async def test_unsubscribing_a_subscription_whose_lease_has_just_been_given_up_harms_nothing(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost shard is just being ended, and its pump goes between the look at what there is to end and its end."""
    release = Leases.release
    unsubscribing: list[asyncio.Task[None]] = []

    async def unsubscribed_meanwhile(self: Leases, epochs: Sequence[int]) -> None:
        await release(self, epochs)
        if epochs == [] and lost and not unsubscribing:
            unsubscribing.append(asyncio.create_task(backend.unsubscribe("s")))
            await asyncio.sleep(0)

    monkeypatch.setattr(Leases, "release", unsubscribed_meanwhile)
    lost = False
    with Recorder() as recorder:
        async with Backend(database, **SETTINGS) as backend:
            await backend.subscribe("s", Catch())
            await recorder.wait("lease claimed")
            worker = worker_of(backend)
            (pump,) = worker.pumps
            lost = True
            worker._handover.lose(pump.shard)
            await recorder.wait("lease released")
            await unsubscribing[0]
            catch = Catch()
            await backend.subscribe("t", catch)
            await backend.produce(make_event("a"))
            await catch.has("a")


@pytest.mark.direct
async def test_what_waited_to_be_tried_again_in_a_former_life_of_the_server_is_nobodys_any_more(database: str) -> None:
    """Its time comes when its pump is long gone."""
    observer = await asyncpg.connect(database)
    catch = Catch(fails=lambda event: event.attempt == 1)
    with Recorder() as recorder:
        async with Backend(database, **SETTINGS) as backend:
            await backend.subscribe("s", catch, order="key", retry=Retry(delay=0.4))
            await backend.produce(make_event("a", key="k"))
            await recorder.wait("retry scheduled")
            (pump,) = worker_of(backend).pumps
            # As a crash leaves it.
            await observer.execute("UPDATE pgbackend.incarnation SET id = gen_random_uuid()")
            await recorder.wait("incarnation changed")
            assert pump._backlog.next_due() is None
            await catch.has("a")
    await observer.close()


async def test_a_dispatcher_that_swallows_its_cancellation_harms_nobody(database: str) -> None:
    """It makes way for the next event of its key when nothing may begin any more."""
    begun = asyncio.Event()

    async def stubborn(_: Event) -> None:
        begun.set()
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()

    catch = Catch()
    async with Backend(database, drain_timeout=0.1, **SETTINGS) as backend:
        await backend.subscribe("s", stubborn, order="key")
        await backend.produce_many([make_event("a", key="k"), make_event("b", key="k")])
        await begun.wait()
        await backend.unsubscribe("s")
        await backend.subscribe("s", catch, order="key")
        await catch.has("b")


async def test_a_dispatcher_that_is_cancelled_has_ended_before_its_shard_is_given_up(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the next owner would dispatch the event beside it."""
    release = Leases.release
    order: list[str] = []
    begun = asyncio.Event()

    async def recorded(self: Leases, epochs: Sequence[int]) -> None:
        if epochs:
            order.append("given up")
        await release(self, epochs)

    async def endless(_: Event) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            order.append("cancelled")

    monkeypatch.setattr(Leases, "release", recorded)
    async with Backend(database, drain_timeout=0.1, **SETTINGS) as backend:
        await backend.subscribe("s", endless)
        await backend.produce(make_event("a"))
        await begun.wait()

    assert order == ["cancelled", "given up"]


@pytest.mark.direct
async def test_a_way_to_listen_that_leads_elsewhere_is_found_out(database: str, empty_database: str) -> None:
    """The worker would look dead there: others would take its shards over and over."""
    elsewhere = Backend(empty_database)
    await elsewhere.init()
    await elsewhere.stop()
    catch = Catch()
    with Recorder() as recorder:
        async with Backend(database, listen_dsn=empty_database) as backend:
            await backend.subscribe("s", catch)
            await backend.produce(make_event("a"))
            fact = await recorder.wait("worker cannot start")
    assert "listen_dsn does not lead to the same database as dsn" in str(fact["error"])
    assert not recorder.all("lease claimed")
    assert not catch.attempts
