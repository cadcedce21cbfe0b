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
from dataclasses import dataclass
from functools import partial
from typing import Any

from pgbackend import facts
from pgbackend.codec.event import Event
from pgbackend.delivery import turns
from pgbackend.delivery.health import TargetHealth
from pgbackend.delivery.pausing import Hold, Pausing
from pgbackend.errors import shown
from pgbackend.model import MAX_SHARDS, Dispatcher, EventFilter
from pgbackend.retry import Retry
from pgbackend.subscriptions.pauses import PauseState
from pgbackend.thrown import Thrown, describe, leave_process

Dispatch = Callable[..., Coroutine[Any, Any, object]]
"""Takes what its dispatcher takes: an event or a list of them, and a connection in transactional subscriptions."""

_LAYERS = 16
"""How many partials and callable objects may wrap a function."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Handling:
    """How a process handles the events of a subscription: the options of `subscribe()` that are not stored."""

    dispatcher: Dispatcher
    dead_letter: Dispatcher | None
    filter: EventFilter | None
    concurrency: int
    retry: Retry
    transactional: bool
    """Whether dispatchers get a connection, in whose transaction the offset is committed too."""
    batch: int | None
    """How many events dispatchers get at once, at most, as a list. None: one, and no list."""
    batch_wait: float
    """Seconds that a batch waits to be full."""
    target: str | None
    """The target that the dispatcher works for, in the user's words. It is stored, too: another one ends its pause."""


class Registration:
    """The subscription as the last `subscribe()` or `reconfigure()` has it."""

    handling: Handling
    filter: EventFilter | None
    concurrency: int
    retry: Retry
    grouped: bool
    """Whether events are dispatched in batches, or in transactions."""
    dispatch: Dispatch
    """The dispatcher as a coroutine function."""
    dispatch_dead: Dispatch | None
    health: TargetHealth
    threads: ThreadPoolExecutor | None
    context: contextvars.Context
    """The context of the call that gave the dispatcher. Each event is handled in a copy of it."""

    def __init__(self, name: str, handling: Handling) -> None:
        self.name = name
        self.changing = 0
        """How many calls change its stored terms now. None of its shards is claimed meanwhile."""
        self.pausing = Pausing()
        self._configure(handling)

    @property
    def most_at_work(self) -> int:
        """The most events that a shard has at work."""
        calls = 1 if self.handling.transactional else self.concurrency
        return calls * (self.handling.batch or 1)

    def reconfigure(self, handling: Handling) -> None:
        """Exchange everything. Running dispatches end as they began; tell the pumps after this."""
        before, hold, old_target = self.health, self.pausing.hold, self.handling.target
        # Threads finish what they were given. Nothing cancels it, and nothing waits for it.
        self.close()
        self._configure(handling)
        before.retire()
        if handling.target is None or handling.target != old_target:
            self.pausing.reconfigure(handling.target)
        self._follow_pause(hold)

    def pause(self, event: Event, signal: Thrown) -> bool:
        """Its dispatcher wants nothing more. Returns whether that is news."""
        reason = signal.reason or "no reason was given"
        is_news = self.pausing.pause(reason)
        if is_news:
            self.health.pause(reason)
            facts.emit(
                "subscription paused", level=logging.WARNING,
                subscription=self.name, by="dispatcher", reason=reason, position=event.position,
                event_id=event.id, event_source=event.source, details=signal.details,
            )  # fmt: skip
        return is_news

    def heed(self, state: PauseState | None) -> bool:
        """Obey what is stored about its pause. Returns whether that changes anything here."""
        hold = self.pausing.hold
        self.pausing.heed(state)
        return self._follow_pause(hold)

    def _follow_pause(self, before: Hold | None) -> bool:
        """Dispatch or not, as the pause says now; whether that differs from `before`."""
        now = self.pausing.hold
        self.health.pause(None if now is None else now.reason)
        if (now and now.by) == (before and before.by):
            # Perhaps for another reason: two processes may have raised it at once.
            return False
        if now is not None:
            facts.emit(
                "subscription paused", level=logging.WARNING, subscription=self.name, by=now.by, reason=now.reason
            )
        elif before is not None:
            facts.emit("subscription resumed", subscription=self.name, by=before.by, reason=before.reason)
        return True

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

    def _configure(self, handling: Handling) -> None:
        self.handling = handling
        self.context = contextvars.copy_context()
        self.filter = handling.filter
        self.concurrency = handling.concurrency
        self.retry = handling.retry
        self.grouped = handling.transactional or handling.batch is not None
        self.threads = None
        self.dispatch = self._as_async(handling.dispatcher)
        self.dispatch_dead = self._as_async(handling.dead_letter) if handling.dead_letter is not None else None
        self.health = TargetHealth(handling.retry)

    def _as_async(self, dispatcher: Dispatcher) -> Dispatch:
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

        def call(work: Event | list[Event]) -> object:
            try:
                return dispatcher(work)  # type: ignore[arg-type,call-arg] # as `batch` says
            except StopIteration as error:
                # No future carries StopIteration: on 3.11 the call would wait for ever.
                raise RuntimeError("the dispatcher raised StopIteration") from error

        async def in_thread(work: Event | list[Event]) -> object:
            context = turns.begin(contextvars.copy_context(), work[0] if isinstance(work, list) else work)
            return await asyncio.get_running_loop().run_in_executor(threads, context.run, call, work)

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
