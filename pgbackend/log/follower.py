"""Follows the log for one reader without a subscription: for people and exports.

A `Follower` reads on from one place with a `Reader` of its own, so the fence holds for it as for a subscription. It
stores nothing. Wake-ups come by LISTEN, on a connection of its own; it polls, too. The promise: each event behind its
place is in exactly one batch, however late it was committed, and outages of the server are waited out. One case is
beyond it: an asynchronous failover that loses events gives their positions to others. The follower then goes on behind
its place, or where the log ends if that is before.
"""

import asyncio
import logging

from pgbackend import facts
from pgbackend.errors import DatabaseError, SchemaError
from pgbackend.log.incarnation import IncarnationChanged
from pgbackend.log.log import Log
from pgbackend.log.notify import Wakeup
from pgbackend.log.ranges import RangeSet
from pgbackend.log.reader import Batch, Reader
from pgbackend.log.tail import BlockedWatch
from pgbackend.postgres.connections import Connection, is_pooled
from pgbackend.postgres.errors import INSUFFICIENT_PRIVILEGE, translate
from pgbackend.postgres.reconnect import GrowingDelay


class Follower:
    """One reader's place in the log. Only one task at a time may use it. Close it at the end."""

    def __init__(
        self, log: Log, *, after: int, holes: RangeSet, strict: bool, channel: str, poll_interval: float
    ) -> None:
        """`holes`: positions at or below `after` whose events may still appear, and are wanted.

        `strict`: batches come in the order of positions, and wait for each open appender. Otherwise an appender delays
        later events by `hole_wait` at most, and its own events come when they appear.
        """
        self.holes = holes.copy()
        """Positions behind which it has read, and in which events may still appear."""
        self._log = log
        self._strict = strict
        self._channel = channel
        self._poll_interval = poll_interval
        self._wakeup = Wakeup()
        self._woken = self._wakeup.count
        self._pause: float | None = 0.0
        self._delay = GrowingDelay(log.database)
        self._listening: Connection | None = None
        self._is_pooled = False
        """Whether connections lead through a pooler, which has no LISTEN."""
        self._read_from(after, holes)

    @property
    def position(self) -> int:
        """Everything at or below has been in a batch, or lies in `holes`, or is dead, or was removed."""
        return self._reader.position

    async def next(self) -> Batch:
        """The next batch that has something, or moves `position`, however long that takes.

        Raises SchemaError, and DatabaseError when this role may not read the log.
        """
        while True:
            if self._pause != 0.0:
                await self._listen()
                wait = self._poll_interval if self._pause is None else min(self._pause, self._poll_interval)
                await self._wakeup.wait(since=self._woken, timeout=wait)
            # Before the read: it may miss events that are appended meanwhile, which then wake the next read.
            self._woken = self._wakeup.count
            try:
                batch = await self._read()
            except SchemaError:
                raise
            except IncarnationChanged as error:
                facts.emit("following starts again", level=logging.WARNING, reason=str(error))
                await self._start_again()
                continue
            except DatabaseError as error:
                await self._wait_out(error)
                continue
            self._delay.reset()
            await self._watch.look(asyncio.get_running_loop().time())
            if batch is not None:
                return batch

    async def close(self) -> None:
        """No connection of its own is open."""
        connection, self._listening = self._listening, None
        if connection is not None:
            connection.terminate()

    def _read_from(self, after: int, holes: RangeSet) -> None:
        self._reader = Reader(self._log, after=after, holes=holes, strict=self._strict, hashes=False)
        self._watch = BlockedWatch(self._log, self._reader, strict=self._strict)

    async def _read(self) -> Batch | None:
        """One round of the reader; None when it has found nothing. With a proof, so that the end counts as read."""
        before = self._reader.position
        batch = await self._reader.read(prove=True)
        self._pause = batch.pause
        if not batch and batch.upto == before:
            return None
        for hole in batch.opened:
            self.holes.add(*hole)
        if self.holes:
            for position in batch.positions:
                self.holes.discard(position)
        for hole in batch.closed:
            self.holes.remove(*hole)
        return batch

    async def _start_again(self) -> None:
        """Nothing that was read in the former incarnation is relied on, except for the place."""
        while True:
            try:
                await self._log.incarnation.enter()
                after = min(self._reader.position, (await self._log.check()).upto)
            except SchemaError:
                raise
            except (DatabaseError, IncarnationChanged) as error:
                await self._wait_out(error)
            else:
                self.holes = self.holes.below(after)
                self._read_from(after, self.holes)
                self._pause = 0.0
                return

    async def _wait_out(self, error: DatabaseError | IncarnationChanged) -> None:
        """Time has passed, and the read may succeed now. Raises the error if time does not help."""
        if isinstance(error, DatabaseError) and error.sqlstate == INSUFFICIENT_PRIVILEGE:
            raise error
        facts.emit("read failed", level=self._delay.failed(), failures=self._delay.failures, error=str(error))
        await self._delay.wait()

    async def _listen(self) -> None:
        """Wake-ups come by LISTEN if they can. Without, events come with the next poll."""
        if self._is_pooled or (self._listening is not None and not self._listening.is_closed()):
            return
        await self.close()
        try:
            connection = self._listening = await self._log.database.connect(direct=True)
        except DatabaseError as error:
            facts.emit("not listening", level=logging.DEBUG, reason=str(error))
            return
        if is_pooled(connection):
            self._is_pooled = True
            await self.close()
            return
        try:
            await connection.add_listener(self._channel, lambda *_: self._wakeup.wake())
        except Exception as error:  # noqa: BLE001 - whatever it is, there are no wake-ups: poll
            facts.emit("not listening", level=logging.DEBUG, reason=str(translate(error)))
        # An append before LISTEN began was not heard.
        self._wakeup.wake()
