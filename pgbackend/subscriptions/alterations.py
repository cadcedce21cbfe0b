"""Changes what is stored of a subscription: its terms, its place, its number of shards.

Each call reads the shards, decides in a pure function, and swaps them (see `shards`); when something has changed in
between it starts over, within a bound. Except for `seek`, the calls first have every worker release the shards.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

from pgbackend.errors import ConfigError, SubscriptionBusyError
from pgbackend.log.log import Log
from pgbackend.postgres.sql import load
from pgbackend.postgres.sql.statements import ShardsSql
from pgbackend.subscriptions import altering, resharding
from pgbackend.subscriptions.definitions import Definition, Terms, not_found
from pgbackend.subscriptions.draining import Drain
from pgbackend.subscriptions.locator import Locator
from pgbackend.subscriptions.places import Place, start_bound
from pgbackend.subscriptions.shards import Change, Shards, Stored

_SEEK_PATIENCE = 30.0
"""Seconds in which `seek` tries to get between the commits of the workers that run the subscription."""
_SWITCH_TRIES = 10


class Alterations:
    """Changes the stored shards of subscriptions."""

    def __init__(self, log: Log, *, schema: str) -> None:
        self._log = log
        self._sql = load(ShardsSql, "shards", schema=schema)
        self._shards = Shards(log, schema=schema)
        self._locator = Locator(log)

    async def seek(self, name: str, place: Place) -> None:
        """Every shard is at `place` under a new epoch, and failed events are not tried again.

        Workers that run the subscription lose its shards. Raises SubscriptionNotFoundError; SubscriptionBusyError when
        the shards changed too often to be moved.
        """
        deadline = time.monotonic() + _SEEK_PATIENCE
        pause = _Pause()
        while True:
            stored = await self._read(name)
            start = await self._locator.locate(place)
            if await self._shards.swap(stored, altering.move(stored, stored.definition, start)):
                return
            if time.monotonic() > deadline:
                owners = await self._log.database.fetch(self._sql.find_owners, name)
                raise SubscriptionBusyError(
                    f"Subscription {name!r} was not moved: its shards kept changing. Try again, or stop the processes "
                    "that run it first.",
                    workers=[owner["name"] for owner in owners],
                )
            await pause.wait()

    async def compare(self, name: str, terms: Terms) -> Definition | None:
        """The stored definition, if it differs from the terms. Raises ConfigError when it cannot have them."""
        stored = (await self._read(name)).definition
        terms.check(stored)
        return None if terms.match(stored) else stored

    async def alter(self, name: str, terms: Terms, *, patience: float, on_drain: Callable[[], Awaitable[None]]) -> bool:
        """The subscription has these terms; whether this call gave them to it.

        If a worker runs one of its shards, all workers are asked to drain it; `on_drain` is awaited after the request.
        Raises SubscriptionBusyError when a worker refuses or has not released it after `patience` seconds. Several
        calls with the same terms alter it once.
        """
        drain = Drain(self._log.database, self._sql, name, patience=patience, on_request=on_drain)
        is_requested = False
        pause = _Pause()
        async with AsyncExitStack() as stack:
            while True:
                stored = await self._read(name)
                terms.check(stored.definition)
                if terms.match(stored.definition):
                    return False
                if not terms.need_drain(stored.definition):
                    await self._shards.set_start_bound(stored, start_bound(terms.start))
                    continue
                if stored.free and await self._shards.swap(stored, await self._decide_alter(stored, terms)):
                    return True
                if is_requested:
                    await drain.renew()
                else:
                    await stack.enter_async_context(drain.requested())
                    is_requested = True
                await pause.wait()

    async def _decide_alter(self, stored: Stored, terms: Terms) -> Change:
        wanted = terms.apply(stored.definition)
        if terms.move(stored.definition):
            return altering.move(stored, wanted, await self._locator.locate(terms.start))
        return altering.alter(stored, wanted, await self._shards.find_waiting(wanted.name))

    async def reshard(
        self, name: str, shards: int, *, patience: float, on_drain: Callable[[], Awaitable[None]]
    ) -> bool:
        """The subscription has that many shards; whether this call gave them to it.

        All workers are asked to drain it; `on_drain` is awaited after the request. Old shards that lag behind go on
        until the barrier, and then `switch` lets the new ones begin. Raises SubscriptionBusyError when a worker refuses
        or has not released it after `patience` seconds.
        """
        if (await self._read_for_reshard(name, shards)).definition.shards == shards:
            return False
        drain = Drain(self._log.database, self._sql, name, patience=patience, on_request=on_drain)
        pause = _Pause()
        async with drain.requested():
            while (stored := await self._read_for_reshard(name, shards)).definition.shards != shards:
                change = resharding.reshard(stored, shards)
                if change is not None and await self._shards.swap(stored, change):
                    await self.switch(name)
                    return True
                await drain.renew()
                await pause.wait()
        return False

    async def switch(self, name: str) -> bool:
        """The new shards can be claimed, and the old ones are gone; False when the old ones are not finished.

        Also False when the shards changed again and again meanwhile: the next round of a worker tries again.
        """
        for _ in range(_SWITCH_TRIES):
            stored = await self._shards.read(name)
            if stored is None or not resharding.can_switch(stored):
                return False
            doubtful = resharding.find_doubtful(stored)
            old, new = len(stored.old), len(stored.current)
            events = await self._shards.find_events(doubtful, old, new)
            if await self._shards.swap(stored, resharding.switch(stored, events)):
                return True
        return False

    async def refuse_drain(self, name: str) -> None:
        """Calls that wait for workers to release the subscription raise SubscriptionBusyError now."""
        await self._log.database.execute(self._sql.refuse_drain, name)

    async def _read(self, name: str) -> Stored:
        stored = await self._shards.read(name)
        if stored is None:
            raise not_found(name)
        return stored

    async def _read_for_reshard(self, name: str, shards: int) -> Stored:
        """The stored shards. Raises ConfigError when the subscription cannot have that many."""
        stored = await self._read(name)
        if stored.definition.order == "strict" and shards != 1:
            raise ConfigError(f"Subscription {name!r} is strict: log order needs a single shard, not {shards}.")
        return stored


class _Pause:
    """Between two tries: from 10 ms, growing to 250 ms, with jitter, so that several calls do not go in step."""

    def __init__(self) -> None:
        self._next = 0.01

    async def wait(self) -> None:
        await asyncio.sleep(self._next * (0.5 + random.random()))  # noqa: S311 - not a secret
        self._next = min(self._next * 1.5, 0.25)
