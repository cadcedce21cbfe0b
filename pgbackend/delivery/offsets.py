"""Offset commits: gathered over all shards of the process, fenced by epoch, one statement at a time (I5, I6, I9).

The first settled event after a quiet time is committed at once, then commits follow at most every `commit_interval`;
the interval stretches so that committing takes less than a tenth of the time. What a commit does not find under its
epoch, owner and incarnation is a lost lease: the row then belongs to somebody else, and nothing was changed.
"""

import asyncio
import json
import logging
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, replace
from uuid import UUID

from pgbackend import facts
from pgbackend.delivery.outcomes import (
    Buried,
    Finished,
    LetterDelivered,
    LetterFailed,
    Scheduled,
    Skipped,
    without_texts,
)
from pgbackend.delivery.shard import Mark, Shard
from pgbackend.errors import ConnectionLostError, DatabaseError, SchemaError
from pgbackend.log.log import Log
from pgbackend.log.ranges import RangeSet
from pgbackend.postgres.pool import GrowingDelay, Record, asks_for_other_values
from pgbackend.postgres.sql import load
from pgbackend.postgres.sql.statements import OffsetsSql

_TOLD_RANGES = 20
"""How many skipped ranges a line of the log names at most."""
_SHARE = 0.1
"""Committing takes at most this share of the time."""


