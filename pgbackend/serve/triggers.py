"""Keeps what the backend runs equal to what the configuration says: one subscription for each trigger.

Each trigger has its own task while it changes, so that one whose target hangs holds up no other. The promise: whatever
fails on the way is tried again until the trigger is as the newest configuration wants it.
"""

import asyncio
import logging
from contextlib import suppress
from typing import TYPE_CHECKING

import aiohttp
from yarl import URL

from pgbackend import facts
from pgbackend.backend import Backend
from pgbackend.database import Backoff
from pgbackend.errors import (
    ConfigError,
    NotRunningError,
    PgBackendError,
    SubscriptionMismatchError,
    SubscriptionNotFoundError,
)
from pgbackend.serve.config import Configuration, Trigger
from pgbackend.serve.delivery import DeadLetterDelivery, Delivery, refuse_without_target

if TYPE_CHECKING:
    from pgbackend.model import ConsumerDispatcher


class Triggers:
    """The triggers that are in force."""

    def __init__(self, backend: Backend, session: aiohttp.ClientSession) -> None:
        self.configuration = Configuration()
        """What is wanted: that of the last `apply()` that did not raise."""
        self._backend = backend
        self._session = session
        self._in_force: dict[str, Trigger] = {}
        self._changing: dict[str, asyncio.Task[None]] = {}
        self._one_apply = asyncio.Lock()

    async def apply(self, configuration: Configuration) -> None:
        """What `configuration` says is in force. Raises ConfigError before anything has changed."""
        async with self._one_apply:
            await self._check(configuration)
            self.configuration = configuration
            names = dict.fromkeys([*self._in_force, *configuration.triggers])
            if changing := [self._change(name) for name in names if self._differs(name)]:
                await asyncio.wait(changing)
            for task in changing:
                task.result()

    async def _check(self, configuration: Configuration) -> None:
        """Raise ConfigError when the log cannot have the triggers so."""
        stored = {one.name: one for one in (await self._backend.status()).subscriptions}
        for name, trigger in configuration.triggers.items():
            one = stored.get(name)
            if one is not None and len(one.shards) != trigger.shards:
                raise ConfigError(
                    f"triggers.{name}.shards: the log has it with {len(one.shards)} shards, not {trigger.shards}: "
                    "expected the same number. Give the trigger another name, or delete the subscription first."
                )

    def _differs(self, name: str) -> bool:
        return self._in_force.get(name) != self.configuration.triggers.get(name)

    def _change(self, name: str) -> asyncio.Task[None]:
        if name not in self._changing:
            self._changing[name] = asyncio.create_task(self._converge(name), name=f"change trigger {name}")
        return self._changing[name]

    async def _converge(self, name: str) -> None:
        """Return once the trigger is as the newest configuration wants it, or the backend was stopped."""
        backoff = Backoff()
        try:
            while self._differs(name):
                try:
                    await self._switch(name, self._in_force.get(name), self.configuration.triggers.get(name))
                except NotRunningError:
                    return
                except ConfigError:
                    raise
                except PgBackendError as error:
                    facts.emit("trigger not changed yet", level=logging.WARNING, trigger=name, error=str(error))
                    await backoff.wait()
        finally:
            del self._changing[name]

    async def _switch(self, name: str, old: Trigger | None, new: Trigger | None) -> None:
        if old is not None:
            with suppress(SubscriptionNotFoundError):
                await self._backend.unsubscribe(name)
            del self._in_force[name]
        if new is not None:
            await self._subscribe(name, new)
            self._in_force[name] = new
        facts.emit(f"trigger {'removed' if new is None else 'added' if old is None else 'changed'}", trigger=name)

    async def _subscribe(self, name: str, trigger: Trigger) -> None:
        options = trigger.delivery_options
        dispatcher: ConsumerDispatcher = refuse_without_target
        if trigger.target.url is not None:
            dispatcher = self._delivery(name, trigger, trigger.target.url, trigger.target.headers)
        dead_letter: ConsumerDispatcher | None = None
        if options.dead_letter_url is not None:
            # Without the target's headers: they may hold its secrets, and this is another party.
            dead_letter = DeadLetterDelivery(self._delivery(name, trigger, options.dead_letter_url, {}))
        try:
            await self._backend.subscribe(
                name,
                dispatcher,
                start=trigger.start,
                end=trigger.end,
                filter=trigger.predicate,
                order=trigger.order,
                concurrency=trigger.concurrency,
                shards=trigger.shards,
                retry=options.policy(),
                dead_letter=dead_letter,
            )
        except SubscriptionMismatchError as error:
            raise ConfigError(f"triggers.{name}: {error}") from error

    def _delivery(self, name: str, trigger: Trigger, url: URL, headers: dict[str, str]) -> Delivery:
        return Delivery(
            self._session,
            url,
            trigger=name,
            timeout=trigger.delivery_options.timeout,
            mode=trigger.target.mode,
            headers=headers,
        )
