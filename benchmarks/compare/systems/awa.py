"""Awa: its engine in Rust, handlers in Python, and its queue storage.

`insert()` stores one job and `enqueue_many_copy()` many by COPY. A worker has `_WORKERS` places and claims in batches.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

from awa import AsyncClient

from benchmarks.compare.system import Count
from benchmarks.compare.systems import postgresql

_QUEUE = "events"
_WORKERS = 1_000
_CLAIMERS = 2
_CLAIM = 512
_CONNECTIONS = 10
"""The client's default."""


@dataclass
class Deliver:
    event: str


class AwaJobs:
    title = "Awa"
    kind: Literal["log", "queue"] = "queue"
    durability = postgresql.DURABILITY
    mode = f"queue storage; `enqueue_many_copy`; {_WORKERS} workers, {_CLAIMERS} claimers, claim_batch_size {_CLAIM}"
    server = postgresql.EMBEDDED

    async def versions(self, server: str) -> str:
        return f"{await postgresql.server_version(server)}, Awa {version('awa-pg')}"

    @asynccontextmanager
    async def fresh(self, server: str, readers: Sequence[str]) -> AsyncIterator[str]:
        del readers  # they share the jobs
        async with postgresql.fresh_database(server, "awa_jobs", _prepare) as dsn:
            yield dsn

    def events(self, bodies: Sequence[bytes]) -> list[Any]:
        return [Deliver(body.decode()) for body in bodies]

    @asynccontextmanager
    async def producer(self, address: str, tasks: int) -> AsyncIterator["_Producer"]:
        async with _client(address, max(tasks, _CONNECTIONS)) as client:
            yield _Producer(client)

    @asynccontextmanager
    async def consumer(self, address: str, reader: str, count: Count) -> AsyncIterator[None]:
        del reader

        async def handle(job: Any) -> None:
            count(job.args.event.encode())

        async with _client(address, 2 * _CONNECTIONS) as client:
            client.task(Deliver, queue=_QUEUE)(handle)
            await client.start(
                [{"name": _QUEUE, "max_workers": _WORKERS, "claimers": _CLAIMERS, "claim_batch_size": _CLAIM}]
            )
            yield
            await client.shutdown()

    async def settle(self, address: str) -> None:
        await postgresql.vacuum(address)

    async def left(self, address: str, readers: Sequence[str]) -> int:
        del readers
        async with _client(address) as client:
            return sum(one.total_queued for one in await client.queue_stats() if one.queue == _QUEUE)


class _Producer:
    def __init__(self, client: Any) -> None:
        self._client = client

    async def one(self, event: Deliver) -> None:
        await self._client.insert(event, queue=_QUEUE)

    async def many(self, events: Sequence[Deliver]) -> None:
        await self._client.enqueue_many_copy(list(events), queue=_QUEUE)


def _client(dsn: str, connections: int = _CONNECTIONS) -> Any:
    # Its parser wants a host, although the one in the query counts.
    return AsyncClient(dsn.replace("@/", "@localhost/"), max_connections=connections)


async def _prepare(dsn: str) -> None:
    async with _client(dsn) as client:
        await client.migrate()
        await client.install_queue_storage()
