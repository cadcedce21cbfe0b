"""A registration: a subscription as this process runs it, its dispatchers, filter and policy.

Deliverers look here before each dispatch. `reconfigure()` exchanges everything in one step of the event loop and
retires the target's health. Deliverers read that flag anyway, so they notice at no cost. The stored terms of the
subscription (order, bounds) are not here: they come with each lease.
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
from pgbackend.model import MAX_SHARDS, ConsumerDispatcher, EventFilter
from pgbackend.retry import Retry
from pgbackend.thrown import describe, leave_process

Dispatch = Callable[[Event], Coroutine[Any, Any, object]]

_LAYERS = 16
"""How many partials and callable objects may wrap a function."""


class Registration:
    """What `subscribe()` or `reconfigure()` was given last."""

    filter: EventFilter | None
    concurrency: int
    retry: Retry
    dispatch: Dispatch
    """The dispatcher as a coroutine function."""
    dispatch_dead: Dispatch | None
    health: TargetHealth
    threads: ThreadPoolExecutor | None
    context: contextvars.Context
    """The context of the call that gave the dispatcher. Each event is handled in a copy of it."""

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
        self.changing = 0
        """How many calls change its stored terms now. None of its shards is claimed meanwhile."""
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
        """Exchange everything. Running dispatches end as they began; tell the pumps after this."""
        before = self.health
        reason = before.paused
        # Threads finish what they were given. Nothing cancels it, and nothing waits for it.
        self.close()
        self._configure(dispatcher, dead_letter, filter, concurrency, retry)
        before.retire()
        if reason is not None:
            facts.emit("subscription resumed", subscription=self.name, reason=reason)

    def passes(self, event: Event, undecided: set[int]) -> bool:
        """Whether the filter lets the event through. If the filter raises, True, and the event is undecided.

        `undecided`: the positions of such events. The filter is asked again just before their dispatch, and what it
        raises then is a failure of the event.
        """
        try:
            verdict = self.matches(event)
        except BaseException as error:  # noqa: BLE001 - a user's predicate may raise anything
            facts.emit(
                "filter failed", level=logging.ERROR, subscription=self.name, position=event.position,
                event_id=event.id, event_source=event.source, error=describe(error),
            )  # fmt: skip
            leave_process(error, subscription=self.name, position=event.position)
            undecided.add(event.position)
            return True
        if undecided:
            undecided.discard(event.position)
        return verdict

    def matches(self, event: Event) -> bool:
        """The filter's answer. Raises what the filter raises, and TypeError if it returns what nothing runs."""
        if self.filter is None:
            return True
        verdict: object = self.context.copy().run(self.filter, event)
        if verdict is True or verdict is False:
            return verdict
        if _is_not_run(verdict):
            raise _not_run("filter", verdict)
        return bool(verdict)

    def close(self, *, cancel: bool = False) -> None:
        """Let its threads end once they did what they were given. `cancel`: drop what none has started."""
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
                # Threads are made as needed. The deliverers of each shard keep to `concurrency`.
                max_workers=self.concurrency * MAX_SHARDS,
                thread_name_prefix=f"pgbackend {self.name}",
            )
        threads = self.threads

        def call(event: Event) -> object:
            try:
                return dispatcher(event)
            except StopIteration as error:
                # No future carries StopIteration: on 3.11 the call would wait for ever.
                raise RuntimeError("the dispatcher raised StopIteration") from error

        async def in_thread(event: Event) -> object:
            context = turns.begin(contextvars.copy_context(), event)
            return await asyncio.get_running_loop().run_in_executor(threads, context.run, call, event)

        return in_thread


async def complete(result: object) -> None:
    """Await what a dispatcher returned, such as the coroutine that a lambda made.

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
    """Whether calling it makes a generator, sync or async: nothing of its body runs then."""
    return any(inspect.isgeneratorfunction(layer) or inspect.isasyncgenfunction(layer) for layer in _layers(function))


def _layers(function: object) -> Iterator[object]:
    """The function, and the functions that it wraps: behind partials, and an object's `__call__`."""
    for _ in range(_LAYERS):
        yield function
        if isinstance(function, partial):
            function = function.func
        elif inspect.isroutine(function) or inspect.isclass(function):
            return
        else:
            function = getattr(function, "__call__", None)  # noqa: B004 - its code is examined


def _is_not_run(result: object) -> bool:
    # Functions with @contextmanager or @asynccontextmanager return the decorators.
    return inspect.isawaitable(result) or isinstance(
        result, (Generator, AsyncGenerator, ContextDecorator, AsyncContextDecorator)
    )


def _not_run(role: str, result: object) -> TypeError:
    if inspect.iscoroutine(result):
        # Python would also warn that nobody awaited it.
        result.close()
    return TypeError(f"the {role} returned {shown(result)}, which nothing runs: return once the work is done")
