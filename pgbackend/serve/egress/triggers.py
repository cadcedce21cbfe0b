"""Keeps what the backend runs equal to what the configuration says: one subscription for each trigger.

Each trigger that differs from what is wanted has a task until it no longer does:

    not there ── alter what the log has of it, subscribe ──▶ in force ── unsubscribe ──▶ not there, its place is kept
                                                              │    ▲
           another order, end, start or number of shards: alter it; ─┴────┘
                      anything: reconfigure, without a pause

The promises: a configuration comes into force, trigger by trigger, whatever fails on the way: what failed is tried
again, always towards the newest configuration. No trigger waits for another. No event is lost or repeated: a trigger
keeps its place in the log.
"""

import asyncio
import logging
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, TypedDict

import aiohttp
from yarl import URL

from pgbackend import facts
from pgbackend.backend import Backend
from pgbackend.errors import DatabaseError, NotRunningError, SubscriptionBusyError, SubscriptionNotFoundError
from pgbackend.postgres.reconnect import GrowingDelay
from pgbackend.serve.config.models import Configuration, Trigger
from pgbackend.serve.egress.delivery import DeadLetterDelivery, Delivery, refuse_without_target
from pgbackend.serve.egress.replies import ReplyBudget

if TYPE_CHECKING:
    from pgbackend.model import ConsumerDispatcher, EventFilter
    from pgbackend.retry import Retry
    from pgbackend.serve.operations.metrics import Metrics
    from pgbackend.serve.operations.tracing import Tracing


