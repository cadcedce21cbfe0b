"""The server's incarnation: which life of the server this process works in, and whether the log was set back in it.

What a process remembers of the log is valid for one incarnation (see "Failover" and "Restores" in
pgbackend/log/fence.py). Its promise: before positions that were given out twice can be taken for events that this
process has read, one of the methods raises `IncarnationChanged`. Everything in memory is void then, and the worker
begins anew from its durable rows.
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

    Begin anew from durable rows.
    """


class Incarnation:
    """The incarnation that this process works in, and what the process has seen of the log in it."""

    def __init__(self, database: Database, sql: LogSql) -> None:
        self._database = database
        self._sql = sql
        self._id: str | None = None
        self._highest_seen = 0
        self._landmarks: dict[int, str] = {}
        """Events that were seen, by position, with the time of their recording in microseconds since 1970.

        A log that was restored or emptied shows other events there. They are the newest event of the last call of
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

    async def enter(self) -> str:
        """This process works in the server's present incarnation; returns its identity, which is new if it had none."""
        while True:
            found = await self._database.fetchval(self._sql.find_incarnation)
            if isinstance(found, str):
                if found != self._id:
                    self._id, self._highest_seen, self._landmarks = found, 0, {}
                return found
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
        signs = await self._database.fetchrow(self._sql.find_signs, list(landmarks), list(landmarks.values()))
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
            await self._database.execute(self._sql.end_life, self._id)
        except DatabaseError as error:
            # This process begins anew in any case.
            reason += f" (and the other processes could not be told: {error})"
        raise IncarnationChanged(f"The log was set back: {reason}.")


def _differs_by_sequence_at_most(found: str | None, mine: str) -> bool:
    """Whether `found` is the incarnation `mine`, but for the file of the sequence, its last part: see view `life`."""
    return found is not None and found.rpartition("/")[0] == mine.rpartition("/")[0]
