"""How a listener drains: requests in progress are answered, and no client is waited for in vain."""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import partial
from typing import Any

import pytest

from pgbackend.backend import Backend
from pgbackend.codec.event import Event
from pgbackend.errors import ConfigError, PgBackendError
from pgbackend.serve.ingest import limits
from pgbackend.serve.ingest.listener import Listener
from pgbackend.serve.ingest.ports import bind
from pgbackend.serve.ingest.responses import Message, Problem, Receive, Send, respond
from tests.serve.support.broker import HEAD, STRUCTURED, Broker, Commits, envelope
from tests.support import lifecycle
from tests.support.lifecycle import Lifecycle
from tests.support.polling import eventually

produce_soon = Backend.produce_soon


@pytest.fixture(autouse=True)
def _no_traceback(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_a_draining_broker_answers_a_request_that_is_being_committed(
    broker: Broker, commits: Commits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "GRACE", 0.2)
    reader, writer = await asyncio.open_connection(broker.host, broker.port)
    writer.write(HEAD + b"Content-Length: 0\r\n\r\n")
    await commits.reached.wait()
    writer.write(HEAD + b"Content-Length: 10\r\n\r\n12345")
    (connection,) = broker.connections()
    broker.begin_to_drain()

    async def abandoned() -> bool:
        return connection.parser is None

    await eventually("the second request is abandoned", abandoned)
    commits.go_on()
    assert (await reader.read()).startswith(b"HTTP/1.1 202 ")
    writer.close()
    assert len(await broker.stored()) == 1


async def test_draining_finishes_requests_in_progress_and_abandons_incomplete_ones(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "GRACE", 0.5)
    reached, release = asyncio.Event(), []

    def held(self: Backend, event: Event, done: Callable[[Exception | None], None], **named: Any) -> None:
        reached.set()
        release.append(partial(produce_soon, self, event, done, **named))

    monkeypatch.setattr(Backend, "produce_soon", held)
    sending = asyncio.create_task(broker.send(STRUCTURED, envelope()))
    await reached.wait()
    talking = asyncio.create_task(broker.talk(HEAD + b"Content-Length: 10\r\n\r\n12345"))

    async def has_begun() -> bool:
        return any(connection.arrival.body_bytes == 5 for connection in broker.connections())

    await eventually("half of the body has arrived", has_begun)
    broker.begin_to_drain()
    assert (await talking).startswith(b"HTTP/1.1 503 ")
    release[0]()
    assert (await sending).status == 202
    assert len(await broker.stored()) == 1


async def test_a_draining_broker_takes_one_more_request_of_each_idle_client(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "LINGER", 2.0)
    monkeypatch.setattr(limits, "GRACE", 6.0)
    request = HEAD + b"Content-Length: 0\r\n\r\n"
    connections = [await asyncio.open_connection(broker.host, broker.port) for _ in range(4)]
    for reader, writer in connections[:3]:
        writer.write(request)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 202 ")

    broker.begin_to_drain()
    connections[0][1].write(request)
    answer = await connections[0][0].read()
    assert answer.startswith(b"HTTP/1.1 202 ")
    assert b"connection: close" in answer
    connections[1][1].write(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    answer = await connections[1][0].read()
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: 1" in answer
    for reader, writer in connections:
        assert await reader.read() == b""
        writer.close()
    assert len(await broker.stored()) == 4


async def test_later_requests_to_a_draining_broker_get_503(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LINGER", 0.1)
    idle, late = [await asyncio.open_connection(broker.host, broker.port) for _ in range(2)]
    late[1].write(HEAD)
    await broker.request("GET", "/healthz")
    broker.begin_to_drain()
    assert await idle[0].read() == b""
    late[1].write(b"Content-Length: 0\r\n\r\n")
    answer = await late[0].read()
    assert answer.startswith(b"HTTP/1.1 503 ")
    for header in (b"retry-after: 1", b"connection: close", b"content-type: application/problem+json"):
        assert header in answer
    for _, writer in (idle, late):
        writer.close()
    assert await broker.stored() == []


async def test_healthz_answers_until_the_broker_has_drained(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LINGER", 2.0)
    reader, writer = await asyncio.open_connection(broker.host, broker.port)
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    await reader.readuntil(b"}")
    broker.begin_to_drain()
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
    writer.close()


def test_a_port_in_use_is_one_clear_line() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            bind("127.0.0.1", port)
    assert str(caught.value) == f"Cannot listen on port {port} of 127.0.0.1: it is in use. Choose another with --port."


def test_a_host_of_another_machine_is_one_clear_line() -> None:
    with pytest.raises(
        ConfigError, match=r"^Host '192\.0\.2\.1' is not an address of this machine\. Choose another with --host\.$"
    ):
        bind("192.0.2.1", 0)
    with pytest.raises(
        ConfigError, match=r"^Host 'no-such-host\.invalid' has no address: .*\. Choose another with --host\.$"
    ):
        bind("no-such-host.invalid", 0)


class Answering:
    """An application that answers each request with 200."""

    async def __call__(self, _scope: Message, _receive: Receive, send: Send, /) -> None:
        await asyncio.sleep(0)
        await respond(send, 200, b"")

    def take_whole(
        self, _fields: Mapping[bytes, bytes], _body: bytes, _answer: Callable[[Problem | None], None], /
    ) -> bool:
        return False

    def count_refused(self, status: int) -> None:
        pass

    def retire(self) -> None:
        pass

    def stop_taking(self) -> None:
        pass


@pytest.fixture
def actor() -> Iterator[Lifecycle]:
    """Listeners on new ports."""
    bound: list[socket.socket] = []

    def make() -> Listener:
        bound.append(bind("127.0.0.1", 0))
        return Listener(Answering(), bound[-1])

    async def use(listener: Listener) -> None:
        await listener.wait_started()
        try:
            reader, writer = await asyncio.open_connection(*bound[-1].getsockname())
            try:
                writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
            finally:
                writer.close()
        except (OSError, asyncio.IncompleteReadError) as error:
            raise PgBackendError("cut off") from error

    yield Lifecycle(make, use)
    for one in bound:
        one.close()


@pytest.mark.parametrize(
    "stress",
    [
        lifecycle.cancel_before_it_starts,
        lifecycle.run_again,
        lifecycle.drain_before_it_runs,
        lifecycle.drain_twice,
        lifecycle.drain_while_it_is_cancelled,
    ],
)
async def test_a_listener_keeps_the_contract_of_actors(
    stress: Callable[[Lifecycle], Awaitable[None]], actor: Lifecycle
) -> None:
    await stress(actor)


@pytest.mark.parametrize("again", [False, True], ids=["once", "twice"])
async def test_a_listener_can_be_cancelled_at_every_await(actor: Lifecycle, *, again: bool) -> None:
    assert await lifecycle.cancel_at_every_step(actor, again=again, stride=lambda step: 1) > 1
