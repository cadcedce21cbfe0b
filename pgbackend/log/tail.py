"""One read serves all: the shard pumps of a process share readers.

A `Stream` is a reader with a short memory of what it has read. Every pump has a `Cursor`, and every cursor is in one
stream: pumps at about the same place share it, and with it each page, each decoded event and each check of the fence. A
cursor that falls behind the memory (64 MiB for each) begins a stream of its own at its place; one that has caught up
with another stream moves over. `strict` cursors share among themselves, since their reader waits where others go on.

Moving is safe at any place, by one rule. A cursor knows what is settled by position: it admits an event that is above
its place, or that lies in one of its own open holes, and no other. The holes it brings along are adopted by the
stream's reader, so that whatever appears in them will be in some later batch.
"""

import asyncio
import logging
from collections import deque

from pgbackend import facts
from pgbackend.errors import DatabaseError, SchemaError
from pgbackend.log.fence import MAX_PENDING_RANGES
from pgbackend.log.log import Log
from pgbackend.log.notify import Wakeup
from pgbackend.log.ranges import RangeSet
from pgbackend.log.reader import Batch, Reader
from pgbackend.postgres.reconnect import GrowingDelay

_PASSING = 1.0
"""Seconds beyond `hole_wait` in which a reader has passed an overdue appender, however busy the machine."""


class Tail:
    """All streams of a process."""

    def __init__(
        self, log: Log, wakeup: Wakeup, *, poll_interval: float, buffer_bytes: int, tasks: asyncio.TaskGroup
    ) -> None:
        self.log = log
        self.wakeup = wakeup
        self.poll_interval = poll_interval
        self.buffer_bytes = buffer_bytes
        self._tasks = tasks
        self._streams: list[Stream] = []

    def cursor(self, *, after: int, strict: bool = False) -> "Cursor":
        """A place in the log that reads on behind `after`; what is open or unsettled below it, `next()` is told."""
        return Cursor(self, after=after, strict=strict)

    def place(self, cursor: "Cursor", holes: RangeSet) -> "Stream":
        """The stream that covers the cursor's place and is farthest ahead; a new one when there is none."""
        # A strict cursor with holes below its place must see them filled first: no other's reader waits for those.
        alone = cursor.strict and bool(holes)
        fitting = [
            s for s in self._streams if s.strict == cursor.strict and s.covers(cursor.position, with_holes=bool(holes))
        ]
        if fitting and not alone:
            stream = max(fitting, key=lambda s: s.reader.position)
            stream.reader.adopt(holes)
        else:
            reader = Reader(self.log, after=cursor.position, holes=holes, strict=cursor.strict)
            stream = Stream(self, reader, strict=cursor.strict)
            self._streams.append(stream)
            stream.task = self._tasks.create_task(stream.run(), name=f"stream from {cursor.position}")
        return stream

    def better_than(self, stream: "Stream", position: int, *, with_holes: bool) -> bool:
        """Whether another stream covers this place and is farther ahead, or as far and older."""
        for other in self._streams:
            if other is stream:
                # The list is in order of age: those behind it are younger.
                return any(
                    s.strict == stream.strict
                    and s.covers(position, with_holes=with_holes)
                    and s.reader.position > stream.reader.position
                    for s in self._streams
                )
            if (
                other.strict == stream.strict
                and other.covers(position, with_holes=with_holes)
                and other.reader.position >= stream.reader.position
            ):
                return True
        return False

    def drop(self, stream: "Stream") -> None:
        self._streams.remove(stream)
        if stream.task is not None:
            stream.task.cancel()


