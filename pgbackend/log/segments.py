"""Segments: keeps the log's partitions well ahead of the last position that was given out.

There is no default partition, so an append beyond the last segment fails; every worker therefore looks now and then,
and the first that finds too little ahead has more made. Its promise: making segments never makes a producer wait,
whoever holds what open. It takes ShareUpdateExclusive on the parent, which conflicts with no INSERT and no SELECT.

A segment is made by a function of the log, with the rights of the log's owner: most logs are run by
roles that own nothing, and stop when none of them can make room. What is made, and how much at most, is the function's
decision. Here stands only when to call it.
"""

import logging
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from pgbackend.errors import DatabaseError
from pgbackend.facts import emit
from pgbackend.log.ranges import Range
from pgbackend.model import Position
from pgbackend.postgres.pool import Database
from pgbackend.postgres.sql import load
from pgbackend.postgres.sql.statements import SegmentsSql

AHEAD_POSITIONS = 100_000_000
"""Positions that have a segment before they are given out: 11 hours at 2,500 events a second."""
AHEAD_SEGMENTS = 100
"""The most segments kept ahead, where they are narrow. The function makes no more than these two say."""

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

    @property
    def is_enough(self) -> bool:
        """Whether no segment is to be made.

        >>> Reach(head=250, lower=0, upper=500).is_enough
        False
        >>> Reach(head=450, lower=50_000, upper=50_500).is_enough
        True
        """
        if self.lower is None or self.upper is None:
            return False
        return self.upper - self.head >= min(AHEAD_POSITIONS, AHEAD_SEGMENTS * (self.upper - self.lower))


class Segments:
    """Makes the segments of one log."""

    def __init__(self, database: Database, *, schema: str) -> None:
        self._database = database
        self._sql = load(SegmentsSql, "segments", schema=schema)

    async def extend(self) -> Position:
        """Every position below the returned one has a segment, and enough of them are ahead of the log.

        Or not yet enough, when somebody holds a lock for more than a second. The next call goes on. Costs one catalog
        query when nothing is to do.
        """
        reach = await self.find_reach()
        made = True
        # A transaction for each: what was made stays made, and producers can use it at once.
        while made and not reach.is_enough:
            made = await self._make_next()
            reach = await self.find_reach()
        return Position(reach.upper or 0)

    async def find_reach(self) -> Reach:
        """How far the segments reach, and the log has come."""
        row = await self._database.fetchrow(self._sql.find_reach)
        assert row is not None  # noqa: S101 - a sequence has one row
        return Reach(row["head"], row["lower"], row["upper"])

    async def _make_next(self) -> bool:
        """Have one segment made; False when nothing was: somebody is in the way, or was quicker."""
        try:
            # Read committed, whatever the role's default is: what is read under the lock must be newer than the lock.
            async with self._database.acquire() as connection, connection.transaction(isolation="read_committed"):
                row = await connection.fetchrow(self._sql.make_segment)
        except DatabaseError as error:
            if error.sqlstate not in _TRY_LATER:
                raise
            emit("segment not made yet", level=logging.WARNING, error=str(error))
            return False
        if row is None or row["lower_bound"] is None:
            return False
        emit("segment made", lower=row["lower_bound"], upper=row["upper_bound"])
        return True


class SegmentMap:
    """The segments that a reader found the last time it looked them up."""

    def __init__(self) -> None:
        self._segments: list[Range] = []

    def update(self, segments: Sequence[Range]) -> None:
        """These are the segments, in order."""
        self._segments = list(segments)

    def clear(self) -> None:
        """No segment is known any more."""
        self._segments = []

    def has_both(self, lower: int, upper: int) -> bool:
        """Whether both positions belong to one segment that is known."""
        index = bisect_right(self._segments, (lower + 1,)) - 1
        return index >= 0 and upper < self._segments[index][1]
