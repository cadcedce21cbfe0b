"""Targets: real HTTP servers that keep their requests, and answer as a test tells them."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import monotonic

from aiohttp import web

from pgbackend.codec import wire
from pgbackend.codec.event import Event


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request, as it arrived."""

    path: str
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    port: int
    """The sender's port, which identifies its connection."""
    at: float = field(default_factory=monotonic)

    def header(self, name: str) -> str | None:
        """The header of that name; None without one. There must not be two."""
        found = [value for key, value in self.headers if key.lower() == name.lower().encode()]
        assert len(found) <= 1, f"{name} occurs {len(found)} times"
        return found[0].decode() if found else None

    def event(self) -> Event:
        """The event in the request, in either mode."""
        if wire.mode_of(self.header("content-type")) == "structured":
            return wire.parse_structured(self.body)
        return wire.parse_binary(self.headers, self.body)


Answer = Callable[[Request], Awaitable[web.StreamResponse] | web.StreamResponse]


class Target:
    """Answers 204, unless `answer` says otherwise."""

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[Request] = []
        self.answer: Answer = lambda request: web.Response(status=204)
        self._arrived = asyncio.Condition()

    async def wait(self, count: int, timeout: float = 60.0) -> list[Request]:
        """The requests, once there are `count` of them."""
        try:
            async with asyncio.timeout(timeout), self._arrived:
                await self._arrived.wait_for(lambda: len(self.requests) >= count)
        except TimeoutError:
            raise TimeoutError(f"{len(self.requests)} of {count} requests arrived within {timeout} s") from None
        return self.requests

    def ids(self) -> list[str]:
        """The ids of the events that arrived, in order."""
        return [request.event().id for request in self.requests]

    async def _take(self, raw: web.Request) -> web.StreamResponse:
        assert raw.transport is not None
        port = raw.transport.get_extra_info("peername")[1]
        request = Request(path=raw.raw_path, headers=tuple(raw.raw_headers), body=await raw.read(), port=port)
        async with self._arrived:
            self.requests.append(request)
            self._arrived.notify_all()
        answer = self.answer(request)
        return await answer if isinstance(answer, Awaitable) else answer


def failing(target: Target, status: int, *, times: int, **headers: str) -> None:
    """The target answers the first `times` requests with this status."""
    target.answer = lambda request: web.Response(
        status=status if len(target.requests) <= times else 204,
        headers={name.replace("_", "-"): value for name, value in headers.items()},
        body=b"no" if len(target.requests) <= times else b"",
    )


def holding(target: Target) -> asyncio.Event:
    """The target answers nothing until the event is set."""
    released = asyncio.Event()

    async def answer(request: Request) -> web.Response:
        await released.wait()
        return web.Response(status=204)

    target.answer = answer
    return released


@asynccontextmanager
async def listening(bound: socket.socket | None = None) -> AsyncIterator[Target]:
    """A target that listens on any port of this machine, or on the socket `bound`, which it closes."""
    target = Target()
    application = web.Application(client_max_size=1 << 26)
    application.router.add_route("*", "/{path:.*}", target._take)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0) if bound is None else web.SockSite(runner, bound)
        await site.start()
        target.url = f"http://127.0.0.1:{runner.addresses[0][1]}/"
        yield target
    finally:
        await runner.cleanup()


@asynccontextmanager
async def raw_server(
    talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[str]:
    """The URL of a server whose connections `talk` handles byte by byte, for answers that are not proper HTTP."""
    conversations: set[asyncio.Task[None]] = set()

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        conversations.add(task)
        try:
            await talk(reader, writer)
        except (ConnectionError, EOFError, asyncio.CancelledError):
            pass  # the client has closed the connection, or the test has ended
        finally:
            conversations.discard(task)
            writer.close()

    server = await asyncio.start_server(converse, "127.0.0.1", 0)
    try:
        port = server.sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.close()
        for task in conversations:
            task.cancel()
        while conversations:
            await asyncio.sleep(0)


async def read_request(reader: asyncio.StreamReader) -> bytes:
    """Head and body of one request with a Content-Length."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    return head + await reader.readexactly(length)
