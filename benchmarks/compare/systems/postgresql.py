"""The systems on PostgreSQL: a server with fsync and default settings, and a database for each log."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg

from pgbackend.embedded.server import EmbeddedServer

DURABILITY = "fsync before each acknowledgement"
_PATIENCE = 10.0


class PostgreSQL:
    """An embedded server. `programs` is the directory of another PostgreSQL than the wheel's."""

    def __init__(self, programs: Path | None = None, needs: tuple[Path, str] | None = None) -> None:
        self._programs = programs
        self._needs = needs

    def missing(self) -> str | None:
        if self._needs and not self._needs[0].exists():
            return f"{self._needs[0]} is missing: {self._needs[1]}"
        return None

    @asynccontextmanager
    async def running(self, directory: Path) -> AsyncIterator[str]:
        async with EmbeddedServer(directory, programs=self._programs) as server:
            yield server.dsn


EMBEDDED = PostgreSQL()


async def server_version(dsn: str) -> str:
    connection = await asyncpg.connect(dsn)
    try:
        return f"PostgreSQL {str(await connection.fetchval('SHOW server_version')).split()[0]}"
    finally:
        await connection.close()


@asynccontextmanager
async def fresh_database(server: str, system: str, prepare: Callable[[str], Awaitable[None]]) -> AsyncIterator[str]:
    """A copy of the database that `prepare` has made for this system when it was first needed.

    Dropping a database writes a checkpoint, so none falls due in the next measurement.
    """
    name = f"{system}_{uuid.uuid4().hex[:12]}"
    connection = await asyncpg.connect(server)
    try:
        if not await connection.fetchval("SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)", system):
            await connection.execute(f"CREATE DATABASE {system}")
            await prepare(server.replace("/postgres?", f"/{system}?"))
        await _clone(connection, system, name)
        yield server.replace("/postgres?", f"/{name}?")
        await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await connection.close()


async def _clone(connection: "asyncpg.Connection[asyncpg.Record]", template: str, name: str) -> None:
    async with asyncio.timeout(_PATIENCE):
        while True:
            try:
                await connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
            except asyncpg.ObjectInUseError:  # the server has not yet noticed that the connection is closed
                await asyncio.sleep(0.05)
            else:
                return


def pool(dsn: str, tasks: int) -> "asyncpg.Pool[asyncpg.Record]":
    """A connection for each task. asyncpg would send a query after each use, which doubles the round trips."""
    return asyncpg.create_pool(dsn, min_size=tasks, max_size=tasks, reset=_keep)


async def _keep(_: object) -> None:
    """Nothing to reset: our statements leave nothing behind."""


async def vacuum(dsn: str) -> None:
    """The work that autovacuum does within a minute."""
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute("VACUUM ANALYZE")
    finally:
        await connection.close()


async def one_value(dsn: str, query: str, *arguments: object) -> int:
    connection = await asyncpg.connect(dsn)
    try:
        return int(await connection.fetchval(query, *arguments))
    finally:
        await connection.close()
