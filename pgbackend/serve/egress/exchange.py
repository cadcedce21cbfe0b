"""A POST request to a target, and the response to it.

`dispatcher` opens an `Exchange` for each attempt, over a connection of the `Pool`. Pool, connections and parser are
aiohttp's. Its session is not used: with objects for each request, response, timeout and body, and a task for each body,
it takes 62 µs of CPU time a request, and this takes 28 (benchmarks/delivery.py: 110 → 60 µs an event). The promise:
every wait ends at the exchange's deadline, and a connection is used again only if request and response are complete.
"""

import asyncio
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self, cast

import aiohttp
from aiohttp.connector import Connection
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

from pgbackend.serve.egress.connections import Pool

if TYPE_CHECKING:
    from pgbackend.serve.egress.protocol import TargetConnection

_DEFAULTS = {"User-Agent": "pgbackend", "Accept": "*/*", "Accept-Encoding": "identity"}
"""Headers of all requests, unless the configuration sets them. Bodies must come uncompressed."""
_UNSENT_BYTES = 1 << 20
"""The part of a request that may still be sent after its response: some targets answer before they read all of it."""


class Response(NamedTuple):
    """The head of a response, and its body, which may still be arriving."""

    status: int
    headers: Mapping[str, str]
    raw_headers: tuple[tuple[bytes, bytes], ...]
    content: aiohttp.StreamReader

    @property
    def content_length(self) -> int | None:
        """Its Content-Length, which the parser has checked."""
        length = self.headers.get("Content-Length")
        return None if length is None else int(length)


class Line:
    """The way to one URL: where requests connect to, and how they begin."""

    def __init__(self, pool: Pool, url: URL, *, given: Iterable[str] = ()) -> None:
        """`given`: names of headers that each request has by itself."""
        self.pool = pool
        self.request = pool.request_to(url)
        self.key = self.request.connection_key
        names = {name.lower() for name in given}
        self._beginning = [f"POST {url.raw_path_qs} HTTP/1.1", f"Host: {url.host_port_subcomponent}"]
        self._beginning += [f"{name}: {value}" for name, value in _DEFAULTS.items() if name.lower() not in names]

    def head(self, headers: Iterable[tuple[str, str]], length: int) -> bytes:
        """The head of a request with a body of this length. Raises ValueError if a header breaks out of its line."""
        lines = [*self._beginning, *[f"{name}: {value}" for name, value in headers], f"Content-Length: {length}\n\n"]
        text = "\n".join(lines)
        if text.count("\n") > len(lines) + 1 or "\r" in text or "\0" in text:
            raise ValueError("a header has a line break or a null byte")
        return text.replace("\n", "\r\n").encode()


class Exchange:
    """One request over `line` and its response, which end at the `deadline` of the loop's clock."""

    __slots__ = ("_answered", "_connection", "_deadline", "_line", "_timer")

    _connection: Connection

    def __init__(self, line: Line, *, deadline: float) -> None:
        self._line = line
        self._deadline = deadline
        self._timer: asyncio.TimerHandle | None = None
        self._answered = False

    async def __aenter__(self) -> Self:
        """There is a connection. Raises aiohttp's errors and TimeoutError."""
        line = self._line
        self._connection = await line.pool.take(line.request, line.key, deadline=self._deadline)
        return self

    async def post(self, head: bytes, body: bytes) -> Response:
        """The head of the response. Raises aiohttp's errors and TimeoutError; so does reading its body."""
        connection = cast("TargetConnection", self._connection.protocol)
        # One timer that fails whatever waits for the target: a timeout around each wait takes 3 µs more.
        self._timer = asyncio.get_running_loop().call_at(self._deadline, connection.expire)
        connection.send(head, body)
        try:
            message, content = await connection.read()
            while 100 <= message.code < 200 and message.code != 101:
                message, content = await connection.read()
        except HttpProcessingError as error:
            raise aiohttp.ClientConnectionError(error.message) from None
        self._answered = True
        return Response(message.code, message.headers, message.raw_headers, content)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """The connection is idle, or closed if anything of the request or of the response is missing."""
        if self._timer is not None:
            self._timer.cancel()
        connection = self._connection
        transport = connection.transport
        unsent = 0 if transport is None else transport.get_write_buffer_size()
        if self._answered and not unsent:
            connection.release()
            return
        if transport is not None and unsent > (_UNSENT_BYTES if self._answered else 0):
            transport.abort()  # close() would keep the rest in memory for a target that never reads it
        connection.close()
