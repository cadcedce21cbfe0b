"""Dispatchers that record what they are handed, or hold it."""

import asyncio
import time
from collections.abc import Callable

from pgbackend.codec.event import Event
from tests.support.polling import eventually


class Catch:
    """Keeps the events that a subscription got, in order and with monotonic times. Fails where `fails` says so."""

    def __init__(self, fails: Callable[[Event], bool] = lambda _: False) -> None:
        self.fails = fails
        self.attempts: list[str] = []
        """The id of each dispatch."""
        self.ids: list[str] = []
        """The ids that were handled."""
        self.positions: list[int] = []
        self.at: dict[str, float] = {}

    async def __call__(self, event: Event) -> None:
        self.attempts.append(event.id)
        if self.fails(event):
            raise RuntimeError("the target is down")
        self.ids.append(event.id)
        self.positions.append(event.position)
        self.at.setdefault(event.id, time.monotonic())

    async def has(self, *ids: str, timeout: float = 30.0) -> None:
        """Return once these were handled."""

        async def caught() -> bool:
            return set(ids) <= self.at.keys()

        try:
            await eventually(f"{len(ids)} events are handled", caught, timeout, interval=0.005)
        except TimeoutError as error:
            missing = [id_ for id_ in ids if id_ not in self.at]
            raise TimeoutError(f"{error}; {len(missing)} are missing, {missing[:5]} first") from None


class Gate:
    """A dispatcher whose calls wait until they are let go."""

    def __init__(self) -> None:
        self.waiting: list[str] = []
        self.handled: list[str] = []
        self.most = 0
        self._open = asyncio.Event()

    async def __call__(self, event: Event) -> None:
        self.waiting.append(event.id)
        self.most = max(self.most, len(self.waiting))
        try:
            await self._open.wait()
        finally:
            self.waiting.remove(event.id)
        self.handled.append(event.id)

    def open(self) -> None:
        self._open.set()

    async def holds(self, count: int) -> None:
        async def are_waiting() -> bool:
            return len(self.waiting) >= count

        await eventually(f"{count} dispatches at once", are_waiting)
