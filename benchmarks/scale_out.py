"""The gain and the cost of several workers: each in a process of its own, on an embedded server.

    python benchmarks/scale_out.py workers        # one worker against two, with a handler that costs 5 ms of CPU
    python benchmarks/scale_out.py takeover       # from kill -9 of a worker to its shard's next handling, 50 times
    python benchmarks/scale_out.py connections    # the fence with 500 connections open, 100 of them appending

Machines are noisy. So `workers` compares by the ratio, over rounds with one and two workers in turn.
"""

import argparse
import asyncio
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import asyncpg
from cloudevents.core.v1.event import CloudEvent

from pgbackend import Backend, Event
from pgbackend.embedded.server import EmbeddedServer
from pgbackend.log.log import Log
from pgbackend.postgres.pool import Database

CPU_SECONDS = 0.005
SHARDS = 8
WANTED_RATIO = 1.6
WANTED_TAKEOVER = 2.0
_INSERT = "INSERT INTO pgbackend.events (id, source, type) VALUES (gen_random_uuid()::text, 'bench', 'bench')"


# The worker processes.


async def work(dsn: str, cpu: float) -> None:
    """Run the subscription. Without CPU cost, print each handled event's id and time."""

    async def handle(event: Event) -> None:
        # The CPU time of this process: by the wall clock, a busy machine would do less work.
        until = time.process_time() + cpu
        while time.process_time() < until:
            pass
        if not cpu:
            os.write(1, f"{event.id} {time.monotonic()}\n".encode())

    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with Backend(dsn) as backend:
        await backend.subscribe("bench", handle, start="earliest", order="key", shards=SHARDS)
        await stop.wait()


@asynccontextmanager
async def worker(dsn: str, cpu: float) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "work", "--dsn", dsn, "--cpu", str(cpu), stdout=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def until(what: str, condition: Callable[[], Awaitable[object]], *, timeout: float = 300.0) -> None:
    async with asyncio.timeout(timeout):
        while not await condition():  # noqa: ASYNC110 - a database can only be polled
            await asyncio.sleep(0.01)
    if what:
        print(what, file=sys.stderr)


@asynccontextmanager
async def fresh_log(server: str, name: str) -> AsyncIterator[str]:
    maintenance = await asyncpg.connect(server)
    await maintenance.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
    await maintenance.execute(f'CREATE DATABASE "{name}"')
    dsn = server.replace("/postgres?", f"/{name}?")
    yield dsn
    await maintenance.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
    await maintenance.close()


# The measurements.


async def rate(server: str, workers: int, events: int) -> float:
    """Events of a backlog that so many workers handle a second, once each has its share of the shards."""
    async with AsyncExitStack() as stack:
        dsn = await stack.enter_async_context(fresh_log(server, "bench"))
        producer = await stack.enter_async_context(Backend(dsn))
        observer = await asyncpg.connect(dsn)
        for _ in range(workers):
            await stack.enter_async_context(worker(dsn, CPU_SECONDS))

        async def shared() -> object:
            owners = await observer.fetchval("SELECT count(DISTINCT owner) FROM pgbackend.offsets")
            free = await observer.fetchval("SELECT count(*) FROM pgbackend.offsets WHERE owner IS NULL")
            return owners == workers and not free

        await until("", shared)
        keys = [f"k{number % 200}" for number in range(events)]
        await producer.produce_many(
            [CloudEvent({"type": "t", "source": "/bench", "partitionkey": key}, None) for key in keys]
        )
        began = time.monotonic()

        async def settled() -> object:
            return await observer.fetchval(
                "SELECT bool_and(position >= $1 AND isempty(pending)) FROM pgbackend.offsets", events
            )

        await until("", settled)
        took = time.monotonic() - began
        await observer.close()
    return events / took


async def compare_workers(server: str, rounds: int, events: int) -> bool:
    ratios = []
    for number in range(rounds):
        order = (1, 2) if number % 2 else (2, 1)
        rates = {workers: await rate(server, workers, events) for workers in order}
        ratios.append(rates[2] / rates[1])
        print(f"one worker {rates[1]:.0f} events/s, two {rates[2]:.0f}, ratio {ratios[-1]:.2f}")
    ratio = statistics.median(ratios)
    print(f"two workers handle {ratio:.2f} times the events of one (wanted: {WANTED_RATIO})")
    return ratio >= WANTED_RATIO


