"""One connection to a target: aiohttp's protocol class with bounds on what a target may send.

aiohttp bounds neither interim answers nor framing, and takes unrequested bytes as the answer to the next request. The
promise: a connection gives each request its own answer or an error, and a hostile answer costs little.
"""

import re
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler

_INTERIM_ANSWERS = 8
"""Informational (1xx) answers to one request. Go's client takes 5."""
_EMPTY_LINES = 8
"""Bytes of line ends before a status line. Some servers send one line end too many after a body."""
_HEAD_BYTES = 1 << 16
"""From the request to the end of the answer's head, interim answers included."""
_FRAMING_BYTES = 1 << 16
"""Head, chunk sizes and trailers of an answer, beyond one byte of them for each byte of the body."""
_COPIED_BYTES = 1 << 16
"""A larger body is not copied behind its head, which saves a system call."""
_PIECE_BYTES = 1 << 14
"""The part of a body that the parser gets at a time. In 256 KiB it finds 40,000 chunks, and blocks for 0.1 s."""

_empty_lines = re.compile(rb"[\r\n]*").match
_end_of_head = re.compile(rb"\n\r?\n").search


class StaleConnectionError(aiohttp.ServerDisconnectedError):
    """The target closed an idle connection just when it was used again. It may not have seen the request."""


class TargetConnection(ResponseHandler):
    """One connection to a target, which answers one request after the other."""

    def __init__(self, loop: Any) -> None:
        super().__init__(loop)
        self._requests = 0
        self._answers = 0
        self._interim = 0
        self._received = 0
        """Bytes since the request."""
        self._empty = 0
        """Bytes of line ends before the status line."""
        self._head = b""
        """The last bytes of a head that has not ended yet."""

    def send(self, head: bytes, body: bytes) -> None:
        """Send a request, whose answer `read()` returns. Raises aiohttp's errors."""
        transport = self.transport
        if transport is None or transport.is_closing():
            raise aiohttp.ClientConnectionResetError("The target closed the connection before the request.")
        self._requests += 1
        self._interim = self._received = self._empty = 0
        self.set_response_params(read_until_eof=True, auto_decompress=False)
        if len(body) <= _COPIED_BYTES:
            transport.write(head + body)
        else:
            transport.write(head)
            transport.write(body)

    def expire(self) -> None:
        """The time is up: whatever waits for the target fails with TimeoutError."""
        error = TimeoutError()
        if self._payload is not None:
            self._payload.set_exception(error)
        self.set_exception(error)

    def data_received(self, data: bytes) -> None:
        if not data:
            super().data_received(data)  # aiohttp resumes with data that it held back
        start = 0
        while start < len(data) and self.exception() is None:
            if self._answers < self._requests:
                start = self._feed_head(data, start)
            elif self._is_answered():
                # aiohttp would keep these bytes as the answer to the next request.
                self._give_up("sends more than its answer")
            else:
                start = self._feed_body(data, start)

    def _feed_head(self, data: bytes, start: int) -> int:
        """Give the parser one head, or the part of it that has come. Return where the rest begins.

        The parser must not get more: it creates an object for each interim answer before we can count them, and it
        drops the whole answer when bytes follow that must not, such as a body after a 204.
        """
        if not self._head:
            empty = _empty_lines(data, start)
            assert empty is not None  # noqa: S101 - the pattern matches nothing as well
            self._empty += empty.end() - start
            if self._empty > _EMPTY_LINES:
                self._give_up("sends empty lines before its answer")
                return start
            start = empty.end()
        # The end of the head may be split over two pieces of data.
        seam = _end_of_head(self._head + data[start : start + 2])
        if seam is not None:
            end = start + seam.end() - len(self._head)
        else:
            found = _end_of_head(data, start)
            end = len(data) if found is None else found.end()
        if start < end:
            whole = seam is not None or found is not None
            self._head = b"" if whole else (self._head + data[max(start, end - 2) : end])[-2:]
            self._received += end - start
            super().data_received(data[start:end])
        if self._answers < self._requests and self._received > _HEAD_BYTES and self.exception() is None:
            self._give_up(f"sends more than {_HEAD_BYTES} bytes before the body of its answer")
        return end

    def _feed_body(self, data: bytes, start: int) -> int:
        """Give the parser the next piece of a body. Return where the rest begins."""
        end = min(len(data), start + _PIECE_BYTES)
        self._received += end - start
        super().data_received(data[start:end])
        payload = self._payload
        # While nobody reads the body, the parser holds data back, which must not count as framing.
        if payload is None or self._reading_paused or self.exception() is not None:
            return end
        if self._received - 2 * payload.total_bytes > _FRAMING_BYTES:
            self._give_up("sends more framing than body", payload)
        return end

    def _is_answered(self) -> bool:
        """Whether the last request has its whole answer."""
        return 0 < self._requests == self._answers and (self._payload is None or self._payload.is_eof())

    def feed_data(self, data: Any, size: int = 0) -> None:
        """Count the answer that the parser found, and pass it on."""
        status = data[0].code
        if self._answers == self._requests:
            self._give_up("answers without a request")
        elif 100 <= status < 200 and status != 101:
            self._interim += 1
            if self._interim > _INTERIM_ANSWERS:
                self._give_up("sends interim answers and no final one")
        else:
            self._answers += 1
        super().feed_data(data, size)

    def set_exception(self, exc: BaseException, *cause: BaseException) -> None:
        was_idle = 0 < self._answers == self._requests - 1
        if was_idle and isinstance(exc, aiohttp.ServerDisconnectedError | aiohttp.ClientOSError):
            exc = StaleConnectionError(str(exc))
        super().set_exception(exc, *cause)

    def _give_up(self, reason: str, payload: aiohttp.StreamReader | None = None) -> None:
        error = aiohttp.ClientConnectionError(reason)
        if payload is not None:
            payload.set_exception(error)
        self.set_exception(error)
        if self.transport is not None:
            self.transport.abort()


async def read(content: aiohttp.StreamReader, limit: int, *, into: bytearray) -> None:
    """Add the body to `into` until that holds `limit` bytes. Raises aiohttp's errors when the body breaks off."""
    while len(into) < limit and (piece := await content.read(limit - len(into))):
        into += piece
