"""A child process from its parent's end: told what to do by lines on its standard input, killed, frozen, ended.

    child = await Child.start([sys.executable, "-m", "a.program"], job, errors=None)
    await child.ready()
    child.freeze()

A child says `ready` on its standard output. One whose parent is gone finds its standard input closed.
"""

import asyncio
import json
import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from pgbackend.errors import PgBackendError


class Child:
    """A process that was started."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        """Made by `start()`."""
        self.process = process

    @classmethod
    async def start(
        cls,
        command: Sequence[str],
        job: Mapping[str, object],
        *,
        errors: Path | None = None,
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
    ) -> Self:
        """Return once it is started and has its job. `errors`: where its standard error is added to, if not to ours."""
        file = None if errors is None else errors.open("ab")
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=file,
                env={**os.environ, **(environment or {})},
                cwd=directory,
            )
        finally:
            if file is not None:
                file.close()
        child = cls(process)
        # Not an argument: everybody can read those, and a DSN may hold a password.
        child.tell(job)
        return child

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        """How it ended; None while it runs."""
        return self.process.returncode

    async def ready(self, timeout: float = 60.0) -> None:
        """Return once it says that it is ready. Raises PgBackendError when it ends instead, TimeoutError when late."""
        assert self.process.stdout  # noqa: S101 - it is a pipe
        async with asyncio.timeout(timeout):
            if await self.process.stdout.readline() != b"ready\n":
                raise PgBackendError(f"Process {self.pid} did not start. What it wrote to stderr says why.")

    def tell(self, command: Mapping[str, object]) -> None:
        """It finds this on its standard input, when it comes to read it."""
        assert self.process.stdin  # noqa: S101 - it is a pipe
        self.process.stdin.write(json.dumps(command).encode() + b"\n")

    def signal(self, number: signal.Signals) -> None:
        """It gets the signal, unless it is gone."""
        with suppress(ProcessLookupError):
            self.process.send_signal(number)

    def kill(self) -> None:
        """Send kill -9. It is gone when `wait()` returns."""
        self.signal(signal.SIGKILL)

    def freeze(self) -> None:
        """Its connections stay open, and it does nothing until `thaw()`."""
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.signal(signal.SIGCONT)

    async def wait(self) -> int:
        """How it ended, once it has."""
        code = await self.process.wait()
        assert self.process.stdin  # noqa: S101 - they are pipes
        assert self.process.stdout  # noqa: S101
        self.process.stdin.close()
        # To the end, so that the pipe's transport is closed with the loop still there.
        await self.process.stdout.read()
        return code
