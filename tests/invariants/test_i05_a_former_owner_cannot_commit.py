"""I5. A shard has one owner. A former owner may finish what it had begun, begins nothing more, and changes no row."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from pgbackend import Backend, facts
from tests.support.backends import worker_of
from tests.support.databases import Sql
from tests.support.dispatchers import Catch
from tests.support.events import make_event
from tests.support.ledger import Ledger
from tests.support.polling import eventually
from tests.support.worker import Worker

ROW = "SELECT owner, epoch, position, pending::text FROM pgbackend.offsets"


@pytest.mark.slow
@pytest.mark.parametrize(
    "order", ["none", *(pytest.param(order, marks=pytest.mark.long) for order in ("key", "strict"))]
)
async def test_a_worker_that_was_frozen_past_its_lease_changes_nothing_afterwards(
    database: str, sql: Sql, tmp_path: Path, order: str
) -> None:
    ledger = Ledger(tmp_path / "ledger")
    options: dict[str, Any] = {"order": order, "concurrency": 4}
    settings: dict[str, object] = {"lease_timeout": 1.0}
    producer = Backend(database)
    await producer.init()
    ids = [str(number) for number in range(200)]

    async def handled_by(pid: int, count: int) -> None:
        async def reached() -> bool:
            return sum(handling.worker == pid for handling in ledger.handled()) >= count

        await eventually(f"{count} events are handled by {pid}", reached, 60)

    async with Worker(database, ledger, settings=settings, delay=0.01, **options) as former:
        await producer.produce_many([make_event(id_, key=id_) for id_ in ids])
        await handled_by(former.pid, 20)
        former.freeze()
        at_freeze = len(ledger.handled())
        former_owner = await sql.fetchval("SELECT owner FROM pgbackend.offsets")
        # A long lease: a busy machine must not give the shard back.
        async with Worker(database, ledger, delay=0.0, **options) as other:

            async def is_settled() -> bool:
                row = await sql.fetchrow(ROW)
                return bool(row and row["position"] >= len(ids) and row["pending"] == "{}")

            await eventually("the other worker has settled everything", is_settled, 60)
            before = await sql.fetchrow(ROW)
            assert before and before["owner"] != former_owner
            thawed_at = await sql.fetchval("SELECT clock_timestamp()")
            former.thaw()

            async def has_renewed() -> bool:
                # Not the first renewal, which lets it go on, but the next one, a third of a lease later.
                return bool(
                    await sql.fetchval(
                        "SELECT heartbeat_at > $2::timestamptz + interval '0.5 s' FROM pgbackend.workers WHERE id = $1",
                        former_owner,
                        thawed_at,
                    )
                )

            await eventually("the former owner is back", has_renewed, 60)
            # It drains, commits what it may, and releases its leases.
            await former.stop()
            after = await sql.fetchrow(ROW)
            by_former = sum(handling.worker == former.pid for handling in ledger.handled()[at_freeze:])
            await producer.produce(make_event("more"))
            await eventually("the other worker goes on", lambda: _has(ledger, "more"))
            assert other.process.returncode is None
    await producer.stop()
    ledger.produced += [*ids, "more"]

    assert after == before
    assert by_former <= (1 if order == "strict" else 4), "it began an event after it had lost its lease"
    assert ledger.lost() == []


async def _has(ledger: Ledger, id_: str) -> bool:
    return any(handling.id == id_ for handling in ledger.handled())


async def test_a_commit_with_an_old_epoch_changes_nothing(database: str, sql: Sql) -> None:
    """Another backend seeks, which gives the shard a new epoch while this worker runs it."""
    catch = Catch()
    gate = asyncio.Event()

    async def wait(event: object) -> None:
        await gate.wait()
        await catch(event)  # type: ignore[arg-type] # an event

    elsewhere = Backend(database)
    await elsewhere.init()
    with facts.Recorder() as recorder:
        async with Backend(database, lease_timeout=60.0) as backend:
            await backend.subscribe("billing", wait, concurrency=1)
            await backend.produce_many([make_event(str(number)) for number in range(3)])
            await recorder.wait("lease claimed")
            before = await sql.fetchrow(ROW)
            await elsewhere.seek("billing", 2)
            moved = await sql.fetchrow(ROW)
            gate.set()
            await catch.has("2")

            async def is_settled() -> bool:
                return bool(await sql.fetchval("SELECT position = 3 FROM pgbackend.offsets"))

            await eventually("everything from the new place on is settled", is_settled)
            last = await sql.fetchrow(ROW)
    await elsewhere.stop()

    assert before and moved and last and moved["position"] == 2
    # It may have been claimed again before this test read the row.
    assert before["epoch"] < moved["epoch"] <= last["epoch"]
    assert [fields["position"] for fields in recorder.all("lease claimed")][-1] == 2


async def test_two_workers_share_the_shards_and_each_shard_has_one_owner(database: str, sql: Sql) -> None:
    catches = [Catch(), Catch()]
    async with Backend(database) as one, Backend(database) as two:
        for backend, catch in zip((one, two), catches, strict=True):
            await backend.subscribe("billing", catch, shards=4, start="earliest")
        ids = [str(number) for number in range(200)]
        await one.produce_many([make_event(id_) for id_ in ids])

        async def all_handled() -> bool:
            return len(catches[0].ids) + len(catches[1].ids) >= len(ids)

        await eventually("all events are handled", all_handled)
        # A shard that is handed over has no owner for a moment.
        owned = "SELECT count(*) = 4 FROM pgbackend.offsets WHERE owner IS NOT NULL"
        await eventually("each shard has an owner", lambda: sql.fetchval(owned))

    assert sorted(catches[0].ids + catches[1].ids) == sorted(ids)


@pytest.mark.slow
@pytest.mark.direct
async def test_an_idle_worker_notices_a_new_incarnation_and_takes_over(database: str, sql: Sql, tmp_path: Path) -> None:
    """It commits and reads nothing that would tell it of the server's crash."""
    ledger = Ledger(tmp_path / "ledger")
    with facts.Recorder() as recorder:
        settings: dict[str, object] = {"lease_timeout": 90.0}
        async with (
            Worker(database, ledger, subscription="billing", settings=settings) as owner,
            Backend(database) as standby,
        ):

            async def is_owned() -> bool:
                return bool(await sql.fetchval("SELECT count(owner) FROM pgbackend.offsets"))

            await eventually("the first worker has the shard", is_owned)
            catch = Catch()
            await standby.subscribe("billing", catch)
            # Before that it would enter the new incarnation as its first.
            await recorder.wait("worker started")
            # A crash empties this unlogged table; a real one would end the server of the other tests.
            await sql.execute("UPDATE pgbackend.incarnation SET id = gen_random_uuid()")
            await recorder.wait("incarnation changed")
            owner.kill()
            await standby.produce(make_event("after"))
            await catch.has("after")


