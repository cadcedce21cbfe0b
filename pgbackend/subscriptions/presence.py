"""Presence: a thread that keeps a worker alive in the eyes of the others, and listens for wake-ups.

A worker is alive while its row in `workers` is renewed, or better: while the backend of the connection that renews it
exists. The connection is direct where that is possible, and lives in a thread with an event loop of its own, so that a
dispatcher that blocks the worker's loop costs neither leases nor wake-ups. Through a pooler the thread only renews.

A worker may rely on its `Tenure`: a monotonic time before which no other worker can have taken its shards over. It is
counted from before a renewal was sent, and is void at once when the connection is lost: then the worker starts no
dispatch until it has renewed. A running dispatch may overlap with the next owner's, but can never be committed, because
the epoch has changed.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from uuid import UUID

from pgbackend import facts
from pgbackend.errors import ConnectionLostError, PgBackendError
from pgbackend.postgres.connections import Connection, is_pooled
from pgbackend.postgres.errors import is_definite, translate
from pgbackend.postgres.pool import Database
from pgbackend.postgres.reconnect import GrowingDelay, repeat
from pgbackend.postgres.sql import load
from pgbackend.postgres.sql.statements import LeasesSql
from pgbackend.thrown import describe

_END_TIMEOUT = 1.0
"""Seconds that the thread has to end."""
_ECHO_TIMEOUT = 5.0
"""Seconds in which a NOTIFY to itself must come back, before a listener counts as deaf."""


class Tenure:
    """Until when this worker may start dispatches, in monotonic seconds."""

    __slots__ = ("lapses", "valid_until")

    def __init__(self) -> None:
        self.valid_until = 0.0
        """Set by the thread."""
        self.lapses = 0
        """How often it ran out and came back. Each time, others may have claimed shards of this worker."""


class Presence:
    """Runs a worker's heartbeat in a thread.

    It has `start()` and `stop()` instead of `run()`: the worker must stay alive for the others until its last task has
    ended, and that includes tasks that outlast a cancelled task group.
    """

    def __init__(
        self,
        database: Database,
        *,
        schema: str,
        worker: UUID,
        name: str,
        lease_timeout: float,
        channel: str,
        notify: str,
        tenure: Tenure,
        on_hint: Callable[[str], None],
        on_held: Callable[[frozenset[int]], None],
    ) -> None:
        """`notify`: the statement that sends a NOTIFY. Both callbacks are called in the loop of `start()`.

        `on_hint`: with each NOTIFY's payload, and with "" after connecting. `on_held`: with the epochs that this worker
        still has, after its tenure had run out.
        """
        self._tenure = tenure
        self._worker = worker
        self._home = _Home()
        self._heartbeat = _Heartbeat(
            database,
            sql=load(LeasesSql, "leases", schema=schema),
            me=_Me(id=worker, name=name, lease_timeout=lease_timeout),
            tenure=tenure,
            listener=_Listener(channel, worker=worker, notify=notify, hint=lambda text: self._home.call(on_hint, text)),
            home=self._home,
            on_held=on_held,
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._ended: asyncio.Future[None] | None = None
        """Done when the thread has ended."""
        self._stopping = threading.Event()

    async def start(self) -> None:
        """Return once the worker is registered, and listens if it can. Raises what the first connection raises."""
        home = self._home.loop = asyncio.get_running_loop()
        registered: asyncio.Future[None] = home.create_future()
        self._ended = home.create_future()
        threading.Thread(target=self._in_thread, args=(registered,), name="pgbackend presence", daemon=True).start()
        try:
            await registered
        except BaseException:
            await self.stop()
            raise

    async def watch(self) -> None:
        """Raise ConnectionLostError once the thread has ended without being stopped."""
        assert self._ended is not None  # noqa: S101 - started
        await asyncio.wait({self._ended})
        if not self._stopping.is_set():
            raise _dead(None)

    async def stop(self) -> None:
        """Return once the thread has ended and its connection is closed. Safe at any time, and again."""
        self._tenure.valid_until = 0.0
        self._stopping.set()
        loop, task = self._loop, self._task
        if loop is not None and task is not None and not loop.is_closed():
            with suppress(RuntimeError):  # it ended in this moment
                loop.call_soon_threadsafe(task.cancel)
        if self._ended is not None:
            # Not by `join()` in the default executor, which handlers may have filled.
            await asyncio.wait({self._ended}, timeout=_END_TIMEOUT)
            if not self._ended.done():
                facts.emit("presence abandoned", level=logging.WARNING, worker=str(self._worker))

    def _in_thread(self, registered: "asyncio.Future[None]") -> None:
        async def main() -> None:
            self._loop = asyncio.get_running_loop()
            self._task = asyncio.current_task()
            if not self._stopping.is_set():
                await self._heartbeat.run(registered)

        try:
            asyncio.run(main())
        except asyncio.CancelledError:
            pass  # stop()
        except BaseException as error:  # noqa: BLE001 - the thread has no caller that it could raise to
            facts.emit("presence died", level=logging.ERROR, exc_info=error)
            # For example no file was left for an event loop, before the first connection was tried.
            self._home.answer(registered, _dead(error))
        finally:
            self._tenure.valid_until = 0.0
            self._home.answer(registered, _dead(None))
            assert self._ended is not None  # noqa: S101 - started
            self._home.answer(self._ended, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Me:
    """How this worker is registered."""

    id: UUID
    name: str
    lease_timeout: float


class _Home:
    """The event loop that the worker runs in, as the thread sees it."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None

    def call(self, callback: Callable[..., None], *args: object) -> None:
        """Call it in that loop, unless the loop is closed."""
        if self.loop is not None and not self.loop.is_closed():
            with suppress(RuntimeError):  # it closed in this moment
                self.loop.call_soon_threadsafe(callback, *args)

    def answer(self, future: "asyncio.Future[None]", error: Exception | None) -> None:
        """Resolve a future of that loop, unless it is resolved."""

        def resolve() -> None:
            if future.done():
                return
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error if isinstance(error, PgBackendError) else translate(error))

        self.call(resolve)


