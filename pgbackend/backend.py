"""The face of pgbackend: the verbs of a TriggerMesh broker's backend, on PostgreSQL.

From `produce()` to the committed offset, one function a step:

| # | call                               | statement             | what is true afterwards                            |
|---|------------------------------------|-----------------------|----------------------------------------------------|
| 1 | `Backend.produce` → `encode`       |                       | the event is valid and frozen as bytes             |
| 2 | `Appender.append`                  | `append`, or COPY     | it travelled with its neighbours; COMMIT came back |
| 3 | `Wakeup.wake`, `Notifier.notify`    | `notify`              | readers may know; nothing depends on it            |
| 4 | `Stream.run` → `Reader.read`       | `read_page`           | a page above the reading place, in log order       |
| 5 | `Fence.apply_evidence` …           | `appenders_in_flight` | a missing position is dead, pending, or awaited    |
| 6 | `Feed._admit` → `Window.open`      |                       | it is in flight, within the bounds                 |
| 7 | `Pump._deliver` → the dispatcher   |                       | it was handled, or raised; no transaction was open |
| 8 | `Window.settle`, `Shard.note`      |                       | settled, or on its way to redelivery or burial     |
| 9 | `Offsets.commit`                   | `commit_offsets`      | durable, under the shard's epoch                   |

Shutdown is the same table: stop reading (4), finish 7 and 8, commit 9, give up the shards, close the appender.
"""

import asyncio
import logging
import time
from asyncio import _get_running_loop
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager, nullcontext
from datetime import datetime
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar
from uuid import uuid4

from pgbackend import facts
from pgbackend.codec.event import Event
from pgbackend.codec.sdk import encode
from pgbackend.delivery import turns
from pgbackend.delivery.redelivery import Redelivery
from pgbackend.delivery.registration import Registration, is_async, is_generator
from pgbackend.delivery.worker import Worker, process_name
from pgbackend.errors import (
    ConfigError,
    ConnectionLostError,
    NotRunningError,
    PgBackendError,
    ProbeError,
    SchemaError,
    SubscriptionNotFoundError,
    shown,
)
from pgbackend.failures import describe
from pgbackend.log.appender import Appender
from pgbackend.log.incarnation import IncarnationChanged
from pgbackend.log.log import Log
from pgbackend.log.notify import Notifier, Wakeup, channel
from pgbackend.log.requirements import Requirements
from pgbackend.log.segments import Segments
from pgbackend.log_check import LogCheck, all_ok
from pgbackend.model import (
    MAX_CONCURRENCY,
    MAX_NAME_BYTES,
    MAX_POSITION,
    MAX_SHARDS,
    ConsumerDispatcher,
    DeadLetter,
    EventFilter,
    Info,
    Order,
    Position,
    Status,
)
from pgbackend.postgres import schema, sockets
from pgbackend.postgres.dsn import describe_dsn, normalize_dsn
from pgbackend.postgres.pool import Database, GrowingDelay
from pgbackend.postgres.sql import quote_ident
from pgbackend.retry import Retry
from pgbackend.settings import Settings
from pgbackend.subscriptions.definitions import (
    Definition,
    Place,
    Subscriptions,
    Terms,
    busy,
    checked_end,
    checked_place,
    exists,
    not_found,
)

if TYPE_CHECKING:
    from cloudevents.core.base import BaseCloudEvent

    from pgbackend.embedded.server import EmbeddedServer

VERSION = "0.1.0"

_ALLOWANCE = 5.0
"""Seconds beyond `drain_timeout` that `stop()` may take to commit, to give shards up and to close connections."""
_CLOSING = 0.5
"""Seconds that its last steps may take at least."""
_LIFE_POLL = 0.05
_OWN_POLL = 0.01
_HAND_OVER = 5.0
"""Seconds beyond its own bounds that a worker may need to give a shard up."""
_Result = TypeVar("_Result")


class EventProducer(Protocol):
    """Whatever takes events in: TriggerMesh's `backend.EventProducer`."""

    async def produce(self, event: "BaseCloudEvent") -> None:
        """Return once the event is durable. Raises when it is not, or when nobody knows."""
        ...


class Subscribable(Protocol):
    """Whatever hands events out: TriggerMesh's `backend.Subscribable`."""

    async def subscribe(self, name: str, dispatcher: ConsumerDispatcher) -> None:
        """Return once every event produced from now on is sure to be dispatched to the subscription."""
        ...

    async def unsubscribe(self, name: str) -> None:
        """Return once nothing of the subscription is in flight and its offset is committed."""
        ...


class Interface(EventProducer, Subscribable, Protocol):
    """TriggerMesh's `backend.Interface`."""

    def info(self) -> Info:
        """What this backend is. Known before `init()`."""
        ...

    async def init(self) -> None:
        """Return once the backend can be used."""
        ...

    async def start(self) -> None:
        """Dispatch events until stopped or cancelled."""
        ...

    async def probe(self) -> None:
        """Return when the backend works. Raises what is wrong."""
        ...