class Triggers:
    """The triggers of one broker process."""

    def __init__(
        self,
        backend: Backend,
        session: aiohttp.ClientSession,
        *,
        metrics: "Metrics | None" = None,
        tracing: "Tracing | None" = None,
        hops: int = 255,
        target_connections: int = 256,
    ) -> None:
        """`hops`: how long a chain of replies may be. `target_connections`: requests open at a time to one target."""
        self.configuration = Configuration()
        """What is wanted: the last that `apply()` was given."""
        self._backend = backend
        self._session = session
        self._metrics = metrics
        self._tracing = tracing
        self._hops = hops
        self._replies = ReplyBudget()
        self._target_connections = target_connections
        self._in_force: dict[str, Trigger] = {}
        """What the backend runs, and as what."""
        self._changes: dict[str, _Change] = {}

    async def apply(self, configuration: Configuration) -> None:
        """Return once the triggers are what `configuration` says, but for those that wait for their events in flight.

        These follow by themselves. Triggers that are the same stay untouched. PostgreSQL's absence is waited out. What
        was begun goes on when this call is cancelled, until the backend is stopped.
        """
        self.configuration = configuration
        names = {**self._in_force, **configuration.triggers}
        for change in [self._change(name) for name in names if self._differs(name)]:
            await change.on_its_way.wait()

    async def settled(self) -> None:
        """Return once no trigger is changing, those included that waited for their events in flight."""
        while self._changes:
            await asyncio.wait({change.task for change in self._changes.values()})

    # One trigger.

    def _differs(self, name: str) -> bool:
        return self._in_force.get(name) != self.configuration.triggers.get(name)

    def _change(self, name: str) -> "_Change":
        """The change that is under way, which heeds the newest configuration, or a new one."""
        if name not in self._changes:
            change = self._changes[name] = _Change()
            change.task = asyncio.create_task(self._converge(name, change), name=f"change trigger {name}")
        return self._changes[name]

    async def _converge(self, name: str, change: "_Change") -> None:
        """The trigger is what the newest configuration says; or the backend was stopped."""
        backoff = GrowingDelay()
        try:
            while self._differs(name):
                try:
                    await self._step(name, self._in_force.get(name), self.configuration.triggers.get(name), change)
                    continue
                except NotRunningError:
                    return
                except Exception as error:  # noqa: BLE001 - whatever it is, no trigger may stay unsubscribed for it
                    if isinstance(error, SubscriptionBusyError):
                        # What another process has at work may take long; nobody need wait for it here.
                        change.on_its_way.set()
                    if isinstance(error, DatabaseError | SubscriptionBusyError):
                        facts.emit("trigger not changed yet", level=logging.WARNING, trigger=name, error=str(error))
                    else:
                        facts.emit("trigger change failed", level=logging.ERROR, trigger=name, exc_info=error)
                        change.on_its_way.set()
                await backoff.wait()
        finally:
            # Together, without an await: who asks later begins a change of its own.
            del self._changes[name]
            change.on_its_way.set()

    async def _step(self, name: str, old: Trigger | None, new: Trigger | None, change: "_Change") -> None:
        """What is wanted is in force, if nothing goes wrong."""
        if new is None:
            # Waits for requests that are open; for a target that hangs, until the backend's `drain_timeout`. Then they
            # are cut short, and their events, which nobody has settled, are dispatched again when somebody subscribes.
            change.on_its_way.set()
            with suppress(SubscriptionNotFoundError):  # this was tried before, and failed on the way
                await self._backend.unsubscribe(name)
            del self._in_force[name]
            if self._metrics is not None:
                self._metrics.forget(name)
            facts.emit("trigger removed", trigger=name)
            return
        if old is None or _terms(old) != _terms(new):
            if old is not None:
                # It rests until its open requests have ended: as above.
                change.on_its_way.set()
            # What is new here may be in the log, from before a restart. Altered first: what it is told to do now goes
            # for events that it gets in the new way.
            with suppress(SubscriptionNotFoundError):
                if new.order == "strict":
                    # It can become so with a single shard only.
                    await self._backend.reshard(name, new.shards)
                await self._backend.alter_subscription(name, order=new.order, end=new.end, start=new.start)
                await self._backend.reshard(name, new.shards)
        if old is None:
            await self._backend.subscribe(
                name, order=new.order, end=new.end, start=new.start, shards=new.shards, **self._dispatching(name, new)
            )
        else:
            await self._backend.reconfigure(name, **self._dispatching(name, new))
        self._in_force[name] = new
        facts.emit("trigger added" if old is None else "trigger changed", trigger=name)

    def _dispatching(self, name: str, trigger: Trigger) -> "_Dispatching":
        """How the backend is to dispatch the trigger's events."""
        options = trigger.delivery_options
        dispatcher: ConsumerDispatcher = refuse_without_target
        if trigger.target.url is not None:
            dispatcher = self._delivery(name, trigger, trigger.target.url)
        dead_letter: ConsumerDispatcher | None = None
        if options.dead_letter_url is not None:
            dead_letter = DeadLetterDelivery(self._delivery(name, trigger, options.dead_letter_url, is_target=False))
        return {
            "dispatcher": dispatcher,
            "dead_letter": dead_letter,
            "filter": trigger.predicate,
            "concurrency": trigger.concurrency,
            "retry": options.policy(),
        }

    def _delivery(self, name: str, trigger: Trigger, url: URL, *, is_target: bool = True) -> Delivery:
        return Delivery(
            self._session,
            url,
            trigger=name,
            timeout=trigger.delivery_options.timeout,
            mode=trigger.target.mode,
            header_coding=trigger.target.header_coding if is_target else "percent",
            # The target's alone: they may hold its secrets, and the other is another party. Its numbers as well.
            headers=trigger.target.headers if is_target else None,
            metrics=self._metrics.trigger(name) if is_target and self._metrics is not None else None,
            reply=self._backend.produce_many,
            hops=self._hops,
            replies=self._replies,
            connections=self._target_connections,
            tracing=self._tracing,
        )


class _Change:
    """A trigger on its way to what is wanted."""

    def __init__(self) -> None:
        self.task: asyncio.Task[None]
        self.on_its_way = asyncio.Event()
        """Set once nobody need wait for it: it is done, or waits for events in flight, or for somebody to help."""


class _Dispatching(TypedDict):
    """What `subscribe()` and `reconfigure()` are both told."""

    dispatcher: "ConsumerDispatcher"
    dead_letter: "ConsumerDispatcher | None"
    filter: "EventFilter | None"
    concurrency: int
    retry: "Retry"


def _terms(trigger: Trigger) -> tuple[str, int, int | datetime | None, int | datetime | None]:
    """What the log keeps of a trigger: its order, its shards, its end and the bound it began at."""
    start = trigger.start if isinstance(trigger.start, int | datetime) else None
    return trigger.order, trigger.shards, trigger.end, start
