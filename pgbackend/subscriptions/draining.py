"""Drains a subscription everywhere, so that a call can change it while no worker runs it.

While a drain is requested, workers let what is at work end, commit, and release the subscription's shards; none claims
one. A worker whose dispatchers take longer than its `drain_timeout` refuses and goes on. The request is a time in the
subscription's row, so it ends by itself soon after the call that made it has died.
"""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress

from pgbackend.errors import DatabaseError, SubscriptionBusyError
from pgbackend.postgres.pool import Database
from pgbackend.postgres.sql.statements import ShardsSql

_GRACE = 5.0
"""Seconds that a request outlasts the patience of its call: time in which the call can end it by itself."""


class Drain:
    """A request of one call, within its `patience` in seconds. `on_request` is awaited after each request."""

    def __init__(
        self,
        database: Database,
        sql: ShardsSql,
        name: str,
        *,
        patience: float,
        on_request: Callable[[], Awaitable[None]],
    ) -> None:
        self._database = database
        self._sql = sql
        self._name = name
        self._patience = patience
        self._deadline = time.monotonic() + patience
        self._on_request = on_request

    @asynccontextmanager
    async def requested(self) -> AsyncIterator[None]:
        """Workers are asked to release the shards, until the body ends."""
        await self._database.execute(self._sql.request_drain, self._name, self._patience + _GRACE)
        try:
            await self._on_request()
            yield
        finally:
            # The request ends by itself, and must not hide that the change was made, or why not.
            with suppress(DatabaseError):
                await self._database.execute(self._sql.end_drain, self._name)

    async def renew(self) -> None:
        """Request it again if it is over: another call that has changed the subscription ends it for all.

        Raises SubscriptionBusyError when a worker has refused, or the patience is at its end.
        """
        left = self._deadline - time.monotonic()
        row = await self._database.fetchrow(self._sql.renew_drain, self._name, max(left, 0.0) + _GRACE)
        assert row is not None  # noqa: S101 - a SELECT of scalars
        if row["refused"] or left <= 0:
            owners = await self._database.fetch(self._sql.find_owners, self._name)
            raise busy(self._name, [owner["name"] for owner in owners])
        if row["renewed"]:
            await self._on_request()


def busy(name: str, workers: Sequence[str]) -> SubscriptionBusyError:
    return SubscriptionBusyError(
        f"Subscription {name!r} was not changed: events are still at work in {', '.join(workers) or 'a worker'} that "
        "take longer than its `drain_timeout`. Try again when they have ended, or stop that process first.",
        workers=workers,
    )
