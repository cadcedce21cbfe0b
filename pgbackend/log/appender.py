"""Group commit: concurrent `produce()` calls of a process share a transaction (I1).

    idle ──a call──▶ sending ──COMMIT, calls have gathered──▶ sending …
                        └──────COMMIT, none have────────────▶ idle

While one batch commits, the next one gathers. A single call on an idle backend is sent at once and pays one commit.
Positions follow the order of calls, and within a call the order of its list. A call is the unit: when PostgreSQL
refuses a batch for its data, the calls are sent again apart. No caller can cancel a batch: a caller that gives up takes
its call back, or, once the call was sent, only stops waiting.

The promise: each call gets exactly one answer. It is committed; or it is not stored, and the error says why; or the
error is `ProduceUncertainError`, and it may be stored or not: the connection was lost after sending, or a standby was
not waited for. An uncertain batch is never sent again, unless the log deduplicates.

Then a batch first claims a key for each event (see `deduplication`), appends those events that are no repeats, and
commits both together. Two kinds of calls go on aside, on a second connection, where they delay no others:

    blocked     an open transaction has claimed a key of the call: tried again until that transaction has ended
    uncertain   the connection was lost after sending: sent again, because a second copy is refused
"""

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

from pgbackend import facts
from pgbackend.codec.attributes import Row
from pgbackend.errors import (
    ConnectionLostError,
    DatabaseError,
    EventError,
    NotRunningError,
    PgBackendError,
    ProduceTimeoutError,
    ProduceUncertainError,
)
from pgbackend.log.deduplication import Deduplication, key_of
from pgbackend.log.notify import Notifier, Wakeup
from pgbackend.log.writer import Blocked, OtherWindow, Rows, Writer
from pgbackend.postgres.errors import is_definite, is_out_of_segments, is_position_taken, is_refused_for_data, translate
from pgbackend.postgres.pool import Database
from pgbackend.postgres.reconnect import GrowingDelay, repeat
from pgbackend.postgres.sql.statements import LogSql

_BATCH_EVENTS = 1000
_BATCH_BYTES = 4 << 20
_GRACE = 1.0
"""Seconds that `drain()` may take longer than a call."""
_ASIDE_INTERVAL = 0.05
"""Seconds between two tries at the calls that are blocked or uncertain."""


Done = Callable[[Exception | None], None]
"""Called once with the answer to a call: None when it is committed."""
OnRepeats = Callable[[int], None]
"""Called before the answer to a committed call that has repeats, with their number. They were not appended again."""


@dataclass(slots=True, eq=False)
class _Call:
    rows: Rows
    weight: int
    """Bytes that the rows may take in memory."""
    done: Done | None
    """None once the call was answered or its caller has given up."""
    deadline: float
    sent: bool = False
    deduplicate: bool = True
    on_repeats: "OnRepeats | None" = None
    repeats: int = 0
    """How many of its rows are repeats, once it is committed."""
    is_aside: bool = False
    is_uncertain: bool = False
    """Whether it was sent before, and may be stored."""

    def answer(self, error: Exception | None) -> None:
        self.rows = ()  # the call may stay among the deadlines a while longer
        done, self.done = self.done, None
        if done is None:
            return
        try:
            # An event that an uncertain call finds in the log may be its own first copy.
            if error is None and self.repeats and self.on_repeats is not None and not self.is_uncertain:
                self.on_repeats(self.repeats)
            done(error)
        except Exception as failure:  # noqa: BLE001 - a caller's bug must not harm the other calls
            facts.emit("produce callback failed", level=logging.ERROR, exc_info=failure)


