"""A network that fails on demand: a proxy in front of PostgreSQL that cuts, stalls and restores connections.

It passes bytes unchanged. `cut()`, `stall()` and `restore()` act at once; `lose_reply_to()` acts when its bytes pass.
"""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self

from pgbackend.postgres.dsn import Target, build_dsn, parse_dsn


class Proxy:
    """Forwards to the server of `dsn` while entered. Clients use `proxy.dsn`."""

    def __init__(self, dsn: str, *, swallow_notifies: bool = False) -> None:
        """`swallow_notifies`: drop what NOTIFY sends to listeners."""
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
        """How many connections it has forwarded."""

    @property
    def dsn(self) -> str:
        """The target's DSN, through this proxy.

        Without TLS unless the DSN demands it, because the proxy cannot read what is encrypted. The host name is not
        verified, because it is the proxy's.
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
        # A test that fails while the proxy is stalled must not wait here for ever.
        self._flowing.set()
        while self._links:
            await asyncio.wait([link.done for link in self._links])
        await self._server.wait_closed()

    def cut(self) -> None:
        """Reset every connection, and every new one until `restore()`."""
        self._refusing = True
        for link in self._links:
            link.abort()

    def reset(self) -> None:
        """Reset every connection. New ones get through."""
        self.cut()
        self._refusing = False

    def stall(self) -> None:
        """Pass nothing in either direction until `restore()`. No connection is closed."""
        self._flowing.clear()

    def strand(self) -> None:
        """Pass nothing on the present connections any more, without closing them. New ones work."""
        for link in self._links:
            link.stranded = True

    def restore(self) -> None:
        """Let new connections through, and pass on what was held up. No reply is lost any more."""
        self._refusing = False
        self._fatal = None
        self._flowing.set()

    def redirect(self, dsn: str) -> None:
        """Reset every connection. New ones lead to the server of `dsn`."""
        self._target = dsn
        self.reset()

    def lose_reply_to(self, marker: bytes) -> None:
        """Pass the next request that contains `marker` to the server, and break its connection before the answer.

        A request is what arrives in one read, so a marker should be short and come from one statement.
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
        # Checked last, because a cut during connecting counts.
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
        # uvloop raises RuntimeError for a closed transport.
        with suppress(OSError, RuntimeError):
            while data := await reader.read(1 << 16):
                await self._flowing.wait()
                if link.stranded:
                    continue
                if requests and self._fatal and self._fatal in data:
                    self._fatal = None
                    link.mute = True
                if link.mute and not requests:
                    # The server has answered, so the statement has taken effect. Its answer is lost.
                    self._struck.set()
                    break
                if self._swallow_notifies and not requests:
                    data = notifies.remove(data)
                writer.write(data)
                await writer.drain()
        if requests and not link.mute:
            with suppress(OSError, RuntimeError):
                writer.write_eof()
            return
        link.abort()


@contextmanager
def vanished() -> Iterator[int]:
    """A port that never answers, as if its machine were gone: a connection is not even refused."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        port = silent.getsockname()[1]
        # Fill the queue of connections that nothing accepts. The kernel drops further ones.
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
    """Removes NotificationResponse messages from what a server sends. A message is a type byte, a length, the rest."""

    def __init__(self) -> None:
        self._rest = b""

    def remove(self, data: bytes) -> bytes:
        """Return the data without them, up to the last whole message."""
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
