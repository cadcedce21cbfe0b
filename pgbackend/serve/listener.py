"""The HTTP server in front of `ingest`: uvicorn, and the limits on connections that it does not have.

A client that sends slowly, or headers without end, or opens connections and says nothing, or does not read what it is
answered, is cut off, and told so where that is possible; what it can cost is a place among the connections for some
seconds. Requests in progress are finished before `run` returns.

A connection, told apart by `_Connection.look_after`:

    receiving   from its start, or the first byte of a request, to that request's last byte: 408 when that takes long
    committing  until the answer is written: the backend's `produce_timeout` bounds it
    unread      its client does not read: aborted after a while
    idle        between two requests: closed after a while
    closing     the last answer is on its way: aborted after a while

A request that is there in one piece is taken by `Ingest.take_whole()`: no ASGI scope, cycle, event and task, which are
two thirds of what uvicorn costs. Any other goes uvicorn's way as soon as that is known.
"""

import asyncio
import errno
import logging
import resource
import socket
import ssl
from collections.abc import Callable, Coroutine, Iterator, MutableSequence
from contextlib import contextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from typing import cast

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from pgbackend import facts
from pgbackend.errors import ConfigError
from pgbackend.serve.ingest import STOPPING, Ingest, Problem, come_back

_HEAD_BYTES = 1 << 16
_PATIENCE = 20.0
"""Seconds that a request may take to arrive, a longer one has to bring `_BYTES_A_SECOND` meanwhile; and seconds that
an answer may take to be read."""
_BYTES_A_SECOND = 4096
_KEEP_ALIVE = 75.0
_HANDSHAKE = 10.0
"""Seconds that a TLS handshake may take."""
_LINGER = 0.5
"""Seconds that idle connections stay when the broker stops: what their clients are just sending is taken."""
_GRACE = 3.0
"""Seconds that requests which are still arriving get when the broker stops."""
_MAX_CONNECTIONS = 10_000
_SLACK = 2
"""Connections that a process may have more than another that shares its port, without leaving the next ones to it."""
_COURTESY = 0.01
"""Seconds that it leaves them to the others; who waits then is taken by whoever is there."""
_MAX_QUEUED = 100
"""Requests that a connection may send ahead of its answers."""
_QUEUED_BYTES = 64 << 20
"""Of all such requests together."""
_QUEUED_REQUEST = 2_500
"""Bytes of memory that such a request takes besides its body."""


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


class TLS:
    """What the server shows, and what clients have to show. `key` may stand in the file of `cert`.

    With `client_ca` only clients with a certificate of one of those authorities get in.
    """

    def __init__(self, cert: Path, key: Path | None = None, client_ca: Path | None = None) -> None:
        """Raises ConfigError for files that cannot be used."""
        self._files = (cert, key, client_ca)
        self.context = _context(*self._files)

    def reload(self) -> None:
        """Connections made from now on get what the files say now. Files that cannot be used change nothing."""
        try:
            self.context = _context(*self._files)
        except ConfigError as error:
            facts.emit("certificates not reloaded", level=logging.ERROR, error=str(error))
        else:
            facts.emit("certificates reloaded", cert=str(self._files[0]))


def _context(cert: Path, key: Path | None, client_ca: Path | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Of TLS 1.2 what Mozilla calls intermediate; those of TLS 1.3 are all good.
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
    context.set_alpn_protocols(["http/1.1"])
    _read("certificate", cert)
    if key is not None:
        _read("key", key)
    encrypted = False

    def no_password() -> str:
        nonlocal encrypted
        encrypted = True
        return ""

    try:
        # Without a callback OpenSSL would ask the terminal.
        context.load_cert_chain(cert, key, no_password)
    except ssl.SSLError as error:
        where = key or cert
        if encrypted:
            raise ConfigError(f"TLS: the key in {where} is encrypted. Decrypt it: openssl pkey -in {where}.") from None
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"TLS: the key in {where} is not that of the first certificate in {cert}.") from None
        if key is None and _has_certificate(cert):
            raise ConfigError(f"TLS: {cert} has no private key. Give one with --tls-key.") from None
        culprit, what = (cert, "certificate") if not _has_certificate(cert) else (where, "private key")
        raise ConfigError(f"TLS: {culprit} has no {what} in PEM form ({error.reason or error}).") from None
    if client_ca is not None:
        _read("client CA", client_ca)
        try:
            context.load_verify_locations(client_ca)
        except ssl.SSLError as error:
            said = f"TLS: the client CA {client_ca} has no certificate in PEM form ({error.reason or error})."
            raise ConfigError(said) from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _read(what: str, path: Path) -> None:
    try:
        path.read_bytes()
    except OSError as error:
        raise ConfigError(f"TLS: the {what} {path} cannot be read: {error.strerror}.") from None


