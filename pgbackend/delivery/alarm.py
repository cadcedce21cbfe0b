"""An alarm: one timer that rings at the earliest of the times that it was set to."""

import asyncio
from collections.abc import Callable
from time import monotonic


class Alarm:
    """Calls back once the time has come."""

    __slots__ = ("_callback", "_due", "_timer")

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback = callback
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def set(self, due: float) -> None:
        """Ring at `due`, in monotonic seconds, unless it rings before that."""
        if self._timer is not None:
            if self._due <= due:
                return
            self._timer.cancel()
        self._due = due
        self._timer = asyncio.get_running_loop().call_later(max(due - monotonic(), 0.0), self._ring)

    def cancel(self) -> None:
        """Do not ring."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _ring(self) -> None:
        self._timer = None
        self._callback()
