"""Finds where in the log a place is.

"latest" is the hard one: events acknowledged from now on are delivered, and older ones are not. Positions up to the
log's head may still be open then, so it takes the fence.
"""

import asyncio
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from pgbackend.errors import DatabaseError
from pgbackend.log.fence import MAX_PENDING_RANGES
from pgbackend.log.log import Log
from pgbackend.log.ranges import RangeSet
from pgbackend.subscriptions.places import FIRST_DATE, LAST_DATE, Place, Start

_SKEW = timedelta(seconds=60)
"""How far `recorded_at` may be out of the order of positions: an appender can be held up between drawing the two."""


class Locator:
    """Turns places into starts."""

    def __init__(self, log: Log) -> None:
        self._log = log

    async def locate(self, place: Place) -> Start:
        """Where offsets are put for a place, never in front of the log's first segment.

        Events removed earlier were never owed to a later subscription, so they do not count as skipped for it.
        """
        if place == "latest":
            return await self._locate_latest()
        start = await self._locate_in_log(place)
        before = await self._log.find_first_segment() - 1
        if start.position >= before:
            return start
        return replace(start, position=max(start.position, min(before, (await self._log.check()).upto)))

    async def find_end(self, date: datetime) -> int:
        """A position above which nothing was recorded before `date`."""
        return await self._position_before(min(date, LAST_DATE - 2 * _SKEW) + 2 * _SKEW)

    async def _locate_latest(self) -> Start:
        """The log's head. Pending is what at or below it may still appear: those events are acknowledged later."""
        evidence = await self._log.check()
        head, blockers = evidence.upto, evidence.appenders
        began = time.monotonic()
        pause = 0.001
        while blockers:
            overdue = all(self._log.clock.is_overdue(name, now=time.monotonic()) for name in blockers)
            if overdue or time.monotonic() - began > self._log.clock.hole_wait:
                return Start(head, await self._open_holes(head))
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, 0.025)
            before, evidence = evidence, await self._log.check()
            blockers = evidence.still_open(blockers, since=before)
        return Start(head)

    async def _locate_in_log(self, place: Place) -> Start:
        if isinstance(place, str):
            return Start(0)
        if isinstance(place, datetime):
            return Start(await self._position_before(place), start_at=place)
        head = (await self._log.check()).upto
        # No offset may be ahead of the log: it would look as if the log had been set back.
        return Start(place) if place <= head else Start(head, start_position=place)

    async def _open_holes(self, head: int) -> RangeSet:
        """Every position up to `head` that is missing and may belong to an appender that is open now."""
        oldest = await self._log.oldest_appender_start()
        # No open appender has a position at or below the last one recorded before the oldest of them began.
        floor = 0 if oldest is None else await self._position_before(oldest)
        rows = await self._log.database.fetch(self._log.sql.find_holes, floor, head, MAX_PENDING_RANGES + 1)
        if len(rows) > MAX_PENDING_RANGES:
            names = ", ".join(str(a.pid or a.gid) for a in await self._log.appenders())
            raise DatabaseError(
                f"The end of the log cannot be determined: transactions that append to it are open (pid {names}), "
                f"and more than {MAX_PENDING_RANGES} gaps may be theirs. End them, or start at a position."
            )
        return RangeSet((row["lower"], row["upper"]) for row in reversed(rows))

    async def _position_before(self, date: datetime) -> int:
        """A position at or below which nothing was recorded after `date`. By bisection over the primary key."""
        if date < FIRST_DATE + _SKEW:
            return 0
        date = min(date, datetime.now(UTC) + timedelta(days=1)) - _SKEW
        low, high = 0, (await self._log.check()).upto
        while low < high:
            middle = (low + high + 1) // 2
            row = await self._log.database.fetchrow(self._log.sql.find_position, middle, date)
            if row is not None and row["is_before"]:
                low = max(middle, row["position"])
            else:
                high = middle - 1
        return low
