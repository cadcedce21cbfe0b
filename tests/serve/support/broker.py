"""A broker in this process, on a real PostgreSQL and behind a real socket; and messages to send it."""

import asyncio
import io
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, cast

import aiohttp
import asyncpg
import pytest

from pgbackend.backend import Backend
from pgbackend.codec.attributes import COLUMNS
from pgbackend.codec.event import Event
from pgbackend.serve.config.load import load
from pgbackend.serve.egress.connections import Pool
from pgbackend.serve.egress.subscribing import SubscriptionFactory
from pgbackend.serve.egress.triggers import Triggers
from pgbackend.serve.ingest.handler import Ingest
from pgbackend.serve.ingest.limits import CONNECTIONS, Limits
from pgbackend.serve.ingest.listener import Listener
from pgbackend.serve.ingest.ports import bind
from pgbackend.serve.ingest.protocol import Connection
from pgbackend.serve.ingest.tls import TLS
from pgbackend.serve.operations.metrics import Metrics
from pgbackend.serve.operations.tracing import Tracing

HEADERS = {"ce-specversion": "1.0", "ce-id": "1", "ce-source": "/shop", "ce-type": "order"}
"""The headers of a valid event in binary mode."""

HEAD = b"POST / HTTP/1.1\r\nHost: localhost\r\n" + b"".join(
    f"{name}: {value}\r\n".encode() for name, value in HEADERS.items()
)
"""The head of a request with these headers, without its last lines."""

STRUCTURED = {"content-type": "application/cloudevents+json"}
BATCH = {"content-type": "application/cloudevents-batch+json"}


def envelope(id_: object = "1", **members: object) -> bytes:
    """A valid event in structured mode."""
    return json.dumps({"specversion": "1.0", "id": str(id_), "source": "/shop", "type": "order", **members}).encode()


class Answer(NamedTuple):
    """The answer that a client got."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def detail(self) -> str:
        """The detail of a problem."""
        assert self.headers["content-type"] == "application/problem+json"
        problem = json.loads(self.body)
        assert problem["status"] == self.status
        return str(problem["detail"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Broker:
    """A running broker."""

    host: str
    port: int
    dsn: str
    backend: Backend
    ingest: Ingest
    listener: Listener
    client: aiohttp.ClientSession
    triggers: Triggers
    tasks: asyncio.TaskGroup

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}/"

    async def request(
        self, method: str, path: str = "/", *, headers: Mapping[str, str] | None = None, body: object = None
    ) -> Answer:
        """The answer to one request; `body` may be anything that aiohttp can send."""
        body = io.BytesIO(body) if isinstance(body, bytes) else body  # aiohttp warns of large bodies as bytes
        async with self.client.request(
            method, self.url.rstrip("/") + path, headers=headers, data=body, skip_auto_headers=("Content-Type",)
        ) as response:
            return Answer(response.status, response.headers, await response.read())

    async def send(self, headers: Mapping[str, str], body: object = b"", path: str = "/") -> Answer:
        """The answer to a POST."""
        return await self.request("POST", path, headers=headers, body=body)

    async def talk(self, *parts: bytes, timeout: float = 30.0) -> bytes:
        """Send these bytes on a new connection; everything that comes back until the broker closes it.

        Empty when the broker closed it without an answer.
        """
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            async with asyncio.timeout(timeout):
                try:
                    for part in parts:
                        writer.write(part)
                        await writer.drain()
                    return await reader.read()
                except ConnectionError:
                    return b""
        finally:
            writer.close()

    def begin_to_drain(self) -> None:
        """The listener drains, and the broker stays until the body of `serving` ends."""
        self.tasks.create_task(self.listener.drain(), name="drain the listener")

    def connections(self) -> list[Connection]:
        """Those of all clients."""
        return cast("list[Connection]", list(self.listener.state.connections))

    async def configure(self, config: str) -> None:
        """The broker has this configuration's triggers."""
        await self.triggers.apply(load(config, origin="test"))
        await self.triggers.converged()

    async def stored(self) -> list[Event]:
        """The events in the log, in order."""
        connection = await asyncpg.connect(self.dsn)
        try:
            columns = ", ".join(COLUMNS)
            records = await connection.fetch(f"select {columns} from pgbackend.events order by position")
            return [Event(tuple(record)) for record in records]
        finally:
            await connection.close()


async def send(broker: Broker, *ids: object, **members: object) -> None:
    """One batch with these events is accepted; `members` are attributes, and data, of each."""
    answer = await broker.send(BATCH, b"[%b]" % b",".join(envelope(id_, **members) for id_ in ids))
    assert answer.status == 202, answer.body


_produce_soon = Backend.produce_soon


class Commits:
    """Holds the commits of requests that arrive in one piece, until `go_on()`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached = asyncio.Event()
        self._monkeypatch = monkeypatch
        self._held: list[Callable[[], None]] = []
        monkeypatch.setattr(
            Backend, "produce_soon", lambda *given, **named: self._hold(partial(_produce_soon, *given, **named))
        )

    def _hold(self, commit: Callable[[], None]) -> None:
        self._held.append(commit)
        self.reached.set()

    def go_on(self) -> None:
        self._monkeypatch.setattr(Backend, "produce_soon", _produce_soon)
        for commit in self._held:
            commit()


@asynccontextmanager
async def serving(
    dsn: str,
    *,
    config: str = "{}",
    limits: Limits | None = None,
    produce_timeout: float = 30.0,
    drain_timeout: float = 30.0,
    max_hops: int = 255,
    metrics: Metrics | None = None,
    tracing: Tracing | None = None,
    tls: TLS | None = None,
    connections: int = CONNECTIONS,
) -> AsyncIterator[Broker]:
    """A broker with this configuration, until the body ends."""
    configuration = load(config, origin="test")
    backend = Backend(
        dsn,
        produce_timeout=produce_timeout,
        drain_timeout=drain_timeout,
        poll_interval=0.1,
        deduplicate=configuration.deduplicate,
    )
    async with AsyncExitStack() as stack:
        stack.push_async_callback(backend.stop)
        await backend.init()
        pool = await stack.enter_async_context(Pool())
        metrics = metrics or stack.enter_context(Metrics(backend))
        factory = SubscriptionFactory(
            pool, partial(backend.produce_many, deduplicate=False), metrics=metrics, tracing=tracing, max_hops=max_hops
        )
        triggers = Triggers(backend, factory)
        bound = stack.enter_context(bind("127.0.0.1", 0))
        host, port = bound.getsockname()
        ingest = Ingest(backend, auth=configuration.ingest, limits=limits, metrics=metrics, tracing=tracing)
        listener = Listener(ingest, bound, tls=tls, connections=connections)
        async with asyncio.TaskGroup() as tasks:
            changing = tasks.create_task(triggers.run(), name="triggers")
            await triggers.apply(configuration)
            tasks.create_task(listener.run(), name="listener")
            tasks.create_task(backend.start(), name="backend")
            await listener.wait_started()
            try:
                async with aiohttp.ClientSession(auto_decompress=False) as client:
                    yield Broker(
                        host=host,
                        port=port,
                        dsn=dsn,
                        backend=backend,
                        ingest=ingest,
                        listener=listener,
                        client=client,
                        triggers=triggers,
                        tasks=tasks,
                    )
            finally:
                await listener.drain()
                await backend.stop()
                await triggers.converged()
                changing.cancel()
