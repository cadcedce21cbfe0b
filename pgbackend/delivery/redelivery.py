"""Reads failed events that are due again, and dead letters. The committer writes them, with the offsets.

Two things are written here: that an attempt did not kill its worker, because that worker has no lease any more, and
what operators do with dead letters.
"""

import json
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

from pgbackend.codec.event import Event
from pgbackend.delivery.backlog import Carried
from pgbackend.delivery.delivery import Delivery, Origin, next_attempt
from pgbackend.delivery.due import DueRequest
from pgbackend.delivery.history import parse_history
from pgbackend.model import DeadLetter, DeadLetterGroup, Failure
from pgbackend.postgres.connections import Record
from pgbackend.postgres.pool import Database
from pgbackend.postgres.sql import load
from pgbackend.postgres.sql.statements import RedeliverySql
from pgbackend.subscriptions.leases import Lease

_LIVES = 3
"""Lives of the server that end in a row while the same event is at work. From then on each counts as an attempt."""
_LETTERS_BYTES = 16 << 20
"""Bytes of dead letters in one page. The last one may be beyond."""
_GROUPS_TIMEOUT = 300.0
"""Seconds that a statement may take which works out the failure groups of all letters: a million took 11 s."""


@dataclass(frozen=True, slots=True)
class Found:
    """The results of a query for due events, by the epoch of the shard that asked."""

    deliveries: Sequence[tuple[int, Delivery]]
    gone: Mapping[int, Sequence[int]]
    """Positions of all failed events whose rows the log lost, for shards that came across one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """An attempt that started."""

    attempt: int
    """Attempts made before."""
    started_by: UUID | None
    """The worker that has not reported its end; None when it has."""
    overdue: float
    """Seconds since the event was due again."""
    connected: bool
    """Whether the server still has the worker's connection."""
    server_age: float
    """Seconds since the server was started."""


@dataclass(frozen=True, slots=True)
class Outlived:
    """A worker that ended, though its process did not."""

    worker: UUID
    server_died: bool
    """Whether the server's life ended, and not only the connection."""


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
                started_by=row["started_by"],
            )
            for row in rows
        }

    async def find_start(self, subscription: str, delivery: Delivery) -> Start | None:
        """The attempt whose end nobody reported; None when somebody did, or the event is settled."""
        rows = await self._database.fetch(self._sql.find_start, subscription, delivery.event.position, delivery.letter)
        return Start(**rows[0]) if rows else None

    async def report_survival(self, worker: UUID, subscription: str, delivery: Delivery) -> None:
        """The attempt that this worker started, and whose lease it lost, did not kill it: it does not count."""
        if delivery.letter is None:
            await self._database.execute(self._sql.report_survival, worker, subscription, delivery.event.position)
        else:
            await self._database.execute(self._sql.report_survival_of_letter, worker, delivery.letter)

    async def report_outlived(self, outlived: Sequence[Outlived]) -> None:
        """This process outlived these workers: the attempts that they had started do not count.

        Unless it was the server's life that ended, and each of its last three ended while that event was at work.
        """
        for server_died in (True, False):
            if workers := [one.worker for one in outlived if one.server_died is server_died]:
                await self._database.execute(self._sql.report_outlived, workers, server_died, _LIVES)

    async def letters(self, subscription: str | None, group: str | None) -> AsyncIterator[DeadLetter]:
        """All dead letters, or those of one subscription or group, in the order of their ids."""
        last = 0
        while True:
            rows = await self._database.fetch(
                self._sql.list_letters, last, subscription, _LETTERS_BYTES, group, timeout=_GROUPS_TIMEOUT
            )
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
                    group=row["failure_group"],
                    history=parse_history(row["history"]),
                )

    async def groups(self, subscription: str | None) -> list[DeadLetterGroup]:
        """The failure groups of all dead letters, or of one subscription's, the largest first."""
        return [
            DeadLetterGroup(
                name=row["failure_group"],
                **{name: row[name] for name in ("subscription", "letters", "due", "first_at", "last_at", "error")},
            )
            for row in await self._database.fetch(self._sql.list_groups, subscription, timeout=_GROUPS_TIMEOUT)
        ]

    async def redeliver(self, ids: Sequence[int] | None, subscription: str | None, group: str | None) -> int:
        """Make dead letters due now. Returns how many."""
        rows = await self._database.fetch(
            self._sql.redeliver_letters, ids, subscription, group, timeout=_GROUPS_TIMEOUT
        )
        return len(rows)

    async def purge(self, ids: Sequence[int] | None, subscription: str | None, group: str | None) -> int:
        """Delete dead letters that are not on their way again. Returns how many."""
        rows = await self._database.fetch(self._sql.purge_letters, ids, subscription, group, timeout=_GROUPS_TIMEOUT)
        return len(rows)

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
                event = _event(row, failure=_failure(row["failure"]))
                found.append((row["epoch"], Delivery(event, Origin.REDELIVERY, started_by=row["started_by"])))
        return found, {row["epoch"] for row in rows if row["position"] is None}

    async def _find_letters(self, requests: Sequence[DueRequest]) -> list[tuple[int, Delivery]]:
        """Dead letters that an operator sent again."""
        rows = await self._database.fetch(
            self._sql.find_due_letters,
            *_arguments(requests),
            *_at_work((request.lease.epoch, request.letters) for request in requests),
        )
        return [
            (row["epoch"], Delivery(_event(row), Origin.LETTER, letter=row["letter_id"], started_by=row["started_by"]))
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


def _event(row: Record, *, attempt: int | None = None, failure: Failure | None = None) -> Event:
    if attempt is None:
        attempt = next_attempt(row["attempt"], row["started_by"])
    return Event(row, attempt, failure)


def _failure(text: str | None) -> Failure | None:
    return None if text is None else Failure(**json.loads(text))
