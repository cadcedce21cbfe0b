"""The event loop and the process that a backend belongs to, from `init()` on. Any use elsewhere raises at once."""

import asyncio
from asyncio import _get_running_loop

from pgbackend.errors import PgBackendError
from pgbackend.postgres import sockets


class Home:
    """Known from `enter()` to `leave()`; outside of that every loop will do."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._forks = sockets.forks()

    def enter(self) -> None:
        """From now on the running loop is the home. Raises PgBackendError when another one is."""
        self.check()
        self._loop = asyncio.get_running_loop()
        self._forks = sockets.forks()

    def leave(self) -> None:
        """From now on any loop may become the home."""
        self._loop = None

    def check(self) -> None:
        """Raises PgBackendError when this is not the home, or not its process."""
        # In a forked child no loop counts as running, not even one that the fork happened in.
        if self._loop is None or self._loop is _get_running_loop():
            return
        if self._forks != sockets.forks():
            where = "the process that this one was forked from. Make a new Backend here"
        elif self._loop.is_closed():
            where = "an event loop that is closed. Make a new Backend in each `asyncio.run()`"
        else:
            where = "another event loop, the one in which `init()` ran"
        raise PgBackendError(
            f"This Backend belongs to {where}. From other threads, hand calls to its loop with "
            "`asyncio.run_coroutine_threadsafe(call, loop)`."
        )
