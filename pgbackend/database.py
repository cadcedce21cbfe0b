"""Connections to PostgreSQL: a small pool for short statements, and direct connections for those who keep one.

The only module that imports asyncpg. Its promise: every call ends within its timeout, and fails with an error of this
package that says whether anything can have happened. A connection whose statement was cut off (timeout, cancellation,
lost socket) is thrown away, never reused.

A connection pooler (pgbouncer) in between is found out, not configured: PostgreSQL tells each client the process id of
its backend, for cancel requests. A pooler has to tell a number of its own, because the backend changes; so one that is
not `pg_backend_pid()` is a pooler's. Through it nothing is kept on the server from one statement to the next.
"""

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

import asyncpg

from pgbackend import facts
from pgbackend.errors import ConfigError, ConnectionLostError, DatabaseError, SchemaError

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]
else:
    Connection = asyncpg.Connection  # generic in its stubs only
Record = asyncpg.Record

CONNECT_TIMEOUT = 10.0
STATEMENT_TIMEOUT = 15.0
"""Seconds. Every statement of ours is short; one that takes longer means a stalled network or server."""

_TYPES = "SELECT NULL::bigint[], NULL::boolean[], NULL::bytea[], NULL::integer[], NULL::tid[]"
"""The types that asyncpg looks up before it first sends or reads one of them."""

# What a statement may meet when its server, or the way to it, is going away.
_LOST_SQLSTATES = frozenset({
    "57P01",  # admin_shutdown: also what pg_terminate_backend sends
    "57P02",  # crash_shutdown
    "57P03",  # cannot_connect_now: starting up, or in recovery
    "57P05",  # idle_session_timeout
    "25006",  # read_only_sql_transaction: a primary that became a standby
    "25P03",  # idle_in_transaction_session_timeout
    "53300",  # too_many_connections
})  # fmt: skip
_POOLER_SQLSTATE = "08P01"
"""protocol_violation: what pgbouncer gives each error of its own. PostgreSQL would have to be sent nonsense."""
_SCHEMA_SQLSTATES = frozenset({"3F000", "42P01", "42703", "42883"})


def normalize_dsn(dsn: str) -> str:
    """The DSN as asyncpg takes it: any of the spellings that people have.

    >>> normalize_dsn("postgres+asyncpg://me@db/app?ssl=require")
    'postgres://me@db/app?sslmode=require'

    Raises ConfigError when it is no PostgreSQL URL.
    """
    scheme, separator, rest = dsn.partition("://")
    if not separator:
        raise ConfigError(f"The DSN {_shown(dsn)!r} is not a URL: expected postgresql://user@host:port/database.")
    base, _, driver = scheme.lower().partition("+")
    if base not in ("postgres", "postgresql") or driver not in ("", "asyncpg", "psycopg", "psycopg2"):
        raise ConfigError(f"The DSN's scheme is {scheme!r}: expected postgresql:// or postgres://.")
    head, question, query = rest.partition("?")
    if question:
        # SQLAlchemy's spelling for asyncpg: ?ssl=…; libpq's is ?sslmode=….
        pairs = [("sslmode" if k == "ssl" else k, v) for k, v in parse_qsl(query, keep_blank_values=True)]
        return f"{base}://{head}?{urlencode(pairs, quote_via=quote)}"
    return f"{base}://{head}"


def describe_dsn(dsn: str) -> str:
    """Host, port and database of a DSN, fit to be printed: no user, no password."""
    parts = urlsplit(dsn)
    query = dict(parse_qsl(parts.query))
    host = parts.netloc.rpartition("@")[2] or query.get("host", "")
    database = parts.path.lstrip("/") or query.get("dbname", query.get("database", ""))
    return f"{host or 'localhost'}/{database}" if database else host or "localhost"


def _shown(dsn: str) -> str:
    parts = urlsplit(dsn)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if parts.netloc else "…"


_TELL_AGAIN = 30.0
"""Seconds after which a failure that goes on is told again."""


class Backoff:
    """Waits between tries at something that is down: doubling from 50 ms to a cap, with jitter, until `reset()`."""

    def __init__(self, *, cap: float = 2.0) -> None:
        self._cap = cap
        self._next = 0.05
        self._told_at = 0.0
        self.failures = 0
        """Since it worked last."""

    def reset(self) -> None:
        """It worked."""
        self._next = 0.05
        self.failures = 0

    def failed(self) -> int:
        """A try has failed. The level to tell it at: WARNING the first time and each 30 s, DEBUG in between.

        Tries go on each second or so, in every loop of every worker: that it began is news, and how long it lasts.
        """
        self.failures += 1
        now = time.monotonic()
        if self.failures > 1 and now < self._told_at + _TELL_AGAIN:
            return logging.DEBUG
        self._told_at = now
        return logging.WARNING

    async def wait(self) -> None:
        # Jitter: workers that lost the same server must not come back in step.
        delay = self._next * (0.5 + random.random())  # noqa: S311 - not a secret
        self._next = min(self._next * 2, self._cap)
        await asyncio.sleep(delay)


