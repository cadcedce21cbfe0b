"""Keeps the backend's subscriptions equal to the triggers of the configuration.

A trigger that differs from the configuration has a task until it no longer differs:

    absent ── alter its rows in the log, subscribe ──▶ in force ── unsubscribe ──▶ absent; its place is kept
                                                        │    ▲
       another order, end, start, shards: alter its rows ─┴────┘
                   anything: reconfigure, without a pause

The promises: a configuration comes into force trigger by trigger, and a failed change is tried again, always towards
the newest configuration. No trigger waits for another. No event is lost or repeated: a trigger keeps its place in the
log.
"""

import asyncio
import logging
from contextlib import suppress
from datetime import datetime

from pgbackend import facts
from pgbackend.backend import Backend
from pgbackend.errors import (
    ConnectionLostError,
    DatabaseError,
    NotRunningError,
    SubscriptionBusyError,
    SubscriptionNotFoundError,
)
from pgbackend.postgres.reconnect import GrowingDelay
from pgbackend.serve.config.models import Configuration, Trigger
from pgbackend.serve.egress.subscribing import SubscriptionFactory


class Triggers:
    """The triggers of one broker process."""

    def __init__(self, backend: Backend, factory: SubscriptionFactory) -> None:
        self.configuration = Configuration()
        """The newest configuration that `apply()` was given."""
        self._backend = backend
        self._factory = factory
        self._in_force: dict[str, Trigger] = {}
        """The triggers that the backend runs."""
        self._altering: set[str] = set()
        """The triggers whose rows in the log may have other terms than the trigger in force."""
        self._changes: dict[str, _Change] = {}
        """The triggers that are changing."""
        self._begun: asyncio.Queue[str] = asyncio.Queue()
        """The changes that have no task yet."""

    async def run(self) -> None:
        """Change triggers until cancelled. A change that is cancelled can begin again."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                name = await self._begun.get()
                tasks.create_task(self._converge(name), name=f"change trigger {name}")

    async def apply(self, configuration: Configuration) -> None:
        """Return once the triggers are as in `configuration`, except those that wait for their events in flight.

        These follow by themselves. Triggers that stay the same are not touched. While PostgreSQL is away, this waits.
        The changes go on when this call is cancelled. Needs `run()`.
        """
        self.configuration = configuration
        names = {**self._in_force, **configuration.triggers}
        for change in [self._begin(name) for name in names if self._differs(name)]:
            await change.detached.wait()

    async def converged(self) -> None:
        """Return once no trigger is changing."""
        while self._changes:
            await next(iter(self._changes.values())).ended.wait()

    def _differs(self, name: str) -> bool:
        return name in self._altering or self._in_force.get(name) != self.configuration.triggers.get(name)

    def _begin(self, name: str) -> "_Change":
        """The change that is under way, which heeds the newest configuration, or a new one."""
        if name not in self._changes:
            self._changes[name] = _Change()
            self._begun.put_nowait(name)
        return self._changes[name]

    async def _converge(self, name: str) -> None:
        """The trigger is as in the newest configuration, or the backend was stopped."""
        change = self._changes[name]
        pause = GrowingDelay()
        try:
            while self._differs(name):
                try:
                    await self._step(name, change)
                    continue
                except NotRunningError:
                    return
                except DatabaseError as error:
                    if not isinstance(error, ConnectionLostError):
                        # It may last until somebody acts: let apply() return.
                        change.detached.set()
                    _report_delay(name, error)
                except SubscriptionBusyError as error:
                    # The events in flight of another process may take long: let apply() return.
                    change.detached.set()
                    _report_delay(name, error)
                except Exception as error:  # noqa: BLE001 - no error may leave a trigger without its subscription
                    change.detached.set()
                    facts.emit("trigger change failed", level=logging.ERROR, trigger=name, exc_info=error)
                await pause.wait()
        finally:
            # No await in between: a later apply() begins another change.
            del self._changes[name]
            change.detached.set()
            change.ended.set()

    async def _step(self, name: str, change: "_Change") -> None:
        """The trigger is as the configuration was at the beginning of the call."""
        old, new = self._in_force.get(name), self.configuration.triggers.get(name)
        if new is None:
            await self._remove(name, change)
            return
        if old is None or name in self._altering or _terms(old) != _terms(new):
            self._altering.add(name)
            if old is not None:
                # It waits for its open requests: see `_remove`.
                change.detached.set()
            await self._alter(name, new)
        options = self._factory.options(name, new)
        if old is None:
            await self._backend.subscribe(
                name, order=new.order, end=new.end, start=new.start, shards=new.shards, **options
            )
        else:
            await self._backend.reconfigure(name, **options)
        self._in_force[name] = new
        self._altering.discard(name)
        facts.emit("trigger added" if old is None else "trigger changed", trigger=name)

    async def _remove(self, name: str, change: "_Change") -> None:
        # Unsubscribing waits for open requests, up to the backend's `drain_timeout`. Then it cuts them off, and their
        # unsettled events are dispatched again when the trigger comes back.
        change.detached.set()
        with suppress(SubscriptionNotFoundError):  # an earlier try got this far
            await self._backend.unsubscribe(name)
        self._in_force.pop(name, None)
        self._altering.discard(name)
        self._factory.forget(name)
        facts.emit("trigger removed", trigger=name)

    async def _alter(self, name: str, new: Trigger) -> None:
        """The rows of the trigger in the log, if there are any, have its order, end, start and shards.

        They may be there for a new trigger, too, from before a restart. They are altered before it subscribes, so that
        the new dispatcher never gets events under the old terms.
        """
        with suppress(SubscriptionNotFoundError):
            if new.order == "strict":
                # A subscription must have a single shard before its order can be strict.
                await self._backend.reshard(name, new.shards)
            await self._backend.alter_subscription(name, order=new.order, end=new.end, start=new.start)
            await self._backend.reshard(name, new.shards)


class _Change:
    """A trigger on its way to the configuration."""

    def __init__(self) -> None:
        self.detached = asyncio.Event()
        """Set once apply() need not wait: the change has ended, waits for events in flight, or needs outside help."""
        self.ended = asyncio.Event()


def _report_delay(name: str, error: Exception) -> None:
    facts.emit("trigger not changed yet", level=logging.WARNING, trigger=name, error=str(error))


def _terms(trigger: Trigger) -> tuple[str, int, int | datetime | None, int | datetime | None]:
    """The part of a trigger that the log stores: its order, its shards, its end and its bound at the start."""
    start = trigger.start if isinstance(trigger.start, int | datetime) else None
    return trigger.order, trigger.shards, trigger.end, start
