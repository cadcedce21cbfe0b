"""A worker's sign of life: when it may start dispatches, and what it does once it may not any more."""

import asyncio
import time
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from pgbackend import Backend
from pgbackend.errors import ConnectionLostError
from pgbackend.facts import Recorder, observe
from pgbackend.postgres.pool import Database
from pgbackend.subscriptions.leases import Leases
from pgbackend.subscriptions.presence import Presence, Tenure
from pgbackend.torture.proxy import Proxy
from tests.support.backends import worker_of
from tests.support.dispatchers import Catch
from tests.support.events import make_event
from tests.support.polling import eventually

SETTINGS: dict[str, Any] = {"commit_interval": 0.01, "poll_interval": 0.2, "lease_timeout": 90.0}
"""Leases do not time out, unless a test says so."""


async def terminate(dsn: str, condition: str) -> int:
    """Terminate the backends of this database that meet the condition; how many."""
    connection = await asyncpg.connect(dsn)
    try:
        return len(
            await connection.fetch(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                f"WHERE datname = current_database() AND pid <> pg_backend_pid() AND {condition}"
            )
        )
    finally:
        await connection.close()


PRESENCE = "pid IN (SELECT backend_pid FROM pgbackend.workers)"


@pytest.mark.direct
async def test_a_worker_whose_connection_is_cut_starts_nothing_until_it_is_registered_again(database: str) -> None:
    catch = Catch()
    with Recorder() as recorder:
        async with Backend(database, **SETTINGS) as backend:
            await backend.subscribe("s", catch)
            await recorder.wait("lease claimed")
            tenure = worker_of(backend).pumps.tenure
            assert await terminate(database, PRESENCE)
            # At once, not when the next heartbeat fails in 30 s: others may take over from now on.
            await recorder.wait("presence lost", timeout=20)

            async def is_registered() -> bool:
                return tenure.valid_until > time.monotonic()

            await eventually("the worker is registered again", is_registered)
            await backend.produce(make_event("a"))
            await catch.has("a")


async def test_the_tenure_is_void_before_the_loss_of_the_connection_is_logged(database: str) -> None:
    """Logging may block on a slow reader, and others can take over meanwhile."""
    tenures: list[float] = []

    def hear(name: str, _: object) -> None:
        if name == "presence lost":
            tenures.append(tenure.valid_until)

    with Recorder() as recorder, observe(hear):
        async with Backend(database, **SETTINGS) as backend:
            await backend.subscribe("s", Catch())
            await recorder.wait("lease claimed")
            tenure = worker_of(backend).pumps.tenure
            assert await terminate(database, PRESENCE)
            await recorder.wait("presence lost")
    assert tenures[0] == 0.0


async def test_a_worker_that_cannot_reach_the_server_loses_its_tenure_and_recovers(database: str) -> None:
    catch = Catch()
    async with Proxy(database) as proxy, Backend(proxy.dsn, **{**SETTINGS, "lease_timeout": 1.0}) as backend:
        await backend.subscribe("s", catch)
        await backend.produce(make_event("a"))
        await catch.has("a")
        proxy.stall()

        # Poll instead of waiting for a fact: a busy machine may have emitted it before.
        async def is_over() -> bool:
            return worker_of(backend).pumps.tenure.valid_until < time.monotonic()

        await eventually("the tenure is over", is_over)
        proxy.cut()
        proxy.restore()
        async with Backend(database) as producer:
            await producer.produce(make_event("b"))
        await catch.has("b")


@pytest.mark.direct
async def test_a_former_owner_that_comes_back_dispatches_nothing_of_its_lost_shard(database: str) -> None:
    first, second = Catch(), Catch()
    async with Proxy(database) as proxy:
        with Recorder() as recorder:
            async with Backend(proxy.dsn, **SETTINGS) as one, Backend(database, **SETTINGS) as other:
                await one.subscribe("s", first)
                await recorder.wait("lease claimed")
                await other.subscribe("s", second)
                proxy.cut()
                await recorder.wait("lease claimed", count=2)
                proxy.restore()
                await recorder.wait("lease lost")
                for id_ in ("a", "b", "c"):
                    await other.produce(make_event(id_))
                await second.has("a", "b", "c")

    assert first.ids == []


async def test_a_claim_answered_after_a_lapse_of_the_tenure_is_not_used(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process was frozen for longer than its lease, so another worker may have the shard already."""
    claim, claimed, answer = Leases.claim, asyncio.Event(), asyncio.Event()
    stale: list[int] = []

    async def claim_slowly(self: Leases, subscriptions: Any) -> Any:
        leases = await claim(self, subscriptions)
        if leases and not stale:
            stale.extend(lease.epoch for lease in leases)
            claimed.set()
            await answer.wait()
        return leases

    monkeypatch.setattr(Leases, "claim", claim_slowly)
    observer = await asyncpg.connect(database)
    catch = Catch()
    with Recorder() as recorder:
        async with Backend(database, **SETTINGS) as backend:
            await backend.subscribe("s", catch)
            async with asyncio.timeout(10):
                await claimed.wait()
            # Another worker takes the shard over and releases it. In between this worker learns that it has nothing.
            await observer.execute("UPDATE pgbackend.offsets SET owner = NULL, epoch = nextval('pgbackend.epochs')")
            worker_of(backend)._on_held(frozenset())
            answer.set()
            await recorder.wait("lease claimed")
            await backend.produce(make_event("a"))
            await catch.has("a")
    await observer.close()
    assert not set(stale) & {fields["epoch"] for fields in recorder.all("lease claimed")}


async def test_starting_raises_the_error_of_the_first_connection(database: str) -> None:
    def presence(dsn: str) -> Presence:
        return Presence(
            Database(dsn),
            schema="pgbackend",
            worker=uuid4(),
            name="test",
            lease_timeout=15.0,
            channel="test",
            notify="SELECT 1",
            tenure=Tenure(),
            on_hint=lambda _: None,
            on_held=lambda _: None,
        )

    nobody = presence("postgresql://localhost:1/nowhere")
    with pytest.raises(ConnectionLostError):
        await nobody.start()
    await nobody.stop()

    never_started = presence(database)
    await never_started.stop()


@pytest.mark.direct
async def test_a_wakeup_reaches_the_worker_long_before_it_polls(database: str) -> None:
    catch = Catch()
    with Recorder() as recorder:
        async with Backend(database, **{**SETTINGS, "poll_interval": 30.0}) as backend:
            await backend.subscribe("s", catch)
            await recorder.wait("lease claimed")
            async with Backend(database) as producer:
                await producer.produce(make_event("a"))
                await catch.has("a")
