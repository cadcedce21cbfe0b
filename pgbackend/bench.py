"""How fast pgbackend is, as ratios to what bare asyncpg does with the same rows in the same run.

It produces and subscribes through the public API, in a scratch schema that is dropped afterwards. Each measurement runs
both sides in turn, in several rounds with alternating order, and takes the median of the rounds' ratios: a slow
machine, or a slow moment, is slow for both sides. Events have 500 bytes, and commits are as durable as the server is
set. While events are produced, a second process has a subscription to the same log.
"""

import argparse
import asyncio
import gc
import os
import platform
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from cloudevents.core.v1.event import CloudEvent

from pgbackend.backend import Backend
from pgbackend.codec.attributes import COLUMNS, Row
from pgbackend.codec.event import Event
from pgbackend.codec.sdk import encode
from pgbackend.errors import PgBackendError
from pgbackend.postgres.connections import Connection
from pgbackend.postgres.pool import Database

EVENT_BYTES = 500
PAGE = 1_000
PRODUCERS = 32
IDLE = 0.02
"""Seconds without an event before each one whose latency is measured."""
SAMPLES = 40
"""Latencies measured in a round."""
PATIENCE = 300.0
"""Seconds after which a measurement that has not ended fails."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One comparison: medians over the rounds, and the limit that we promise for their ratio."""

    name: str
    against: str
    unit: Literal["events/s", "ms"]
    ours: float
    bare: float
    limit: float
    """The least good ratio of rates, the greatest good ratio of latencies."""
    ratio: float
    """Ours divided by bare: the median of the rounds' ratios."""

    @property
    def ok(self) -> bool:
        """Whether the ratio is within its limit."""
        return self.ratio >= self.limit if self.unit == "events/s" else self.ratio <= self.limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All measurements of a run, and where it ran."""

    machine: dict[str, str]
    measurements: tuple[Measurement, ...]


Figure = Callable[[], Awaitable[float]]
"""One round of one side: events a second, or milliseconds."""


async def run(
    dsn: str | None = None, *, events: int = 50_000, rounds: int = 5, progress: Callable[[str], None] = lambda _: None
) -> Report:
    """All measurements, on the database of `dsn`, or on an embedded server that is deleted afterwards."""
    if dsn is not None:
        return await _run(dsn, events, rounds, progress)
    # Here, because its package is an extra.
    from pgbackend.embedded.server import EmbeddedServer  # noqa: PLC0415

    with tempfile.TemporaryDirectory(prefix="pgbackend-bench-", ignore_cleanup_errors=True) as directory:
        server = EmbeddedServer(Path(directory))
        try:
            return await _run(await server.start(), events, rounds, progress)
        finally:
            await server.stop()


async def _run(dsn: str, events: int, rounds: int, progress: Callable[[str], None]) -> Report:
    events = max(PAGE, events - events % PAGE)
    schema = f"pgbackend_bench_{uuid.uuid4().hex[:8]}"
    backend = Backend(dsn, schema=schema)
    try:
        await backend.init()
        async with _connections(dsn, 1) as (connection,):
            try:
                bench = _Bench(dsn, schema, backend, connection, events=events, rounds=rounds, progress=progress)
                await bench.fill()
                read = await bench.reading()
                produced = await bench.producing()
                latencies = await bench.latencies()
                machine = await bench.machine()
            finally:
                await backend.stop()
                progress("dropping the scratch schema")
                await connection.execute(f'drop schema if exists "{schema}" cascade')
    finally:
        await backend.stop()
    return Report(machine=machine, measurements=(*produced, *read, *latencies))


class _Bench:
    """The measurements, on one scratch log."""

    def __init__(
        self,
        dsn: str,
        schema: str,
        backend: Backend,
        connection: Connection,
        *,
        events: int,
        rounds: int,
        progress: Callable[[str], None],
    ) -> None:
        self._dsn = dsn
        self._schema = schema
        self._backend = backend
        self._connection = connection
        self._rounds = rounds
        self._progress = progress
        self._events = [_event(n) for n in range(events)]
        # Bare asyncpg gets rows that are ready to send.
        self._rows: list[Row] = [encode(event, max_event_bytes=1 << 20)[0] for event in self._events]
        columns = ", ".join(COLUMNS)
        values = ", ".join(f"${n}" for n in range(1, len(COLUMNS) + 1))
        self._insert = f'insert into "{schema}".events ({columns}) values ({values})'  # noqa: S608 - our own names
        self._page = (
            f"select {columns}, position, recorded_at "  # noqa: S608 - our own names
            f'from "{schema}".events where position > $1 order by position limit {PAGE}'
        )

    async def fill(self) -> None:
        """The log holds `events` events for the reading measurements."""
        self._progress("filling a log to read from")
        for n in range(0, len(self._events), PAGE):
            await self._backend.produce_many(self._events[n : n + PAGE])
        await self._connection.execute(f'vacuum analyze "{self._schema}".events')

    async def reading(self) -> list[Measurement]:
        """Made before anything else is produced, because these subscriptions read the whole log."""
        return [
            await self._compare(
                f"{_subscriptions(count)}: read, decode, dispatch",
                f"pages of {PAGE:,} rows",
                "events/s",
                limit,
                lambda count=count: self._dispatch(count),  # type: ignore[misc] # binds the loop's value
                self._fetch_pages,
            )
            for count, limit in ((1, 0.4), (4, 0.8))
        ]

    async def producing(self) -> list[Measurement]:
        singly = len(self._events) // 50
        async with _other("listen", self._dsn, self._schema), _connections(self._dsn, PRODUCERS) as connections:
            return [
                await self._compare(
                    "produce(), one at a time",
                    "single INSERTs",
                    "events/s",
                    0.8,
                    lambda: self._produce(singly, producers=1),
                    lambda: self._insert_rows(singly, connections[:1]),
                ),
                await self._compare(
                    f"produce(), {PRODUCERS} at a time",
                    f"INSERTs on {PRODUCERS} connections",
                    "events/s",
                    3.0,
                    lambda: self._produce(len(self._events), producers=PRODUCERS),
                    lambda: self._insert_rows(len(self._events), connections),
                ),
                await self._compare(
                    f"produce_many() of {PAGE:,}",
                    f"COPY of {PAGE:,} rows",
                    "events/s",
                    0.5,
                    self._produce_many,
                    self._copy,
                ),
            ]

    async def latencies(self) -> list[Measurement]:
        async with _other("listen", self._dsn, self._schema), self._subscribed() as (backend, latencies):
            within = await self._compare(
                "produce to dispatch, same process",
                "one INSERT",
                "ms",
                4.0,
                lambda: self._latency(latencies, lambda: backend.produce(_event(0, stamp=time.monotonic_ns()))),
                self._commit_latency,
            )
        async with (
            self._subscribed(poll_interval=60.0) as (_, latencies),
            _other("produce", self._dsn, self._schema) as other,
        ):

            async def produce() -> None:
                assert other.stdin  # noqa: S101 - it is a pipe
                other.stdin.write(b"\n")
                await other.stdin.drain()

            between = await self._compare(
                "produce to dispatch, other process",
                "one INSERT",
                "ms",
                8.0,
                lambda: self._latency(latencies, produce),
                self._commit_latency,
            )
        return [within, between]

    async def _compare(
        self, name: str, against: str, unit: Literal["events/s", "ms"], limit: float, ours: Figure, bare: Figure
    ) -> Measurement:
        self._progress(name)
        figures: dict[Figure, list[float]] = {ours: [], bare: []}
        async with asyncio.timeout(PATIENCE):
            for side in (bare, ours):  # once to warm up
                await side()
            for round_ in range(self._rounds):
                # Each side goes first every other round, so that neither profits from what the other leaves behind.
                for side in (ours, bare) if round_ % 2 else (bare, ours):
                    # Both sides begin with no garbage, because a collection costs the side that runs at the time.
                    gc.collect()
                    figures[side].append(await side())
        return Measurement(
            name=name,
            against=against,
            unit=unit,
            ours=statistics.median(figures[ours]),
            bare=statistics.median(figures[bare]),
            limit=limit,
            ratio=statistics.median(a / b for a, b in zip(figures[ours], figures[bare], strict=True)),
        )

    async def _produce(self, count: int, *, producers: int) -> float:
        events = iter(self._events[:count])

        async def produce() -> None:
            for event in events:
                await self._backend.produce(event)

        return await _rate(count, *(produce() for _ in range(producers)))

    async def _insert_rows(self, count: int, connections: list[Connection]) -> float:
        rows = iter(self._rows[:count])

        async def insert(connection: Connection) -> None:
            for row in rows:
                await connection.execute(self._insert, *row)

        return await _rate(count, *(insert(connection) for connection in connections))

    async def _produce_many(self) -> float:
        async def produce() -> None:
            for n in range(0, len(self._events), PAGE):
                await self._backend.produce_many(self._events[n : n + PAGE])

        return await _rate(len(self._events), produce())

    async def _copy(self) -> float:
        async def copy() -> None:
            for n in range(0, len(self._rows), PAGE):
                await self._connection.copy_records_to_table(
                    "events", schema_name=self._schema, columns=COLUMNS, records=self._rows[n : n + PAGE]
                )

        return await _rate(len(self._rows), copy())

    async def _dispatch(self, subscriptions: int) -> float:
        """Events a second over all subscriptions, without the first tenth, which has the start-up in it."""
        wanted = len(self._events) * subscriptions
        warm = wanted // 10
        handled = 0
        begun = took = 0.0
        done = asyncio.Event()

        async def handle(event: Event) -> None:
            nonlocal handled, begun, took
            _ = event.id, event.type, event.data_bytes
            handled += 1
            if handled == warm:
                begun = time.perf_counter()
            elif handled == wanted:
                took = time.perf_counter() - begun
                done.set()

        backend = Backend(self._dsn, schema=self._schema)
        names = [f"reader {n}" for n in range(subscriptions)]
        await backend.init(migrate=False)
        try:
            for name in names:
                await backend.subscribe(name, handle, start="earliest")
            async with _started(backend):
                await done.wait()
        finally:
            await backend.stop()
        for name in names:
            await self._backend.delete_subscription(name)
        return (wanted - warm) / took

    async def _fetch_pages(self) -> float:
        async def fetch() -> None:
            position = 0
            while rows := await self._connection.fetch(self._page, position):
                position = rows[-1]["position"]

        return await _rate(len(self._events), fetch())

    @asynccontextmanager
    async def _subscribed(self, *, poll_interval: float = 1.0) -> AsyncIterator[tuple[Backend, "asyncio.Queue[float]"]]:
        """A running backend, and the milliseconds between each event's stamp and its dispatch."""
        latencies: asyncio.Queue[float] = asyncio.Queue()

        async def handle(event: Event) -> None:
            # Events of the bare INSERTs have no stamp.
            if stamp := _stamp(event):
                latencies.put_nowait((time.monotonic_ns() - stamp) / 1e6)

        async with Backend(self._dsn, schema=self._schema, poll_interval=poll_interval) as backend:
            await backend.subscribe("latency", handle)
            yield backend, latencies
            await backend.delete_subscription("latency")

    @staticmethod
    async def _latency(latencies: "asyncio.Queue[float]", produce: Callable[[], Awaitable[None]]) -> float:
        samples = []
        for _ in range(SAMPLES):
            await asyncio.sleep(IDLE)
            await produce()
            samples.append(await latencies.get())
        return statistics.median(samples)

    async def _commit_latency(self) -> float:
        samples = []
        for _ in range(SAMPLES):
            await asyncio.sleep(IDLE)
            begun = time.monotonic_ns()
            await self._connection.execute(self._insert, *self._rows[0])
            samples.append((time.monotonic_ns() - begun) / 1e6)
        return statistics.median(samples)

    async def machine(self) -> dict[str, str]:
        """The machine that the figures are from."""
        settings = {
            name: await self._connection.fetchval("select current_setting($1)", name)
            for name in ("server_version", "fsync", "synchronous_commit")
        }
        return {
            "processor": f"{os.cpu_count()} × {_processor()}",
            "system": f"{platform.system()} {platform.release()}",
            "python": f"{platform.python_version()}, {type(asyncio.get_running_loop()).__module__.partition('.')[0]}",
            "postgresql": "{server_version}, fsync {fsync}, synchronous_commit {synchronous_commit}".format(**settings),
            "events": f"{len(self._events):,} of {EVENT_BYTES} bytes, {self._rounds} rounds",
        }


