"""A subscription as this process runs it: where its events go and how, exchanged while it runs.

Its pumps look here before each dispatch. `reconfigure()` exchanges everything within one step of the event loop, and
retires the health of the target that was. That is the one flag which a pump in the middle of dispatching looks at
anyway, so it looks here again before the next event: following costs the hot path nothing.

What is stored of the subscription (its order, its bounds) is not here: it comes with each lease.
"""

import asyncio
import contextvars
import inspect
import logging
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from pgbackend import facts
from pgbackend.event import Event
from pgbackend.failures import describe
from pgbackend.health import TargetHealth
from pgbackend.model import ConsumerDispatcher, EventFilter
from pgbackend.retry import Retry

Dispatch = Callable[[Event], Coroutine[Any, Any, object]]


class Registration:
    """What `subscribe()` was given for this process, or `reconfigure()` since."""

    filter: EventFilter | None
    concurrency: int
    retry: Retry
    dispatch: Dispatch
    """The dispatcher as a coroutine function."""
    dispatch_dead: Dispatch | None
    health: TargetHealth
    threads: ThreadPoolExecutor | None

    def __init__(
        self,
        name: str,
        *,
        dispatcher: ConsumerDispatcher,
        dead_letter: ConsumerDispatcher | None,
        filter: EventFilter | None,  # noqa: A002 - the word that everybody uses
        concurrency: int,
        retry: Retry,
    ) -> None:
        self.name = name
        self.resting = 0
        """How many calls are at work on what is stored of it: none of its shards is claimed meanwhile."""
        self._configure(dispatcher, dead_letter, filter, concurrency, retry)

    def reconfigure(
        self,
        *,
        dispatcher: ConsumerDispatcher,
        dead_letter: ConsumerDispatcher | None,
        filter: EventFilter | None,  # noqa: A002 - as above
        concurrency: int,
        retry: Retry,
    ) -> None:
        """From now on this counts; what is being dispatched ends as it began. Its pumps are to be told."""
        before = self.health
        reason = before.paused
        # What threads have been given they still do: nobody cancels it, and nobody waits for it.
        self.close()
        self._configure(dispatcher, dead_letter, filter, concurrency, retry)
        before.retire()
        if reason is not None:
            facts.emit("subscription resumed", subscription=self.name, reason=reason)

    def passes(self, event: Event) -> bool:
        """Whether the filter lets the event through."""
        try:
            return self.filter is None or bool(self.filter(event))
        except Exception as error:  # noqa: BLE001 - a user's predicate may raise anything
            # Neither matched nor not: dispatch decides, as it would for an event that cannot be handled.
            facts.emit(
                "filter failed", level=logging.ERROR, subscription=self.name, position=event.position,
                event_id=event.id, event_source=event.source, error=describe(error),
            )  # fmt: skip
            return True

    def close(self, *, cancel: bool = False) -> None:
        """Its threads end when they have done what they were given; what none has begun is cancelled if so wanted."""
        if self.threads is not None:
            self.threads.shutdown(wait=False, cancel_futures=cancel)

    def _configure(
        self,
        dispatcher: ConsumerDispatcher,
        dead_letter: ConsumerDispatcher | None,
        filter: EventFilter | None,  # noqa: A002 - as above
        concurrency: int,
        retry: Retry,
    ) -> None:
        self.filter = filter
        self.concurrency = concurrency
        self.retry = retry
        self.threads = None
        self.dispatch = self._as_async(dispatcher)
        self.dispatch_dead = self._as_async(dead_letter) if dead_letter is not None else None
        self.health = TargetHealth(retry)

    def _as_async(self, dispatcher: ConsumerDispatcher) -> Dispatch:
        """The dispatcher as a coroutine function; plain functions run in the subscription's own threads."""
        plain = dispatcher.func if isinstance(dispatcher, partial) else dispatcher
        if inspect.iscoroutinefunction(plain) or inspect.iscoroutinefunction(getattr(plain, "__call__", None)):  # noqa: B004
            return dispatcher  # type: ignore[return-value] # just seen
        if self.threads is None:
            self.threads = ThreadPoolExecutor(max_workers=self.concurrency, thread_name_prefix=f"pgbackend {self.name}")
        threads = self.threads

        def call(event: Event) -> object:
            try:
                return dispatcher(event)
            except StopIteration as error:
                # No future carries it: on 3.11 it would wait for ever.
                raise RuntimeError("the dispatcher raised StopIteration") from error

        async def in_thread(event: Event) -> None:
            context = contextvars.copy_context()
            result = await asyncio.get_running_loop().run_in_executor(threads, context.run, call, event)
            if inspect.isawaitable(result):
                # A plain callable that returns an awaitable, such as a lambda around a coroutine function.
                await result

        return in_thread
