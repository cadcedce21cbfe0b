"""Misbehaving targets harm only their own trigger (I7): the events of other triggers do not wait."""

import asyncio
import resource
import socket
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from pgbackend.backend import Backend
from pgbackend.codec import wire
from pgbackend.codec.event import Event
from pgbackend.facts import Recorder
from pgbackend.retry import Retry
from pgbackend.serve.egress.connections import Pool
from pgbackend.serve.egress.outcomes import TargetError
from pgbackend.serve.egress.replies import ReplyBudget
from tests.serve.support.broker import envelope
from tests.serve.support.dispatchers import dispatcher_to
from tests.serve.support.hostile import behaving
from tests.serve.support.target import Target, listening, raw_server, read_request
from tests.support.polling import eventually

EVENTS = 200
TIMEOUT = 0.5
RETRY = Retry(attempts=3, delay=0.05, max_delay=0.5)
MEMORY = ReplyBudget().limit + (64 << 20)
"""Bytes by which the process may grow: replies have a budget of their own. Without it, gigabytes would arrive."""


def event(n: int, size: int = 10) -> Event:
    return wire.parse_structured(envelope(f"{n:04}", data="x" * size))


@pytest.fixture
async def pool() -> AsyncIterator[Pool]:
    async with Pool() as opened:
        yield opened


@asynccontextmanager
async def triggers(backend: Backend, bad: Mapping[str, str], *, good: str, retry: Retry = RETRY) -> AsyncIterator[None]:
    """Each trigger gets every event: `good`, whose target is good, and those with bad targets."""
    async with Pool() as pool:
        # A longer timeout for the good one: on a busy machine it must not look bad.
        timeouts = dict.fromkeys(bad, TIMEOUT) | {"good": 30.0}
        for name, url in {**bad, "good": good}.items():
            dispatch = dispatcher_to(pool, url, trigger=name, timeout=timeouts[name], store=backend.produce_many)
            await backend.subscribe(name, dispatch, start="earliest", retry=retry)
        running = asyncio.create_task(backend.start())
        try:
            yield
        finally:
            await backend.stop()
            await running


async def pass_by(backend: Backend, target: Target, *, size: int = 10) -> None:
    """Produce `EVENTS` events, and wait until the good target has got each of them once."""
    for n in range(EVENTS):
        await backend.produce(event(n, size))
    requests = await target.wait(EVENTS)
    assert sorted(request.event().id for request in requests) == [event(n).id for n in range(EVENTS)]


