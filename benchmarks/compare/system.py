"""The questions that the comparison asks of each system, and the events that all of them get.

A system has a fresh log (or queue) for each measurement, a producer and a consumer. Producers and consumers run in
processes of their own: see `child.py`. Every event is the same 500 bytes for every system: a CloudEvent in the JSON
format.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Literal, Protocol

EVENT_BYTES = 500
PAGE = 1_000
"""Events in a batch that is produced, and in a page that is read."""

_STAMP = b'"sent":"'
_STAMP_BYTES = 20
_HEAD = (
    '{"specversion":"1.0","id":"00000000-0000-4000-8000-%012d","source":"/shop","type":"order.created",'
    '"datacontenttype":"application/json","data":{"sent":"%020.9f","note":"'
)

Count = Callable[[bytes], None]
"""The function that each system's handler calls with an event's data."""


class CompareError(Exception):
    """A measurement that gives no figure. Its message stands in the table."""


class Server(Protocol):
    """A server that stays up during the whole run."""

    def missing(self) -> str | None:
        """Why it cannot run here, and what to install. None when it can."""

    def running(self, directory: Path) -> AbstractAsyncContextManager[str]:
        """The server's address while it runs, with its data in this directory."""


class Producer(Protocol):
    """An open producer. Both methods return once the system has acknowledged the events."""

    async def one(self, event: Any, /) -> None: ...

    async def many(self, events: Sequence[Any], /) -> None: ...


class System(Protocol):
    """One row of the table."""

    title: str
    kind: Literal["log", "queue"]
    """Whether each consumer of a log reads all events, or the consumers of a queue share them."""
    durability: str
    """The durability of an acknowledged event, as the report describes it."""
    mode: str
    """The settings that were chosen, for the readers of the table."""
    server: Server

    async def versions(self, server: str, /) -> str:
        """The versions of server, extension and client."""

    def fresh(self, server: str, readers: Sequence[str], /) -> AbstractAsyncContextManager[str]:
        """The address of a new log that keeps all events for these readers. It is deleted afterwards."""

    def events(self, bodies: Sequence[bytes], /) -> list[Any]:
        """The events as a user of this system has them ready before producing."""

    def producer(self, address: str, tasks: int, /) -> AbstractAsyncContextManager[Producer]:
        """A producer for so many concurrent tasks."""

    def consumer(self, address: str, reader: str, count: Count, /) -> AbstractAsyncContextManager[None]:
        """A consumer that calls an async handler, which calls `count`. What it handled is acknowledged at the end."""

    async def settle(self, address: str, /) -> None:
        """Do what the system does by itself when a filled log rests for a minute, such as vacuum."""

    async def left(self, address: str, readers: Sequence[str], /) -> int:
        """How many events these readers have not acknowledged, all readers together."""


def body(number: int, sent: float = 0.0) -> bytes:
    """The event of this number, which was sent at this time of `time.monotonic()`."""
    head = _HEAD % (number, sent)
    return f'{head}{"x" * (EVENT_BYTES - len(head) - 3)}"}}}}'.encode()


def sent_at(data: bytes) -> float:
    """The time in an event, or in its data alone."""
    begin = data.index(_STAMP) + len(_STAMP)
    return float(data[begin : begin + _STAMP_BYTES])
