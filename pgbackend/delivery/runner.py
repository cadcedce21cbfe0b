"""Runs workers from `start()` to `stop()`: one after the other, each for one incarnation of the server.

A worker ends with `IncarnationChanged` when the incarnation ends, and the next one starts from the durable rows. A lost
connection is waited out. Any other error ends `start()` and is kept for `status()` and `probe()`.
"""

import asyncio
import logging
import time
from contextlib import suppress
from typing import Protocol

from pgbackend import facts
from pgbackend.delivery.redelivery import Outlived, Redelivery
from pgbackend.delivery.registration import Registration
from pgbackend.delivery.worker import Worker
from pgbackend.errors import ConnectionLostError, DatabaseError, PgBackendError, SchemaError
from pgbackend.log.incarnation import IncarnationChanged
from pgbackend.log.log import Log
from pgbackend.log.requirements import Requirements
from pgbackend.postgres import schema as tables
from pgbackend.postgres.reconnect import GrowingDelay
from pgbackend.subscriptions.definitions import Subscriptions
from pgbackend.subscriptions.overview import Overview
from pgbackend.thrown import describe

_CANCEL_TIMEOUT = 0.5
"""Seconds that a worker has to end once its task is cancelled."""
_REPORT_TIMEOUT = 5.0
"""Seconds in which the last worker's attempts whose end it could not commit are reported."""


class NewWorker(Protocol):
    """Makes a worker, whose other dependencies are given already."""

    def __call__(self, *, registrations: dict[str, Registration], outlived: list[Outlived]) -> Worker: ...


