"""Offset commits: all shards of the process in one statement, each fenced by its epoch (I5, I6, I9).

`Committer` decides when. A row that a commit does not find under its epoch, owner and incarnation is a lost lease: the
shard belongs to another worker now, and nothing of it was changed.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import monotonic
from uuid import UUID

from pgbackend import facts
from pgbackend.delivery.commit_inputs import commit_inputs
from pgbackend.delivery.outcomes import has_history, without_texts
from pgbackend.delivery.shard import Mark, Shard
from pgbackend.errors import ConnectionLostError, DatabaseError, SchemaError
from pgbackend.log.log import Log
from pgbackend.log.ranges import RangeSet
from pgbackend.postgres.connections import Connection, Record
from pgbackend.postgres.errors import is_refused_for_data_or_size
from pgbackend.postgres.pool import Database
from pgbackend.postgres.sql import load
from pgbackend.postgres.sql.statements import OffsetsSql

_SHOWN_RANGES = 20
"""How many skipped ranges a log line names at most."""
_CLOCK_EXPIRES = 60.0
"""Seconds in which the server's clock and this process's run alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """The result of one pass for the shards that it was given."""

    marks: Mapping[Shard, Mark]
    """Durable now."""
    lost: Sequence[Shard]
    """Another worker has these."""
    kept: Sequence[Shard]
    """Not committed, or nobody knows: the shards have their marks back for the next pass."""
    error: DatabaseError | None
    """Why marks were kept."""


class _Pass:
    """One commit under way. `open`: the marks that the server has not answered for yet."""

    def __init__(self, marks: dict[Shard, Mark]) -> None:
        self.open = marks
        self.done: dict[Shard, Mark] = {}
        self.lost: list[Shard] = []

    def confirm(self, marks: Mapping[Shard, Mark], rows: Iterable[Record]) -> list[Shard]:
        """Note the marks whose rows the server returned; the shards whose rows it did not."""
        places = {row["epoch"]: row["ctid"] for row in rows}
        missing: list[Shard] = []
        for shard, mark in marks.items():
            place = places.get(shard.lease.epoch)
            if place is None:
                missing.append(shard)
            else:
                shard.confirm(mark, place)
                self.done[shard] = mark
                del self.open[shard]
        if places:
            facts.emit("offsets committed", level=logging.DEBUG, shards=len(places))
        return missing

    def lose(self, shards: Iterable[Shard]) -> None:
        for shard in shards:
            shard.lose()
            self.lost.append(shard)
            del self.open[shard]


