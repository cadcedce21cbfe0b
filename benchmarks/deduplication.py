"""The cost of deduplication to a producer: batches of 1,000 events as JSON, with it and without.

    python benchmarks/deduplication.py                  # half a minute
    python benchmarks/deduplication.py --rounds 15 --lone

Three logs on one embedded server take batches in turn. Two of them deduplicate within about a day: one is in the half
of its time in which an event has one key, the other one in the half in which it has two. Each round measures all, so
that a busy machine slows down all. `--lone` measures single events, too, one after the other.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from datetime import timedelta
from statistics import median
from uuid import uuid4

from pgbackend import Backend
from pgbackend.embedded.server import EmbeddedServer

BATCH = 1_000
BATCHES = 15
"""Batches of each log in a round."""
LONE = 300
_DATA = b'{"order":17,"customer":"c-%d","items":[{"sku":"a-1","count":2},{"sku":"b-7","count":1}],"note":"%s"}'


def make_batch() -> list[bytes]:
    """Events that no log has seen, of about 500 bytes."""
    return [
        b'{"specversion":"1.0","id":"%s","source":"/shop","type":"order.created","time":"2026-01-02T03:04:05Z",'
        b'"datacontenttype":"application/json","data":' % str(uuid4()).encode() + _DATA % (number, b"x" * 230) + b"}"
        for number in range(BATCH)
    ]


async def batches(backend: Backend) -> float:
    """Events a second."""
    made = [make_batch() for _ in range(BATCHES)]
    began = time.perf_counter()
    for events in made:
        await backend.produce_many(events)
    return BATCHES * BATCH / (time.perf_counter() - began)


async def lone(backend: Backend) -> float:
    """Events a second."""
    events = make_batch()[:LONE]
    began = time.perf_counter()
    for event in events:
        await backend.produce(event)
    return LONE / (time.perf_counter() - began)


def window_of(keys: int) -> timedelta:
    """A window of about a day in which each event has so many keys now, and for the next hour.

    An event has two in every second window since 1970.
    """
    for hours in range(20, 200):
        window, past = divmod(time.time() / 3600, hours)
        if window % 2 == keys - 1 and past < hours - 1:
            return timedelta(hours=hours)
    raise AssertionError("one of so many windows fits")


async def compare(
    what: str, measure: Callable[[Backend], Awaitable[float]], logs: Mapping[str, Backend], rounds: int
) -> None:
    """Print the medians of all rounds, and of the ratio to the first log within each round."""
    for backend in logs.values():
        await measure(backend)
    found: list[dict[str, float]] = []
    for number in range(rounds):
        names = list(logs)[:: 1 if number % 2 else -1]
        found.append({name: await measure(logs[name]) for name in names})
        sys.stderr.write(f"{what}: {', '.join(f'{name} {found[-1][name]:,.0f}' for name in logs)}\n")
    first, *others = logs
    print(f"{what}, {first}: {median(rates[first] for rates in found):,.0f} events/s")
    for name in others:
        ratio = median(rates[name] / rates[first] for rates in found)
        print(
            f"{what}, {name}: {median(rates[name] for rates in found):,.0f} events/s; median of the ratios {ratio:.2f}"
        )


async def main(rounds: int, *, is_lone: bool) -> None:
    """Measure on a server of its own."""
    with tempfile.TemporaryDirectory(prefix="pgbackend-bench-") as directory:
        async with EmbeddedServer(directory) as server, AsyncExitStack() as stack:
            logs = {
                "off": Backend(server.dsn, schema="plain"),
                "with one key an event": Backend(server.dsn, schema="one", deduplicate=window_of(1)),
                "with two keys an event": Backend(server.dsn, schema="two", deduplicate=window_of(2)),
            }
            for backend in logs.values():
                await backend.init()
                stack.push_async_callback(backend.stop)
            await compare(f"batches of {BATCH:,}", batches, logs, rounds)
            if is_lone:
                await compare("lone events", lone, logs, rounds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--lone", action="store_true")
    given = parser.parse_args()
    asyncio.run(main(given.rounds, is_lone=given.lone))
