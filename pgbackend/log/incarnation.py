"""The server's incarnation: one uninterrupted life of the server, and of the log on it.

What a process remembers of the log (pages, evidence, leases) is valid for one incarnation. Each page read, claim and
offset commit depends on it. The promise: a position that was given out a second time is never taken for the event that
this process has read there. `IncarnationChanged` is raised instead, and the worker starts again from its durable rows.

**Failover.** Locks and names of transactions belong to one server: evidence of one says nothing about another, nor
about the same server after a crash. A promoted standby has what the WAL says up to some point:

- The sequence is at or above every event and offset that is there, because it writes up to 32 values ahead. Positions
  that it skips at the switch have no appender: the first evidence proves them dead.
- An offset is there only with everything that it was committed on. A hole that had been proven dead is dead here as
  well: its appender has no commit record and will not get one.
- An appender that was open has ended. A prepared one is there, with its locks, before the first connection is let in.
- After an asynchronous failover the point may be some way back, and the sequence with it. Positions that processes have
  seen are given out once more, to other events.

So no memory crosses a switch. An unlogged table names the incarnation. Crash recovery and promotion empty it, and the
first process to notice has PostgreSQL make up a new name.

**Restores.** Positions are also given out again when the log is set back while the server lives on. A dump carries the
unlogged row, so the identity (view `life`) has three more parts: the oid of the table, which a restored table does not
share; the xmin of the row, which a restored row does not share; and the file of the sequence, which a copy of the
database has elsewhere, and which TRUNCATE … RESTART IDENTITY and each ALTER SEQUENCE replace. `setval()` leaves no such
trace. So a process ends the incarnation for all others when the sequence stands below a position that it has seen, or
when an event that it knew has become another one. Offsets may then stand above new events, so the incarnation is marked
as set back, and no worker starts in it until an operator has said how to go on.
"""

from datetime import UTC, datetime, timedelta
from typing import NoReturn

from pgbackend.errors import DatabaseError, PgBackendError
from pgbackend.postgres.pool import Database
from pgbackend.postgres.sql.statements import LogSql

_LANDMARKS = 16
"""Events that are remembered between two calls of `verify_not_set_back`."""
_EPOCH = datetime.fromtimestamp(0, UTC)
_CHANGED = "The server was restarted after a crash or failed over, or the log was restored or its sequence altered."


class IncarnationChanged(PgBackendError):  # noqa: N818 - a signal between the actors, never seen outside
    """The server crashed or failed over, or the log was set back: positions may have been given out again.

    Start again from durable rows.
    """


class Incarnation:
    """The incarnation that this process works in, and what the process has seen of the log in it."""

    def __init__(self, database: Database, sql: LogSql) -> None:
        self._database = database
        self._sql = sql
        self._id: str | None = None
        self._highest_seen = 0
        self._landmarks: dict[int, str] = {}
        """Some events that were seen: position, and microseconds since 1970 when the event was recorded.

        After the log was set back, other events stand there. They are the newest event at the last call of
        `verify_not_set_back`, and the last events of pages since then.
        """

    @property
    def id(self) -> str | None:
        """Its identity; None before `enter()`."""
        return self._id

    @property
    def highest_seen(self) -> int:
        """The highest position that this process knows to have been given out."""
        return self._highest_seen

    async def enter(self) -> None:
        """Work in the server's present incarnation, which is named now if it has no name yet. Raises DatabaseError."""
        while True:
            found = await self._database.fetchval(self._sql.find_incarnation)
            if isinstance(found, str):
                if found != self._id:
                    self._id, self._highest_seen, self._landmarks = found, 0, {}
                return
            await self._database.execute(self._sql.begin_incarnation)

    async def verify(self, since: str | None = None) -> None:
        """The server's incarnation is still this one, or the one of `since`. Raises IncarnationChanged."""
        found = await self._database.fetchval(self._sql.find_incarnation)
        if found != (since or self._id):
            await self.verify_not_set_back()
            raise IncarnationChanged(_CHANGED)

    async def verify_evidence(self, upto: int, *, found: str | None, since: str | None, seen: int) -> None:
        """Evidence that was taken in the incarnation `found` belongs to this one. Raises IncarnationChanged.

        `since` and `seen` are `id` and `highest_seen` of before the evidence was taken.
        """
        if since is None:
            return
        if found != since:
            await self.verify_not_set_back()
            raise IncarnationChanged(_CHANGED)
        if since == self._id:
            if upto < seen:
                await self._end(f"its sequence stands at {upto}, below position {seen}, which was read")
            self._highest_seen = max(self._highest_seen, upto)

    async def verify_not_set_back(self) -> None:
        """The log is still the one that this process knows. Raises IncarnationChanged.

        When the log was set back within this incarnation, that ends it, so that every other process notices.
        """
        mine, seen, landmarks = self._id, self._highest_seen, dict(self._landmarks)
        signs = await self._database.fetchrow(self._sql.compare_landmarks, list(landmarks), list(landmarks.values()))
        assert signs is not None  # noqa: S101 - a SELECT of scalars
        if mine is None or mine != self._id:
            return
        found = signs["incarnation"]
        if _differs_by_sequence_at_most(found, mine):
            # No head: the sequence is being altered right now. The next call sees it.
            if signs["head"] is not None and signs["head"] < seen:
                await self._end(f"its sequence stands at {signs['head']}, below position {seen}, which was read")
            # A missing event may simply have been deleted, unless the sequence was restarted as well.
            if signs["replaced"] or (signs["missing"] and found != mine):
                await self._end("positions that were read no longer hold the events that were there")
        if found != mine:
            raise IncarnationChanged(_CHANGED)
        for position in landmarks:
            self._landmarks.pop(position, None)
        if signs["position"] is not None:
            self._landmarks[signs["position"]] = signs["recorded_at"]
            self._highest_seen = max(self._highest_seen, signs["position"])

    def see_event(self, position: int, recorded_at: datetime | None, *, since: str | None) -> None:
        """Remember an event that was read in the incarnation `since`, as a landmark while there are few."""
        if since != self._id:
            return
        self._highest_seen = max(self._highest_seen, position)
        # The driver shows infinite dates as the first and the last datetime.
        if recorded_at is not None and 1 < recorded_at.year < 9999 and len(self._landmarks) < _LANDMARKS:
            self._landmarks[position] = str((recorded_at - _EPOCH) // timedelta(microseconds=1))

    async def _end(self, reason: str) -> NoReturn:
        """End this incarnation for every process of the log, because the log was set back in it."""
        try:
            await self._database.execute(self._sql.end_incarnation, self._id)
        except DatabaseError as error:
            # This process starts again in any case.
            reason += f" (and ending the incarnation for other processes failed: {error})"
        raise IncarnationChanged(f"The log was set back: {reason}.")


def _differs_by_sequence_at_most(found: str | None, mine: str) -> bool:
    """Whether `found` is the incarnation `mine`, but for the file of the sequence, its last part: see view `life`."""
    return found is not None and found.rpartition("/")[0] == mine.rpartition("/")[0]
