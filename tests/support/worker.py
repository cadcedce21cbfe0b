"""A process of its own that runs a subscription, to be stopped, frozen or killed at any moment.

    async with Worker(dsn, ledger, subscription="billing", order="key") as worker:
        …
        worker.kill()                       # kill -9: nothing is drained, nothing committed

Its dispatcher notes each event in the ledger, after `delay` seconds.
"""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pgbackend.backend import Backend
from pgbackend.codec.event import Event
from pgbackend.retry import Retry
from pgbackend.torture.processes import Child
from tests.support.ledger import Ledger


class Worker:
    """The parent's end. Entering returns once the subscription exists and its backend runs."""

    def __init__(
        self,
        dsn: str,
        ledger: Ledger,
        *,
        subscription: str = "test",
        schema: str = "pgbackend",
        delay: float = 0.0,
        poison: Sequence[str] = (),
        settings: dict[str, object] | None = None,
        **options: object,
    ) -> None:
        """`settings` go to `Backend`, `options` to `subscribe()`; both as far as JSON carries them.

        `poison`: ids of events whose handling kills the process, after `delay` seconds. The ledger has them too.
        """
        self._job = {
            "dsn": dsn,
            "ledger": str(ledger.path),
            "subscription": subscription,
            "delay": delay,
            "poison": list(poison),
            "settings": {"schema": schema, **(settings or {})},
            "options": {"start": "earliest", **options},
        }
        self._child: Child | None = None

    @property
    def child(self) -> Child:
        assert self._child, "enter the worker first"
        return self._child

    @property
    def process(self) -> asyncio.subprocess.Process:
        return self.child.process

    @property
    def pid(self) -> int:
        return self.child.pid

    async def __aenter__(self) -> Self:
        self._child = await Child.start(
            [sys.executable, "-m", "tests.support.worker"], self._job, directory=Path(__file__).parents[2]
        )
        await self._child.ready(60)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.child.returncode is None:
            self.kill()
        await self.child.wait()

    def kill(self) -> None:
        """kill -9. The process is gone when `await worker.process.wait()` returns."""
        self.child.kill()

    def freeze(self) -> None:
        """Its connections stay open, and it does nothing until `thaw()`."""
        self.child.freeze()

    def thaw(self) -> None:
        self.child.thaw()

    async def stop(self, timeout: float = 60.0) -> None:
        """Return once it has drained, committed and ended; fails when it ended otherwise."""
        self.child.signal(signal.SIGTERM)
        async with asyncio.timeout(timeout):
            assert await self.process.wait() == 0


async def _run(job: dict[str, Any]) -> None:
    ledger = Ledger(Path(job["ledger"]))

    async def handle(event: Event) -> None:
        if job["delay"]:
            await asyncio.sleep(job["delay"])
        await ledger.handle(event)
        if event.id in job["poison"]:
            os.kill(os.getpid(), signal.SIGKILL)

    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    async with Backend(job["dsn"], **job["settings"]) as backend:
        options = job["options"]
        if "retry" in options:
            options["retry"] = Retry(**options["retry"])
        await backend.subscribe(job["subscription"], handle, **options)
        os.write(1, b"ready\n")
        await stopping.wait()


if __name__ == "__main__":
    asyncio.run(_run(json.loads(sys.stdin.readline())))
