"""How long an event takes from `produce()` to its dispatcher, at several rates, in one process and in two.

    python benchmarks/latency.py
    python benchmarks/latency.py --rates 100,1000 --seconds 10 --dsn postgresql://me@host/db

Bare LISTEN/NOTIFY is measured beside it, in turns: one process inserts rows with pg_notify() in the same transaction,
another one listens and reads the new rows. Producers keep to the rate, one event after the other, as far as they can.
Machines are noisy: compare the ratios.
"""

import argparse
import asyncio
import os
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import asyncpg
from cloudevents.core.v1.event import CloudEvent

from pgbackend import Backend, Event
from pgbackend.embedded.server import EmbeddedServer
from pgbackend.errors import PgBackendError

DATA_BYTES = 420
"""With its attributes, an event has about 500 bytes."""
WANTED_RATIO = 1.5
WARM_UP = 0.5
"""Seconds at the beginning of each measurement that do not count."""
_INSERT = """
    WITH stored AS (INSERT INTO bare (data) VALUES ($1) RETURNING id)
    SELECT pg_notify('bare', '') FROM stored"""

Produce = Callable[[bytes], Awaitable[object]]
Handle = Callable[[bytes], None]


# The two systems.


@asynccontextmanager
async def pgbackend_producer(dsn: str) -> AsyncIterator[Produce]:
    attributes = {"type": "order.created", "source": "/shop", "datacontenttype": "application/octet-stream"}
    async with Backend(dsn) as backend:
        yield lambda data: backend.produce(CloudEvent(dict(attributes), data))


@asynccontextmanager
async def pgbackend_consumer(dsn: str, handle: Handle) -> AsyncIterator[None]:
    async def dispatch(event: Event) -> None:
        handle(event.data_bytes or b"")

    async with Backend(dsn) as backend:
        await backend.subscribe("latency", dispatch)
        while (await backend.status()).subscriptions[0].state != "running":  # noqa: ASYNC110 - it can only be polled
            await asyncio.sleep(0.05)
        yield
        await backend.delete_subscription("latency")


@asynccontextmanager
async def bare_producer(dsn: str) -> AsyncIterator[Produce]:
    connection = await asyncpg.connect(dsn)
    try:
        yield (await connection.prepare(_INSERT)).fetchval
    finally:
        await connection.close()


@asynccontextmanager
async def bare_consumer(dsn: str, handle: Handle) -> AsyncIterator[None]:
    listener, reader = await asyncpg.connect(dsn), await asyncpg.connect(dsn)
    await reader.execute("CREATE TABLE IF NOT EXISTS bare (id bigserial PRIMARY KEY, data bytea)")
    last = await reader.fetchval("SELECT coalesce(max(id), 0) FROM bare")
    woken = asyncio.Event()
    await listener.add_listener("bare", lambda *_: woken.set())

    async def consume() -> None:
        nonlocal last
        page = await reader.prepare("SELECT id, data FROM bare WHERE id > $1 ORDER BY id LIMIT 1000")
        while True:
            await woken.wait()
            woken.clear()
            for row in await page.fetch(last):
                last = row["id"]
                handle(row["data"])

    consuming = asyncio.create_task(consume())
    try:
        yield
    finally:
        consuming.cancel()
        await listener.close()
        await reader.close()


PRODUCERS = {"pgbackend": pgbackend_producer, "bare": bare_producer}
CONSUMERS = {"pgbackend": pgbackend_consumer, "bare": bare_consumer}


# The measurement.


async def produce_at(produce: Produce, rate: float, seconds: float) -> float:
    """Produce one event after the other at this rate; the rate that was reached."""
    padding = b"x" * (DATA_BYTES - 8)
    began = time.monotonic()
    count = 0
    while (now := time.monotonic()) - began < seconds:
        due = began + count / rate
        if due > now:
            await asyncio.sleep(due - now)
        await produce(struct.pack("!d", time.monotonic()) + padding)
        count += 1
    return count / (time.monotonic() - began)


