"""A way to a server that looks like a pooler's: it tells its clients another process id than their backend's."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from urllib.parse import parse_qsl, urlsplit

_BACKEND_KEY, _READY = b"K", b"Z"


@asynccontextmanager
async def pooled(dsn: str) -> AsyncIterator[str]:
    """A DSN of the same database through the relay. The server listens on a Unix socket."""
    parts = urlsplit(dsn)
    options = dict(parse_qsl(parts.query))
    socket = f"{options['host']}/.s.PGSQL.{options['port']}"

    async def serve(client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        server, to_server = await asyncio.open_unix_connection(socket)
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            async with asyncio.TaskGroup() as group:
                group.create_task(_copy(client, to_server))
                group.create_task(_answer(server, to_client))
        to_server.close()
        to_client.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as relay:
        port = relay.sockets[0].getsockname()[1]
        yield parts._replace(netloc=f"postgres@127.0.0.1:{port}", query="sslmode=disable").geturl()


async def _answer(server: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
    """Pass the start of a session on with another process id, and then everything as it is."""
    kind = b""
    while kind != _READY:
        kind = await server.readexactly(1)
        size = await server.readexactly(4)
        body = await server.readexactly(int.from_bytes(size, "big") - 4)
        if kind == _BACKEND_KEY:
            body = (int.from_bytes(body[:4], "big") + 1).to_bytes(4, "big") + body[4:]
        to_client.write(kind + size + body)
    await _copy(server, to_client)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()
