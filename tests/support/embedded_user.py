"""A process of its own that uses an embedded PostgreSQL, to be killed at any moment.

    async with EmbeddedUser(directory) as user:
        user.kill()                         # kill -9, its whole process group

And what /proc shows of a server: its processes and its keepers. Only Linux has it.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from pgbackend.embedded.server import EmbeddedServer
from tests.support.polling import eventually

needs_proc = pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="looks at processes in /proc")

# The module alone: the whole of pgbackend takes a second to import.
_PROGRAM = """
import asyncio, json, signal, sys, types

package = types.ModuleType("pgbackend")
package.__path__ = ["pgbackend"]
sys.modules["pgbackend"] = package
from pgbackend.embedded.server import EmbeddedServer

async def use(directory, options):
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, lambda: None)
    server = EmbeddedServer(directory, **options)
    print(await server.start(), flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    await server.stop()

asyncio.run(use(**json.loads(sys.argv[1])))
"""


def fast_server(directory: Path, *, start_timeout: float = 60.0) -> EmbeddedServer:
    """Without fsync: tests kill processes, and no machine."""
    return EmbeddedServer(directory, settings={"fsync": "off"}, start_timeout=start_timeout)


class EmbeddedUser:
    """The parent's end. Entering returns once the server runs for it."""

    def __init__(self, directory: Path, **options: object) -> None:
        """`options` go to `EmbeddedServer`, as far as JSON carries them."""
        self._job = {"directory": str(directory), "options": {"settings": {"fsync": "off"}, **options}}
        self._process: asyncio.subprocess.Process | None = None
        self.dsn = ""

    @property
    def process(self) -> asyncio.subprocess.Process:
        assert self._process, "enter the user first"
        return self._process

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            _PROGRAM,
            json.dumps(self._job),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=Path(__file__).parents[2],
            start_new_session=True,  # a process group to kill
        )
        assert self._process.stdout
        async with asyncio.timeout(120):
            self.dsn = (await self._process.stdout.readline()).decode().strip()
        assert self.dsn, "it did not start; see its stderr"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process.returncode is None:
            self.kill()
        await self.process.wait()
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        await self.process.stdout.read()  # to the end, so that the pipe's transport is closed with the loop still there

    def kill(self) -> None:
        """kill -9, and whatever it started that is in its process group."""
        with contextlib.suppress(ProcessLookupError):  # it was faster
            os.killpg(self.process.pid, signal.SIGKILL)

    def interrupt(self) -> None:
        """Signal it as a terminal does at Ctrl-C. The process itself takes no notice."""
        os.killpg(self.process.pid, signal.SIGINT)

    async def stop(self, timeout: float = 60.0) -> None:
        """Return once it has called `stop()` and ended."""
        assert self.process.stdin
        self.process.stdin.write(b"stop\n")
        async with asyncio.timeout(timeout):
            assert await self.process.wait() == 0


async def nothing_is_left(directory: Path) -> None:
    """Return once neither a server nor a keeper is left there."""
    await eventually("no server, no keeper", lambda: not processes(directory) and not keepers(directory), 60)


def processes(directory: Path) -> list[int]:
    """Processes of a PostgreSQL on that directory, zombies aside."""
    return _working_in(directory / "postgresql" / "data")


def keepers(directory: Path) -> list[int]:
    """The keepers of all users there, zombies aside."""
    mark = b"embedded import keeper"
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # gone
            arguments = process.read_bytes().split(b"\0")
            if any(mark in one for one in arguments) and json.loads(arguments[-2])["directory"] == str(directory):
                found.append(int(process.parent.name))
    return found


def active_keeper(directory: Path) -> int:
    """The keeper that is the server's parent; 0 between two."""
    try:
        return int(Path(f"/proc/{postmaster(directory)}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return 0


def postmaster(directory: Path) -> int:
    """The process id of the server there; 0 between two."""
    try:
        return int((directory / "postgresql" / "data" / "postmaster.pid").read_text().split()[0])
    except (FileNotFoundError, IndexError):
        return 0


def _working_in(directory: Path) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").samefile(directory):
                found.append(int(process.name))
        except OSError:
            continue  # gone, or somebody else's
    return found
