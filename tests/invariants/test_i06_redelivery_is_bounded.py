"""I6. After a crash, only events in flight, or handled since the last offset commit, are dispatched again."""

from pathlib import Path

import pytest

from pgbackend import Backend
from pgbackend.log.ranges import RangeSet
from tests.support.databases import Sql
from tests.support.events import make_event
from tests.support.ledger import Ledger
from tests.support.polling import eventually
from tests.support.worker import Worker


@pytest.mark.slow
@pytest.mark.parametrize(
    "order", ["none", *(pytest.param(order, marks=pytest.mark.long) for order in ("key", "strict"))]
)
async def test_only_events_that_the_offset_leaves_open_are_dispatched_again_after_a_kill(
    database: str, sql: Sql, tmp_path: Path, order: str
) -> None:
    ledger = Ledger(tmp_path / "ledger")
    producer = Backend(database)
    await producer.init()
    ledger.produced += [str(number) for number in range(3000)]
    await producer.produce_many([make_event(id_, key=f"key {int(id_) % 40}") for id_ in ledger.produced])
    async with Worker(database, ledger, delay=0.002, order=order, concurrency=8) as worker:

        async def is_on_its_way() -> bool:
            position = await sql.fetchval("SELECT position FROM pgbackend.offsets")
            return position > 0 and len(ledger.handled()) > 200

        await eventually("200 events are handled, some of them durably", is_on_its_way, 60)
        worker.kill()
        await worker.process.wait()
    row = await sql.fetchrow("SELECT position, pending::text FROM pgbackend.offsets")
    assert row
    by_first = len(ledger.handled())
    async with Worker(database, ledger, order=order, concurrency=8) as worker:

        async def is_settled() -> bool:
            left = await sql.fetchval("SELECT position FROM pgbackend.offsets WHERE isempty(pending)")
            return bool(left == len(ledger.produced))

        await eventually("everything is settled", is_settled, 60)
        await worker.stop()
    await producer.stop()
    pending = RangeSet.parse(row["pending"])
    again = [handling.position for handling in ledger.handled()[by_first:]]

    assert ledger.lost() == []
    assert all(position > row["position"] or position in pending for position in again)
    assert len(again) == len(set(again))
    # Everything that the offset leaves open is dispatched again, once.
    assert len(again) == len(ledger.produced) - row["position"] + pending.count()


async def test_nothing_is_dispatched_again_after_an_orderly_stop(database: str, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    producer = Backend(database)
    await producer.init()
    ledger.produced += [str(number) for number in range(400)]
    await producer.produce_many([make_event(id_) for id_ in ledger.produced])
    async with Worker(database, ledger, delay=0.005, concurrency=8) as worker:

        async def is_on_its_way() -> bool:
            return len(ledger.handled()) > 50

        await eventually("50 events are handled", is_on_its_way)
        await worker.stop()
    async with Worker(database, ledger) as worker:

        async def is_done() -> bool:
            return not ledger.lost()

        await eventually("everything is handled", is_done)
        await worker.stop()
    await producer.stop()

    assert ledger.doubled() == {}
