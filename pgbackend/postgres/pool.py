"""Connections of one backend: a small pool for short statements, and direct connections for callers that keep one.

All statements go through here. The promise: every call ends within its timeout, and fails with an error of this package
that says whether anything can have happened. A connection whose statement was cut off (timeout, cancellation, lost
socket) is closed, never reused.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import asyncpg

from pgbackend.errors import ConnectionLostError
from pgbackend.postgres import sockets
from pgbackend.postgres.connections import CONNECT_TIMEOUT, Connection, Dialer, Record
from pgbackend.postgres.dsn import Target
from pgbackend.postgres.errors import is_cut_off, translate
from pgbackend.postgres.primaries import Primaries
from pgbackend.postgres.reconnect import repeat

STATEMENT_TIMEOUT = 15.0
"""Seconds. Every statement of this package is short; a longer one means that the network or the server is stalled."""
_CLOSE_TIMEOUT = 2.0
"""Seconds to say goodbye to the server."""
_IDLE_LIFETIME = 300.0


class Database:
    """The connections of one backend.

    `connect()` may be called in any thread with an event loop, everything else only in the loop of `open()`.
    """

    def __init__(self, dsn: str, *, listen_dsn: str | None = None, pool_size: int = 4) -> None:
        """`listen_dsn` bypasses a pooler. Raises ConfigError for a DSN that cannot be used."""
        self._target = Target.of(dsn)
        self._direct_target = Target.of(listen_dsn) if listen_dsn else self._target
        self._pool_size = pool_size
        self._forks = sockets.forks()
        self._primaries = Primaries(Dialer(self._target.application_name or "pgbackend"))
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None

    async def open(self, timeout: float = STATEMENT_TIMEOUT) -> None:
        """Return when the pool is there and PostgreSQL has answered. Raises ConnectionLostError or DatabaseError."""
        self._pool = await asyncpg.create_pool(
            min_size=0,
            # The proof of the fence needs two connections at once.
            max_size=max(self._pool_size, 2),
            reset=_keep_session,
            max_inactive_connection_lifetime=_IDLE_LIFETIME,
            connect=self._connect_pooled,
        )
        try:
            # Each new connection runs statements.
            async with self.acquire(timeout):
                pass
        except BaseException:
            await self.close()
            raise

    async def close(self, *, timeout: float = _CLOSE_TIMEOUT) -> None:
        """Return when no connection of the pool is open, after `timeout` seconds at the latest."""
        pool, self._pool = self._pool, None
        if pool is not None:
            try:
                async with asyncio.timeout(min(timeout, _CLOSE_TIMEOUT)):
                    await pool.close()
            except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                pass  # a server that is gone hears no goodbye
            finally:
                # Does nothing to a closed pool.
                pool.terminate()

    async def connect(self, *, direct: bool = False, timeout: float | None = None) -> Connection:
        """A connection of the caller's own to the primary; a `direct` one bypasses a pooler (`listen_dsn`).

        Without a `timeout` it is 10 s, or the DSN's longer one. Raises as `Primaries.connect()` does.
        """
        if self._forks != sockets.forks():
            raise ConnectionLostError(
                "This process was forked from the one that the Backend belongs to. Make a new Backend in it."
            )
        target = self._direct_target if direct else self._target
        return await self._primaries.connect(target, timeout or max(CONNECT_TIMEOUT, target.connect_timeout or 0.0))

    async def wait_for_primary(self, timeout: float) -> None:
        """Return when a primary is found after none was, or `timeout` seconds have passed."""
        await self._primaries.wait(timeout)

    @asynccontextmanager
    async def acquire(self, timeout: float = STATEMENT_TIMEOUT) -> AsyncIterator[Connection]:
        """A pooled connection. Errors inside come out as this package's; a connection cut off in use is closed."""
        pool = self._pool
        if pool is None:
            raise ConnectionLostError("The connection pool is closed.")
        try:
            connection = await pool.acquire(timeout=timeout)
        except Exception as error:
            translated = translate(error, where=self._target.where)
            if translated is error:
                raise
            raise translated from error
        try:
            yield connection  # type: ignore[misc] # the proxy has the connection's whole interface
        except BaseException as error:
            if is_cut_off(error):
                # A connection that was lost while idle has left the pool already, and raises.
                with suppress(asyncpg.InterfaceError):
                    connection.terminate()
            if not isinstance(error, Exception) or (translated := translate(error)) is error:
                raise
            raise translated from error
        finally:
            # Also into a pool that is closing: it waits for this.
            await _release(connection)

    async def fetch(self, statement: str, *args: object, timeout: float = STATEMENT_TIMEOUT) -> list[Record]:
        """All rows of one statement in its own transaction."""
        async with self.acquire(timeout) as connection:
            return await repeat(lambda: connection.fetch(statement, *args, timeout=timeout), timeout)

    async def fetchrow(self, statement: str, *args: object, timeout: float = STATEMENT_TIMEOUT) -> Record | None:
        """The first row of one statement in its own transaction."""
        async with self.acquire(timeout) as connection:
            return await repeat(lambda: connection.fetchrow(statement, *args, timeout=timeout), timeout)

    async def fetchval(self, statement: str, *args: object, timeout: float = STATEMENT_TIMEOUT) -> Any:
        """The first column of the first row of one statement in its own transaction."""
        async with self.acquire(timeout) as connection:
            return await repeat(lambda: connection.fetchval(statement, *args, timeout=timeout), timeout)

    async def execute(self, statement: str, *args: object, timeout: float = STATEMENT_TIMEOUT) -> None:
        """Run one statement in its own transaction."""
        async with self.acquire(timeout) as connection:
            await repeat(lambda: connection.execute(statement, *args, timeout=timeout), timeout)

    async def _connect_pooled(self, *_: object, **__: object) -> Connection:
        # asyncpg passes the arguments that it would connect with itself.
        return await self.connect()


async def _release(connection: Any) -> None:
    """Give the connection back to its pool, unless it was closed and has left it.

    As `pool.release()`, but without a task of its own, which takes as long as a short statement: 120,000 of 380,000
    instructions for `SELECT 1`. There is nothing to shield: a connection whose use was cancelled is closed.
    """
    if connection._con is not None:  # noqa: SLF001 - asyncpg has no other way
        connection._con._on_release()  # noqa: SLF001 - as above
        await connection._holder.release(None)  # noqa: SLF001 - as above


async def _keep_session(_: object) -> None:
    # asyncpg's reset costs a round trip per statement, and nothing here leaves session state behind.
    return
