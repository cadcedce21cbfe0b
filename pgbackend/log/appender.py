"""Group commit: concurrent `produce()` calls of a process share a transaction (I1).

    idle ──a call──▶ sending ──COMMIT, calls have gathered──▶ sending …
                        └──────COMMIT, none have────────────▶ idle

While one batch is being committed, the next gathers; a lone call on an idle backend is sent at once and pays one
commit. Positions follow call order, and within a call the order of its list. A call is the unit: when PostgreSQL
refuses a batch for its data, its calls are tried again apart. The batch is nobody's task and nobody cancels it: a
caller that gives up leaves the gathering batch, or, once that was sent, only stops waiting.

What is not known is said: a connection lost after sending, or a standby that was not waited for, is a
`ProduceUncertainError` for every call of the batch, and is not repeated.
"""

import asyncio
import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

from pgbackend import facts
from pgbackend.codec.attributes import COLUMNS, Row
from pgbackend.errors import (
    ConnectionLostError,
    DatabaseError,
    EventError,
    NotRunningError,
    PgBackendError,
    ProduceTimeoutError,
    ProduceUncertainError,
)
from pgbackend.postgres.pool import (
    Connection,
    Database,
    GrowingDelay,
    is_definite,
    is_out_of_segments,
    is_position_taken,
    is_refused_for_data,
    on_unconfirmed,
    repeat,
    translate,
)
from pgbackend.postgres.sql.statements import LogSql

_BATCH_EVENTS = 1000
_BATCH_BYTES = 4 << 20
_COPY_EVENTS = 16
"""From here on COPY is the cheaper one: 32 rows take 0.9 ms and 7 µs of CPU each, by unnest 1.4 ms and 15 µs."""

_GRACE = 1.0
"""Seconds that `close()` may take longer than a call."""


Done = Callable[[Exception | None], None]
"""Told once how a call ended: None is committed."""


@dataclass(slots=True, eq=False)
class _Call:
    rows: Sequence[Row]
    weight: int
    """Bytes that the rows may take in memory."""
    done: Done | None
    """None once it was told, or nobody wants to know any more."""
    deadline: float
    sent: bool = False

    def answer(self, error: Exception | None) -> None:
        self.rows = ()  # it may wait for its turn among the deadlines a while longer
        done, self.done = self.done, None
        if done is None:
            return
        try:
            done(error)
        except Exception as failure:  # noqa: BLE001 - the calls behind it, and whoever appends next, are not to suffer
            facts.emit("append told in vain", level=logging.ERROR, exc_info=failure)


