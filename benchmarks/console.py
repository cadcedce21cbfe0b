"""The cost of the console: a broker under load, with no browser and with ten tabs, in turns.

`pgbackend serve` takes 2,000 events a second in over HTTP, in batches of ten. Four triggers share them and deliver each
event to an HTTP target. The log has 200 subscriptions and 10,000 dead letters besides. Ten tabs of Chromium show the
overview, and then the live tail. Measured are the CPU time of the broker's process, that of all processes of
PostgreSQL, and how long an event takes from the moment when it is due to be sent to its arrival at the target. The
browser yields to all others: its own CPU time is not the console's.

    python benchmarks/console.py
    python benchmarks/console.py --rounds 7 --seconds 20
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import aiohttp
import uvloop

from benchmarks.scaling.processes import Cost, Process, find_postmaster
from pgbackend import Backend
from pgbackend.embedded.server import EmbeddedServer
from pgbackend.errors import PgBackendError
from tests.console import world
from tests.console.browser.chromium import launched
from tests.serve.support.process import running

if TYPE_CHECKING:
    from playwright.async_api import Page

PROMISE = 0.05
"""The share of a core that the console may cost, in the broker and in PostgreSQL together."""
TRIGGERS = 4
BATCH = 10
SETTLE = 3.0
"""Seconds before each measurement: the tabs load, and the last measurement's events arrive."""
VIEWS = {"no tab": "", "overview": "#/", "live tail": "#/events"}
"""The page of the tabs in each measurement of a round."""
_ATTRIBUTES = '"specversion":"1.0","source":"/pgbackend/benchmarks","datacontenttype":"application/json"'


@dataclass(frozen=True, slots=True)
class Figures:
    """One measurement."""

    broker: float
    """Share of a core."""
    postgresql: float
    p50: float
    """Milliseconds."""
    p99: float
    rate: float
    """Deliveries a second."""
    requests: float
    """Requests of the tabs a second."""


# ── the processes of the benchmark ────────────────────────────────────────────────────────────────────────────────────


async def serve_target(_: dict[str, Any]) -> None:
    """Tell the port, and for each line on standard input the milliseconds of all events since the line before."""
    took: list[float] = []

    class Target(asyncio.Protocol):
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
                took.append((time.monotonic() - json.loads(received[head + 4 : end])["due"]) * 1000)
                received = received[end:]
                self._transport.write(b"HTTP/1.1 204 No Content\r\n\r\n")
            self._received = received

    server = await asyncio.get_running_loop().create_server(Target, "127.0.0.1", 0)
    tell(server.sockets[0].getsockname()[1])
    async for _line in lines():
        tell(took)
        took.clear()
    server.close()


async def produce(given: dict[str, Any]) -> None:
    """Send batches at the rate, each when it is due, until standard input ends."""
    number = 0
    ended = asyncio.create_task(_until_the_end())
    headers = {"content-type": "application/cloudevents-batch+json"}

    async def send(due: float, first: int) -> None:
        events = [
            f'{{{_ATTRIBUTES},"id":"{n}","type":"com.example.benchmark-{n % TRIGGERS}","subject":"order-{n % 1000}",'
            f'"data":{{"due":{due:.6f},"padding":"{"x" * 300}"}}}}'
            for n in range(first, first + BATCH)
        ]
        async with client.post(given["url"], data=f"[{','.join(events)}]".encode(), headers=headers) as answer:
            answer.raise_for_status()

    async with aiohttp.ClientSession() as client, asyncio.TaskGroup() as sending:
        began = time.monotonic()
        tell("ready")
        while not ended.done():
            due = began + number / given["rate"]
            await asyncio.sleep(due - time.monotonic())
            sending.create_task(send(due, number))
            number += BATCH


async def browse(given: dict[str, Any]) -> None:
    """For each line on standard input, the tabs show this view; tell how many requests they have made so far."""
    # It gets the time that all others leave: on two cores it would delay events by itself.
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    requests = 0

    def count(_: object) -> None:
        nonlocal requests
        requests += 1

    async with launched() as browser:
        context = await browser.new_context()
        context.on("request", count)
        pages: list[Page] = []
        tell("ready")
        async for line in lines():
            # None asks only.
            if (view := json.loads(line)) is not None:
                for page in pages:
                    await page.close()
                pages = [await context.new_page() for _ in range(given["tabs"] if view else 0)]
                for page in pages:
                    await page.goto(given["url"] + view)
                    await page.get_by_role("heading", level=1).wait_for()
            tell({"requests": requests, "visible": [await page.evaluate("document.visibilityState") for page in pages]})


ROLES: dict[str, Callable[[dict[str, Any]], Coroutine[Any, Any, None]]] = {
    "target": serve_target,
    "produce": produce,
    "browse": browse,
}


def tell(fact: object) -> None:
    print(json.dumps(fact), flush=True)


async def lines() -> AsyncIterator[bytes]:
    """The lines of standard input."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async for line in reader:
        yield line


async def _until_the_end() -> None:
    async for _ in lines():
        pass


class Child:
    """One of these processes."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def hear(self) -> Any:
        """The next fact that it tells."""
        assert self._process.stdout is not None
        if not (line := await self._process.stdout.readline()):
            raise PgBackendError("A process of the benchmark ended early. Its output says why.")
        return json.loads(line)

    async def ask(self, request: object) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{json.dumps(request)}\n".encode())
        return await self.hear()


