"""A network that fails on demand: a proxy in front of PostgreSQL that cuts, stalls and restores connections."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self

from pgbackend.postgres.dsn import Target, build_dsn, parse_dsn


class Proxy:
    """Forwards to the server of `dsn` while entered; clients use `proxy.dsn`.

    Passes bytes unchanged. `cut()`, `stall()` and `restore()` act at once; `lose_reply_to()` acts when its bytes pass.
    """

    def __init__(self, dsn: str, *, swallow_notifies: bool = False) -> None:
        """`swallow_notifies`: everything passes but what NOTIFY sends to listeners."""
        self._target = dsn
        self._swallow_notifies = swallow_notifies
        self._server: asyncio.Server | None = None
        self._links: set[_Link] = set()
        self._refusing = False
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._fatal: bytes | None = None
        self._struck = asyncio.Event()
        self.accepted = 0
        """Connections that were forwarded so far."""

    @property
    def dsn(self) -> str:
        """The target's DSN, through this proxy.

        Without TLS unless the DSN demands it: what is encrypted the proxy does not see. The server is not checked to be
        the one of the name, which is this proxy's here.
        """
        assert self._server, "enter the proxy first"  # noqa: S101
        host, port = self._server.sockets[0].getsockname()[:2]
        options = parse_dsn(self._target)
        mode = {"require": "require", "verify-ca": "verify-ca", "verify-full": "verify-ca"}.get(
            options.get("sslmode", ""), "disable"
        )
        own = {"host": host, "port": str(port), "sslmode": mode}
        return build_dsn({name: value for name, value in options.items() if name != "hostaddr"} | own)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._server  # noqa: S101 - it was entered
        self._server.close()
        self.cut()
        # Whoever fails while it is stalled must not wait here for ever.
        self._flowing.set()
        while self._links:
            await asyncio.wait([link.done for link in self._links])
        await self._server.wait_closed()

    def cut(self) -> None:
        """Every connection is reset, new ones too, until `restore()`."""
        self._refusing = True
        for link in self._links:
            link.abort()

    def reset(self) -> None:
        """Every connection is reset; new ones get through."""
        self.cut()
        self._refusing = False

    def stall(self) -> None:
        """Nothing passes in either direction, and nobody is told, until `restore()`."""
        self._flowing.clear()

    def strand(self) -> None:
        """What is connected now is lost without a word: nothing passes any more, and nobody is told. New ones work."""
        for link in self._links:
            link.stranded = True

    def restore(self) -> None:
        """New connections get through, and what was held up flows on."""
        self._refusing = False
        self._flowing.set()

    def lose_reply_to(self, marker: bytes) -> None:
        """The next request that contains `marker` reaches the server, but its connection dies before the answer.

        A request here is what arrives in one read: markers should be short and come from one statement.
        """
        self._fatal = marker
        self._struck.clear()

    async def struck(self, timeout: float = 10.0) -> None:
        """Return once `lose_reply_to()` has happened."""
        async with asyncio.timeout(timeout):
            await self._struck.wait()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            upstream = await self._connect()
        except OSError:
            writer.transport.abort()
            return
        link = _Link(writer, upstream[1])
        self._links.add(link)
        # Looked at last: a cut that came while connecting counts.
        if self._refusing:
            link.abort()
        else:
            self.accepted += 1
        try:
            await asyncio.gather(
                self._forward(reader, upstream[1], link, requests=True),
                self._forward(upstream[0], writer, link, requests=False),
            )
        finally:
            link.abort()
            link.done.set_result(None)
            self._links.discard(link)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host = Target.of(self._target).hosts[0]
        name, port = host.address or host.name or "localhost", host.port or 5432
        if name.startswith("/"):
            return await asyncio.open_unix_connection(f"{name}/.s.PGSQL.{port}")
        return await asyncio.open_connection(name, port)

    async def _forward(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, link: "_Link", *, requests: bool
    ) -> None:
        notifies = _Notifies()
        # A transport that is closed says RuntimeError on uvloop.
        with suppress(OSError, RuntimeError):
            while data := await reader.read(1 << 16):
                await self._flowing.wait()
                if link.stranded:
                    continue
                if requests and self._fatal and self._fatal in data:
                    self._fatal = None
                    link.mute = True
                if link.mute and not requests:
                    # The server has answered, so it has done its part; its answer is lost.
                    self._struck.set()
                    break
                if self._swallow_notifies and not requests:
                    data = notifies.take_out(data)
                writer.write(data)
                await writer.drain()
        if requests and not link.mute:
            with suppress(OSError, RuntimeError):
                writer.write_eof()
            return
        link.abort()


@contextmanager
def vanished() -> Iterator[int]:
    """A port behind which there is no machine any more: whoever connects gets no answer, not even a refusal."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        port = silent.getsockname()[1]
        # Nobody accepts: what comes when the queue is full is dropped.
        waiting = [socket.socket() for _ in range(4)]
        try:
            for each in waiting:
                each.setblocking(False)
                each.connect_ex(("127.0.0.1", port))
            yield port
        finally:
            for each in waiting:
                each.close()


class _Link:
    """One client's connection and its continuation to the server."""

    def __init__(self, *writers: asyncio.StreamWriter) -> None:
        self._writers = writers
        self.mute = False
        self.stranded = False
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def abort(self) -> None:
        for writer in self._writers:
            writer.transport.abort()


class _Notifies:
    """Takes NotificationResponse messages out of what a server sends: a type byte, a length, the rest."""

    def __init__(self) -> None:
        self._rest = b""

    def take_out(self, data: bytes) -> bytes:
        """The data without them, up to the last message that is whole."""
        self._rest += data
        kept, start = [], 0
        while len(self._rest) >= start + 5:
            end = start + 1 + int.from_bytes(self._rest[start + 1 : start + 5])
            if len(self._rest) < end:
                break
            if self._rest[start : start + 1] != b"A":
                kept.append(self._rest[start:end])
            start = end
        self._rest = self._rest[start:]
        return b"".join(kept)
