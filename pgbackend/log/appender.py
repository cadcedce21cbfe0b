"""Group commit: concurrent `produce()` calls of a process share a transaction (I1).

    idle ──a call──▶ sending ──COMMIT, calls have gathered──▶ sending …
                        └──────COMMIT, none have────────────▶ idle

While one batch commits, the next one gathers. A single call on an idle backend is sent at once and pays one commit.
Positions follow the order of calls, and within a call the order of its list. A call is the unit: when PostgreSQL
refuses a batch for its data, the calls are sent again apart. No caller can cancel a batch: a caller that gives up takes
its call back, or, once the call was sent, only stops waiting.

The promise: each call gets exactly one answer. It is committed; or it is not stored, and the error says why; or the
error is `ProduceUncertainError`, and it may be stored or not: the connection was lost after sending, or a standby was
not waited for. An uncertain batch is never sent again.
"""

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from pgbackend import facts
from pgbackend.codec.attributes import COLUMNS, Row
from pgbackend.errors import (
    ConfigError,
    ConnectionLostError,
    DatabaseError,
    EventError,
    NotRunningError,
    PgBackendError,
    ProduceTimeoutError,
    ProduceUncertainError,
)
from pgbackend.postgres.connections import Connection, end_copy_with, on_unconfirmed
from pgbackend.postgres.errors import is_definite, is_out_of_segments, is_position_taken, is_refused_for_data, translate
from pgbackend.postgres.pool import Database
from pgbackend.postgres.reconnect import GrowingDelay, repeat
from pgbackend.postgres.sql.statements import LogSql

_BATCH_EVENTS = 1000
_BATCH_BYTES = 4 << 20
_GRACE = 1.0
"""Seconds that `drain()` may take longer than a call."""


Done = Callable[[Exception | None], None]
"""Called once with the answer to a call: None when it is committed."""


