"""Malformed, incomplete and excessive requests: each gets its 4xx or is cut off, and other clients notice nothing."""

import asyncio
import logging
import socket
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from pgbackend.backend import Backend
from pgbackend.facts import Recorder
from pgbackend.serve.ingest import limits
from pgbackend.serve.ingest.responses import Problem
from tests.serve.support.broker import HEAD, HEADERS, Broker, Commits, envelope
from tests.support.polling import eventually

produce_soon = Backend.produce_soon


@pytest.fixture(autouse=True)
def _no_traceback(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


NOT_HTTP = [
    b"\r\n\r\nGARBAGE\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS to a port without it
    b"\x00" * 1000,
    b"POST / HTTP/9.9\r\n\r\n",
    b"POST /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"POST  HTTP/1.1\r\nHost: localhost\r\n\r\n",
    HEAD + b"no colon\r\n\r\n",
    HEAD + b": no name\r\n\r\n",
    HEAD + b"ce-subject: a\x00b\r\n\r\n",
    HEAD + b"ce-subject: a\nb\r\n\r\n",
    HEAD + b"ce-subject : a\r\n\r\n",
    HEAD + b"Content-Length: -1\r\n\r\n",
    HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    HEAD + b"Content-Length: 99999999999999999999999\r\n\r\n",
    HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nabcdefgh\r\n0\r\n\r\n",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
]


async def test_malformed_http_is_400(broker: Broker) -> None:
    for sent in NOT_HTTP:
        answer = await broker.talk(sent)
        assert answer.startswith(b"HTTP/1.1 400 "), (sent, answer)
        assert b"application/problem+json" in answer
    assert await broker.stored() == []


UNREADABLE_TARGETS = [b"http://localhost:/", b"http://localhost:70000/", b"http://a!.localhost/"]


@pytest.mark.parametrize("target", UNREADABLE_TARGETS)
async def test_a_target_that_cannot_be_read_is_400_before_its_body_is_there(broker: Broker, target: bytes) -> None:
    bad = b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nab" % target
    assert (await broker.talk(bad)).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("target", UNREADABLE_TARGETS)
@pytest.mark.parametrize("query", [b"", b"?way=asgi"])
async def test_a_target_that_cannot_be_read_takes_no_answer_from_the_request_before(
    broker: Broker, query: bytes, target: bytes
) -> None:
    good = HEAD.replace(b"POST /", b"POST /" + query) + b"Content-Length: 0\r\n\r\n"
    bad = b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nab" % target
    answer = await broker.talk(good + bad)
    assert answer.startswith(b"HTTP/1.1 202 ")
    assert answer.count(b"HTTP/1.1 ") == 1
    assert len(await broker.stored()) == 1


async def test_a_client_that_does_not_read_delays_the_drain_for_seconds_at_most(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "GRACE", limits.LINGER)
    monkeypatch.setattr(limits, "LAST_ANSWERS", 0.1)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        await asyncio.get_running_loop().sock_connect(client, (broker.host, broker.port))
        await eventually("it is connected", lambda: bool(broker.connections()))
        for connection in broker.connections():
            connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        await asyncio.get_running_loop().sock_sendall(client, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 90)

        def is_stuck() -> bool:
            return any(connection.flow.write_paused for connection in broker.connections())

        await eventually("its answers wait", is_stuck)
        async with asyncio.timeout(limits.PATIENCE / 2):
            await broker.listener.drain()


NO_ATTRIBUTES = [
    (b"ce-subject: \xff\xfe", b"UTF-8"),
    (b"ce-subject: %C0%A0", b"UTF-8"),
    (b"ce-subject: %00", b"control character"),
    (b"ce-subject: \xc2\x80", b"control character"),
    (b"ce-sub_ject: x", b"is not an attribute name"),
    (b"ce-: x", b"is not an attribute name"),
    (b"ce-data: x", b"is not an attribute name"),
    (b"ce-datacontenttype: text/plain", b"ce-datacontenttype is not allowed"),
    (b"ce-id: 2", b"duplicate header"),
    (b"content-type: text/\xe9", b"expected a media type"),
]


async def test_invalid_attributes_in_headers_are_400(broker: Broker) -> None:
    for header, said in NO_ATTRIBUTES:
        answer = await broker.talk(HEAD + b"Connection: close\r\n" + header + b"\r\nContent-Length: 0\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 400 "), (header, answer)
        assert said in answer, (header, answer)
    assert await broker.stored() == []


@pytest.mark.parametrize(
    "sent",
    [
        b"POST / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 200_000,
        b"POST /" + b"x" * 200_000,
        b"POST / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 50_000,
        b"POST / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 70_000 + b"\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX: " + b"x" * 2_000_000,
    ],
    ids=["a header without end", "a path without end", "headers without end", "a large header", "trailers"],
)
async def test_headers_that_are_too_large_are_431(sent: bytes, broker: Broker) -> None:
    answer = await broker.talk(*(sent[at : at + 10_000] for at in range(0, len(sent), 10_000)))
    # A client that is still sending may be cut off before it reads.
    assert answer == b"" or answer.startswith((b"HTTP/1.1 431 ", b"HTTP/1.1 400 ")), answer


async def test_more_than_500_headers_are_431_however_small(broker: Broker) -> None:
    # In a complete request, and in one that is not.
    for end in (b"Content-Length: 0\r\n\r\n", b""):
        answer = await broker.talk(HEAD + b"a:\r\n" * 501 + end)
        assert answer.startswith(b"HTTP/1.1 431 "), answer
    answer = await broker.talk(HEAD + b"a:\r\n" * 400 + b"Connection: close\r\nContent-Length: 0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 202 "), answer


async def test_a_large_body_does_not_count_as_headers(broker: Broker) -> None:
    await broker.send(HEADERS, b"x" * 500_000)
    await broker.send(HEADERS, b"x" * 500_000)
    assert len(await broker.stored()) == 2


@pytest.mark.parametrize(
    "sent",
    [b"", b"POST / HT", HEAD, HEAD + b"Content-Length: 10\r\n\r\n12345"],
    ids=["nothing", "line", "head", "body"],
)
async def test_a_request_that_takes_too_long_to_arrive_is_408(
    sent: bytes, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "PATIENCE", 0.5)
    answer = await broker.talk(sent)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert await broker.stored() == []


async def test_an_idle_connection_is_not_cut_off_as_slow(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    request = HEAD + b"Content-Length: 0\r\n\r\n"
    reader, writer = await asyncio.open_connection(broker.host, broker.port)
    writer.write(request)
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 202 ")
    monkeypatch.setattr(limits, "PATIENCE", 0.5)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(2):
            await reader.read(1)
    monkeypatch.undo()
    writer.write(request)
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 202 ")
    writer.close()


async def test_a_client_that_disconnects_in_a_request_stores_nothing(broker: Broker) -> None:
    for sent in (b"", b"PO", HEAD, HEAD + b"Content-Length: 10\r\n\r\n12345"):
        _, writer = await asyncio.open_connection(broker.host, broker.port)
        writer.write(sent)
        await writer.drain()
        writer.transport.abort()
    assert (await broker.send(HEADERS)).status == 202
    assert len(await broker.stored()) == 1


@pytest.mark.parametrize(
    "sent",
    [HEAD + b"Content-Length: 0\r\n\r\n", HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n"],
    ids=["in one piece", "in chunks"],
)
async def test_a_half_closed_connection_gets_its_answer_as_the_last(
    sent: bytes, broker: Broker, commits: Commits
) -> None:
    reader, writer = await asyncio.open_connection(broker.host, broker.port)
    writer.write(sent)
    await commits.reached.wait()
    (connection,) = broker.connections()
    writer.write_eof()

    async def noticed() -> bool:
        return not connection.cycle.keep_alive

    await eventually("the broker knows", noticed)
    commits.go_on()
    answer = await reader.read()
    writer.close()
    assert answer.startswith(b"HTTP/1.1 202 ")
    assert b"connection: close" in answer
    assert len(await broker.stored()) == 1
    await _is_forgotten(broker)


async def test_a_half_closed_connection_gets_the_answers_to_all_its_requests(broker: Broker, commits: Commits) -> None:
    reader, writer = await asyncio.open_connection(broker.host, broker.port)
    writer.write((HEAD + b"Content-Length: 0\r\n\r\n") * 5)
    writer.write_eof()
    await commits.reached.wait()
    commits.go_on()
    answer = await reader.read()
    writer.close()
    assert answer.count(b"HTTP/1.1 202 ") == answer.count(b"HTTP/1.1 ") == 5
    assert len(await broker.stored()) == 5
    await _is_forgotten(broker)


async def test_a_half_closed_connection_without_a_complete_request_is_closed(broker: Broker) -> None:
    request = HEAD + b"Content-Length: 0\r\n\r\n"
    for sent in (b"", request, HEAD, HEAD + b"Content-Length: 10\r\n\r\n12345"):
        reader, writer = await asyncio.open_connection(broker.host, broker.port)
        writer.write(sent)
        if sent is request:
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 202 ")
        writer.write_eof()
        assert await reader.read() == b""
        writer.close()
    assert len(await broker.stored()) == 1
    await _is_forgotten(broker)


@pytest.mark.parametrize(
    "half",
    [b"PO", HEAD, HEAD + b"Content-Length: 10\r\n\r\n12345", HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab"],
    ids=["line", "head", "body", "chunk"],
)
@pytest.mark.parametrize("whole", [1, 5])
async def test_a_half_closed_connection_gets_the_answers_before_an_incomplete_request(
    whole: int, half: bytes, broker: Broker, commits: Commits
) -> None:
    reader, writer = await asyncio.open_connection(broker.host, broker.port)
    writer.write((HEAD + b"Content-Length: 1\r\n\r\nx") * whole + half)
    writer.write_eof()
    await commits.reached.wait()
    commits.go_on()
    answer = await reader.read()
    writer.close()
    assert answer.count(b"HTTP/1.1 202 ") == answer.count(b"HTTP/1.1 ") == whole
    assert [event.data_bytes for event in await broker.stored()] == [b"x"] * whole
    await _is_forgotten(broker)
    assert broker.listener.state.heads.held == 0


async def test_an_event_is_stored_even_if_its_client_disconnects_meanwhile(broker: Broker, commits: Commits) -> None:
    _, writer = await asyncio.open_connection(broker.host, broker.port)
    writer.write(HEAD + b"Content-Length: 0\r\n\r\n")
    await commits.reached.wait()
    writer.transport.abort()
    commits.go_on()
    await _is_forgotten(broker)
    assert len(await broker.stored()) == 1


async def _is_forgotten(broker: Broker) -> None:
    async def gone() -> bool:
        return not broker.listener.state.connections

    await eventually("no connection is left", gone)


async def test_connections_beyond_the_limit_get_503(broker: Broker) -> None:
    broker.listener.state.places.total = 4
    idle = [await asyncio.open_connection(broker.host, broker.port) for _ in range(3)]
    answer = await broker.talk()
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"\r\nretry-after: 1\r\n" in answer
    for _, writer in idle:
        writer.close()


async def test_pipelined_requests_are_answered_in_order(broker: Broker) -> None:
    requests = [
        b"POST / HTTP/1.1\r\nHost: localhost\r\n%b"
        b"Content-Type: application/cloudevents+json\r\nContent-Length: %d\r\n\r\n%b"
        % (b"Connection: close\r\n" if number == 9 else b"", len(body), body)
        for number in range(10)
        for body in [envelope(number)]
    ]
    answer = await broker.talk(b"".join(requests))
    assert answer.count(b"HTTP/1.1 202 ") == 10
    assert [event.id for event in await broker.stored()] == [str(number) for number in range(10)]


async def test_a_good_request_before_garbage_gets_its_answer(broker: Broker) -> None:
    answer = await broker.talk(HEAD + b"Content-Length: 1\r\n\r\nx" + b"GARBAGE\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 202 ")
    assert len(await broker.stored()) == 1


@pytest.mark.parametrize(
    "sent",
    [
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\nGARBAGE\r\n",
        HEAD + b"X: " + b"x" * 70_000,
        HEAD + b"Content-Length: 10\r\n\r\n12345",
        HEAD,
    ],
    ids=["a body that is none", "a large header", "half a body", "half a head"],
)
async def test_a_refusal_is_not_the_answer_to_the_request_before_it(
    sent: bytes, broker: Broker, commits: Commits, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = await asyncio.open_connection(broker.host, broker.port)
    writer.write(HEAD + b"Content-Length: 0\r\n\r\n")
    await commits.reached.wait()
    monkeypatch.setattr(limits, "PATIENCE", 0.1)
    writer.write(sent)
    (connection,) = broker.connections()

    async def abandoned() -> bool:
        return connection.parser is None

    await eventually("the second request is abandoned", abandoned)
    commits.go_on()
    answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 202 ")
    assert answer.count(b"HTTP/1.1 ") == answer.count(b"connection: close") == 1
    writer.close()
    assert len(await broker.stored()) == 1


@pytest.mark.parametrize(
    ("sent", "answered", "later"),
    [
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n12345", b"200", b""),
        (HEAD + b"Content-Length: 99999999\r\n\r\n12345", b"413", b""),
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n", b"200", b"GARBAGE\r\n"),
    ],
    ids=["half a body", "half a body that is too large", "a body that is none"],
)
async def test_a_request_answered_before_its_end_is_not_answered_again(
    sent: bytes, answered: bytes, later: bytes, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = await asyncio.open_connection(broker.host, broker.port)
    writer.write(sent)
    answer = await reader.readuntil(b"}")
    assert answer.startswith(b"HTTP/1.1 " + answered)
    monkeypatch.setattr(limits, "PATIENCE", 1.0)
    writer.write(later)
    assert await reader.read() == b""
    writer.close()


async def test_the_rest_of_a_refused_request_does_not_become_part_of_another(broker: Broker, commits: Commits) -> None:
    reader, writer = await asyncio.open_connection(broker.host, broker.port)
    request = HEAD + b"Content-Length: 1\r\n\r\nx"
    writer.write(request)
    await commits.reached.wait()
    writer.write(request * 100 + HEAD + b"Content-Length: 4\r\n\r\n")
    (connection,) = broker.connections()

    async def one_too_many() -> bool:
        return len(connection.pipeline) == 100

    await eventually("100 requests wait, and one was refused", one_too_many)
    writer.write(b"rest")
    commits.go_on()
    answer = await reader.read()
    writer.close()
    assert answer.count(b"HTTP/1.1 202 ") == answer.count(b"HTTP/1.1 ") == 101
    assert {event.data_bytes for event in await broker.stored()} == {b"x"}


async def test_an_upgrade_is_declined_and_the_event_is_stored(broker: Broker) -> None:
    """Java's client offers HTTP/2 with its first request."""
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\n"
    reader, writer = await asyncio.open_connection(broker.host, broker.port)
    for _ in range(2):
        # In one piece, and with a body that comes later.
        writer.write(HEAD + upgrade + b"Content-Length: 5\r\n\r\nhello" + HEAD + upgrade + b"Content-Length: 5\r\n\r\n")
        await writer.drain()
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 202 ")
        writer.write(b"hello")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 202 ")
    writer.close()
    assert [event.data_bytes for event in await broker.stored()] == [b"hello"] * 4


async def test_trailers_are_not_headers(broker: Broker) -> None:
    answer = await broker.talk(
        HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nce-subject: late\r\n\r\n"
    )
    assert answer.startswith(b"HTTP/1.1 202 ")
    assert (await broker.stored())[0].subject is None


async def test_chunks_may_be_small(broker: Broker) -> None:
    body = b"1\r\nx\r\n" * 100_000
    head = HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert (await broker.talk(head, body, b"0\r\n\r\n")).startswith(b"HTTP/1.1 202 ")
    assert (await broker.stored())[0].data_bytes == b"x" * 100_000


async def test_a_content_length_may_have_any_number_of_leading_zeros(broker: Broker) -> None:
    for zeros in (1, 20, 5_000, 60_000):
        for body in ((b"x",), (b"", b"x")):
            head = HEAD + b"Connection: close\r\nContent-Length: " + b"0" * zeros + b"1\r\n\r\n"
            answer = await broker.talk(head + body[0], *body[1:])
            assert answer.startswith(b"HTTP/1.1 202 "), answer
    empty = HEAD + b"Connection: close\r\nce-subject: %20\r\nContent-Length: " + b"0" * 5_000 + b"\r\n\r\n"
    assert (await broker.talk(empty)).startswith(b"HTTP/1.1 202 ")
    for digits, status in ((b"9" * 5_000, 400), (b"18446744073709551615", 413), (b"0" * 5_000 + b"99999999", 413)):
        answer = await broker.talk(HEAD + b"Connection: close\r\nContent-Length: " + digits + b"\r\n\r\nx")
        assert answer.startswith(b"HTTP/1.1 %d " % status), answer


async def test_an_http_1_0_client_gets_no_100_continue(broker: Broker) -> None:
    head = HEAD.replace(b"HTTP/1.1", b"HTTP/1.0") + b"Expect: 100-continue\r\nContent-Length: 7\r\n\r\n"
    assert (await broker.talk(head, b"careful")).startswith(b"HTTP/1.1 202 ")


async def test_http_1_0_and_expect_100_continue_are_served(broker: Broker) -> None:
    old = HEAD.replace(b"HTTP/1.1", b"HTTP/1.0") + b"Content-Length: 3\r\n\r\nold"
    assert (await broker.talk(old)).startswith(b"HTTP/1.1 202 ")

    reader, writer = await asyncio.open_connection(broker.host, broker.port)
    writer.write(HEAD + b"Expect: 100-continue\r\nContent-Length: 7\r\n\r\n")
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(b"careful")
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 202 ")
    writer.close()
    assert [event.data_bytes for event in await broker.stored()] == [b"old", b"careful"]


@pytest.mark.parametrize("body", [(b"x",), (b"", b"x")], ids=["in one piece", "with a body that comes later"])
@pytest.mark.parametrize("target", [b"http://localhost", b"HTTP://localhost:80?a=b", b"http://localhost/path"])
async def test_a_target_may_be_a_whole_url(target: bytes, body: tuple[bytes, ...], broker: Broker) -> None:
    head = HEAD.replace(b"POST /", b"POST " + target, 1) + b"Connection: close\r\nContent-Length: 1\r\n\r\n"
    answer = await broker.talk(head + body[0], *body[1:])
    assert answer.startswith(b"HTTP/1.1 202 "), answer
    assert [event.data_bytes for event in await broker.stored()] == [b"x"]


async def test_connect_is_405(broker: Broker) -> None:
    answer = await broker.talk(b"CONNECT example.com:443 HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 405 ")
    assert b"\r\nallow: OPTIONS, POST\r\n" in answer


async def test_a_client_that_does_not_read_its_answers_is_cut_off(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "PATIENCE", 1.0)
    monkeypatch.setattr(Problem, "body", lambda _: b"x" * 1_000_000)

    def flood() -> None:
        with socket.create_connection((broker.host, broker.port), timeout=30) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            while True:
                connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50)

    with pytest.raises(ConnectionError):
        await asyncio.to_thread(flood)
    assert (await broker.send(HEADERS)).status == 202


async def test_a_client_that_does_not_read_its_last_answer_is_cut_off(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(limits, "PATIENCE", 1.0)
    monkeypatch.setattr(Problem, "body", lambda _: b"x" * 10_000_000)
    connection = socket.create_connection((broker.host, broker.port))
    connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    state = broker.listener.state

    async def gone() -> bool:
        return len(state.connections) == 0

    await eventually("it is cut off", gone)
    connection.close()


async def test_an_idle_connection_is_closed_after_the_keep_alive(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = await asyncio.open_connection(broker.host, broker.port)
    for request in (HEAD + b"Content-Length: 0\r\n\r\n", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"):
        writer.write(request)
        await reader.readuntil(b"\r\n\r\n")
    monkeypatch.setattr(limits, "KEEP_ALIVE", 0.5)
    async with asyncio.timeout(10):
        await reader.read()
    writer.close()


async def test_only_100_requests_are_taken_ahead_of_their_answers(broker: Broker) -> None:
    answer = await broker.talk(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)
    assert 100 <= answer.count(b"HTTP/1.1 404 ") < 200
    assert answer.rpartition(b"HTTP/1.1 ")[2].lower().count(b"connection: close") == 1


async def test_waiting_requests_of_all_connections_together_are_bounded(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker.listener.state.heads.total = 1_000_000
    held: list[Callable[[], None]] = []
    monkeypatch.setattr(
        Backend, "produce_soon", lambda *given, **named: held.append(partial(produce_soon, *given, **named))
    )
    request = HEAD + b"Content-Length: 10000\r\n\r\n" + b"x" * 10_000
    connections = [await asyncio.open_connection(broker.host, broker.port) for _ in range(10)]
    with Recorder() as recorder:
        for _, writer in connections:
            writer.write(request * 20)
        await recorder.wait("connections refused")
    state = broker.listener.state
    assert 0 < len(state.connections) < 10
    assert 0 < state.heads.held <= 1_000_000
    monkeypatch.setattr(Backend, "produce_soon", produce_soon)
    for release in held:
        release()
    served = 0
    for reader, writer in connections:
        try:
            for _ in range(20):
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 202 ")
            served += 1
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        writer.close()
    assert served > 0

    async def nothing_queued() -> bool:
        return state.heads.held == 0

    await eventually("nothing is queued", nothing_queued)


async def test_waiting_requests_are_counted_even_if_garbage_follows(broker: Broker, commits: Commits) -> None:
    reader, writer = await asyncio.open_connection(broker.host, broker.port)
    request = HEAD + b"Content-Length: 1000\r\n\r\n" + b"x" * 1000
    writer.write(request)
    await commits.reached.wait()
    writer.write(request * 20 + b"GARBAGE\r\n\r\n")
    state = broker.listener.state

    async def counted() -> bool:
        return state.heads.held > 20_000

    await eventually("they are counted", counted)
    commits.go_on()
    assert (await reader.read()).count(b"HTTP/1.1 202 ") == 21
    assert state.heads.held == 0
    writer.close()


async def test_a_client_that_disconnects_with_waiting_requests_holds_nothing(broker: Broker) -> None:
    for method in (b"GET /readyz", b"POST /?long=way"):
        _, writer = await asyncio.open_connection(broker.host, broker.port)
        writer.write(HEAD.replace(b"POST /", method, 1) + b"\r\n")
        writer.write((HEAD + b"Content-Length: 0\r\n\r\n") * 50)
        await writer.drain()
        writer.transport.abort()
    assert (await broker.send(HEADERS)).status == 202
    state = broker.listener.state

    async def forgotten() -> bool:
        return state.heads.held == 0 and len(state.connections) == 1

    await eventually("both connections are forgotten", forgotten)
