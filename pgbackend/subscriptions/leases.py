"""Who runs which shard: a worker's sign of life, and the claiming and giving up of shards (I5).

A worker is alive as long as its row in `workers` is renewed, or better: as long as the backend of the connection that
renews it exists. That connection is direct where there is a direct way, lives in a thread of its own with an event loop
of its own, and listens for wake-ups besides, so a dispatcher that blocks the worker's loop costs neither lease nor
hint. Through a pooler it only renews: the backend is not ours, and nobody could be told anything on it later.

What a worker may rely on is its `Tenure`: a monotonic time up to which nobody else can have taken its shards over. It
is counted from before the renewal was sent, and is void at once when the connection is lost: a worker in doubt begins
no dispatch. What it had begun may overlap with the next owner's, and can never be committed: the epoch has changed.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from uuid import UUID

from pgbackend import facts
from pgbackend.errors import ConnectionLostError, PgBackendError
from pgbackend.failures import describe
from pgbackend.log.log import Log
from pgbackend.log.ranges import RangeSet
from pgbackend.model import Epoch, Position
from pgbackend.postgres.pool import Connection, Database, GrowingDelay, is_definite, is_pooled, repeat, translate
from pgbackend.postgres.sql import load
from pgbackend.postgres.sql.statements import LeasesSql
from pgbackend.subscriptions.lease import Lease, Tenure
from pgbackend.subscriptions.sharing import Peer, ShardKey

_END_TIMEOUT = 1.0
"""Seconds that the thread has to end."""
_ECHO_TIMEOUT = 5.0
"""Seconds in which a NOTIFY to itself must come back, before a listener is called deaf."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SurveyedShard:
    """A shard as all workers see it."""

    key: ShardKey
    epoch: int
    owner: UUID | None
    free: bool
    """Whether it is nobody's, or a dead worker's."""
    resting: bool
    """Whether nobody is to run it for now: somebody is about to change its subscription."""
    old: bool
    """Whether it ends, and others take over from there: its subscription's number of shards changes."""
    over: bool
    """Whether it has come to that end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What all workers see."""

    peers: Sequence[Peer]
    shards: Sequence[SurveyedShard]


class Leases:
    """Claims and gives up shards for one worker."""

    def __init__(self, log: Log, *, schema: str, worker: UUID) -> None:
        self._log = log
        self._sql = load(LeasesSql, "leases", schema=schema)
        self._worker = worker

    async def verify_presence(self) -> None:
        """Raises ConnectionLostError when this worker's sign of life cannot be seen where its leases are."""
        if not await self._log.database.fetchval(self._sql.find_worker, self._worker):
            raise ConnectionLostError(
                "listen_dsn does not lead to the same database as dsn: nobody could see there that this worker lives. "
                "Give the same database in both, or no listen_dsn."
            )

    async def survey(self) -> "Survey":
        """Who is alive, and who has which shard."""
        # Workers first: of a shard's owner that is not among them, nothing is known yet but that it lives.
        workers = await self._log.database.fetch(self._sql.survey_workers)
        shards = await self._log.database.fetch(self._sql.survey_shards)
        return Survey(
            peers=[Peer(row["id"], frozenset(row["subscriptions"]), row["asks"]) for row in workers],
            shards=[
                SurveyedShard(
                    key=(row["subscription"], row["shards"], row["shard"]),
                    epoch=row["epoch"],
                    owner=row["owner"],
                    free=row["free"],
                    resting=row["resting"],
                    old=row["old"],
                    over=row["over"],
                )
                for row in shards
            ],
        )

    async def announce(self, subscriptions: Sequence[str], *, asks: bool) -> None:
        """Tell the others what this worker runs, and whether it has room for more."""
        await self._log.database.execute(self._sql.announce, self._worker, subscriptions, asks)

    async def claim(self, shards: Sequence[ShardKey]) -> list[Lease]:
        """Take these shards, those of them that are free now."""
        rows = await self._log.database.fetch(
            self._sql.claim,
            [subscription for subscription, _, _ in shards],
            [count for _, count, _ in shards],
            [shard for _, _, shard in shards],
            self._worker,
            self._log.incarnation.id,
        )
        return [
            Lease(
                subscription=row["subscription"],
                shard=row["shard"],
                shards=row["shards"],
                epoch=Epoch(row["epoch"]),
                until=row["until"],
                position=Position(row["position"]),
                pending=RangeSet.parse(row["pending"]),
                holes=RangeSet.parse(row["holes"]),
                place=row["ctid"],
                complete=row["completed_at"] is not None,
                crashes=row["crashes"],
                head=row["head"],
                order=row["ordering"],
                start_position=row["start_position"],
                start_at=row["start_at"],
                end_position=row["end_position"],
                end_at=row["end_at"],
            )
            for row in rows
        ]

    async def release(self, epochs: Sequence[int]) -> None:
        """Give these shards up; others may claim them from now on."""
        if epochs:
            await self._log.database.execute(self._sql.release, self._worker, epochs)

    async def leave(self) -> None:
        """Forget this worker."""
        await self._log.database.execute(self._sql.leave, self._worker)

    async def forget_dead(self) -> None:
        """Forget the workers that have not been heard of for long."""
        await self._log.database.execute(self._sql.forget_dead)


