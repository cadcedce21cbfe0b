"""The server, the logs and the processes of `scale.py`, and what they cost. See `child.py` for the processes' work."""

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg

from pgbackend import Backend
from pgbackend.errors import PgBackendError

_CHILD = Path(__file__).with_name("child.py")
_TICKS = os.sysconf("SC_CLK_TCK")
_BATCH = 1_000_000
_FILL = """
    INSERT INTO pgbackend.events (id, source, type, subject, time, datacontenttype, data)
    SELECT '00000000-0000-4000-8000-' || lpad(number::text, 12, '0'), '/pgbackend/scale', 'com.example.order.created',
        'order-' || number % 1000, '2025-01-01T00:00:00Z', 'application/octet-stream', $3::bytea
    FROM generate_series($1::bigint, $2::bigint) AS number"""
EVENT_BYTES = 500
"""The size of an event, attributes and data, unless a run says otherwise."""
ATTRIBUTE_BYTES = 150
"""About what the attributes take of it."""


class Process:
    """A running child."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    async def says(self) -> dict[str, Any]:
        """The next facts that it tells."""
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise PgBackendError("A process of the benchmark ended early. Its output says why.")
        said: dict[str, Any] = json.loads(line)
        return said

    async def report(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(b"report\n")
        return await self.says()

    async def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()

    @property
    def peak_bytes(self) -> int:
        """The most memory that it has had (RSS)."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return 0


@asynccontextmanager
async def started(dsn: str, role: str, **options: Any) -> AsyncIterator[Process]:
    """A process in this role; it has not told anything yet."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(_CHILD), json.dumps({"role": role, **options}),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=1 << 28,
        env={**os.environ, "PGBACKEND_DSN": dsn},
    )  # fmt: skip
    child = Process(process)
    try:
        yield child
        await child.end()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@asynccontextmanager
async def fresh_log(server: str, name: str) -> AsyncIterator[str]:
    """The DSN of a new database with an empty log. It is dropped at the end."""
    maintenance = await asyncpg.connect(server)
    await maintenance.execute(f'CREATE DATABASE "{name}"')
    dsn = server.replace("/postgres?", f"/{name}?")
    try:
        backend = Backend(dsn)
        await backend.init()
        await backend.stop()
        yield dsn
    finally:
        await maintenance.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
        await maintenance.close()


async def fill(dsn: str, count: int, *, is_vacuumed: bool = True) -> None:
    """Add so many events by SQL on the server, because that takes a tenth of the time."""
    connection = await asyncpg.connect(dsn)
    payload = os.urandom(EVENT_BYTES - ATTRIBUTE_BYTES)
    for start in range(0, count, _BATCH):
        await connection.execute(_FILL, start + 1, min(start + _BATCH, count), payload)
    # All workers begin now, not each at its next poll.
    await connection.execute('NOTIFY "pgbackend:pgbackend"')
    if is_vacuumed:
        # Autovacuum and the checkpointer would do this later, during a measurement.
        await connection.execute("VACUUM (ANALYZE) pgbackend.events")
        await connection.execute("CHECKPOINT")
    await connection.close()


async def until(condition: Callable[[], Awaitable[object]], *, timeout: float = 600.0) -> None:
    """Return once the condition is true. Raises TimeoutError."""
    async with asyncio.timeout(timeout):
        while not await condition():  # noqa: ASYNC110 - a database can only be polled
            await asyncio.sleep(0.02)


class Cost:
    """The CPU time of workers and of all PostgreSQL processes from now on."""

    def __init__(self, postmaster: int, workers: list[Process]) -> None:
        self._postmaster = postmaster
        self._workers = [worker.pid for worker in workers]
        self._began = time.monotonic()
        self._before = self._seconds()

    def shares(self) -> tuple[float, float]:
        """The shares of one core that the workers and the server have taken."""
        took = time.monotonic() - self._began
        client, server = self._seconds()
        return (client - self._before[0]) / took, (server - self._before[1]) / took

    def _seconds(self) -> tuple[float, float]:
        client = sum(_cpu_ticks(pid) for pid in self._workers)
        server = _cpu_ticks(self._postmaster, with_ended=True) + sum(map(_cpu_ticks, _children(self._postmaster)))
        return client / _TICKS, server / _TICKS


async def find_postmaster(dsn: str) -> int:
    """The process that all processes of the server are children of."""
    connection = await asyncpg.connect(dsn)
    pid: int = await connection.fetchval("SELECT pg_backend_pid()")
    postmaster = int(_stat(pid)[1])
    await connection.close()
    return postmaster


def _children(parent: int) -> list[int]:
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [pid for pid in pids if (fields := _stat(pid)) and int(fields[1]) == parent]


def _cpu_ticks(pid: int, *, with_ended: bool = False) -> int:
    """Its CPU time in ticks. `with_ended`: that of its children that have ended, too."""
    return sum(map(int, _stat(pid)[11 : 15 if with_ended else 13]))


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the program's name; empty when the process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
