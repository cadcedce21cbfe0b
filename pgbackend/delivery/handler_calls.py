"""Calls that a handler makes to its own backend and that wait for events at work, such as `stop()` or `seek()`.

Such a call must not wait for the handler's own event, which ends only after the call. Nor may handlers that make such
calls wait for each other. So the call returns once only such handlers are at work, and goes on in the background: it
takes effect when they have returned and their events are committed.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Coroutine
from typing import Any

from pgbackend import facts
from pgbackend.codec.event import Event
from pgbackend.delivery import turns
from pgbackend.delivery.registration import Registration
from pgbackend.delivery.runner import Runner
from pgbackend.thrown import describe

_POLL = 0.01
"""Seconds between two looks at which events are at work."""


class HandlerCalls:
    """Knows which handlers are in such calls, and which calls go on after they have returned."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._calling: Counter[int] = Counter()
        """How many such calls the handler of each event is in, by the event's `id()`."""
        self._in_background: set[asyncio.Task[None]] = set()

    async def make(self, call: Coroutine[Any, Any, None], registration: Registration) -> None:
        """Make a call that waits for events of a subscription. From a handler it may return before the call ends."""
        event = self._own_event()
        if event is None:
            await call
            return
        task = asyncio.create_task(call, name="call from a handler", context=turns.outside())
        try:
            goes_on = await self._must_return_before(task, event, registration)
        except BaseException:
            task.cancel()
            raise
        if goes_on:
            self._in_background.add(task)
            task.add_done_callback(self._on_call_ended)
        else:
            task.result()

    async def must_return_before(self, task: "asyncio.Task[None]") -> bool:
        """Whether the caller is a handler whose event the task waits for. Otherwise it may wait for the task."""
        event = self._own_event()
        return event is not None and await self._must_return_before(task, event, None)

    async def drain(self, timeout: float) -> None:
        """The calls in the background have ended, or `timeout` seconds have passed."""
        if self._in_background:
            await asyncio.wait(self._in_background, timeout=timeout)

    def cancel(self) -> None:
        """Cancel the calls in the background."""
        for task in self._in_background:
            task.cancel()

    def _own_event(self) -> Event | None:
        """The event whose handler is calling, or a task or thread of it, while that event is at work."""
        event, worker = turns.current(), self._runner.worker
        is_here = event is not None and worker is not None and worker.pumps.is_at_work(event)
        return event if is_here else None

    async def _must_return_before(
        self, task: "asyncio.Task[None]", event: Event, registration: Registration | None
    ) -> bool:
        """Whether only handlers that are in such calls are at work, so that the task cannot end before they return."""
        self._calling[id(event)] += 1
        try:
            while not task.done():
                worker = self._runner.worker
                waited_for = worker.pumps.holding_up(registration) if worker is not None else []
                if waited_for and all(self._calling[id(other)] for other in waited_for):
                    return True
                await asyncio.wait({task}, timeout=_POLL)
            return False
        finally:
            self._calling[id(event)] -= 1
            self._calling += Counter()  # drops what is at zero

    def _on_call_ended(self, task: "asyncio.Task[None]") -> None:
        self._in_background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            facts.emit("call from a handler failed", level=logging.ERROR, error=describe(error))
