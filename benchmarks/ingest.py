"""How fast `pgbackend serve` takes events in, compared with a uvicorn that answers 202 and does nothing.

Both run as processes of their own, on uvloop and httptools, and get the same requests from wrk over the same number of
keep-alive connections, in turn and in several rounds. Ours answers when the event is committed to an embedded
PostgreSQL with fsync on. At the end the log must hold all acknowledged events, and besides them only events that were
under way when wrk stopped. The promise is for single events in binary mode: half of bare uvicorn's rate.

    python benchmarks/ingest.py [--rounds 5] [--seconds 5] [--workers 1] [--all]
"""

import argparse
import asyncio
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from pgbackend.embedded.server import EmbeddedServer

PROMISE = 0.5
CONNECTIONS = 64
BATCHES = (100, 1000)

DATA = '{"order": 4711, "customer": "shop-17", "total": 99.50, "note": "' + "x" * 436 + '"}'
ATTRIBUTES = {
    "specversion": "1.0",
    "id": "4f5ad0c6-8a2b-4b0e-9a43-1a5c9a4c6f01",
    "source": "/shop/orders",
    "type": "com.example.order.created",
    "time": "2026-01-01T00:00:00.123456Z",
}
ENVELOPE = "{" + ",".join(f'"{name}":"{text}"' for name, text in ATTRIBUTES.items()) + f',"data":{DATA}}}'

BARE = """
import asyncio, sys
import uvicorn, uvloop

async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 202, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})

config = uvicorn.Config(app, fd=int(sys.argv[1]), http="httptools", ws="none", loop="none", lifespan="off",
                        log_config=None, log_level="error", access_log=False, proxy_headers=False, server_header=False)
with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
    runner.run(uvicorn.Server(config).serve())
"""


@dataclass(frozen=True, slots=True)
class Load:
    """A kind of request that wrk sends."""

    name: str
    headers: dict[str, str]
    body: str
    events: int = 1
    """Events in one request."""
    connections: int = CONNECTIONS


LOADS = (
    Load("binary", {f"ce-{n}": t for n, t in ATTRIBUTES.items()} | {"content-type": "application/json"}, DATA),
    Load("structured", {"content-type": "application/cloudevents+json"}, ENVELOPE),
    *(
        Load(
            f"batch of {events:,}",
            {"content-type": "application/cloudevents-batch+json"},
            "[" + ",".join([ENVELOPE] * events) + "]",
            events,
            # 64 batches of 1,000 are more than the broker holds for one address.
            CONNECTIONS if events < 1000 else 16,
        )
        for events in BATCHES
    ),
)


@dataclass(frozen=True, slots=True)
class Round:
    """The figures of one run of wrk."""

    rate: float
    """Requests a second."""
    requests: int


