"""Events wait in the database: a slow or blocked target costs a process its windows of memory, and no more."""

from pathlib import Path

import asyncpg
import pytest

from tests.support.figures import report
from tests.support.ledger import Ledger
from tests.support.polling import eventually
from tests.support.worker import Worker

FILL = """
    INSERT INTO pgbackend.events (id, source, type, datacontenttype, data)
    SELECT $1 || n, 'test', 'test', 'application/json', repeat('x', $3)::bytea FROM generate_series(1, $2) n"""
MIB = 1 << 20


def peak(pid: int) -> int:
    """The most memory that a process had since `forget_peak()`, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc shows no VmHWM")


def forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


async def has_read_all_it_takes(connection: "asyncpg.Connection[asyncpg.Record]", pid: int) -> None:
    """Return once the process has filled its windows, and its memory does not change any more."""
    seen: list[int] = []

    async def is_stable() -> bool:
        seen.append(int(Path(f"/proc/{pid}/statm").read_text().split()[1]))
        return len(seen) > 40 and len(set(seen[-40:])) == 1 and await connection.fetchval(
            "SELECT bool_and(owner IS NOT NULL) FROM pgbackend.offsets"
        )  # fmt: skip

    await eventually("its memory does not change", is_stable, 60, interval=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    "order", ["none", *(pytest.param(order, marks=pytest.mark.long) for order in ("key", "strict"))]
)
async def test_memory_stays_flat_while_100_000_events_wait_behind_a_blocked_dispatcher(
    database: str, tmp_path: Path, order: str
) -> None:
    connection = await asyncpg.connect(database)
    await connection.execute(FILL, "first ", 3000, 500)
    async with Worker(database, Ledger(tmp_path / "ledger"), delay=3600.0, order=order) as worker:
        await has_read_all_it_takes(connection, worker.pid)
        before = peak(worker.pid)
        forget_peak(worker.pid)
        for part in range(10):
            await connection.execute(FILL, f"part {part} ", 10_000, 500)
            await connection.execute("SELECT pg_notify('pgbackend:pgbackend', 'test')")
        await has_read_all_it_takes(connection, worker.pid)
        after = peak(worker.pid)
    await connection.close()

    report(f"order {order}: {before / MIB:.0f} MiB before, {after / MIB:.0f} MiB with 100,000 more events waiting")
    assert after - before < 32 * MIB


@pytest.mark.slow
@pytest.mark.parametrize(
    "delay", [pytest.param(0.0, marks=pytest.mark.long), pytest.param(0.05, marks=pytest.mark.long), 3600.0]
)
async def test_events_of_1_mib_stay_within_the_byte_windows(database: str, tmp_path: Path, delay: float) -> None:
    connection = await asyncpg.connect(database)
    ledger = Ledger(tmp_path / "ledger")
    async with Worker(database, ledger, delay=delay) as worker:
        await has_read_all_it_takes(connection, worker.pid)
        before = peak(worker.pid)
        await connection.execute(FILL, "large ", 200, MIB - 500)
        if delay < 60:

            async def all_handled() -> bool:
                return len(ledger.handled()) == 200

            await eventually("all are handled", all_handled, 60)
        await has_read_all_it_takes(connection, worker.pid)
        after = peak(worker.pid)
    await connection.close()

    report(f"delay {delay} s: {before / MIB:.0f} MiB before, {after / MIB:.0f} MiB at the peak of 200 events of 1 MiB")
    # The window, the page behind it and the page that is being read, 16 MiB each, and the driver's buffers.
    assert after - before < 100 * MIB


@pytest.mark.slow
@pytest.mark.long
async def test_large_events_that_fail_stay_within_the_byte_windows_when_they_are_due_again(
    database: str, tmp_path: Path
) -> None:
    connection = await asyncpg.connect(database)
    await connection.execute(FILL, "large ", 200, MIB - 500)
    await connection.execute("INSERT INTO pgbackend.subscriptions (name, ordering, shards) VALUES ('test', 'none', 1)")
    await connection.execute(
        "INSERT INTO pgbackend.offsets (subscription, shard, shards, position, epoch)"
        " VALUES ('test', 0, 1, 200, nextval('pgbackend.epochs'))"
    )
    async with Worker(database, Ledger(tmp_path / "ledger"), delay=0.01) as worker:
        await has_read_all_it_takes(connection, worker.pid)
        before = peak(worker.pid)
        await connection.execute(
            "INSERT INTO pgbackend.redeliveries (subscription, position, key_hash, attempt, due_at, last_error)"
            " SELECT 'test', position, pgbackend.key_hash(partitionkey, subject, source, id),"
            " 1, now(), 'failed' FROM pgbackend.events"
        )

        async def none_left() -> bool:
            return not await connection.fetchval("SELECT count(*) FROM pgbackend.redeliveries")

        await eventually("all are handled", none_left, 60)
        after = peak(worker.pid)
    await connection.close()

    report(f"{before / MIB:.0f} MiB before, {after / MIB:.0f} MiB at the peak of redelivering 200 events of 1 MiB")
    assert after - before < 100 * MIB
