"""Retention: old segments go, once every subscription has settled them or a hard limit says so.

The policy is stored with the log, so that all workers agree. Each worker makes passes, and functions of the log do the
work with its owner's rights, one session at a time; they decide alone what is due, so that no caller can ask for more.
A pass takes these steps, each in a transaction of its own:

    cut      the segment that is being filled ends early, so that a slow log drops its old days, too
    empty    a segment that may go is emptied, which frees its disk space
    remove   emptied segments are detached and dropped, when nothing has the log open
    forget   old dead letters are deleted, and what is known of segments that every subscription is past

The promise: an event that a subscription still needs stays, unless a hard limit is passed. Then the loss is reported
for each subscription. No producer waits for any of this longer than for a slow commit.
"""

import asyncio
import json
import logging
import random
import time
from dataclasses import dataclass
from datetime import timedelta

from pgbackend.errors import DatabaseError
from pgbackend.facts import emit
from pgbackend.log.ranges import RangeSet
from pgbackend.log.segments import Segments
from pgbackend.model import Holder, Retention
from pgbackend.postgres.connections import Record, is_pooled
from pgbackend.postgres.errors import INSUFFICIENT_PRIVILEGE
from pgbackend.postgres.pool import STATEMENT_TIMEOUT, Database
from pgbackend.postgres.sql import load
from pgbackend.postgres.sql.statements import RetentionSql

_SHORTEST_INTERVAL = 0.05
_LONGEST_INTERVAL = 5.0
"""Seconds between two passes at most. A policy that another process has stored is obeyed after that."""
_PASSES = 20
"""Passes within the shortest time of the policy."""
_MOST_SEGMENTS = 100
"""Segments that one pass empties or removes at most, so that it ends."""
_SHORTEST_PATIENCE, _LONGEST_PATIENCE = 5, 50
"""Milliseconds that removing waits for other transactions. It grows from try to try."""
_REMOVE_EVERY = 0.2
"""Seconds between two tries to remove, for each millisecond of patience."""
_REPORT_EVERY = 3600.0
"""Seconds between two reports that the same subscription holds the log."""
# Another session holds a lock: an operator's DDL, a vacuum, another worker's pass. Or a segment was dropped meanwhile.
_TRY_LATER = frozenset({"55P03", "40P01", "42P01"})
_MICROSECOND = timedelta(microseconds=1)


@dataclass(slots=True)
class Pass:
    """The findings of one pass."""

    cut: bool = False
    emptied: int = 0
    removed: int = 0
    letters: int = 0


