"""Trying again: the pause between tries at something that is down, and transactions that PostgreSQL rolled back.

Every loop that talks to PostgreSQL waits in a `GrowingDelay` after a failure, and every statement runs in `repeat()`.
The promise: an outage makes no process spin, and its end wakes all of them at once.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

import asyncpg

from pgbackend import facts
from pgbackend.errors import DatabaseError
from pgbackend.postgres.errors import CONFLICTS

if TYPE_CHECKING:
    from pgbackend.postgres.pool import Database

_Result = TypeVar("_Result")

_FIRST_DELAY = 0.05
_WARN_INTERVAL = 30.0
"""Seconds between two warnings about a failure that goes on."""
_CONFLICT_DELAY = 0.5
"""The longest pause, in seconds, between two tries at a transaction that was rolled back."""


class GrowingDelay:
    """Waits between tries at something that is down: doubling from 50 ms to a cap, with jitter, until `reset()`.

    With a `database`, a wait also ends when any task of this process finds its primary.
    """

    def __init__(self, database: "Database | None" = None, *, cap: float = 2.0) -> None:
        self._database = database
        self._cap = cap
        self._next = _FIRST_DELAY
        self._warned_at = 0.0
        self.failures = 0
        """Failed tries in a row."""

    def reset(self) -> None:
        """Count a try that succeeded."""
        self._next = _FIRST_DELAY
        self.failures = 0

    def failed(self) -> int:
        """Count a try that failed, and return the level to log it at.

        WARNING for the first failure in a row, and then every 30 s; DEBUG in between. Every loop of every worker tries
        about once a second, so logging each try would flood the log.
        """
        self.failures += 1
        now = time.monotonic()
        if self.failures > 1 and now < self._warned_at + _WARN_INTERVAL:
            return logging.DEBUG
        self._warned_at = now
        return logging.WARNING

    async def wait(self) -> None:
        """Return when it is time for the next try."""
        # Jitter: workers that lost the same server must not come back in step.
        delay = self._next * (0.5 + random.random())  # noqa: S311 - not a secret
        self._next = min(self._next * 2, self._cap)
        if self._database is None:
            await asyncio.sleep(delay)
        else:
            await self._database.wait_for_primary(delay)


async def repeat(attempt: Callable[[], Awaitable[_Result]], timeout: float) -> _Result:
    """The result of `attempt()`, one transaction, which runs again while PostgreSQL rolls it back for a conflict.

    Raises what the last attempt raised, once `timeout` seconds have passed.
    """
    delay = GrowingDelay(cap=_CONFLICT_DELAY)
    deadline = time.monotonic() + timeout
    while True:
        try:
            return await attempt()
        except (asyncpg.PostgresError, DatabaseError) as error:
            if error.sqlstate not in CONFLICTS or time.monotonic() > deadline:
                raise
            facts.emit("repeated after a conflict", level=logging.DEBUG, error=str(error))
        await delay.wait()
