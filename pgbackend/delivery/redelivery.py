"""Reads failed events that are due again, and dead letters. The committer writes them, with the offsets."""

import json
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pgbackend.codec.event import Event
from pgbackend.delivery.backlog import Carried
from pgbackend.delivery.delivery import Delivery, Origin
from pgbackend.delivery.due import DueRequest
from pgbackend.model import DeadLetter, Failure
from pgbackend.postgres.connections import Record
from pgbackend.postgres.pool import Database
from pgbackend.postgres.sql import load
from pgbackend.postgres.sql.statements import RedeliverySql
from pgbackend.subscriptions.leases import Lease

_LETTERS_BYTES = 16 << 20
"""Bytes of dead letters in one page. The last one may be beyond."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a query found due, by the epoch of the shard that asked."""

    deliveries: Sequence[tuple[int, Delivery]]
    gone: Mapping[int, Sequence[int]]
    """Positions of all failed events whose rows the log lost, for shards that came across one."""


class Redelivery:
    """Reads `redeliveries` and `dead_letters`."""

    def __init__(self, database: Database, *, schema: str) -> None:
        self._database = database
        self._sql = load(RedeliverySql, "redelivery", schema=schema)

    async def find_due(self, requests: Sequence[DueRequest]) -> Found:
        """For each shard the events and dead letters that are due, as many as it has room for."""
        from_log = [request for request in requests if request.events]
        for_target = [request for request in requests if not request.given_up]
        deliveries, incomplete = await self._find_events(from_log) if from_log else ([], set())
        if for_target:
            deliveries += await self._find_letters(for_target)
        gone: dict[int, list[int]] = {}
        for request in from_log:
            if request.lease.epoch in incomplete:
                gone[request.lease.epoch] = await self._find_gone(request)
        return Found(deliveries, gone)

    async def find_carried(self, lease: Lease) -> dict[int, Carried]:
        """By position: what a former owner recorded of this shard's failed events."""
        rows = await self._database.fetch(self._sql.find_attempts, lease.subscription, lease.shard, lease.shards)
        now = time.monotonic()
        return {
            row["position"]: Carried(
                attempt=row["attempt"],
                due_at=now + row["delay"],
                failure=_failure(row["failure"]),
                suspect=row["begun"],
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
        """Make dead letters due now. Returns how many."""
        return len(await self._database.fetch(self._sql.redeliver_letters, ids, subscription))

    async def _find_events(self, requests: Sequence[DueRequest]) -> tuple[list[tuple[int, Delivery]], set[int]]:
        """Failed events that are due, and the epochs of shards that miss the row of one."""
        rows = await self._database.fetch(
            self._sql.find_due,
            *_arguments(requests),
            *_at_work((request.lease.epoch, request.positions) for request in requests),
            [request.given_up for request in requests],
        )
        found = []
        for row in rows:
            if row["position"] is not None:
                event = _event(row, attempt=row["attempt"] + 1, failure=_failure(row["failure"]))
                found.append((row["epoch"], Delivery(event, Origin.REDELIVERY, suspect=row["begun"])))
        return found, {row["epoch"] for row in rows if row["position"] is None}

    async def _find_letters(self, requests: Sequence[DueRequest]) -> list[tuple[int, Delivery]]:
        """Dead letters that an operator sent again."""
        rows = await self._database.fetch(
            self._sql.find_due_letters,
            *_arguments(requests),
            *_at_work((request.lease.epoch, request.letters) for request in requests),
        )
        return [
            (
                row["epoch"],
                Delivery(
                    _event(row, attempt=row["attempt"] + 1),
                    Origin.LETTER,
                    letter=row["letter_id"],
                    suspect=row["begun"],
                ),
            )
            for row in rows
        ]

    async def _find_gone(self, request: DueRequest) -> list[int]:
        lease = request.lease
        rows = await self._database.fetch(
            self._sql.find_gone, lease.subscription, lease.shard, lease.shards, request.positions
        )
        return [row["position"] for row in rows]


def _arguments(
    requests: Sequence[DueRequest],
) -> tuple[list[int], list[str], list[int], list[int], list[int], list[int]]:
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
    """Two columns: the epoch, and a position or letter that its shard has at work."""
    pairs = [(epoch, number) for epoch, some in numbers for number in some]
    return [epoch for epoch, _ in pairs], [number for _, number in pairs]


def _event(row: Record, *, attempt: int, failure: Failure | None = None) -> Event:
    return Event(row, row["position"], row["recorded_at"], attempt, failure)


def _failure(text: str | None) -> Failure | None:
    return None if text is None else Failure(**json.loads(text))
