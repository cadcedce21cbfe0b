"""The HTTP server in front of `ingest`: uvicorn's, but that clients are accepted here.

`app` runs a `Listener` on a socket from `bind`, and stops it. Each client becomes a `connection`, over TLS after a
handshake with what `tls` says then.

Who was accepted is counted, and looked after, from then on; requests in progress are finished before `run` returns.
"""

import asyncio
import errno
import logging
import socket
import ssl
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import uvicorn

from pgbackend import facts
from pgbackend.errors import ConfigError
from pgbackend.serve.ingest.admin import Admin
from pgbackend.serve.ingest.clients import address_of
from pgbackend.serve.ingest.handler import Ingest
from pgbackend.serve.ingest.hosts import Hosts
from pgbackend.serve.ingest.protocol import Connection, State, limit_of_connections
from pgbackend.serve.ingest.tls import TLS

_HANDSHAKE = 10.0
"""Seconds that a TLS handshake may take."""
_LINGER = 0.5
"""Seconds that idle connections stay when the broker stops: what their clients are just sending is taken."""
_GRACE = 3.0
"""Seconds that requests which are still arriving get when the broker stops."""
_ADMINS = 200
"""Connections to the admin port."""


@dataclass(frozen=True, slots=True)
class Ports:
    """The sockets that a broker serves on."""

    events: socket.socket
    admin: socket.socket | None = None

    def close(self) -> None:
        for bound in filter(None, (self.events, self.admin)):
            bound.close()


def bind(host: str, port: int, *, option: str = "--port") -> socket.socket:
    """A socket bound to that address, not listening yet. Raises ConfigError when that cannot be.

    `option`: what to choose another port with.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # Where a name has both, IPv4 first: it is what clients try that know only one.
        family, kind, protocol, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"Host {host!r} is no address: {error.strerror}. Choose another with --host.") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise _no_port(host, port, option, error) from None
    bound.setblocking(False)
    return bound


def _no_port(host: str, port: int, option: str, error: OSError) -> ConfigError:
    if error.errno == errno.EADDRNOTAVAIL:
        return ConfigError(f"Host {host!r} is no address of this machine. Choose another with --host.")
    reason = "it is in use" if error.errno == errno.EADDRINUSE else (error.strerror or str(error)).lower()
    return ConfigError(f"Cannot listen on port {port} of {host}: {reason}. Choose another with {option}.")


class Listener:
    """Serves `app` on a bound socket until `stop()`; takes over the socket.

    `hosts`: what requests may say that they are for. Without it, those of the socket's address.
    """

    def __init__(
        self, app: Ingest | Admin, bound: socket.socket, *, tls: TLS | None = None, hosts: Hosts | None = None
    ) -> None:
        self._app = app
        self._socket = bound
        self._option = "--admin-port" if isinstance(app, Admin) else "--port"
        config = uvicorn.Config(
            app,
            http=Connection,
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
        hosts = hosts or Hosts(bound.getsockname()[0])
        limit = limit_of_connections()
        state = State(min(limit, _ADMINS) if isinstance(app, Admin) else limit, hosts)
        self._server = _Server(config, state, app, tls)

    async def run(self) -> None:
        """Return once `stop()` was called and every request in progress has its answer.

        Raises ConfigError when another process has begun to listen on the port.
        """
        try:
            await self._server.serve(sockets=[self._socket])
        except OSError as error:
            host, port = self._socket.getsockname()[:2]
            raise _no_port(host, port, self._option, error) from None
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


class _Server(uvicorn.Server):
    """Uvicorn's, but that signals are the broker's, and that connections are looked after from the accept on."""

    def __init__(self, config: uvicorn.Config, state: State, app: Ingest | Admin, tls: TLS | None) -> None:
        super().__init__(config)
        self.server_state: State = state
        self.accepting = asyncio.Event()
        self._app = app
        self._tls = tls
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
        """Make a connection of the next client that waits.

        The loop's own server would not count handshakes, and would show the certificate that it began with for ever.
        Nothing is awaited between a client's accept and its connection: what is cancelled there would lose the client.
        """
        self._accept_one(bound)

    def _accept_one(self, bound: socket.socket) -> bool:
        """Whether there was one."""
        try:
            client, (host, *_) = bound.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return False
        except OSError as error:
            # Out of files or memory: when others have gone there is some again.
            facts.emit("accept failed", level=logging.WARNING, error=str(error))
            self._pause_accepting(0.1, self._resume_accepting)
            return False
        client.setblocking(False)
        address = address_of(host)
        admitted = self.server_state.places.take(address, 1)
        connection = Connection(self.config, self.server_state, address, admitted=admitted)
        if self._tls is None:
            self._begin(self._connect(client, connection), self._connecting)
        elif admitted:
            self._begin(self._shake_hands(client, connection, self._tls.context), self._handshakes)
        else:
            self.server_state.refused += 1
            client.close()
        return True

    @staticmethod
    def _begin(connecting: Coroutine[None, None, None], among: set[asyncio.Task[None]]) -> None:
        task = asyncio.create_task(connecting, name="connect a client")
        among.add(task)
        task.add_done_callback(among.discard)

    async def _connect(self, client: socket.socket, connection: Connection) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: connection, client)
        except OSError:  # it has gone
            connection.leave()

    async def _shake_hands(self, client: socket.socket, connection: Connection, context: ssl.SSLContext) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: connection, client, ssl=context, ssl_handshake_timeout=_HANDSHAKE, ssl_shutdown_timeout=_GRACE
            )
        except OSError as error:  # ssl's errors and timeouts are among them
            connection.leave()
            self._failed_handshakes += 1
            self._handshake_error = str(error) or type(error).__name__
        except asyncio.CancelledError:
            # Made just before it was cancelled, it would be closed without being told.
            connection.leave()
            self.server_state.connections.discard(connection)
            raise

    async def on_tick(self, counter: int) -> bool:
        ends = await super().on_tick(counter)
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
            # Far from the limit, one address has used up its share, or the bytes of heads are used up.
            places, heads = self.server_state.places, self.server_state.heads
            facts.emit(
                "connections refused", level=logging.WARNING,
                count=refused, connected=places.held, limit=places.total, head_bytes=heads.held,
            )  # fmt: skip
        failed, self._failed_handshakes = self._failed_handshakes, 0
        if failed:
            facts.emit("tls handshakes failed", count=failed, last=self._handshake_error)

    async def stop_accepting(self) -> None:
        """Return once no connection will be made any more."""
        if self._bound is not None:
            bound, self._bound = self._bound, None
            asyncio.get_running_loop().remove_reader(bound.fileno())
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

    def _connections(self) -> list[Connection]:
        return cast("list[Connection]", list(self.server_state.connections))