class Offsets:
    """Writes `offsets`, and with them what became of failed events."""

    def __init__(self, log: Log, *, schema: str, worker: UUID) -> None:
        self._log = log
        self._sql = load(OffsetsSql, "offsets", schema=schema)
        self._worker = worker
        self._clock = 0.0
        """The last result of `_read_clock()`."""
        self._clock_expires = 0.0
        """When it is read again, in monotonic seconds."""

    @property
    def database(self) -> Database:
        return self._log.database

    async def commit(self, shards: Iterable[Shard]) -> Committed:
        """Commit everything that these shards have to commit. One call at a time.

        Raises IncarnationChanged when the server lives another life, and SchemaError. Marks that were not committed,
        whatever the reason, are back in their shards.
        """
        marks = {shard: mark for shard in shards if not shard.lost and (mark := shard.take_mark()) is not None}
        run, error = _Pass(marks), None
        try:
            await self._commit(run)
        except SchemaError:
            raise
        except DatabaseError as caught:
            error = caught
        finally:
            # If the answer was lost, the mark may be durable: committing it again has the same effect.
            for shard, mark in run.open.items():
                shard.restore(mark)
        return Committed(marks=run.done, lost=run.lost, kept=list(run.open), error=error)

    async def bound_transactions(self, connection: Connection, *, statement: str, idle: str, only_this: bool) -> None:
        """The transactions of this connection are bounded in time, and their appends are checked.

        `only_this`: just the one that is open.
        """
        await connection.execute(self._sql.bound_transactions, statement, idle, only_this)

    async def write_in(self, connection: Connection, shard: Shard, mark: Mark) -> Mark | None:
        """Write a mark in the transaction of this connection. Returns what is written; None if the lease is lost.

        The shard has the mark as committed from now on: if the transaction is not committed, restore it. Raises what
        the driver raises.
        """
        run = _Pass({shard: mark})
        if not mark.outcomes and shard.committed[0] >= 0:
            # 0.13 ms, and 0.32 by key: a transaction of a single event takes 1.0 ms in all.
            await self._commit_plain(run, dict(run.open), connection)
        if run.open:
            await self._commit_by_key(run, dict(run.open), connection)
        return run.done.get(shard)

    async def verify_lost(self) -> None:
        """Return when a lease was lost to another worker. Raises IncarnationChanged when the server lives anew."""
        await self._log.incarnation.verify()

    async def _commit(self, run: _Pass) -> None:
        plain = {
            shard: mark
            for shard, mark in run.open.items()
            if not (mark.outcomes or mark.forget_crashes) and shard.committed[0] >= 0
        }
        if plain:
            # A row that was not where it was may have a new version: the key finds it.
            await self._commit_plain(run, plain)
        if not run.open:
            return
        try:
            missing = await self._commit_by_key(run, dict(run.open))
        except (ConnectionLostError, SchemaError):
            raise
        except DatabaseError as error:
            if len(run.open) == 1 and not is_refused_for_data_or_size(error):
                raise
            # PostgreSQL refused what one shard wants to commit. The others do not wait for it (I7).
            await self._commit_apart(run)
        else:
            await self._lose(run, missing)

    async def _commit_plain(
        self, run: _Pass, marks: Mapping[Shard, Mark], connection: Connection | None = None
    ) -> None:
        """Commit marks without outcomes, each row by its ctid."""
        rows = await (connection or self._log.database).fetch(
            self._sql.commit_offsets,
            [shard.lease.epoch for shard in marks],
            [shard.place for shard in marks],
            [mark.position for mark in marks.values()],
            [mark.pending for mark in marks.values()],
            [mark.holes for mark in marks.values()],
            [mark.complete for mark in marks.values()],
            self._worker,
            self._log.incarnation.id,
        )
        run.confirm(marks, rows)

    async def _commit_by_key(
        self, run: _Pass, marks: Mapping[Shard, Mark], connection: Connection | None = None
    ) -> list[Shard]:
        """Commit marks with all their outcomes; the shards whose leases are lost."""
        way = connection or self._log.database
        # An outcome that has no steps, such as that an ordered event was handled, needs no clock.
        has_steps = any(has_history(outcome) for mark in marks.values() for outcome in mark.outcomes.values())
        clock = await self._read_clock(way) if has_steps else 0.0
        rows = await way.fetch(
            self._sql.commit_by_key, self._worker, self._log.incarnation.id, *commit_inputs(marks, clock=clock)
        )
        names = {shard.lease.epoch: shard.lease.subscription for shard in marks}
        # All rows of a subscription name the same ranges.
        skipped = {names[row["epoch"]]: RangeSet.parse(row["skipped"]) for row in rows if row["skipped"]}
        for name, ranges in skipped.items():
            _emit_skipped(name, ranges)
        gone = {row["epoch"]: row["lost"] for row in rows}
        return run.confirm(
            {shard: mark.without(gone.get(shard.lease.epoch, ())) for shard, mark in marks.items()}, rows
        )

    async def _read_clock(self, way: Database | Connection) -> float:
        """The server's time when the monotonic clock was 0, in seconds since 1970."""
        if monotonic() > self._clock_expires:
            asked = monotonic()
            (row,) = await way.fetch(self._sql.read_clock)
            answered = monotonic()
            self._clock = float(row["seconds"]) - (asked + answered) / 2
            self._clock_expires = answered + _CLOCK_EXPIRES
        return self._clock

    async def _commit_apart(self, run: _Pass) -> None:
        """Commit each shard by itself. Raises the first refusal, after all have had their turn."""
        refused: DatabaseError | None = None
        for shard, mark in list(run.open.items()):
            try:
                await self._lose(run, await self._commit_alone(run, shard, mark))
            except (ConnectionLostError, SchemaError):
                raise
            except DatabaseError as error:
                facts.emit("commit refused", level=logging.ERROR, shard=shard.name, error=str(error))
                refused = refused or error
        if refused is not None:
            raise refused

    async def _commit_alone(self, run: _Pass, shard: Shard, mark: Mark) -> list[Shard]:
        """Commit one shard; the shard, if its lease is lost.

        If PostgreSQL refuses the texts of its errors, it is committed without them: an event whose error is not kept
        does less harm than an offset that stands still.
        """
        try:
            return await self._commit_by_key(run, {shard: mark})
        except DatabaseError as error:
            if not mark.outcomes or not is_refused_for_data_or_size(error):
                raise
            facts.emit("texts refused", level=logging.ERROR, shard=shard.name, error=str(error))
            text = f"(its error cannot be stored, SQLSTATE {error.sqlstate}; the process that handled it has logged it)"
        bare = {key: without_texts(outcome, text) for key, outcome in mark.outcomes.items()}
        return await self._commit_by_key(run, {shard: replace(mark, outcomes=bare)})

    async def _lose(self, run: _Pass, shards: Sequence[Shard]) -> None:
        """Other workers have these shards, unless the server lives another life: then raise IncarnationChanged."""
        if shards:
            await self.verify_lost()
            run.lose(shards)


def _emit_skipped(subscription: str, ranges: RangeSet) -> None:
    shown = RangeSet(list(ranges)[:_SHOWN_RANGES])
    facts.emit(
        "events skipped",
        level=logging.WARNING,
        subscription=subscription,
        positions=ranges.count(),
        ranges=f"{shown}{' and more' if len(ranges) > len(shown) else ''}",
        reason="Their rows are gone from the log: a segment was removed, or rows were deleted or redacted.",
    )