class Backend:
    """A durable log of CloudEvents in one PostgreSQL schema, and the subscriptions that this process runs.

    >>> async def main() -> None:
    ...     async with Backend("postgresql://localhost/app") as backend:
    ...         await backend.subscribe("billing", print)
    ...         await backend.produce(event)

    It belongs to the event loop and the process in which `init()` runs. There it is safe for all tasks. From other
    threads, such as those that plain functions run in, use `asyncio.run_coroutine_threadsafe(backend.produce(event),
    loop)`. Any other use raises PgBackendError at once; after a fork, and in each `asyncio.run()`, make a new one.
    """

    def __init__(
        self,
        dsn: str,
        *,
        schema: str = "pgbackend",
        listen_dsn: str | None = None,
        hole_wait: float = 1.0,
        poll_interval: float = 1.0,
        commit_interval: float = 0.1,
        lease_timeout: float = 15.0,
        produce_timeout: float = 30.0,
        drain_timeout: float = 30.0,
        max_event_bytes: int = 1 << 20,
        pool_size: int = 4,
        window_events: int = 1000,
        window_bytes: int = 16 << 20,
        buffer_bytes: int = 64 << 20,
    ) -> None:
        """Nothing is connected yet. Raises ConfigError for a setting out of its bounds, and names it.

        `dsn` leads to the log. With several hosts, the one that is the primary is used, now and after each failover.
        `listen_dsn` leads to the same database directly where `dsn` leads through a pooler; it defaults to `dsn`.
        `pgbackend.settings.Settings` documents the others: meaning, unit, bounds and trade-off. Times are in seconds.
        """
        self._dsn: str | None = normalize_dsn(dsn)
        self._embedded: EmbeddedServer | None = None
        self._listen_dsn = normalize_dsn(listen_dsn) if listen_dsn is not None else None
        self._where = describe_dsn(dsn)
        quote_ident(schema)
        self._settings = Settings(
            schema=schema,
            hole_wait=hole_wait,
            poll_interval=poll_interval,
            commit_interval=commit_interval,
            lease_timeout=lease_timeout,
            produce_timeout=produce_timeout,
            drain_timeout=drain_timeout,
            max_event_bytes=max_event_bytes,
            pool_size=pool_size,
            window_events=window_events,
            window_bytes=window_bytes,
            buffer_bytes=buffer_bytes,
        )
        self._id = str(uuid4())
        self._channel = channel(schema)
        self._registrations: dict[str, Registration] = {}
        self._wakeup = Wakeup()
        self._home: asyncio.AbstractEventLoop | None = None
        """The event loop that it belongs to, since `init()`."""
        self._forks = sockets.forks()
        self._one_init = asyncio.Lock()
        self._parts: _Parts | None = None
        self._actors: set[asyncio.Task[None]] = set()
        """What `init()` leaves running: the appender and the notifier."""
        self._worker: Worker | None = None
        self._stop = asyncio.Event()
        self._stopped = False
        self._initializing: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._inside: Counter[int] = Counter()
        """How many calls that wait for events the handler of each event is in, by the event's `id()`."""
        self._calls: set[asyncio.Task[None]] = set()
        """Calls that handlers have made, and that go on after they have returned to them."""
        self._running: asyncio.Task[None] | None = None
        self._died: BaseException | None = None
        """What ended the worker that was started last, if it was not told to end."""
        self._background: asyncio.Task[None] | None = None
        self._body: asyncio.Task[Any] | None = None
        """The task that is inside `async with`."""
        self._body_cancelling: int | None = None
        """Cancellations of that task before the worker's death added one; None while the worker lives."""

    @classmethod
    def embedded(cls, directory: str | PathLike[str], **settings: Any) -> Self:
        """A backend on a PostgreSQL of its own, whose data lives in `directory`. Takes the same settings.

        The server starts with `init()` and stops with the last process that uses the directory.
        """
        # Here, because its package is an extra.
        from pgbackend.embedded.server import EmbeddedServer  # noqa: PLC0415

        backend = cls("postgresql:///postgres", **settings)
        backend._dsn = None
        backend._embedded = EmbeddedServer(directory)
        backend._where = f"embedded in {directory}"
        return backend

    def info(self) -> Info:
        """What this backend is. Known before `init()`."""
        return Info(name="PostgreSQL", version=VERSION, schema=self._settings.schema, server=self._where)

    # The backend's life.

    async def init(self, *, migrate: bool = True) -> None:
        """Return once the log can be used: connected, its tables as this version needs them. Again does nothing.

        `migrate=False` verifies the tables' revision and changes nothing. Raises ConnectionLostError when PostgreSQL
        does not answer or is a standby (its `sqlstate` is 25006 then), SchemaError when the tables are behind (with
        `migrate=False`) or ahead of this version, or cannot be trusted: the log was set back, its sequence altered, or
        this is no PostgreSQL.
        """
        self._check_home()
        home = self._home = asyncio.get_running_loop()
        self._forks = sockets.forks()
        async with self._one_init:
            if self._stopped:
                raise NotRunningError("This backend was stopped. Make a new one.")
            if self._parts is None:
                # A try before this one may have failed.
                self._home = home
                # A task of its own, so that `stop()` can cancel it without cancelling the caller.
                self._initializing = asyncio.create_task(self._init(migrate=migrate), name="pgbackend init")
                try:
                    await self._initializing
                except asyncio.CancelledError:
                    self._home = None
                    if self._stopping is not None and not _is_cancelled():
                        raise NotRunningError("This backend was stopped while it was being initialized.") from None
                    raise
                except BaseException:
                    # Nothing is open: it may be tried again in another loop.
                    self._home = None
                    raise

    async def _init(self, *, migrate: bool) -> None:
        name, settings = self._settings.schema, self._settings
        if self._embedded is not None:
            self._dsn = await self._embedded.start()
        assert self._dsn is not None  # noqa: S101 - one way or the other
        database = Database(self._dsn, listen_dsn=self._listen_dsn, pool_size=self._settings.pool_size)
        try:
            await database.open()
            found = await schema.find_revision(database.fetch, name)
            if migrate and found != schema.head():
                await schema.migrate(database.connect, name)
                found = await schema.find_revision(database.fetch, name)
            schema.check(found, name)
            log = Log(database, schema=name, hole_wait=settings.hole_wait)
            subscriptions = Subscriptions(log, schema=name)
            requirements = Requirements(log, schema=name)
            await _verify(requirements, subscriptions)
            _refuse(await requirements.test_evidence())
            segments = Segments(database, schema=name)
            await segments.extend()
            await log.incarnation.enter()
        except BaseException:
            try:
                await database.close(timeout=_CLOSING)
            finally:
                if self._embedded is not None:
                    await self._embedded.stop()
            raise
        notifier = Notifier(database, channel=self._channel, statement=log.sql.notify, sender=self._id)
        appender = Appender(
            database,
            log.sql,
            schema=name,
            produce_timeout=settings.produce_timeout,
            on_append=self._on_append,
            on_full=segments.extend,
        )
        self._parts = _Parts(
            database,
            log,
            subscriptions,
            segments,
            notifier,
            appender,
            Redelivery(database, schema=name),
            LogCheck(database, subscriptions, requirements, segments, schema=name),
            requirements,
        )
        self._actors = {
            asyncio.create_task(appender.run(), name="append"),
            asyncio.create_task(notifier.run(), name="notify"),
        }

    async def start(self) -> None:
        """Dispatch events to the subscriptions of this process, until `stop()` is called or this call is cancelled.

        Returns once in-flight events have finished, offsets are committed and leases are given up. What is still at
        work after `drain_timeout` is cancelled. What does not end even then, such as a plain function in its thread or
        a handler that swallows the cancellation, is named in the log and left to itself: it can't commit anything. All
        of it takes at most `drain_timeout` and 5 s, also when PostgreSQL does not answer; cancelled a second time, this
        call waits for dispatchers no longer. Lost connections and restarts of PostgreSQL are waited out.
        """
        self._use()
        if self._running is not None:
            raise PgBackendError("This backend is running already.")
        if not self._stopped:
            # Set by an earlier call that was cancelled.
            self._stop.clear()
        self._died = None
        running = self._running = asyncio.create_task(self._run(), name="pgbackend worker")
        running.add_done_callback(self._on_run_ended)
        try:
            # Cancelling this call must drain first: so it never reaches the worker itself, but for a second time.
            await asyncio.wait({running})
        except asyncio.CancelledError:
            self._stop.set()
            await _finish_or_cancel(running)
            raise
        if self._died is not None:
            raise self._died

    def _on_run_ended(self, running: "asyncio.Task[None]") -> None:
        # Here, and not in `start()`, which may have been cancelled three times and be gone.
        self._running = None
        if not running.cancelled():
            self._died = running.exception()
        elif not self._stop.is_set():
            self._died = PgBackendError(
                "The worker's task was cancelled by something outside this backend. To end it, call stop()."
            )
        if self._died is not None:
            facts.emit("worker died", level=logging.ERROR, error=describe(self._died))

    async def _run(self) -> None:
        """One worker after the other, each for one life of the server."""
        parts = self._use()
        backoff = GrowingDelay(parts.database)
        another_life = False
        while not self._stop.is_set():
            self._worker = Worker(
                log=parts.log,
                segments=parts.segments,
                requirements=parts.requirements,
                settings=self._settings,
                registrations=self._registrations,
                wakeup=self._wakeup,
                notifier=parts.notifier,
                channel=self._channel,
                sender=self._id,
            )
            try:
                # Before each: what is stored may be older than what this process has seen.
                await _verify(parts.requirements, parts.subscriptions)
                if another_life:
                    await self._look_for_subscriptions(parts)
                    another_life = False
                await self._worker.run(self._stop)
            except ConnectionLostError as error:
                facts.emit("worker cannot start", level=backoff.failed(), failures=backoff.failures, error=str(error))
                await backoff.wait()
            except IncarnationChanged as error:
                facts.emit("incarnation changed", level=logging.WARNING, error=str(error))
                another_life = True
            finally:
                self._worker = None

    async def _look_for_subscriptions(self, parts: "_Parts") -> None:
        """A subscription that another life of the server does not know is a human's to decide about."""
        for name in list(self._registrations):
            if await parts.subscriptions.find(name) is None:
                facts.emit(
                    "subscription is gone",
                    level=logging.ERROR,
                    subscription=name,
                    error="A failover has lost it, or it was deleted. Subscribe to it again, or restart this process.",
                )

    async def stop(self) -> None:
        """Return once everything has come to its end: no connection is open, no task runs.

        First dispatching, as `start()` says; then events being produced; then connections. An `init()` that is under
        way is cancelled. All of it takes at most `drain_timeout` and 5 s. What can't be ended by then is named in the
        log and left to itself. A `produce()` that can't be answered by then raises ProduceUncertainError when its event
        was sent, else NotRunningError. An embedded server is stopped after that, however long it takes.

        Safe at any time, and again: all calls wait for the same end. A call that is cancelled only stops waiting. From
        a handler it returns once only such handlers are at work; when they have returned as well, their events are
        committed and the rest happens. A task that outlives the handler that made it counts as part of a later one, so
        its call may return early: make such tasks elsewhere.
        """
        self._check_home()
        if self._stopping is None or self._stopping.cancelled():
            self._stopped = True
            self._stop.set()
            self._stopping = asyncio.create_task(self._end(), name="pgbackend stop", context=turns.outside())
        event = self._own_event()
        if event is None or await self._ends(self._stopping, event, None):
            await asyncio.shield(self._stopping)

    async def _end(self) -> None:
        deadline = time.monotonic() + self._settings.drain_timeout + _ALLOWANCE
        try:
            if self._initializing is not None:
                self._initializing.cancel()
            if self._running is not None:
                await self._end_worker(self._running, deadline)
            if self._background is not None:
                await asyncio.wait({self._background})
            if self._calls:
                await asyncio.wait(self._calls, timeout=_left(deadline))
        finally:
            for call in self._calls:
                call.cancel()
            # Also when the event loop ends in the middle, and cancels this.
            try:
                await self._disconnect(deadline)
            finally:
                if self._embedded is not None:
                    await self._embedded.stop()

    async def _end_worker(self, running: "asyncio.Task[None]", deadline: float) -> None:
        """Dispatching has ended. The worker keeps to the deadline by itself once it dispatches."""
        if self._worker is None or not self._worker.dispatches:
            running.cancel()
        await asyncio.wait({running}, timeout=_left(deadline))
        if not running.done():
            running.cancel()
            await asyncio.wait({running}, timeout=_CLOSING)

    async def _disconnect(self, deadline: float) -> None:
        """Every event that was being produced is answered, and nothing of what `init()` made is left."""
        # Behind an `init()` that is cleaning up.
        async with self._one_init:
            parts, self._parts = self._parts, None
        if parts is None:
            return
        try:
            await parts.appender.drain(timeout=_left(deadline))
        finally:
            actors, self._actors = self._actors, set()
            for actor in actors:
                actor.cancel()
            for registration in self._registrations.values():
                registration.close(cancel=True)
            await parts.database.close(timeout=_left(deadline))
        if actors:
            await asyncio.wait(actors)

    async def __aenter__(self) -> Self:
        """`init()`, and `start()` in the background. If that fails, the body is cancelled."""
        await self.init()
        self._body = asyncio.current_task()
        self._background = asyncio.create_task(self.start(), name="pgbackend start")
        self._background.add_done_callback(self._cancel_body)
        return self

    def _cancel_body(self, background: "asyncio.Task[None]") -> None:
        """Nothing is dispatched any more: the body of `async with` is to hear of it now, not when it ends."""
        if self._body is not None and not background.cancelled() and background.exception() is not None:
            self._body_cancelling = self._body.cancelling()
            self._body.cancel()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """`stop()`. Raises what ended dispatching before, if anything did and the body raises nothing of its own."""
        body, self._body = self._body, None
        if body is not None and self._body_cancelling is not None:
            # As `asyncio.timeout()`: a cancellation that came from elsewhere as well goes on.
            is_ours = body.uncancel() <= self._body_cancelling
            if is_ours and isinstance(error, asyncio.CancelledError):
                error = None
        background = self._background
        await self.stop()
        if background is not None and not background.cancelled():
            ended = background.exception()
            if ended is not None and error is None:
                raise ended

    # Producing.

    async def produce(self, event: "BaseCloudEvent") -> None:
        """Return once the event is committed. Any SDK event will do, and those that dispatchers get.

        Raises EventError when it is not a valid CloudEvent or too large, ProduceTimeoutError when it could not be sent
        within `produce_timeout`, DatabaseError when PostgreSQL refused it: in each case it is not stored. Raises
        ProduceUncertainError when the connection was lost while PostgreSQL was committing: nobody knows.
        """
        row, weight = encode(event, max_event_bytes=self._settings.max_event_bytes)
        await self._use().appender.append((row,), weight)

    def produce_soon(self, event: "BaseCloudEvent", done: Callable[[Exception | None], None]) -> None:
        """As `produce()` for whoever has no task to wait in: `done` gets None once it is committed, else the error.

        Raises EventError and NotRunningError at once, and `done` is not called then. `done` must not raise.
        """
        row, weight = encode(event, max_event_bytes=self._settings.max_event_bytes)
        self._use().appender.append_soon(row, weight, done)

    async def produce_many(self, events: Iterable["BaseCloudEvent"]) -> None:
        """Return once all of the events are committed, in one transaction and in their order.

        Raises as `produce()` does; none of them is stored then.
        """
        limit = self._settings.max_event_bytes
        encoded = [encode(event, max_event_bytes=limit) for event in events]
        parts = self._use()
        if encoded:
            rows, weights = zip(*encoded, strict=True)
            await parts.appender.append(rows, sum(weights))

    def _on_append(self, _count: int) -> None:
        parts = self._parts
        self._wakeup.wake()
        if parts is not None:
            parts.notifier.notify()

    # Subscribing.

    async def subscribe(
        self,
        name: str,
        dispatcher: ConsumerDispatcher,
        *,
        start: Place = "latest",
        end: int | datetime | None = None,
        filter: EventFilter | None = None,  # noqa: A002 - the word that everybody uses
        order: Order = "none",
        concurrency: int = 64,
        shards: int = 1,
        retry: Retry = Retry(),  # noqa: B008 - frozen
        dead_letter: ConsumerDispatcher | None = None,
    ) -> None:
        """Return once the subscription exists: every event that is acknowledged from now on will be dispatched to it.

        `dispatcher` handles one event: returning means handled, raising means failed, whatever it raises; only
        SystemExit and KeyboardInterrupt end the process. Plain functions run in threads. Each event starts with the
        context (`contextvars`) of this call.
        `start`: where a new subscription begins ("earliest", "latest", behind a position or a date); an existing one
        goes on from its offset. `end`: the position or date before which it ends. Both bounds are exclusive.
        `filter`: a predicate on the event; what it refuses counts as handled. What it raises is a failure of the event.
        `order`: "none", "key" (events with one key one after another), or "strict" (one at a time, in log order).
        `concurrency`: how many events are dispatched at a time in each shard, by coroutines or threads: a process that
        runs four shards dispatches up to four times as many.
        `retry`: how often and when a failed event is tried again.
        `dead_letter`: gets the events that `dispatcher` did not handle in all its attempts, with the same `retry`;
        those that it does not handle either are kept as dead letters.

        Raises SubscriptionExistsError when this backend runs one of that name, SubscriptionMismatchError when the
        stored one has another order, shard count or end, ConfigError for options that cannot be.
        """
        _check_terms(name, order=order, shards=shards)
        start, end = checked_place(start, f"start of {name!r}"), checked_end(end, f"end of {name!r}")
        _check_dispatching(name, dispatcher, dead_letter, filter, concurrency, retry)
        parts = self._use()
        if name in self._registrations:
            raise exists(name)
        end_position, end_at = _bounds(end)
        wanted = Definition(name=name, order=order, shards=shards, end_position=end_position, end_at=end_at)
        await self._in_this_life(lambda: parts.subscriptions.ensure(wanted, start))
        if name in self._registrations:
            raise exists(name)
        self._registrations[name] = Registration(
            name, dispatcher=dispatcher, dead_letter=dead_letter, filter=filter, concurrency=concurrency, retry=retry
        )
        if self._worker is not None:
            self._worker.claim_soon()

    async def reconfigure(
        self,
        name: str,
        dispatcher: ConsumerDispatcher,
        *,
        filter: EventFilter | None = None,  # noqa: A002 - as in subscribe()
        concurrency: int = 64,
        retry: Retry = Retry(),  # noqa: B008 - frozen
        dead_letter: ConsumerDispatcher | None = None,
    ) -> None:
        """From now on the subscription, which this backend runs, is dispatched so. Takes what `subscribe()` takes.

        Nothing is lost or repeated: what is being dispatched ends as it began. What waits here and does not pass the
        new filter is let go, also of the failed events that are due again. A pause ends, and the target counts as up.
        What is stored of the subscription stays as it is: that is `alter_subscription()`.

        Raises SubscriptionNotFoundError when this backend does not run it, ConfigError for options that cannot be.
        """
        _check_dispatching(name, dispatcher, dead_letter, filter, concurrency, retry)
        self._use()
        registration = self._registrations.get(name)
        if registration is None:
            raise _not_run(name)
        # In one step of the event loop: nothing is dispatched half by the one and half by the other.
        registration.reconfigure(
            dispatcher=dispatcher, dead_letter=dead_letter, filter=filter, concurrency=concurrency, retry=retry
        )
        let_go = self._worker.reconfigured(registration) if self._worker is not None else 0
        facts.emit("subscription reconfigured", subscription=name, let_go=let_go)

    async def _in_this_life(self, call: Callable[[], Awaitable[_Result]]) -> _Result:
        """What the call returns, begun anew when the server turns out to live another life than this process knew."""
        while True:
            try:
                return await call()
            except IncarnationChanged:
                if self._worker is None:
                    await self._use().log.incarnation.enter()
                else:
                    # It notices by itself and drops what it knew; before that nobody may call the new life known.
                    await asyncio.sleep(_LIFE_POLL)

    async def unsubscribe(self, name: str) -> None:
        """Return once nothing of the subscription is in flight here and its offset is committed.

        Dispatches that outlast `drain_timeout` are cancelled and made again once somebody subscribes. A
        plain function cannot be cancelled: the log names its event, which may then be handled twice at once.

        The offset stays: to subscribe again goes on from there. When PostgreSQL cannot be reached to commit it, that is
        logged, and what was handled since the last commit is dispatched again then. Raises SubscriptionNotFoundError
        when this backend does not run it. From a handler of this subscription it returns once nothing else is at work;
        when that handler has returned, its event is committed, and then the shards are given up.
        """
        self._use()
        registration = self._registrations.pop(name, None)
        if registration is None:
            raise _not_run(name)
        await self._call(self._unsubscribe(registration), registration)

    async def _unsubscribe(self, registration: Registration) -> None:
        if self._worker is not None:
            await self._worker.stop_subscription(registration.name)
        registration.close()

    async def delete_subscription(self, name: str) -> None:
        """Return once the subscription is forgotten for good: its offset, what was to be tried again, its dead letters.

        If it runs here it is unsubscribed first; workers elsewhere find their leases lost. From a handler of this
        subscription it is deleted once nothing else is at work; what becomes of that handler's event is not recorded.
        Raises SubscriptionNotFoundError when there is none.
        """
        parts = self._use()
        if name in self._registrations:
            await self.unsubscribe(name)
        await parts.subscriptions.delete(name)
        await parts.notifier.notify_leases()

    async def seek(self, name: str, place: Place) -> None:
        """Return once the subscription's next event is the first behind `place`.

        `place`: a position, a date, "earliest" or "latest". What was waiting to be tried again is dropped, dead letters
        stay. Works wherever the subscription runs. What is at work is not cancelled: here it is waited for up to
        `drain_timeout`, and if it takes longer, it ends without effect on the offset, and this process dispatches from
        the new place once it has ended. From a handler of this subscription it returns once nothing else is at work,
        and moves it when that handler has returned and its event is committed; should that fail, the log says so.

        Raises SubscriptionNotFoundError when there is none.
        """
        place = checked_place(place, f"The place to seek in {name!r}")
        parts = self._use()
        registration = self._registrations.get(name)
        if await parts.subscriptions.find(name) is None:
            raise not_found(name)
        if registration is None:
            await self._in_this_life(lambda: parts.subscriptions.seek(name, place))
            await parts.notifier.notify_leases()
        else:
            await self._call(self._seek(parts, registration, place), registration)

    async def _seek(self, parts: "_Parts", registration: Registration, place: Place) -> None:
        # Here it runs: at rest while it is moved, so that nothing from the old place comes after.
        name = registration.name
        async with self._at_rest(registration):
            await self._in_this_life(lambda: parts.subscriptions.seek(name, place))
            if self._worker is not None:
                # Dispatches that took too long to be waited for settle nothing any more.
                self._worker.lose_subscription(name)
        await parts.notifier.notify_leases()

    async def alter_subscription(self, name: str, *, order: Order, end: int | datetime | None, start: Place) -> None:
        """Return once what is stored of the subscription is so: its order, its end, where it was told to start.

        Nothing is lost or repeated. It rests meanwhile: every worker that runs it lets what is at work end, within its
        `drain_timeout`, and gives its shards up. Nothing is cancelled for that. Where several processes make the same
        call, one of them alters it, and the others find it done.

        `order`: failed events that wait to be tried again keep their attempts; from now on they hold up those behind
        them, or do not any more. On the way to a single shard log order begins where that one does: what the others
        still have comes in the order of each. `end`: a later one has a complete subscription go on, with an earlier one
        it ends there; what it owes from behind that end waits for a later one, but for failed events in order "none",
        which are still tried again. `start`: a position or a date which is not the one that it was given last moves it
        there as `seek()` does, once; "earliest" and "latest" move nothing.

        Raises SubscriptionNotFoundError when there is none, ConfigError for what cannot be, SubscriptionBusyError when
        a worker does not give a shard up: nothing has changed then, and that worker goes on. From a handler of this
        subscription it returns once nothing else is at work in this process, and alters it when that handler has
        returned and its event is committed; should that fail, the log says so.
        """
        _check_terms(name, order=order, shards=1)
        start, end = checked_place(start, f"start of {name!r}"), checked_end(end, f"end of {name!r}")
        parts = self._use()
        end_position, end_at = _bounds(end)
        terms = Terms(order=order, end_position=end_position, end_at=end_at, start=start)
        stored = await parts.subscriptions.compare(name, terms)
        if stored is None:
            return
        registration = self._registrations.get(name) if terms.disturb(stored) else None
        altering = self._alter(parts, name, terms, registration)
        await (altering if registration is None else self._call(altering, registration))

    async def _alter(self, parts: "_Parts", name: str, terms: Terms, registration: Registration | None) -> None:
        async with self._at_rest(registration) if registration is not None else nullcontext(True) as rests:
            if not rests:
                raise busy(name, [process_name()])
            altered = await self._in_this_life(
                lambda: parts.subscriptions.alter(name, terms, patience=self._patience, on_rest=self._tell_workers)
            )
        if altered:
            facts.emit(
                "subscription altered", subscription=name,
                order=terms.order, end=terms.end_position or terms.end_at, start=terms.start,
            )  # fmt: skip
            # Who runs it here claims it now, and nothing is awaited before that: if it is reconfigured next, nothing of
            # the new terms goes the old way. Nor does anybody else hear of it who may know the old way only.
            if registration is None:
                await parts.notifier.notify_leases()

    async def reshard(self, name: str, shards: int) -> None:
        """Return once the subscription has that many shards. It goes on wherever it runs; nobody restarts for it.

        Nothing is lost or repeated, and events of one key stay in their order. It rests for a moment: every worker that
        runs it lets what is at work end, within its `drain_timeout`, and gives its shards up. Those that lag behind go
        on by themselves to where the farthest one stands, before the new ones begin. `subscribe()` wants the new number
        from then on.

        Raises SubscriptionNotFoundError when there is none, ConfigError for a number that cannot be,
        SubscriptionBusyError when a worker does not give a shard up: nothing has changed then, and that worker goes on.
        From a handler of this subscription it returns once nothing else is at work in this process, and changes the
        number when that handler has returned and its event is committed; should that fail, the log says so.
        """
        _check_terms(name, order="none", shards=shards)
        resharding = self._reshard(self._use(), name, shards)
        registration = self._registrations.get(name)
        await (resharding if registration is None else self._call(resharding, registration))

    async def _reshard(self, parts: "_Parts", name: str, shards: int) -> None:
        changed = await self._in_this_life(
            lambda: parts.subscriptions.reshard(name, shards, patience=self._patience, on_rest=self._tell_workers)
        )
        if changed:
            facts.emit("subscription resharded", subscription=name, shards=shards)
            await self._tell_workers()

    def _own_event(self) -> Event | None:
        """The event whose handler is calling, or a task or thread of it, while that event is at work."""
        event = turns.current()
        return event if event is not None and self._worker is not None and self._worker.is_at_work(event) else None

    async def _call(self, call: Coroutine[Any, Any, None], registration: Registration) -> None:
        """Make a call that waits for events of a subscription. From a handler it may go on after this has returned."""
        event = self._own_event()
        if event is None:
            await call
            return
        task = asyncio.create_task(call, name="call from a handler", context=turns.outside())
        try:
            is_over = await self._ends(task, event, registration)
        except BaseException:
            task.cancel()
            raise
        if is_over:
            task.result()
        else:
            self._calls.add(task)
            task.add_done_callback(self._on_call_ended)

    async def _ends(self, task: "asyncio.Task[None]", event: Event, registration: Registration | None) -> bool:
        """Whether the call ends without the events whose handlers are in such calls: they would wait for each other."""
        self._inside[id(event)] += 1
        try:
            while not task.done():
                waited_for = self._worker.stands_waiting_for(registration) if self._worker is not None else []
                if waited_for and all(self._inside[id(other)] for other in waited_for):
                    return False
                await asyncio.wait({task}, timeout=_OWN_POLL)
            return True
        finally:
            self._inside[id(event)] -= 1
            self._inside += Counter()  # drops what is at zero

    def _on_call_ended(self, task: "asyncio.Task[None]") -> None:
        self._calls.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            facts.emit("call from a handler failed", level=logging.ERROR, error=describe(error))

    async def _tell_workers(self) -> None:
        """There are shards to claim or to give up, here or elsewhere."""
        if self._worker is not None:
            self._worker.claim_soon()
        await self._use().notifier.notify_leases()

    @property
    def _patience(self) -> float:
        """Seconds in which workers elsewhere give a shard up or refuse to; a frozen one has lost its lease by then."""
        return max(self._settings.drain_timeout, self._settings.lease_timeout) + _HAND_OVER

    @asynccontextmanager
    async def _at_rest(self, registration: Registration) -> AsyncIterator[bool]:
        """Entered once nothing of the subscription is in flight here; its shards stay free until it is left.

        Or with False, when something is at work for longer than `drain_timeout`: then it is dispatched as before.
        """
        registration.resting += 1
        try:
            yield self._worker is None or await self._worker.rest_subscription(registration.name)
        finally:
            registration.resting -= 1
            if self._worker is not None:
                self._worker.claim_soon()

    # Looking and mending.

    async def status(self) -> Status:
        """The log and every subscription in it, as they stand now."""
        parts = self._use()
        _, _, head = await parts.subscriptions.places()
        return Status(
            head=Position(head),
            segments_until=Position(await parts.segments.extend()),
            subscriptions=await parts.subscriptions.statuses(head=head, running=self._states()),
            appenders=await parts.log.appenders(),
        )

    def _states(self) -> dict[str, str]:
        """By subscription: what it is doing in this process."""
        if self._died is not None:
            return dict.fromkeys(self._registrations, self._obituary())
        return self._worker.states() if self._worker is not None else {}

    def _obituary(self) -> str:
        assert self._died is not None  # noqa: S101 - asked about the dead only
        return f"worker died: {describe(self._died)}"

    def dead_letters(self, subscription: str | None = None) -> AsyncIterator[DeadLetter]:
        """The dead letters of one subscription, or of all, oldest first."""
        return self._use().redelivery.letters(subscription)

    async def redeliver(self, *ids: int, subscription: str | None = None) -> int:
        """Send dead letters to their subscriptions again, from the first attempt on; how many.

        By their ids, or all of one subscription. A letter that is handled is gone; one that fails again stays. Raises
        SubscriptionNotFoundError.
        """
        if not ids and subscription is None:
            raise ConfigError("redeliver() needs the dead letters' ids, or a subscription.")
        for letter in ids:
            if isinstance(letter, bool) or not isinstance(letter, int) or not 1 <= letter <= MAX_POSITION:
                raise ConfigError(f"{shown(letter)} is no dead letter's id. `pgbackend dead-letters list` shows them.")
        parts = self._use()
        if subscription is not None and await parts.subscriptions.find(subscription) is None:
            raise not_found(subscription)
        count = await parts.redelivery.redeliver(list(ids) or None, subscription)
        if self._worker is not None:
            self._worker.redeliver_soon()
        return count

    async def probe(self) -> None:
        """Return when the log can be written to and read: a commit was made durable just now.

        It leaves nothing behind. Raises ProbeError, whose `checks` say for each what is wrong: `connection`, `schema`,
        `primary`, `writable`, `privilege`, `log`, `fence`, `segments`, `write`; without those that could not be made.
        And `worker`, when the worker of this process has died.
        """
        checks = await self._use().log_check.run_once(timeout=self._settings.produce_timeout)
        if self._died is not None:
            checks["worker"] = f"{self._obituary()}. Restart this process, or call start() again."
        if not all_ok(checks):
            raise ProbeError(" ".join(text for text in checks.values() if text != "ok"), checks=checks)

    def _check_home(self) -> None:
        """Raises PgBackendError when this is not the event loop in which `init()` ran, or not its process."""
        # In a forked child no loop counts as running, not even one that the fork happened in.
        home = self._home
        if home is None or home is _get_running_loop():
            return
        if self._forks != sockets.forks():
            where = "the process that this one was forked from. Make a new Backend here"
        elif home.is_closed():
            where = "an event loop that is closed. Make a new Backend in each `asyncio.run()`"
        else:
            where = "another event loop, the one in which `init()` ran"
        raise PgBackendError(
            f"This Backend belongs to {where}. From other threads, hand calls to its loop with "
            "`asyncio.run_coroutine_threadsafe(call, loop)`."
        )

    def _use(self) -> "_Parts":
        self._check_home()
        if self._parts is None:
            raise NotRunningError(
                "This backend was stopped. Make a new one."
                if self._stopped
                else "This backend is not initialized. Call `await backend.init()` first."
            )
        return self._parts


