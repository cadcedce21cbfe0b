"""One client's connection: uvicorn's HTTP, and the limits on it that uvicorn does not have.

`listener` makes one of each client that it accepts, and looks after all of them each second; what a request says goes
to `ingest`.

A client that sends slowly, or headers without end, or says nothing, or does not read what it is answered, is cut off,
and told so where that is possible; what it can cost is a place among the connections for some seconds. Requests get
their answers in order, each its own.

A connection, told apart by `Connection.look_after`:

    receiving   from its start, or the first byte of a request, to that request's last byte: 408 when that takes long,
                as `_Arrival` tells
    committing  until the answer is written: the backend's `produce_timeout` bounds it
    unread      its client does not read: aborted after a while
    idle        between two requests: closed after a while
    closing     the last answer is on its way: aborted after a while

A request that is there in one piece is taken by `Ingest.take_whole()`: no ASGI scope, cycle, event and task, which are
two thirds of what uvicorn costs. Any other goes uvicorn's way as soon as that is known.
"""

import asyncio
import re
import resource
from collections import deque
from collections.abc import Sized
from http import HTTPStatus
from typing import TYPE_CHECKING, cast

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from pgbackend.serve.ingest.clients import Budget
from pgbackend.serve.ingest.handler import STOPPING, Ingest, Problem, come_back
from pgbackend.serve.ingest.hosts import Hosts, host_of_target

if TYPE_CHECKING:
    from pgbackend.serve.ingest.admin import Admin

_HEAD_BYTES = 1 << 16
_HEADERS = 500
"""In one request. Each takes a hundred bytes besides its own: 64 KiB of tiny ones would be 2 MB."""
_HEAD_TOO_LARGE = f"The request's headers are too large: expected at most {_HEAD_BYTES} bytes, in {_HEADERS} headers."
_PATIENCE = 20.0
"""Seconds that a request may take to arrive, or to say nothing; and seconds that an answer may take to be read."""
_BYTES_A_SECOND = 4096
"""A request that arrives at this rate may take longer."""
_LONGEST_ARRIVAL = 120.0
"""Seconds that a request may take to arrive, however much it brings."""
_KEEP_ALIVE = 75.0
_MAX_CONNECTIONS = 10_000
_MAX_QUEUED = 100
"""Requests that a connection may send ahead of its answers."""
_HEAD_BUDGET = 64 << 20
"""Bytes of all such requests, and of all heads that are arriving."""
_QUEUED_REQUEST = 2_500
"""Bytes of memory that a request takes besides its head and its body."""
_HEADER = 170
"""Bytes of memory that a header takes besides its own: 500 tiny ones are 2 KB of bytes and 85 KB of memory."""
_BUSY = "The broker holds as many requests as it can. Nothing was stored; send it again."

# `http://host` for `http://host/`, which uvicorn does not know.
_add_path = re.compile(rb"^([a-z]+://[^/?#]*)(?=[?#]|$)", re.IGNORECASE).sub


class State(ServerState):
    """What the connections of a server share."""

    def __init__(self, limit: int, hosts: Hosts) -> None:
        super().__init__()
        self.hosts = hosts
        self.places = Budget(limit)
        """For connections, handshakes among them."""
        self.heads = Budget(_HEAD_BUDGET)
        self.stopping = False
        self.refused = 0
        """Connections that found no room in `places` or `heads` since the last look."""
        self.tell_date(b"")

    def tell_date(self, date: bytes) -> None:
        """From now on answers have this header line."""
        accepted = b"HTTP/1.1 202 Accepted\r\n" + date + b"content-length: 0\r\n"
        self.accepted = accepted + b"\r\n"
        self.accepted_and_closed = accepted + b"connection: close\r\n\r\n"