@asynccontextmanager
async def child(role: str, **given: object) -> AsyncIterator[Child]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "--role", role, "--given", json.dumps(given),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=1 << 28,
    )  # fmt: skip
    try:
        yield Child(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(60):
                await process.wait()
        if process.returncode is None:
            process.kill()
            await process.wait()


# ── the measurement ───────────────────────────────────────────────────────────────────────────────────────────────────


async def measure(options: argparse.Namespace) -> dict[str, list[Figures]]:
    """The figures of each view, round by round."""
    found: dict[str, list[Figures]] = {view: [] for view in VIEWS}
    async with AsyncExitStack() as stack:
        # On a disk, because /tmp may be in memory, where a commit costs nothing.
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="pgbackend-bench-", dir="/var/tmp"))
        server = await stack.enter_async_context(EmbeddedServer(directory))
        async with Backend(server.dsn):
            pass
        await world.populate(server.dsn)
        target = await stack.enter_async_context(child("target"))
        config = json.dumps({"triggers": _triggers(await target.hear())})
        serve = await stack.enter_async_context(running("--dsn", server.dsn, "--port", "0", "--config-inline", config))
        url = await serve.listening()
        browser = await stack.enter_async_context(child("browse", url=f"{url}console/", tabs=options.tabs))
        producer = await stack.enter_async_context(child("produce", url=url, rate=options.rate))
        assert (await browser.hear(), await producer.hear()) == ("ready", "ready")
        postmaster = await find_postmaster(server.dsn)
        print("round  view       broker  PostgreSQL  p50 ms  p99 ms  events/s  requests/s", flush=True)
        for number in range(options.rounds):
            for view in list(VIEWS) if number % 2 == 0 else reversed(VIEWS):
                opened = await browser.ask(VIEWS[view])
                assert set(opened["visible"]) <= {"visible"}, opened
                await asyncio.sleep(SETTLE)
                await target.ask("so far")
                await keeps_up(target, options.rate)
                before = (await browser.ask(None))["requests"]
                # The browser may take seconds to answer.
                await target.ask("so far")
                cost, began = Cost(postmaster, [Process(serve.process)]), time.monotonic()
                await asyncio.sleep(options.seconds)
                broker, postgresql = cost.shares()
                took, seconds = sorted(await target.ask("end")), time.monotonic() - began
                requests = (await browser.ask(None))["requests"] - before
                figures = Figures(
                    broker=broker,
                    postgresql=postgresql,
                    p50=statistics.median(took),
                    p99=took[int(len(took) * 0.99)],
                    rate=len(took) / seconds,
                    requests=requests / seconds,
                )
                found[view].append(figures)
                print(f"{number + 1:5}  {view:9}  {_line(figures)}", flush=True)
    return found


async def keeps_up(target: Child, rate: float) -> None:
    """Return once events arrive as they are sent, none of them late. Raises PgBackendError after a minute."""
    took: list[float] = []
    before = time.monotonic()
    for _ in range(60):
        await asyncio.sleep(1)
        took, now = await target.ask("so far"), time.monotonic()
        # More than the rate: events that were late while the tabs opened.
        if took and statistics.median(took) < 1000 and len(took) < 1.03 * rate * (now - before):
            return
        before = now
    raise PgBackendError(f"The machine is too busy: {len(took)} events arrived in the last second, and late.")


def _triggers(port: int) -> dict[str, Any]:
    return {
        f"benchmark-{number}": {
            "filters": [{"exact": {"type": f"com.example.benchmark-{number}"}}],
            "target": {"url": f"http://127.0.0.1:{port}/"},
        }
        for number in range(TRIGGERS)
    }


def _line(figures: Figures) -> str:
    return (
        f"{figures.broker:6.1%}  {figures.postgresql:10.1%}  {figures.p50:6.2f}  {figures.p99:6.2f}  "
        f"{figures.rate:8,.0f}  {figures.requests:10.1f}"
    )


def report(found: dict[str, list[Figures]], *, tabs: int) -> bool:
    """Print the differences to no tab, as medians over the rounds. Whether the promise was kept."""
    good = True
    without = found["no tab"]
    for view, rounds in found.items():
        if rounds is without:
            continue
        pairs = list(zip(rounds, without, strict=True))
        broker = statistics.median(one.broker - other.broker for one, other in pairs)
        postgresql = statistics.median(one.postgresql - other.postgresql for one, other in pairs)
        p50 = statistics.median(one.p50 - other.p50 for one, other in pairs)
        p99 = statistics.median(one.p99 - other.p99 for one, other in pairs)
        kept = broker + postgresql <= PROMISE
        good = good and kept
        print(
            f"{view}: {tabs} tabs cost {broker + postgresql:.1%} of a core ({broker:.1%} in the broker, "
            f"{postgresql:.1%} in PostgreSQL); promised {PROMISE:.0%}: {'kept' if kept else 'BROKEN'}. Events take "
            f"{p50:+.2f} ms longer at the median (of {statistics.median(one.p50 for one in without):.2f} ms), "
            f"{p99:+.2f} ms at the 99th percentile (of {statistics.median(one.p99 for one in without):.2f} ms)."
        )
    return good


def main() -> None:
    """Exit with 1 when the promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="the medians are shown (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each measurement (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=2000.0, help="events a second (default: %(default)s)")
    parser.add_argument("--tabs", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    parser.add_argument("--given", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        uvloop.run(ROLES[options.role](json.loads(options.given)))
    elif not report(asyncio.run(measure(options)), tabs=options.tabs):
        sys.exit(1)


if __name__ == "__main__":
    main()
