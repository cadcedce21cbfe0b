"""Segments: keeps the log's partitions well ahead of the last position that was given out.

There is no default partition, so an append beyond the last segment fails; every worker therefore looks now and then,
and the first that finds too little ahead makes more. Its promise: making segments never makes a producer wait, whoever
holds what open. It takes ShareUpdateExclusive on the parent, which conflicts with no INSERT and no SELECT.
"""

import logging
from dataclasses import dataclass

from pgbackend.database import Database
from pgbackend.errors import DatabaseError
from pgbackend.facts import emit
from pgbackend.model import Position
from pgbackend.sql import load
from pgbackend.sql.statements import SegmentsSql

AHEAD_POSITIONS = 100_000_000
"""Positions that have a segment before they are given out: 11 hours at 2,500 events a second."""
AHEAD_SEGMENTS = 100
"""The most segments kept ahead, where they are narrow."""
WIDTH = 10_000_000
"""Positions of a segment where there is none to learn the width from; as in the first migration."""

# Somebody holds a lock: an operator's DDL, a vacuum, another maker of segments.
_TRY_LATER = frozenset({"55P03", "40P01"})


@dataclass(frozen=True, slots=True)
class Reach:
    """How far the newest segment reaches (`lower` ≤ position < `upper`), and how far the log has come (`head`)."""

    head: int
    lower: int | None
    upper: int | None

    @property
    def is_exhausted(self) -> bool:
        """Whether the next append fails."""
        return self.upper is None or self.head + 1 >= self.upper


def next_segment(reach: Reach) -> tuple[int, int] | None:
    """The bounds of the segment to be made next, as wide as the newest; None when enough of them are ahead.

    >>> next_segment(Reach(head=250, lower=0, upper=500))
    (500, 1000)
    >>> next_segment(Reach(head=450, lower=50_000, upper=50_500)) is None
    True
    """
    if reach.lower is None or reach.upper is None:
        width = WIDTH
        start = reach.head // width * width
    else:
        width = reach.upper - reach.lower
        # Appends that failed for want of a segment have used up positions: whole segments of them need not be made.
        start = reach.upper + max(reach.head - reach.upper, 0) // width * width
    if start - reach.head >= min(AHEAD_POSITIONS, AHEAD_SEGMENTS * width):
        return None
    return start, start + width


class Segments:
    """Makes the segments of one log."""

    def __init__(self, database: Database, *, schema: str) -> None:
        self._database = database
        self._sql = load(SegmentsSql, "segments", schema=schema)

    async def extend(self) -> Position:
        """Every position below the returned one has a segment, and enough of them are ahead of the log.

        Or not yet enough: when another worker is making them, or somebody holds a lock. The next call goes on. Only a
        log that is out of segments altogether waits for the other. Costs one catalog query when nothing is to do.
        """
        reach = await self.find_reach()
        # A transaction for each: what was made stays made, and producers can use it at once.
        while next_segment(reach) is not None and await self._make_next(urgent=reach.is_exhausted):
            reach = await self.find_reach()
        return Position(reach.upper or 0)

    async def find_reach(self) -> Reach:
        """How far the segments reach, and the log has come."""
        row = await self._database.fetchrow(self._sql.find_reach)
        assert row is not None  # noqa: S101 - a sequence has one row
        return Reach(row["head"], row["lower"], row["upper"])

    async def _make_next(self, *, urgent: bool) -> bool:
        """Make one segment, or find that another worker has; False when somebody is in the way."""
        try:
            made = await self._make_locked(urgent=urgent)
        except DatabaseError as error:
            if error.sqlstate not in _TRY_LATER:
                raise
            emit("segment not made yet", level=logging.WARNING, error=str(error))
            return False
        return made

    async def _make_locked(self, *, urgent: bool) -> bool:
        # Read committed, whatever the role's default is: what is read under the lock must be newer than the lock.
        async with self._database.acquire() as connection, connection.transaction(isolation="read_committed"):
            await connection.execute(self._sql.limit_waits)
            if urgent:
                await connection.execute(self._sql.lock)
            elif not await connection.fetchval(self._sql.try_lock):
                return False
            row = await connection.fetchrow(self._sql.find_reach)
            segment = next_segment(Reach(row["head"], row["lower"], row["upper"])) if row else None
            if segment is None:
                return True
            lower, upper = segment
            ddl = await connection.fetchrow(self._sql.define_segment, lower, upper)
            assert ddl is not None  # noqa: S101 - a SELECT without FROM has one row
            await connection.execute(ddl["create_segment"])
            await connection.execute(ddl["attach_segment"])
        emit("segment made", lower=lower, upper=upper)
        return True
