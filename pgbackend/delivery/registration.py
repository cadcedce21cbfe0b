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
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncContextDecorator, ContextDecorator
from functools import partial
from typing import Any

from pgbackend import facts
from pgbackend.codec.event import Event
from pgbackend.delivery import turns
from pgbackend.delivery.health import TargetHealth
from pgbackend.errors import shown
from pgbackend.failures import describe, leave_process
from pgbackend.model import MAX_SHARDS, ConsumerDispatcher, EventFilter
from pgbackend.retry import Retry

Dispatch = Callable[[Event], Coroutine[Any, Any, object]]

_LAYERS = 16
"""How many partials and callable objects may stand around a function."""


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
    context: contextvars.Context
    """The context of the call that gave the dispatcher: each event's handling starts with it. Only copies are run."""

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

    def passes(self, event: Event, doubts: set[int]) -> bool:
        """Whether the filter lets the event through; True as well when the filter fails, and then it is in doubt.

        `doubts`: the positions whose events the filter has not decided on. It is asked again when such an event is
        dispatched, and what it throws then is a failure of that event.
        """
        try:
            verdict = self.matches(event)
        except BaseException as error:  # noqa: BLE001 - a user's predicate may raise anything
            facts.emit(
                "filter failed", level=logging.ERROR, subscription=self.name, position=event.position,
                event_id=event.id, event_source=event.source, error=describe(error),
            )  # fmt: skip
            leave_process(error, subscription=self.name, position=event.position)
            doubts.add(event.position)
            return True
        if doubts:
            doubts.discard(event.position)
        return verdict

    def matches(self, event: Event) -> bool:
        """What the filter says. Raises what it raises, and TypeError when it says nothing that can be used."""
        if self.filter is None:
            return True
        verdict: object = self.context.copy().run(self.filter, event)
        if verdict is True or verdict is False:
            return verdict
        if _is_not_run(verdict):
            raise _not_run("filter", verdict)
        return bool(verdict)

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
        self.context = contextvars.copy_context()
        self.filter = filter
        self.concurrency = concurrency
        self.retry = retry
        self.threads = None
        self.dispatch = self._as_async(dispatcher)
        self.dispatch_dead = self._as_async(dead_letter) if dead_letter is not None else None
        self.health = TargetHealth(retry)

    def _as_async(self, dispatcher: ConsumerDispatcher) -> Dispatch:
        """The dispatcher as a coroutine function; plain functions run in the subscription's own threads."""
        if is_async(dispatcher):
            return dispatcher  # type: ignore[return-value] # just seen
        if self.threads is None:
            self.threads = ThreadPoolExecutor(
                # Made as they are needed. Each shard's deliverers see to it that no more are at work in a shard than
                # `concurrency` says, for plain functions and coroutines alike.
                max_workers=self.concurrency * MAX_SHARDS,
                thread_name_prefix=f"pgbackend {self.name}",
            )
        threads = self.threads

        def call(event: Event) -> object:
            try:
                return dispatcher(event)
            except StopIteration as error:
                # No future carries it: on 3.11 it would wait for ever.
                raise RuntimeError("the dispatcher raised StopIteration") from error

        async def in_thread(event: Event) -> object:
            context = turns.begin(contextvars.copy_context(), event)
            return await asyncio.get_running_loop().run_in_executor(threads, context.run, call, event)

        return in_thread


async def complete(result: object) -> None:
    """Await what a dispatcher has returned, such as the coroutine that a lambda made.

    Raises TypeError for a result that nothing runs: a generator, or one more thing to await.
    """
    if inspect.isawaitable(result):
        result = await result
    if _is_not_run(result):
        raise _not_run("dispatcher", result)


def is_async(function: object) -> bool:
    """Whether calling it makes a coroutine."""
    return any(inspect.iscoroutinefunction(layer) for layer in _layers(function))


def is_generator(function: object) -> bool:
    """Whether calling it makes a generator, of either kind: nothing of its body has run by then."""
    return any(inspect.isgeneratorfunction(layer) or inspect.isasyncgenfunction(layer) for layer in _layers(function))


def _layers(function: object) -> Iterator[object]:
    """The function, and what is called by calling it: behind partials, and an object's `__call__`."""
    for _ in range(_LAYERS):
        yield function
        if isinstance(function, partial):
            function = function.func
        elif inspect.isroutine(function) or inspect.isclass(function):
            return
        else:
            function = getattr(function, "__call__", None)  # noqa: B004 - its code is what is looked at


def _is_not_run(result: object) -> bool:
    # The decorators are what functions with @contextmanager or @asynccontextmanager return.
    return inspect.isawaitable(result) or isinstance(
        result, (Generator, AsyncGenerator, ContextDecorator, AsyncContextDecorator)
    )


def _not_run(role: str, result: object) -> TypeError:
    if inspect.iscoroutine(result):
        # Python would warn as well that nobody awaited it.
        result.close()
    return TypeError(f"the {role} returned {shown(result)}, which nothing runs: return once the work is done")