def _has_certificate(path: Path) -> bool:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(path)
    except ssl.SSLError:
        return False
    return True


class Share:
    """What this process has of the connections to a port that several share, and what the others have.

    Who wakes up first takes what comes: left alone, one of two idle processes ends up with 50 of 64 connections that
    are opened together, and keeps them for hours. `counts` is memory of all of them, with a place for each.
    """

    NOBODY = 2**31 - 1
    """In the place of a process that takes no connections."""

    def __init__(self, counts: MutableSequence[int], own: int) -> None:
        self._counts = counts
        self._own = own

    def note(self, connections: int) -> None:
        """This process has so many."""
        self._counts[self._own] = connections

    def is_full(self) -> bool:
        """Whether the next one should be another's."""
        return self._counts[self._own] > min(self._counts) + _SLACK


class Listener:
    """Serves `app` on a bound socket until `stop()`; takes over the socket."""

    def __init__(
        self, app: Ingest, bound: socket.socket, *, tls: TLS | None = None, share: Share | None = None
    ) -> None:
        self._app = app
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
        )
        self._server = _Server(config, app, tls, share)

    async def run(self) -> None:
        """Return once `stop()` was called and every request in progress has its answer.

        Raises ConfigError when another process has begun to listen on the port.
        """
        try:
            await self._server.serve(sockets=[self._socket])
        except OSError as error:
            host, port = self._socket.getsockname()[:2]
            raise _no_port(host, port, error) from None
        finally:
            await self._server.stop_accepting()

    async def wait_started(self) -> None:
        """Return once requests are being answered."""
        await self._server.accepting.wait()

    def stop(self) -> None:
        """Take no more connections; `run` returns after the requests in progress, at the latest the next few seconds'.

        A client of an idle connection could not have known: for a moment what it sends is taken, as the connection's
        last request, so that a process can take over from another without failing any. After that it is refused.
        """
        self._app.retire()
        self._server.server_state.stopping = True
        self._server.should_exit = True


class _State(ServerState):
    """What the connections of a server share."""

    def __init__(self) -> None:
        super().__init__()
        self.stopping = False
        self.refused = 0
        """Connections that were refused since somebody looked, for there were too many."""
        self.queued_bytes = 0
        """What is held of requests that were sent ahead of answers."""
        self.tell_date(b"")

    def tell_date(self, date: bytes) -> None:
        """From now on answers have this header line."""
        accepted = b"HTTP/1.1 202 Accepted\r\n" + date + b"content-length: 0\r\n"
        self.accepted = accepted + b"\r\n"
        self.accepted_and_closed = accepted + b"connection: close\r\n\r\n"


