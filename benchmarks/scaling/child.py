"""A process of `scale.py`: a worker that reads, or producers. `processes.py` starts it and talks to it.

Facts are lines of JSON on standard output. Standard input has orders: `report` asks for the figures, its end ends the
process.
"""

import asyncio
import json
import os
import struct
import sys
import time
from array import array
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import asyncpg
import uvloop
from cloudevents.core.v1.event import CloudEvent

from pgbackend import Backend, Event

MARK = 100
"""A worker notes the time after so many events, if it does not know how many there are."""
_INSERT = """
    INSERT INTO pgbackend.events (id, source, type, datacontenttype, data)
    VALUES (gen_random_uuid()::text, '/pgbackend/scale', 'com.example.order.created', 'application/octet-stream', $1)"""


class Parent:
    """The other end of standard input and output."""

    def __init__(self) -> None:
        self._reader = asyncio.StreamReader()

    async def connect(self) -> None:
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(self._reader), sys.stdin)

    async def order(self) -> str:
        """The next order. Empty once the parent wants the process to end."""
        return (await self._reader.readline()).decode().strip()

    @staticmethod
    def tell(**facts: Any) -> None:
        print(json.dumps(facts), flush=True)


class Seen:
    """Everything that a worker's handlers have seen."""

    def __init__(self, wanted: int | None) -> None:
        self.count = 0
        self.wanted = wanted
        self.mark = MARK if wanted is None else wanted // 20
        self.marks: list[tuple[int, float]] = []
        """So many events at that time."""
        self.done = asyncio.Event()
        self.arrivals = array("d")
        self.latencies = array("d")

    async def handle(self, event: Event) -> None:
        _ = event.data_bytes
        self.count += 1
        if not self.count % self.mark:
            self._note()

    async def handle_stamped(self, event: Event) -> None:
        await self.handle(event)
        now = time.monotonic()
        (produced,) = struct.unpack("!d", (event.data_bytes or b"")[:8])
        self.arrivals.append(now)
        self.latencies.append((now - produced) * 1000)

    def _note(self) -> None:
        self.marks.append((self.count, time.monotonic()))
        if self.count == self.wanted:
            self.done.set()


async def read(
    parent: Parent,
    dsn: str,
    *,
    subscriptions: int = 1,
    wanted: int | None = None,
    is_stamped: bool = False,
    poll_interval: float = 1.0,
    **options: Any,
) -> None:
    """Dispatch to some subscriptions. Tells when it has handled `wanted` events, or else when all of them run."""
    seen = Seen(wanted)
    async with Backend(dsn, poll_interval=poll_interval) as backend:
        for number in range(subscriptions):
            await backend.subscribe(f"reader {number}", seen.handle_stamped if is_stamped else seen.handle, **options)
        if wanted is None:
            await _all_run(backend)
        else:
            await seen.done.wait()
        parent.tell(count=seen.count)
        while await parent.order() == "report":
            parent.tell(marks=seen.marks, arrivals=list(seen.arrivals), latencies=list(seen.latencies))


async def _all_run(backend: Backend) -> None:
    while any(one.state not in {"running", "elsewhere"} for one in (await backend.status()).subscriptions):  # noqa: ASYNC110 - it can only be polled
        await asyncio.sleep(0.05)


async def produce_batches(parent: Parent, dsn: str, *, count: int, size: int, batch: int) -> None:
    """Produce in batches, and tell how long it took."""
    events = [_event(os.urandom(size)) for _ in range(batch)]

    async def produce(backend: Backend) -> None:
        for _ in range(0, count, batch):
            await backend.produce_many(events)

    await _timed(parent, dsn, produce)


async def produce_singly(parent: Parent, dsn: str, *, count: int, size: int, at_once: int) -> None:
    """Produce one by one in a number of tasks, and tell how long it took."""
    event = _event(os.urandom(size))
    numbers = iter(range(count))

    async def produce(backend: Backend) -> None:
        async def some() -> None:
            for _ in numbers:
                await backend.produce(event)

        await asyncio.gather(*(some() for _ in range(at_once)))

    await _timed(parent, dsn, produce)


async def _timed(parent: Parent, dsn: str, produce: Callable[[Backend], Awaitable[None]]) -> None:
    async with Backend(dsn) as backend:
        began = time.monotonic()
        await produce(backend)
        parent.tell(seconds=time.monotonic() - began)
        await parent.order()


async def produce_at(parent: Parent, dsn: str, *, rate: float, size: int) -> None:
    """Produce one after the other at this rate until the process is to end."""
    padding = os.urandom(size - 8)
    ending = asyncio.create_task(parent.order())
    async with Backend(dsn) as backend:
        parent.tell(ready=True)
        due = time.monotonic()
        while not ending.done():
            if (wait := due - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            await backend.produce(_event(struct.pack("!d", time.monotonic()) + padding))
            # Make up for sleeps that took too long, but not for a server that stood still.
            due = max(due + 1 / rate, time.monotonic() - 0.1)


async def insert(parent: Parent, dsn: str, *, connections: int, size: int) -> None:
    """Insert on each connection in plain SQL, one event after the other. Begins with the first `report`."""
    padding = os.urandom(size - 8)
    opened = [await asyncpg.connect(dsn) for _ in range(connections)]
    count = 0

    async def repeat(connection: Any) -> None:
        nonlocal count
        statement = await connection.prepare(_INSERT)
        while True:
            await statement.fetch(struct.pack("!d", time.monotonic()) + padding)
            count += 1

    parent.tell(ready=True)
    await parent.order()
    inserting = asyncio.gather(*(repeat(connection) for connection in opened))
    while True:
        parent.tell(count=count, at=time.monotonic())
        if await parent.order() != "report":
            break
    inserting.cancel()
    await asyncio.gather(inserting, return_exceptions=True)
    for connection in opened:
        await connection.close()


def _event(data: bytes) -> CloudEvent:
    attributes = {"source": "/pgbackend/scale", "type": "com.example.order.created", "subject": "order-1"}
    moment = datetime(2025, 1, 1, tzinfo=UTC)
    return CloudEvent({**attributes, "time": moment, "datacontenttype": "application/octet-stream"}, data)


ROLES: dict[str, Callable[..., Awaitable[None]]] = {
    role.__name__: role for role in (read, produce_batches, produce_singly, produce_at, insert)
}


async def main() -> None:
    parent = Parent()
    await parent.connect()
    options = json.loads(sys.argv[1])
    await ROLES[options.pop("role")](parent, os.environ["PGBACKEND_DSN"], **options)


if __name__ == "__main__":
    uvloop.run(main())