class _Pooled(Connection):
    """A connection through a pooler, without a statement cache: each statement may meet another backend.

    asyncpg then parses, asks for the types, parses again, binds and executes before its one Sync: for the pooler that
    is one transaction, and as on a direct connection no client can stop between a lock and the commit.
    """


def is_pooled(connection: Connection) -> bool:
    """Whether this connection leads through a pooler: what is said on it once (LISTEN) is not there the next time."""
    # asyncpg's isinstance() takes any of its connections for one of any class.
    return type(connection) is _Pooled


class Database:
    """The connections of one backend."""

    def __init__(self, dsn: str, *, listen_dsn: str | None = None, pool_size: int = 4, name: str = "pgbackend") -> None:
        self.dsn = normalize_dsn(dsn)
        self.listen_dsn = normalize_dsn(listen_dsn) if listen_dsn else self.dsn
        self._pooled: set[str] = set()
        """The DSNs that were found to lead through a pooler."""
        self._where = describe_dsn(self.dsn)
        self._pool_size = pool_size
        self._name = name
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None

    async def open(self, timeout: float = STATEMENT_TIMEOUT) -> None:
        """Make the pool and show that PostgreSQL answers. Raises ConnectionLostError or DatabaseError when not."""
        connect: Any = self._connect  # its stub asks for more than the pool gives
        try:
            self._pool = await asyncpg.create_pool(
                self.dsn,
                min_size=0,
                max_size=self._pool_size,
                timeout=CONNECT_TIMEOUT,
                connect=connect,
                reset=_keep_session,
                max_inactive_connection_lifetime=300.0,
                server_settings={"application_name": self._name},
            )
        except Exception as error:
            raise translate(error) from error
        try:
            # Each new connection asks something.
            async with self.acquire(timeout):
                pass
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            # Nobody uses it any more: a polite goodbye, but no waiting for a server that is gone.
            try:
                async with asyncio.timeout(2.0):
                    await pool.close()
            except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                pool.terminate()

    async def connect(self, *, direct: bool = False, timeout: float = CONNECT_TIMEOUT) -> Connection:
        """A connection of the caller's own; `direct` ones bypass a pooler, where there is one (`listen_dsn`)."""
        dsn = self.listen_dsn if direct else self.dsn
        try:
            return await self._connect(dsn, timeout=timeout, server_settings={"application_name": self._name})
        except Exception as error:
            raise translate(error, where=describe_dsn(dsn)) from error

    async def _connect(self, dsn: str, *, timeout: float, **options: Any) -> Connection:
        """A connection that is used as the way it came demands: see `is_pooled()`.

        Each connection is asked, not the DSN once: it may have several hosts, and tomorrow's may lead elsewhere.
        """
        if dsn not in self._pooled:
            connection: Connection = await asyncpg.connect(dsn, timeout=timeout, **options)
            try:
                if await _backend_pid(connection, timeout) == connection.get_server_pid():
                    return connection
                await connection.close(timeout=timeout)
            except BaseException:
                connection.terminate()
                raise
            self._pooled.add(dsn)
            facts.emit("pooler found", server=describe_dsn(dsn))
        options["connection_class"] = _Pooled
        pooled: Connection = await asyncpg.connect(dsn, timeout=timeout, statement_cache_size=0, **options)
        try:
            # In one transaction: asyncpg turns JIT off in the session, looks the types up, and turns it on again.
            async with pooled.transaction():
                await pooled.fetchrow(_TYPES, timeout=timeout)
        except BaseException:
            pooled.terminate()
            raise
        return pooled

    @asynccontextmanager
    async def acquire(self, timeout: float = STATEMENT_TIMEOUT) -> AsyncIterator[Connection]:
        """A pooled connection. Errors inside come out as this package's; a connection cut off in work is dropped."""
        pool = self._pool
        if pool is None:
            raise ConnectionLostError("The connection pool is closed.")
        try:
            connection = await pool.acquire(timeout=timeout)
        except Exception as error:
            raise translate(error, where=self._where) from error
        try:
            yield connection  # type: ignore[misc] # the proxy has the connection's whole interface
        except BaseException as error:
            if _is_cut_off(error):
                # One that was lost while idle has left the pool by itself, and says so.
                with suppress(asyncpg.InterfaceError):
                    connection.terminate()
            translated = translate(error) if isinstance(error, Exception) else error
            if translated is error:
                raise
            raise translated from error
        finally:
            # Also to a pool that is closing: it waits for this.
            await pool.release(connection)

    async def fetch(self, statement: str, *args: object, timeout: float = STATEMENT_TIMEOUT) -> list[Record]:
        """All rows of one statement in its own transaction."""
        async with self.acquire(timeout) as connection:
            return await connection.fetch(statement, *args, timeout=timeout)

    async def fetchrow(self, statement: str, *args: object, timeout: float = STATEMENT_TIMEOUT) -> Record | None:
        async with self.acquire(timeout) as connection:
            return await connection.fetchrow(statement, *args, timeout=timeout)

    async def fetchval(self, statement: str, *args: object, timeout: float = STATEMENT_TIMEOUT) -> Any:
        async with self.acquire(timeout) as connection:
            return await connection.fetchval(statement, *args, timeout=timeout)

    async def execute(self, statement: str, *args: object, timeout: float = STATEMENT_TIMEOUT) -> None:
        async with self.acquire(timeout) as connection:
            await connection.execute(statement, *args, timeout=timeout)


