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

With `connection=` the event goes into a transaction of the caller's: `Outbox.append` takes step 2, by `append_rows`,
and step 3 follows when that transaction has ended.

Shutdown goes the same way: stop reading (4), finish 7 and 8, commit (9), release the shards, close the appender.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from datetime import datetime, timedelta
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from pgbackend.arguments import (
    check_letters,
    check_position,
    check_repeats,
    check_stored,
    check_text,
    checked_definition,
    checked_handling,
    checked_retention,
    checked_terms,
)
from pgbackend.codec.sdk import encode, encode_many
from pgbackend.delivery.registration import Handling, Registration
from pgbackend.errors import ProbeError
from pgbackend.lifecycle.lifecycle import Lifecycle
from pgbackend.lifecycle.opening import Server
from pgbackend.log_check import all_ok
from pgbackend.model import (
    DeadLetter,
    DeadLetterGroup,
    Dispatcher,
    EventFilter,
    Info,
    Order,
    Redaction,
    Retention,
    SeekPreview,
    Status,
    WaitingEvent,
)
from pgbackend.postgres.sql import quote_ident
from pgbackend.retry import Retry
from pgbackend.settings import Settings, check_window
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
        deduplicate: timedelta | None = None,
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
            deduplicate=deduplicate,
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
        or the server is no PostgreSQL. Raises DatabaseError when `deduplicate` is not the log's window and this role
        may not change it.
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

    async def produce(
        self, event: "BaseCloudEvent | bytes", *, connection: object | None = None, notify: bool = False
    ) -> None:
        """Return once the event is committed. Takes any SDK event, those that dispatchers get, and the JSON format.

        Raises EventError when it is not a valid CloudEvent or too large, ProduceTimeoutError when it could not be sent
        within `produce_timeout`, DatabaseError when PostgreSQL refused it: in each case it is not stored. Raises
        ProduceUncertainError when the connection was lost while PostgreSQL was committing: it may or may not be stored.

        `connection`: produce in the open transaction of this connection of yours, to the log's database. Return once
        the event was inserted; it appears if and when that transaction commits. It is an asyncpg connection, also of a
        pool, a psycopg 3 AsyncConnection, or an SQLAlchemy AsyncConnection or AsyncSession. The transaction stays
        yours, and the driver's errors reach you as they are. Raises ConfigError for a connection that is in no
        transaction or is of another kind (`pgbackend.outbox` has the function for synchronous ones): nothing was sent.
        Raises SchemaError when its database has no such log.
        `notify`: put a NOTIFY into that transaction. Without it this process notices the commit by itself, 50 ms later
        at most, and notifies others then. A process that commits and ends at once needs the NOTIFY. It costs: all
        commits of the server that notify go one after another.

        If the log deduplicates, an event is not stored again that was stored within the window. Then a lost connection
        raises nothing unless it is not back within `produce_timeout`: the event is sent again.
        """
        row, weight = encode(event, max_event_bytes=self._settings.max_event_bytes)
        opened = self._lifecycle.opened()
        if connection is None:
            await opened.appender.append((row,), weight)
        else:
            await opened.outbox.append(connection, (row,), notify=notify)

    def produce_soon(
        self,
        event: "BaseCloudEvent | bytes",
        done: Callable[[Exception | None], None],
        *,
        on_repeats: Callable[[int], None] | None = None,
    ) -> None:
        """As `produce()`, without a task that waits: `done` gets None once the event is committed, else the error.

        `on_repeats(1)` is called before that if the log deduplicates and had the event already.

        Raises EventError and NotRunningError at once, and `done` is not called then. `done` must not raise.
        """
        row, weight = encode(event, max_event_bytes=self._settings.max_event_bytes)
        self._lifecycle.opened().appender.append_soon(row, weight, done, on_repeats=on_repeats)

    async def produce_many(
        self,
        events: Iterable["BaseCloudEvent | bytes"],
        *,
        connection: object | None = None,
        notify: bool = False,
        deduplicate: bool = True,
        on_repeats: Callable[[int], None] | None = None,
    ) -> None:
        """Return once all of the events are committed, in one transaction and in their order.

        `deduplicate=False`: events that the log has already are stored again, even if it deduplicates. `on_repeats` is
        called before the return if it had some already, or some occur twice here, with their number.

        Raises as `produce()` does; none of them is stored then. `connection` and `notify` mean the same as there. With
        `connection`, `deduplicate=False` and `on_repeats` are a ConfigError.
        """
        check_repeats(connection, deduplicate=deduplicate, on_repeats=on_repeats)
        rows, weight = encode_many(list(events), max_event_bytes=self._settings.max_event_bytes)
        opened = self._lifecycle.opened()
        if rows and connection is None:
            await opened.appender.append(rows, weight, deduplicate=deduplicate, on_repeats=on_repeats)
        elif rows:
            await opened.outbox.append(connection, rows, notify=notify)

    async def set_deduplication(self, window: timedelta) -> None:
        """The log takes each `source` and `id` once within this window from now on; 0 switches that off.

        It is as if `deduplicate` had this value in `init()`: this process obeys at once, others within 5 s. Copies of
        events from before a change are not recognized. Raises ConfigError for a window out of its bounds, and
        DatabaseError when this role may not change it.
        """
        check_window("window", window)
        await self._lifecycle.opened().deduplication.enter(window)

    # Subscribing.

    async def subscribe(
        self,
        name: str,
        dispatcher: Dispatcher,
        *,
        start: Place = "latest",
        end: int | datetime | None = None,
        filter: EventFilter | None = None,  # noqa: A002 - the word that everybody uses
        order: Order = "none",
        concurrency: int = 64,
        shards: int = 1,
        retry: Retry = Retry(),  # noqa: B008 - frozen
        dead_letter: Dispatcher | None = None,
        transactional: bool = False,
        batch: int | None = None,
        batch_wait: float = 0.0,
        target: str | None = None,
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
        `dead_letter`: takes the same arguments as `dispatcher`, and gets the events that `dispatcher` did not handle in
        all its attempts, with the same `retry`; those that it does not handle either are kept as dead letters.

        `batch`: dispatchers get a list of up to so many events, in log order. An exception fails the whole batch, which
        is then dispatched again in halves, until the events that fail are alone; these count as attempts. `Failed`
        names the events that failed. Events that are tried again come in lists of one.
        `batch_wait`: how long a batch waits to be full, in seconds. Longer: fewer, larger batches. Shorter: events are
        handled sooner.
        `transactional`: dispatchers are async, and get an asyncpg connection as their second argument. Their work on
        it is committed together with the subscription's offset, or not at all: exactly once. One transaction runs in
        each shard at a time, in READ COMMITTED, so `concurrency` has no effect; more shards run more of them. An event
        that fails is rolled back. A deadlock or serialization failure is repeated, and is no attempt. The dispatcher
        must not end the transaction; `connection.transaction()` makes a savepoint. PostgreSQL ends a statement after
        60 s, and a transaction that does nothing for 30 s; `SET LOCAL` changes `statement_timeout` and
        `idle_in_transaction_session_timeout`. A `SET` without LOCAL may last beyond the
        event.
        `target`: what the dispatcher works for, in your words: a URL, a version. It is stored. If it is another one
        than before, a pause that a dispatcher has raised (`Pause`) ends; without it, only `reconfigure()` and
        `resume()` end one, and no restart. A process with an old target cannot pause the subscription for the others.

        Raises SubscriptionExistsError when this backend runs one of that name, SubscriptionMismatchError when the
        stored one has another order, shard count or end, ConfigError for options out of their bounds.
        """
        wanted = checked_definition(name, order=order, shards=shards, end=end)
        place = checked_place(start, f"start of {name!r}")
        handling = Handling(
            dispatcher=dispatcher, dead_letter=dead_letter, filter=filter, concurrency=concurrency, retry=retry,
            transactional=transactional, batch=batch, batch_wait=batch_wait, target=target,
        )  # fmt: skip
        registration = Registration(name, checked_handling(name, handling))
        await self._lifecycle.opened().changes.subscribe(wanted, place, registration)

    async def reconfigure(
        self,
        name: str,
        dispatcher: Dispatcher,
        *,
        filter: EventFilter | None = None,  # noqa: A002 - as in subscribe()
        concurrency: int = 64,
        retry: Retry = Retry(),  # noqa: B008 - frozen
        dead_letter: Dispatcher | None = None,
        transactional: bool = False,
        batch: int | None = None,
        batch_wait: float = 0.0,
        target: str | None = None,
    ) -> None:
        """From now on this backend dispatches the subscription, which it runs, with these options of `subscribe()`.

        Nothing is lost or repeated: a running dispatch ends as it began. Waiting events that the new filter refuses
        count as handled, failed ones that are due again too. The target counts as up. A pause that a dispatcher has
        raised ends, here at once and elsewhere with this worker's next round, unless `target` is the same as before.
        Processes whose own dispatcher has raised it stay paused until they get a new one, too. An operator's pause
        stays. The stored order, end and start stay; `alter_subscription()` changes those.

        Raises SubscriptionNotFoundError when this backend does not run it, ConfigError for options out of their bounds.
        """
        handling = Handling(
            dispatcher=dispatcher, dead_letter=dead_letter, filter=filter, concurrency=concurrency, retry=retry,
            transactional=transactional, batch=batch, batch_wait=batch_wait, target=target,
        )  # fmt: skip
        self._lifecycle.opened().changes.reconfigure(name, checked_handling(name, handling))

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

    async def preview_seek(self, name: str, place: Place) -> SeekPreview:
        """How many events `seek()` would bring again, and how many it would skip, as the offsets stand now.

        Nothing changes. It counts in the log: a million events take about 0.1 s. Raises SubscriptionNotFoundError.
        """
        place = checked_place(place, f"The place to seek in {name!r}")
        return await self._lifecycle.opened().changes.preview_seek(name, place)

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

    async def pause(self, name: str, *, reason: str | None = None) -> None:
        """Return once the subscription is paused, wherever it runs: its events wait until `resume()`.

        It is stored, so no restart ends it, nor does `reconfigure()`. It replaces a dispatcher's pause (`Pause`). On a
        subscription that `pause()` has paused before, it changes the reason at most. `reason`: for people, at most
        1,000 characters; by default it names the database role and the process.

        Dispatches that run are not cut short: they end, and are committed. After the return this process starts none.
        The others start none from their next round on: some milliseconds later, since they are notified, and a second
        if the notification is lost. A process that PostgreSQL does not answer in that moment starts none once its lease
        is in doubt, or it is answered again. Retries, dead letters that were sent again, and events for the dead-letter
        dispatcher wait as well. All other calls work while it is paused. The log keeps its events.

        Raises SubscriptionNotFoundError when there is none, ConfigError for a reason that cannot be stored.
        """
        if reason is not None:
            check_text("reason", reason)
        await self._lifecycle.opened().steering.pause(name, reason)

    async def resume(self, name: str) -> None:
        """Return once the subscription is not paused, whoever paused it: it goes on wherever it runs.

        A subscription that is not paused goes on as it did. A pause that a dispatcher somewhere raised before this call
        and has not stored yet is void. Raises SubscriptionNotFoundError when there is none.
        """
        await self._lifecycle.opened().steering.resume(name)

    # Looking and mending.

    async def status(self) -> Status:
        """The log and every subscription in it, as they stand now."""
        opened = self._lifecycle.opened()
        segments_until = await opened.segments.extend()
        figures = await opened.overview.find_figures()
        return Status(
            head=figures.head,
            rate=figures.rate,
            bytes_on_disk=figures.bytes_on_disk,
            segments=figures.segments,
            segments_until=segments_until,
            subscriptions=await opened.overview.list_statuses(opened.runner.states()),
            appenders=await opened.log.appenders(),
            retention=await opened.retainer.find(),
            holders=await opened.retainer.find_holders(),
        )

    async def set_retention(
        self,
        *,
        keep: timedelta | None = timedelta(days=7),
        max_age: timedelta | None = None,
        max_bytes: int | None = None,
        dead_letters: timedelta | None = timedelta(days=30),
    ) -> None:
        """Return once the log has this retention. All workers obey it, within 5 s; without a worker nothing goes.

        `keep`: events that every subscription has settled stay this long; None keeps everything. They go in segments,
        each about a tenth of `keep` long, so some stay up to a tenth longer. Events that wait to be tried again stay.
        `max_age`, `max_bytes`: hard limits. Older events, or the oldest ones of a log that takes more bytes on disk, go
        even if a subscription has not settled them. A WARNING says which events of which subscription, and
        `SubscriptionStatus.skipped` counts them.
        `dead_letters`: dead letters stay this long; None keeps them for good.

        A time is from 1 s to 36,500 days, `max_bytes` at least 1 MiB. Raises ConfigError for values out of their
        bounds, DatabaseError when this role may not change the log's retention.
        """
        retention = checked_retention(keep=keep, max_age=max_age, max_bytes=max_bytes, dead_letters=dead_letters)
        await self._lifecycle.opened().retainer.store(retention)

    async def retention(self) -> Retention:
        """How long the log keeps events: what `set_retention()` stored last.

        At first, 7 days, and dead letters 30. A log that was in use before this version keeps everything.
        """
        return await self._lifecycle.opened().retainer.find()

    def dead_letters(self, subscription: str | None = None, *, group: str | None = None) -> AsyncIterator[DeadLetter]:
        """The dead letters of one subscription or failure group, or all, oldest first."""
        return self._lifecycle.opened().redelivery.letters(subscription, group)

    async def dead_letter_groups(self, subscription: str | None = None) -> list[DeadLetterGroup]:
        """The dead letters of one subscription, or all, counted by failure group, the largest group first."""
        return await self._lifecycle.opened().redelivery.groups(subscription)

    async def redeliver(self, *ids: int, subscription: str | None = None, group: str | None = None) -> int:
        """Dispatch dead letters to their subscriptions again, from the first attempt on; returns how many.

        Give their ids, or a subscription or failure group for all of its letters. A letter that is handled is deleted;
        one that fails again stays. Raises SubscriptionNotFoundError, and ConfigError for something that is no id.
        """
        check_letters(ids, subscription, group)
        return await self._lifecycle.opened().changes.redeliver(ids, subscription, group)

    async def purge_dead_letters(self, *ids: int, subscription: str | None = None, group: str | None = None) -> int:
        """Delete dead letters for good; returns how many. Those that are dispatched again at the moment stay.

        Give their ids, or a subscription or failure group for all of its letters. Raises as `redeliver()` does.
        """
        check_letters(ids, subscription, group)
        return await self._lifecycle.opened().changes.purge(ids, subscription, group)

    def waiting(self, name: str) -> AsyncIterator[WaitingEvent]:
        """The failed events of a subscription that wait to be tried again, in log order.

        Raises SubscriptionNotFoundError when the iteration begins.
        """
        return self._lifecycle.opened().changes.list_waiting(name)

    async def retry_now(self, name: str, *, position: int | None = None) -> int:
        """Make failed events due at once that wait to be tried again; returns how many.

        `position`: only this event. Attempts count on. The worker that runs the subscription notices at once, or within
        a second where notifications do not arrive. A target that is down is probed at once, with one of its events; a
        pause stays. An event whose attempt failed within the last `commit_interval` may not count yet.

        Raises SubscriptionNotFoundError, and ConfigError for something that is no position.
        """
        if position is not None:
            check_position(position)
        return await self._lifecycle.opened().changes.retry_now(name, position)

    async def skip(self, name: str, position: int) -> None:
        """Return once the event is a dead letter of the subscription, which does not handle it any more.

        The event may be unread, in flight, waiting to be tried again, or waiting behind another one. Its dead letter
        names the role that skipped it, and the last error in its `details`. Other events are neither lost nor
        reordered. The subscription is drained first: each worker that runs it lets running dispatches end, within its
        `drain_timeout`, and releases its shards. If a dispatch takes longer, the event's shard is taken from its
        worker: what is at work there ends without effect, and those events are dispatched again, without this one.

        Raises EventNotFoundError when the log has no event there, EventSettledError when the subscription has settled
        it, perhaps while this call waited, and SubscriptionNotFoundError. Raises SubscriptionBusyError when the shard
        changed at each try for 30 s, or waits for another number of shards to begin: nothing has changed then. Called
        from a handler of this subscription, it returns once nothing else is at work in this process, and the skip
        happens when that handler has returned and its event is committed; the log says so if it fails.
        """
        check_position(position)
        await self._lifecycle.opened().changes.skip(name, position)

    async def redact(self, position: int) -> Redaction:
        """Return once the data of one event is gone from the log for good. Its position stays.

        Its `id`, `source`, `type`, `specversion` and `recorded_at` stay, too; all other attributes go. Its dead letters
        are deleted, and the errors of its failed attempts. A subscription that has not handled it skips it, on record.
        The table `redactions` says who redacted which event, and when. Again does nothing.

        It does not reach old versions of the rows before a VACUUM, write-ahead log, backups, exports, log files, nor
        the memory of workers: one that has read the event before may still dispatch it.

        Raises EventNotFoundError when there is nothing at this position, and DatabaseError when another transaction
        holds a lock on the dead letters or on the event's segment for a second.
        """
        check_position(position)
        return await self._lifecycle.opened().redactions.redact(position)

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