class Appender:
    """Appends calls to the log, in order, on one connection of its own."""

    def __init__(
        self,
        database: Database,
        sql: LogSql,
        *,
        schema: str,
        produce_timeout: float,
        on_append: Callable[[int], None],
        on_full: Callable[[], Awaitable[object]],
    ) -> None:
        """`on_append(count)` is called after each COMMIT; `on_full` is awaited when the log has no segment left."""
        self._database = database
        self._sql = sql
        self._schema = schema
        self._timeout = produce_timeout
        self._on_append = on_append
        self._on_full = on_full
        self._calls: deque[_Call] = deque()
        self._waiting: deque[_Call] = deque()
        """In the order of their deadlines; those that are answered go when they come to the front."""
        self._alarm: asyncio.TimerHandle | None = None
        self._sent_at: float | None = None
        """When the statement that is under way was sent."""
        self._idle: asyncio.Future[None] | None = None
        self._connection: Connection | None = None
        self._unconfirmed = False
        self._unreachable: str | None = None
        """Why there is no connection, since there was one last."""
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._broken: PgBackendError | None = None
        """What is told to everybody once the task has died of a bug."""

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="append")
        self._task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        if task.cancelled() or (error := task.exception()) is None:
            return
        facts.emit("appender died", level=logging.ERROR, exc_info=error)
        self._drop_connection()
        self._broken = PgBackendError(
            f"This backend takes no events any more: its appender died of a bug ({type(error).__name__}: {error}). "
            "Restart it; the log has the traceback."
        )
        self._calls.clear()
        waiting, self._waiting = self._waiting, deque()
        for call in waiting:
            if call.sent:
                self._fail([call], ProduceUncertainError(
                    f"The appender died of a bug while this was being committed ({type(error).__name__}: {error}): "
                    "the event may or may not be stored."
                ))  # fmt: skip
            else:
                self._fail([call], self._broken)

    async def append(self, rows: Sequence[Row], weight: int) -> None:
        """Return once the rows are committed, all of them in one transaction. `weight`: the sum of what `encode` says.

        Raises EventError when PostgreSQL refuses their values, ProduceTimeoutError when they were not even sent in
        time, ProduceUncertainError when nobody knows, DatabaseError for any other refusal: nothing is stored then.
        """
        committed = asyncio.get_running_loop().create_future()
        call = self._submit(rows, weight, partial(_settle, committed))
        try:
            await committed
        except asyncio.CancelledError:
            call.done = None
            if not call.sent and call in self._calls:
                self._calls.remove(call)
            raise

    def append_soon(self, row: Row, weight: int, done: Done) -> None:
        """As `append()` of one row for whoever has no task to wait in: `done` gets None, or what that would raise.

        `done` must not raise; should it, that is logged, and nobody else notices. A task and a future less: 4 µs an
        event.
        """
        self._submit((row,), weight, done)

    def _submit(self, rows: Sequence[Row], weight: int, done: Done) -> _Call:
        if self._broken is not None:
            raise _copy(self._broken)
        if self._task is None or self._closing:
            raise NotRunningError("This backend does not take events: call `init()` first, and not after `stop()`.")
        loop = asyncio.get_running_loop()
        call = _Call(rows, weight, done, loop.time() + self._timeout)
        self._calls.append(call)
        waiting = self._waiting
        while waiting and waiting[0].done is None:
            waiting.popleft()
        waiting.append(call)
        if self._alarm is None:
            self._alarm = loop.call_at(call.deadline, self._look_at_clock)
        if self._idle is not None:
            self._wake()
        return call

    def _wake(self) -> None:
        idle, self._idle = self._idle, None
        if idle is not None and not idle.done():
            idle.set_result(None)

    def _look_at_clock(self) -> None:
        """Answer the calls whose time is up. One timer for all: a timer a call would cost 3 µs each."""
        loop = asyncio.get_running_loop()
        self._alarm = None
        now, waiting = loop.time(), self._waiting
        while waiting and (waiting[0].done is None or waiting[0].deadline <= now):
            call = waiting.popleft()
            if call.done is not None:
                self._expire(call)
        following = waiting[0].deadline if waiting else None
        if self._sent_at is not None:
            # Longer than any caller waits. Until then an answer may come, and is worth more than a new connection.
            give_up = self._sent_at + 2 * self._timeout
            if give_up <= now and self._connection is not None:
                self._connection.terminate()
            else:
                following = give_up if following is None else min(following, give_up)
        if following is not None:
            self._alarm = loop.call_at(following, self._look_at_clock)

    def _expire(self, call: _Call) -> None:
        if call.sent:
            error: PgBackendError = ProduceUncertainError(
                f"PostgreSQL did not confirm the commit within {self._timeout:g} s: the event may or may not be stored."
            )
        else:
            self._calls.remove(call)
            error = ProduceTimeoutError(
                f"The event was not sent within {self._timeout:g} s, and is not stored. "
                + (self._unreachable or "Check that PostgreSQL can be reached.")
            )
        call.answer(error)

    async def close(self, *, timeout: float = math.inf) -> None:
        """Return once every call that was made is answered, and the connection is closed, after `timeout` seconds."""
        self._closing = True
        task, self._task = self._task, None
        if task is None:
            return
        self._wake()
        try:
            # By then each call has been answered by its own clock; a network that is silent must not hold up the rest.
            await asyncio.wait({task}, timeout=min(timeout, self._timeout + _GRACE))
        finally:
            self._drop_connection()
            task.cancel()
            if self._alarm is not None:
                self._alarm.cancel()
            self._answer_the_rest()
        await asyncio.wait({task})

    def _answer_the_rest(self) -> None:
        """There is no time left for these calls."""
        self._calls.clear()
        waiting, self._waiting = self._waiting, deque()
        for call in waiting:
            call.answer(
                ProduceUncertainError(
                    "The backend was stopped before PostgreSQL confirmed the commit: the event may be stored or not."
                )
                if call.sent
                else NotRunningError("The backend was stopped before the event could be sent: it is not stored.")
            )

    async def _run(self) -> None:
        backoff = GrowingDelay(self._database, cap=1.0)
        while True:
            if not self._calls:
                if self._closing:
                    return
                self._idle = asyncio.get_running_loop().create_future()
                await self._idle
                continue
            try:
                connection = await self._connected()
            except DatabaseError as error:
                # Nothing was sent: whoever has patience left waits for the server to come back.
                self._unreachable = str(error)
                facts.emit("append cannot connect", level=backoff.failed(), failures=backoff.failures, error=str(error))
                if self._closing or not isinstance(error, ConnectionLostError):
                    self._fail(list(self._calls), error)
                    self._calls.clear()
                else:
                    await backoff.wait()
                continue
            backoff.reset()
            self._unreachable = None
            batch = self._gather()
            # None when all who waited gave up while it connected.
            if batch:
                await self._send(connection, batch)

    async def _connected(self) -> Connection:
        connection = self._connection
        if connection is None or connection.is_closed():
            connection = self._connection = await self._database.connect()
            on_unconfirmed(connection, self._on_unconfirmed)
        return connection

    def _on_unconfirmed(self) -> None:
        self._unconfirmed = True

    def _drop_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()

    def _gather(self) -> list[_Call]:
        """The next calls, as many as fit; one that is larger by itself travels alone."""
        batch: list[_Call] = []
        events = weight = 0
        calls = self._calls
        while calls:
            call = calls[0]
            events += len(call.rows)
            weight += call.weight
            if batch and (events > _BATCH_EVENTS or weight > _BATCH_BYTES):
                break
            batch.append(calls.popleft())
        return batch

    async def _send(self, connection: Connection, batch: list[_Call]) -> None:
        """Commit a batch and answer its calls."""
        for call in batch:
            call.sent = True
        rows = batch[0].rows if len(batch) == 1 else [row for call in batch for row in call.rows]
        try:
            try:
                await repeat(lambda: self._insert(connection, rows), self._timeout)
            except Exception as error:
                if not is_out_of_segments(error):
                    raise
                # Nobody ran for a hundred million events: make room, and nothing has failed.
                await self._on_full()
                await self._insert(connection, rows)
        except Exception as error:  # noqa: BLE001 - each kind is answered below
            await self._refused(connection, batch, error)
            return
        if self._unconfirmed:
            self._fail(batch, ProduceUncertainError(
                "PostgreSQL committed without its synchronous standby's word: the event is lost if it fails over now."
            ))  # fmt: skip
        else:
            # Not before the next batch was sent: PostgreSQL commits that one while these are told, which for HTTP's
            # clients takes as long as a commit.
            asyncio.get_running_loop().call_soon(_tell_committed, batch)
        self._on_append(len(rows))

    async def _insert(self, connection: Connection, rows: Sequence[Row]) -> None:
        self._unconfirmed = False
        self._sent_at = asyncio.get_running_loop().time()
        try:
            if len(rows) == 1:
                await connection.execute(self._sql.append_one, *rows[0])
            elif len(rows) < _COPY_EVENTS:
                await connection.execute(self._sql.append, *map(list, zip(*rows, strict=True)))
            else:
                await connection.copy_records_to_table(
                    "events", schema_name=self._schema, columns=COLUMNS, records=rows
                )
        finally:
            self._sent_at = None

    async def _refused(self, connection: Connection, batch: list[_Call], error: Exception) -> None:
        """Answer the calls of a batch that was not committed, or of which nobody knows."""
        if isinstance(error, DatabaseError):
            # The log is out of segments, and they cannot be made: the INSERT itself was refused.
            self._fail(batch, error)
            return
        if is_out_of_segments(error):
            # No event is at fault, and each would meet the same: so the calls are not tried apart.
            self._fail(batch, DatabaseError(
                "The log has no segment for its next position, and none could be made: a transaction keeps the table "
                "`events` locked. Nothing was stored. End that transaction, and produce again."
            ))  # fmt: skip
            return
        if is_position_taken(error):
            self._fail(batch, DatabaseError(
                f"The log's sequence gave out a position that an event has already ({error}): the log was set back. "
                "Nothing was stored. `probe()` says how to repair it."
            ))  # fmt: skip
            return
        if is_refused_for_data(error):
            if len(batch) > 1:
                # One bad event fails only its own caller: each call by itself, in order.
                while batch:
                    # Whose time was up meanwhile has no rows any more, and was told.
                    if batch[0].done is None:
                        batch.pop(0)
                        continue
                    if connection.is_closed():
                        # Nothing of the rest is stored, and none of it is in doubt: with the next connection.
                        for call in batch:
                            call.sent = False
                        self._calls.extendleft(reversed([call for call in batch if call.done is not None]))
                        return
                    await self._send(connection, [batch.pop(0)])
            else:
                self._fail(batch, EventError(f"PostgreSQL refused the event: {error}."))
            return
        if is_definite(error):
            self._fail(batch, translate(error))
            if isinstance(translate(error), ConnectionLostError):
                self._drop_connection()
            return
        self._drop_connection()
        facts.emit("append is uncertain", level=logging.WARNING, calls=len(batch), error=str(error))
        self._fail(batch, ProduceUncertainError(
            f"The connection was lost while PostgreSQL was committing ({error}): the event may or may not be stored."
        ))  # fmt: skip

    def _fail(self, batch: Sequence[_Call], error: Exception) -> None:
        for call in batch:
            # An exception of its own for each: tracebacks are put together on it.
            call.answer(_copy(error))


def _tell_committed(batch: Sequence[_Call]) -> None:
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