class Committer:
    """Commits what its shards have settled."""

    def __init__(self, log: Log, *, schema: str, worker: UUID, commit_interval: float) -> None:
        self._log = log
        self._sql = load(OffsetsSql, "offsets", schema=schema)
        self._worker = worker
        self._interval = commit_interval
        self._dirty: dict[Shard, None] = {}
        self._due = asyncio.Event()
        self._one_commit = asyncio.Lock()
        self._under_way: dict[Shard, Mark] = {}
        """What is being committed, as long as the server has not said that it is."""
        self.on_committed: Callable[[Shard, Mark], None] = lambda *_: None
        """Called for each shard after its mark was committed."""
        self.on_lost: Callable[[Shard], None] = lambda _: None
        """Called for each shard whose lease turned out to be lost."""

    def note(self, shard: Shard) -> None:
        """There may be something to commit for this shard."""
        shard.noted = True
        self._dirty[shard] = None
        self._due.set()

    async def run(self) -> None:
        backoff = GrowingDelay(self._log.database)
        before = 0.0
        while True:
            await self._due.wait()
            began = time.monotonic()
            try:
                await self.run_once()
            except SchemaError:
                raise
            except DatabaseError as error:
                facts.emit("commit failed", level=backoff.failed(), failures=backoff.failures, error=str(error))
                await backoff.wait()
                continue
            backoff.reset()
            took = time.monotonic() - began
            # One slow commit is a cold connection or a checkpoint, two in a row are a slow server.
            await asyncio.sleep(max(self._interval, min(took, before) * (1 / _SHARE - 1)))
            before = took

    async def run_once(self) -> None:
        """Commit all there is.

        Raises DatabaseError when PostgreSQL does not answer; everything is kept for next time.
        """
        async with self._one_commit:
            shards, self._dirty = self._dirty, {}
            self._due.clear()
            marks = {shard: mark for shard in shards if not shard.lost and (mark := shard.collect()) is not None}
            self._under_way = dict(marks)
            try:
                await self._commit(marks)
            except BaseException:
                # Also when cut off in the middle: what was committed unheard is committed again, to the same effect.
                for shard, mark in self._under_way.items():
                    shard.give_back(mark)
                    self.note(shard)
                raise

    async def _commit(self, marks: dict[Shard, Mark]) -> None:
        plain = {
            shard: mark for shard, mark in marks.items() if not (mark.outcomes or mark.calm) and shard.committed[0] >= 0
        }
        by_key = {shard: mark for shard, mark in marks.items() if shard not in plain}
        if plain:
            by_key.update(await self._commit_plain(plain))
        if not by_key:
            return
        try:
            lost = await self._commit_by_key(by_key)
        except (ConnectionLostError, SchemaError):
            raise
        except DatabaseError as error:
            if len(by_key) == 1 and not asks_for_other_values(error):
                raise
            # What one shard wants committed was refused: the others do not wait for it (I7).
            await self._commit_apart(by_key)
            return
        await self._lose(lost)

    async def _commit_apart(self, marks: dict[Shard, Mark]) -> None:
        """Commit each shard by itself. Raises the first refusal, after all have had their turn."""
        refused: DatabaseError | None = None
        for shard, mark in marks.items():
            try:
                await self._lose(await self._commit_alone(shard, mark))
            except (ConnectionLostError, SchemaError):
                raise
            except DatabaseError as error:
                facts.emit("commit refused", level=logging.ERROR, shard=shard.name, error=str(error))
                refused = refused or error
        if refused is not None:
            raise refused

    async def _commit_alone(self, shard: Shard, mark: Mark) -> Collection[Shard]:
        """Commit one shard; the shard, if its lease is lost.

        If its texts are refused, it is committed without them: an event of which nobody can say why it failed harms
        less than an offset that stands still.
        """
        try:
            return await self._commit_by_key({shard: mark})
        except DatabaseError as error:
            if not mark.outcomes or not asks_for_other_values(error):
                raise
            facts.emit("texts refused", level=logging.ERROR, shard=shard.name, error=str(error))
            text = f"(its error cannot be stored, SQLSTATE {error.sqlstate}; the process that handled it has logged it)"
        bare = {key: without_texts(outcome, text) for key, outcome in mark.outcomes.items()}
        return await self._commit_by_key({shard: replace(mark, outcomes=bare)})

    async def _lose(self, lost: Collection[Shard]) -> None:
        """These shards are somebody else's now, unless it is the server that lives another life."""
        if lost:
            await self._log.incarnation.verify()
        for shard in lost:
            shard.lost = True
            self.on_lost(shard)

    async def _commit_plain(self, marks: dict[Shard, Mark]) -> dict[Shard, Mark]:
        """Commit marks without outcomes; those whose row was not where it was."""
        rows = await self._log.database.fetch(
            self._sql.commit_offsets,
            [shard.lease.epoch for shard in marks],
            [shard.place for shard in marks],
            [mark.position for mark in marks.values()],
            [mark.pending for mark in marks.values()],
            [mark.complete for mark in marks.values()],
            self._worker,
            self._log.incarnation.id,
            [mark.holes for mark in marks.values()],
        )
        return self._confirm(marks, rows)

    async def _commit_by_key(self, marks: dict[Shard, Mark]) -> dict[Shard, Mark]:
        """Commit marks with all their outcomes; those whose lease is lost."""
        outcomes = [(shard.lease.epoch, outcome) for shard, mark in marks.items() for outcome in mark.outcomes.values()]
        ordered = {shard.lease.epoch for shard in marks if shard.lease.order != "none"}
        rows = await self._log.database.fetch(
            self._sql.commit_by_key,
            json.dumps(
                [
                    {
                        "subscription": shard.lease.subscription,
                        "shards": shard.lease.shards,
                        "shard": shard.lease.shard,
                        "epoch": shard.lease.epoch,
                        "position": mark.position,
                        "pending": mark.pending,
                        "holes": mark.holes,
                        "complete": mark.complete,
                        "calm": mark.calm,
                    }
                    for shard, mark in marks.items()
                ]
            ),
            self._worker,
            self._log.incarnation.id,
            json.dumps(
                [
                    {
                        "epoch": epoch,
                        "position": outcome.position,
                        "attempt": outcome.attempt,
                        "delay": outcome.delay,
                        "error": outcome.error,
                        "failure": asdict(outcome.failure) if outcome.failure else None,
                        "begun": outcome.started,
                        "stays": epoch in ordered,
                    }
                    for epoch, outcome in outcomes
                    if isinstance(outcome, Scheduled)
                ]
            ),
            json.dumps(
                [
                    {"epoch": epoch, "position": outcome.position}
                    for epoch, outcome in outcomes
                    if isinstance(outcome, Finished | Buried)
                ]
            ),
            json.dumps(
                [
                    {
                        "epoch": epoch,
                        "position": outcome.position,
                        "attempts": outcome.failure.attempts,
                        "error": outcome.failure.error,
                        "details": dict(outcome.failure.details),
                    }
                    for epoch, outcome in outcomes
                    if isinstance(outcome, Buried)
                ]
            ),
            json.dumps(
                [
                    {"epoch": epoch, "letter": outcome.letter}
                    for epoch, outcome in outcomes
                    if isinstance(outcome, LetterDelivered)
                ]
            ),
            json.dumps(
                [
                    {
                        "epoch": epoch,
                        "letter": outcome.letter,
                        "attempt": outcome.attempt,
                        "delay": outcome.delay,
                        "error": outcome.error,
                        "details": dict(outcome.details),
                        "begun": outcome.started,
                    }
                    for epoch, outcome in outcomes
                    if isinstance(outcome, LetterFailed)
                ]
            ),
            json.dumps(
                [
                    {"epoch": epoch, "lower": outcome.lower, "upper": outcome.upper}
                    for epoch, outcome in outcomes
                    if isinstance(outcome, Skipped)
                ]
            ),
        )
        names = {shard.lease.epoch: shard.lease.subscription for shard in marks}
        # A subscription with several shards here says the same of each.
        skipped = {names[row["epoch"]]: RangeSet.parse(row["skipped"]) for row in rows if row["skipped"]}
        for name, ranges in skipped.items():
            _tell_skipped(name, ranges)
        lost = {row["epoch"]: row["lost"] for row in rows}
        return self._confirm(
            {shard: mark.without(lost.get(shard.lease.epoch, ())) for shard, mark in marks.items()}, rows
        )

    def _confirm(self, marks: dict[Shard, Mark], rows: Iterable[Record]) -> dict[Shard, Mark]:
        """Take the server's word for what was committed; the marks that it does not mention."""
        places = {row[0]: row[1] for row in rows}
        missing: dict[Shard, Mark] = {}
        for shard, mark in marks.items():
            place = places.get(shard.lease.epoch)
            if place is None:
                missing[shard] = mark
            else:
                shard.confirm(mark, place)
                del self._under_way[shard]
                self.on_committed(shard, mark)
        if places:
            facts.emit("offsets committed", level=logging.DEBUG, shards=len(places))
        return missing


def _tell_skipped(subscription: str, ranges: RangeSet) -> None:
    told = RangeSet(list(ranges)[:_TOLD_RANGES])
    facts.emit(
        "events skipped",
        level=logging.WARNING,
        subscription=subscription,
        positions=ranges.count(),
        ranges=f"{told}{' and more' if len(ranges) > len(told) else ''}",
        reason="Their rows are gone from the log: a segment was removed, or rows were deleted.",
    )