async def measure_takeover(server: str, kills: int) -> bool:
    """Two workers share a subscription. One is killed; the other must handle events of all shards."""
    times = []
    async with AsyncExitStack() as stack:
        dsn = await stack.enter_async_context(fresh_log(server, "bench"))
        producer = await stack.enter_async_context(Backend(dsn))
        running = [await stack.enter_async_context(worker(dsn, 0.0)) for _ in range(2)]
        observer = await asyncpg.connect(dsn)
        for _ in range(kills):

            async def shared() -> object:
                return await observer.fetchval("SELECT count(DISTINCT owner) = 2 FROM pgbackend.living_workers, "
                    "pgbackend.offsets WHERE owner = pgbackend.living_workers.id")  # fmt: skip

            await until("", shared)
            victim, other = running
            victim.kill()
            killed = time.monotonic()
            await victim.wait()
            # Enough keys to reach every shard, so that every shard of the dead worker shows when it goes on.
            ids = {f"{killed}-{number}" for number in range(4 * SHARDS)}
            await producer.produce_many(
                [CloudEvent({"id": id_, "type": "t", "source": "/b", "partitionkey": id_}, None) for id_ in ids]
            )
            last = killed
            assert other.stdout is not None
            while ids:
                line = (await other.stdout.readline()).decode().split()
                if line[0] in ids:
                    ids.discard(line[0])
                    last = max(last, float(line[1]))
            times.append(last - killed)
            running = [other, await stack.enter_async_context(worker(dsn, 0.0))]
        await observer.close()
    print(f"from kill -9 to the last shard's next handling, {kills} times:", end=" ")
    print(f"median {statistics.median(times):.2f} s, worst {max(times):.2f} s (wanted: {WANTED_TAKEOVER:g} s)")
    return max(times) <= WANTED_TAKEOVER


async def measure_fence(server: str, idle: int, appending: int, checks: int) -> bool:
    async with AsyncExitStack() as stack:
        dsn = await stack.enter_async_context(fresh_log(server, "bench"))
        backend = await stack.enter_async_context(Backend(dsn))
        database = Database(dsn)
        await database.open()
        log = Log(database, schema="pgbackend", hole_wait=1.0)

        async def checked() -> list[float]:
            took = []
            for _ in range(checks):
                began = time.perf_counter()
                await log.check()
                took.append((time.perf_counter() - began) * 1000)
            return took

        def print_checks(what: str, took: list[float]) -> None:
            rest = f"median {statistics.median(took):.2f} ms, worst of {checks} {max(took):.2f} ms"
            print(f"the fence's evidence, {what}: {rest}")

        print_checks("nothing else connected", await checked())
        connections = [await asyncpg.connect(dsn) for _ in range(idle + appending)]
        print_checks(f"{len(connections)} connections idle", await checked())
        transactions = []
        for connection in connections[:appending]:
            transactions.append(connection.transaction())
            await transactions[-1].start()
            await connection.execute(_INSERT)
        print_checks(f"{appending} of them hold an open append", await checked())
        for transaction in transactions:
            await transaction.commit()

        over = time.monotonic() + 10.0

        async def append(connection: "asyncpg.Connection[asyncpg.Record]") -> int:
            count = 0
            while time.monotonic() < over:
                await connection.execute(_INSERT)
                count += 1
            return count

        appenders = [asyncio.create_task(append(connection)) for connection in connections[:appending]]
        handled: list[float] = []

        async def handle(event: Event) -> None:
            assert event.recorded_at is not None
            handled.append(time.time() - event.recorded_at.timestamp())

        await backend.subscribe("fence", handle)
        print_checks(f"{appending} of them appending all the time", await checked())
        count = sum(await asyncio.gather(*appenders))
        late = statistics.median(handled) * 1000
        print(f"meanwhile {count / 10:.0f} appends/s; median {late:.0f} ms from recorded to handled")
        for connection in connections:
            await connection.close()
        await database.close()
    return True


async def main(arguments: argparse.Namespace) -> bool:
    if arguments.what == "work":
        await work(arguments.dsn, arguments.cpu)
        return True
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        server = EmbeddedServer(directory, settings={"max_connections": "700"})
        dsn = await server.start()
        try:
            if arguments.what == "workers":
                return await compare_workers(dsn, arguments.rounds, arguments.events)
            if arguments.what == "takeover":
                return await measure_takeover(dsn, arguments.kills)
            return await measure_fence(dsn, 400, 100, 200)
        finally:
            await server.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("workers", "takeover", "connections", "work"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--events", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--dsn", help=argparse.SUPPRESS)
    parser.add_argument("--cpu", type=float, default=0.0, help=argparse.SUPPRESS)
    sys.exit(not asyncio.run(main(parser.parse_args())))
