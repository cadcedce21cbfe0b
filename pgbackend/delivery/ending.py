"""The end of a subscription that has one: wait until the clock and the log have passed it, and all is settled."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import TypeVar

from pgbackend import facts
from pgbackend.delivery.shard import Shard
from pgbackend.errors import DatabaseError
from pgbackend.log.log import Log
from pgbackend.postgres.reconnect import GrowingDelay

_POLL = 0.05
"""Seconds between looks at whether everything is settled."""
_CLOCK_POLL = 30.0
"""Seconds between looks at the server's clock while the end is far."""
_Result = TypeVar("_Result")


async def until_settled(shard: Shard, log: Log) -> None:
    """Return once a shard whose subscription ends has settled everything up to there."""
    window, lease = shard.window, shard.lease
    goal = (lease.end_position or 0) - 1
    if lease.end_at is not None:
        await _until(lease.end_at, log)
        # The check starts after the end: no event from before it can appear above what the check proves.
        proven = (await _insist(log, log.check)).upto
        goal = proven if lease.end_position is None else min(goal, proven)
    while window.position < goal or len(window) or window.holes.below(goal):  # noqa: ASYNC110 - rare, and plain
        await asyncio.sleep(_POLL)


async def _until(date: datetime, log: Log) -> None:
    """Return once the server's clock has passed a date."""

    async def seconds_left() -> float:
        return float(
            await log.database.fetchval("SELECT extract(epoch FROM $1::timestamptz - clock_timestamp())::float8", date)
        )

    while (left := await _insist(log, seconds_left)) > 0:  # noqa: ASYNC110 - the server's clock
        # The two clocks may drift apart, and either may be set.
        await asyncio.sleep(min(left, _CLOCK_POLL))


async def _insist(log: Log, ask: Callable[[], Awaitable[_Result]]) -> _Result:
    """The answer, asked for until PostgreSQL gives it."""
    delay = GrowingDelay(log.database)
    while True:
        try:
            return await ask()
        except DatabaseError as error:
            facts.emit("subscription's end not known", level=delay.failed(), failures=delay.failures, error=str(error))
            await delay.wait()