class Runner:
    """Runs the subscriptions of this process. `start()` may be called again after it has ended."""

    def __init__(
        self,
        log: Log,
        requirements: Requirements,
        subscriptions: Subscriptions,
        overview: Overview,
        redelivery: Redelivery,
        *,
        new_worker: NewWorker,
    ) -> None:
        self._log = log
        self._requirements = requirements
        self._subscriptions = subscriptions
        self._overview = overview
        self._redelivery = redelivery
        self._new_worker = new_worker
        self._stop = asyncio.Event()
        self._is_closed = False
        self._running: asyncio.Task[None] | None = None
        self._outlived: list[Outlived] = []
        self.registrations: dict[str, Registration] = {}
        """The subscriptions that this process runs, by their names."""
        self.worker: Worker | None = None
        """The worker that runs now."""
        self.error: BaseException | None = None
        """The error that ended the last `start()`; None while it runs, and when it ended without one."""

    async def start(self) -> None:
        """Run workers until `stop_soon()` or cancellation. Raises the error of a worker that no other can follow."""
        if self._running is not None:
            raise PgBackendError("This backend is running already.")
        if not self._is_closed:
            # An earlier call that was cancelled has set it.
            self._stop.clear()
        self.error = None
        running = self._running = asyncio.create_task(self.run(), name="pgbackend worker")
        running.add_done_callback(self._on_run_ended)
        try:
            # A cancelled caller must drain first. So only a second cancellation reaches the worker itself.
            await asyncio.wait({running})
        except asyncio.CancelledError:
            self._stop.set()
            await _end_or_cancel(running)
            await self._report_outlived(_REPORT_TIMEOUT)
            raise
        if self.error is not None:
            raise self.error

    async def run(self) -> None:
        """Run one worker after the other, each for one incarnation of the server, until `stop_soon()`."""
        delay = GrowingDelay(self._log.database)
        is_new_incarnation = False
        while not self._stop.is_set():
            for registration in self.registrations.values():
                # A probe that the last worker abandoned may never end.
                registration.health.probing = False
            self.worker = self._new_worker(registrations=self.registrations, outlived=self._outlived)
            server_died = False
            try:
                # Before each worker: the stored rows may be older than what this process has seen.
                await verify_log(self._requirements, self._overview)
                if is_new_incarnation:
                    await self._report_missing_subscriptions()
                    is_new_incarnation = False
                await self.worker.run(self._stop)
            except ConnectionLostError as error:
                facts.emit("worker cannot start", level=delay.failed(), failures=delay.failures, error=str(error))
                await delay.wait()
            except IncarnationChanged as error:
                server_died = True
                facts.emit("incarnation changed", level=logging.WARNING, error=str(error))
                is_new_incarnation = True
            finally:
                if self.worker.pumps.has_unreported:
                    self._outlived.append(Outlived(self.worker.id, server_died=server_died))
                self.worker = None

    def stop_soon(self) -> None:
        """The worker begins to end, and none starts any more."""
        self._is_closed = True
        self._stop.set()

    async def stop(self, deadline: float) -> None:
        """The worker has ended. By the deadline, in monotonic seconds, it is cancelled."""
        self.stop_soon()
        if (running := self._running) is not None:
            await self._end(running, deadline)
        await self._report_outlived(min(_REPORT_TIMEOUT, max(deadline - time.monotonic(), _CANCEL_TIMEOUT)))

    async def _end(self, running: "asyncio.Task[None]", deadline: float) -> None:
        # A worker that dispatches keeps to the deadline by itself. Before that it has nothing to drain.
        if self.worker is None or not self.worker.dispatches:
            running.cancel()
        await asyncio.wait({running}, timeout=max(deadline - time.monotonic(), _CANCEL_TIMEOUT))
        if not running.done():
            running.cancel()
            await asyncio.wait({running}, timeout=_CANCEL_TIMEOUT)

    def close_registrations(self) -> None:
        """The threads of all subscriptions end with what they do now."""
        for registration in self.registrations.values():
            registration.close(cancel=True)

    def states(self) -> dict[str, str]:
        """The state of each subscription in this process, by its name."""
        if self.error is not None:
            return dict.fromkeys(self.registrations, self.describe_error())
        return self.worker.pumps.states() if self.worker is not None else {}

    def describe_error(self) -> str:
        """That the worker died, and of what."""
        assert self.error is not None  # noqa: S101 - callers have seen one
        return f"worker died: {describe(self.error)}"

    def _on_run_ended(self, running: "asyncio.Task[None]") -> None:
        # Here, and not in `start()`, which may have been cancelled three times and be gone.
        self._running = None
        if not running.cancelled():
            self.error = running.exception()
        elif not self._stop.is_set():
            self.error = PgBackendError(
                "The worker's task was cancelled by something outside this backend. To end it, call stop()."
            )
        if self.error is not None:
            facts.emit("worker died", level=logging.ERROR, error=describe(self.error))

    async def _report_outlived(self, timeout: float) -> None:
        """No worker follows: report what the last ones did not die of, for `timeout` seconds at most."""
        delay = GrowingDelay(self._log.database, cap=1.0)
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while self._outlived:
                    try:
                        await self._redelivery.report_outlived(self._outlived)
                    except DatabaseError as error:
                        facts.emit("survival not reported", level=delay.failed(), error=str(error))
                        await delay.wait()
                    else:
                        self._outlived.clear()

    async def _report_missing_subscriptions(self) -> None:
        """Log the subscriptions that are not in the new incarnation. Only a human can decide about them."""
        for name in list(self.registrations):
            if await self._subscriptions.find(name) is None:
                facts.emit(
                    "subscription is gone",
                    level=logging.ERROR,
                    subscription=name,
                    error="A failover has lost it, or it was deleted. Subscribe to it again, or restart this process.",
                )


async def verify_log(requirements: Requirements, overview: Overview) -> None:
    """Return when no event can be lost, as far as the stored rows and the catalogs show. Raises SchemaError."""
    await requirements.verify()
    refuse(await overview.find_mistrust())


def refuse(problem: str | None) -> None:
    """Raises SchemaError when there is a problem."""
    if problem is not None:
        raise SchemaError(problem, found=tables.head(), expected=tables.head())


async def _end_or_cancel(task: "asyncio.Task[None]") -> None:
    """The task, which was asked to end, has ended; a second cancellation of the caller cancels it."""
    try:
        await asyncio.wait({task})
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.wait({task})
