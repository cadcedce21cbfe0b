"""pgbackend, given ready-made bytes in the JSON format, and given events of the SDK with their data as a dict."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any, Literal

from cloudevents.core.v1.event import CloudEvent

from benchmarks.compare.system import Count
from benchmarks.compare.systems import postgresql
from pgbackend import Backend, Event


class JsonEvents:
    title = "**pgbackend**, JSON bytes"
    kind: Literal["log", "queue"] = "log"
    durability = postgresql.DURABILITY
    mode = "defaults; `produce()` and `produce_many()` get bytes"
    server = postgresql.EMBEDDED

    async def versions(self, server: str) -> str:
        return f"{await postgresql.server_version(server)}, pgbackend {version('pgbackend')}"

    @asynccontextmanager
    async def fresh(self, server: str, readers: Sequence[str]) -> AsyncIterator[str]:
        del readers  # a subscription that starts at the earliest event needs no preparation
        async with postgresql.fresh_database(server, "pgbackend", _prepare) as dsn:
            yield dsn

    def events(self, bodies: Sequence[bytes]) -> list[Any]:
        return list(bodies)

    @asynccontextmanager
    async def producer(self, address: str, tasks: int) -> AsyncIterator["_Producer"]:
        del tasks  # all tasks share the backend's connection that appends
        backend = Backend(address)
        await backend.init(migrate=False)
        try:
            yield _Producer(backend)
        finally:
            await backend.stop()

    @asynccontextmanager
    async def consumer(self, address: str, reader: str, count: Count) -> AsyncIterator[None]:
        async def handle(event: Event) -> None:
            count(event.data_bytes or b"")

        async with Backend(address) as backend:
            await backend.subscribe(reader, handle, start="earliest")
            while all(one.state != "running" for one in (await backend.status()).subscriptions):  # noqa: ASYNC110 - it can only be polled
                await asyncio.sleep(0.02)
            yield

    async def settle(self, address: str) -> None:
        await postgresql.vacuum(address)

    async def left(self, address: str, readers: Sequence[str]) -> int:
        backend = Backend(address)
        await backend.init(migrate=False)
        try:
            return sum(one.lag for one in (await backend.status()).subscriptions if one.name in readers)
        finally:
            await backend.stop()


class SdkEvents(JsonEvents):
    title = "**pgbackend**, SDK events"
    mode = "defaults; `produce()` and `produce_many()` get SDK events that exist already, with their data as a dict"

    def events(self, bodies: Sequence[bytes]) -> list[Any]:
        parsed = [json.loads(body) for body in bodies]
        return [CloudEvent({k: v for k, v in one.items() if k != "data"}, one["data"]) for one in parsed]


class _Producer:
    def __init__(self, backend: Backend) -> None:
        self.one = backend.produce
        self.many = backend.produce_many


async def _prepare(dsn: str) -> None:
    backend = Backend(dsn)
    await backend.init()
    await backend.stop()