class Stream:
    """A reader, the batches that some of its cursors have not taken yet, and the task that reads on for them."""

    def __init__(self, tail: Tail, reader: Reader, *, strict: bool) -> None:
        self._tail = tail
        self.reader = reader
        self.strict = strict
        self.cursors: set[Cursor] = set()
        self.task: asyncio.Task[None] | None = None
        self.reading = False
        self._batches: deque[Batch] = deque()
        self._starts: deque[int] = deque()
        self._bytes = 0
        self._first = 0
        self._published = asyncio.Event()
        self._demand = asyncio.Event()
        self._blocked_since: float | None = None
        self._blocked_at = -1
        self._told: str | None = None
        """The oldest appender when it was said last that it is held back."""
        self.blocked = False
        """Whether an appender holds the reader back for longer than `hole_wait`."""

    @property
    def next(self) -> int:
        """The number that the next batch will have."""
        return self._first + len(self._batches)

    def covers(self, position: int, *, with_holes: bool) -> bool:
        """Whether a cursor at this place finds here all that follows it, in its order, without waiting for history."""
        if with_holes:
            # What has appeared in its holes is read in the next round. What was read before, and the round under way,
            # may hold more of the same transactions, which must not come first.
            return position == self.reader.position and not self.reading
        floor = self._starts[0] if self._starts else self.reader.position
        return floor <= position <= self.reader.position

    def take(self, number: int) -> Batch | None:
        """The batch of that number; None when it is still to be read. LookupError when it is forgotten."""
        index = number - self._first
        if index < 0:
            raise LookupError
        if index >= len(self._batches) - 1:
            # Whoever takes the last one will want another: read it meanwhile.
            self._demand.set()
        return self._batches[index] if index < len(self._batches) else None

    async def published(self) -> None:
        """Wait for the next batch."""
        await self._published.wait()

    def forget(self) -> None:
        """Drop the batches that every cursor has taken. One that has fallen behind takes none of these any more."""
        numbers = (cursor.number for cursor in self.cursors)
        oldest = min((number for number in numbers if number >= self._first), default=self.next)
        while self._batches and self._first < oldest:
            self._shift()

    def oldest(self) -> int:
        """The number of the oldest batch that is still here."""
        return self._first

    async def run(self) -> None:
        """Read on as long as somebody wants more."""
        tail = self._tail
        loop = asyncio.get_running_loop()
        next_proof = loop.time() + tail.poll_interval
        known = tail.wakeup.count
        again: float | None = 0.0
        backoff = GrowingDelay(tail.log.database)
        while True:
            await self._demand.wait()
            if again:
                await tail.wakeup.wait(since=known, timeout=min(again, tail.poll_interval))
            elif again is None:
                await tail.wakeup.wait(since=known, timeout=max(0.0, min(tail.poll_interval, next_proof - loop.time())))
            known = tail.wakeup.count
            start = self.reader.position
            prove = loop.time() >= next_proof
            self.reading = True
            try:
                batch = await self.reader.read(prove=prove)
            except SchemaError:
                raise
            except DatabaseError as error:
                facts.emit("read failed", level=backoff.failed(), failures=backoff.failures, error=str(error))
                await backoff.wait()
                continue
            finally:
                self.reading = False
            backoff.reset()
            if prove:
                next_proof = loop.time() + tail.poll_interval
            again = batch.again
            if batch or batch.upto > start:
                self._publish(batch, start)
            await self._watch(loop.time())

    async def _watch(self, now: float) -> None:
        """Notice when an appender holds the reader back, and say which."""
        if not self.reader.waiting:
            self._blocked_since = self._told = None
            self.blocked = False
            return
        if self._blocked_since is None or self._blocked_at != self.reader.position:
            # Under load it always waits for somebody, each for a moment: held back is who does not move.
            self._blocked_since, self._blocked_at = now, self.reader.position
            self.blocked = False
        patience = self._tail.log.clock.hole_wait
        if not self.strict:
            # It passes what is overdue; what still holds it is more holes than can be passed.
            patience += _PASSING
        if self.blocked or now - self._blocked_since <= patience:
            return
        self.blocked = True
        try:
            appenders = await self._tail.log.appenders()
        except DatabaseError:
            appenders = ()
        oldest = appenders[0].virtual_transaction if appenders else ""
        if oldest == self._told:
            # It moves on whenever one of many holes is filled, and is held back again behind the next.
            return
        self._told = oldest
        facts.emit(
            "reading waits for an open transaction",
            level=logging.WARNING,
            position=self.reader.position,
            appenders=[str(appender) for appender in appenders],
            reason=None if self.strict else f"More than {MAX_PENDING_RANGES} gaps in the log may be theirs. End them.",
        )

    def _publish(self, batch: Batch, start: int) -> None:
        self._batches.append(batch)
        self._starts.append(start)
        self._bytes += batch.size
        self._demand.clear()
        # Who has not taken the oldest by now falls behind, and reads on by itself.
        while self._bytes > self._tail.buffer_bytes and len(self._batches) > 1:
            self._shift()
        self._published.set()
        self._published = asyncio.Event()

    def _shift(self) -> None:
        self._bytes -= self._batches.popleft().size
        self._starts.popleft()
        self._first += 1


class Cursor:
    """One pump's place in the log."""

    def __init__(self, tail: Tail, *, after: int, strict: bool) -> None:
        self.position = after
        """Everything at or below has been handed out, or is one of the caller's holes."""
        self.strict = strict
        self.number = 0
        self._tail = tail
        self._stream: Stream | None = None

    async def next(self, holes: RangeSet) -> Batch:
        """The next batch. `holes`: the caller's open holes now, for the stream that the cursor enters, should it do so.

        Events at or below `position` that are not in the caller's holes have been handed out before: skip them.
        """
        while True:
            stream = self._stream
            if stream is None:
                stream = self._enter(holes)
            try:
                batch = stream.take(self.number)
            except LookupError:
                stream = self._enter(holes)
                continue
            if batch is not None:
                self.number += 1
                stream.forget()
                return batch
            if not (self.strict and holes) and self._tail.better_than(stream, self.position, with_holes=bool(holes)):
                self._enter(holes)
                continue
            await stream.published()

    @property
    def blocked(self) -> bool:
        """Whether its reader is held back by an appender, for longer than most are open."""
        return self._stream is not None and self._stream.blocked

    def advance(self, upto: int) -> None:
        """Say that everything up to here has been taken over."""
        self.position = max(self.position, upto)

    def close(self) -> None:
        """Leave; a stream without cursors ends."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.cursors.discard(self)
            stream.forget()
            if not stream.cursors:
                self._tail.drop(stream)

    def _enter(self, holes: RangeSet) -> Stream:
        self.close()
        stream = self._stream = self._tail.place(self, holes)
        stream.cursors.add(self)
        self.number = stream.oldest()
        return stream
