"""How fast `pgbackend serve` delivers, as a ratio to a bare aiohttp client in the same run.

Ours is the whole way: events are read from the log in an embedded PostgreSQL and go through a subscription and a
`TargetDispatcher` to an HTTP target, while their offsets are committed. Bare does what a program without promises does:
64 tasks post the same bodies with the same headers over one keep-alive session. Both run in this process on uvloop, in
turn, in alternating order. The target is a process of its own that does as little as it can.

    python benchmarks/delivery.py --events 20000 --rounds 5
"""

import argparse
import asyncio
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import cast

import aiohttp
import uvloop
from cloudevents.core.v1.event import CloudEvent
from yarl import URL

from pgbackend.backend import Backend
from pgbackend.codec.event import Event
from pgbackend.codec.sdk import as_event
from pgbackend.codec.wire import write_binary
from pgbackend.model import Position
from pgbackend.serve.egress.connections import Pool
from pgbackend.serve.egress.dispatcher import ATTEMPT, Endpoint, TargetDispatcher
from pgbackend.serve.egress.replies import Replies, ReplyBudget
from pgbackend.serve.operations.metrics import Metrics
from pgbackend.serve.process import collect_garbage_rarely

CONCURRENCY = 64
WANTED = 0.8
_BODY = b'{"padding": "%b"}' % (b"x" * 300)
_BATCH = 1000


class _Target(asyncio.Protocol):
    """Answers 204 to every request as soon as all of it is there."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transport is an asyncio.Transport, but does not inherit from it.
        self._transport = cast("asyncio.Transport", transport)
        self._received = b""

    def data_received(self, data: bytes) -> None:
        received = self._received + data if self._received else data
        while (head := received.find(b"\r\n\r\n")) >= 0:
            at = received.lower().find(b"content-length:", 0, head) + 15
            end = head + 4 + int(received[at : received.find(b"\r", at)])
            if len(received) < end:
                break
            received = received[end:]
            self._transport.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        self._received = received


async def _serve_target() -> None:
    server = await asyncio.get_running_loop().create_server(_Target, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@asynccontextmanager
async def _target() -> AsyncIterator[str]:
    process = await asyncio.create_subprocess_exec(sys.executable, __file__, "--target", stdout=asyncio.subprocess.PIPE)
    try:
        port = int(await cast("asyncio.StreamReader", process.stdout).readline())
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        await process.wait()


async def _bare(url: str, events: int) -> float:
    """Events a second."""
    turns = iter(range(events))
    headers = dict(write_binary(as_event(_event(0)))[0]) | {ATTEMPT: "1"}

    async def post(session: aiohttp.ClientSession) -> None:
        for _ in turns:
            async with session.post(url, data=_BODY, headers=headers) as response:
                await response.read()

    async with aiohttp.ClientSession() as session:
        began = time.perf_counter()
        await asyncio.gather(*(post(session) for _ in range(CONCURRENCY)))
        return events / (time.perf_counter() - began)


async def _ours(backend: Backend, url: str, events: int, name: str) -> float:
    """Events a second, from the first attempt to the last answer."""
    done = asyncio.Event()
    left, began = events, 0.0

    async def dispatch(event: Event) -> None:
        nonlocal left, began
        began = began or time.perf_counter()
        await dispatcher(event)
        left -= 1
        if not left:
            done.set()

    async with Pool() as pool:
        # As `pgbackend serve` makes it with tracing off.
        counts = Metrics().trigger(name)
        replies = Replies(
            backend.produce_many, trigger=name, url=url, max_hops=255, budget=ReplyBudget(), metrics=counts
        )
        dispatcher = TargetDispatcher(pool, Endpoint(trigger=name, url=URL(url)), replies, metrics=counts)
        await backend.subscribe(name, dispatch, start=Position(0), concurrency=CONCURRENCY)
        await done.wait()
        rate = events / (time.perf_counter() - began)
        await backend.unsubscribe(name)
    return rate


def _event(n: int) -> CloudEvent:
    attributes = {
        "id": f"00000000-0000-4000-8000-{n:012}",
        "source": "/pgbackend/benchmarks",
        "type": "com.example.order.created",
        "subject": f"order-{n:08}",
        "datacontenttype": "application/json",
        "time": datetime(2026, 1, 1, tzinfo=UTC),
    }
    return CloudEvent(attributes=attributes, data=_BODY)


async def _measure(events: int, rounds: int) -> bool:
    bare: list[float] = []
    ours: list[float] = []
    collect_garbage_rarely()  # as `pgbackend serve` does; both sides profit
    with tempfile.TemporaryDirectory(prefix="pgbackend-bench-", ignore_cleanup_errors=True) as directory:
        async with _target() as url, Backend.embedded(directory) as backend:
            for first in range(0, events, _BATCH):
                await backend.produce_many([_event(n) for n in range(first, min(first + _BATCH, events))])
            for number in range(rounds):
                for side in ("bare", "ours") if number % 2 else ("ours", "bare"):
                    gc.collect()
                    if side == "bare":
                        bare.append(await _bare(url, events))
                    else:
                        ours.append(await _ours(backend, url, events, f"round {number}"))
                print(f"round {number + 1}: bare {bare[-1]:7,.0f}/s  ours {ours[-1]:7,.0f}/s", flush=True)
    ratio = statistics.median(mine / theirs for mine, theirs in zip(ours, bare, strict=True))
    print(
        f"median:  bare {statistics.median(bare):7,.0f}/s  ours {statistics.median(ours):7,.0f}/s  "
        f"ratio {ratio:.2f}, wanted {WANTED}"
    )
    return ratio >= WANTED


def main() -> None:
    """Exit with 1 when the ratio is missed."""
    parser = argparse.ArgumentParser(description="Delivery over HTTP against a bare aiohttp client.")
    parser.add_argument("--events", type=int, default=20_000, help="events in a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; the medians are shown (default: %(default)s)")
    parser.add_argument("--target", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.target:
        uvloop.run(_serve_target())
    elif not uvloop.run(_measure(options.events, options.rounds)):
        sys.exit(1)


if __name__ == "__main__":
    main()
