"""Procrastinate on psycopg 3, with successful jobs deleted.

`defer_async()` stores one job, `batch_defer_async()` many. A worker takes one job after the other and runs `_JOBS` at a
time.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any, Literal

from procrastinate import App, PsycopgConnector

from benchmarks.compare.system import Count
from benchmarks.compare.systems import postgresql

_JOBS = 32
_CONNECTIONS = 8


class ProcrastinateJobs:
    title = "Procrastinate"
    kind: Literal["log", "queue"] = "queue"
    durability = postgresql.DURABILITY
    mode = f"concurrency {_JOBS}, {_CONNECTIONS} connections, successful jobs deleted"
    server = postgresql.EMBEDDED

    async def versions(self, server: str) -> str:
        own = f"Procrastinate {version('procrastinate')}, psycopg {version('psycopg')}"
        return f"{await postgresql.server_version(server)}, {own}"

    @asynccontextmanager
    async def fresh(self, server: str, readers: Sequence[str]) -> AsyncIterator[str]:
        del readers  # they share the jobs
        async with postgresql.fresh_database(server, "procrastinate", _prepare) as dsn:
            yield dsn

    def events(self, bodies: Sequence[bytes]) -> list[Any]:
        return [{"event": body.decode()} for body in bodies]

    @asynccontextmanager
    async def producer(self, address: str, tasks: int) -> AsyncIterator["_Producer"]:
        app = _app(address, tasks)
        task = app.task(_unused, name="deliver")
        async with app.open_async():
            yield _Producer(task)

    @asynccontextmanager
    async def consumer(self, address: str, reader: str, count: Count) -> AsyncIterator[None]:
        async def deliver(event: str) -> None:
            count(event.encode())

        app = _app(address, _CONNECTIONS)
        app.task(deliver, name="deliver")
        async with app.open_async(), asyncio.TaskGroup() as group:
            working = group.create_task(
                app.run_worker_async(
                    name=reader, concurrency=_JOBS, delete_jobs="successful", install_signal_handlers=False
                )
            )
            try:
                yield
            finally:
                # Its documented way to stop: it finishes the jobs that it has.
                working.cancel()

    async def settle(self, address: str) -> None:
        await postgresql.vacuum(address)

    async def left(self, address: str, readers: Sequence[str]) -> int:
        del readers
        return await postgresql.one_value(address, "SELECT count(*) FROM procrastinate_jobs")


class _Producer:
    def __init__(self, task: Any) -> None:
        self._task = task

    async def one(self, event: dict[str, str]) -> None:
        await self._task.defer_async(**event)

    async def many(self, events: Sequence[dict[str, str]]) -> None:
        await self._task.batch_defer_async(*events)


async def _unused(event: str) -> None:
    """A producer only needs the name."""


def _app(dsn: str, connections: int) -> Any:
    return App(connector=PsycopgConnector(conninfo=dsn, min_size=connections, max_size=connections))


async def _prepare(dsn: str) -> None:
    async with _app(dsn, 1).open_async() as app:
        await app.schema_manager.apply_schema_async()
