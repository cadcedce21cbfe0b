"""The HTTP server in front of `ingest`: uvicorn, and the limits on connections that it does not have.

A client that sends slowly, or headers without end, or opens connections and says nothing, is told so and cut off; what
it can cost is a place among the connections for some seconds. Requests in progress are finished before `run` returns.
"""

import asyncio
import errno
import json
import logging
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pgbackend import facts
from pgbackend.errors import ConfigError
from pgbackend.serve.ingest import Ingest

_HEAD_BYTES = 1 << 16
_PATIENCE = 20.0
"""Seconds that a request may take to arrive; a longer one has to bring `_BYTES_A_SECOND` meanwhile."""
_BYTES_A_SECOND = 4096
_KEEP_ALIVE = 75.0
_GRACE = 3.0
"""Seconds that requests which are still arriving get when the broker stops."""
_LINGER = 0.5
"""Seconds that connections without a request are kept open when the broker stops: one may be on its way."""
_MAX_CONNECTIONS = 10_000


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to that address, not listening yet. Raises ConfigError when that cannot be."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # Where a name has both, IPv4 first: it is what clients try that know only one.
        family, kind, protocol, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"Host {host!r} is no address of this machine: {error.strerror}.") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise _no_port(host, port, error) from None
    bound.setblocking(False)
    return bound


def _no_port(host: str, port: int, error: OSError) -> ConfigError:
    reason = "it is in use" if error.errno == errno.EADDRINUSE else (error.strerror or str(error)).lower()
    return ConfigError(f"Cannot listen on port {port} of {host}: {reason}. Choose another with --port.")


class Listener:
    """Serves `app` on a bound socket until `stop()`; takes over the socket."""

    def __init__(self, app: Ingest, bound: socket.socket) -> None:
        self._socket = bound
        config = uvicorn.Config(
            app,
            http=_Connection,
            ws="none",
            loop="none",
            interface="asgi3",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=int(_KEEP_ALIVE),
        )
        self._server = _Server(config)

    async def run(self) -> None:
        """Return once `stop()` was called and every request in progress has its answer.

        Raises ConfigError when another process has begun to listen on the port.
        """
        try:
            await self._server.serve(sockets=[self._socket])
        except OSError as error:
            host, port = self._socket.getsockname()[:2]
            raise _no_port(host, port, error) from None

    async def wait_started(self) -> None:
        """Return once requests are being answered."""
        await self._server.accepting.wait()

    def stop(self) -> None:
        """Take no more connections; `run` returns after the requests in progress."""
        self._server.should_exit = True


