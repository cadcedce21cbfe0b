"""Segments: the log's partitions, made well ahead of the last position that was given out.

There is no default partition, so an append beyond the last segment fails. Every worker looks now and then, and the
first one that finds too few segments ahead has more made. The promise: making segments never makes a producer wait,
whatever is open. It takes ShareUpdateExclusive on the parent, which conflicts with no INSERT and no SELECT.

A function of the log makes a segment, with the rights of the log's owner, because most logs are run by roles that own
nothing. The function decides which segment comes next and how many are enough; this module decides when to call it.
"""

import logging
from dataclasses import dataclass

from pgbackend.errors import DatabaseError
from pgbackend.facts import emit
from pgbackend.model import Position
from pgbackend.postgres.pool import Database
from pgbackend.postgres.sql import load
from pgbackend.postgres.sql.statements import SegmentsSql

AHEAD_POSITIONS = 100_000_000
"""Positions that have a segment before they are given out: 11 hours at 2,500 events a second."""
AHEAD_SEGMENTS = 100
"""The most segments that are kept ahead, which counts where they are narrow. The function has both bounds too."""

# Another session holds a lock: an operator's DDL, a vacuum, another worker that makes a segment.
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
        """Whether enough segments are ahead.

        >>> Reach(head=250, lower=0, upper=500).is_enough
        False
        >>> Reach(head=450, lower=50_000, upper=50_500).is_enough
        True
        """
        if self.lower is None or self.upper is None:
            return False
        return self.upper - self.head >= min(AHEAD_POSITIONS, AHEAD_SEGMENTS * (self.upper - self.lower))


class Segments:
    """Has the segments of one log made."""

    def __init__(self, database: Database, *, schema: str) -> None:
        self._database = database
        self._sql = load(SegmentsSql, "segments", schema=schema)

    async def extend(self) -> Position:
        """Enough segments are ahead of the log. Returns the position where the newest one ends.

        Fewer are ahead while another session holds a lock for more than a second: the next call goes on. Costs one
        query of the catalog when nothing is to do. Raises DatabaseError.
        """
        reach = await self.find_reach()
        made = True
        # A transaction for each segment, so that producers can use it at once.
        while made and not reach.is_enough:
            made = await self._make_next()
            reach = await self.find_reach()
        return Position(reach.upper or 0)

    async def find_reach(self) -> Reach:
        """How far the segments reach, and how far the log has come."""
        row = await self._database.fetchrow(self._sql.find_reach)
        assert row is not None  # noqa: S101 - a sequence has one row
        return Reach(row["head"], row["lower"], row["upper"])

    async def _make_next(self) -> bool:
        """Have one segment made. False when none was: another session holds a lock, or was quicker."""
        try:
            # Read committed, whatever the role's default: what the function reads must be newer than its lock.
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
