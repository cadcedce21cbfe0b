"""The server of a run, and its faults.

Those of an embedded PostgreSQL are kill -9 to all its processes, as a power cut does, and its quick shutdowns. Its
keeper starts it again. Another kind of server can fail in other ways: it needs what `Restartable` lists.
"""

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal, Protocol

import asyncpg

from pgbackend.embedded.server import EmbeddedServer

_INTERVAL = 0.02
_RESPITE = 3.0
"""Seconds that the server runs at least before it is restarted again."""
Mode = Literal["fast", "immediate", "kill", "failover"]
"""How a server goes down. After a failover another one answers in its place."""


class Restartable(Protocol):
    """A server that a run may restart. It runs, and keeps running, until the run is over."""

    @property
    def dsn(self) -> str:
        """Leads to it at any time."""

    @property
    def directory(self) -> Path:
        """On the disk of its data."""

    async def restart(self, mode: Mode) -> None:
        """Return once it has gone down in this way and answers again."""

    async def repair(self) -> None:
        """Return once it may go down again."""


class Embedded:
    """An embedded server that a run may restart."""

    def __init__(self, server: EmbeddedServer) -> None:
        self._server = server

    @property
    def dsn(self) -> str:
        return self._server.dsn

    @property
    def directory(self) -> Path:
        return self._server.directory

    async def restart(self, mode: Mode) -> None:
        assert mode != "failover", "it has no standby"  # noqa: S101
        await restart_server(self._server, mode)

    async def repair(self) -> None:
        await asyncio.sleep(_RESPITE)


async def kill_server(server: EmbeddedServer) -> None:
    """Kill every process of the server. Its keeper starts it again, with a recovery."""
    victims = await asyncio.to_thread(server_processes, server.directory)
    if not victims:
        raise ProcessLookupError("There is no server to kill.")
    for pid in victims:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    await _until(lambda: not any(_is_running(pid) for pid in victims), 60)


async def restart_server(server: EmbeddedServer, mode: Literal["fast", "immediate", "kill"]) -> None:
    """Return once the server has gone down in this way and answers again."""
    if mode == "kill":
        await kill_server(server)
    else:
        victims = await asyncio.to_thread(server_processes, server.directory)
        if not victims:
            raise ProcessLookupError("There is no server to restart.")
        os.kill(victims[0], signal.SIGINT if mode == "fast" else signal.SIGQUIT)
        await _until(lambda: not _is_running(victims[0]), 60)
    await await_server(server.dsn)


async def await_server(dsn: str, timeout: float = 60.0) -> None:
    """Return once the server answers. Raises TimeoutError when it does not."""
    async with asyncio.timeout(timeout):
        while True:
            with suppress(OSError, asyncpg.PostgresError, TimeoutError):
                connection = await asyncpg.connect(dsn, timeout=5)
                await connection.close()
                return
            await asyncio.sleep(0.1)


def server_processes(directory: Path) -> list[int]:
    """The pids of an embedded server: the postmaster first, then its children."""
    return processes_on(directory / "postgresql" / "data")


def processes_on(data: Path) -> list[int]:
    """The pids of the server that runs on this data directory, the postmaster first. None if no server runs."""
    try:
        postmaster = int((data / "postmaster.pid").read_text().split("\n", 1)[0])
    except (FileNotFoundError, ValueError):
        return []
    children = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if int(_stat(int(entry.name))[1]) == postmaster:
                    children.append(int(entry.name))
    return [postmaster, *children]


async def _until(condition: Callable[[], bool], timeout: float) -> None:
    async with asyncio.timeout(timeout):
        while not condition():  # noqa: ASYNC110 - nothing signals the end of a process that is no child
            await asyncio.sleep(_INTERVAL)


def _is_running(pid: int) -> bool:
    try:
        return _stat(pid)[0] != "Z"
    except OSError:
        return False


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name: state, parent, and so on. The name may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
