"""The body of `async with Backend(…)`: dispatching runs in the background, and its error ends the body."""

import asyncio
from collections.abc import Coroutine
from typing import Any


class Body:
    """The task inside `async with`, and the `start()` that runs beside it."""

    def __init__(self, start: Coroutine[Any, Any, None]) -> None:
        self._task = asyncio.current_task()
        self._cancelling: int | None = None
        """Cancellations of the task before this class added one; None as long as it has not."""
        self.background = asyncio.create_task(start, name="pgbackend start")
        self.background.add_done_callback(self._on_start_ended)

    def leave(self, error: BaseException | None) -> BaseException | None:
        """The body's own error; None when it is only the cancellation that came from here."""
        task, self._task = self._task, None
        if task is not None and self._cancelling is not None:
            # As `asyncio.timeout()`: a cancellation that came from elsewhere as well goes on.
            is_ours = task.uncancel() <= self._cancelling
            if is_ours and isinstance(error, asyncio.CancelledError):
                return None
        return error

    @property
    def background_error(self) -> BaseException | None:
        """The error that ended `start()`; None while it runs, and when it ended without one."""
        if not self.background.done() or self.background.cancelled():
            return None
        return self.background.exception()

    def _on_start_ended(self, _background: "asyncio.Task[None]") -> None:
        if self._task is not None and self.background_error is not None:
            self._cancelling = self._task.cancelling()
            self._task.cancel()
