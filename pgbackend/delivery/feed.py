"""The reading side of a shard: from a cursor, past start, end, number of shards and filter, into the window.

What the window has room for goes on to whoever dispatches it; what is not for this shard is skipped. Reading ends where
the shard does, for now or for good.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from datetime import datetime

from pgbackend.codec.event import Event
from pgbackend.delivery.outcomes import Buried, Skipped
from pgbackend.delivery.registration import Registration
from pgbackend.delivery.shard import Shard
from pgbackend.log.ranges import Range
from pgbackend.log.reader import Batch, Unreadable
from pgbackend.log.tail import Cursor
from pgbackend.model import Failure

_FINISH_POLL = 0.05
_END_POLL = 30.0
"""Seconds between looks at the server's clock while a subscription's end is far."""


class Feed:
    """Fills one shard's window."""

    def __init__(
        self,
        *,
        registration: Registration,
        shard: Shard,
        cursor: Cursor,
        note: Callable[[Shard], None],
        take: Callable[[Event], None],
        take_run: Callable[[Sequence[Event]], None],
        let_go: Callable[[int, int], None],
        waiting: Collection[int],
        passes: Callable[[Event], bool],
    ) -> None:
        """`take`, `take_run`: given what the window has taken on.

        `let_go`: given the first position of what is refused or skipped, and the first behind it.
        `waiting`: events that failed under a former owner, and have not been begun or let go since.
        `passes`: whether the filter lets an event through.
        """
        self._registration = registration
        self._shard = shard
        self._lease = shard.lease
        self._cursor = cursor
        self._note = note
        self._take = take
        self._take_run = take_run
        self._let_go = let_go
        self._waiting = waiting
        self._passes = passes
        self._room: asyncio.Future[None] | None = None
        self.waits = False
        """Whether it waits for room in the window."""

    @property
    def blocked(self) -> bool:
        """Whether it can't go on because somebody's transaction is open."""
        return self._cursor.blocked

    def close(self) -> None:
        """It has nothing more to read: or its stream would keep for it, up to the whole buffer, what it never takes."""
        self._cursor.close()

    def make_room(self) -> None:
        """Something has left the window."""
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    async def run(self) -> None:
        """Read until the shard ends."""
        window, cursor, stop, ended = self._shard.window, self._cursor, self._lease.stop, False
        first = (self._lease.start_position or 0) + 1
        while not ended:
            batch = await cursor.next(window.holes)
            for hole in batch.opened:
                window.add_hole(self._before_stop(hole))
            upto = batch.upto if stop is None else min(batch.upto, stop - 1)
            for lower, upper in batch.removed:
                self._skip(window.lose(max(lower, first), upper if stop is None else min(upper, stop)))
            for bad in batch.unreadable:
                self._bury(bad)
            await self._admit(batch)
            for hole in batch.closed:
                # Positions that were read once were events; the others were rolled back.
                self._skip(window.close_hole(hole))
            if self._waiting:
                # They were in the log when they failed, and should have come by now.
                gone = [position for position in self._waiting if position <= upto and not window.owes(position)]
                self._skip([(position, position + 1) for position in gone])
            if upto > window.position or batch.closed or batch.opened or batch.removed or batch.unreadable:
                window.advance(upto)
                self._note(self._shard)
            cursor.advance(batch.upto)
            ended = self._shard.is_over or (
                stop is not None and batch.upto >= stop - 1 and not window.holes.below(stop - 1)
            )
        self.close()

    def _skip(self, lost: Sequence[Range]) -> None:
        """Have it recorded that these positions were still to be handled, and that their rows are gone."""
        for lower, upper in lost:
            self._shard.note(Skipped(lower=lower, upper=upper))
            self._let_go(lower, upper)

    def _bury(self, bad: Unreadable) -> None:
        """Have a dead letter made of an event that nobody can be handed; its row is copied as it is."""
        lease, position = self._lease, bad.position
        if lease.stop is not None and position >= lease.stop:
            return
        is_owed = bool(self._shard.window.lose(position, position + 1))
        if not is_owed or bad.key_hash % lease.shards != lease.shard or position <= (lease.start_position or 0):
            return
        failure = Failure(error=f"The event cannot be read: {bad.error}", attempts=0)
        self._shard.note(Buried(position=position, failure=failure))
        self._let_go(position, position + 1)

    def _before_stop(self, hole: Range) -> Range:
        stop = self._lease.stop
        return hole if stop is None else (hole[0], min(hole[1], stop))

    async def _admit(self, batch: Batch) -> None:
        """Take on each event of the batch that is for this shard, waiting for room as need be."""
        window, registration, lease = self._shard.window, self._registration, self._lease
        shards, shard, stop = lease.shards, lease.shard, lease.stop
        bounded = not (lease.start_position is None and lease.start_at is None and lease.end_at is None)
        start = 0
        if not bounded and shards == 1 and stop is None and lease.order == "none" and not batch.opened:
            start = await self._admit_runs(batch)
        picky = shards > 1 or bounded or registration.filter is not None
        for index in range(start, len(batch.events)):
            event, position = batch.events[index], batch.positions[index]
            if stop is not None and position >= stop:
                # Should it be in a hole, from a time when the end was another: it stays pending.
                continue
            if position <= window.position and position not in window.holes:
                continue
            if bounded and self._is_behind_end(event):
                # Whichever shard it is for: what lies behind the end is one range, then.
                window.put_off(position)
                continue
            refused = picky and (
                (shards > 1 and event.key_hash % shards != shard)
                or (bounded and self._is_before_start(event))
                or (registration.filter is not None and not self._passes(event))
            )
            if not refused and not window.fits(batch.sizes[index]):
                # There may be a filter after that.
                picky = True
                refused = not await self._has_room(event, batch.sizes[index])
            if refused:
                window.skip(position)
                self._let_go(position, position + 1)
                continue
            window.open(position, batch.sizes[index])
            self._take(event)
        self._note(self._shard)

    async def _admit_runs(self, batch: Batch) -> int:
        """Take on as much of a batch as goes without a look at each event; how many. Wins a third of the whole way."""
        window, total, registration = self._shard.window, len(batch.events), self._registration
        start = 0
        while start < total and registration.filter is None and batch.positions[start] > window.position:
            if window.full:
                await self._until_room()
                continue
            stop = min(total, start + window.max_events - len(window))
            positions, sizes = batch.positions[start:stop], batch.sizes[start:stop]
            if window.bytes + sum(sizes) > window.max_bytes:
                break
            window.open_run(positions, sizes)
            self._take_run(batch.events[start:stop])
            start = stop
        return start

    async def _has_room(self, event: Event, size: int) -> bool:
        """Wait until the window has room for an event; whether it is still wanted by then."""
        health = self._registration.health
        while not self._shard.window.fits(size):
            await self._until_room()
        return health is self._registration.health or self._passes(event)

    async def _until_room(self) -> None:
        self._room = asyncio.get_running_loop().create_future()
        self.waits = True
        try:
            await self._room
        finally:
            self._room = None
            self.waits = False

    def _is_before_start(self, event: Event) -> bool:
        at, lease = event.recorded_at, self._lease
        return (lease.start_position is not None and event.position <= lease.start_position) or (
            at is not None and lease.start_at is not None and at <= lease.start_at
        )

    def _is_behind_end(self, event: Event) -> bool:
        at = event.recorded_at
        return at is not None and self._lease.end_at is not None and at >= self._lease.end_at


async def settle_all(
    shard: Shard, *, seconds_until: Callable[[datetime], Awaitable[float]], prove_end: Callable[[], Awaitable[int]]
) -> None:
    """Return once a shard whose subscription ends has settled everything up to there.

    `seconds_until`: how long it is to a date by the server's clock. `prove_end`: the highest position of now.
    """
    window, lease = shard.window, shard.lease
    goal = (lease.end_position or 0) - 1
    if lease.end_at is not None:
        while (left := await seconds_until(lease.end_at)) > 0:  # noqa: ASYNC110 - the server's clock
            # The two clocks may drift apart, and either may be set.
            await asyncio.sleep(min(left, _END_POLL))
        # A check that began after the end: no event from before it can appear above what it proved.
        proven = await prove_end()
        goal = proven if lease.end_position is None else min(goal, proven)
    while window.position < goal or len(window) or window.holes.below(goal):  # noqa: ASYNC110 - rare, and plain
        await asyncio.sleep(_FINISH_POLL)
