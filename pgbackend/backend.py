"""The face of pgbackend: the verbs of a TriggerMesh broker's backend, on PostgreSQL.

Each verb checks its arguments and hands over to one function elsewhere. `lifecycle/` opens and closes the log,
`delivery/runner.py` runs the worker, `delivery/changes.py` changes subscriptions, `log/appender.py` appends.

From `produce()` to the committed offset, one function a step:

| # | call                                      | statement             | what is true afterwards                   |
|---|-------------------------------------------|-----------------------|-------------------------------------------|
| 1 | `Backend.produce` → `encode`              |                       | the event is valid, and bytes             |
| 2 | `Appender.append`                         | `append_one`, or COPY | it is committed, with its whole batch     |
| 3 | `Wakeup.wake`, `Notifier.notify`          | `notify`              | readers may know; nothing depends on it   |
| 4 | `Stream.run` → `Reader.read`              | `read_page`           | it is in a page, in log order             |
| 5 | `Fence.apply_evidence`                    | `take_evidence`       | a gap is dead, pending or awaited         |
| 6 | `Feed._admit` → `Window.open`             |                       | it is in flight and in the backlog        |
| 7 | `Dispatching.step` → `Deliverer.dispatch` |                       | the dispatcher ran, in no transaction     |
| 8 | `Window.settle`, `Settlement.failed`      |                       | it is settled, to be retried, or given up |
| 9 | `Committer.run_once` → `Offsets.commit`   | `commit_offsets`      | that is durable, under the shard's epoch  |

Shutdown goes the same way: stop reading (4), finish 7 and 8, commit (9), release the shards, close the appender.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from datetime import datetime
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from pgbackend.arguments import check_dispatching, check_letters, check_stored, checked_definition, checked_terms
from pgbackend.codec.sdk import encode
from pgbackend.delivery.registration import Registration
from pgbackend.errors import ProbeError
from pgbackend.lifecycle.lifecycle import Lifecycle
from pgbackend.lifecycle.opening import Server
from pgbackend.log_check import all_ok
from pgbackend.model import ConsumerDispatcher, DeadLetter, EventFilter, Info, Order, Position, Status
from pgbackend.postgres.sql import quote_ident
from pgbackend.retry import Retry
from pgbackend.settings import Settings
from pgbackend.subscriptions.places import Place, checked_place

if TYPE_CHECKING:
    from cloudevents.core.base import BaseCloudEvent

VERSION = "0.1.0"


class Backend:
    """A durable log of CloudEvents in one PostgreSQL schema, and the subscriptions that this process runs.

    >>> async def main() -> None:
    ...     async with Backend("postgresql://localhost/app") as backend:
    ...         await backend.subscribe("billing", print)
    ...         await backend.produce(event)

    A Backend belongs to the event loop and the process in which `init()` runs. There it is safe for all tasks. From
    other threads, such as those that plain functions run in, use
    `asyncio.run_coroutine_threadsafe(backend.produce(event), loop)`. Any other use raises PgBackendError at once; after
    a fork, and in each `asyncio.run()`, make a new one.
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
        self._server = Server(dsn, listen_dsn=listen_dsn)
        self._lifecycle = Lifecycle(self._server, self._settings)

    @classmethod
    def embedded(cls, directory: str | PathLike[str], **settings: Any) -> Self:
        """A backend on a PostgreSQL of its own, whose data lives in `directory`. Takes the same settings.

        The server starts with `init()` and stops with the last process that uses the directory.
        """
        backend = cls("postgresql:///postgres", **settings)
        backend._server.embed(directory)
        return backend

    def info(self) -> Info:
        """Name, version, schema and server. Known before `init()`."""
        return Info(name="PostgreSQL", version=VERSION, schema=self._settings.schema, server=self._server.description)

    # The backend's life.

    async def init(self, *, migrate: bool = True) -> None:
        """Return once the log can be used: connected, its tables as this version needs them. Again does nothing.

        `migrate=False` verifies the tables' revision and changes nothing. Raises ConnectionLostError when PostgreSQL
        does not answer or is a standby (its `sqlstate` is 25006 then), SchemaError when the tables are behind (with
        `migrate=False`) or ahead of this version, or cannot be trusted: the log was set back, its sequence was altered,
        or the server is no PostgreSQL.
        """
        await self._lifecycle.init(migrate=migrate)

    async def start(self) -> None:
        """Dispatch events to the subscriptions of this process, until `stop()` is called or this call is cancelled.

        Returns once in-flight events have finished, offsets are committed and leases are released. Lost connections and
        restarts of PostgreSQL are waited out.

        A dispatch that still runs after `drain_timeout` is cancelled. If it does not end even then, as a plain function
        in its thread, the log names it and it is left alone: it cannot commit anything. All of it takes at most
        `drain_timeout` and 5 s, also when PostgreSQL does not answer. Cancelled a second time, this call no longer
        waits for dispatches.
        """
        await self._lifecycle.opened().runner.start()

    async def stop(self) -> None:
        """Return once everything has ended: no connection is open, no task runs.

        Dispatching ends first, as `start()` says, then events that are being produced, then connections. An `init()`
        that is under way is cancelled. All of it takes at most `drain_timeout` and 5 s; what has not ended by then is
        named in the log and left alone. A `produce()` without an answer by then raises ProduceUncertainError when its
        event was sent, else NotRunningError. An embedded server stops after that, however long it takes.

        Safe at any time, and again: all calls wait for the same end. A cancelled call only stops waiting. Called from a
        handler, it returns once only such handlers are at work; the rest happens when they have returned and their
        events are committed. A task that outlives the handler that made it counts as part of a later one, so its call
        may return early: make such tasks elsewhere.
        """
        await self._lifecycle.stop()

    async def __aenter__(self) -> Self:
        """`init()`, and `start()` in the background. If that fails, the body is cancelled."""
        try:
            await self.init()
        except asyncio.CancelledError:
            # It may have come when the log was open already, and there is no body that could end with `stop()`.
            if self._lifecycle.is_open:
                await self.stop()
            raise
        self._lifecycle.enter_body(self.start())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """`stop()`. Raises what ended dispatching before, unless the body raises an error of its own."""
        await self._lifecycle.leave_body(error)

    # Producing.

    async def produce(self, event: "BaseCloudEvent | bytes") -> None:
        """Return once the event is committed. Takes any SDK event, those that dispatchers get, and the JSON format.

        Raises EventError when it is not a valid CloudEvent or too large, ProduceTimeoutError when it could not be sent
        within `produce_timeout`, DatabaseError when PostgreSQL refused it: in each case it is not stored. Raises
        ProduceUncertainError when the connection was lost while PostgreSQL was committing: it may or may not be stored.
        """
        row, weight = encode(event, max_event_bytes=self._settings.max_event_bytes)
        await self._lifecycle.opened().appender.append((row,), weight)

    def produce_soon(self, event: "BaseCloudEvent | bytes", done: Callable[[Exception | None], None]) -> None:
        """As `produce()`, without a task that waits: `done` gets None once the event is committed, else the error.

        Raises EventError and NotRunningError at once, and `done` is not called then. `done` must not raise.
        """
        row, weight = encode(event, max_event_bytes=self._settings.max_event_bytes)
        self._lifecycle.opened().appender.append_soon(row, weight, done)

    async def produce_many(self, events: Iterable["BaseCloudEvent | bytes"]) -> None:
        """Return once all of the events are committed, in one transaction and in their order.

        Raises as `produce()` does; none of them is stored then.
        """
        limit = self._settings.max_event_bytes
        encoded = [encode(event, max_event_bytes=limit) for event in events]
        appender = self._lifecycle.opened().appender
        if encoded:
            rows, weights = zip(*encoded, strict=True)
            await appender.append(rows, sum(weights))

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
        `filter`: a predicate on the event; an event that it refuses counts as handled. An error that it raises is a
        failure of the event.
        `order`: "none", "key" (events with one key one after another), or "strict" (one at a time, in log order).
        `concurrency`: how many events are dispatched at a time in each shard, by coroutines or threads: a process that
        runs four shards dispatches up to four times as many.
        `retry`: how often and when a failed event is tried again.
        `dead_letter`: gets the events that `dispatcher` did not handle in all its attempts, with the same `retry`;
        those that it does not handle either are kept as dead letters.

        Raises SubscriptionExistsError when this backend runs one of that name, SubscriptionMismatchError when the
        stored one has another order, shard count or end, ConfigError for options out of their bounds.
        """
        wanted = checked_definition(name, order=order, shards=shards, end=end)
        place = checked_place(start, f"start of {name!r}")
        check_dispatching(name, dispatcher, dead_letter, filter, concurrency, retry)
        changes = self._lifecycle.opened().changes
        registration = Registration(
            name, dispatcher=dispatcher, dead_letter=dead_letter, filter=filter, concurrency=concurrency, retry=retry
        )
        await changes.subscribe(wanted, place, registration)

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
        """From now on this backend dispatches the subscription, which it runs, with these options of `subscribe()`.

        Nothing is lost or repeated: a running dispatch ends as it began. Waiting events that the new filter refuses
        count as handled, failed ones that are due again too. A pause ends, and the target counts as up. The stored
        order, end and start stay; `alter_subscription()` changes those.

        Raises SubscriptionNotFoundError when this backend does not run it, ConfigError for options out of their bounds.
        """
        check_dispatching(name, dispatcher, dead_letter, filter, concurrency, retry)
        self._lifecycle.opened().changes.reconfigure(
            name, dispatcher=dispatcher, dead_letter=dead_letter, filter=filter, concurrency=concurrency, retry=retry
        )

    async def unsubscribe(self, name: str) -> None:
        """Return once nothing of the subscription is in flight here and its offset is committed.

        A dispatch that outlasts `drain_timeout` is cancelled, and its event is dispatched again to the next subscriber.
        A plain function cannot be cancelled: the log names its event, which may then be handled twice at once.

        The offset stays: a later `subscribe()` goes on from there. When PostgreSQL cannot be reached to commit it, the
        log says so, and events handled since the last commit are dispatched again. Called from a handler of this
        subscription, it returns once nothing else is at work; the shards are released when that handler has returned
        and its event is committed. Raises SubscriptionNotFoundError when this backend does not run it.
        """
        await self._lifecycle.opened().changes.unsubscribe(name)

    async def delete_subscription(self, name: str) -> None:
        """Return once the subscription is deleted for good: its offset, its events to retry, and its dead letters.

        If it runs here it is unsubscribed first; workers elsewhere find their leases lost. Called from a handler of
        this subscription, it deletes it once nothing else is at work; the outcome of that handler's event is not
        recorded. Raises SubscriptionNotFoundError when there is none.
        """
        await self._lifecycle.opened().changes.delete(name)

    async def seek(self, name: str, place: Place) -> None:
        """Return once the subscription's next event is the first behind `place`, wherever it runs.

        `place`: a position, a date, "earliest" or "latest". Events that waited to be tried again are dropped; dead
        letters stay. Running dispatches are not cancelled. Those in this process get up to `drain_timeout`; one that
        takes longer ends without effect on the offset, and dispatching from the new place begins after it. Called from
        a handler of this subscription, it returns once nothing else is at work, and the seek happens when that handler
        has returned and its event is committed; the log says so if it fails.

        Raises SubscriptionNotFoundError when there is none, SubscriptionBusyError when the workers that run it changed
        its shards at every try for 30 s: it has not moved then.
        """
        place = checked_place(place, f"The place to seek in {name!r}")
        await self._lifecycle.opened().changes.seek(name, place)

    async def alter_subscription(self, name: str, *, order: Order, end: int | datetime | None, start: Place) -> None:
        """Return once the subscription is stored with this order, end and start.

        Nothing is lost or repeated. The subscription is drained first: every worker that runs it lets running
        dispatches end, within its `drain_timeout`, and releases its shards. Nothing is cancelled. If several processes
        make the same call, one of them alters it, and the others find it done.

        `order`: failed events that wait to be tried again keep their attempts. From now on they hold up the events
        behind them, or no longer do. On the way to a single shard, log order begins at the place of that shard; what
        the others still have comes in the order of each.
        `end`: with a later one a complete subscription goes on, with an earlier one it ends there. Events behind the
        new end wait for a later one, except for failed events in order "none", which are still tried again.
        `start`: a position or date other than the last one given moves the subscription there as `seek()` does, once;
        "earliest" and "latest" move nothing.

        Raises SubscriptionNotFoundError when there is none, ConfigError for values out of their bounds,
        SubscriptionBusyError when a worker does not release a shard: nothing has changed then, and that worker goes on.
        Called from a handler of this subscription, it returns once nothing else is at work in this process, and the
        change happens when that handler has returned and its event is committed; the log says so if it fails.
        """
        terms = checked_terms(name, order=order, end=end, start=start)
        await self._lifecycle.opened().changes.alter(name, terms)

    async def reshard(self, name: str, shards: int) -> None:
        """Return once the subscription has that many shards. It goes on wherever it runs, without a restart.

        Nothing is lost or repeated, and events of one key stay in their order. The subscription is drained first: every
        worker that runs it lets running dispatches end, within its `drain_timeout`, and releases its shards. Old shards
        that lag behind then go on to where the farthest one stands, before the new ones start. From then on
        `subscribe()` wants the new number.

        Raises SubscriptionNotFoundError when there is none, ConfigError for a number out of its bounds,
        SubscriptionBusyError when a worker does not release a shard: nothing has changed then, and that worker goes on.
        Called from a handler of this subscription, it returns once nothing else is at work in this process, and the
        change happens when that handler has returned and its event is committed; the log says so if it fails.
        """
        check_stored(name, order="none", shards=shards)
        await self._lifecycle.opened().changes.reshard(name, shards)

    # Looking and mending.

    async def status(self) -> Status:
        """The log and every subscription in it, as they stand now."""
        opened = self._lifecycle.opened()
        head = await opened.overview.find_head()
        return Status(
            head=head,
            segments_until=Position(await opened.segments.extend()),
            subscriptions=await opened.overview.list_statuses(head=head, states=opened.runner.states()),
            appenders=await opened.log.appenders(),
        )

    def dead_letters(self, subscription: str | None = None) -> AsyncIterator[DeadLetter]:
        """The dead letters of one subscription, or of all, oldest first."""
        return self._lifecycle.opened().redelivery.letters(subscription)

    async def redeliver(self, *ids: int, subscription: str | None = None) -> int:
        """Dispatch dead letters to their subscriptions again, from the first attempt on; returns how many.

        Give their ids, or a subscription for all of its letters. A letter that is handled is deleted; one that fails
        again stays. Raises SubscriptionNotFoundError, and ConfigError for something that is no id.
        """
        check_letters(ids, subscription)
        return await self._lifecycle.opened().changes.redeliver(ids, subscription)

    async def probe(self) -> None:
        """Return when the log can be written to and read: a commit was made durable just now.

        It leaves nothing behind. Raises ProbeError, whose `checks` say for each check "ok" or what is wrong:
        `connection`, `schema`, `primary`, `writable`, `privilege`, `log`, `fence`, `segments`, `write`; a failed check
        leaves later ones out. `worker` is among them when the worker of this process has died.
        """
        opened = self._lifecycle.opened()
        checks = await opened.check.run_once(timeout=self._settings.produce_timeout)
        if opened.runner.error is not None:
            checks["worker"] = f"{opened.runner.describe_error()}. Restart this process, or call start() again."
        if not all_ok(checks):
            raise ProbeError(" ".join(text for text in checks.values() if text != "ok"), checks=checks)
