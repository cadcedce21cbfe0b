"""The effects of retention on disk and producers: steady load, four subscriptions, one of which stops halfway.

    python benchmarks/retention.py --minutes 60 --csv hour.csv
    python benchmarks/retention.py --minutes 3 --keep 20 --max-age 40     # the same, scaled down
    python benchmarks/retention.py --minutes 40 --snapshot 30 --csv snapshot.csv
    python benchmarks/retention.py --plot docs/retention/hour.svg --csv hour.csv

A process produces `--rate` events a second of about 500 bytes; another one runs the subscriptions. With `--snapshot` no
subscription stops, and a stranger holds a snapshot open for so many minutes, in the middle. Each second a line says how
large the log is on disk, how many dispatches a second there were, and how many dead rows its tables have. At the end:
how these were in each part of the run, what each subscription lost, failed produces, and the latency of `produce()`
within a quarter second of segment work and at all other times. Machines are noisy: compare figures of one run.

`--plot` measures nothing: it draws the file that `--csv` names. It needs the extra `bench`.
"""

import argparse
import asyncio
import csv
import ctypes
import multiprocessing
import statistics
import sys
import tempfile
import time
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
from cloudevents.core.v1.event import CloudEvent

from pgbackend import Backend, Event
from pgbackend.embedded.server import EmbeddedServer
from pgbackend.errors import PgBackendError
from pgbackend.facts import observe

NAMES = ("one", "two", "three", "four")
STOPPED = NAMES[-1]
WORK = {"segment cut": "cut", "segment dropped": "drop", "emptied segments removed": "remove", "segment made": "make"}
NEAR = 0.25
"""Seconds around segment work in which a produce counts as near it. The fact comes at its end."""
PRODUCERS = 32
SETTLED = "after that"
"""The part of the run in which the disk should be flat again."""
SAMPLE = """
    SELECT
        found.bytes::bigint AS bytes,
        found.segments,
        sum(n_dead_tup)::bigint AS dead_rows,
        sum(pg_total_relation_size(relid)) FILTER (WHERE relname IN ('offsets', 'workers'))::bigint AS other_bytes
    FROM pg_stat_user_tables
    CROSS JOIN (
        SELECT sum(pg_total_relation_size(to_regclass(segment))) AS bytes, count(*) AS segments
        FROM pgbackend.segments_of('pgbackend.events')
    ) AS found
    WHERE schemaname = 'pgbackend'
    GROUP BY found.bytes, found.segments"""


@dataclass(frozen=True, slots=True)
class Sample:
    """The log at one moment. What `--csv` writes."""

    seconds: float
    bytes: int
    """On disk, of all segments."""
    segments: int
    dispatched: int
    """A second, since the sample before; by all subscriptions together."""
    dead_rows: int
    """The dead rows of all tables of the log, as PostgreSQL counts them."""
    other_bytes: int
    """On disk, of `offsets` and `workers`."""
    phase: str


async def consume(dsn: str, seconds: float, work: Any, dispatched: Any, *, halts: bool) -> None:
    """Run the subscriptions; `STOPPED` only for half of the time if it `halts`.

    `work` gets the time and kind of segment work, `dispatched` counts.
    """

    def note(name: str, _: Mapping[str, object]) -> None:
        if name in WORK:
            work.put((time.time(), WORK[name]))

    async def handle(_: Event) -> None:
        dispatched.value += 1

    with observe(note):
        async with Backend(dsn) as backend:
            for name in NAMES:
                await backend.subscribe(name, handle, start="earliest")
            await asyncio.sleep(seconds / 2)
            if halts:
                await backend.unsubscribe(STOPPED)
            await asyncio.sleep(seconds / 2)


def run_consumer(dsn: str, seconds: float, work: Any, dispatched: Any, *, halts: bool) -> None:
    asyncio.run(consume(dsn, seconds, work, dispatched, halts=halts))


async def produce(backend: Backend, rate: float, until: float, latencies: list[tuple[float, float]]) -> int:
    """One producer at this rate until then, in wall time. Returns how many produces failed."""
    attributes = {"type": "order.created", "source": "/shop", "datacontenttype": "application/octet-stream"}
    failed, count, began, data = 0, 0, time.time(), b"x" * 420
    while (now := time.time()) < until:
        due = began + count / rate
        if due > now:
            await asyncio.sleep(due - now)
        count += 1
        start = time.time()
        try:
            await backend.produce(CloudEvent(dict(attributes), data))
        except PgBackendError as error:
            failed += 1
            print(f"failed: {error}", file=sys.stderr)
        latencies.append((start, time.time() - start))
    return failed


