"""Accepts clients, watches over their connections, and drains them when the broker stops.

`app` runs one `Listener` on the port for events and one on the admin port. Each client becomes a `Connection`, over TLS
after a handshake with the certificate of that moment. The promise: a client counts, and is watched, from its accept on;
when `drain` returns, every request that had arrived has its answer, and no client was waited for in vain.
"""

import asyncio
import logging
import socket
import time
from contextlib import suppress
from email.utils import formatdate
from typing import cast

import uvicorn

from pgbackend import facts
from pgbackend.errors import PgBackendError
from pgbackend.serve.ingest import limits
from pgbackend.serve.ingest.clients import Holding, address_of
from pgbackend.serve.ingest.hosts import Hosts
from pgbackend.serve.ingest.ports import cannot_listen
from pgbackend.serve.ingest.protocol import Application, Connection, State
from pgbackend.serve.ingest.tls import TLS

_WATCH_INTERVAL = 1.0
"""Seconds between two looks after all connections."""
_ACCEPT_PAUSE = 0.1
"""Seconds without accepting after the process ran out of files or memory."""


class Listener:
    """Serves `application` on a bound socket, which it takes over.

    `hosts`: what requests may be addressed to; by default what the socket is bound to. `connections`: how many there
    may be. `option`: the command line's option for the port, which the error for a port in use names.
    """

    def __init__(
        self,
        application: Application,
        bound: socket.socket,
        *,
        tls: TLS | None = None,
        hosts: Hosts | None = None,
        connections: int = limits.CONNECTIONS,
        option: str = "--port",
    ) -> None:
        self._application = application
        self._socket = bound
        self._tls = tls
        self._option = option
        self._tasks = asyncio.TaskGroup()
        self.state = State(
            self._tasks, hosts or Hosts(bound.getsockname()[0]), connections=limits.connections(connections)
        )
        self._config = uvicorn.Config(
            application,
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
        self._beginning: set[asyncio.Task[None]] = set()
        """Clients that are accepted and not connected yet; TLS handshakes take a while."""
        self._unclaimed: set[socket.socket] = set()
        """Sockets of accepted clients whose tasks have not begun."""
        self._handshakes = _FailedHandshakes()
        self._started = asyncio.Event()
        self._draining = asyncio.Event()
        self._ended = asyncio.Event()
        self._ended.set()

    async def run(self) -> None:
        """Serve clients until `drain` is called and done, or until cancelled, which cuts them off.

        Raises ConfigError if another process has begun to listen on the port, and PgBackendError in a second run.
        """
        if self._socket.fileno() == -1:
            raise PgBackendError("A listener closes its socket when it ends. Make a new one.")
        self._listen()
        self._ended.clear()
        try:
            async with self._tasks:
                try:
                    watching = self._tasks.create_task(self._watch(), name="watch over connections")
                    self._resume_accepting()
                    self._started.set()
                    await self._draining.wait()
                    await self._drain()
                    watching.cancel()
                finally:
                    # Before the group cancels what is in progress: a client that is cut off gets no answer.
                    self._cut_off()
        finally:
            for client in self._unclaimed:
                client.close()
            self._ended.set()

    async def wait_started(self) -> None:
        """Return once requests are answered."""
        await self._started.wait()

    async def drain(self) -> None:
        """Accept no more clients, and return once `run` does: after the answers to all requests that have arrived.

        Clients of idle connections cannot know. For LINGER seconds their requests are taken, each as the last of its
        connection, so that a restart fails none; later ones are refused. Requests that are arriving get GRACE seconds.
        """
        self._draining.set()
        await self._ended.wait()

    # Accepting

    def _listen(self) -> None:
        try:
            self._socket.listen(self._config.backlog)
        except OSError as error:
            host, port = self._socket.getsockname()[:2]
            raise cannot_listen(host, port, self._option, error) from None
        self._socket.setblocking(False)
        self._set_date()

    def _resume_accepting(self) -> None:
        if not self._draining.is_set():
            asyncio.get_running_loop().add_reader(self._socket.fileno(), self._accept)

    def _pause_accepting(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._socket.fileno())
        loop.call_later(_ACCEPT_PAUSE, self._resume_accepting)

    def _accept(self) -> bool:
        """Whether a client was waiting; its connection begins.

        The event loop's own server would not count handshakes, and would show its first certificate for ever. Nothing
        is awaited between accept() and the task, because a cancellation there would lose the client.
        """
        try:
            client, (host, *_) = self._socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return False
        except OSError as error:
            facts.emit("accept failed", level=logging.WARNING, error=str(error))
            self._pause_accepting()
            return False
        client.setblocking(False)
        address = address_of(host)
        place = Holding(self.state.places, address)
        if not place.grow(1) and self._tls is not None:
            # Over plain HTTP the connection tells the client; a handshake would cost too much.
            self.state.refused += 1
            client.close()
            return True
        connection = Connection(self._config, self.state, address, place)
        self._unclaimed.add(client)
        task = self._tasks.create_task(self._begin(client, connection, place), name="connect a client")
        self._beginning.add(task)
        task.add_done_callback(self._beginning.discard)
        return True

    async def _begin(self, client: socket.socket, connection: Connection, place: Holding) -> None:
        """The client is connected, or has gone, or failed its handshake."""
        self._unclaimed.discard(client)
        connecting = asyncio.create_task(self._connect(client, connection), name="make a connection")
        try:
            await asyncio.shield(connecting)
        except OSError as error:  # the errors and timeouts of TLS are OSErrors
            place.release()
            if self._tls is not None:
                self._handshakes.add(error)
        except asyncio.CancelledError:
            if self._tls is not None:
                connecting.cancel()
            # Without TLS it ends in the next steps of the loop. If it were cancelled, the socket would stay open.
            while not connecting.done():
                with suppress(asyncio.CancelledError):
                    await asyncio.wait({connecting})
            place.release()
            self.state.connections.discard(connection)
            if connection.transport is not None:
                connection.cut_off()
            raise

    async def _connect(self, client: socket.socket, connection: Connection) -> None:
        loop = asyncio.get_running_loop()
        if self._tls is None:
            await loop.connect_accepted_socket(lambda: connection, client)
        else:
            await loop.connect_accepted_socket(
                lambda: connection,
                client,
                ssl=self._tls.context,
                ssl_handshake_timeout=limits.HANDSHAKE,
                ssl_shutdown_timeout=limits.GRACE,
            )

    # Watching

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_WATCH_INTERVAL)
            self._set_date()
            self._look_after_connections()

    def _set_date(self) -> None:
        self.state.set_date(formatdate(time.time(), usegmt=True).encode())

    def _look_after_connections(self) -> None:
        now = asyncio.get_running_loop().time()
        for connection in self._connections():
            connection.look_after(now)
        refused, self.state.refused = self.state.refused, 0
        if refused:
            # Far from the limit, one address has used up its share, or the memory of heads is used up.
            places, heads = self.state.places, self.state.heads
            facts.emit(
                "connections refused", level=logging.WARNING,
                count=refused, connected=places.held, limit=places.total, head_bytes=heads.held,
            )  # fmt: skip
        self._handshakes.report()

    def _connections(self) -> list[Connection]:
        return cast("list[Connection]", list(self.state.connections))

    # Draining

    async def _drain(self) -> None:
        self._application.retire()
        self.state.stopping = True
        await self._stop_accepting()
        for connection in self._connections():
            connection.finish()
        if await self._is_empty_within(limits.LINGER):
            return
        self._application.stop_taking()
        for connection in self._connections():
            connection.close_if_idle()
        if await self._is_empty_within(limits.GRACE - limits.LINGER):
            return
        for connection in self._connections():
            connection.abandon_unfinished()
        # Then clients are cut off: one that reads slowly must not keep the broker from draining its deliveries.
        await self._is_empty_within(limits.LAST_ANSWERS)

    async def _stop_accepting(self) -> None:
        """Return once no connection begins any more."""
        asyncio.get_running_loop().remove_reader(self._socket.fileno())
        # Clients in the socket's queue believe that they are connected, and may have sent something.
        while self._accept():
            pass
        self._socket.close()
        if self._beginning:
            await asyncio.wait(self._beginning, timeout=limits.LINGER)
        for task in self._beginning:
            task.cancel()
        if self._beginning:
            await asyncio.wait(self._beginning)

    async def _is_empty_within(self, seconds: float) -> bool:
        """Whether the last connection ends within so many seconds."""
        self.state.empty.clear()
        if not self.state.connections:
            return True
        try:
            async with asyncio.timeout(seconds):
                await self.state.empty.wait()
        except TimeoutError:
            return False
        return True

    def _cut_off(self) -> None:
        """Abort what `drain` has not ended."""
        self.state.ended = True
        if self._socket.fileno() != -1:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()
        for connection in self._connections():
            connection.cut_off()


class _FailedHandshakes:
    """TLS handshakes that failed since they were reported last."""

    def __init__(self) -> None:
        self._count = 0
        self._last = ""

    def add(self, error: OSError) -> None:
        self._count += 1
        self._last = str(error) or type(error).__name__

    def report(self) -> None:
        count, self._count = self._count, 0
        if count:
            facts.emit("tls handshakes failed", count=count, last=self._last)
