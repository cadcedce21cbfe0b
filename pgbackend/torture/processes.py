"""Child processes, as their parent sees them: they read commands from standard input, and can be killed and frozen.

    child = await Child.start([sys.executable, "-m", "a.program"], job, errors=None)
    await child.ready()
    child.freeze()

A child prints `ready` once it works. When its parent is gone, its standard input is closed.
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
    """A started process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        """Use `start()`."""
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
        """Start it and give it its job. `errors`: the file that its standard error is appended to; by default ours."""
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
        # Not as an argument: all users can read those, and a DSN may hold a password.
        child.tell(job)
        return child

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit status; None while it runs."""
        return self.process.returncode

    async def ready(self, timeout: float = 60.0) -> None:
        """Return once it has printed `ready`. Raises PgBackendError if it ends first, TimeoutError after `timeout`."""
        assert self.process.stdout  # noqa: S101 - it is a pipe
        async with asyncio.timeout(timeout):
            if await self.process.stdout.readline() != b"ready\n":
                raise PgBackendError(f"Process {self.pid} did not start. Its output on stderr says why.")

    def tell(self, command: Mapping[str, object]) -> None:
        """Write a command to its standard input."""
        assert self.process.stdin  # noqa: S101 - it is a pipe
        self.process.stdin.write(json.dumps(command).encode() + b"\n")

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, unless it has ended."""
        with suppress(ProcessLookupError):
            self.process.send_signal(number)

    def kill(self) -> None:
        """Send SIGKILL. It has ended when `wait()` returns."""
        self.signal(signal.SIGKILL)

    def freeze(self) -> None:
        """Stop it until `thaw()`. Its connections stay open."""
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it run again."""
        self.signal(signal.SIGCONT)

    async def wait(self) -> int:
        """Return its exit status once it has ended."""
        code = await self.process.wait()
        assert self.process.stdin  # noqa: S101 - they are pipes
        assert self.process.stdout  # noqa: S101
        self.process.stdin.close()
        # Read to the end, so that the pipe's transport is closed while the loop runs.
        await self.process.stdout.read()
        return code
