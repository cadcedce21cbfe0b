"""The deliverers of a shard: standing tasks that dispatch one event after the other.

A task for each event would cost 6 µs each. A deliverer lives until fewer are wanted, or until a dispatcher left
something behind in its task: a changed context variable, a cancellation. Then another one takes its place.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import copy_context
from typing import Any

from pgbackend.codec.event import Event
from pgbackend.delivery import turns
from pgbackend.delivery.backlog import Backlog
from pgbackend.delivery.gate import Gate
from pgbackend.delivery.registration import Dispatch, Registration, complete


class Deliverer:
    """One of them: its task, and the one function that calls a dispatcher."""

    __slots__ = ("_active", "_context", "_gate", "_pool", "_task", "_turn", "spent")

    def __init__(self, pool: "Deliverers", gate: Gate) -> None:
        """Made in the task that dispatches."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - deliverers are tasks
        self._task: asyncio.Task[Any] = task
        self._gate = gate
        self._active = gate.active
        self._pool = pool
        self._turn = turns.mine()
        self._context = copy_context()
        self.spent = False
        """Whether the next event must not run in this task."""

    async def dispatch(self, slot: int, event: Event, dispatch: Dispatch) -> BaseException | None:
        """Call a dispatcher with an event. Returns what it raised, None if it handled the event.

        Raises what ends the deliverer itself, such as its cancellation. The event is at work until this returns.
        """
        active = self._active
        active[slot] = self._turn.event = event
        try:
            if (result := await dispatch(event)) is not None:
                await complete(result)
        except BaseException as error:
            if self._is_cut_off(error):
                raise
            return error
        else:
            return None
        finally:
            del active[slot]
            if not active and self._gate.halted:
                self._gate.quiet.set()
            try:
                # A copy that nobody changed compares equal at once, in 0.1 µs.
                if copy_context() != self._context or self._task.cancelling():
                    self.spent = True
            except Exception:  # noqa: BLE001 - comparing the values of users' variables may raise anything
                self.spent = True

    async def idle(self) -> None:
        """Return when there is something to do."""
        await self._pool.idle()

    def wake_next(self) -> None:
        """Have another deliverer take what is left."""
        self._pool.wake()

    def _is_cut_off(self, error: BaseException) -> bool:
        """Whether a dispatch ends because its deliverer does. Everything else is a failure of its event."""
        # By its type: `isinstance()` would also ask the object, whose answer may raise.
        if issubclass(type(error), asyncio.CancelledError):
            return self._pool.is_ending()
        # The interpreter closes a coroutine that nobody runs any more.
        return issubclass(type(error), GeneratorExit) and not _is_running(self._task)


class Deliverers:
    """As many as the registration's concurrency allows, made when there is work for them."""

    def __init__(
        self,
        name: str,
        registration: Registration,
        gate: Gate,
        backlog: Backlog,
        *,
        single: bool,
        step: Callable[[Deliverer], Awaitable[None]],
    ) -> None:
        """`single`: one deliverer, whatever the concurrency. `step`: does the most urgent thing, or calls `idle()`."""
        self._name = name
        self._backlog = backlog
        self._registration = registration
        self._gate = gate
        self._single = single
        self._step = step
        self._wanted = self._spare = self._count()
        """How many there may be, and how many of these may still be made. Below 0, as many have to go."""
        self._idle: list[asyncio.Future[None]] = []
        self._tasks: asyncio.TaskGroup | None = None
        self._runner: asyncio.Task[Any] | None = None
        self._ended = False

    async def run(self) -> None:
        """Dispatch until cancelled. When this returns, no deliverer is left."""
        self._runner = asyncio.current_task()
        async with asyncio.TaskGroup() as self._tasks:
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                # Before the deliverers are cancelled: one whose dispatcher swallows that ends by this.
                self._ended = True
                self._gate.stop()

    def wake(self) -> None:
        """If something can be taken, wake an idle deliverer or make one. It wakes the next when there is more."""
        if not self._backlog:
            return
        while self._idle:
            future = self._idle.pop()
            if not future.done():
                future.set_result(None)
                return
        # An ending task group takes no more tasks.
        if self._spare > 0 and self._tasks is not None and not self._gate.halted:
            self._spare -= 1
            context = turns.begin(self._registration.context.copy())
            self._tasks.create_task(self._deliver(), name=f"deliver {self._name}", context=context)

    def wake_all(self) -> None:
        """Wake all idle deliverers: some may have to go, and each of the others finds work or sleeps again."""
        idle, self._idle = self._idle, []
        for future in idle:
            if not future.done():
                future.set_result(None)
        self.wake()

    def resize(self) -> None:
        """Follow the registration's concurrency."""
        before, self._wanted = self._wanted, self._count()
        self._spare += self._wanted - before
        self.wake_all()

    async def idle(self) -> None:
        """Return when there is something to do."""
        future = asyncio.get_running_loop().create_future()
        self._idle.append(future)
        try:
            await future
        finally:
            if future in self._idle:
                self._idle.remove(future)

    async def _deliver(self) -> None:
        deliverer = Deliverer(self, self._gate)
        registered = self._registration.context
        try:
            while not (
                self._gate.stopped or self._spare < 0 or deliverer.spent or registered is not self._registration.context
            ):
                await self._step(deliverer)
        except asyncio.CancelledError:
            if self.is_ending():
                raise
            # A dispatcher asked for it, and has returned since.
        self._spare += 1
        self.wake()

    def is_ending(self) -> bool:
        """Whether a cancellation is meant for all deliverers: the task that runs them is then cancelled before them."""
        return self._ended or (self._runner is not None and self._runner.cancelling() > 0)

    def _count(self) -> int:
        # Transactions of a shard run one after the other.
        return 1 if self._single or self._registration.handling.transactional else self._registration.concurrency


def _is_running(task: "asyncio.Task[Any]") -> bool:
    try:
        return asyncio.current_task() is task
    except RuntimeError:  # there is no event loop any more
        return False