class Connection(HttpToolsProtocol):
    """The connection of a client at `address`, which `clients` sees as one. `admitted`: there was a place for it."""

    _state: State
    _receiving = True
    _began = 0.0
    """When it began to receive."""
    _arrival: "_Arrival | None" = None
    """How fast the request arrives. The first look makes it."""
    _idle_since = 0.0
    _unread_since = 0.0
    _closing_since: float | None = None
    _received_bytes = 0
    _body_bytes = 0
    _bodiless_bytes = 0
    """Received since the last byte of a body."""
    _begun_bytes = 0
    """At most so much has arrived of an unfinished head."""
    _head_bytes = 0
    _in_head = True
    _undecided = False
    """The head is there, and which way the request goes is open until its last byte or the next silence."""
    _piece = b""
    """The body of an undecided one."""
    _answering: RequestResponseCycle | None = None
    """The one whose answer is next, of those that went uvicorn's way or have one behind them that did."""
    _held_bytes = 0
    """Its part of the state's budget for heads."""
    _offers_upgrade = False
    _refusal: Problem | None = None
    """The answer to a head that a callback of the parser refuses."""
    _host: bytes | None = None
    """The header; b"" if there are several."""
    _right_host: bytes | None = None
    """The last one that was found right."""

    def __init__(self, config: Config, state: State, address: str, *, admitted: bool) -> None:
        super().__init__(config, state, {"address": address})
        self._address = address
        self._admitted = admitted
        self._state = state
        self._ingest = cast("Ingest | Admin", config.app)
        self._queued_heads: deque[int] = deque()
        """The memory that each request of `pipeline` takes besides its body."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = _Flow(transport, self.pipeline)
        self._local = "" if self.server is None else self.server[0]
        self._began = self.loop.time()
        if not self._admitted:
            self._state.refused += 1
            self._refuse(come_back("Too many connections. Come back later."))

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.leave()
        if self._answering is not None:
            # Uvicorn told only the newest, which may be queued behind this one.
            self._answering.disconnected = True
            self._answering.message_event.set()
        self.pipeline.clear()
        self._queued_heads.clear()
        self._receiving = False
        self._account()

    def leave(self) -> None:
        """Give its place to another. Again, it does nothing."""
        if self._admitted:
            self._admitted = False
            self._state.places.give_back(self._address, 1)

    def data_received(self, data: bytes) -> None:
        if self.parser is None or self.transport.is_closing():
            return
        size = len(data)
        self._received_bytes += size
        body_bytes = self._body_bytes
        if self._in_head:
            self._head_bytes += size
        try:
            self.parser.feed_data(data)
            if self._undecided:
                self._go_uvicorns_way()
        except httptools.HttpParserUpgrade as upgrade:
            self._decline_upgrade(data[upgrade.args[0] :])
            return
        except (httptools.HttpParserError, ValueError):
            self.send_400_response("")
            return
        if self._in_head:
            too_large = self._head_bytes > _HEAD_BYTES or len(self.headers or ()) > _HEADERS
        else:
            # The parser keeps trailers, which nobody reads: they are what brings no body. Chunks of one byte have five
            # around it.
            self._bodiless_bytes = self._bodiless_bytes + size if body_bytes == self._body_bytes else 0
            around = self._received_bytes - self._body_bytes
            too_large = self._receiving and (
                self._bodiless_bytes > _HEAD_BYTES or around > 2 * _HEAD_BYTES + 8 * self._body_bytes
            )
        if too_large and not self.transport.is_closing():
            self._refuse(Problem(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, _HEAD_TOO_LARGE))
        elif self.pipeline or self._held_bytes or (self._receiving and self._in_head):
            # An upper bound: where the head begins in these bytes is the parser's secret.
            self._begun_bytes += size
            self._account()

    def eof_received(self) -> bool:  # type: ignore[override]  # uvicorn's says None, which asyncio takes for False
        """Whether the connection stays: for the answers to whole requests. Nobody waits for one that is not."""
        return self.scheme != "https" and self._take_no_more()  # TLS cannot be half closed, says the loop

    def on_message_begin(self) -> None:
        # What uvicorn makes here is made if its way is gone.
        self.url = b""
        self.headers = []
        self._host = None
        self.expect_100_continue = False
        self._receiving = True
        self._began = self.loop.time()
        self._arrival = None
        self._received_bytes = 0
        self._body_bytes = 0
        self._bodiless_bytes = 0
        self._begun_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        # Fields after the body are no headers: nobody authorized them, and they must not become attributes.
        if self._in_head:
            name = name.lower()
            if name == b"expect" and value.lower() == b"100-continue":
                self.expect_100_continue = True
            elif name == b"host":
                self._host = value.rstrip(b" \t") if self._host is None else b""
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            self._offers_upgrade = True
            return
        too_large = len(self.headers) > _HEADERS
        if self._head_bytes > _HEAD_BYTES:
            # The bytes counted may include some of the body, or of a request before.
            too_large |= len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > _HEAD_BYTES
        if too_large:
            self._refusal = Problem(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, _HEAD_TOO_LARGE)
        elif self._host is None or self._host != self._right_host or not self.url.startswith(b"/"):
            # Skipped for a host as before, which saves 0.4 of the 6 µs that a request costs here.
            if (wrong := self._wrong_host()) is not None:
                self._refusal = Problem(*wrong)
            elif self.url.startswith(b"/"):
                self._right_host = self._host
        if self._refusal is not None:
            raise ValueError(self._refusal.detail)
        self._in_head = False
        self._head_bytes = 0
        self._undecided = True
        self._piece = b""

    def _wrong_host(self) -> tuple[int, str] | None:
        """Status and words for a request that does not say, once, that it is for this broker; None for others."""
        hosts = self._state.hosts
        if self._host is None:
            # HTTP/1.0 has no such header, and browsers always send it.
            wrong = None if self.parser.get_http_version() == "1.0" else (400, "Header Host is missing.")
        elif not self._host:
            wrong = 400, "Header Host is empty, or stands there twice."
        else:
            wrong = hosts.problem(self._host, self._local)
        if (target := host_of_target(self.url)) is not None and (wrong is None or wrong[0] != HTTPStatus.BAD_REQUEST):
            wrong = hosts.problem(target, self._local)
        return wrong

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._undecided:
            if not self._piece:
                self._piece = body
                return
            self._go_uvicorns_way()
        self._keep(body)

    def on_message_complete(self) -> None:
        if self._offers_upgrade:
            return
        self._in_head = True
        self._receiving = False
        if self._undecided:
            if self._take_whole():
                return
            self._go_uvicorns_way()
        super().on_message_complete()

    def _take_whole(self) -> bool:
        url, parser = self.url, self.parser
        if (
            not self._is_answered()
            or parser.get_method() != b"POST"
            or parser.get_http_version() != "1.1"
            or self.flow.write_paused
            # What else stands there uvicorn checks.
            or not url.startswith(b"/")
            or b"?" in url
            or b"#" in url
            or not url.isascii()
        ):
            return False
        exchange = _Exchange(self, keep_alive=parser.should_keep_alive() and not self._state.stopping)
        if not self._ingest.take_whole(self.headers, self._piece, exchange.answer):
            return False
        self._undecided = False
        self.cycle = cast("RequestResponseCycle", exchange)
        return True

    def send_whole(self, problem: Problem | None, *, keep_alive: bool) -> None:
        """Answer what was taken whole."""
        if self.transport.is_closing():
            return
        if problem is None:
            self.transport.write(self._state.accepted if keep_alive else self._state.accepted_and_closed)
        else:
            self.transport.write(self._written(problem, keep_alive=keep_alive))
        if not keep_alive:
            self.transport.close()
        self.on_response_complete()

    def _go_uvicorns_way(self) -> None:
        """Do what uvicorn would have done with the head and the body so far. Raises ValueError to refuse them."""
        if not self._is_answered() and len(self.pipeline) >= _MAX_QUEUED:
            raise ValueError("so many requests ahead of their answers")
        if b"#" in self.url:
            # Uvicorn would drop it: a proxy that does not would have looked at another path.
            raise ValueError("a fragment in the request target")
        url, headers, piece = _add_path(rb"\1/", self.url), self.headers, self._piece
        expects = self.expect_100_continue and self.parser.get_http_version() != "1.0"  # which knows no such answer
        super().on_message_begin()
        self.url, self.headers, self.expect_100_continue, self._piece = url, headers, expects, b""
        self.scope["headers"] = headers
        is_next, before = self._is_answered(), self.cycle
        super().on_headers_complete()
        self._undecided = False
        if is_next:
            self._answering = self.cycle
        else:
            self._queued_heads.appendleft(_QUEUED_REQUEST + len(url) + _memory_of(headers))
            if len(self.pipeline) == 1:
                self._answering = before
        if self._state.stopping:
            self.cycle.keep_alive = False
        if piece:
            self._keep(piece)

    def _keep(self, body: bytes) -> None:
        """Hand it to the request. The bodies of others than POST are not read, so they would be kept for nothing."""
        if self.scope["method"] == "POST":
            super().on_body(body)

    def on_response_complete(self) -> None:
        self._idle_since = self.loop.time()
        if self.pipeline:
            self._answering, _ = self.pipeline[-1]
            super().on_response_complete()
            if len(self._queued_heads) > len(self.pipeline):
                self._queued_heads.pop()
            self._account()
        elif not self.transport.is_closing():
            # Uvicorn would have a timer for each answer; a connection that is idle for long is found by looking.
            self.flow.resume_reading()

    def _account(self) -> None:
        """Requests that were sent ahead of answers, and a head that is not all there, count for their address."""
        held = sum(len(cycle.body) for cycle, _ in self.pipeline) + sum(self._queued_heads)
        if self._receiving and self._in_head:
            held += self._begun_bytes + _HEADER * len(self.headers or ())
        more = held - self._held_bytes
        heads = self._state.heads
        if more <= 0:
            heads.give_back(self._address, -more)
        elif not heads.take(self._address, more):
            self._state.refused += 1
            if self.pipeline:
                self.transport.abort()  # memory is scarce: what is queued must go at once
            elif not self.transport.is_closing():
                self._refuse(come_back(_BUSY))
            return
        self._held_bytes = held

    def _decline_upgrade(self, rest: bytes) -> None:
        """Go on as if the request had not offered another protocol, as Java's client does with every first one.

        The parser takes such a request to be without a body; uvicorn would lose the event's data.
        """
        self._offers_upgrade = False
        method = self.parser.get_method()
        if method == b"CONNECT":
            self._refuse(Problem(HTTPStatus.METHOD_NOT_ALLOWED, "This is no proxy.", (b"allow", b"OPTIONS, POST")))
            return
        head = [b"%b %b HTTP/%b" % (method, self.url, self.parser.get_http_version().encode())]
        for name, value in self.headers:
            if name == b"connection":
                is_last = b"close" in [token.strip() for token in value.lower().split(b",")]
                head += [b"connection: close"] if is_last else []
            elif name not in (b"upgrade", b"http2-settings"):
                head.append(name + b": " + value)
        self.parser = httptools.HttpRequestParser(self)
        self._in_head = True
        self._head_bytes = 0
        self.data_received(b"\r\n".join(head) + b"\r\n\r\n" + rest)

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's signature
        """The request that is being received is refused: it is no HTTP, or too much of it."""
        self._refuse(self._refusal or Problem(HTTPStatus.BAD_REQUEST, "Malformed HTTP request."))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread_since = self.loop.time()

    def look_after(self, now: float) -> None:
        """Cut off a client that takes too long, whatever it is that it does."""
        if self.transport.is_closing():
            if self._closing_since is None:
                self._closing_since = now
            elif now - self._closing_since > _PATIENCE:
                self.transport.abort()
        elif self.flow.write_paused:
            if now - self._unread_since > _PATIENCE:
                self.transport.abort()
        elif self._receiving:
            if self._arrival is None:
                self._arrival = _Arrival(self._began)
            if self._arrival.is_too_slow(now, self._received_bytes):
                self._refuse(Problem(HTTPStatus.REQUEST_TIMEOUT, "The request took too long to arrive."))
        elif self._is_answered() and now - self._idle_since > _KEEP_ALIVE:
            self.transport.close()

    def shutdown(self) -> None:
        """The broker stops: the request in progress is the last one. An idle connection stays for a moment."""
        if not self._is_answered():
            self.cycle.keep_alive = False

    def close_if_idle(self) -> None:
        has_begun = self.headers is not None  # a request, ever
        if self._is_answered() and not (self._receiving and has_begun):
            self.transport.close()

    def abandon_unfinished(self) -> None:
        """A request that has not arrived by now is not waited for."""
        if self._receiving and not self.transport.is_closing():
            self._refuse(come_back(STOPPING))

    def _is_answered(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _refuse(self, problem: Problem) -> None:
        """Take no more of what this client sends. What is being received is told why, unless its answer has begun.

        With requests before it that wait for theirs it gets none: read in its place, it would be taken for theirs.
        """
        if self._take_no_more():
            return
        if not self._has_cycle() or not self.cycle.response_started:
            self._ingest.count_refused(problem.status)
            self.transport.write(self._written(problem, keep_alive=False))
        self._receiving = False
        self.transport.close()

    def _take_no_more(self) -> bool:
        """Nothing more is read. Whether requests before what is being received are still to be answered.

        Then that is forgotten, and the last of their answers closes the connection.
        """
        self.parser = None  # type: ignore[assignment]  # as uvicorn has it once a connection is lost
        if self._has_cycle():
            if not self.pipeline:
                return False
            self.pipeline.popleft()
            self._queued_heads.popleft()
            self.cycle = self.pipeline[0][0] if self.pipeline else cast("RequestResponseCycle", self._answering)
        elif self._is_answered():
            return False
        self._receiving = False
        self.cycle.keep_alive = False
        self.flow.pause_reading()
        self._account()
        return True

    def _has_cycle(self) -> bool:
        """Whether what is being received has gone uvicorn's way."""
        return self._receiving and not (self._in_head or self._undecided)

    def _written(self, problem: Problem, *, keep_alive: bool) -> bytes:
        body = problem.body()
        headers = [*self.server_state.default_headers, *problem.headers, (b"content-length", b"%d" % len(body))]
        if not keep_alive:
            headers.append((b"connection", b"close"))
        lines = [b"HTTP/1.1 %d %b" % (problem.status, HTTPStatus(problem.status).phrase.encode())]
        lines += [b"%b: %b" % header for header in headers]
        return b"\r\n".join(lines) + b"\r\n\r\n" + body