class Appender:
    """Appends calls to the log, in order, on one connection of its own."""

    def __init__(
        self,
        database: Database,
        sql: LogSql,
        *,
        schema: str,
        produce_timeout: float,
        wakeup: Wakeup,
        notifier: Notifier,
        on_full: Callable[[], Awaitable[object]],
        deduplication: Deduplication,
    ) -> None:
        """`wakeup` and `notifier` hear of each COMMIT; `on_full` is awaited when the log has no segment left."""
        self._database = database
        self._timeout = produce_timeout
        self._wakeup = wakeup
        self._notifier = notifier
        self._on_full = on_full
        self._deduplication = deduplication
        self._writer = Writer(database, sql, notifier, schema=schema, timeout=2 * produce_timeout)
        self._second = Writer(database, sql, notifier, schema=schema, timeout=2 * produce_timeout)
        """Connected while calls are aside."""
        self._aside: list[_Call] = []
        self._aside_work = asyncio.Event()
        self._all_sent = False
        """Set when no more calls can come aside, unless those that are there already."""
        self._unsent: deque[_Call] = deque()
        self._unanswered: deque[_Call] = deque()
        """In the order of their deadlines. Calls that were answered leave it when they come to the front."""
        self._alarm: asyncio.TimerHandle | None = None
        self._work = _Work()
        self._ended: asyncio.Event | None = None
        """Set when `run()` has ended; None before it began."""
        self._refusal: PgBackendError | None = None
        """The error of every further call, once no more calls are taken."""
        self._unreachable: str | None = None
        """Why there is no connection, while there is none."""

    async def run(self) -> None:
        """Send the calls until cancelled or drained. However it ends, every call is answered by then.

        Raises nothing else: a bug is logged, and each call that it leaves gets an error that says so.
        """
        self._ended = asyncio.Event()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._send_aside(), name="append aside")
                await self._send_batches()
                self._all_sent = True
                self._aside_work.set()
        except ExceptionGroup as group:
            # Producers hear of it, and the rest of the backend goes on.
            self._fail_for_good(group.exceptions[0])
        finally:
            self._refuse_from_now_on()
            self._drop()
            self._answer_the_rest()
            self._ended.set()

    def idle(self) -> float:
        """Seconds so far in which there was nothing to append."""
        return self._work.idle()

    async def drain(self, *, timeout: float = math.inf) -> None:
        """Take no more calls. Return when every call is answered and the connection closed, after `timeout` s at most.

        Then `run()` has ended, unless the time was too short: cancel it in any case.
        """
        self._refuse_from_now_on()
        self._work.set()
        try:
            if self._ended is not None:
                # Each call is answered by its own deadline. A silent network must not hold up the rest of a shutdown.
                async with asyncio.timeout(min(timeout, self._timeout + _GRACE)):
                    await self._ended.wait()
        except TimeoutError:
            facts.emit("append was cut short", level=logging.WARNING, calls=len(self._unanswered))
        finally:
            self._drop()
            self._answer_the_rest()

    def _drop(self) -> None:
        self._writer.drop()
        self._second.drop()

    async def append(
        self, rows: Rows, weight: int, *, deduplicate: bool = True, on_repeats: OnRepeats | None = None
    ) -> None:
        """Return once the rows are committed, all of them in one transaction. `weight`: the sum of what `encode` says.

        `deduplicate=False`: repeats are appended, too, even if the log deduplicates.

        Raises EventError when PostgreSQL refuses their values or iterating over them raises it, ProduceTimeoutError
        when they were not sent in time, ProduceUncertainError when they may be stored or not, and DatabaseError when
        they are not stored for any other reason.
        """
        committed = asyncio.get_running_loop().create_future()
        call = self._submit(rows, weight, partial(_settle, committed), deduplicate=deduplicate, on_repeats=on_repeats)
        try:
            await committed
        except asyncio.CancelledError:
            call.done = None
            if not call.sent and call in self._unsent:
                self._unsent.remove(call)
            raise

    def append_soon(self, row: Row, weight: int, done: Done, *, on_repeats: OnRepeats | None = None) -> None:
        """As `append()` of one row, without a task: `done` gets None, or the error that `append()` would raise.

        An exception that `done` raises is logged. Saves a task and a future: 4 µs an event.
        """
        self._submit((row,), weight, done, deduplicate=True, on_repeats=on_repeats)

    def _submit(self, rows: Rows, weight: int, done: Done, *, deduplicate: bool, on_repeats: OnRepeats | None) -> _Call:
        if self._refusal is not None:
            raise _copy(self._refusal)
        loop = asyncio.get_running_loop()
        call = _Call(rows, weight, done, loop.time() + self._timeout, False, deduplicate, on_repeats)
        self._unsent.append(call)
        unanswered = self._unanswered
        while unanswered and unanswered[0].done is None:
            unanswered.popleft()
        unanswered.append(call)
        if self._alarm is None:
            # One timer for all calls: a timer for each would cost 3 µs an event.
            self._alarm = loop.call_at(call.deadline, self._expire_calls)
        self._work.set()
        return call

    async def _send_batches(self) -> None:
        delay = GrowingDelay(self._database, cap=1.0)
        while True:
            if not self._unsent:
                if self._refusal is not None:
                    await asyncio.sleep(0)  # the last batch's calls are answered first, see `_send`
                    return
                await self._work.wait()
                continue
            try:
                await self._writer.connect()
            except DatabaseError as error:
                # Nothing was sent, so calls may wait for the server to come back until their deadlines.
                self._unreachable = str(error)
                facts.emit("append cannot connect", level=delay.failed(), failures=delay.failures, error=str(error))
                if self._refusal is not None or not isinstance(error, ConnectionLostError):
                    self._refuse_unsent(error)
                else:
                    await delay.wait()
                continue
            delay.reset()
            self._unreachable = None
            # Empty when all callers gave up while it connected.
            if batch := self._gather():
                await self._send(batch)

    def _gather(self) -> list[_Call]:
        """The next calls, of at most 1,000 events and 4 MiB together. A call beyond the bound travels alone."""
        batch = _first_batch(self._unsent)
        for _ in batch:
            self._unsent.popleft()
        return batch

    async def _send(self, batch: list[_Call]) -> None:
        """Commit a batch and answer its calls."""
        for call in batch:
            call.sent = True
        if self._deduplication.window_us and any(call.deduplicate for call in batch):
            await self._send_fresh(batch, self._writer)
            return
        # A call that is answered meanwhile forgets its rows.
        rows = batch[0].rows if len(batch) == 1 else _Together([call.rows for call in batch])
        try:
            is_notified = await self._insert(rows)
        except Exception as error:  # noqa: BLE001 - `_answer_to` tells them apart
            await self._handle_error(batch, error, self._writer)
            return
        self._answer_committed(batch, self._writer)
        self._wakeup.wake()
        if not is_notified:
            self._notifier.notify()

    def _answer_committed(self, batch: list[_Call], writer: Writer) -> None:
        """Answer the calls of a batch that is committed."""
        if writer.unconfirmed:
            self._answer(batch, ProduceUncertainError(
                "PostgreSQL committed without waiting for its synchronous standby: a failover now may lose the event."
            ))  # fmt: skip
        elif self._unsent:
            # Answer after the next batch was sent: PostgreSQL commits that one meanwhile. Answering a batch of HTTP
            # clients takes as long as a commit.
            asyncio.get_running_loop().call_soon(_confirm, batch)
        else:
            _confirm(batch)

    async def _insert(self, rows: Rows) -> bool:
        """Whether other processes were notified in the transaction."""
        try:
            if len(rows) == 1 and not self._unsent and self._notifier.may_join():
                return await repeat(lambda: self._writer.insert_and_notify(rows), self._timeout)
            await repeat(lambda: self._writer.insert(rows), self._timeout)
        except Exception as error:
            if not is_out_of_segments(error):
                raise
            # No worker ran for a hundred million events: make room, and nothing has failed.
            await self._on_full()
            await self._writer.insert(rows)
        return False

    async def _send_fresh(self, batch: list[_Call], writer: Writer) -> None:
        """Commit those events of a batch that are no repeats, and answer its calls."""
        while batch:
            # A call that is answered meanwhile forgets its rows.
            parts = [(call.rows, call.deduplicate) for call in batch]
            try:
                repeats, appended = await self._insert_fresh(parts, writer)
            except Blocked:
                batch = await self._set_aside(batch, writer)
                continue
            except OtherWindow:
                await self._follow_window(batch, writer)
            except Exception as error:  # noqa: BLE001 - `_answer_to` tells them apart
                await self._handle_error(batch, error, writer)
            else:
                for call, count in zip(batch, repeats, strict=True):
                    call.repeats = count
                self._answer_committed(batch, writer)
                if appended:
                    self._wakeup.wake()
                    self._notifier.notify()
            return

    async def _insert_fresh(self, parts: Sequence[tuple[Rows, bool]], writer: Writer) -> tuple[list[int], int]:
        """How many rows of each part are repeats, and how many events were appended."""
        known = self._deduplication.window_us
        try:
            return await repeat(lambda: writer.insert_fresh(parts, known), self._timeout)
        except Exception as error:
            if not is_out_of_segments(error):
                raise
            await self._on_full()
            return await writer.insert_fresh(parts, known)

    async def _set_aside(self, batch: list[_Call], writer: Writer) -> list[_Call]:
        """The blocked calls of a batch are aside. Returns the others."""
        try:
            blocked = await self._find_blocked(batch, writer)
        except Exception as error:  # noqa: BLE001 - nothing of the batch is stored
            await self._handle_error(batch, translate(error), writer)
            return []
        for call in blocked:
            call.sent = False
            self._put_aside(call)
        return [call for call in batch if call.done is not None and call not in blocked]

    async def _find_blocked(self, batch: list[_Call], writer: Writer) -> list[_Call]:
        """The calls that wait for an open transaction."""
        keys = {id(call): [key_of(row) for row in call.rows] for call in batch if call.deduplicate}
        blocked = await writer.find_blocked(list(chain.from_iterable(keys.values())))
        return [call for call in batch if call.done is not None and not blocked.isdisjoint(keys.get(id(call), ()))]

    async def _follow_window(self, batch: list[_Call], writer: Writer) -> None:
        """The window is known, and the calls of a batch that met another one are to be sent again."""
        try:
            await self._deduplication.look()
        except DatabaseError as error:
            await self._handle_error(batch, error, writer)
            return
        # A first copy under the former window cannot be recognized under the new one.
        self._answer((call for call in batch if call.is_uncertain), ProduceUncertainError(
            "The connection was lost while PostgreSQL was committing, and the log's deduplication was changed before "
            "the event could be sent again: it may or may not be stored."
        ))  # fmt: skip
        again = [call for call in batch if call.done is not None]
        for call in again:
            call.sent = call.is_aside = False
        self._unsent.extendleft(reversed(again))
        self._work.set()

    async def _send_aside(self) -> None:
        """Send the calls that are aside, until no more can come."""
        delay = GrowingDelay(self._database, cap=1.0)
        while True:
            self._aside = [call for call in self._aside if call.done is not None and call.is_aside]
            if not self._aside:
                self._second.drop()
                if self._all_sent:
                    return
                self._aside_work.clear()
                await self._aside_work.wait()
                continue
            try:
                await self._second.connect()
                await self._try_aside()
            except DatabaseError as error:
                # Nothing was sent, so the calls may wait until their deadlines.
                facts.emit("append cannot connect", level=delay.failed(), failures=delay.failures, error=str(error))
                await delay.wait()
                continue
            delay.reset()
            await asyncio.sleep(_ASIDE_INTERVAL)

    async def _try_aside(self) -> None:
        """Send the calls that are aside and are no longer blocked. Raises DatabaseError when it cannot be found out."""
        calls = list(self._aside)
        if not self._deduplication.window_us:
            await self._follow_window(calls, self._second)
            return
        try:
            blocked = await self._find_blocked(calls, self._second)
        except Exception as error:
            self._second.drop()
            raise translate(error) from error
        free = [call for call in calls if call.done is not None and call not in blocked]
        while free:
            batch = _first_batch(free)
            del free[: len(batch)]
            batch = [call for call in batch if call.done is not None]
            for call in batch:
                call.sent = True
            if batch:
                await self._second.connect()
                await self._send_fresh(batch, self._second)

    def _put_aside(self, call: _Call) -> None:
        if not call.is_aside:
            call.is_aside = True
            self._aside.append(call)
        self._aside_work.set()

    async def _handle_error(self, batch: list[_Call], error: Exception, writer: Writer) -> None:
        """Answer the calls of a batch that was not committed, or may not have been."""
        answer = _answer_to(error)
        if isinstance(answer, EventError) and len(batch) > 1:
            await self._send_apart(batch, writer)
            return
        if isinstance(answer, ConnectionLostError | ProduceUncertainError):
            writer.drop()
        if isinstance(answer, ProduceUncertainError):
            facts.emit("append is uncertain", level=logging.WARNING, calls=len(batch), error=str(error))
        self._answer(self._without_retried(batch, answer), answer)

    def _without_retried(self, batch: list[_Call], answer: Exception) -> list[_Call]:
        """The calls of a batch with this answer, except those that are sent again first: they are uncertain."""
        rest = []
        for call in batch:
            if isinstance(answer, ProduceUncertainError):
                # A copy that is sent again within the window is refused if the first one is stored.
                may_retry = call.deduplicate and self._deduplication.window_us >= self._timeout * 1_000_000
            else:
                may_retry = call.is_uncertain and isinstance(answer, ConnectionLostError)
            if may_retry and call.done is not None:
                call.sent, call.is_uncertain = False, True
                self._put_aside(call)
            else:
                rest.append(call)
        return rest

    async def _send_apart(self, batch: list[_Call], writer: Writer) -> None:
        """Send each call by itself, in order, so that a bad event fails only its own caller."""
        for index, call in enumerate(batch):
            # A call whose deadline passed meanwhile was answered, and has no rows any more.
            if call.done is None:
                continue
            if not writer.is_connected:
                # The rest is not stored, since its batch was refused: it goes with the next connection.
                rest = [call for call in batch[index:] if call.done is not None]
                for unsent in rest:
                    unsent.sent = False
                if writer is self._writer:
                    self._unsent.extendleft(reversed(rest))
                return
            if writer is self._writer:
                await self._send([call])
            else:
                await self._send_fresh([call], writer)

    def _expire_calls(self) -> None:
        """Answer the calls whose deadlines have passed."""
        loop = asyncio.get_running_loop()
        now, unanswered = loop.time(), self._unanswered
        while unanswered and (unanswered[0].done is None or unanswered[0].deadline <= now):
            call = unanswered.popleft()
            if call.done is not None:
                self._expire(call)
        self._alarm = loop.call_at(unanswered[0].deadline, self._expire_calls) if unanswered else None

    def _expire(self, call: _Call) -> None:
        if call.sent or call.is_uncertain:
            call.answer(ProduceUncertainError(
                f"PostgreSQL did not confirm the commit within {self._timeout:g} s: the event may or may not be stored."
            ))  # fmt: skip
            return
        if call.is_aside:
            call.answer(ProduceTimeoutError(
                "Another transaction has appended an event with the same source and id, and was still open after "
                f"{self._timeout:g} s. The event of this call is not stored. Produce it again when that has ended."
            ))  # fmt: skip
            return
        self._unsent.remove(call)
        call.answer(ProduceTimeoutError(
            f"The event was not sent within {self._timeout:g} s, and is not stored. "
            + (self._unreachable or "Check that PostgreSQL can be reached.")
        ))  # fmt: skip

    def _refuse_from_now_on(self) -> None:
        if self._refusal is None:
            self._refusal = NotRunningError(
                "This backend does not take events: call `init()` first, and not after `stop()`."
            )

    def _fail_for_good(self, error: Exception) -> None:
        facts.emit("appender failed", level=logging.ERROR, exc_info=error)
        bug = f"{type(error).__name__}: {error}"
        self._refusal = PgBackendError(
            f"This backend takes no events any more: its appender died of a bug ({bug}). Restart it; the log has the "
            "traceback."
        )
        sent = [call for call in self._unanswered if call.sent or call.is_uncertain]
        self._answer(sent, ProduceUncertainError(
            f"The appender died of a bug while this was being committed ({bug}): the event may or may not be stored."
        ))  # fmt: skip
        self._refuse_unsent(self._refusal)

    def _refuse_unsent(self, error: Exception) -> None:
        unsent, self._unsent = self._unsent, deque()
        self._answer(unsent, error)

    def _answer_the_rest(self) -> None:
        """Answer every call that is left when there is no more time."""
        if self._alarm is not None:
            self._alarm.cancel()
        self._unsent.clear()
        self._aside.clear()
        for call in self._unanswered:
            call.answer(
                ProduceUncertainError(
                    "The backend was stopped before PostgreSQL confirmed the commit: the event may be stored or not."
                )
                if call.sent or call.is_uncertain
                else NotRunningError("The backend was stopped before the event could be sent: it is not stored.")
            )
        self._unanswered.clear()

    @staticmethod
    def _answer(calls: Iterable[_Call], error: Exception) -> None:
        for call in calls:
            if call.is_uncertain and not isinstance(error, ProduceUncertainError):
                call.answer(ProduceUncertainError(
                    "The connection was lost while PostgreSQL was committing, and sending the event again failed: it "
                    f"may or may not be stored. {error}"
                ))  # fmt: skip
            else:
                # Each call gets an exception of its own: a traceback grows on it where it is raised.
                call.answer(_copy(error))