@pytest.mark.direct
async def test_a_worker_that_loses_its_connection_renews_at_once_and_goes_on(database: str, sql: Sql) -> None:
    catch = Catch()
    with facts.Recorder() as recorder:
        async with Backend(database, lease_timeout=60.0) as backend:
            await backend.subscribe("billing", catch)
            await recorder.wait("lease claimed")
            worker = worker_of(backend)
            await sql.execute("SELECT pg_terminate_backend(backend_pid) FROM pgbackend.workers")
            await recorder.wait("presence lost")
            # The next renewal would be in 20 s.
            await backend.produce(make_event("after"))
            await catch.has("after")
            assert worker.pumps.tenure.valid_until > 0


@pytest.mark.slow
async def test_a_dispatcher_that_blocks_the_event_loop_does_not_cost_the_lease(
    database: str, sql: Sql, tmp_path: Path
) -> None:
    ledger = Ledger(tmp_path / "ledger")

    async def block(_: object) -> None:
        # Longer than the lease. Nothing else runs in this loop meanwhile.
        time.sleep(4.0)  # noqa: ASYNC251 - what a user may do

    async with Backend(database, lease_timeout=3.0) as backend:
        await backend.subscribe("billing", block, concurrency=1)

        async def is_claimed() -> bool:
            return bool(await sql.fetchval("SELECT owner IS NOT NULL FROM pgbackend.offsets"))

        await eventually("the shard is claimed", is_claimed)
        before = await sql.fetchrow("SELECT owner, epoch FROM pgbackend.offsets")
        async with Worker(database, ledger, subscription="billing"):
            await backend.produce(make_event("slow"))

            async def is_settled() -> bool:
                return bool(await sql.fetchval("SELECT position = 1 AND isempty(pending) FROM pgbackend.offsets"))

            await eventually("the event is settled", is_settled)
            after = await sql.fetchrow("SELECT owner, epoch FROM pgbackend.offsets")

    assert after == before
    assert ledger.handled() == []
