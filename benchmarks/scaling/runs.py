"""The six runs of `scale.py`. Each measures one cost at several sizes, and returns a row of figures for each size.

A figure that was measured in several rounds is a list. Rates are events a second, CPU costs are shares of one core,
`rss` is the most memory that a worker of the row has had.
"""

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import asyncpg

from benchmarks.scaling.processes import (
    ATTRIBUTE_BYTES,
    EVENT_BYTES,
    Cost,
    Process,
    fill,
    find_postmaster,
    fresh_log,
    started,
    until,
)
from pgbackend.log.log import Log
from pgbackend.postgres.pool import Database

Row = dict[str, Any]
_BATCH_BYTES = 4 << 20
"""The most bytes that a producer gives to `produce_many()` at once."""
_SETTLED = """
    SELECT count(*) > 0 AND bool_and(position >= (SELECT max(position) FROM pgbackend.events) AND isempty(pending))
    FROM pgbackend.offsets"""
_OWNED = "SELECT count(DISTINCT owner) = $1 AND bool_and(owner IS NOT NULL) FROM pgbackend.offsets"
_TABLES = """
    SELECT sum(pg_total_relation_size(relid))::bigint AS bytes, sum(n_dead_tup)::bigint AS dead
    FROM pg_stat_user_tables
    WHERE schemaname = 'pgbackend' AND relname IN ('offsets', 'workers')"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is measured. Times are in seconds."""

    rounds: int = 3
    backlogs: tuple[int, ...] = (10_000, 100_000, 1_000_000, 10_000_000)
    part: int = 1_000_000
    """Events that are read at the beginning and at the end of a backlog."""
    subscriptions: tuple[int, ...] = (1, 10, 100)
    subscribed: int = 100_000
    """Events that each of them reads."""
    idle: float = 20.0
    event_sizes: tuple[int, ...] = (100, 1 << 10, 10 << 10, 100 << 10, 1 << 20)
    bytes: int = 512 << 20
    """Bytes to produce of each event size, in at most `most` events."""
    most: int = 100_000
    shards: tuple[int, ...] = (1, 4, 16, 64)
    sharded: int = 500_000
    connections: tuple[int, ...] = (1, 100, 500)
    inserting: float = 15.0
    snapshot: float = 600.0
    around: float = 60.0
    """How long it is measured before and after the snapshot."""
    interval: float = 10.0
    rate: float = 500.0
    """Events a second while the snapshot is open."""


QUICK = Sizes(
    rounds=1,
    backlogs=(20_000, 200_000),
    part=20_000,
    subscriptions=(1, 100),
    subscribed=2_000,
    idle=1.0,
    bytes=16 << 20,
    most=5_000,
    event_sizes=(100, 10 << 10, 1 << 20),
    shards=(1, 16),
    sharded=20_000,
    connections=(1, 50),
    inserting=1.0,
    snapshot=4.0,
    around=1.0,
    interval=1.0,
)


class Bench:
    """The server that is measured, and the sizes."""

    def __init__(self, server: str, sizes: Sizes, *, postmaster: int, progress: Callable[[str], None]) -> None:
        self.server = server
        self.sizes = sizes
        self.progress = progress
        self._postmaster = postmaster

    @classmethod
    async def of(cls, server: str, sizes: Sizes, *, progress: Callable[[str], None]) -> "Bench":
        return cls(server, sizes, postmaster=await find_postmaster(server), progress=progress)

    async def cost(self, seconds: float, *workers: Process) -> tuple[float, float]:
        """The CPU time that these workers and the server take meanwhile, as shares of one core."""
        cost = Cost(self._postmaster, list(workers))
        await asyncio.sleep(seconds)
        return cost.shares()

    def costs(self, *workers: Process) -> Cost:
        return Cost(self._postmaster, list(workers))


# 1. Backlog.