class Presence:
    """The thread that keeps a worker alive in the eyes of the others, and listens for it."""

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
        """`notify`: the statement that sends one. Both callbacks are called in the loop of `start()`.

        `on_hint`: with each NOTIFY's payload, with "" after connecting. `on_held`: with the epochs that are still this
        worker's, after its tenure had run out.
        """
        self._database = database
        self._sql = load(LeasesSql, "leases", schema=schema)
        self._worker = worker
        self._name = name
        self._lease_timeout = lease_timeout
        self._channel = channel
        self._notify = notify
        self._tenure = tenure
        self._on_hint = on_hint
        self._on_held = on_held
        self._doubts = 0
        self._home: asyncio.AbstractEventLoop | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._ended: asyncio.Future[None] | None = None
        """Done when the thread is over."""
        self._alive = threading.Event()
        self._stop = threading.Event()
        self._told_deaf = False
        self._echo = f"echo {worker}"
        self._heard = 0.0
        self._deafness = GrowingDelay()

    async def start(self) -> None:
        """Return once the worker is registered, and listens if it can. Raises what the first connection raises."""
        self._home = asyncio.get_running_loop()
        first: asyncio.Future[None] = self._home.create_future()
        self._ended = self._home.create_future()
        threading.Thread(target=self._in_thread, args=(first,), name="pgbackend presence", daemon=True).start()
        try:
            await first
        except BaseException:
            await self.stop()
            raise

    async def watch(self) -> None:
        """Raises ConnectionLostError once the thread is over, if it was not stopped."""
        assert self._ended is not None  # noqa: S101 - started
        await asyncio.wait({self._ended})
        if not self._stop.is_set():
            raise _dead(None)

    async def stop(self) -> None:
        """Return once the thread is over and its connection closed."""
        self._tenure.valid_until = 0.0
        self._stop.set()
        loop, task = self._loop, self._task
        if loop is not None and task is not None and not loop.is_closed():
            with suppress(RuntimeError):  # it ended in this moment
                loop.call_soon_threadsafe(task.cancel)
        if self._ended is not None:
            # Not by `join()` in the default executor, which handlers may have filled.
            await asyncio.wait({self._ended}, timeout=_END_TIMEOUT)
            if not self._ended.done():
                facts.emit("presence abandoned", level=logging.WARNING, worker=str(self._worker))

    def _in_thread(self, first: "asyncio.Future[None]") -> None:
        async def main() -> None:
            self._loop = asyncio.get_running_loop()
            self._task = asyncio.current_task()
            await self._run(first)

        try:
            asyncio.run(main())
        except asyncio.CancelledError:
            pass  # stop()
        except BaseException as error:  # noqa: BLE001 - a thread's error has nobody else to tell it
            facts.emit("presence died", level=logging.ERROR, exc_info=error)
            # No file left for an event loop, say, before the first connection could be tried.
            self._tell(first, _dead(error))
        finally:
            self._tenure.valid_until = 0.0
            self._call_home(self._on_ended)

    def _on_ended(self) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    async def _run(self, first: "asyncio.Future[None]") -> None:
        backoff = GrowingDelay(self._database, cap=1.0)
        while not self._stop.is_set():
            connection: Connection | None = None
            try:
                connection = await self._database.connect(direct=True)
                closed = asyncio.Event()
                connection.add_termination_listener(lambda _, closed=closed: closed.set())
                listens = await self._listen(connection)
                await self._renew(connection)
                self._tell(first, None)
                backoff.reset()
                # LISTEN is on, if it can be: whatever came before must be read, whatever comes after will be heard.
                self._hint("")
                await self._beat(connection, closed, listens=listens)
            except Exception as error:  # noqa: BLE001 - anything means: no sign of life, try again
                # First of all: others may take over by now, and telling may take long where nobody reads the log.
                self._doubt()
                if not first.done():
                    self._tell(first, translate(error))
                    return
                facts.emit(
                    "presence lost", level=backoff.failed(), failures=backoff.failures, error=str(translate(error))
                )
            finally:
                # Before the connection goes: others may take over from then on.
                self._doubt()
                if connection is not None:
                    connection.terminate()
            await backoff.wait()

    def _doubt(self) -> None:
        """Nothing is begun from here on, until the worker has renewed and knows what it still has."""
        self._doubts += 1
        self._tenure.valid_until = 0.0

    async def _listen(self, connection: Connection) -> bool:
        """Whether LISTEN is on. Events are found by polling where it cannot be, which is told once."""
        reason = "This connection leads through a pooler"
        if not is_pooled(connection):
            try:
                await connection.add_listener(self._channel, self._on_notify)
            except Exception as error:
                if not is_definite(error):
                    raise
                reason = f"LISTEN was refused: {error}"
            else:
                return True
        if not self._told_deaf:
            self._told_deaf = True
            facts.emit(
                "not listening", level=logging.WARNING,
                reason=f"{reason}, so events are found by polling: let listen_dsn lead to PostgreSQL itself.",
            )  # fmt: skip
        return False

    async def _beat(self, connection: Connection, closed: asyncio.Event, *, listens: bool) -> None:
        """Renew three times a lease, and see that the channel is not deaf. Fails as soon as the connection is lost.

        A deaf channel, or a NOTIFY that PostgreSQL refuses, costs wake-ups. It must not cost the connection: with it go
        the leases.
        """
        interval = self._lease_timeout / 3
        unheard_since: float | None = None
        while True:
            sent = time.monotonic()
            if listens:
                # What could not be sent is not expected back.
                unheard_since = (unheard_since or sent) if await self._send_echo(connection, interval) else None
            with suppress(TimeoutError):
                async with asyncio.timeout(interval):
                    await closed.wait()
            if closed.is_set():
                # Others may take the shards over from this moment on: no waiting for the next renewal to fail.
                raise ConnectionLostError("The connection that keeps this worker's leases was closed.")
            if unheard_since is not None and self._heard >= unheard_since:
                unheard_since = None
                self._deafness.reset()
            elif unheard_since is not None and time.monotonic() - unheard_since > interval + _ECHO_TIMEOUT:
                unheard_since = None
                facts.emit("listener is deaf", level=self._deafness.failed(), channel=self._channel)
                await self._listen_again(connection)
            await self._renew(connection)

    async def _send_echo(self, connection: Connection, timeout: float) -> bool:
        """Whether PostgreSQL took a NOTIFY to this worker itself: it refuses when its queue is full, for one."""
        # Well before `timeout`: when that has passed, the connection is given up.
        patience = f"{max(1, min(500, round(timeout * 300)))}ms"
        try:
            await connection.fetchrow(self._notify, self._channel, self._echo, patience, timeout=timeout)
        except Exception as error:
            if not is_definite(error):
                raise
            facts.emit("echo refused", level=logging.DEBUG, error=str(translate(error)))
            return False
        return True

    async def _listen_again(self, connection: Connection) -> None:
        await connection.remove_listener(self._channel, self._on_notify)
        await connection.add_listener(self._channel, self._on_notify)
        self._hint("")

    async def _renew(self, connection: Connection) -> None:
        # Before it is sent: the server's clock starts counting later than ours, never earlier.
        asked = time.monotonic()
        timeout = self._lease_timeout / 3
        given = (self._worker, self._name, self._lease_timeout, connection.get_server_pid())
        held = await repeat(lambda: connection.fetchval(self._sql.renew, *given, timeout=timeout), timeout)
        until = asked + self._lease_timeout
        if time.monotonic() < self._tenure.valid_until:
            self._tenure.valid_until = until
        else:
            # It was frozen, or cut off: others may have taken shards over. Their pumps must know before they go on.
            self._call_home(self._regain, frozenset(held), until, self._doubts)

    def _regain(self, held: frozenset[int], until: float, doubts: int) -> None:
        # The connection may have been lost again while this waited for the loop.
        if doubts == self._doubts:
            self._on_held(held)
            self._tenure.valid_until = until

    def _on_notify(self, _connection: object, _pid: object, _channel: object, payload: object) -> None:
        text = str(payload)
        if text == self._echo:
            self._heard = time.monotonic()
        elif not text.startswith("echo "):
            self._hint(text)

    def _hint(self, payload: str) -> None:
        self._call_home(self._on_hint, payload)

    def _call_home(self, callback: Callable[..., None], *args: object) -> None:
        """Call it in the loop of `start()`, if that is still there."""
        if self._home is not None and not self._home.is_closed():
            with suppress(RuntimeError):  # it closed in this moment
                self._home.call_soon_threadsafe(callback, *args)

    def _tell(self, first: "asyncio.Future[None]", error: Exception | None) -> None:
        def tell() -> None:
            if not first.done():
                if error is None:
                    first.set_result(None)
                else:
                    first.set_exception(error if isinstance(error, PgBackendError) else translate(error))

        self._call_home(tell)


def _dead(error: BaseException | None) -> ConnectionLostError:
    why = f": {describe(error)}" if error is not None else ""
    return ConnectionLostError(f"The thread that keeps this worker's leases has died{why}. A new worker is started.")