class _Heartbeat:
    """Registers and renews the worker on one connection after another."""

    def __init__(
        self,
        database: Database,
        *,
        sql: LeasesSql,
        me: _Me,
        tenure: Tenure,
        listener: "_Listener",
        home: _Home,
        on_held: Callable[[frozenset[int]], None],
    ) -> None:
        self._database = database
        self._sql = sql
        self._me = me
        self._tenure = tenure
        self._listener = listener
        self._home = home
        self._on_held = on_held
        self._doubts = 0
        """How often the tenure was void."""

    async def run(self, registered: "asyncio.Future[None]") -> None:
        """Keep the worker registered until cancelled. Return when the first connection fails; `registered` says why."""
        delay = GrowingDelay(self._database, cap=1.0)
        while True:
            connection: Connection | None = None
            try:
                connection = await self._database.connect(direct=True)
                closed = asyncio.Event()
                connection.add_termination_listener(lambda _, closed=closed: closed.set())
                await self._listener.listen(connection)
                await self._renew(connection)
                self._home.answer(registered, None)
                delay.reset()
                # LISTEN is on, if it can be. Earlier events must be read now; later ones will be heard.
                self._listener.hint("")
                await self._beat(connection, closed)
            except Exception as error:  # noqa: BLE001 - whatever it is, there is no heartbeat: try again
                # Before anything else: others may take over by now, and a slow reader of the log may block `emit`.
                self._doubt()
                if not registered.done():
                    self._home.answer(registered, translate(error))
                    return
                facts.emit("presence lost", level=delay.failed(), failures=delay.failures, error=str(translate(error)))
            finally:
                # Before the connection goes: others may take over from then on.
                self._doubt()
                if connection is not None:
                    connection.terminate()
            await delay.wait()

    async def _beat(self, connection: Connection, closed: asyncio.Event) -> None:
        """Renew three times a lease, and check that the listener hears. Raises as soon as the connection is lost."""
        interval = self._me.lease_timeout / 3
        while True:
            await self._listener.send_echo(connection, interval)
            with suppress(TimeoutError):
                async with asyncio.timeout(interval):
                    await closed.wait()
            if closed.is_set():
                # Others may take the shards over from now on, so do not wait for the next renewal to fail.
                raise ConnectionLostError("The connection that keeps this worker's leases was closed.")
            await self._listener.check_echo(connection, interval)
            await self._renew(connection)

    async def _renew(self, connection: Connection) -> None:
        # Before it is sent: the server starts to count later than this process, never earlier.
        asked = time.monotonic()
        timeout = self._me.lease_timeout / 3
        given = (self._me.id, self._me.name, self._me.lease_timeout, connection.get_server_pid())
        held = await repeat(lambda: connection.fetchval(self._sql.renew, *given, timeout=timeout), timeout)
        until = asked + self._me.lease_timeout
        if time.monotonic() < self._tenure.valid_until:
            self._tenure.valid_until = until
        else:
            # The process was frozen or cut off, and others may have taken shards over. Their pumps must know first.
            self._home.call(self._regain, frozenset(held), until, self._doubts)

    def _doubt(self) -> None:
        """Nothing is started from here on, until the worker has renewed and knows what it still has."""
        self._doubts += 1
        self._tenure.valid_until = 0.0

    def _regain(self, held: frozenset[int], until: float, doubts: int) -> None:
        # The connection may have been lost again while this waited for the loop.
        if doubts == self._doubts:
            self._on_held(held)
            self._tenure.valid_until = until