async def hold_snapshot(dsn: str, after: float, seconds: float, phase: list[str]) -> None:
    """A transaction with a snapshot is open for so long, from so many seconds on."""
    connection = await asyncpg.connect(dsn)
    await asyncio.sleep(after)
    async with connection.transaction(isolation="repeatable_read"):
        await connection.fetchval("SELECT count(*) FROM pg_class")
        phase[0] = "while the snapshot is open"
        await asyncio.sleep(seconds)
    phase[0] = "after it"
    await connection.close()


async def note_halt(after: float, max_age: float, phase: list[str]) -> None:
    await asyncio.sleep(after)
    phase[0] = f"to max_age after {STOPPED!r} stopped"
    await asyncio.sleep(max_age * 1.2)
    phase[0] = SETTLED


async def sample(dsn: str, until: float, phase: list[str], dispatched: Any) -> list[Sample]:
    """The log, each second."""
    connection = await asyncpg.connect(dsn)
    began = last = time.time()
    samples, count = [], 0
    while time.time() < until:
        await asyncio.sleep(1)
        row = await connection.fetchrow(SAMPLE)
        assert row is not None
        now, counted = time.time(), dispatched.value
        rate = round((counted - count) / (now - last))
        last, count = now, counted
        samples.append(
            Sample(now - began, row["bytes"], row["segments"], rate, row["dead_rows"], row["other_bytes"], phase[0])
        )
        print(
            f"{now - began:7.0f} s {row['bytes'] / 1e6:9.1f} MB {row['segments']:4} segments {rate:6} dispatched/s "
            f"{row['dead_rows']:7} dead rows {row['other_bytes'] / 1e3:7.0f} kB of offsets and workers",
            flush=True,
        )  # fmt: skip
    await connection.close()
    return samples


def percentiles(latencies: list[float]) -> str:
    if len(latencies) < 100:
        return f"{len(latencies)} produces"
    cuts = statistics.quantiles(latencies, n=1000)
    return (
        f"{len(latencies):8} produces: p50 {cuts[499] * 1e3:6.2f} ms, p99 {cuts[989] * 1e3:6.2f} ms, "
        f"p99.9 {cuts[998] * 1e3:6.2f} ms, max {max(latencies) * 1e3:7.1f} ms"
    )


async def measure(dsn: str, options: argparse.Namespace) -> list[Sample]:
    seconds, snapshot = options.minutes * 60, options.snapshot * 60
    async with Backend(dsn) as setup:
        await setup.set_retention(
            keep=timedelta(seconds=options.keep), max_age=timedelta(seconds=options.max_age), max_bytes=None
        )
    context = multiprocessing.get_context("spawn")
    work, dispatched = context.Queue(), context.Value(ctypes.c_uint64, lock=False)
    consumer = context.Process(
        target=run_consumer, args=(dsn, seconds, work, dispatched), kwargs={"halts": not snapshot}
    )
    consumer.start()
    latencies: list[tuple[float, float]] = []
    until = time.time() + seconds
    phase = ["before"]
    producer = Backend(dsn)
    await producer.init()
    async with asyncio.TaskGroup() as tasks:
        sampling = tasks.create_task(sample(dsn, until, phase, dispatched))
        if snapshot:
            tasks.create_task(hold_snapshot(dsn, (seconds - snapshot) / 2, snapshot, phase))
        else:
            tasks.create_task(note_halt(seconds / 2, options.max_age, phase))
        producing = [
            tasks.create_task(produce(producer, options.rate / PRODUCERS, until, latencies)) for _ in range(PRODUCERS)
        ]
    samples, failed = sampling.result(), sum(task.result() for task in producing)
    status = await producer.status()
    await producer.stop()
    done: list[tuple[float, str]] = []
    while not work.empty():
        done.append(work.get())
    consumer.join()

    print(f"\n{len(latencies) / seconds:.0f} events a second, {failed} failed produces")
    report_phases([one for one in samples if one.seconds > options.keep * 1.2 or one.phase != "before"])
    for one in status.subscriptions:
        print(f"{one.name:10} lag {one.lag:9}  skipped {one.skipped:9}  state {one.state}")
    for kind in sorted(set(WORK.values())):
        print(f"{kind:8} {sum(1 for _, other in done if other == kind)} times")
    report_latencies(latencies, done)
    return samples