async def backlog(bench: Bench) -> list[Row]:
    """How fast one subscription reads logs of different sizes: the beginning, the end, and all of it."""
    sizes = bench.sizes
    rows: list[Row] = [{"events": count, "first": [], "last": [], "whole": [], "rss": 0} for count in sizes.backlogs]
    async with AsyncExitStack() as stack:
        logs = [await stack.enter_async_context(fresh_log(bench.server, f"backlog{n}")) for n in sizes.backlogs]
        for row, dsn in zip(rows, logs, strict=True):
            bench.progress(f"filling a log with {row['events']:,} events")
            await fill(dsn, row["events"])
        # All sizes in each round, so that a busy minute of the machine does not hit one size only.
        for number in range(sizes.rounds):
            bench.progress(f"reading, round {number + 1}")
            for row, dsn in zip(rows, logs, strict=True):
                count = row["events"]
                part = min(count, sizes.part)
                for what, start, wanted in (("first", 0, part), ("last", count - part, part), ("whole", 0, count)):
                    rate, peak = await _read(dsn, wanted, start=start)
                    row[what].append(rate)
                    row["rss"] = max(row["rss"], peak)
    return rows


async def _read(dsn: str, wanted: int, **options: Any) -> tuple[float, int]:
    """Dispatch so many events in a new worker: events a second without the first tenth, and the worker's memory."""
    async with started(dsn, "read", wanted=wanted, **options) as worker:
        await worker.says()
        peak = worker.peak_bytes
        marks = (await worker.report())["marks"]
    await _forget_subscriptions(dsn)
    (first, began), (last, ended) = marks[1], marks[-1]
    return (last - first) / (ended - began), peak


async def _forget_subscriptions(dsn: str) -> None:
    connection = await asyncpg.connect(dsn)
    await connection.execute("DELETE FROM pgbackend.subscriptions")
    await connection.close()


# 2. Subscriptions.


async def subscriptions(bench: Bench) -> list[Row]:
    """How fast one worker dispatches a log to several subscriptions, and what they cost when nothing happens."""
    sizes = bench.sizes
    rows: list[Row] = [{"subscriptions": count, "rate": [], "rss": 0} for count in sizes.subscriptions]
    async with fresh_log(bench.server, "subscriptions") as dsn:
        await fill(dsn, sizes.subscribed)
        for number in range(sizes.rounds):
            bench.progress(f"reading, round {number + 1}")
            for row in rows:
                count = row["subscriptions"]
                rate, peak = await _read(dsn, sizes.subscribed * count, subscriptions=count, start="earliest")
                row["rate"].append(rate)
                row["rss"] = max(row["rss"], peak)
        for row in rows:
            count = row["subscriptions"]
            bench.progress(f"{count} idle subscriptions")
            async with started(dsn, "read", subscriptions=count, start="earliest") as worker:
                await worker.says()
                await _settled(dsn)
                row["idle client"], row["idle server"] = await bench.cost(sizes.idle, worker)
                row["rss"] = max(row["rss"], worker.peak_bytes)
            await _forget_subscriptions(dsn)
    return rows


async def _settled(dsn: str) -> None:
    """Every subscription has handled the whole log, and its offsets say so."""
    connection = await asyncpg.connect(dsn)
    await until(lambda: connection.fetchval(_SETTLED))
    await connection.close()


# 3. Event size.