def _first_batch(calls: Iterable[_Call]) -> list[_Call]:
    """The first of these calls, within the bounds of a batch."""
    batch: list[_Call] = []
    events = weight = 0
    for call in calls:
        events += len(call.rows)
        weight += call.weight
        if batch and (events > _BATCH_EVENTS or weight > _BATCH_BYTES):
            break
        batch.append(call)
    return batch


class _Together:
    """The rows of several calls, in their order."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __iter__(self) -> Iterator[Row]:
        return chain.from_iterable(self._parts)


class _Work:
    """Wakes the appender, and counts the time in which it had nothing to do."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._idle = 0.0
        self._since: float | None = None

    def set(self) -> None:
        """There is something to do."""
        self._event.set()

    async def wait(self) -> None:
        """Return once there is something to do."""
        self._event.clear()
        self._since = time.monotonic()
        try:
            await self._event.wait()
        finally:
            self._idle += time.monotonic() - self._since
            self._since = None

    def idle(self) -> float:
        """Seconds so far in which `wait()` waited."""
        return self._idle if self._since is None else self._idle + time.monotonic() - self._since


def _answer_to(error: Exception) -> Exception:
    """The error for callers when an INSERT has failed. Nothing is stored, unless it is ProduceUncertainError."""
    if isinstance(error, EventError):
        # Iterating over the rows raised it, and COPY was called off.
        return error
    if isinstance(error, DatabaseError):
        # The INSERT was refused because the log is out of segments, and this is why none could be made.
        return error
    if is_out_of_segments(error):
        return DatabaseError(
            "The log has no segment for its next position, and none could be made: a transaction keeps the table "
            "`events` locked. Nothing was stored. End that transaction, and produce again."
        )
    if is_position_taken(error):
        return DatabaseError(
            f"The log's sequence gave out a position that an event has already ({error}): the log was set back. "
            "Nothing was stored. `probe()` says how to repair it."
        )
    if is_refused_for_data(error):
        return EventError(f"PostgreSQL refused the event: {error}.")
    if is_definite(error):
        return translate(error)
    return ProduceUncertainError(
        f"The connection was lost while PostgreSQL was committing ({error}): the event may or may not be stored."
    )


def _confirm(batch: Sequence[_Call]) -> None:
    for call in batch:
        call.answer(None)


def _settle(future: "asyncio.Future[None]", error: Exception | None) -> None:
    if future.done():
        return  # cancelled a moment ago
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


def _copy(error: Exception) -> Exception:
    twin = type(error).__new__(type(error), *error.args)
    twin.args = error.args
    twin.__dict__.update(error.__dict__)
    twin.__cause__ = error
    return twin