async def _backend_pid(connection: Connection, timeout: float) -> int:
    """Who answers. By COPY, the only way to ask in one message, and so of one backend whatever stands between."""
    answer = bytearray()

    async def keep(data: bytes) -> None:
        answer.extend(data)

    await connection.copy_from_query("SELECT pg_backend_pid()", output=keep, timeout=timeout)
    return int(answer)


async def _keep_session(_: object) -> None:
    # asyncpg's reset costs a round trip a statement; nothing here leaves session state behind.
    return


def _is_cut_off(error: BaseException) -> bool:
    """Whether a statement may still be running, or its connection be useless, after this error."""
    if isinstance(error, asyncpg.PostgresError):
        return error.sqlstate in _LOST_SQLSTATES
    return not isinstance(error, DatabaseError)


def is_refused_for_data(error: BaseException) -> bool:
    """Whether PostgreSQL refused the values (classes 22 and 23), so that other values may pass."""
    if isinstance(error, UnicodeEncodeError):
        # Refused on the way, by COPY: it has been called off.
        return True
    return isinstance(error, asyncpg.PostgresError) and (error.sqlstate or "")[:2] in ("22", "23")


def is_out_of_segments(error: BaseException) -> bool:
    """Whether a position was drawn that no segment of the log holds."""
    # The same class as a CHECK's refusal, but no constraint has a name here.
    return isinstance(error, asyncpg.CheckViolationError) and error.constraint_name is None


def is_definite(error: BaseException) -> bool:
    """Whether the server itself said that the statement had no effect."""
    if not isinstance(error, asyncpg.PostgresError) or isinstance(error, asyncpg.PostgresConnectionError):
        return False
    return error.sqlstate is not None and error.sqlstate not in ("57P01", "57P02", "57P05", "25P03")


def translate(error: Exception, *, where: str | None = None) -> Exception:
    """The error of this package for one of asyncpg, the socket or the clock; any other error as it is.

    `where`: the server's name, when it is the connecting that failed.
    """
    server = f"PostgreSQL at {where}" if where else "PostgreSQL"
    if isinstance(error, DatabaseError | ConfigError):
        return error
    if isinstance(error, asyncpg.ConnectionDoesNotExistError) and isinstance(
        error.__cause__, asyncpg.ProtocolViolationError
    ):
        # What pgbouncer said before it hung up.
        error = error.__cause__
    text = str(error).strip() or type(error).__name__
    if isinstance(error, asyncpg.PostgresError):
        state = error.sqlstate
        if state == _POOLER_SQLSTATE:
            return ConnectionLostError(
                f"{server} is not available: {text}. This is the connection pooler's word: "
                "look in its configuration for what it names, and in its log.",
                sqlstate=state,
            )
        if isinstance(error, asyncpg.PostgresConnectionError) or state in _LOST_SQLSTATES:
            return ConnectionLostError(f"{server} is not available: {text}. Try again when it is back.", sqlstate=state)
        if state in _SCHEMA_SQLSTATES:
            return SchemaError(f"The log's tables are not as expected: {text}. Run `pgbackend migrate`.")
        return DatabaseError(f"PostgreSQL refused the statement: {text} (SQLSTATE {state}).", sqlstate=state)
    if isinstance(error, asyncpg.exceptions.ClientConfigurationError):
        return ConfigError(f"The DSN is not usable: {text}.")
    if isinstance(error, TimeoutError):
        return ConnectionLostError(f"{server} did not answer in time. Check that it runs and can be reached.")
    if isinstance(error, asyncpg.InterfaceError | OSError | asyncpg.InternalClientError):
        return ConnectionLostError(f"{server} cannot be reached: {text}. Check that it runs, and the DSN.")
    return error


def on_warning(connection: Connection, callback: Callable[[str], None]) -> None:
    """Call `callback(sqlstate)` for each warning that the server sends on this connection."""

    def listener(_: object, message: asyncpg.PostgresLogMessage) -> None:
        callback(message.sqlstate or "")

    connection.add_log_listener(listener)
