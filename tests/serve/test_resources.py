"""The broker's memory under floods of every kind, measured, while other clients are served."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import trustme

from tests.serve.support.broker import HEADERS
from tests.serve.support.process import Process, post, running
from tests.support.polling import eventually

pytestmark = pytest.mark.slow

HEAD = b"POST / HTTP/1.1\r\nHost: localhost\r\n" + b"".join(
    f"{name}: {value}\r\n".encode() for name, value in HEADERS.items()
)
MIB = 1 << 20


class Victim:
    """A broker in a process of its own."""

    def __init__(self, process: Process, url: str) -> None:
        self.url = url
        self.host, self.port = urlsplit(url).hostname or "", urlsplit(url).port or 0
        self._flooding: list[asyncio.StreamWriter] = []
        self._statm = Path(f"/proc/{process.process.pid}/statm")
        self.before = self.memory()

    def memory(self) -> int:
        """Bytes of resident memory."""
        return int(self._statm.read_text().split()[1]) * 4096

    def grown(self) -> int:
        """Bytes of resident memory gained since the beginning."""
        return self.memory() - self.before

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self.host, self.port)

    async def flood(self, count: int, sent: bytes) -> list[asyncio.StreamWriter]:
        """Open `count` connections that send this, as far as the broker reads it, and read nothing."""
        writers = []
        for _ in range(count):
            connection = socket.create_connection((self.host, self.port))
            # It reads nothing, so the answers stay with the broker.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.setblocking(False)
            _, writer = await asyncio.open_connection(sock=connection, limit=1)
            writer.transport.pause_reading()  # type: ignore[attr-defined]  # a transport that can read
            writer.write(sent)
            writers.append(writer)
            self._flooding.append(writer)
        return writers

    def hang_up(self) -> None:
        """Abort all flooding connections; open sockets would be warnings in another test."""
        for writer in self._flooding:
            writer.transport.abort()

    async def serves(self) -> None:
        async with asyncio.timeout(60):
            assert await post(self.url) == 202

    async def settled(self) -> int:
        """The growth once it has stopped, while the broker still serves."""
        grown = [self.grown()]

        async def rests() -> bool:
            await self.serves()
            grown.append(self.grown())
            return len(grown) > 5 and max(grown[-5:]) - min(grown[-5:]) < MIB

        await eventually("its memory stays the same", rests, timeout=120.0, interval=0.2)
        return max(grown)


@asynccontextmanager
async def attacked(database: str) -> AsyncIterator[Victim]:
    async with running("--dsn", database, "--port", "0", "--config-inline", "{}") as process:
        victim = Victim(process, await process.listening())
        for _ in range(20):
            await victim.serves()
        victim.before = victim.memory()
        try:
            yield victim
        finally:
            victim.hang_up()
            await asyncio.sleep(0)  # they close in the next step of the loop


async def test_thousands_of_idle_connections_cost_little_each(database: str) -> None:
    async with attacked(database) as victim:
        idle = [await victim.connect() for _ in range(3000)]
        for _, writer in idle[::2]:
            writer.write(HEAD + b"Content-Length: 0\r\n\r\n")
        for reader, _ in idle[::2]:
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 202 ")
        assert await victim.settled() < 3000 * 15_000
        for _, writer in idle:
            writer.close()


async def test_slow_bodies_are_held_up_to_a_bound_and_more_are_refused(database: str) -> None:
    async with attacked(database) as victim:
        body = b"x" * 900_000
        writers = await victim.flood(400, HEAD + b"Content-Length: 1000000\r\n\r\n" + body)
        assert await victim.settled() < 256 * MIB * 1.5
        for writer in writers:
            writer.transport.abort()
        await victim.serves()


async def test_endless_headers_are_not_kept(database: str) -> None:
    async with attacked(database) as victim:
        writers = await victim.flood(500, HEAD + b"X: " + b"x" * 60_000)
        more = await victim.flood(100, HEAD + b"x: y\r\n" * 200_000)
        assert await victim.settled() < 500 * 150_000
        for writer in writers + more:
            writer.transport.abort()


@pytest.mark.parametrize(
    "request_",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        HEAD + b"Content-Length: 0\r\n\r\n",
        HEAD + b"Content-Encoding: identity\r\nContent-Length: 10000\r\n\r\n" + b"x" * 10_000,
    ],
    ids=["without a body", "short", "long"],
)
async def test_pipelined_requests_with_unread_answers_are_bounded(request_: bytes, database: str) -> None:
    async with attacked(database) as victim:
        writers = await victim.flood(300, request_ * (2 * MIB // len(request_)))
        assert await victim.settled() < 150 * MIB
        for writer in writers:
            writer.transport.abort()
        await victim.serves()


async def test_idle_tls_connections_cost_little_each(database: str, tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    both = tmp_path / "tls.pem"
    both.write_bytes(issued.private_key_and_cert_chain_pem.bytes())
    context = ssl.create_default_context()
    authority.configure_trust(context)
    async with running("--dsn", database, "--port", "0", "--config-inline", "{}", "--tls-cert", str(both)) as process:
        victim = Victim(process, await process.listening())
        idle = [await asyncio.open_connection(victim.host, victim.port, ssl=context) for _ in range(300)]
        assert victim.grown() < 300 * 250_000
        shaking = [await victim.connect() for _ in range(300)]
        reader, writer = idle[-1]
        writer.write(HEAD + b"Content-Length: 0\r\nConnection: close\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 202 ")
        assert victim.grown() < 600 * 250_000
        for _, writer in idle + shaking:
            writer.transport.abort()