class _Server(uvicorn.Server):
    """Uvicorn's, but that signals are the broker's, and that connections are looked after from the accept on."""

    def __init__(self, config: uvicorn.Config, app: Ingest, tls: TLS | None, share: Share | None) -> None:
        super().__init__(config)
        self.server_state: _State = _State()
        self.accepting = asyncio.Event()
        self._app = app
        self._tls = tls
        self._share = share
        self._bound: socket.socket | None = None
        """Where clients wait, while they are accepted."""
        self._connecting: set[asyncio.Task[None]] = set()
        self._handshakes: set[asyncio.Task[None]] = set()
        self._failed_handshakes = 0
        self._handshake_error = ""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        assert sockets  # noqa: S101 - `Listener.run`
        (bound,) = sockets
        bound.listen(self.config.backlog)
        self.servers = []
        self.started = True
        bound.setblocking(False)
        self._bound = bound
        self._resume_accepting()
        self.accepting.set()

    def _resume_accepting(self) -> None:
        if self._bound is not None:
            asyncio.get_running_loop().add_reader(self._bound.fileno(), self._accept, self._bound)

    def _pause_accepting(self, seconds: float, then: Callable[[], None]) -> None:
        if self._bound is not None:
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._bound.fileno())
            loop.call_later(seconds, then)

    def _accept(self, bound: socket.socket) -> None:
        """Make a connection of the next client that waits, or leave it to another process.

        The loop's own server would not count handshakes, and would show the certificate that it began with for ever.
        Nothing is awaited between a client's accept and its connection: what is cancelled there would lose the client.
        """
        if self._has_its_share():
            self._pause_accepting(_COURTESY, self._accept_rest)
        else:
            self._accept_one(bound)

    def _accept_rest(self) -> None:
        """Who has fewer connections was left the next ones: if it did not take them, it is busy, or frozen."""
        self._resume_accepting()
        if self._bound is not None and self._has_its_share():
            while self._accept_one(self._bound):
                pass

    def _has_its_share(self) -> bool:
        self._tell_others()
        return self._share is not None and self._share.is_full()

    def _tell_others(self) -> None:
        if self._share is not None:
            self._share.note(len(self.server_state.connections) + len(self._connecting) + len(self._handshakes))

    def _accept_one(self, bound: socket.socket) -> bool:
        """Whether there was one."""
        try:
            client, _ = bound.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return False
        except OSError as error:
            # Out of files or memory: when others have gone there is some again.
            facts.emit("accept failed", level=logging.WARNING, error=str(error))
            self._pause_accepting(0.1, self._resume_accepting)
            return False
        client.setblocking(False)
        if self._tls is None:
            self._begin(self._connect(client), self._connecting)
        elif len(self._handshakes) + len(self.server_state.connections) >= _Connection.limit:
            self.server_state.refused += 1
            client.close()
        else:
            self._begin(self._shake_hands(client, self._tls.context), self._handshakes)
        return True

    @staticmethod
    def _begin(connecting: Coroutine[None, None, None], among: set[asyncio.Task[None]]) -> None:
        task = asyncio.create_task(connecting, name="connect a client")
        among.add(task)
        task.add_done_callback(among.discard)

    async def _connect(self, client: socket.socket) -> None:
        with suppress(OSError):  # it has gone
            await asyncio.get_running_loop().connect_accepted_socket(self._connection, client)

    async def _shake_hands(self, client: socket.socket, context: ssl.SSLContext) -> None:
        connection = self._connection()
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: connection, client, ssl=context, ssl_handshake_timeout=_HANDSHAKE, ssl_shutdown_timeout=_GRACE
            )
        except OSError as error:  # ssl's errors and timeouts are among them
            self._failed_handshakes += 1
            self._handshake_error = str(error) or type(error).__name__
        except asyncio.CancelledError:
            # Made just before it was cancelled, it would be closed without being told.
            self.server_state.connections.discard(connection)
            raise

    def _connection(self) -> "_Connection":
        return _Connection(self.config, self.server_state, {})

    async def on_tick(self, counter: int) -> bool:
        ends = await super().on_tick(counter)
        self._tell_others()
        if counter % 10 == 0:
            self.server_state.tell_date(b"".join(b"%b: %b\r\n" % line for line in self.server_state.default_headers))
            self._look_after_connections()
        return ends

    def _look_after_connections(self) -> None:
        now = asyncio.get_running_loop().time()
        for connection in self._connections():
            connection.look_after(now)
        refused, self.server_state.refused = self.server_state.refused, 0
        if refused:
            facts.emit("connections refused", level=logging.WARNING, count=refused, limit=_Connection.limit)
        failed, self._failed_handshakes = self._failed_handshakes, 0
        if failed:
            facts.emit("tls handshakes failed", count=failed, last=self._handshake_error)

    async def stop_accepting(self) -> None:
        """Return once no connection will be made any more."""
        if self._bound is not None:
            bound, self._bound = self._bound, None
            asyncio.get_running_loop().remove_reader(bound.fileno())
            if self._share is not None:
                self._share.note(Share.NOBODY)
            # They are connected, as far as they know, and may have sent something.
            while self._accept_one(bound):
                pass
        if connecting := self._connecting | self._handshakes:
            await asyncio.wait(connecting, timeout=_LINGER)
        for handshake in self._handshakes:
            handshake.cancel()
        if connecting := self._connecting | self._handshakes:
            await asyncio.wait(connecting)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self.stop_accepting()
        loop = asyncio.get_running_loop()
        leaving = loop.call_later(_LINGER, self._close_idle)
        abandoning = loop.call_later(_GRACE, self._abandon_unfinished)
        looking = asyncio.create_task(self._keep_looking(), name="look after connections")
        try:
            await super().shutdown(sockets)
        finally:
            leaving.cancel()
            abandoning.cancel()
            looking.cancel()
            await asyncio.wait({looking})

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(1)
            self._look_after_connections()

    def _close_idle(self) -> None:
        self._app.stop_taking()
        for connection in self._connections():
            connection.close_if_idle()

    def _abandon_unfinished(self) -> None:
        for connection in self._connections():
            connection.abandon_unfinished()

    def _connections(self) -> "list[_Connection]":
        return cast("list[_Connection]", list(self.server_state.connections))


