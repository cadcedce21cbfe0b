import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from pgbackend import Backend, Event
from pgbackend.facts import Recorder
from pgbackend.log.log import Log
from pgbackend.postgres.pool import Database
from pgbackend.subscriptions.leases import Leases
from tests.support.claims import claim_free
from tests.support.dispatchers import Catch
from tests.support.events import make_event
from tests.support.ledger import Ledger
from tests.support.polling import eventually
from tests.support.worker import Worker

SETTINGS: dict[str, Any] = {"commit_interval": 0.01, "poll_interval": 0.2, "lease_timeout": 90.0}
"""Leases do not time out, unless a test says so."""
REGISTER = """
    INSERT INTO pgbackend.workers (id, name, backend_pid, backend_start, lease_timeout, heartbeat_at)
    VALUES ($1, 'somebody', $2, $3, '15 s', clock_timestamp() - $4 * interval '1 s')"""


@asynccontextmanager
async def opened(dsn: str, **settings: Any) -> AsyncIterator[Log]:
    database = Database(dsn, **settings)
    await database.open()
    try:
        log = Log(database, schema="pgbackend", hole_wait=1.0)
        await log.incarnation.enter()
        yield log
    finally:
        await database.close()


async def owner_of(dsn: str, name: str = "s") -> Any:
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetchval("SELECT owner FROM pgbackend.offsets WHERE subscription = $1", name)
    finally:
        await connection.close()


# Claiming.


async def test_workers_that_claim_at_once_share_the_shards_without_taking_any_from_each_other(
    backend: Backend, database: str
) -> None:
    """A shard that another worker claimed after the survey must not look like a dead worker's."""
    await backend.subscribe("s", Catch(), shards=4)
    connection = await asyncpg.connect(database)
    workers = [uuid4() for _ in range(6)]
    for worker in workers:
        await connection.execute(REGISTER, worker, None, None, 0.0)
    async with AsyncExitStack() as stack:
        logs = [await stack.enter_async_context(opened(database)) for _ in workers]
        claimers = [Leases(log, schema="pgbackend", worker=worker) for log, worker in zip(logs, workers, strict=True)]
        for _ in range(40):
            claims = await asyncio.gather(*(claim_free(claimer, "s") for claimer in claimers))
            taken = [(lease.shard, lease.epoch) for leases in claims for lease in leases]
            assert sorted(shard for shard, _ in taken) == [0, 1, 2, 3], "a shard was claimed twice"
            await connection.execute("UPDATE pgbackend.offsets SET owner = NULL")
    await connection.close()


@pytest.mark.parametrize(
    ("pid", "silent_for", "is_free"),
    [(None, 0.0, False), (None, 20.0, True), (999_999_999, 0.0, True)],
    ids=["alive", "silent for longer than its lease", "the backend is gone"],
)
async def test_a_shard_is_free_when_its_owner_is_dead(
    backend: Backend, database: str, pid: int | None, silent_for: float, is_free: bool
) -> None:
    await backend.subscribe("s", Catch())
    connection = await asyncpg.connect(database)
    other = uuid4()
    await connection.execute(REGISTER, other, pid, None, silent_for)
    await connection.execute("UPDATE pgbackend.offsets SET owner = $1", other)
    await connection.close()
    async with opened(database) as log:
        leases = await claim_free(Leases(log, schema="pgbackend", worker=uuid4()), "s")

    assert bool(leases) == is_free


async def test_a_worker_that_leaves_right_after_a_claim_counts_as_no_crash(backend: Backend, database: str) -> None:
    """The worker may be stopped before the claim is answered. After a crash the next owner would be careful."""
    await backend.subscribe("s", Catch(), shards=2)
    worker = uuid4()
    connection = await asyncpg.connect(database)
    await connection.execute(REGISTER, worker, None, None, 0.0)
    await connection.close()
    async with opened(database) as log:
        leaving = Leases(log, schema="pgbackend", worker=worker)
        assert len(await claim_free(leaving, "s")) == 2
        await leaving.leave()
        leases = await claim_free(Leases(log, schema="pgbackend", worker=uuid4()), "s")

    assert [lease.crashes for lease in leases] == [0, 0]


@pytest.mark.owner
async def test_a_pid_reused_by_another_backend_is_no_sign_of_life(backend: Backend, database: str) -> None:
    await backend.subscribe("s", Catch())
    connection = await asyncpg.connect(database)
    other, pid = uuid4(), await connection.fetchval("SELECT pg_backend_pid()")
    await connection.execute(
        "INSERT INTO pgbackend.workers (id, name, backend_pid, backend_start, lease_timeout) "
        "VALUES ($1, 'somebody', $2, now() - interval '1 day', '15 s')",
        other, pid,
    )  # fmt: skip
    await connection.execute("UPDATE pgbackend.offsets SET owner = $1", other)
    async with opened(database) as log:
        assert await claim_free(Leases(log, schema="pgbackend", worker=uuid4()), "s")
    await connection.close()


