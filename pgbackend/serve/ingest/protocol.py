"""One client's connection: uvicorn's HTTP/1.1 protocol, with the limits that uvicorn does not have.

`listener` makes a `Connection` for each client that it accepts and calls `look_after` each second. The connection
parses requests and hands them to its application, `Ingest` or `Admin`. The promise: a client that sends slowly, sends
too much, says nothing or does not read its answers is cut off, and told why if it can be; it costs the broker no more
than a place among the connections for some seconds. Each request gets its own answer, in order.

`look_after` tells these states of a connection apart:

    receiving   from its start, or the first byte of a request, to the request's last byte: 408 if that takes too long
    committing  until the answer is written: `produce_timeout` of the backend bounds it
    unread      the client does not read its answers: aborted after PATIENCE
    idle        between two requests: closed after KEEP_ALIVE
    closing     the last answer is on its way: aborted after PATIENCE

This is what uvicorn 0.54 with httptools lacks, and all that this class adds:

1.  Timeouts, except for the one between two requests: for a request to arrive, for answers to be read, for a closed
    connection to end. (uvicorn's own timer would be one more call for each answer, so `look_after` replaces it.)
2.  Limits of a head: its bytes, its headers, trailers and the bytes around chunks.
3.  A limit of connections that holds before a request is parsed, and is shared by client addresses. Beyond
    `limit_concurrency`, uvicorn reads and parses a request before it answers 503.
4.  A limit of requests that are sent ahead of their answers. uvicorn goes on reading while they wait (`_Flow`).
5.  The check of the request's host (`hosts`).
6.  Declining an upgrade. uvicorn loses the body of a request that offers one, as Java's client does at first.
7.  Answers in order, even if what follows a good request is not HTTP. uvicorn answers that at once, and the client
    takes the 400 for the answer to its good request. Refusals are problems as in RFC 9457.
8.  Answers after a client has closed its sending side: uvicorn closes the connection.
9.  Telling the request at work, not only the newest one, that its client has gone.
10. Ignoring trailers: uvicorn adds them to the headers, where they would become attributes that nobody authorized.
11. Targets such as `http://host`, which uvicorn refuses, and fragments, which it drops: a proxy in front could have
    seen another path.
12. No `100 Continue` for clients that speak HTTP/1.0 and do not know it.
13. Not keeping the bodies of requests that the application does not read.
14. The short way for an event that arrives in one piece: `Ingest.take_whole`, without ASGI.
15. Draining in three steps: `finish`, `close_if_idle`, `abandon_unfinished`.
"""

import asyncio
import re
from collections.abc import Callable, Mapping, Sized
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from typing import Any, Protocol, cast

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from pgbackend.serve.ingest import limits
from pgbackend.serve.ingest.arrival import Arrival
from pgbackend.serve.ingest.clients import Budget, Holding
from pgbackend.serve.ingest.hosts import Hosts
from pgbackend.serve.ingest.responses import (
    STOPPING,
    Header,
    Headers,
    Message,
    Problem,
    Receive,
    Send,
    unavailable,
    unexpected,
)

CONSOLE = b"/console"
"""Requests whose path begins so may not be events: they go through ASGI, where the application looks at the path."""

_HEAD_TOO_LARGE = (
    f"The request's headers are too large: expected at most {limits.HEAD_BYTES} bytes, in {limits.HEADERS} headers."
)

# `http://host` becomes `http://host/`, which uvicorn understands.
_add_path = re.compile(rb"^([a-z]+://[^/?#]*)(?=[?#]|$)", re.IGNORECASE).sub


class Application(Protocol):
    """The application behind a connection: an ASGI application that is told a bit more than ASGI's messages."""

    async def __call__(self, scope: Message, receive: Receive, send: Send, /) -> None: ...

    def take_whole(
        self, fields: Mapping[bytes, bytes], body: bytes, answer: Callable[[Problem | None], None], /
    ) -> bool: ...

    def count_refused(self, status: int) -> None: ...

    def retire(self) -> None: ...

    def stop_taking(self) -> None: ...