class _Listener:
    """LISTENs on the heartbeat's connection, and tests with NOTIFYs to itself that it hears.

    A deaf channel, or a NOTIFY that PostgreSQL refuses, costs wake-ups. It must not cost the connection, and with it
    the leases.
    """

    def __init__(self, channel: str, *, worker: UUID, notify: str, hint: Callable[[str], None]) -> None:
        self.hint = hint
        """Takes a payload home."""
        self._channel = channel
        self._notify = notify
        self._echo = f"echo {worker}"
        self._listens = False
        self._heard = 0.0
        """When the last echo came back."""
        self._unheard_since: float | None = None
        """When the first echo was sent that has not come back."""
        self._deafness = GrowingDelay()
        self._reported = False

    async def listen(self, connection: Connection) -> None:
        """LISTEN on a new connection. If that is impossible, events are found by polling, and the log says so once."""
        self._listens, self._unheard_since = False, None
        reason = "This connection leads through a pooler"
        if not is_pooled(connection):
            try:
                await connection.add_listener(self._channel, self._on_notify)
            except Exception as error:
                if not is_definite(error):
                    raise
                reason = f"LISTEN was refused: {error}"
            else:
                self._listens = True
                return
        if not self._reported:
            self._reported = True
            facts.emit(
                "not listening", level=logging.WARNING,
                reason=f"{reason}, so events are found by polling: let listen_dsn lead to PostgreSQL itself.",
            )  # fmt: skip

    async def send_echo(self, connection: Connection, interval: float) -> None:
        """Send a NOTIFY to this worker itself, within the `interval` seconds between two renewals."""
        if not self._listens:
            return
        sent = time.monotonic()
        # Well before the interval ends: then the connection is given up.
        patience = f"{max(1, min(500, round(interval * 300)))}ms"
        try:
            await connection.fetchrow(self._notify, self._channel, self._echo, patience, timeout=interval)
        except Exception as error:
            if not is_definite(error):
                raise
            # PostgreSQL refuses it when its queue is full, for one. An echo that was not sent does not come back.
            self._unheard_since = None
            facts.emit("echo refused", level=logging.DEBUG, error=str(translate(error)))
        else:
            self._unheard_since = self._unheard_since or sent

    async def check_echo(self, connection: Connection, interval: float) -> None:
        """LISTEN anew if no echo has come back for too long."""
        if self._unheard_since is None:
            return
        if self._heard >= self._unheard_since:
            self._unheard_since = None
            self._deafness.reset()
        elif time.monotonic() - self._unheard_since > interval + _ECHO_TIMEOUT:
            self._unheard_since = None
            facts.emit("listener is deaf", level=self._deafness.failed(), channel=self._channel)
            await connection.remove_listener(self._channel, self._on_notify)
            await connection.add_listener(self._channel, self._on_notify)
            self.hint("")

    def _on_notify(self, _connection: object, _pid: object, _channel: object, payload: object) -> None:
        text = str(payload)
        if text == self._echo:
            self._heard = time.monotonic()
        elif not text.startswith("echo "):
            self.hint(text)


def _dead(error: BaseException | None) -> ConnectionLostError:
    why = f": {describe(error)}" if error is not None else ""
    return ConnectionLostError(f"The thread that keeps this worker's leases has died{why}. A new worker is started.")