class BenchmarkError(Exception):
    """The run gives no figures that mean anything."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=5, help="seconds that each side runs in each round")
    parser.add_argument("--workers", type=int, default=1, help="processes on each side")
    parser.add_argument("--all", action="store_true", help="measure structured mode and batches too")
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        print("This needs wrk: apt-get install wrk, or brew install wrk, or https://github.com/wg/wrk.")
        return 2
    try:
        return run(options)
    except BenchmarkError as error:
        print(f"No result: {error}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    # On a disk, because /tmp may be in memory, where a commit costs nothing.
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pgbackend-bench-", dir="/var/tmp")))
        server = EmbeddedServer(directory)
        dsn = asyncio.run(server.start())
        stack.callback(lambda: asyncio.run(server.stop()))
        bare = stack.enter_context(bare_uvicorn(options.workers))
        ours = stack.enter_context(broker(dsn, options.workers))
        good = True
        for load in LOADS if options.all else LOADS[:1]:
            script = directory / "load.lua"
            script.write_text(lua(load))
            ratio = compare(load, bare, ours, dsn, script, options)
            if load is LOADS[0]:
                good = ratio >= PROMISE
                print(f"  promised {PROMISE}: {'kept' if good else 'BROKEN'}")
    return 0 if good else 1


def compare(load: Load, bare: str, ours: str, dsn: str, script: Path, options: argparse.Namespace) -> float:
    """The median of the rounds' ratios. Prints each round."""
    print(f"{load.name}: requests a second, {load.connections} connections, {options.workers} process(es) each")
    wrk(bare, script, 1, load.connections)
    wrk(ours, script, 1, load.connections)
    # Requests that were under way when the first run stopped may be stored after this count, too.
    before, acknowledged, possible = asyncio.run(count(dsn)), 0, load.connections * load.events
    rates: list[tuple[float, float]] = []
    for number in range(options.rounds):
        # In turn, so that a slow moment of the machine is slow for both.
        sides = [bare, ours] if number % 2 == 0 else [ours, bare]
        rounds = {side: wrk(side, script, options.seconds, load.connections) for side in sides}
        acknowledged += rounds[ours].requests * load.events
        possible += load.connections * load.events
        rates.append((rounds[bare].rate, rounds[ours].rate))
        print(f"  bare {rates[-1][0]:8,.0f}   ours {rates[-1][1]:8,.0f}   ratio {rates[-1][1] / rates[-1][0]:.2f}")
    stored = asyncio.run(count(dsn)) - before
    if not acknowledged <= stored <= acknowledged + possible:
        raise BenchmarkError(f"{acknowledged:,} events were acknowledged, and {stored:,} are stored.")
    ratio = statistics.median(ours / bare for bare, ours in rates)
    medians = [statistics.median(side) for side in zip(*rates, strict=True)]
    print(f"  median: bare {medians[0]:,.0f}, ours {medians[1]:,.0f}, ratio {ratio:.2f}")
    events = f", {medians[1] * load.events:,.0f} events a second" if load.events > 1 else ""
    print(f"  {acknowledged:,} events acknowledged, {stored:,} stored{events}")
    return ratio


def lua(load: Load) -> str:
    lines = ['wrk.method = "POST"', f"wrk.body = [==[{load.body}]==]"]
    lines += [f'wrk.headers["{name}"] = "{value}"' for name, value in load.headers.items()]
    return "\n".join(lines)


def wrk(url: str, script: Path, seconds: int, connections: int) -> Round:
    """One run of wrk. Raises BenchmarkError for any answer but 2xx."""
    # Large batches wait for each other.
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}", "--timeout", "30s", "-s", str(script), url]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603 - wrk
    errors = re.search(r"Non-2xx.*|Socket errors.*", output)
    if errors:
        raise BenchmarkError(f"wrk reports for {url}: {errors[0]}")
    rate, requests = re.search(r"Requests/sec:\s+([\d.]+)", output), re.search(r"(\d+) requests in", output)
    if rate is None or requests is None:
        raise BenchmarkError(f"wrk's output has no figures: {output}")
    return Round(float(rate[1]), int(requests[1]))


@contextmanager
def bare_uvicorn(workers: int) -> Iterator[str]:
    """The URL of a bare uvicorn, which runs until the body ends."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(2048)
        fd = listening.fileno()
        command = [sys.executable, "-c", BARE, str(fd)]
        processes = [subprocess.Popen(command, pass_fds=[fd]) for _ in range(workers)]  # noqa: S603 - ourselves
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait()


@contextmanager
def broker(dsn: str, workers: int) -> Iterator[str]:
    """The URL of a broker, which runs until the body ends."""
    command = [sys.executable, "-m", "pgbackend", "serve", "--dsn", dsn, "--port", "0", "--config-inline", "{}"]
    command += ["--workers", str(workers)] if workers > 1 else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603 - ourselves
    try:
        for line in process.stdout or ():
            if (found := re.search(r"takes CloudEvents at (\S+)", line)) is not None:
                break
        else:
            raise BenchmarkError("pgbackend serve did not start. See its output above.")
        yield found[1]
    finally:
        process.terminate()
        process.communicate()


async def count(dsn: str) -> int:
    """Events in the log."""
    connection = await asyncpg.connect(dsn)
    try:
        return int(await connection.fetchval("select count(*) from pgbackend.events"))
    finally:
        await connection.close()


if __name__ == "__main__":
    sys.exit(main())