class State(ServerState):
    """The state that all connections of a listener share."""

    def __init__(self, tasks: asyncio.TaskGroup, hosts: Hosts, *, connections: int) -> None:
        super().__init__()
        self.group = tasks
        """Tasks of the requests that go through ASGI."""
        self.hosts = hosts
        self.places = Budget(connections)
        """For connections, TLS handshakes included."""
        self.heads = Budget(limits.HELD_HEAD_BYTES)
        """Memory of heads that are arriving and of requests that wait for their turn."""
        self.refused = 0
        """Connections that found no room in `places` or `heads` since the listener logged the last ones."""
        self.accepted = b""
        """The 202 of a connection that stays open."""
        self.stopping = False
        self.ended = False
        """The listener was cancelled: connections that are made from now on read nothing."""
        self.empty = asyncio.Event()
        """Set when a connection ends and no other is left."""

    def set_date(self, date: bytes) -> None:
        """All answers from now on have this date."""
        self.default_headers = [(b"date", date)]
        self.accepted = self.answer(None, keep_alive=True)

    def answer(self, problem: Problem | None, *, keep_alive: bool) -> bytes:
        """The bytes of an answer: of 202 without a problem."""
        status, headers, body = (202, (), b"") if problem is None else (problem.status, problem.headers, problem.body())
        lines = [b"%b: %b\r\n" % header for header in (*self.default_headers, *headers)]
        end = b"content-length: %d\r\n\r\n" if keep_alive else b"content-length: %d\r\nconnection: close\r\n\r\n"
        return b"".join((STATUS_LINE[status], *lines, end % len(body), body))


