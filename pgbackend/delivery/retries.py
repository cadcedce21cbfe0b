"""Retries now: failed events do not wait for their time, because an operator says so, from any process.

`Retries.retry_now()` makes their rows in `redeliveries` due. In order "none" that is all, because the redeliverer looks
there. Elsewhere the owner knows the times by heart: in ordered shards, and where it probes a target that is down. So
the call also stores its own time in the subscription's row, and a `RetryWatch` in each worker looks for it, at once
after a NOTIFY and each second anyway. It then asks which of the events that wait here are due.

The promise: a call reaches the owner whoever that is, also one that claims the shard afterwards, and no attempt is
made twice. An answer counts only for an event with the same number of attempts in its row as in memory, before the
question and after it. So the old row of an event that has just failed again makes nothing due.
"""

from collections.abc import AsyncIterator, Mapping
from datetime import datetime

from pgbackend import facts
from pgbackend.delivery.history import parse_history
from pgbackend.delivery.pump import Pump
from pgbackend.delivery.pumps import Pumps
from pgbackend.delivery.redeliverer import Redeliverer
from pgbackend.errors import DatabaseError, SchemaError
from pgbackend.log.notify import Wakeup
from pgbackend.model import Position, WaitingEvent
from pgbackend.postgres.pool import Database
from pgbackend.postgres.reconnect import GrowingDelay
from pgbackend.postgres.sql import load
from pgbackend.postgres.sql.statements import RetriesSql

_PAGE = 1000
_LONGEST_WAIT = 1.0
"""Seconds between two looks, at most."""


class Retries:
    """Reads and changes when failed events are due."""

    def __init__(self, database: Database, *, schema: str) -> None:
        self._database = database
        self._sql = load(RetriesSql, "retries", schema=schema)

    async def list_waiting(self, name: str) -> AsyncIterator[WaitingEvent]:
        """The subscription's failed events that wait to be tried again, in log order."""
        above = 0
        while rows := await self._database.fetch(self._sql.list_waiting, name, above, _PAGE):
            for row in rows:
                above = row["position"]
                yield WaitingEvent(
                    position=Position(above),
                    history=parse_history(row["history"]),
                    **{
                        column: row[column]
                        for column in ("id", "source", "type", "attempts", "due_at", "error", "given_up")
                    },
                )

    async def retry_now(self, name: str, position: int | None) -> int | None:
        """Its failed events, or the one at `position`, are due; how many were not. None: no such subscription."""
        count: int | None = await self._database.fetchval(self._sql.retry_now, name, position)
        return count

    async def find_requests(self, names: list[str]) -> Mapping[str, datetime]:
        """When each of these subscriptions was last asked to retry now, if it was."""
        rows = await self._database.fetch(self._sql.find_requests, names)
        return {row["name"]: row["retried_at"] for row in rows}

    async def find_due_among(self, name: str, waiting: Mapping[int, int]) -> set[int]:
        """Those of these positions whose events are due, with just these attempts made."""
        rows = await self._database.fetch(self._sql.find_due_among, name, list(waiting), list(waiting.values()))
        return {row["position"] for row in rows}


class RetryWatch:
    """Tells the pumps of a worker when somebody asked for retries now."""

    def __init__(
        self, retries: Retries, pumps: Pumps, redeliverer: Redeliverer, wakeup: Wakeup, *, poll_interval: float
    ) -> None:
        """`wakeup`: there may be something to look for."""
        self._retries = retries
        self._pumps = pumps
        self._redeliverer = redeliverer
        self._wakeup = wakeup
        self._longest = min(poll_interval, _LONGEST_WAIT)
        self._obeyed: dict[int, datetime] = {}
        """The last request that each pump has obeyed, by the epoch of its lease."""

    async def run(self) -> None:
        """Look until cancelled."""
        delay = GrowingDelay()
        while True:
            known = self._wakeup.count
            try:
                await self.run_once()
            except SchemaError:
                raise
            except DatabaseError as error:
                facts.emit("retry watch failed", level=delay.failed(), failures=delay.failures, error=str(error))
                await delay.wait()
                continue
            delay.reset()
            await self._wakeup.wait(since=known, timeout=self._longest)

    async def run_once(self) -> int:
        """Each pump has obeyed the last request for its subscription. Returns how many of them it was new for."""
        pumps = list(self._pumps)
        if not pumps:
            return 0
        requests = await self._retries.find_requests(sorted({pump.registration.name for pump in pumps}))
        fresh = {
            pump: requested
            for pump in pumps
            if (requested := requests.get(pump.registration.name)) is not None
            and requested != self._obeyed.get(pump.shard.lease.epoch)
        }
        for pump, requested in fresh.items():
            await self._retry(pump)
            self._obeyed[pump.shard.lease.epoch] = requested
        self._obeyed = {epoch: requested for epoch, requested in self._obeyed.items() if epoch in self._pumps}
        return len(fresh)

    async def _retry(self, pump: Pump) -> None:
        if waiting := pump.waiting():
            due = await self._retries.find_due_among(pump.registration.name, waiting)
            # An event that was tried and failed meanwhile has another time now.
            still = pump.waiting()
            pump.hasten({position for position in due if still.get(position) == waiting[position]})
        # A target that is down is probed at once: it may be up again.
        pump.registration.health.probe_now()
        self._redeliverer.wake()