def report_phases(samples: list[Sample]) -> None:
    for phase in dict.fromkeys(one.phase for one in samples):
        found = [one for one in samples if one.phase == phase]
        megabytes = [one.bytes / 1e6 for one in found]
        print(
            f"{phase}: disk {min(megabytes):.1f} to {max(megabytes):.1f} MB, "
            f"median of {statistics.median(one.dispatched for one in found):,.0f} dispatches a second, "
            f"up to {max(one.dead_rows for one in found):,} dead rows, "
            f"offsets and workers up to {max(one.other_bytes for one in found) / 1e3:,.0f} kB"
        )


def report_latencies(latencies: list[tuple[float, float]], done: list[tuple[float, str]]) -> None:
    """Those near each kind of segment work, near any, and all others."""

    def near(moments: list[float]) -> set[int]:
        moments = sorted(moments)
        found = set()
        for number, (at, _) in enumerate(latencies):
            index = bisect_left(moments, at)
            if any(abs(other - at) <= NEAR for other in moments[max(0, index - 1) : index + 1]):
                found.add(number)
        return found

    every: set[int] = set()
    for kind in WORK.values():
        found = near([at for at, other in done if other == kind])
        every |= found
        print(f"near {kind:20}", percentiles([latencies[number][1] for number in found]))
    print("near any of them        ", percentiles([latencies[number][1] for number in every]))
    print("at all other times      ", percentiles([took for n, (_, took) in enumerate(latencies) if n not in every]))


async def main(options: argparse.Namespace) -> None:
    if options.plot:
        draw(options.csv, options.plot)
        return
    if options.dsn:
        samples = await measure(options.dsn, options)
    else:
        with tempfile.TemporaryDirectory() as directory:
            async with EmbeddedServer(Path(directory) / "data") as server:
                samples = await measure(server.dsn, options)
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(field.name for field in fields(Sample))
            writer.writerows(map(astuple, samples))


def draw(source: Path, file: Path) -> None:
    """Draw the disk, and the dispatches or the dead rows, over the time."""
    import matplotlib as mpl  # noqa: PLC0415 - comes with an extra
    from matplotlib.figure import Figure  # noqa: PLC0415 - as above

    with source.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    minutes = [float(row["seconds"]) / 60 for row in rows]
    changes = [
        at
        for at, row, before in zip(minutes[1:], rows[1:], rows, strict=False)
        if row["phase"] not in (before["phase"], SETTLED)
    ]
    # Some 300 points for each line: a file that is small, and no less to see.
    step = max(1, len(rows) // 300)
    mpl.rcParams.update({"svg.hashsalt": "retention", "svg.fonttype": "none", "font.size": 9})
    canvas = Figure(figsize=(8.4, 6.4))
    panels: dict[str, list[float]] = {
        "the log on disk, MB": [int(row["bytes"]) / 1e6 for row in rows],
        "dispatches a second, all subscriptions": [int(row["dispatched"]) for row in rows],
        "dead rows in all tables of the log": [int(row["dead_rows"]) for row in rows],
    }
    for number, (title, values) in enumerate(panels.items()):
        axes = canvas.add_subplot(len(panels), 1, number + 1)
        means = [statistics.fmean(values[start : start + step]) for start in range(0, len(values), step)]
        axes.plot(minutes[::step], means, linewidth=1)
        for at in changes:
            axes.axvline(at, linestyle="--", color="grey", linewidth=1)
        axes.set_ylim(bottom=0)
        axes.set_title(title)
        axes.grid(visible=True, alpha=0.3)
    axes.set_xlabel("minutes")
    canvas.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(file, format="svg", metadata={"Date": None})


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=2000.0, help="events a second")
    parser.add_argument("--keep", type=float, default=600.0, help="seconds")
    parser.add_argument("--max-age", type=float, default=1200.0, help="seconds")
    parser.add_argument("--snapshot", type=float, default=0.0, help="minutes")
    parser.add_argument("--dsn", help="an empty log on a server that runs; without it, an embedded one")
    parser.add_argument("--csv", type=Path, help="a file for what is measured each second")
    parser.add_argument("--plot", type=Path, help="an SVG file to draw the --csv into")
    given = parser.parse_args()
    if given.plot and not given.csv:
        parser.error("--plot draws the file that --csv names")
    return given


if __name__ == "__main__":
    asyncio.run(main(options()))