class _Flow(FlowControl):
    """Uvicorn's, but that nothing is read while requests wait for their turn, whatever else is answered."""

    def __init__(self, transport: asyncio.Transport, pipeline: Sized) -> None:
        super().__init__(transport)
        self._pipeline = pipeline

    def resume_reading(self) -> None:
        if not self._pipeline:
            super().resume_reading()


class _Arrival:
    """How a request arrives. Its bytes buy it time, but never more than `_PATIENCE` from now."""

    __slots__ = ("_began", "_bytes", "_credit", "_looked_at")

    def __init__(self, began: float) -> None:
        self._began = self._looked_at = began
        self._bytes = 0
        self._credit = _PATIENCE

    def is_too_slow(self, now: float, received: int) -> bool:
        """Whether it has taken too long, or brought too little of late."""
        passed, self._looked_at = now - self._looked_at, now
        brought, self._bytes = received - self._bytes, received
        self._credit = min(_PATIENCE, self._credit - passed + brought / _BYTES_A_SECOND)
        return self._credit < 0 or now - self._began > _LONGEST_ARRIVAL


class _Exchange:
    """A request that was taken whole, until it is answered. Looks to uvicorn as one of its cycles does."""

    __slots__ = ("_connection", "disconnected", "keep_alive", "response_complete")

    more_body = False
    response_started = False
    message_event = asyncio.Event()  # nobody waits for it

    def __init__(self, connection: Connection, *, keep_alive: bool) -> None:
        self._connection = connection
        self.keep_alive = keep_alive
        self.disconnected = False
        self.response_complete = False

    def answer(self, problem: Problem | None) -> None:
        self.response_complete = True
        self._connection.send_whole(problem, keep_alive=self.keep_alive)


def _memory_of(headers: list[tuple[bytes, bytes]]) -> int:
    return sum(len(name) + len(value) for name, value in headers) + _HEADER * len(headers)


def limit_of_connections() -> int:
    """How many clients may be connected, so that half of the files that this process may open are left for others."""
    return min(_MAX_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)


def allow_many_connections() -> None:
    """This process may open as many files as it is allowed to, up to what the broker can use."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * _MAX_CONNECTIONS
    wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
