"""The one contract of all actors, as a stress test: start, use, cancel at every await, twice, before the start, drain.

An actor is an object with `run()`, which works until it is cancelled, and perhaps `drain()`, after which `run()` ends
by itself. The contract:

- A cancelled `run()` ends with `CancelledError`, at whatever await the cancellation lands, in it or in a task of its
  own, and also when it is cancelled a second time while it cleans up.
- `drain()` returns before `run()`, after it, twice, and while `run()` is being cancelled.
- A second `run()` works, returns, or raises an error of this package. It never hangs.
- After each of these, every task and thread that the actor made has ended, and its connections are closed. A fresh
  actor works.

Cancellations land on numbered steps. A step is one suspension of `run()` or of any task below it: the tests count them
through the loop's task factory, so that no await is missed, and none depends on time.
"""

import asyncio
import inspect
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator
from contextlib import asynccontextmanager, suppress
from contextvars import Context, ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from pgbackend.errors import PgBackendError

PATIENCE = 30.0
"""Seconds in which an actor has to become useful, or to end. It takes them only when the contract is broken."""


class Actor(Protocol):
    async def run(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Lifecycle:
    """How one kind of actor is made and used."""

    make: Callable[[], Actor]
    """A fresh actor, on dependencies that all actors of a test share."""
    use: Callable[[Any], Awaitable[object]]
    """Returns once the running actor has done what it is for."""
    end: Callable[[Any], Awaitable[object]] | None = None
    """Called after each `run()`, where the actor's docstring says that something may outlast a cancelled `run()`."""


async def cancel_before_it_starts(lifecycle: Lifecycle) -> None:
    actor = lifecycle.make()
    async with nothing_left(lifecycle, actor, "cancelled before it started"):
        running = asyncio.create_task(actor.run(), name="run")
        running.cancel()
        await _ended(running)
        assert running.cancelled()
    await use_a_fresh_one(lifecycle)


async def cancel_at_every_step(lifecycle: Lifecycle, *, again: bool = False, stride: Callable[[int], int]) -> int:
    """How many steps were cancelled.

    `stride(step)` says how far the next one is. `again` cancels a second time, one step later.
    """
    step, cancelled = 1, 0
    while await cancel_at(lifecycle, step, again=again):
        cancelled += 1
        step += stride(step)
    await use_a_fresh_one(lifecycle)
    return cancelled


async def cancel_at(lifecycle: Lifecycle, step: int, *, again: bool = False) -> bool:
    """Whether the actor took so many steps before it was of use."""
    actor = lifecycle.make()
    async with nothing_left(lifecycle, actor, f"cancelled at step {step}"):
        steps = Steps(at={step, step + 1} if again else {step})
        running = steps.start(actor.run())
        using = asyncio.create_task(_use(lifecycle, actor), name="use")
        await asyncio.wait({running, using}, timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED)
        was_reached = steps.taken >= step
        if not was_reached:
            assert using.done(), f"neither of use nor ended within {PATIENCE:g} s, at step {steps.taken}"
            using.result()
            running.cancel()
        await _ended(running)
        assert running.cancelled(), f"cancelled at step {step}, it ended with {running!r}"
        using.cancel()
        with suppress(asyncio.CancelledError, PgBackendError):
            await using
    return was_reached


async def run_again(lifecycle: Lifecycle) -> None:
    actor = lifecycle.make()
    async with nothing_left(lifecycle, actor, "run a second time"):
        for _ in range(2):
            running = asyncio.create_task(actor.run(), name="run")
            using = asyncio.create_task(_use(lifecycle, actor), name="use")
            await asyncio.wait({running, using}, timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED)
            assert running.done() or using.done(), "neither of use nor ended"
            running.cancel()
            using.cancel()
            for task in (running, using):
                with suppress(asyncio.CancelledError, PgBackendError):
                    await _ended(task)
                    task.result()
    await use_a_fresh_one(lifecycle)


async def drain_before_it_runs(lifecycle: Lifecycle) -> None:
    actor = lifecycle.make()
    async with nothing_left(lifecycle, actor, "drained before it ran"):
        await _drain(actor)
        running = asyncio.create_task(actor.run(), name="run")
        await _ended(running)
        with suppress(PgBackendError):
            running.result()
    await use_a_fresh_one(lifecycle)


async def drain_twice(lifecycle: Lifecycle) -> None:
    actor = lifecycle.make()
    async with nothing_left(lifecycle, actor, "drained twice"):
        running = asyncio.create_task(actor.run(), name="run")
        await _use(lifecycle, actor)
        await asyncio.gather(_drain(actor), _drain(actor))
        await _ended(running)
        running.result()
        await _drain(actor)
    await use_a_fresh_one(lifecycle)


async def drain_while_it_is_cancelled(lifecycle: Lifecycle) -> None:
    actor = lifecycle.make()
    async with nothing_left(lifecycle, actor, "drained while it was cancelled"):
        running = asyncio.create_task(actor.run(), name="run")
        await _use(lifecycle, actor)
        draining = asyncio.create_task(_drain(actor), name="drain")
        await asyncio.sleep(0)
        running.cancel()
        await _ended(running)
        await _ended(draining)
        draining.result()
    await use_a_fresh_one(lifecycle)


async def use_a_fresh_one(lifecycle: Lifecycle) -> None:
    """A fresh actor works, and ends when it is cancelled."""
    actor = lifecycle.make()
    running = asyncio.create_task(actor.run(), name="run")
    using = asyncio.create_task(_use(lifecycle, actor), name="use")
    await asyncio.wait({running, using}, timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED)
    assert using.done(), f"a fresh actor is of no use: {running!r}"
    using.result()
    running.cancel()
    await _ended(running)


class Steps:
    """Counts the suspensions of a coroutine and of all tasks below it, and cancels the coroutine's task at some."""

    def __init__(self, *, at: set[int]) -> None:
        self.taken = 0
        self._at = at
        self._task: asyncio.Task[None] | None = None

    def start(self, run: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """The task that runs it; its context tells the tasks below it apart from all others."""
        loop = asyncio.get_running_loop()
        if loop.get_task_factory() is not _make_task:
            loop.set_task_factory(_make_task)
        context = Context()
        context.run(_steps.set, self)
        self._task = loop.create_task(run, name="run", context=context)
        return self._task

    def take(self) -> None:
        self.taken += 1
        if self.taken in self._at and self._task is not None:
            self._task.cancel()


_steps: ContextVar[Steps | None] = ContextVar("steps", default=None)


class _Counted(Coroutine[Any, Any, Any]):
    """A coroutine that takes a step each time it is suspended.

    The task that is cancelled at that moment hands the cancellation to what the coroutine waits for, as always.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, Any], steps: Steps) -> None:
        self._coroutine = coroutine
        self._steps = steps

    def send(self, value: Any) -> Any:
        suspended = self._coroutine.send(value)
        self._steps.take()
        return suspended

    def throw(self, *error: Any) -> Any:
        suspended = self._coroutine.throw(*error)
        self._steps.take()
        return suspended

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        raise NotImplementedError  # it is the outermost coroutine of a task


def _make_task(
    loop: asyncio.AbstractEventLoop, coroutine: Any, *, context: Context | None = None
) -> "asyncio.Task[Any]":
    steps = context.get(_steps) if context is not None else _steps.get()
    if steps is not None and inspect.iscoroutine(coroutine):
        coroutine = _Counted(coroutine, steps)
    return asyncio.Task(coroutine, loop=loop, context=context)


@asynccontextmanager
async def nothing_left(lifecycle: Lifecycle, actor: Actor, when: str) -> AsyncIterator[None]:
    """At the end no task runs that did not before, and no thread of this package."""
    tasks, threads = asyncio.all_tasks(), set(threading.enumerate())
    yield
    if lifecycle.end is not None:
        await lifecycle.end(actor)
    for _ in range(10):
        await asyncio.sleep(0)  # the callbacks of what has just ended
    left = sorted(task.get_name() for task in asyncio.all_tasks() - tasks if not task.done())
    assert not left, f"{when}, it leaves tasks: {left}"
    for thread in set(threading.enumerate()) - threads:
        if thread.name.startswith("pgbackend"):
            # It has said that it ends, and needs a moment for the last line of it.
            await asyncio.to_thread(thread.join, 1.0)
            assert not thread.is_alive(), f"{when}, it leaves the thread {thread.name!r}"


async def _use(lifecycle: Lifecycle, actor: Actor) -> None:
    await lifecycle.use(actor)


async def _drain(actor: Any) -> None:
    async with asyncio.timeout(PATIENCE):
        await actor.drain()


async def _ended(task: "asyncio.Task[Any]") -> None:
    """Return once the task has ended; fails when it does not in time."""
    await asyncio.wait({task}, timeout=PATIENCE)
    assert task.done(), f"it does not end: {task!r}"