class _Parts:
    """What `init()` makes."""

    __slots__ = (
        "appender",
        "database",
        "log",
        "log_check",
        "notifier",
        "redelivery",
        "requirements",
        "segments",
        "subscriptions",
    )

    def __init__(
        self,
        database: Database,
        log: Log,
        subscriptions: Subscriptions,
        segments: Segments,
        notifier: Notifier,
        appender: Appender,
        redelivery: Redelivery,
        log_check: LogCheck,
        requirements: Requirements,
    ) -> None:
        self.database = database
        self.requirements = requirements
        self.log = log
        self.subscriptions = subscriptions
        self.segments = segments
        self.notifier = notifier
        self.appender = appender
        self.redelivery = redelivery
        self.log_check = log_check


def _left(deadline: float) -> float:
    """Seconds that a last step has until the deadline, in monotonic seconds."""
    return max(deadline - time.monotonic(), _CLOSING)


def _is_cancelled() -> bool:
    """Whether it is the current task that is being cancelled, not just something that it awaited."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _finish_or_cancel(task: "asyncio.Task[None]") -> None:
    """Wait for a task that was asked to end; a second cancellation meanwhile ends it at once."""
    try:
        await asyncio.wait({task})
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.wait({task})


async def _verify(requirements: Requirements, subscriptions: Subscriptions) -> None:
    """Return when no event can be lost, for all that is stored and that catalogs say. Raises SchemaError."""
    await requirements.verify()
    _refuse(await subscriptions.distrust())


def _refuse(problem: str | None) -> None:
    if problem is not None:
        raise SchemaError(problem, found=schema.head(), expected=schema.head())


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _bounds(end: int | datetime | None) -> tuple[int | None, datetime | None]:
    """An end as it is stored: a position or a date."""
    return (None, end) if isinstance(end, datetime) else (end, None)


def _not_run(name: str) -> SubscriptionNotFoundError:
    return SubscriptionNotFoundError(f"This backend runs no subscription {name!r}. Subscribe to it first.")


def _check_dispatching(
    name: str, dispatcher: object, dead_letter: object, filter_: object, concurrency: object, retry: object
) -> None:
    """Raises ConfigError for what a process cannot run a subscription with."""
    if not callable(dispatcher):
        raise ConfigError(f"The dispatcher of {name!r} is {dispatcher!r}: expected a function that takes an event.")
    _check_runs(name, "dispatcher", dispatcher)
    _check_count(name, "concurrency", concurrency, at_most=MAX_CONCURRENCY)
    if not isinstance(retry, Retry):
        raise ConfigError(f"retry is {retry!r}: expected a Retry.")
    if filter_ is not None and (not callable(filter_) or is_async(filter_) or is_generator(filter_)):
        raise ConfigError(
            f"filter of {name!r} is {shown(filter_)}: expected a plain function of the event, or one of filters."
        )
    if dead_letter is not None and not callable(dead_letter):
        raise ConfigError(f"dead_letter is {dead_letter!r}: expected a function that takes an event.")
    _check_runs(name, "dead_letter", dead_letter)


def _check_runs(name: str, role: str, dispatcher: object) -> None:
    if is_generator(dispatcher):
        raise ConfigError(
            f"{role} of {name!r} is {shown(dispatcher)}, a generator function: calling it runs nothing. Use a function "
            "without `yield`."
        )


def _check_count(name: str, label: str, count: object, *, at_most: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= at_most:
        raise ConfigError(f"{label} of {name!r} is {shown(count)}: expected a whole number from 1 to {at_most}.")


def _check_terms(name: str, *, order: str, shards: int) -> None:
    """Raises ConfigError for what cannot be stored of a subscription."""
    if not isinstance(name, str) or not name or "\0" in name or not _is_unicode(name):
        raise ConfigError(f"The subscription's name is {shown(name)}: expected text that is not empty.")
    if len(name.encode()) > MAX_NAME_BYTES:
        raise ConfigError(f"The subscription's name is {shown(name)}: expected at most {MAX_NAME_BYTES} bytes.")
    if order not in ("none", "key", "strict"):
        raise ConfigError(f"order of {name!r} is {order!r}: expected none, key or strict.")
    _check_count(name, "shards", shards, at_most=MAX_SHARDS)
    if order == "strict" and shards != 1:
        raise ConfigError(f"Subscription {name!r} is strict with {shards} shards: log order needs a single one.")
