"""The gate of a shard: whether a dispatch may start, which ones run, and when none runs any more."""

import asyncio
from contextlib import suppress

from pgbackend.codec.event import Event


class Gate:
    """Every dispatch of a shard passes it.

    Plain attributes, because the straight path reads them before and after each dispatch.
    """

    __slots__ = ("_holds", "active", "halted", "quiet", "stopped")

    def __init__(self) -> None:
        self.active: dict[int, Event] = {}
        """The events at work, by `Delivery.slot`."""
        self.halted = False
        """Whether no dispatch may start now: the shard is held, or has stopped."""
        self.stopped = False
        """Whether no dispatch will ever start again."""
        self.quiet = asyncio.Event()
        """Set when the last dispatch of a halted shard ends."""
        self._holds = 0

    def hold(self) -> None:
        """Let no dispatch start until as many calls of `release()`."""
        self._holds += 1
        self.halted = True

    def release(self) -> bool:
        """End one `hold()`. Returns whether dispatches may start again."""
        self._holds -= 1
        if self._holds == 0 and not self.stopped:
            self.halted = False
        return not self.halted

    def stop(self) -> None:
        """Let no dispatch start any more."""
        self.stopped = self.halted = True

    def begin(self, slot: int, event: Event) -> None:
        """The event is at work."""
        self.active[slot] = event

    def end(self, slot: int) -> None:
        """The event is not at work any more."""
        self.active.pop(slot, None)
        if self.halted and not self.active:
            self.quiet.set()

    def at_work(self) -> list[Event]:
        """The events at work."""
        return list(self.active.values())

    async def until_quiet(self, timeout: float | None) -> bool:
        """Whether nothing is at work any more, within `timeout` seconds. Hold or stop the gate before."""
        if self.active:
            self.quiet.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self.quiet.wait()
        return not self.active