@dataclass(slots=True, eq=False)
class _Call:
    rows: Sequence[Row]
    weight: int
    """Bytes that the rows may take in memory."""
    done: Done | None
    """None once the call was answered or its caller has given up."""
    deadline: float
    sent: bool = False

    def answer(self, error: Exception | None) -> None:
        self.rows = ()  # the call may stay among the deadlines a while longer
        done, self.done = self.done, None
        if done is None:
            return
        try:
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
        on_append: Callable[[], None],
        on_full: Callable[[], Awaitable[object]],
    ) -> None:
        """`on_append()` is called after each COMMIT; `on_full` is awaited when the log has no segment left."""
        self._database = database
        self._timeout = produce_timeout
        self._on_append = on_append
        self._on_full = on_full
        self._writer = _Writer(database, sql, schema=schema, timeout=2 * produce_timeout)
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
            await self._send_batches()
        except Exception as error:  # noqa: BLE001 - producers hear of it, and the rest of the backend goes on
            self._fail_for_good(error)
        finally:
            self._refuse_from_now_on()
            self._writer.drop()
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
            self._writer.drop()
            self._answer_the_rest()

    async def append(self, rows: Sequence[Row], weight: int) -> None:
        """Return once the rows are committed, all of them in one transaction. `weight`: the sum of what `encode` says.

        Raises EventError when PostgreSQL refuses their values, ProduceTimeoutError when they were not sent in time,
        ProduceUncertainError when they may be stored or not, and DatabaseError when they are not stored for any other
        reason.
        """
        committed = asyncio.get_running_loop().create_future()
        call = self._submit(rows, weight, partial(_settle, committed))
        try:
            await committed
        except asyncio.CancelledError:
            call.done = None
            if not call.sent and call in self._unsent:
                self._unsent.remove(call)
            raise

    def append_soon(self, row: Row, weight: int, done: Done) -> None:
        """As `append()` of one row, without a task: `done` gets None, or the error that `append()` would raise.

        An exception that `done` raises is logged. Saves a task and a future: 4 µs an event.
        """
        self._submit((row,), weight, done)

    def _submit(self, rows: Sequence[Row], weight: int, done: Done) -> _Call:
        if self._refusal is not None:
            raise _copy(self._refusal)
        loop = asyncio.get_running_loop()
        call = _Call(rows, weight, done, loop.time() + self._timeout)
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
            except (DatabaseError, ConfigError) as error:
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
        batch: list[_Call] = []
        events = weight = 0
        unsent = self._unsent
        while unsent:
            call = unsent[0]
            events += len(call.rows)
            weight += call.weight
            if batch and (events > _BATCH_EVENTS or weight > _BATCH_BYTES):
                break
            batch.append(unsent.popleft())
        return batch

    async def _send(self, batch: list[_Call]) -> None:
        """Commit a batch and answer its calls."""
        for call in batch:
            call.sent = True
        rows = batch[0].rows if len(batch) == 1 else [row for call in batch for row in call.rows]
        try:
            await self._insert(rows)
        except Exception as error:  # noqa: BLE001 - `_answer_to` tells them apart
            await self._handle_error(batch, error)
            return
        if self._writer.unconfirmed:
            self._answer(batch, ProduceUncertainError(
                "PostgreSQL committed without waiting for its synchronous standby: a failover now may lose the event."
            ))  # fmt: skip
        else:
            # Answer after the next batch was sent: PostgreSQL commits that one meanwhile. Answering a batch of HTTP
            # clients takes as long as a commit.
            asyncio.get_running_loop().call_soon(_confirm, batch)
        self._on_append()

    async def _insert(self, rows: Sequence[Row]) -> None:
        try:
            await repeat(lambda: self._writer.insert(rows), self._timeout)
        except Exception as error:
            if not is_out_of_segments(error):
                raise
            # No worker ran for a hundred million events: make room, and nothing has failed.
            await self._on_full()
            await self._writer.insert(rows)

    async def _handle_error(self, batch: list[_Call], error: Exception) -> None:
        """Answer the calls of a batch that was not committed, or may not have been."""
        answer = _answer_to(error)
        if isinstance(answer, EventError) and len(batch) > 1:
            await self._send_apart(batch)
            return
        if isinstance(answer, ConnectionLostError | ProduceUncertainError):
            self._writer.drop()
        if isinstance(answer, ProduceUncertainError):
            facts.emit("append is uncertain", level=logging.WARNING, calls=len(batch), error=str(error))
        self._answer(batch, answer)

    async def _send_apart(self, batch: list[_Call]) -> None:
        """Send each call by itself, in order, so that a bad event fails only its own caller."""
        for index, call in enumerate(batch):
            # A call whose deadline passed meanwhile was answered, and has no rows any more.
            if call.done is None:
                continue
            if not self._writer.is_connected:
                # The rest is not stored, since its batch was refused: it goes with the next connection.
                rest = [call for call in batch[index:] if call.done is not None]
                for unsent in rest:
                    unsent.sent = False
                self._unsent.extendleft(reversed(rest))
                return
            await self._send([call])

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
        if call.sent:
            call.answer(ProduceUncertainError(
                f"PostgreSQL did not confirm the commit within {self._timeout:g} s: the event may or may not be stored."
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
        sent = [call for call in self._unanswered if call.sent]
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
        for call in self._unanswered:
            call.answer(
                ProduceUncertainError(
                    "The backend was stopped before PostgreSQL confirmed the commit: the event may be stored or not."
                )
                if call.sent
                else NotRunningError("The backend was stopped before the event could be sent: it is not stored.")
            )
        self._unanswered.clear()

    @staticmethod
    def _answer(calls: Iterable[_Call], error: Exception) -> None:
        for call in calls:
            # Each call gets an exception of its own: a traceback grows on it where it is raised.
            call.answer(_copy(error))


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


class _Writer:
    """The connection that appends."""

    def __init__(self, database: Database, sql: LogSql, *, schema: str, timeout: float) -> None:
        """`timeout`: seconds without an answer after which the connection is given up, longer than any call waits."""
        self._database = database
        self._sql = sql
        self._schema = schema
        self._timeout = timeout
        self._connection: Connection | None = None
        self.unconfirmed = False
        """Whether the last commit did not wait for the synchronous standby."""

    @property
    def is_connected(self) -> bool:
        return self._connection is not None and not self._connection.is_closed()

    async def connect(self) -> None:
        """There is a connection. Raises DatabaseError, and ConfigError for a certificate that is missing just now."""
        if not self.is_connected:
            connection = self._connection = await self._database.connect()
            on_unconfirmed(connection, self._note_unconfirmed)
            end_copy_with(connection)

    async def insert(self, rows: Sequence[Row]) -> None:
        """The rows are committed, in their order and in one transaction. Raises what the driver raises."""
        connection = self._connection
        assert connection is not None  # noqa: S101 - `connect()` comes first
        self.unconfirmed = False
        give_up = asyncio.get_running_loop().call_later(self._timeout, connection.terminate)
        try:
            if len(rows) == 1:
                # A plain INSERT of one event takes 20 % less time than COPY of one (1.9 and 2.4 ms, on a busy machine).
                await connection.execute(self._sql.append_one, *rows[0])
            else:
                await connection.copy_records_to_table(
                    "events", schema_name=self._schema, columns=COLUMNS, records=rows
                )
        finally:
            give_up.cancel()

    def drop(self) -> None:
        """There is no connection any more."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()

    def _note_unconfirmed(self) -> None:
        self.unconfirmed = True


def _answer_to(error: Exception) -> Exception:
    """The error for callers when an INSERT has failed. Nothing is stored, unless it is ProduceUncertainError."""
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
