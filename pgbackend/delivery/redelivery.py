"""Failed events that are due again, and dead letters: read here, changed with the offsets (offsets.py)."""

import json
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass

from pgbackend.codec.event import Event
from pgbackend.delivery.shard import DueRequest, Waiting
from pgbackend.model import DeadLetter, Failure
from pgbackend.postgres.connections import Record
from pgbackend.postgres.pool import Database
from pgbackend.postgres.sql import load
from pgbackend.postgres.sql.statements import RedeliverySql
from pgbackend.subscriptions.leases import Lease

_POSITION, _RECORDED_AT = 12, 13
_LETTERS_BYTES = 16 << 20
"""Of dead letters in one page. Its last one may be beyond it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DueEvent:
    """An event to be dispatched again, with the attempt that it is about to make."""

    event: Event
    epoch: int
    letter: int | None
    """The dead letter that it comes from, if it does."""
    begun: bool
    """Whether its last attempt killed the process that made it."""


class Redelivery:
    """Reads `redeliveries` and `dead_letters`."""

    def __init__(self, database: Database, *, schema: str) -> None:
        self._database = database
        self._sql = load(RedeliverySql, "redelivery", schema=schema)

    async def find_due(self, requests: Sequence[DueRequest]) -> tuple[list[DueEvent], dict[int, list[int]]]:
        """For each shard, up to the room it has, its events and dead letters whose time has come.

        And by epoch the failed events whose rows are gone from the log: all of them, since the first that is met.
        """
        found: list[DueEvent] = []
        gone: dict[int, list[int]] = {}
        if from_log := [request for request in requests if request.events]:
            rows = await self._database.fetch(
                self._sql.find_due,
                *_asked(from_log),
                *_at_work((one.lease.epoch, one.positions) for one in from_log),
                [one.given_up for one in from_log],
            )
            found += [
                DueEvent(
                    event=_event(row, attempt=row["attempt"] + 1, failure=_failure(row["failure"])),
                    epoch=row["epoch"],
                    letter=None,
                    begun=row["begun"],
                )
                for row in rows
                if row["position"] is not None
            ]
            hit = {row["epoch"] for row in rows if row["position"] is None}
            for request in from_log:
                lease = request.lease
                if lease.epoch in hit:
                    rows = await self._database.fetch(
                        self._sql.find_gone, lease.subscription, lease.shard, lease.shards, request.positions
                    )
                    gone[lease.epoch] = [row["position"] for row in rows]
        if for_target := [request for request in requests if not request.given_up]:
            rows = await self._database.fetch(
                self._sql.find_due_letters,
                *_asked(for_target),
                *_at_work((one.lease.epoch, one.letters) for one in for_target),
            )
            found += [
                DueEvent(
                    event=_event(row, attempt=row["attempt"] + 1),
                    epoch=row["epoch"],
                    letter=row["letter_id"],
                    begun=row["begun"],
                )
                for row in rows
            ]
        return found, gone

    async def find_attempts(self, lease: Lease) -> dict[int, Waiting]:
        """By position: what a former owner noted of this shard's failed events."""
        rows = await self._database.fetch(self._sql.find_attempts, lease.subscription, lease.shard, lease.shards)
        now = time.monotonic()
        return {
            row["position"]: Waiting(
                attempt=row["attempt"], due_at=now + row["delay"], failure=_failure(row["failure"]), begun=row["begun"]
            )
            for row in rows
        }

    async def letters(self, subscription: str | None) -> AsyncIterator[DeadLetter]:
        """All dead letters, or one subscription's, in the order of their ids."""
        last = 0
        while True:
            rows = await self._database.fetch(self._sql.list_letters, last, subscription, _LETTERS_BYTES)
            if not rows:
                return
            for row in rows:
                last = row["letter_id"]
                failure = Failure(error=row["error"], attempts=row["attempts"], details=json.loads(row["details"]))
                yield DeadLetter(
                    id=last,
                    subscription=row["subscription"],
                    event=_event(row, attempt=row["attempts"], failure=failure),
                    failure=failure,
                    buried_at=row["buried_at"],
                    due_at=row["due_at"],
                )

    async def redeliver(self, ids: Sequence[int] | None, subscription: str | None) -> int:
        """Make dead letters due now; how many."""
        return len(await self._database.fetch(self._sql.redeliver_letters, ids, subscription))


def _asked(requests: Sequence[DueRequest]) -> tuple[list[int], list[str], list[int], list[int], list[int], list[int]]:
    leases = [request.lease for request in requests]
    return (
        [lease.epoch for lease in leases],
        [lease.subscription for lease in leases],
        [lease.shard for lease in leases],
        [lease.shards for lease in leases],
        [request.room for request in requests],
        [request.room_bytes for request in requests],
    )


def _at_work(numbers: Iterable[tuple[int, Sequence[int]]]) -> tuple[list[int], list[int]]:
    pairs = [(epoch, number) for epoch, some in numbers for number in some]
    return [epoch for epoch, _ in pairs], [number for _, number in pairs]


def _event(row: Record, *, attempt: int, failure: Failure | None = None) -> Event:
    return Event(row, row[_POSITION], row[_RECORDED_AT], attempt, failure)


def _failure(text: str | None) -> Failure | None:
    return Failure(**json.loads(text)) if text is not None else None