class _Exchange:
    """A request that was taken whole, until it is answered. Looks to uvicorn as one of its cycles does."""

    __slots__ = ("_connection", "disconnected", "keep_alive", "response_complete")

    more_body = False
    response_started = False
    message_event = asyncio.Event()  # nobody waits for it

    def __init__(self, connection: "_Connection", *, keep_alive: bool) -> None:
        self._connection = connection
        self.keep_alive = keep_alive
        self.disconnected = False
        self.response_complete = False

    def answer(self, problem: Problem | None) -> None:
        self.response_complete = True
        self._connection.send_whole(problem, keep_alive=self.keep_alive)


class _Connection(HttpToolsProtocol):
    """One client's connection."""

    limit = min(_MAX_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)

    _state: _State
    _receiving = True
    _since = 0.0
    """When it began to receive, to be unread, to be idle."""
    _closing_since: float | None = None
    _received_bytes = 0
    _body_bytes = 0
    _head_bytes = 0
    _in_head = True
    _undecided = False
    """The head is there, and which way the request goes is open until its last byte or the next silence."""
    _piece = b""
    """The body of an undecided one."""
    _answering: RequestResponseCycle | None = None
    """The one whose answer is next, of those that went uvicorn's way or have one behind them that did."""
    _queued_bytes = 0
    _offers_upgrade = False
    _refusal = HTTPStatus.BAD_REQUEST

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._state = cast("_State", self.server_state)
        self._ingest = cast("Ingest", self.config.app)
        self._since = self.loop.time()
        if len(self.connections) > self.limit:
            self._state.refused += 1
            self._refuse(come_back("Too many connections. Come back later."))

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._answering is not None:
            # Uvicorn told only the newest, which may be queued behind this one.
            self._answering.disconnected = True
            self._answering.message_event.set()
        self.pipeline.clear()
        self._account_for_queue()

    def data_received(self, data: bytes) -> None:
        if self.parser is None or self.transport.is_closing():
            return
        size = len(data)
        self._received_bytes += size
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
        if self.pipeline:
            self._account_for_queue()
        if self._in_head:
            too_large = self._head_bytes > _HEAD_BYTES
        else:
            # Chunks of one byte have five around it; trailers, which nobody reads, would be kept by the parser.
            around = self._received_bytes - self._body_bytes
            too_large = self._receiving and around > 2 * _HEAD_BYTES + 8 * self._body_bytes
        if too_large and not self.transport.is_closing():
            self._refuse(Problem(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, _HEAD_TOO_LARGE))

    def on_message_begin(self) -> None:
        # What uvicorn makes here is made if its way is gone.
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
        self._receiving = True
        self._since = self.loop.time()
        self._received_bytes = 0
        self._body_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        # Fields after the body are no headers: nobody authorized them, and they must not become attributes.
        if self._in_head:
            name = name.lower()
            if name == b"expect" and value.lower() == b"100-continue":
                self.expect_100_continue = True
            self.headers.append((name, value))

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
        self._undecided = True
        self._piece = b""

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._undecided:
            if not self._piece:
                self._piece = body
                return
            self._go_uvicorns_way()
        super().on_body(body)

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
        url, headers, expects, piece = self.url, self.headers, self.expect_100_continue, self._piece
        super().on_message_begin()
        self.url, self.headers, self.expect_100_continue, self._piece = url, headers, expects, b""
        self.scope["headers"] = headers
        is_next, before = self._is_answered(), self.cycle
        super().on_headers_complete()
        self._undecided = False
        if is_next:
            self._answering = self.cycle
        elif len(self.pipeline) == 1:
            self._answering = before
        if self._state.stopping:
            self.cycle.keep_alive = False
        if piece:
            super().on_body(piece)

    def on_response_complete(self) -> None:
        self._since = self.loop.time()
        if self.pipeline:
            self._answering, _ = self.pipeline[-1]
            super().on_response_complete()
            self._account_for_queue()
        elif not self.transport.is_closing():
            # Uvicorn would have a timer for each answer; a connection that is idle for long is found by looking.
            self.flow.resume_reading()

    def _account_for_queue(self) -> None:
        """Requests that were sent ahead of answers are bounded together, whoever sent them."""
        held = sum(len(cycle.body) + _QUEUED_REQUEST for cycle, _ in self.pipeline)
        self._state.queued_bytes += held - self._queued_bytes
        self._queued_bytes = held
        if held and self._state.queued_bytes > _QUEUED_BYTES:
            self._state.refused += 1
            self.transport.abort()

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
        said = "This is not HTTP as it should be."
        self._refuse(Problem(self._refusal, said if self._refusal is HTTPStatus.BAD_REQUEST else _HEAD_TOO_LARGE))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._since = self.loop.time()

    def look_after(self, now: float) -> None:
        """Cut off a client that takes too long, whatever it is that it does."""
        if self.transport.is_closing():
            if self._closing_since is None:
                self._closing_since = now
            elif now - self._closing_since > _PATIENCE:
                self.transport.abort()
        elif self.flow.write_paused:
            if now - self._since > _PATIENCE:
                self.transport.abort()
        elif self._receiving:
            if now - self._since > _PATIENCE + self._received_bytes / _BYTES_A_SECOND:
                self._refuse(Problem(HTTPStatus.REQUEST_TIMEOUT, "The request took too long to arrive."))
        elif self._is_answered() and now - self._since > _KEEP_ALIVE:
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

        Requests before it get their own answers, the last of them closes the connection, and this one gets none: read
        in its place, it would be taken for theirs.
        """
        self.parser = None  # type: ignore[assignment]  # as uvicorn has it once a connection is lost
        has_cycle = not (self._in_head or self._undecided)
        self._receiving = False
        if has_cycle and self.pipeline:
            self.pipeline.popleft()
            self.cycle = self.pipeline[0][0] if self.pipeline else cast("RequestResponseCycle", self._answering)
            has_cycle = False
        if not has_cycle and not self._is_answered():
            self.cycle.keep_alive = False
            self.flow.pause_reading()
            self._account_for_queue()
            return
        if not has_cycle or not self.cycle.response_started:
            self._ingest.count_refused(problem.status)
            self.transport.write(self._written(problem, keep_alive=False))
        self.transport.close()

    def _written(self, problem: Problem, *, keep_alive: bool) -> bytes:
        body = problem.body()
        headers = [*self.server_state.default_headers, *problem.headers, (b"content-length", b"%d" % len(body))]
        if not keep_alive:
            headers.append((b"connection", b"close"))
        lines = [b"HTTP/1.1 %d %b" % (problem.status, HTTPStatus(problem.status).phrase.encode())]
        lines += [b"%b: %b" % header for header in headers]
        return b"\r\n".join(lines) + b"\r\n\r\n" + body


_HEAD_TOO_LARGE = f"The request's headers are too large: expected at most {_HEAD_BYTES} bytes."


def allow_many_connections() -> None:
    """This process may open as many files as it is allowed to, up to what the broker can use."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * _MAX_CONNECTIONS
    wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        _Connection.limit = min(_MAX_CONNECTIONS, wanted // 2)
