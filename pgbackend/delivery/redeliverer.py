"""The redeliverer of a worker: finds failed events that are due again, and hands them to the pumps."""

import asyncio
import time
from contextlib import suppress

from pgbackend import facts
from pgbackend.delivery.pumps import Pumps
from pgbackend.delivery.redelivery import Outlived, Redelivery
from pgbackend.errors import DatabaseError, SchemaError
from pgbackend.postgres.pool import Database
from pgbackend.postgres.reconnect import GrowingDelay

_LONGEST_WAIT = 1.0
"""Seconds between two looks, at most: another worker may have scheduled an event of a shard that is here now."""
_SHORTEST_WAIT = 0.01
"""Seconds between two looks, at least, however often something is scheduled."""


class Redeliverer:
    """Looks when something is due that was scheduled here, when it is woken, and each second."""

    def __init__(self, redelivery: Redelivery, pumps: Pumps, database: Database, *, poll_interval: float) -> None:
        self._redelivery = redelivery
        self._pumps = pumps
        self._database = database
        self._longest = min(poll_interval, _LONGEST_WAIT)
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """Something may be due, or a pump has room again."""
        self._woken.set()

    async def run(self) -> None:
        """Redeliver until cancelled."""
        delay = GrowingDelay(self._database)
        while True:
            self._woken.clear()
            try:
                await self.run_once()
            except SchemaError:
                raise
            except DatabaseError as error:
                facts.emit("redelivery failed", level=delay.failed(), failures=delay.failures, error=str(error))
                await delay.wait()
                continue
            delay.reset()
            left = self._seconds_left()
            await asyncio.sleep(min(left, _SHORTEST_WAIT))
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._woken.wait()

    async def report_outlived(self, outlived: list[Outlived]) -> None:
        """Report what the earlier workers of this process did not die of, and forget them."""
        await self._redelivery.report_outlived(outlived)
        outlived.clear()

    async def run_once(self) -> None:
        """Hand each pump what is due, as far as it has room."""
        now = time.monotonic()
        requests = []
        for running in self._pumps:
            running.due.drop_times(now)
            if (request := running.request_due()) is not None:
                requests.append(request)
        found = await self._redelivery.find_due(requests)
        for epoch, delivery in found.deliveries:
            if (pump := self._pumps.get(epoch)) is not None:
                pump.take_due(delivery)
        for epoch, positions in found.gone.items():
            if (pump := self._pumps.get(epoch)) is not None:
                pump.skip_due(positions)

    def _seconds_left(self) -> float:
        now = time.monotonic()
        times = [due for pump in self._pumps if (due := pump.due.next_time()) is not None]
        return max(min(min(times, default=now + self._longest) - now, self._longest), 0.0)