async def event_size(bench: Bench) -> list[Row]:
    """How fast events of different sizes are produced and read."""
    sizes = bench.sizes
    rows: list[Row] = []
    for size in sizes.event_sizes:
        bench.progress(f"events with {size:,} bytes of data")
        # The largest event that the log takes by default has 1 MiB with its attributes.
        data = min(size, (1 << 20) - 1024)
        batch = max(1, min(1000, _BATCH_BYTES // size))
        count = max(40, min(sizes.most, sizes.bytes // size) // batch * batch)
        singly = min(count, 5000) // 20 * 20
        row: Row = {"bytes": size, "batches": [], "singly": [], "read": [], "rss": 0, "producer rss": 0}
        for _ in range(sizes.rounds):
            async with fresh_log(bench.server, "event_size") as dsn:
                took, peak = await _produce(dsn, "produce_singly", count=singly, size=data, at_once=32)
                row["singly"].append(singly / took)
                row["producer rss"] = max(row["producer rss"], peak)
                took, peak = await _produce(dsn, "produce_batches", count=count, size=data, batch=batch)
                row["batches"].append(count / took)
                row["producer rss"] = max(row["producer rss"], peak)
                # A number of events that divides by twenty, as the worker's marks do.
                rate, peak = await _read(dsn, (singly + count) // 20 * 20, start="earliest")
                row["read"].append(rate)
                row["rss"] = max(row["rss"], peak)
        rows.append(row)
    return rows


async def _produce(dsn: str, role: str, **options: Any) -> tuple[float, int]:
    async with started(dsn, role, **options) as producer:
        took: float = (await producer.says())["seconds"]
        return took, producer.peak_bytes


# 4. Shards.


async def shards(bench: Bench) -> list[Row]:
    """How fast one and two workers dispatch a backlog in key order by the number of shards, and what they cost idle."""
    rows: list[Row] = []
    for count in bench.sizes.shards:
        row: Row = {"shards": count, "rss": 0}
        for workers in (1, 2):
            bench.progress(f"{count} shards, workers: {workers}")
            rates, idle, peak = await _share(bench, count, workers)
            row |= {f"rate {workers}": rates, f"idle client {workers}": idle[0], f"idle server {workers}": idle[1]}
            row["rss"] = max(row["rss"], peak)
        rows.append(row)
    return rows


async def _share(bench: Bench, count: int, number: int) -> tuple[list[float], tuple[float, float], int]:
    """The rates of each round, the idle costs, and the most memory of a worker."""
    sizes = bench.sizes
    async with AsyncExitStack() as stack:
        dsn = await stack.enter_async_context(fresh_log(bench.server, "shards"))
        observer = await asyncpg.connect(dsn)
        stack.push_async_callback(observer.close)
        workers = [
            await stack.enter_async_context(started(dsn, "read", start="earliest", order="key", shards=count))
            for _ in range(number)
        ]
        for worker in workers:
            await worker.says()
        await until(lambda: observer.fetchval(_OWNED, min(count, number)))
        rates = []
        seen = [0] * number
        for _ in range(sizes.rounds):
            await fill(dsn, sizes.sharded, is_vacuumed=False)
            await _settled(dsn)
            reports = [(await worker.report())["marks"] for worker in workers]
            parts = [marks[begin:] for marks, begin in zip(reports, seen, strict=True) if len(marks) > begin]
            seen = [len(marks) for marks in reports]
            handled = sum(marks[-1][0] - marks[0][0] for marks in parts)
            rates.append(handled / (max(marks[-1][1] for marks in parts) - min(marks[0][1] for marks in parts)))
        idle = await bench.cost(sizes.idle, *workers)
        return rates, idle, max(worker.peak_bytes for worker in workers)


# 5. Connections.


async def connections(bench: Bench) -> list[Row]:
    """How fast many connections append in plain SQL while one subscription reads, and what the fence costs then."""
    rows: list[Row] = []
    for count in bench.sizes.connections:
        bench.progress(f"{count} connections")
        rows.append({"connections": count, **await _insert(bench, count)})
    return rows


async def _insert(bench: Bench, count: int) -> Row:
    async with AsyncExitStack() as stack:
        dsn = await stack.enter_async_context(fresh_log(bench.server, "connections"))
        # Plain INSERTs wake nobody: a worker with the usual interval would sleep for up to a second.
        reader = await stack.enter_async_context(started(dsn, "read", is_stamped=True, poll_interval=0.02))
        await reader.says()
        processes = min(count, 4)
        inserters = [
            await stack.enter_async_context(
                started(dsn, "insert", connections=count // processes, size=EVENT_BYTES - ATTRIBUTE_BYTES)
            )
            for _ in range(processes)
        ]
        for inserter in inserters:
            await inserter.says()
        before = [await inserter.report() for inserter in inserters]
        checks = await _check_fence(dsn, bench.sizes.inserting)
        after = [await inserter.report() for inserter in inserters]
        for inserter in inserters:
            await inserter.end()
        await _settled(dsn)
        # Before the report, which takes memory too.
        peak = reader.peak_bytes
        read = await reader.report()
    began, ended = before[-1]["at"], after[0]["at"]
    timely = zip(read["arrivals"], read["latencies"], strict=True)
    latencies = sorted(latency for arrival, latency in timely if began <= arrival <= ended)
    rates = [
        (later["count"] - earlier["count"]) / (later["at"] - earlier["at"])
        for earlier, later in zip(before, after, strict=True)
    ]
    return {
        "appended": sum(rates),
        "read": len(latencies) / (ended - began),
        "p50": _quantile(latencies, 0.5),
        "p99": _quantile(latencies, 0.99),
        "fence": statistics.median(checks),
        "fence p99": _quantile(sorted(checks), 0.99),
        "rss": peak,
    }


async def _check_fence(dsn: str, seconds: float) -> list[float]:
    """Milliseconds that the fence's evidence takes, ten times a second."""
    database = Database(dsn)
    await database.open()
    log = Log(database, schema="pgbackend", hole_wait=1.0)
    took = []
    over = time.monotonic() + seconds
    while (began := time.monotonic()) < over:
        await log.check()
        took.append((time.monotonic() - began) * 1000)
        await asyncio.sleep(0.1)
    await database.close()
    return took


def _quantile(ordered: list[float], share: float) -> float | None:
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)] if ordered else None


# 6. Snapshot.


async def snapshot(bench: Bench) -> list[Row]:
    """The effect of a snapshot that stays open on dispatching at a steady rate: no row version can be vacuumed."""
    sizes = bench.sizes
    async with AsyncExitStack() as stack:
        dsn = await stack.enter_async_context(fresh_log(bench.server, "snapshot"))
        observer, holder = await asyncpg.connect(dsn), await asyncpg.connect(dsn)
        stack.push_async_callback(observer.close)
        stack.push_async_callback(holder.close)
        reader = await stack.enter_async_context(started(dsn, "read", is_stamped=True))
        await reader.says()
        producer = await stack.enter_async_context(
            started(dsn, "produce_at", rate=sizes.rate, size=EVENT_BYTES - ATTRIBUTE_BYTES)
        )
        await producer.says()
        began = time.monotonic()
        samples: list[Row] = []

        async def sample(seconds: float, *, held: bool) -> None:
            over = time.monotonic() + seconds
            while time.monotonic() < over - sizes.interval / 2:
                client, server = await bench.cost(sizes.interval, reader)
                tables = await observer.fetchrow(_TABLES)
                assert tables is not None
                samples.append({"at": time.monotonic(), "held": held, "client": client, "server": server, **tables})

        await sample(sizes.around, held=False)
        bench.progress(f"the snapshot is open for {sizes.snapshot:g} s")
        transaction = holder.transaction(isolation="repeatable_read")
        await transaction.start()
        await holder.fetchval("SELECT count(*) FROM pgbackend.offsets")
        await sample(sizes.snapshot, held=True)
        await transaction.commit()
        await sample(sizes.around, held=False)
        peak = max(reader.peak_bytes, producer.peak_bytes)
        read = await reader.report()
    return _by_interval(samples, began, list(zip(read["arrivals"], read["latencies"], strict=True)), peak)


def _by_interval(samples: list[Row], began: float, read: list[tuple[float, float]], peak: int) -> list[Row]:
    rows = []
    since = began
    for sample in samples:
        upto = sample.pop("at")
        latencies = sorted(latency for arrival, latency in read if since < arrival <= upto)
        figures = {
            "seconds": upto - began,
            "rate": len(latencies) / (upto - since),
            "p50": _quantile(latencies, 0.5),
            "p99": _quantile(latencies, 0.99),
            "rss": peak,
        }
        rows.append({**sample, **figures})
        since = upto
    return rows


RUNS: dict[str, Callable[[Bench], Awaitable[list[Row]]]] = {
    "backlog": backlog,
    "subscriptions": subscriptions,
    "event-size": event_size,
    "shards": shards,
    "connections": connections,
    "snapshot": snapshot,
}