async def _rate(count: int, *work: Awaitable[None]) -> float:
    begun = time.perf_counter()
    await asyncio.gather(*work)
    return count / (time.perf_counter() - begun)


def _subscriptions(count: int) -> str:
    return "one subscription" if count == 1 else f"{('two', 'three', 'four')[count - 2]} subscriptions"


def _event(n: int, *, stamp: int = 0) -> CloudEvent:
    """A valid event whose attributes and data are `EVENT_BYTES` together; `stamp` leads its data."""
    attributes = {
        "id": f"00000000-0000-4000-8000-{n:012}",
        "source": "/pgbackend/bench",
        "type": "com.example.order.created",
        "subject": f"order-{n:08}",
        "datacontenttype": "application/json",
        "time": datetime(2025, 1, 1, tzinfo=UTC),
    }
    head = f'{{"stamp": {stamp:020d}, "padding": "'
    used = sum(len(str(value)) for value in attributes.values()) + len(head) + 2
    return CloudEvent(attributes=attributes, data=f'{head}{"x" * (EVENT_BYTES - used)}"}}'.encode())


def _stamp(event: Event) -> int:
    data = event.data_bytes or b""
    return int(data[10:30])


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine()


@asynccontextmanager
async def _connections(dsn: str, count: int) -> AsyncIterator[list[Connection]]:
    # Bare asyncpg, set up for a pooler where there is one.
    database = Database(dsn)
    connections = [await database.connect() for _ in range(count)]
    try:
        yield connections
    finally:
        for connection in connections:
            await connection.close()


