"""The log as one process knows it: its connections and statements, the server's incarnation, and the fence's evidence.

All readers, workers and appenders of a process share one `Log`. Its promise: evidence that `check()` returns belongs to
the incarnation that this process entered, and never goes back behind evidence that it returned before.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from pgbackend.log.fence import AppenderClock, Evidence
from pgbackend.log.incarnation import Incarnation
from pgbackend.log.pages import Pages
from pgbackend.log.ranges import Range, RangeSet
from pgbackend.model import BlockingAppender
from pgbackend.postgres.connections import Connection
from pgbackend.postgres.pool import STATEMENT_TIMEOUT, Database
from pgbackend.postgres.sql import load
from pgbackend.postgres.sql.statements import FenceSql, LogSql


@dataclass(frozen=True, slots=True)
class Extent:
    """Which positions the log has."""

    segments: Sequence[Range]
    """Those of each segment that was not removed, in order."""
    unused: Sequence[Range]
    """Those at the ends of segments that were cut, in order: no event ever had one."""


class Log:
    """Everything that the actors of a process share about one log."""

    def __init__(self, database: Database, *, schema: str, hole_wait: float) -> None:
        self.database = database
        self.sql = load(LogSql, "log", schema=schema)
        self.incarnation = Incarnation(database, self.sql)
        self.pages = Pages(database, self.sql, self.incarnation)
        self.clock = AppenderClock(hole_wait=hole_wait)
        self._fence_sql = load(FenceSql, "fence", schema=schema)
        self._one_check = asyncio.Lock()
        self._server: tuple[str | None, datetime | None] | None = None
        """Incarnation and start of the server that the names in `clock` come from."""

    async def check(self) -> Evidence:
        """Take the evidence that the fence needs. Raises IncarnationChanged.

        One check at a time: the clock must not go back to older evidence.
        """
        async with self._one_check:
            since, seen = self.incarnation.id, self.incarnation.highest_seen
            evidence = await self.read_evidence()
            await self.incarnation.verify_evidence(evidence.upto, found=evidence.incarnation, since=since, seen=seen)
            server = (evidence.incarnation, evidence.server_start)
            if server != self._server:
                # The server has begun to name transactions again: an old name says nothing about this one.
                self.clock = AppenderClock(hole_wait=self.clock.hole_wait)
                self._server = server
            self.clock.observe(evidence.appenders, now=time.monotonic())
            return evidence

    async def read_evidence(
        self, connection: Connection | None = None, *, timeout: float = STATEMENT_TIMEOUT
    ) -> Evidence:
        """The evidence as the server gives it, not held against anything that this process knows."""
        row = await (connection or self.database).fetchrow(self._fence_sql.take_evidence, timeout=timeout)
        assert row is not None  # noqa: S101 - a function of scalars
        return Evidence(row["upto"], frozenset(row["appenders"]), row["incarnation"], row["server_start"])

    async def appenders(self) -> tuple[BlockingAppender, ...]:
        """The open appenders, oldest first, as people want to know them."""
        return tuple(
            BlockingAppender(
                **{name: row[name] for name in ("virtual_transaction", "pid", "gid", "application", "age")}
            )
            for row in await self.database.fetch(self._fence_sql.describe_appenders)
        )

    async def oldest_appender_start(self) -> datetime | None:
        """When the oldest open appender's transaction began; None when that cannot be seen of each of them."""
        starts = [row["began_at"] for row in await self.database.fetch(self._fence_sql.describe_appenders)]
        return None if None in starts else min(starts, default=None)

    async def find_segments(self) -> Extent:
        """Where events are or will be, and where none ever was."""
        rows = await self.database.fetch(self.sql.find_segments)
        return Extent(
            segments=[(row["lower"], row["upper"]) for row in rows if row["is_attached"]],
            unused=[(row["lower"], row["upper"]) for row in rows if not row["is_attached"]],
        )

    async def find_kept(self, ranges: RangeSet) -> list[int]:
        """The positions in these ranges whose events were removed, and of which copies are kept."""
        return [row["position"] for row in await self.database.fetch(self.sql.find_kept, str(ranges))]

    async def find_first_segment(self) -> int:
        """Where the log's first segment begins."""
        segments = (await self.find_segments()).segments
        return segments[0][0] if segments else 0
