"""The cost of a transactional subscription: one INSERT an event in batches, beside the same in bare asyncpg.

    python benchmarks/transactions.py
    python benchmarks/transactions.py --events 50000 --batch 100 --rounds 5

Both do the same work in turns, on one embedded server with fsync: a transaction for each batch, in it one INSERT for
each event, one after the other. Bare asyncpg has its rows ready; pgbackend reads the events from its log, and commits
its offset. Machines are noisy: compare the ratio.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from typing import Any

import asyncpg
import uvloop
from cloudevents.core.v1.event import CloudEvent

from pgbackend import Backend, Event
from pgbackend.embedded.server import EmbeddedServer

INSERT = "INSERT INTO effects (id, data) VALUES ($1, $2)"
WANTED_RATIO = 0.5


async def bare(dsn: str, rows: list[tuple[str, bytes]], batch: int) -> float:
    """Rows a second."""
    connection = await asyncpg.connect(dsn)
    began = time.perf_counter()
    for start in range(0, len(rows), batch):
        async with connection.transaction():
            for row in rows[start : start + batch]:
                await connection.execute(INSERT, *row)
    rate = len(rows) / (time.perf_counter() - began)
    await connection.close()
    return rate


async def transactional(backend: Backend, name: str, events: int, batch: int) -> float:
    """Events a second, from the first dispatch to the last commit."""
    began = 0.0

    async def insert(group: list[Event], connection: Any) -> None:
        nonlocal began
        began = began or time.perf_counter()
        for event in group:
            await connection.execute(INSERT, event.id, event.data_bytes)

    await backend.subscribe(name, insert, start="earliest", end=events + 1, transactional=True, batch=batch)
    while not _status(await backend.status(), name).complete:  # noqa: ASYNC110 - it can only be polled
        await asyncio.sleep(0.01)
    rate = events / (time.perf_counter() - began)
    await backend.delete_subscription(name)
    return rate


def _status(status: Any, name: str) -> Any:
    return next(one for one in status.subscriptions if one.name == name)


async def main() -> None:
    """Print the rates of each round, and the ratio of the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    rows = [(f"event {number}", b"x" * 420) for number in range(given.events)]
    rates: dict[str, list[float]] = {"bare": [], "pgbackend": []}
    with tempfile.TemporaryDirectory() as directory:
        async with EmbeddedServer(directory) as server, Backend(server.dsn) as backend:
            observer = await asyncpg.connect(server.dsn)
            await observer.execute("CREATE TABLE effects (id text, data bytea)")
            attributes = {"source": "/bench", "type": "t", "datacontenttype": "application/octet-stream"}
            for start in range(0, given.events, 1000):
                await backend.produce_many(
                    [CloudEvent({**attributes, "id": id_}, data) for id_, data in rows[start : start + 1000]]
                )
            for number in range(given.rounds):
                await observer.execute("TRUNCATE effects")
                rates["bare"].append(await bare(server.dsn, rows, given.batch))
                await observer.execute("TRUNCATE effects")
                rates["pgbackend"].append(await transactional(backend, f"round {number}", given.events, given.batch))
                assert await observer.fetchval("SELECT count(*) FROM effects") == given.events
                print(
                    f"round {number + 1}: bare {rates['bare'][-1]:,.0f} /s, pgbackend {rates['pgbackend'][-1]:,.0f} /s"
                )
            await observer.close()
    middle = {name: statistics.median(some) for name, some in rates.items()}
    ratio = middle["pgbackend"] / middle["bare"]
    print(f"median: bare {middle['bare']:,.0f} /s, pgbackend {middle['pgbackend']:,.0f} /s, ratio {ratio:.2f}")
    print(f"goal: at least {WANTED_RATIO}: {'met' if ratio >= WANTED_RATIO else 'missed'}")


if __name__ == "__main__":
    uvloop.run(main())
