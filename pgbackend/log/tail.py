"""The tail: all shards of a process that stand at about the same place share one reader.

A `Stream` is a reader with a short memory of the batches that it has read, and the task that reads on. Each shard has a
`Cursor`, and each cursor is in one stream. So the shards at the tail share each page, each decoded event and each check
of the fence. A cursor that falls behind the memory of its stream (64 MiB) gets a stream of its own; one that catches up
with another stream moves over. Cursors of `strict` subscriptions share only with each other, because their reader waits
at holes.

The promise: across all moves, each event comes to a cursor at least once, and its owner can tell when it comes again.
An event is new when it is above the cursor's place, or lies in one of the owner's own open holes. The owner brings
those holes along, and the new stream's reader adopts them, so that what appears in them is in some later batch.
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
"""Seconds beyond `hole_wait` in which a reader has passed an overdue appender, however busy the machine is."""


class Tail:
    """All streams of a process."""

    def __init__(self, log: Log, wakeup: Wakeup, *, poll_interval: float, buffer_bytes: int) -> None:
        self.log = log
        self.wakeup = wakeup
        self.poll_interval = poll_interval
        self.buffer_bytes = buffer_bytes
        self._tasks: asyncio.TaskGroup | None = None
        self._streams: list[Stream] = []
        """Oldest first."""

    async def run(self) -> None:
        """Run the streams until cancelled. Raises what ends one of them: IncarnationChanged or SchemaError."""
        try:
            async with asyncio.TaskGroup() as self._tasks:
                for stream in self._streams:
                    self._start(stream, self._tasks)
                await asyncio.get_running_loop().create_future()
        finally:
            # A cursor that enters a new stream from now on waits for the next run.
            self._tasks = None

    def cursor(self, *, after: int, strict: bool = False, hashes: bool = True) -> "Cursor":
        """A place in the log that reads on behind `after`. Close it when it is not needed any more.

        `hashes`: whether its events must have the hashes of their keys.
        """
        return Cursor(self, after=after, strict=strict, hashes=hashes)

    def enter(self, cursor: "Cursor", holes: RangeSet) -> "Stream":
        """Put the cursor into the stream that covers its place and is farthest ahead, or into a new one."""
        stream = self._find_stream(cursor, holes)
        if stream is None:
            reader = Reader(self.log, after=cursor.position, holes=holes, strict=cursor.strict, hashes=cursor.hashes)
            stream = Stream(self, reader, strict=cursor.strict)
            self._streams.append(stream)
            if self._tasks is not None:
                self._start(stream, self._tasks)
        else:
            stream.reader.adopt(holes)
        if cursor.hashes:
            stream.want_hashes()
        stream.cursors.add(cursor)
        return stream

    def _start(self, stream: "Stream", tasks: asyncio.TaskGroup) -> None:
        stream.task = tasks.create_task(stream.run(), name=f"stream from {stream.reader.position}")

    def _find_stream(self, cursor: "Cursor", holes: RangeSet) -> "Stream | None":
        if cursor.strict and holes:
            # Its holes must be filled before anything else comes, and no other's reader waits for them.
            return None
        fitting = (stream for stream in self._streams if stream.fits(cursor, holes))
        return max(fitting, key=lambda stream: stream.reader.position, default=None)

    def has_better(self, cursor: "Cursor", holes: RangeSet, stream: "Stream") -> bool:
        """Whether the cursor fits into another stream that is farther ahead than `stream`, or as far and older."""
        if cursor.strict and holes:
            return False
        older = True
        for other in self._streams:
            if other is stream:
                older = False
            elif other.fits(cursor, holes):
                lead = other.reader.position - stream.reader.position
                if lead > 0 or (lead == 0 and older):
                    return True
        return False

    def leave(self, cursor: "Cursor", stream: "Stream") -> None:
        """Take the cursor out of the stream. A stream without cursors ends."""
        stream.cursors.discard(cursor)
        stream.forget()
        if not stream.cursors:
            self._streams.remove(stream)
            if stream.task is not None:
                stream.task.cancel()


class Stream:
    """A reader, the batches that some cursors have not taken yet, and the task that reads on when one wants more."""

    def __init__(self, tail: Tail, reader: Reader, *, strict: bool) -> None:
        self.reader = reader
        self.strict = strict
        self.cursors: set[Cursor] = set()
        self.task: asyncio.Task[None] | None = None
        self.watch = BlockedWatch(tail.log, reader, strict=strict)
        self._tail = tail
        self._memory = _Memory()
        self._is_reading = False
        self._hashed_since: int | None = None
        """The position above which the events of its batches have the hashes of their keys; None if they have none."""
        self._published = asyncio.Event()
        """Replaced by a new one each time it is set."""
        self._demand = asyncio.Event()

    def first_number(self, cursor: "Cursor") -> int:
        """The number of the first batch that may have something new for a cursor that enters now."""
        # At the reader's place, the rounds to come have it all: they read the cursor's holes, too.
        return self._memory.end if cursor.position == self.reader.position else self._memory.first

    async def run(self) -> None:
        """Read on while cursors want more, until cancelled. Raises IncarnationChanged and SchemaError."""
        tail, loop = self._tail, asyncio.get_running_loop()
        delay = GrowingDelay(tail.log.database)
        proof_due = loop.time() + tail.poll_interval
        woken = tail.wakeup.count
        pause: float | None = 0.0
        while True:
            await self._demand.wait()
            if pause != 0.0:
                patience = proof_due - loop.time() if pause is None else pause
                await tail.wakeup.wait(since=woken, timeout=max(0.0, min(patience, tail.poll_interval)))
            # Before the read: it may miss events that are appended meanwhile, which then wake the next read.
            woken = tail.wakeup.count
            prove = loop.time() >= proof_due
            try:
                batch = await self.run_once(prove=prove)
            except SchemaError:
                raise
            except DatabaseError as error:
                facts.emit("read failed", level=delay.failed(), failures=delay.failures, error=str(error))
                await delay.wait()
                continue
            delay.reset()
            if prove:
                proof_due = loop.time() + tail.poll_interval
            pause = batch.pause
            await self.watch.look(loop.time())

    async def run_once(self, *, prove: bool) -> Batch:
        """One round of the reader. The batch is published if it says anything. Raises as `Reader.read()` does."""
        start = self.reader.position
        self._is_reading = True
        try:
            batch = await self.reader.read(prove=prove)
        finally:
            self._is_reading = False
        if batch or batch.upto > start:
            self._publish(batch, start)
        return batch

    def fits(self, cursor: "Cursor", holes: RangeSet) -> bool:
        """Whether the cursor finds here all that follows its place, in its order, without waiting for history."""
        if self.strict != cursor.strict:
            return False
        is_next = cursor.position == self.reader.position and not self._is_reading
        if holes and not is_next:
            # The next round reads what has appeared in its holes. Earlier rounds, and the one under way, may have read
            # later events of the same transactions, which must not come first.
            return False
        if cursor.hashes and (self._hashed_since is None or cursor.position < self._hashed_since):
            # The next round gets them. What was read before has none.
            return is_next and not self.reader.holds_events
        oldest = self._memory.start
        floor = self.reader.position if oldest is None else oldest
        return floor <= cursor.position <= self.reader.position

    def want_hashes(self) -> None:
        """From now on the events get the hashes of their keys."""
        if self._hashed_since is None:
            self._hashed_since, self.reader.hashes = self.reader.position, True

    def take(self, number: int) -> Batch | None:
        """The batch of that number; None while it is still to be read. Raises LookupError when it was forgotten."""
        batch = self._memory.get(number)
        if number >= self._memory.end - 1:
            # The cursor that takes the last batch will want another one: read it meanwhile.
            self._demand.set()
        return batch

    async def published(self) -> None:
        """Return after the next batch was published."""
        await self._published.wait()

    def forget(self) -> None:
        """Drop the batches that every cursor has taken. A cursor that has fallen behind takes none of them any more."""
        memory = self._memory
        numbers = (cursor.number for cursor in self.cursors)
        oldest = min((number for number in numbers if number >= memory.first), default=memory.end)
        while memory.first < oldest:
            memory.drop_first()

    def _publish(self, batch: Batch, start: int) -> None:
        memory = self._memory
        memory.append(batch, start)
        self._demand.clear()
        # A cursor that has not taken the oldest batch by now falls behind and gets a stream of its own.
        while memory.bytes > self._tail.buffer_bytes and memory.end - memory.first > 1:
            memory.drop_first()
        self._published.set()
        self._published = asyncio.Event()


class _Memory:
    """The last batches of a stream, numbered in the order of reading."""

    def __init__(self) -> None:
        self.first = 0
        """The number of the oldest batch that is still here."""
        self.bytes = 0
        self._batches: deque[tuple[Batch, int]] = deque()
        """Each with the position behind which it begins."""

    @property
    def end(self) -> int:
        """The number that the next batch will have."""
        return self.first + len(self._batches)

    @property
    def start(self) -> int | None:
        """The position behind which the oldest batch begins; None when there is no batch."""
        return self._batches[0][1] if self._batches else None

    def get(self, number: int) -> Batch | None:
        """The batch of that number; None when it is still to come. Raises LookupError when it was dropped."""
        index = number - self.first
        if index < 0:
            raise LookupError
        return self._batches[index][0] if index < len(self._batches) else None

    def append(self, batch: Batch, start: int) -> None:
        self._batches.append((batch, start))
        self.bytes += batch.size

    def drop_first(self) -> None:
        batch, _ = self._batches.popleft()
        self.bytes -= batch.size
        self.first += 1


class BlockedWatch:
    """Notices when open appenders hold a reader back for longer than they should, and reports which."""

    def __init__(self, log: Log, reader: Reader, *, strict: bool) -> None:
        self.is_blocked = False
        self._log = log
        self._reader = reader
        self._strict = strict
        self._since: float | None = None
        self._position = -1
        self._reported: str | None = None
        """The oldest appender of the last report."""

    async def look(self, now: float) -> None:
        """Look at the reader after a round. Emits a fact when it has become blocked, or by another appender."""
        if not self._reader.is_blocked:
            self._since = self._reported = None
            self.is_blocked = False
            return
        if self._since is None or self._position != self._reader.position:
            # Under load a reader always waits for some appender, each for a moment. It is blocked when it stands still.
            self._since, self._position = now, self._reader.position
            self.is_blocked = False
        patience = self._log.clock.hole_wait
        if not self._strict:
            # It passes overdue appenders, so only more holes than can be passed hold it back for longer.
            patience += _PASSING
        if self.is_blocked or now - self._since <= patience:
            return
        self.is_blocked = True
        await self._report()

    async def _report(self) -> None:
        try:
            appenders = await self._log.appenders()
        except DatabaseError as error:
            facts.emit("appenders not seen", level=logging.DEBUG, error=str(error))
            appenders = ()
        oldest = appenders[0].virtual_transaction if appenders else ""
        if oldest == self._reported:
            # The reader moves on whenever one of many holes is filled, and stops again at the next.
            return
        self._reported = oldest
        facts.emit(
            "reading waits for an open transaction",
            level=logging.WARNING,
            position=self._reader.position,
            appenders=[str(appender) for appender in appenders],
            reason=None if self._strict else f"More than {MAX_PENDING_RANGES} gaps in the log may be theirs. End them.",
        )


class Cursor:
    """One shard's place in the log."""

    def __init__(self, tail: Tail, *, after: int, strict: bool, hashes: bool) -> None:
        self.position = after
        """The owner has taken over everything at or below, but for its open holes."""
        self.strict = strict
        self.hashes = hashes
        self.number = 0
        """The number of the batch that it takes next from its stream."""
        self._tail = tail
        self._stream: Stream | None = None

    async def next(self, holes: RangeSet) -> Batch:
        """The next batch. `holes`: the owner's open holes as they are now, in case the cursor moves to another stream.

        Skip events at or below `position` that are not in those holes: they came before.
        """
        while True:
            stream = self._stream or self._move(holes)
            try:
                batch = stream.take(self.number)
            except LookupError:
                self._move(holes)
                continue
            if batch is not None:
                self.number += 1
                stream.forget()
                return batch
            if self._tail.has_better(self, holes, stream):
                self._move(holes)
                continue
            await stream.published()

    @property
    def blocked(self) -> bool:
        """Whether open appenders hold its reader back for longer than `hole_wait`."""
        return self._stream is not None and self._stream.watch.is_blocked

    def advance(self, upto: int) -> None:
        """Record that the owner has taken over everything up to here."""
        self.position = max(self.position, upto)

    def close(self) -> None:
        """Leave the stream. It ends when no cursor is left in it."""
        stream, self._stream = self._stream, None
        if stream is not None:
            self._tail.leave(self, stream)

    def _move(self, holes: RangeSet) -> Stream:
        self.close()
        stream = self._stream = self._tail.enter(self, holes)
        self.number = stream.first_number(self)
        return stream
