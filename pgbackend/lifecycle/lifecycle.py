"""A backend's life: `init()` opens the log once, `stop()` ends everything once, by one deadline.

Its states: new, initializing (a failed `init()` leads back to new), open, stopping, stopped. Only an open one can be
used. `stop()` leads from each state to stopped, and every call of it waits for the same end.
"""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

from pgbackend.delivery import turns
from pgbackend.errors import NotRunningError
from pgbackend.lifecycle.body import Body
from pgbackend.lifecycle.home import Home
from pgbackend.lifecycle.opening import OpenLog, Server, open_log, seconds_left
from pgbackend.settings import Settings

_ALLOWANCE = 5.0
"""Seconds beyond `drain_timeout` that `stop()` may take to commit, to release shards and to close connections."""
_STOPPED = "This backend was stopped. Make a new one."


class Lifecycle:
    """Opens and closes one log."""

    def __init__(self, server: Server, settings: Settings) -> None:
        self._server = server
        self._settings = settings
        self._home = Home()
        self._one_init = asyncio.Lock()
        self._initializing: asyncio.Task[None] | None = None
        self._open: OpenLog | None = None
        self._body: Body | None = None
        self._is_stopped = False
        self._stopping: asyncio.Task[None] | None = None

    async def init(self, *, migrate: bool) -> None:
        """The log is open. Raises as `Backend.init()` says; then it may be tried again, in another loop too."""
        self._home.enter()
        async with self._one_init:
            if self._is_stopped:
                raise NotRunningError(_STOPPED)
            if self._open is not None:
                return
            # Again: a failed call before this one has left home.
            self._home.enter()
            # A task of its own, so that `stop()` can cancel it without cancelling the caller.
            self._initializing = asyncio.create_task(self._init(migrate=migrate), name="pgbackend init")
            try:
                await self._initializing
            except asyncio.CancelledError:
                if self._stopping is not None and not _is_cancelled():
                    raise NotRunningError("This backend was stopped while it was being initialized.") from None
                raise
            finally:
                if self._open is None:
                    self._home.leave()

    async def _init(self, *, migrate: bool) -> None:
        # Here, not in `init()`: its caller may be cancelled just when the log is open, and `stop()` must close it.
        self._open = await open_log(self._server, self._settings, migrate=migrate)

    @property
    def is_open(self) -> bool:
        """Whether `init()` is done and `stop()` is not."""
        return self._open is not None

    def opened(self) -> OpenLog:
        """The open log. Raises NotRunningError when it is not open, PgBackendError in another loop or process."""
        self._home.check()
        if self._open is None:
            raise NotRunningError(
                _STOPPED if self._is_stopped else "This backend is not initialized. Call `await backend.init()` first."
            )
        return self._open

    def enter_body(self, start: Coroutine[Any, Any, None]) -> None:
        """Run `start` beside the calling task, which is inside `async with`. If it fails, the task is cancelled."""
        self._body = Body(start)

    async def leave_body(self, error: BaseException | None) -> None:
        """Everything has ended. Raises what ended dispatching, unless the body raises an error of its own."""
        body = self._body
        if body is not None:
            error = body.leave(error)
        await self.stop()
        if body is not None and error is None and body.background_error is not None:
            raise body.background_error

    async def stop(self) -> None:
        """Everything has ended, as `Backend.stop()` says."""
        self._home.check()
        if self._stopping is None or self._stopping.cancelled():
            self._is_stopped = True
            if self._open is not None:
                self._open.runner.stop_soon()
            self._stopping = asyncio.create_task(self._end(), name="pgbackend stop", context=turns.outside())
        if self._open is None or not await self._open.calls.must_return_before(self._stopping):
            await asyncio.shield(self._stopping)

    async def _end(self) -> None:
        deadline = time.monotonic() + self._settings.drain_timeout + _ALLOWANCE
        try:
            if self._initializing is not None:
                self._initializing.cancel()
            if self._open is not None:
                await self._open.runner.stop(deadline)
            if self._body is not None:
                await asyncio.wait({self._body.background}, timeout=seconds_left(deadline))
            if self._open is not None:
                await self._open.calls.drain(seconds_left(deadline))
        finally:
            # Also when the event loop ends in the middle, and cancels this.
            if self._open is not None:
                self._open.calls.cancel()
            try:
                await self._close(deadline)
            finally:
                await self._server.stop()

    async def _close(self, deadline: float) -> None:
        # Behind an `init()` that is cleaning up.
        async with self._one_init:
            open_log, self._open = self._open, None
        if open_log is not None:
            await open_log.close(deadline)


def _is_cancelled() -> bool:
    """Whether it is the current task that is being cancelled, not just something that it awaited."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
