"""The runner's end of `child.py`: processes that produce and consume, and what they report."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from benchmarks.compare.child import Job
from benchmarks.compare.system import CompareError

_RESULT_BYTES = 1 << 26


class Child:
    """A running process."""

    def __init__(self, job: Job, process: asyncio.subprocess.Process, errors: "asyncio.Task[bytes]") -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._job = job
        self._errors = errors
        self._stdin = process.stdin
        self._stdout = process.stdout

    async def expect(self, word: str) -> None:
        """Return when the process has printed this line. Raises CompareError when it ends instead."""
        while await self.line() != word:
            pass

    async def ready(self) -> None:
        """Return when `go()` makes it begin at once."""
        await self.expect("ready")

    def go(self) -> None:
        self.tell("go")

    async def line(self) -> str:
        """The next line. Raises CompareError when the process has ended."""
        if not (line := await self._stdout.readline()):
            said = (await self._errors).decode(errors="replace").strip().splitlines()
            raise CompareError(f"its process that should {self._job.role} ended: {said[-1] if said else 'no message'}")
        return line.decode().strip()

    def tell(self, text: str) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # `line()` says why it ended
            self._stdin.write(f"{text}\n".encode())

    async def result(self) -> dict[str, Any]:
        """The value that it returned."""
        while not (line := await self.line()).startswith("{"):
            pass
        result: dict[str, Any] = json.loads(line)
        return result


@asynccontextmanager
async def child(job: Job) -> AsyncIterator[Child]:
    """A process that does the job. It is killed if it still runs at the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.compare.child",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        limit=_RESULT_BYTES,
        env={**os.environ, "COMPARE_JOB": job.text()},
    )  # fmt: skip
    assert process.stderr is not None
    # Read all the time, or a process that writes much would wait for us.
    errors = asyncio.create_task(process.stderr.read())
    try:
        yield Child(job, process, errors)
    finally:
        if process.stdin:
            process.stdin.close()
        try:
            async with asyncio.timeout(10):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
        errors.cancel()