def resident() -> int:
    """The resident memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


SILENT = {
    "hang": "no response within 0.5 s",
    "trickle_headers": "no response within 0.5 s",
    "trickle_body": "answered 503",
}
CLOSING = {
    "reset": "reset by peer",
    "close": "closed the connection without an answer",
    "close_in_the_middle": "closed the connection without an answer",
    "garbage": "Expected HTTP/",
    "redirect": "answered 302 Found",
}
ENDLESS = {
    "endless_headers": "Too many headers",
    "endless_header": "Got more than 8190 bytes",
    "interim_flood": "interim answers and no final one",
    "endless_body": "answered 500",
    "endless_chunks": "answered 500",
    "endless_reply": "its reply has more than",
}


@pytest.mark.parametrize(
    ("kinds", "size"),
    # A body that is never read must be larger than what sockets hold by themselves.
    [(SILENT, 10), (CLOSING, 10), (ENDLESS, 10), ({"never_read": "no response within 0.5 s"}, 100_000)],
    ids=["silent", "closing", "endless", "never read"],
)
async def test_a_bad_target_harms_only_its_own_trigger(
    kinds: dict[str, str], size: int, backend: Backend, target: Target
) -> None:
    with Recorder() as recorder:

        def reported(kind: str) -> bool:
            failures = recorder.all("dispatch failed", subscription=kind)
            return any(kinds[kind] in str(fact["error"]) for fact in failures)

        async with behaving(*kinds) as urls:
            before = resident()
            async with triggers(backend, dict(zip(kinds, urls, strict=True)), good=target.url):
                await pass_by(backend, target, size=size)
                for kind in kinds:
                    # On a busy machine the first failures may be timeouts.
                    await eventually(f"the failure of {kind} is reported", partial(reported, kind))
                grown = resident() - before - EVENTS * size
    assert all(len(str(fact["error"])) < 400 for fact in recorder.all("dispatch failed"))
    assert not recorder.all("dispatch failed", subscription="good")
    for kind in kinds:
        if kind != "redirect":  # a final status says nothing about the target's health
            # Its target is only probed, so most events still wait when the good trigger has got all of them.
            assert recorder.all("target is down", subscription=kind)
            assert len(recorder.all("dispatch failed", subscription=kind)) < EVENTS // 2
    assert grown < MEMORY


async def test_a_target_that_was_down_gets_everything_when_it_is_back(backend: Backend, target: Target) -> None:
    with socket.socket() as bound, Recorder() as recorder:
        bound.bind(("127.0.0.1", 0))  # reserves the port without listening
        bad = f"http://127.0.0.1:{bound.getsockname()[1]}/"
        async with triggers(backend, {"bad": bad}, good=target.url, retry=Retry(attempts=20)):
            await pass_by(backend, target)
            await recorder.wait("target is down", subscription="bad")
            async with listening(bound) as back:
                # On a busy machine a request may time out and be repeated.
                await eventually("every event arrives", lambda: len(set(back.ids())) == EVENTS, 60.0)
            await recorder.wait("target is up", subscription="bad")
    assert not recorder.all("event buried")


@pytest.mark.parametrize(
    ("answer", "closes"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\nuntil I close", True),
        (b"HTTP/1.0 200 OK\r\n\r\n", True),
        (b"HTTP/1.1 204 No Content\r\n\r\nand a body", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nmore than two", False),
        (b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n", False),
        (b"HTTP/1.1 204 No Content\r\n\r\nHTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n", False),
        (b"HTTP/1.1 200\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", False),
    ],
)
async def test_an_odd_2xx_is_delivered_once(answer: bytes, *, closes: bool, pool: Pool) -> None:
    requests = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal requests
        while not reader.at_eof():
            await read_request(reader)
            requests += 1
            writer.write(answer)
            await writer.drain()
            if closes:
                return

    async with raw_server(talk) as url:
        dispatch = dispatcher_to(pool, url)
        for n in range(3):
            await dispatch(event(n))
    assert requests == 3


CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: application/cloudevents-batch+json\r\nTransfer-Encoding: chunked\r\n\r\n"
ANSWERED = b"HTTP/1.1 204 No Content\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"\r\n" * (1 << 20) + ANSWERED, "sends empty lines before its answer"),
        (b"\n" * (1 << 20) + ANSWERED, "sends empty lines before its answer"),
        (b"HTTP/1.1 103 Early Hints\n\n" * 100_000 + ANSWERED, "sends interim answers and no final one"),
        (b"HTTP/1.1 103 Early Hints\r\n\r" + b"\nHTTP/1.1 103 x\r\n\r" * 100_000, "interim answers and no final one"),
        (b"HTTP/1.1 200 OK\r\n" + b"".join(b"x%d: %b\r\n" % (n, b"y" * 8000) for n in range(99)), "65536 bytes"),
        (CHUNKED + b"1\r\n[\r\n" * 300_000, "sends more framing than body"),
        (CHUNKED + b"1;" + b"x" * (1 << 20), "sends more framing than body"),
        (CHUNKED + b"0" * (1 << 20), "sends more framing than body"),
        (ANSWERED + b"HTTP/1.1 200 OK\r\n\r\n" * 100_000, None),
        (ANSWERED + b"\r\n" * (1 << 20), None),
    ],
    ids=[
        "CRLFs", "LFs", "interim answers", "interim answers in two", "long headers", "tiny chunks", "chunk extension",
        "zeros of a chunk size", "more answers", "CRLFs behind the answer",
    ],
)  # fmt: skip
async def test_a_hostile_answer_costs_little(answer: bytes, said: str | None, pool: Pool) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        for start in range(0, len(answer), 1 << 16):
            writer.write(answer[start : start + (1 << 16)])
            await writer.drain()
        await reader.read()

    async with raw_server(talk) as url:
        dispatch = dispatcher_to(pool, url)
        began = time.process_time()
        if said is None:
            await dispatch(event(1))
        else:
            with pytest.raises(TargetError, match=said):
                await dispatch(event(1))
        spent = time.process_time() - began
    assert spent < 0.25


async def test_a_head_may_come_byte_by_byte(pool: Pool) -> None:
    requests = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal requests
        while await read_request(reader):
            requests += 1
            for byte in b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok":
                writer.write(bytes((byte,)))
                await writer.drain()
                await asyncio.sleep(0)

    async with raw_server(talk) as url:
        dispatch = dispatcher_to(pool, url)
        for n in range(3):
            await dispatch(event(n))
    assert requests == 3


async def test_an_unrequested_answer_is_not_the_answer_to_the_next_request(pool: Pool) -> None:
    """A proxy may send 408 on an idle connection before it closes it."""
    requests: list[bytes] = []
    unasked = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await read_request(reader))
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        await unasked.wait()
        writer.write(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")
        await reader.read()

    async with raw_server(talk) as url:
        dispatch = dispatcher_to(pool, url)
        await dispatch(event(1))
        unasked.set()
        await eventually("the connection is closed", lambda: _no_connection_left(pool))
        await dispatch(event(2))
    assert [b"0001" in requests[0], b"0002" in requests[1]] == [True, True]


async def _no_connection_left(pool: Pool) -> bool:
    return not any(protocol.is_connected() for pool in pool._conns.values() for protocol, _ in pool)
