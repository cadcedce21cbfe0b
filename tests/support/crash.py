"""kill -9 for a whole PostgreSQL: every process at once, as when the power fails."""

import asyncio
import os
import signal
from contextlib import suppress
from pathlib import Path

import asyncpg

from pgbackend.embedded import EmbeddedServer
from tests.support.polling import eventually


async def kill_server(server: EmbeddedServer) -> None:
    """Every process of the server is gone. Its keeper starts it again by itself, with a recovery."""
    victims = await asyncio.to_thread(server_processes, server.directory)
    assert victims, "there is no server to kill"
    for pid in victims:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    async def are_gone() -> bool:
        return not any(_works(pid) for pid in victims)

    await eventually("the server's processes are gone", are_gone)


async def await_server(dsn: str, timeout: float = 60.0) -> None:
    """Return once the server answers."""

    async def answers() -> bool:
        try:
            connection = await asyncpg.connect(dsn, timeout=5)
        except (OSError, asyncpg.PostgresError, TimeoutError):
            return False
        await connection.close()
        return True

    await eventually("the server answers", answers, timeout, interval=0.1)


def server_processes(directory: Path) -> list[int]:
    """Of an embedded server: the postmaster, then the processes of its making."""
    return processes_on(directory / "postgresql" / "data")


def processes_on(data: Path) -> list[int]:
    """The same for any server whose data is there."""
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


def _works(pid: int) -> bool:
    try:
        return _stat(pid)[0] != "Z"
    except OSError:
        return False


def _stat(pid: int) -> list[str]:
    """State, parent and what follows them: behind the name, which may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
