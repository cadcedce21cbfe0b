"""The examples as people run them: each a process of its own, with its database in the environment."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


class Program:
    """A running example."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.output = ""
        """Standard output and standard error, as far as it was read."""

    async def says(self, text: str, *, times: int = 1, timeout: float = 60.0) -> str:
        """Return the output up to now, once `text` is in it so often."""
        assert self.process.stdout
        try:
            async with asyncio.timeout(timeout):
                while self.output.count(text) < times:
                    line = await self.process.stdout.readline()
                    assert line, f"it ended before it said {text!r}: {self.output}"
                    self.output += line.decode()
        except TimeoutError:
            raise TimeoutError(f"it did not say {text!r}: {self.output}") from None
        return self.output

    async def stop(self, status: int = 0) -> None:
        """Return once it has ended by SIGTERM, with this status."""
        self.process.send_signal(signal.SIGTERM)
        assert await self.ended() == status, self.output

    async def kill(self) -> None:
        """Return once `kill -9` has ended it."""
        self.process.kill()
        await self.ended()

    async def ended(self, timeout: float = 60.0) -> int:
        """The exit status, once it has ended. `output` is complete then."""
        async with asyncio.timeout(timeout):
            out, _ = await self.process.communicate()
        self.output += out.decode()
        assert self.process.returncode is not None
        return self.process.returncode


@asynccontextmanager
async def running(*command: str | Path, dsn: str, env: Mapping[str, str] | None = None) -> AsyncIterator[Program]:
    """A program, ended at the end. A script of Python needs no `python` before it."""
    if str(command[0]).endswith(".py"):
        command = (sys.executable, *command)
    program = Program(
        await asyncio.create_subprocess_exec(
            *command,
            cwd=ROOT,
            env={**os.environ, "PGBACKEND_DSN": dsn, **(env or {})},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
    )
    try:
        yield program
    finally:
        if program.process.returncode is None:
            program.process.terminate()  # so that it can end programs of its own
            try:
                await program.ended(30)
            except TimeoutError:
                await program.kill()