class _Server(uvicorn.Server):
    """Uvicorn's, but that signals are the broker's, and that connections are looked after."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.accepting = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.accepting.set()

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:
            self._look_after_connections()
        return await super().on_tick(counter)

    def _look_after_connections(self) -> None:
        now = asyncio.get_running_loop().time()
        refused = 0
        for connection in list(self.server_state.connections):
            if isinstance(connection, _Connection):
                connection.check_pace(now)
        refused, _Connection.refused = _Connection.refused, 0
        if refused:
            facts.emit("connections refused", level=logging.WARNING, count=refused, limit=_Connection.limit)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        abandoning = loop.call_later(_GRACE, self._abandon_unfinished)
        try:
            await self._take_leave()
            await super().shutdown(sockets)
        finally:
            abandoning.cancel()

    async def _take_leave(self) -> None:
        """Take no more connections. Each may bring one more request, whose answer says that it is the last.

        To close an idle one at once would lose the request that its client is just sending.
        """
        for server in self.servers:
            server.close()
        # In place: requests that have begun look at the same list.
        self.server_state.default_headers.append((b"connection", b"close"))
        loop = asyncio.get_running_loop()
        until = loop.time() + _LINGER
        while self.server_state.connections and loop.time() < until:
            await asyncio.sleep(0.02)

    def _abandon_unfinished(self) -> None:
        for connection in list(self.server_state.connections):
            if isinstance(connection, _Connection):
                connection.abandon_unfinished()


class _Connection(HttpToolsProtocol):
    """One client's connection.

    It is *receiving* from its start, or the first byte of a request, to that request's last byte; *committing* until
    the answer is written; then *idle*, which uvicorn's own timer ends.
    """

    limit = min(_MAX_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
    refused = 0

    _receiving = True
    _since = 0.0
    _received_bytes = 0
    _body_bytes = 0
    _head_bytes = 0
    _in_head = True
    _offers_upgrade = False
    _refusal = HTTPStatus.BAD_REQUEST

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._since = self.loop.time()
        if len(self.connections) > self.limit:
            _Connection.refused += 1
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "Too many connections. Come back later.")

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._received_bytes += len(data)
        if self._in_head:
            self._head_bytes += len(data)
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.send_400_response("")
            return
        except httptools.HttpParserUpgrade as upgrade:
            self._decline_upgrade(data[upgrade.args[0] :])
            return
        around = self._received_bytes - self._body_bytes
        if self._in_head:
            too_large = self._head_bytes > _HEAD_BYTES
        else:
            # Chunks of one byte have five around it; trailers, which nobody reads, would be kept by the parser.
            too_large = self._receiving and around > 2 * _HEAD_BYTES + 8 * self._body_bytes
        if too_large and not self.transport.is_closing():
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, _HEAD_TOO_LARGE)
        if not self._receiving and self.timeout_keep_alive_task is None and self._is_answered():
            # The end of a body whose request was answered before; uvicorn's timer starts with answers only.
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_message_begin(self) -> None:
        self._receiving = True
        self._since = self.loop.time()
        self._received_bytes = 0
        self._body_bytes = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        # Fields after the body are no headers: nobody authorized them, and they must not become attributes.
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            self._offers_upgrade = True
            return
        if self._head_bytes > _HEAD_BYTES:
            # The bytes counted may include some of the body, or of a request before.
            size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if size > _HEAD_BYTES:
                self._refusal = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
                raise ValueError(_HEAD_TOO_LARGE)
        self._in_head = False
        self._head_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._offers_upgrade:
            return
        self._in_head = True
        self._receiving = False
        super().on_message_complete()

    def _decline_upgrade(self, rest: bytes) -> None:
        """Go on as if the request had not offered another protocol, as Java's client does with every first one.

        The parser takes such a request to be without a body; uvicorn would lose the event's data.
        """
        self._offers_upgrade = False
        method = self.parser.get_method()
        if method == b"CONNECT":
            self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, "This is no proxy.")
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
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete and not cycle.more_body:
            # An earlier request on this connection is being committed and gets its own answer, as the last one.
            cycle.keep_alive = False
            self.flow.pause_reading()
            return
        said = "This is not HTTP as it should be."
        self._refuse(self._refusal, said if self._refusal is HTTPStatus.BAD_REQUEST else _HEAD_TOO_LARGE)

    def check_pace(self, now: float) -> None:
        """A request that arrives too slowly is refused."""
        patience = _PATIENCE + self._received_bytes / _BYTES_A_SECOND
        if self._receiving and now - self._since > patience and not self.transport.is_closing():
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, "The request took too long to arrive.")

    def abandon_unfinished(self) -> None:
        """The broker stops: a request that has not arrived by now is not waited for."""
        if self._receiving and not self.transport.is_closing():
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "The broker is stopping. Nothing was stored; send it again.")

    def _is_answered(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _refuse(self, status: HTTPStatus, detail: str) -> None:
        """Answer, unless an answer has begun, and close."""
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            body = json.dumps({"title": status.phrase, "status": status.value, "detail": detail})
            self.transport.write(
                f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/problem+json\r\n"
                f"{_BESIDES.get(status, '')}content-length: {len(body)}\r\nconnection: close\r\n\r\n{body}".encode()
            )
        self.transport.close()


# What HTTP wants told with these.
_BESIDES = {HTTPStatus.METHOD_NOT_ALLOWED: "allow: POST\r\n", HTTPStatus.SERVICE_UNAVAILABLE: "retry-after: 1\r\n"}
_HEAD_TOO_LARGE = f"The request's headers are too large: expected at most {_HEAD_BYTES} bytes."


def allow_many_connections() -> None:
    """This process may open as many files as it is allowed to, up to what the broker can use."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * _MAX_CONNECTIONS
    wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        _Connection.limit = min(_MAX_CONNECTIONS, wanted // 2)
