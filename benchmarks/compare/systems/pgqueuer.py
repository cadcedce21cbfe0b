"""PgQueuer with its durable tables, its autovacuum settings, and batches as large as ours.

A pool of connections produces and one connection consumes, as its guide to performance advises. `enqueue()` takes one
job or lists of them. The manager takes jobs in batches, runs each as a task, and logs its end in batches.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from importlib.metadata import version
from typing import Any, Literal

import asyncpg
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver, AsyncpgPoolDriver
from pgqueuer.queries import Queries

from benchmarks.compare.system import PAGE, Count
from benchmarks.compare.systems import postgresql

_ENTRYPOINT = "order.created"


class PgQueuerJobs:
    title = "PgQueuer"
    kind: Literal["log", "queue"] = "queue"
    durability = postgresql.DURABILITY
    mode = f"durable tables, `pgq autovac`; batch_size {PAGE:,}; lists of {PAGE:,} jobs"
    server = postgresql.EMBEDDED

    async def versions(self, server: str) -> str:
        return (
            f"{await postgresql.server_version(server)}, PgQueuer {version('pgqueuer')}, asyncpg {version('asyncpg')}"
        )

    @asynccontextmanager
    async def fresh(self, server: str, readers: Sequence[str]) -> AsyncIterator[str]:
        del readers  # they share the jobs
        async with postgresql.fresh_database(server, "pgqueuer_jobs", _prepare) as dsn:
            yield dsn

    def events(self, bodies: Sequence[bytes]) -> list[Any]:
        return list(bodies)

    @asynccontextmanager
    async def producer(self, address: str, tasks: int) -> AsyncIterator["_Producer"]:
        async with postgresql.pool(address, tasks) as pool:
            yield _Producer(Queries(AsyncpgPoolDriver(pool)))

    @asynccontextmanager
    async def consumer(self, address: str, reader: str, count: Count) -> AsyncIterator[None]:
        del reader

        async def handle(job: Any) -> None:
            count(job.payload)

        connection = await asyncpg.connect(address)
        manager = PgQueuer(AsyncpgDriver(connection))
        manager.entrypoint(_ENTRYPOINT)(handle)
        async with asyncio.TaskGroup() as group:
            group.create_task(manager.run(batch_size=PAGE, dequeue_timeout=timedelta(seconds=1)))
            try:
                yield
            finally:
                manager.shutdown.set()
        await connection.close()

    async def settle(self, address: str) -> None:
        await postgresql.vacuum(address)

    async def left(self, address: str, readers: Sequence[str]) -> int:
        del readers
        return await postgresql.one_value(address, "SELECT count(*) FROM pgqueuer")


class _Producer:
    def __init__(self, queries: Any) -> None:
        self._queries = queries

    async def one(self, event: bytes) -> None:
        await self._queries.enqueue(_ENTRYPOINT, event)

    async def many(self, events: Sequence[bytes]) -> None:
        await self._queries.enqueue([_ENTRYPOINT] * len(events), list(events), [0] * len(events))


async def _prepare(dsn: str) -> None:
    connection = await asyncpg.connect(dsn)
    queries = Queries(AsyncpgDriver(connection))
    await queries.install()
    await queries.optimize_autovacuum()
    await connection.close()