async def test_a_worker_whose_backend_start_is_masked_lives_as_long_as_its_backend(
    backend: Backend, database: str
) -> None:
    """After SET ROLE, PostgreSQL masks even the start of the session's own backend."""
    await backend.subscribe("s", Catch())
    connection, sign = await asyncpg.connect(database), await asyncpg.connect(database)
    other, pid = uuid4(), sign.get_server_pid()
    await connection.execute(REGISTER, other, pid, None, 0.0)
    await connection.execute("UPDATE pgbackend.offsets SET owner = $1", other)
    async with opened(database) as log:
        claimer = Leases(log, schema="pgbackend", worker=uuid4())
        assert await claim_free(claimer, "s") == []
        await sign.close()

        async def is_free() -> bool:
            return bool(await claim_free(claimer, "s"))

        await eventually("the backend is gone", is_free)
    await connection.close()


@pytest.mark.owner
async def test_no_row_can_make_a_lease_endless(backend: Backend, database: str) -> None:
    connection = await asyncpg.connect(database)
    try:
        for lease_timeout in ("1000000 years", "1 day 1 ms"):
            with pytest.raises(asyncpg.CheckViolationError, match="workers_lease_timeout_bounded"):
                await connection.execute(
                    "INSERT INTO pgbackend.workers (id, name, lease_timeout) VALUES ($1, 'x', $2::text::interval)",
                    uuid4(),
                    lease_timeout,
                )
    finally:
        await connection.close()


async def test_nothing_can_be_claimed_in_another_incarnation(backend: Backend, database: str) -> None:
    await backend.subscribe("s", Catch())
    async with opened(database) as log:
        await log.database.execute("UPDATE pgbackend.incarnation SET id = gen_random_uuid()")
        assert await claim_free(Leases(log, schema="pgbackend", worker=uuid4()), "s") == []


async def test_a_worker_without_shards_notices_another_incarnation(database: str) -> None:
    catch = Catch()
    with Recorder() as recorder:
        async with Backend(database, **SETTINGS) as owner:
            await owner.subscribe("s", Catch())
            await recorder.wait("lease claimed")
            async with Backend(database, **SETTINGS) as idle:
                await idle.subscribe("s", catch)
                await recorder.wait("worker started", count=2)
                # A crash empties the table.
                connection = await asyncpg.connect(database)
                await connection.execute("TRUNCATE pgbackend.incarnation")
                await connection.close()
                await recorder.wait("incarnation changed", count=2)
                await owner.stop()
                await idle.produce(make_event("a"))
                await catch.has("a")


# Taking over.


async def test_another_worker_takes_over_at_once_when_one_stops(database: str) -> None:
    first, second = Catch(), Catch()
    async with Backend(database, **SETTINGS) as one:
        await one.subscribe("s", first)
        await one.produce(make_event("a"))
        await first.has("a")
        async with Backend(database, **{**SETTINGS, "poll_interval": 30.0}) as other:
            await other.subscribe("s", second)
            await one.stop()
            await other.produce(make_event("b"))
            await second.has("b")

    assert (first.ids, second.ids) == (["a"], ["b"])


@pytest.mark.slow
@pytest.mark.direct
async def test_another_worker_takes_over_when_one_is_killed(database: str, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    async with Worker(database, ledger, subscription="s", settings=SETTINGS) as worker:  # noqa: SIM117 - its exit
        async with Backend(database, **SETTINGS) as backend:

            async def is_claimed() -> bool:
                return await owner_of(database) is not None

            await eventually("the process has its shard", is_claimed)
            catch = Catch()
            await backend.subscribe("s", catch)
            worker.kill()
            await backend.produce(make_event("a"))
            # Before the lease could time out, because the backend is gone.
            await catch.has("a")


@pytest.mark.slow
async def test_another_worker_takes_over_from_a_frozen_process_which_then_dispatches_nothing(
    database: str, tmp_path: Path
) -> None:
    import os
    import signal

    ledger = Ledger(tmp_path / "ledger")
    async with (
        Worker(database, ledger, subscription="s", settings={**SETTINGS, "lease_timeout": 1.0}) as worker,
        # A long lease: a pause of this machine must not give the shard back.
        Backend(database, **SETTINGS) as backend,
    ):

        async def is_claimed() -> bool:
            return await owner_of(database) is not None

        await eventually("the process has its shard", is_claimed)
        os.kill(worker.pid, signal.SIGSTOP)
        catch = Catch()
        await backend.subscribe("s", catch)
        await backend.produce(make_event("a"))
        await catch.has("a")
        os.kill(worker.pid, signal.SIGCONT)
        await backend.produce(make_event("b"))
        await catch.has("b")
        await worker.stop()

    assert ledger.handled() == []


async def test_a_dispatcher_that_blocks_the_event_loop_does_not_cost_the_lease(database: str) -> None:
    lease_timeout, blocked = 2.0, 2.7
    second = Catch()
    handled: list[str] = []

    async def block(event: Event) -> None:
        if event.id == "block":
            time.sleep(blocked)  # noqa: ASYNC251 - the point
        handled.append(event.id)

    settings = {**SETTINGS, "lease_timeout": lease_timeout}
    with Recorder() as recorder:
        async with Backend(database, **settings) as one:
            await one.subscribe("s", block)
            await recorder.wait("lease claimed")
            owner = await owner_of(database)
            async with Backend(database, **settings) as other:
                await other.subscribe("s", second)
                await one.produce_many([make_event("block"), make_event("after")])

                async def both() -> bool:
                    return len(handled) == 2

                await eventually("both are handled", both)
                assert await owner_of(database) == owner

    assert handled == ["block", "after"]
    assert second.ids == []