class Connection(HttpToolsProtocol):
    """The connection of a client at `address`; `place` is its place among the connections, empty if it has none."""

    server_state: State
    cycle: "RequestResponseCycle | _Exchange"  # type: ignore[assignment]

    def __init__(self, config: Config, state: State, address: str, place: Holding) -> None:
        super().__init__(config, state, {"address": address})
        self._application = cast("Application", config.app)
        self._place = place
        self._heads = Holding(state.heads, address)
        self.arrival = Arrival(self.loop.time())
        """The arrival of the request that is being received."""
        self._fields: dict[bytes, bytes] = {}
        """The headers of the request by their names; one of several with the same name."""
        self._keep_header: Callable[[Header], None] = _ignore
        self._good_host: bytes | None = None
        """The last Host header that was accepted."""
        self._whole: bytes | None = None
        """The body of a request that may still be taken whole: until its last byte, or a pause before it."""
        self._answering: RequestResponseCycle | _Exchange | None = None
        """The request whose answer is next; `cycle` is the newest one."""
        self._idle_since = 0.0
        self._closing_since: float | None = None

    # Called by the event loop

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = _Flow(transport, self.pipeline)
        self.arrival.begin(self.loop.time())
        if self.server_state.ended:
            # The listener aborts it. Here that would be too early: uvloop would leave the socket open.
            self.parser = None  # type: ignore[assignment]  # as uvicorn does once a connection is lost
        elif not self._place.amount:
            self.server_state.refused += 1
            self._refuse(unavailable("Too many connections. Try again later."))

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._place.release()
        self._heads.release()
        self.arrival.receiving = False
        if self._answering is not None:
            self._answering.disconnected = True
            self._answering.message_event.set()
        self.pipeline.clear()
        if not self.connections:
            self.server_state.empty.set()

    def data_received(self, data: bytes) -> None:
        if self.parser is None or self.transport.is_closing():
            return
        arrival = self.arrival
        arrival.add(len(data))
        try:
            self.parser.feed_data(data)
            if self._whole is not None:
                self._continue_in_asgi()
        except httptools.HttpParserUpgrade as upgrade:
            rest = data[upgrade.args[0] :]
        except (Problem, httptools.HttpParserError, ValueError) as error:
            self._refuse(_problem_of(error))
            return
        else:
            # Mostly a whole request has arrived, and nothing is left that has a size.
            if arrival.receiving or arrival.head_bytes or self.pipeline or self._heads.amount:
                self._check_size(len(data))
            return
        # After the handler: an exception in it would become the context of the next one, and hide its cause.
        self._decline_upgrade(rest)

    def eof_received(self) -> bool:  # type: ignore[override]  # uvicorn's returns None, which asyncio takes for False
        """Whether the connection stays open: while complete requests wait for their answers."""
        return self.scheme != "https" and self._take_no_more()  # the loop says that TLS cannot be half closed

    # Called by the parser

    def on_message_begin(self) -> None:
        # uvicorn's own, which makes the ASGI scope, runs once the request goes through ASGI.
        self.url = b""
        self.headers = []
        self._keep_header = self.headers.append
        self.arrival.begin(self.loop.time())

    def on_header(self, name: bytes, value: bytes) -> None:
        # Called for each header, so it does nothing else.
        self._keep_header((name.lower(), value))

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        if self._is_head_too_large():
            raise Problem(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, _HEAD_TOO_LARGE)
        self._keep_header = _ignore  # trailers
        self._fields = dict(self.headers)
        self._check_host()
        self.arrival.end_head()
        self._whole = b""

    def _check_host(self) -> None:
        """Raise Problem unless the host of the request is accepted."""
        host = self._fields.get(b"host")
        if len(self._fields) < len(self.headers) and sum(name == b"host" for name, _ in self.headers) > 1:
            host = b""
        is_plain = host is not None and self.url.startswith(b"/")
        if is_plain and host == self._good_host:
            return
        local = "" if self.server is None else self.server[0]
        # HTTP/1.0 has no such header, but browsers always send it.
        required = host is not None or self.parser.get_http_version() != "1.0"
        stripped = None if host is None else host.rstrip(b" \t")
        problem = self.server_state.hosts.problem(stripped, self.url, local=local, required=required)
        if problem is not None:
            raise problem
        if is_plain:
            self._good_host = host

    def on_body(self, body: bytes) -> None:
        self.arrival.body_bytes += len(body)
        if self._whole is not None:
            if not self._whole:
                self._whole = body
                return
            self._continue_in_asgi()
        # Only the bodies of POST are read; others would be kept for nothing.
        if self.scope["method"] == "POST":
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # `_decline_upgrade` has it parsed again
        self.arrival.end()
        if self._whole is not None:
            if self._take_whole():
                return
            self._continue_in_asgi()
        super().on_message_complete()

    # A request's two ways

    def _take_whole(self) -> bool:
        """Whether the application takes the request, which is there in one piece, without ASGI."""
        url, parser = self.url, self.parser
        if (
            not self._is_answered()
            or len(self._fields) < len(self.headers)
            or parser.get_method() != b"POST"
            or parser.get_http_version() != "1.1"
            or self.flow.write_paused
            # Targets with anything else are checked by uvicorn.
            or not url.startswith(b"/")
            or b"?" in url
            or b"#" in url
            or not url.isascii()
            or url.startswith(CONSOLE)
        ):
            return False
        exchange = _Exchange(keep_alive=parser.should_keep_alive() and not self.server_state.stopping)
        answer = partial(self._answer_whole, exchange)
        if not self._application.take_whole(self._fields, cast("bytes", self._whole), answer):
            return False
        self._whole = None
        self.cycle = self._answering = exchange
        return True

    def _continue_in_asgi(self) -> None:
        """Hand uvicorn the head, and the body so far. Raises Problem, or what uvicorn raises for a bad target."""
        if not self._is_answered() and len(self.pipeline) >= limits.REQUESTS_AHEAD:
            raise Problem(400, f"More than {limits.REQUESTS_AHEAD} requests were sent ahead of their answers.")
        if b"#" in self.url:
            raise Problem(400, "The request target has a fragment (#). Send it without.")
        url, headers, body = _add_path(rb"\1/", self.url), self.headers, self._whole
        expects = self.parser.get_http_version() != "1.0" and any(
            name == b"expect" and value.lower() == b"100-continue" for name, value in headers
        )
        super().on_message_begin()
        self.url, self.headers, self.expect_100_continue = url, headers, expects
        self.scope["headers"] = headers
        self.scope["state"]["memory"] = limits.REQUEST_MEMORY + len(url) + _memory_of(headers)
        is_next = self._is_answered()
        super().on_headers_complete()
        # Not before: a target that uvicorn refuses gets no cycle, so `cycle` is an earlier request's.
        self._whole = None
        if is_next:
            self._answering = self.cycle
        if self.server_state.stopping:
            self.cycle.keep_alive = False
        if body and self.scope["method"] == "POST":
            super().on_body(body)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:  # noqa: ARG002 - uvicorn's signature
        self.server_state.group.create_task(cycle.run_asgi(cast("Any", self._serve)), name="answer a request")

    async def _serve(self, scope: Message, receive: Receive, send: Send) -> None:
        # A listener that is cancelled has cut its clients off. uvicorn would log each of them as an error.
        with suppress(asyncio.CancelledError):
            await self._application(scope, receive, send)

    def on_response_complete(self) -> None:
        self._idle_since = self.loop.time()
        if self.pipeline:
            self._answering, _ = self.pipeline[-1]
            super().on_response_complete()
            self._account()
        elif self.flow.read_paused and not self.transport.is_closing():
            self.flow.resume_reading()

    def _answer_whole(self, exchange: "_Exchange", problem: Problem | None) -> None:
        """Send the answer to a request that was taken whole."""
        exchange.response_complete = True
        transport, keep_alive = self.transport, exchange.keep_alive
        if transport.is_closing():
            return
        if problem is None and keep_alive:
            transport.write(self.server_state.accepted)
        else:
            transport.write(self.server_state.answer(problem, keep_alive=keep_alive))
        if not keep_alive:
            transport.close()
        self.on_response_complete()

    # Limits

    def look_after(self, now: float) -> None:
        """Cut off a client that takes too long, whatever it does."""
        if self.transport.is_closing():
            if self._closing_since is None:
                self._closing_since = now
            elif now - self._closing_since > limits.PATIENCE:
                self.transport.abort()
        elif self.flow.write_paused:
            if now - cast("_Flow", self.flow).unread_since > limits.PATIENCE:
                self.transport.abort()
        elif self.arrival.receiving:
            if self.arrival.is_too_slow(now):
                self._refuse(Problem(HTTPStatus.REQUEST_TIMEOUT, "The request took too long to arrive."))
        elif self._is_answered() and now - self._idle_since > limits.KEEP_ALIVE:
            self.transport.close()

    def _check_size(self, size: int) -> None:
        """Refuse what is too large outside bodies, or does not fit in memory; a piece of `size` bytes was parsed."""
        arrival = self.arrival
        if arrival.is_too_large(size, len(self.headers or ())) and not self.transport.is_closing():
            self._refuse(Problem(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, _HEAD_TOO_LARGE))
        elif self.pipeline or self._heads.amount or (arrival.receiving and arrival.in_head):
            arrival.unfinished_bytes += size
            self._account()

    def _is_head_too_large(self) -> bool:
        if len(self.headers) > limits.HEADERS:
            return True
        # The bytes that were counted may include a body, or an earlier request. So the head itself is measured.
        return (
            self.arrival.head_bytes > limits.HEAD_BYTES
            and len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > limits.HEAD_BYTES
        )

    def _account(self) -> None:
        """Hold memory for requests that wait for their turn and for an incomplete head, or cut the client off."""
        memory = sum(len(cycle.body) + cycle.scope["state"]["memory"] for cycle, _ in self.pipeline)
        if self.arrival.receiving and self.arrival.in_head:
            memory += self.arrival.unfinished_bytes + limits.HEADER_MEMORY * len(self.headers or ())
        if self._heads.resize(memory):
            return
        self.server_state.refused += 1
        if self.pipeline:
            self.transport.abort()  # memory is scarce, so what waits must go at once
        elif not self.transport.is_closing():
            self._refuse(unavailable("Too many requests are waiting. Nothing was stored; send the request again."))

    def _decline_upgrade(self, rest: bytes) -> None:
        """Parse the request again without its offer of another protocol: with it, the parser expects no body."""
        method = self.parser.get_method()
        if method == b"CONNECT":
            self._refuse(Problem(405, "This server is not a proxy.", (b"allow", b"OPTIONS, POST")))
            return
        head = _without_upgrade(method, self.url, self.parser.get_http_version(), self.headers)
        self.parser = httptools.HttpRequestParser(self)
        self.arrival.in_head = True
        self.arrival.head_bytes = 0
        self.data_received(head + rest)

    # Draining

    def finish(self) -> None:
        """The broker stops: a request in progress is the last one. An idle connection stays open for a moment."""
        if not self._is_answered():
            self.cycle.keep_alive = False

    def close_if_idle(self) -> None:
        """Close the connection, unless a request is arriving or being answered."""
        has_begun = self.headers is not None  # a request, ever
        if self._is_answered() and not (self.arrival.receiving and has_begun):
            self.transport.close()

    def abandon_unfinished(self) -> None:
        """Refuse a request that has not arrived by now."""
        if self.arrival.receiving and not self.transport.is_closing():
            self._refuse(unavailable(STOPPING))

    def cut_off(self) -> None:
        """The listener was cancelled: abort the connection, whatever is in progress."""
        for cycle in (self.cycle, self._answering):
            if cycle is not None:
                cycle.disconnected = True  # before the request's task goes on, which would take it for a bug
        self.transport.abort()

    # Refusing

    def _refuse(self, problem: Problem) -> None:
        """Read no more, and tell the client why, unless the answer to this request has begun.

        The client is not told while earlier requests wait for their answers: it would take this answer for theirs.
        """
        if self._take_no_more():
            return
        if not self._is_in_asgi() or not cast("RequestResponseCycle", self.cycle).response_started:
            self._application.count_refused(problem.status)
            self.transport.write(self.server_state.answer(problem, keep_alive=False))
        self.arrival.receiving = False
        self.transport.close()

    def _take_no_more(self) -> bool:
        """Read no more. Whether earlier requests wait for their answers; the last answer closes the connection."""
        self.parser = None  # type: ignore[assignment]  # as uvicorn does once a connection is lost
        if self._is_in_asgi():
            if not self.pipeline:
                return False
            self.pipeline.popleft()
            self.cycle = self.pipeline[0][0] if self.pipeline else cast("RequestResponseCycle", self._answering)
        elif self._is_answered():
            return False
        self.arrival.receiving = False
        self.cycle.keep_alive = False
        self.flow.pause_reading()
        self._account()
        return True

    def _is_answered(self) -> bool:
        """Whether every request that was begun has its answer."""
        return self.cycle is None or self.cycle.response_complete

    def _is_in_asgi(self) -> bool:
        """Whether the request that is being received goes through ASGI already."""
        return self.arrival.receiving and not self.arrival.in_head and self._whole is None


