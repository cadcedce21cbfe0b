"""Redis and NATS: each log has a server of its own, which is a program that runs until it is terminated."""

import asyncio
import shutil
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from benchmarks.compare.system import CompareError

PATIENCE = 10.0
"""Seconds in which a server must answer."""


class OwnServer:
    """No server for the whole run: only a program that must exist."""

    def __init__(self, program: str, install: str) -> None:
        self._program = program
        self._install = install

    def missing(self) -> str | None:
        return None if self._found() else f"{self._program} is missing: {self._install}"

    @asynccontextmanager
    async def running(self, directory: Path) -> AsyncIterator[str]:
        yield str(directory)

    @asynccontextmanager
    async def process(
        self, directory: Path, arguments: Sequence[str], answers: Callable[[], Awaitable[bool]]
    ) -> AsyncIterator[None]:
        """The program, once it answers."""
        process = await asyncio.create_subprocess_exec(
            str(self._found()), *arguments,
            cwd=directory, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            async with asyncio.timeout(PATIENCE):
                while not await answers():
                    if process.returncode is not None:
                        raise CompareError(f"{self._program} ended with code {process.returncode}")
                    await asyncio.sleep(0.02)
            yield
        finally:
            if process.returncode is None:
                process.terminate()
            await process.wait()

    async def version(self) -> str:
        """The version that the program states."""
        process = await asyncio.create_subprocess_exec(
            str(self._found()), "--version", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        out, _ = await process.communicate()
        return out.decode().strip()

    def _found(self) -> str | None:
        # A program that a wheel has brought is newer than the distribution's.
        beside = shutil.which(self._program, path=str(Path(sys.executable).parent))
        return beside or shutil.which(self._program) or shutil.which(self._program, path="/usr/sbin:/usr/local/sbin")


@asynccontextmanager
async def fresh_directory(parent: str) -> AsyncIterator[Path]:
    directory = Path(parent, uuid.uuid4().hex[:12])
    directory.mkdir()  # noqa: ASYNC240 - nothing is measured now
    try:
        yield directory
    finally:
        await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
