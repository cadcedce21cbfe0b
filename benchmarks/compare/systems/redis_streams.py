"""Redis Streams with an append-only file that is synced before each answer, and redis-py with its parser in C.

XADD for one event and a pipeline for a batch. Each reader is a consumer group that gets pages by XREADGROUP and
acknowledges each page by one XACK.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any, Literal

import redis.asyncio
import redis.exceptions

from benchmarks.compare.system import PAGE, Count
from benchmarks.compare.systems import own_server
from benchmarks.compare.systems.consuming import WAIT, consuming

_STREAM = "events"


class RedisStreams:
    title = "Redis Streams (fsync always)"
    kind: Literal["log", "queue"] = "log"
    durability = "fsync before each acknowledgement (`appendfsync always`)"
    mode = f"Unix socket; pipelines of {PAGE:,}; XREADGROUP COUNT {PAGE:,}, an XACK for each page; no rewrites"
    server = own_server.OwnServer("redis-server", "apt-get install redis-server")

    async def versions(self, server: str) -> str:
        del server
        said = (await self.server.version()).split()
        number = next(word.removeprefix("v=") for word in said if word.startswith("v="))
        return f"Redis {number}, redis-py {version('redis')}, hiredis {version('hiredis')}"

    @asynccontextmanager
    async def fresh(self, server: str, readers: Sequence[str]) -> AsyncIterator[str]:
        async with own_server.fresh_directory(server) as directory:
            address = str(directory / "socket")
            client = _client(address)

            async def answers() -> bool:
                try:
                    return bool(await client.ping())
                except redis.exceptions.ConnectionError:
                    return False

            arguments = [
                "--port", "0", "--unixsocket", address, "--dir", str(directory), "--save", "",
                "--appendonly", "yes", "--appendfsync", "always", "--auto-aof-rewrite-percentage", "0",
            ]  # fmt: skip
            async with self.server.process(directory, arguments, answers):
                for reader in readers:
                    await client.xgroup_create(_STREAM, reader, id="0", mkstream=True)
                yield address
                await client.aclose()

    def events(self, bodies: Sequence[bytes]) -> list[Any]:
        return [{"event": body} for body in bodies]

    @asynccontextmanager
    async def producer(self, address: str, tasks: int) -> AsyncIterator["_Producer"]:
        client = _client(address, connections=tasks)
        try:
            yield _Producer(client)
        finally:
            await client.aclose()

    @asynccontextmanager
    async def consumer(self, address: str, reader: str, count: Count) -> AsyncIterator[None]:
        client = _client(address)
        async with consuming(lambda stop: _consume(client, reader, count, stop)):
            yield
        await client.aclose()

    async def settle(self, address: str) -> None:
        """Nothing to do: rewrites are off."""

    async def left(self, address: str, readers: Sequence[str]) -> int:
        client = _client(address)
        try:
            groups = await client.xinfo_groups(_STREAM)
            return sum(one["pending"] + one["lag"] for one in groups if one["name"].decode() in readers)
        finally:
            await client.aclose()


class _Producer:
    def __init__(self, client: Any) -> None:
        self._client = client

    async def one(self, event: dict[str, bytes]) -> None:
        await self._client.xadd(_STREAM, event)

    async def many(self, events: Sequence[dict[str, bytes]]) -> None:
        async with self._client.pipeline(transaction=False) as pipeline:
            for event in events:
                pipeline.xadd(_STREAM, event)
            await pipeline.execute()


async def _consume(client: Any, reader: str, count: Count, stop: asyncio.Event) -> None:
    async def handle(event: dict[bytes, bytes]) -> None:
        count(event[b"event"])

    while not stop.is_set():
        for _, entries in _streams(
            await client.xreadgroup(reader, reader, {_STREAM: ">"}, count=PAGE, block=int(WAIT * 1000))
        ):
            for _, event in entries:
                await handle(event)
            await client.xack(_STREAM, reader, *(id_ for id_, _ in entries))


def _streams(answer: Any) -> Any:
    return answer.items() if isinstance(answer, dict) else answer


def _client(address: str, connections: int = 1) -> Any:
    return redis.asyncio.Redis(unix_socket_path=address, max_connections=connections + 1)