class _Flow(FlowControl):
    """uvicorn's, but while requests wait for their turn nothing is read, whatever else is answered."""

    def __init__(self, transport: asyncio.Transport, pipeline: Sized) -> None:
        super().__init__(transport)
        self._pipeline = pipeline
        self.unread_since = 0.0
        """When the client had left so much unread that writing paused."""

    def resume_reading(self) -> None:
        if not self._pipeline:
            super().resume_reading()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.unread_since = asyncio.get_running_loop().time()


class _Exchange:
    """A request that was taken whole, until it is answered. uvicorn treats it as one of its own cycles."""

    __slots__ = ("disconnected", "keep_alive", "response_complete")

    message_event = asyncio.Event()  # uvicorn sets it; nothing waits for it

    def __init__(self, *, keep_alive: bool) -> None:
        self.keep_alive = keep_alive
        self.disconnected = False
        self.response_complete = False


def _ignore(_header: Header) -> None:
    pass


def _problem_of(error: Exception) -> Problem:
    """The answer to a client for an error of the parser, or of one of its callbacks."""
    cause = error.__context__ if isinstance(error, httptools.HttpParserCallbackError) else error
    if isinstance(cause, Problem):
        return cause
    if isinstance(cause, httptools.HttpParserError | ValueError):  # ValueError: a target that is not ASCII
        return Problem(400, "Malformed HTTP request.")
    return unexpected(cause or error)


def _without_upgrade(method: bytes, url: bytes, version: str, headers: Headers) -> bytes:
    """The head of a request, without its offer of another protocol."""
    lines = [b"%b %b HTTP/%b" % (method, url, version.encode())]
    for name, value in headers:
        if name == b"connection":
            is_last = b"close" in [token.strip() for token in value.lower().split(b",")]
            lines += [b"connection: close"] if is_last else []
        elif name not in (b"upgrade", b"http2-settings"):
            lines.append(name + b": " + value)
    return b"\r\n".join(lines) + b"\r\n\r\n"


def _memory_of(headers: Headers) -> int:
    return sum(len(name) + len(value) for name, value in headers) + limits.HEADER_MEMORY * len(headers)