@asynccontextmanager
async def _started(backend: Backend) -> AsyncIterator[None]:
    running = asyncio.create_task(backend.start(), name="bench backend")
    try:
        yield
    finally:
        await backend.stop()
        await running


@asynccontextmanager
async def _other(role: str, dsn: str, schema: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Another process in this role, until its standard input closes."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "pgbackend.bench",
        role,
        schema,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PGBACKEND_DSN": dsn},  # not an argument: every user can read those
    )
    assert process.stdin  # noqa: S101 - they are pipes
    assert process.stdout  # noqa: S101
    try:
        if await process.stdout.readline() != b"ready\n":
            raise PgBackendError(f"The process that should {role} did not start. Run `pgbackend bench` again.")
        yield process
    finally:
        process.stdin.close()
        try:
            async with asyncio.timeout(30):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


async def _run_role(role: str, dsn: str, schema: str) -> None:
    """The other process."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    if role == "listen":

        async def handle(event: Event) -> None:
            _ = event.id, event.type, event.data_bytes

        async with Backend(dsn, schema=schema) as backend:
            await backend.subscribe("listener", handle)
            print("ready", flush=True)  # noqa: T201 - the answer the parent waits for
            await reader.read()
            await backend.delete_subscription("listener")
    else:
        backend = Backend(dsn, schema=schema)
        await backend.init(migrate=False)
        try:
            print("ready", flush=True)  # noqa: T201 - the answer the parent waits for
            while await reader.readline():
                await backend.produce(_event(0, stamp=time.monotonic_ns()))
        finally:
            await backend.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=("listen", "produce"))
    parser.add_argument("schema")
    arguments = parser.parse_args()
    asyncio.run(_run_role(arguments.role, os.environ["PGBACKEND_DSN"], arguments.schema))
