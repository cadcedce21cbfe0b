"""Starts the parts of a broker in order, and drains them in order.

    created ─▶ initialized ─▶ subscribed ─▶ serving ─▶ draining ─▶ stopped
       └──────── a stop before `serving` goes straight to `stopped` ──┘

Ingest drains before the backend does, so that accepted events are committed; then the backend finishes its dispatches.
The admin port answers until all is drained. When one part ends by itself, the others drain in the same order.

PostgreSQL may come up after the broker, as containers start in any order: the broker waits for it, up to
`startup_timeout`. Without an end the wait would hide a mistake in the DSN.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from pgbackend import facts
from pgbackend.backend import Backend
from pgbackend.errors import ConnectionLostError, PgBackendError
from pgbackend.postgres.reconnect import GrowingDelay
from pgbackend.serve.config.models import Configuration
from pgbackend.serve.egress.triggers import Triggers
from pgbackend.serve.ingest.listener import Listener
from pgbackend.serve.process import Signals
from pgbackend.serve.reloader import Reloader
from pgbackend.serve.retaining import retain

_Work = Callable[[], Coroutine[Any, Any, None]]


class Broker:
    """The parts of one broker process."""

    def __init__(
        self,
        backend: Backend,
        triggers: Triggers,
        listener: Listener,
        admin: Listener | None,
        reloader: Reloader,
        *,
        startup_timeout: float,
    ) -> None:
        self._backend = backend
        self._triggers = triggers
        self._listener = listener
        self._admin = admin
        self._reloader = reloader
        self._startup_timeout = startup_timeout
        self._stopping = asyncio.Event()
        """Set by a signal, or by a part that has ended."""
        self._failure: PgBackendError | None = None
        """Why the first part ended by itself."""

    async def run(self, configuration: Configuration, signals: Signals, on_serving: Callable[[], None]) -> None:
        """Serve until `signals.stop` is set; return once everything is drained. Raises PgBackendError.

        `on_serving` is called once the listeners take connections.
        """
        async with asyncio.TaskGroup() as tasks:
            relay = tasks.create_task(self._obey(signals.stop), name="wait for a signal")
            triggers = self._start(tasks, "triggers", self._triggers.run)
            if await self._unless_stopping(tasks, "start", partial(self._prepare, configuration)):
                await self._serve(tasks, signals, on_serving)
            await _cancel(triggers, relay)
        if self._failure is not None:
            raise self._failure

    async def _obey(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._stopping.set()

    async def _prepare(self, configuration: Configuration) -> None:
        """The log can be used, the triggers are subscribed, and the log has the configured retention."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._startup_timeout
        pause = GrowingDelay()
        while True:
            try:
                await self._backend.init()
                break
            except ConnectionLostError as error:
                if loop.time() >= deadline:
                    raise
                facts.emit(
                    "waiting for postgresql", level=logging.WARNING, error=str(error), timeout=self._startup_timeout
                )  # fmt: skip
            await pause.wait()
        await self._triggers.apply(configuration)
        await retain(self._backend, configuration)

    async def _serve(self, tasks: asyncio.TaskGroup, signals: Signals, on_serving: Callable[[], None]) -> None:
        """Serve until the broker stops, and drain it."""
        backend = self._start(tasks, "backend", self._backend.start)
        listener = self._start(tasks, "listener", self._listener.run)
        reloader = self._start(tasks, "reloader", partial(self._reloader.run, signals.reload))
        admin = None if self._admin is None else self._start(tasks, "admin listener", self._admin.run)
        if await self._unless_stopping(tasks, "listeners", self._all_listening):
            on_serving()
            await self._stopping.wait()
        await _cancel(reloader)
        await self._listener.drain()
        await asyncio.wait({listener})
        await self._backend.stop()
        await asyncio.wait({backend})
        if self._admin is not None and admin is not None:
            await self._admin.drain()
            await asyncio.wait({admin})

    async def _all_listening(self) -> None:
        await self._listener.wait_started()
        if self._admin is not None:
            await self._admin.wait_started()

    # Tasks that end without an exception: a TaskGroup would answer one by cancelling all parts, out of order.

    def _start(self, tasks: asyncio.TaskGroup, name: str, part: _Work) -> asyncio.Task[None]:
        return tasks.create_task(self._keep(name, part), name=name)

    async def _keep(self, name: str, part: _Work) -> None:
        """Run a part. Its end stops the broker, and is a failure unless the broker stops already."""
        if await self._succeeds(name, part) and not self._stopping.is_set():
            self._fail(PgBackendError(f"The {name} stopped without being asked to. Its log says more."))

    async def _unless_stopping(self, tasks: asyncio.TaskGroup, name: str, work: _Work) -> bool:
        """Whether the work succeeded before the broker had to stop. Otherwise it is cancelled."""
        working = tasks.create_task(self._succeeds(name, work), name=name)
        stopped = tasks.create_task(self._stopping.wait(), name="wait for the end")
        await asyncio.wait({working, stopped}, return_when=asyncio.FIRST_COMPLETED)
        succeeded = working.done() and working.result()
        await _cancel(working, stopped)
        return succeeded

    async def _succeeds(self, name: str, work: _Work) -> bool:
        """Whether the work succeeded; otherwise its error stops the broker."""
        try:
            await work()
        except Exception as error:  # noqa: BLE001 - whatever a part raises, the broker drains and raises it
            self._fail(_readable(name, error))
            return False
        return True

    def _fail(self, failure: PgBackendError) -> None:
        self._failure = self._failure or failure
        self._stopping.set()


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    """Return once these tasks have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


def _readable(name: str, error: Exception) -> PgBackendError:
    """The error as one that people can read."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if isinstance(error, PgBackendError):
        return error
    failure = PgBackendError(f"The {name} failed: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