async def consume(system: str, dsn: str) -> None:
    """In a process of its own: print the milliseconds of each event, once standard input is closed."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    took: list[float] = []
    async with CONSUMERS[system](dsn, lambda data: took.append(_took(data))):
        os.write(1, b"ready\n")
        await reader.read()
    sys.stdout.write(" ".join(f"{one:.4f}" for one in took))


async def in_two_processes(system: str, dsn: str, rate: float, seconds: float) -> tuple[list[float], float]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "--consume", system, "--dsn", dsn,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=1 << 26,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    if await process.stdout.readline() != b"ready\n":
        raise PgBackendError("The consuming process did not start. Its output says why.")
    async with PRODUCERS[system](dsn) as produce:
        reached = await produce_at(produce, rate, seconds)
    await asyncio.sleep(0.2)  # for the last events
    process.stdin.close()
    out, _ = await process.communicate()
    return [float(one) for one in out.split()], reached


async def in_one_process(dsn: str, rate: float, seconds: float) -> tuple[list[float], float]:
    took: list[float] = []
    async with Backend(dsn) as backend:

        async def dispatch(event: Event) -> None:
            took.append(_took(event.data_bytes or b""))

        await backend.subscribe("one process", dispatch)
        attributes = {"type": "order.created", "source": "/shop", "datacontenttype": "application/octet-stream"}
        reached = await produce_at(lambda data: backend.produce(CloudEvent(dict(attributes), data)), rate, seconds)
        await backend.delete_subscription("one process")
    return took, reached


def _numbers(text: str) -> list[float]:
    return [float(one) for one in text.split(",")]


def _took(data: bytes) -> float:
    """Milliseconds since the event was produced."""
    (began,) = struct.unpack("!d", data[:8])
    return float(time.monotonic() - began) * 1000


def _figures(took: list[float], rate: float) -> tuple[float, float]:
    """Median and 99th percentile in milliseconds."""
    counted = sorted(took[int(WARM_UP * rate) :])
    return statistics.median(counted), counted[int(len(counted) * 0.99)]


async def main(options: argparse.Namespace) -> bool:
    is_fast = True
    async with AsyncExitStack() as stack:
        if options.dsn is None:
            directory = stack.enter_context(tempfile.TemporaryDirectory())
            server = EmbeddedServer(directory)
            stack.push_async_callback(server.stop)
            options.dsn = await server.start()
        async with Backend(options.dsn):
            pass
        print("wanted | one process: p50, p99 | two processes: p50, p99, rate | bare: p50, p99, rate | ratio of p50")
        for rate in options.rates:
            ones, twos, bares, reached = [], [], [], {"two": 0.0, "bare": 0.0}
            for _ in range(options.rounds):
                ones.append(_figures(*(await in_one_process(options.dsn, rate, options.seconds))))
                took, reached["two"] = await in_two_processes("pgbackend", options.dsn, rate, options.seconds)
                twos.append(_figures(took, reached["two"]))
                took, reached["bare"] = await in_two_processes("bare", options.dsn, rate, options.seconds)
                bares.append(_figures(took, reached["bare"]))
            one, two, bare = (
                [statistics.median(column) for column in zip(*rounds, strict=True)] for rounds in (ones, twos, bares)
            )
            ratio = statistics.median(ours[0] / theirs[0] for ours, theirs in zip(twos, bares, strict=True))
            is_fast = is_fast and ratio <= WANTED_RATIO
            print(
                f"{rate:6,.0f} | {one[0]:6.2f} {one[1]:6.2f} | {two[0]:6.2f} {two[1]:6.2f} {reached['two']:6,.0f} | "
                f"{bare[0]:6.2f} {bare[1]:6.2f} {reached['bare']:6,.0f} | {ratio:.2f}",
                flush=True,
            )
    return is_fast


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dsn", help="a database that may be used; default: an embedded server")
    parser.add_argument("--rates", type=_numbers, default="10,100,300,1000,2000,5000", help="events a second")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long each measurement takes")
    parser.add_argument("--rounds", type=int, default=3, help="how many of each; the medians are shown")
    parser.add_argument("--consume", choices=CONSUMERS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.consume:
        asyncio.run(consume(chosen.consume, chosen.dsn))
    else:
        sys.exit(0 if asyncio.run(main(chosen)) else 1)