class Retainer:
    """Knows the policy of one log, and carries it out."""

    def __init__(self, database: Database, segments: Segments, *, schema: str) -> None:
        self._database = database
        self._segments = segments
        self._sql = load(RetentionSql, "retention", schema=schema)
        self._changed = asyncio.Event()
        self._patience = _SHORTEST_PATIENCE
        self._remove_at = self._forget_at = 0.0
        self._idle: dict[str, float] = {}
        """The subscriptions at rest that hold the log, with the monotonic second of their next report."""

    async def find(self) -> Retention:
        """The policy as it is stored now. Raises DatabaseError."""
        row = await self._database.fetchrow(self._sql.find_retention)
        if row is None:
            return Retention()
        return Retention(
            keep=_time(row["keep_us"]),
            max_age=_time(row["max_age_us"]),
            max_bytes=row["max_bytes"],
            dead_letters=_time(row["dead_letters_us"]),
        )

    async def store(self, retention: Retention) -> None:
        """The log has this policy. Other processes obey it within 5 s.

        Raises DatabaseError, which says so when this role may not change it.
        """
        before = await self.find()
        if before == retention:
            return
        try:
            await self._database.execute(
                self._sql.store_retention,
                _microseconds(retention.keep),
                _microseconds(retention.max_age),
                retention.max_bytes,
                _microseconds(retention.dead_letters),
            )
        except DatabaseError as error:
            if error.sqlstate != INSUFFICIENT_PRIVILEGE:
                raise
            raise DatabaseError(
                f"The log's retention is {before}, and this role may not change that to {retention}. Let a role do it "
                "that has what `pgbackend grants --operator` prints.",
                sqlstate=error.sqlstate,
            ) from error
        emit("retention changed", before=str(before), now=str(retention))
        self._changed.set()

    async def find_holders(self) -> tuple[Holder, ...]:
        """The subscriptions because of which the oldest segment is still there. Raises DatabaseError."""
        return tuple(
            Holder(subscription=row["subscription"], is_run=row["is_run"], is_paused=row["is_paused"])
            for row in await self._database.fetch(self._sql.find_holders)
        )

    async def run(self) -> None:
        """Make passes until cancelled."""
        failures, interval = 0, _LONGEST_INTERVAL
        while True:
            self._changed.clear()
            try:
                interval = _interval(await self.find())
                await self.run_once()
                failures = 0
            except DatabaseError as error:
                failures += 1
                level = logging.WARNING if failures == 1 else logging.DEBUG
                emit("retention failed", level=level, failures=failures, error=str(error))
            # Not in step with the workers that started at the same time.
            pause = interval * (0.5 + random.random())  # noqa: S311 - not a secret
            try:
                async with asyncio.timeout(pause):
                    await self._changed.wait()
            except TimeoutError:
                pass

    async def run_once(self) -> Pass:
        """Everything that the policy wants is done, as far as other sessions' locks allow. Raises DatabaseError."""
        done = Pass()
        retention = await self.find()
        if retention.drops_segments:
            done.cut = await self._cut()
        while done.emptied < _MOST_SEGMENTS and await self._empty():
            done.emptied += 1
        now = time.monotonic()
        if now >= self._remove_at:
            done.removed = await self._remove()
        if now >= self._forget_at:
            self._forget_at = now + max(1.0, _PASSES / 2 * _interval(retention))
            done.letters = await self._forget_letters()
            await self._database.execute(self._sql.forget_removed)
            await self._report_holders()
        return done

    async def _cut(self) -> bool:
        """Whether the segment that was being filled has been cut."""
        # The function cuts only when enough segments are ahead after it.
        await self._segments.extend()
        try:
            (row,) = await self._call(self._sql.cut_segment)
        except DatabaseError as error:
            _raise_unless_locked(error)
            return False
        if row["lower_bound"] is None:
            return False
        emit("segment cut", level=logging.DEBUG, lower=row["lower_bound"], last=row["last_position"])
        await self._segments.extend()
        return True

    async def _empty(self) -> bool:
        """Whether a segment has been emptied."""
        try:
            (row,) = await self._call(self._sql.empty_segment)
        except DatabaseError as error:
            _raise_unless_locked(error)
            return False
        if row["reason"] is None:
            return False
        first, last, reason = row["lower_bound"], row["last_position"], row["reason"]
        emit("segment dropped", first=first, last=last, reason=_REASONS[reason])
        for loss in json.loads(row["losses"] or "[]"):
            positions = RangeSet.parse(loss["positions"])
            emit(
                "events dropped before they were settled",
                level=logging.WARNING,
                subscription=loss["subscription"],
                events=positions.count(),
                positions=_shown(positions),
                reason=_REASONS[reason],
            )
        return True

    async def _remove(self) -> int:
        """The number of emptied segments that were detached and dropped."""
        removed = 0
        try:
            while removed < _MOST_SEGMENTS and (rows := await self._call(self._sql.remove_segments, self._patience)):
                removed += len(rows)
        except DatabaseError as error:
            _raise_unless_locked(error)
            self._remove_at = time.monotonic() + _REMOVE_EVERY * self._patience
            self._patience = min(self._patience * 2, _LONGEST_PATIENCE)
            emit("emptied segments not removed yet", level=logging.DEBUG, error=str(error))
        else:
            self._patience = _SHORTEST_PATIENCE
        if removed:
            emit("emptied segments removed", level=logging.DEBUG, segments=removed)
        return removed

    async def _call(self, statement: str, *args: object) -> list[Record]:
        """The rows of a function that must see what was committed before its locks: in READ COMMITTED."""
        async with self._database.acquire() as connection:
            if not is_pooled(connection):
                # In no transaction of its own: a process that hangs before its COMMIT would keep readers waiting.
                return await connection.fetch(statement, *args, timeout=STATEMENT_TIMEOUT)
            # Through a pooler, a statement by itself has the isolation that the role or the database sets.
            async with connection.transaction(isolation="read_committed"):
                await connection.execute(self._sql.bound_pauses, timeout=STATEMENT_TIMEOUT)
                return await connection.fetch(statement, *args, timeout=STATEMENT_TIMEOUT)

    async def _forget_letters(self) -> int:
        """The number of dead letters that were deleted."""
        deleted = 0
        while batch := await self._database.fetchval(self._sql.forget_letters):
            deleted += batch
        if deleted:
            emit("old dead letters deleted", letters=deleted)
        return deleted

    async def _report_holders(self) -> None:
        """Name the subscriptions that hold segments back and that no worker runs, or that are paused."""
        now = time.monotonic()
        idle = {one.subscription: one for one in await self.find_holders() if one.is_paused or not one.is_run}
        # From the second look on: between two workers, a subscription is run by none for a moment.
        self._idle = {name: self._idle.get(name, now) for name in idle}
        for name, due in self._idle.items():
            if due < now:
                self._idle[name] = now + _REPORT_EVERY
                fact, cure = _PAUSED if idle[name].is_paused else _NOT_RUN
                emit(
                    fact,
                    level=logging.WARNING,
                    subscription=name,
                    effect=f"Events older than `keep` stay, because it has not handled them. {cure}, delete it "
                    "(`pgbackend subscriptions delete`), or set `max_age`.",
                )


_NOT_RUN = "subscription that nobody runs holds the log", "Run it"
_PAUSED = "paused subscription holds the log", "Resume it (`pgbackend subscriptions resume`)"
"""A fact, and what ends it."""
_REASONS = {
    "settled": "every subscription has settled its events, and they are older than `keep`",
    "max_age": "its events are older than `max_age`",
    "max_bytes": "the log is larger than `max_bytes`",
    "empty": "somebody else emptied it",
}


def _interval(retention: Retention) -> float:
    """Seconds between two passes."""
    times = [time for time in (retention.keep, retention.max_age, retention.dead_letters) if time is not None]
    shortest = min(times, default=timedelta.max).total_seconds()
    return min(max(shortest / _PASSES, _SHORTEST_INTERVAL), _LONGEST_INTERVAL)


def _raise_unless_locked(error: DatabaseError) -> None:
    if error.sqlstate not in _TRY_LATER:
        raise error


def _shown(ranges: RangeSet) -> str:
    """As text, of many ranges the first ones."""
    parts = list(ranges)
    return str(ranges) if len(parts) <= 20 else f"{RangeSet(parts[:20])} and {len(parts) - 20} more"


def _time(microseconds: int | None) -> timedelta | None:
    return None if microseconds is None else timedelta(microseconds=microseconds)


def _microseconds(time: timedelta | None) -> int | None:
    return None if time is None else time // _MICROSECOND
