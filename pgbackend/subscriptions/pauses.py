"""Pauses as they are stored: in the subscription's row, for every process and past every restart.

    running ──pause()──────────────▶ paused by an operator ──resume()──▶ running
       │                                     ▲
       └──its dispatcher raises Pause──▶ paused by its dispatcher ──resume(), or another target──▶ running

The promise: an operator's word stands. A dispatcher's pause does not replace an operator's, and is refused if somebody
has resumed the subscription since the dispatcher's process last looked, or if the target has changed.
"""

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from pgbackend.log.log import Log
from pgbackend.model import Paused
from pgbackend.postgres.connections import Record
from pgbackend.postgres.sql import load
from pgbackend.postgres.sql.statements import PausesSql
from pgbackend.subscriptions.definitions import not_found


@dataclass(frozen=True, slots=True)
class PauseState:
    """The pause that a subscription's row states."""

    paused: Paused | None
    resumed_at: datetime | None
    """The last resume, by the server's clock."""

    @classmethod
    def of(cls, row: Record) -> "PauseState":
        return cls(paused_of(row), row["resumed_at"])


def paused_of(row: Record) -> Paused | None:
    """The pause in a row with the columns of `subscriptions`."""
    if row["paused_at"] is None:
        return None
    return Paused(at=row["paused_at"], by=row["paused_by"], reason=row["pause_reason"])


class Pauses:
    """Stores pauses, and ends them."""

    def __init__(self, log: Log, *, schema: str) -> None:
        self._log = log
        self._sql = load(PausesSql, "pauses", schema=schema)

    async def pause(self, name: str, reason: str | None, *, process: str) -> None:
        """An operator has paused the subscription. Raises SubscriptionNotFoundError."""
        if await self._log.database.fetchval(self._sql.pause, name, reason, process) is None:
            raise not_found(name)

    async def resume(self, name: str) -> None:
        """The subscription is not paused. Raises SubscriptionNotFoundError."""
        if await self._log.database.fetchval(self._sql.resume, name) is None:
            raise not_found(name)

    async def pause_for_dispatcher(
        self, name: str, reason: str, *, resumed_at: datetime | None, target: str | None, worker: UUID
    ) -> bool:
        """The dispatcher of a worker has paused the subscription; False if the row does not let it.

        `resumed_at`: the last resume that the worker knows. `target`: the worker's own.
        """
        stored = await self._log.database.fetchval(
            self._sql.pause_for_dispatcher, name, reason, resumed_at, target, worker, self._log.incarnation.id
        )
        return stored is not None

    async def change_target(self, name: str, target: str | None) -> str | None:
        """The subscription has this target, and no pause by a dispatcher of another one; the reason of one that ended.

        None is for a new dispatcher that names no target: it ends a pause as well, and the stored target stays.
        """
        ended: str | None = await self._log.database.fetchval(self._sql.change_target, name, target)
        return ended
