"""Connections to PostgreSQL: a small pool for short statements, and direct connections for those who keep one.

The only module that imports asyncpg. Its promise: every call ends within its timeout, and fails with an error of this
package that says whether anything can have happened. A connection whose statement was cut off (timeout, cancellation,
lost socket) is thrown away, never reused.

A log has one primary, and every connection is to it. So each new one is asked what it leads to, and is closed again
when that is

- a standby, which cannot run the log, or
- a server that a failover has left behind: one on an older timeline than this process has seen of the same cluster. A
  former primary that is up again looks like any other but for that, and what it takes is thrown away in the end.

And when one leads to a newer timeline, all those to older ones are closed: from then on a process does not append to
one server while it reads from another, and what hangs on a dead server is over as soon as anything has found the new
one.

A connection pooler (pgbouncer) in between is found out, not configured: PostgreSQL tells each client the process id of
its backend, for cancel requests. A pooler has to tell a number of its own, because the backend changes; so one that is
not `pg_backend_pid()` is a pooler's. Through it nothing is kept on the server from one statement to the next.
"""

import asyncio
import logging
import os
import random
import re
import socket
import ssl
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, urlencode

import asyncpg

from pgbackend import facts
from pgbackend.errors import ConfigError, ConnectionLostError, DatabaseError, SchemaError
from pgbackend.postgres import sockets
from pgbackend.postgres.dsn import DEFAULT_HOSTS, Host, Target
from pgbackend.postgres.sql import load
from pgbackend.postgres.sql.statements import ConnectSql

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]
else:
    Connection = asyncpg.Connection  # generic in its stubs only
Record = asyncpg.Record
_Result = TypeVar("_Result")

CONNECT_TIMEOUT = 10.0
STATEMENT_TIMEOUT = 15.0
"""Seconds. Every statement of ours is short; one that takes longer means a stalled network or server."""
_GOODBYE = 2.0
"""Seconds that the server has to hear that connections are closed."""
NEXT_HOST = 0.5
"""Seconds that a host has to answer before the next one of the DSN is asked as well."""
_SILENCE = 10
"""Seconds after which the kernel calls a connection lost whose other end acknowledges nothing: its machine vanished."""
_KEEPALIVE = (5, 2)
"""Seconds of quiet after which it asks whether the other end is there, and between two such questions."""
_TYPES = "SELECT NULL::bigint[], NULL::boolean[], NULL::bytea[], NULL::integer[], NULL::tid[]"
"""The types that asyncpg looks up before it first sends or reads one of them."""
STANDBY = "25006"
"""The SQLSTATE of whoever wants to write on a standby, and of errors that say that a server is one."""

# What a statement may meet when its server, or the way to it, is going away.
_LOST_SQLSTATES = frozenset({
    "57P01",  # admin_shutdown: also what pg_terminate_backend sends
    "57P02",  # crash_shutdown
    "57P03",  # cannot_connect_now: starting up, or in recovery
    "57P05",  # idle_session_timeout
    "25006",  # read_only_sql_transaction: a primary that became a standby
    "0A000",  # feature_not_supported: reading an unlogged table, the incarnation's, on such a one
    "25P03",  # idle_in_transaction_session_timeout
    "53300",  # too_many_connections
})  # fmt: skip
_OTHER_ENGINES = {
    "-yb-": "YugabyteDB",
    "yugabyte": "YugabyteDB",
    "cockroachdb": "CockroachDB",
    "aurora dsql": "Aurora DSQL",
    "aurora limitless": "Aurora Limitless",
    "greenplum": "Greenplum",
    "cloudberry": "Cloudberry",
}
"""Databases that speak PostgreSQL's protocol and are none, by what their `version()` has."""
_POOLER_SQLSTATE = "08P01"
"""protocol_violation: what pgbouncer gives each error of its own. PostgreSQL would have to be sent nonsense."""
INSUFFICIENT_PRIVILEGE = "42501"
_CONFLICTS = frozenset({"40001", "40P01"})
"""serialization_failure and deadlock_detected: nothing is wrong with the statement, and nothing of it has happened."""
_REPEAT_PAUSE = 0.5
"""Seconds between two tries of it, at most."""
_SCHEMA_SQLSTATES = frozenset({"3F000", "42P01", "42703", "42883"})


_TELL_AGAIN = 30.0
"""Seconds after which a failure that goes on is told again."""


class GrowingDelay:
    """Waits between tries at something that is down: doubling from 50 ms to a cap, with jitter, until `reset()`.

    With a `database` no longer than until anybody has found its primary: whoever finds it first wakes all others.
    """

    def __init__(self, database: "Database | None" = None, *, cap: float = 2.0) -> None:
        self._database = database
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
        if self._database is None:
            await asyncio.sleep(delay)
        else:
            await self._database.wait_for_primary(delay)


class _Pooled(Connection):
    """A connection through a pooler, without a statement cache: each statement may meet another backend.

    asyncpg then parses, asks for the types, parses again, binds and executes before its one Sync: for the pooler that
    is one transaction, and as on a direct connection no client can stop between a lock and the commit.
    """


def is_pooled(connection: Connection) -> bool:
    """Whether this connection leads through a pooler: what is said on it once (LISTEN) is not there the next time."""
    # asyncpg's isinstance() takes any of its connections for one of any class.
    return type(getattr(connection, "_con", connection)) is _Pooled


class Database:
    """The connections of one backend.

    `connect()` is for any thread with an event loop, everything else for the loop of `open()`.
    """

    def __init__(self, dsn: str, *, listen_dsn: str | None = None, pool_size: int = 4, name: str = "pgbackend") -> None:
        self._target = Target.of(dsn)
        self._listen_target = Target.of(listen_dsn) if listen_dsn else self._target
        self._pool_size = pool_size
        self._forks = sockets.forks()
        # A name that the DSN gives its connections stays: it tells people whose they are.
        self._name = self._target.application_name or name
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        self._sql = load(ConnectSql, "connect", schema="pgbackend")
        self._primaries = _Primaries()
        self._pooled: set[tuple[Target, Host]] = set()
        """Those that were found to be poolers."""
        self._last: dict[Target, Host] = {}
        """The host that was the primary when it was looked for last."""

    async def open(self, timeout: float = STATEMENT_TIMEOUT) -> None:
        """Make the pool and show that PostgreSQL answers. Raises ConnectionLostError or DatabaseError when not."""
        self._pool = await asyncpg.create_pool(
            min_size=0,
            # The fence is proven with two at once.
            max_size=max(self._pool_size, 2),
            reset=_keep_session,
            max_inactive_connection_lifetime=300.0,
            connect=self._connect_pooled,
        )
        try:
            # Each new connection asks something.
            async with self.acquire(timeout):
                pass
        except BaseException:
            await self.close()
            raise

    async def close(self, *, timeout: float = _GOODBYE) -> None:
        """Return once no connection of the pool is open, after `timeout` seconds at the latest."""
        pool, self._pool = self._pool, None
        if pool is not None:
            # Nobody uses it any more: a polite goodbye, but no waiting for a server that is gone.
            try:
                async with asyncio.timeout(min(timeout, _GOODBYE)):
                    await pool.close()
            except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                pass
            finally:
                # Does nothing to one that is closed.
                pool.terminate()

    async def _connect_pooled(self, *_: object, **__: object) -> Connection:
        # What asyncpg hands over is what it would connect with by itself.
        return await self.connect()

    async def connect(self, *, direct: bool = False, timeout: float | None = None) -> Connection:
        """A connection of the caller's own to the primary; `direct` ones bypass a pooler (`listen_dsn`).

        Raises ConnectionLostError, after `timeout` seconds at the latest, when none of the hosts is a primary now; its
        `sqlstate` is 25006 when one of them is a standby. Without a `timeout` it is 10 s, or the DSN's longer one.
        """
        if self._forks != sockets.forks():
            raise ConnectionLostError(
                "This process was forked from the one that the Backend belongs to. Make a new Backend in it."
            )
        target = self._listen_target if direct else self._target
        return await self._connect_first(target, timeout or max(CONNECT_TIMEOUT, target.connect_timeout or 0.0))

    async def _connect_first(self, target: Target, timeout: float) -> Connection:
        """The first connection to a primary. Hosts are asked in their order, the one that was it last before all.

        The next one is asked when one refuses, or has not answered for `NEXT_HOST` seconds, while that goes on. As long
        as one keeps silent, those that have refused are asked again: a standby becomes the primary meanwhile.
        """
        hosts = target.hosts
        last = self._last.get(target)
        waiting = deque(sorted(hosts, key=lambda host: host != last))
        refusals: dict[Host, Exception] = {}
        asked: dict[asyncio.Task[Connection], Host] = {}
        try:
            async with asyncio.timeout(timeout):
                while waiting or asked:
                    if waiting:
                        host = waiting.popleft()
                        asked[asyncio.create_task(self._connect_to(target, host), name=f"connect to {host}")] = host
                    done, _ = await asyncio.wait(asked, timeout=NEXT_HOST, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        host = asked.pop(task)
                        error = task.exception()
                        if error is None:
                            self._last[target] = host
                            self._primaries.found()
                            return task.result()
                        assert isinstance(error, Exception)  # noqa: S101 - nobody else cancels these
                        refusals[host] = error
                    if not done and not waiting:
                        waiting.extend(host for host in hosts if host not in asked.values())
        except TimeoutError as error:
            # What one has said before it was asked again says more.
            for host in asked.values():
                refusals.setdefault(host, translate(error, where=_name(target, host)))
        finally:
            for task in asked:
                task.cancel()
            for other in await asyncio.gather(*asked, return_exceptions=True):
                if isinstance(other, asyncpg.Connection):
                    other.terminate()
        self._primaries.missing = True
        raise _none_of(target, [refusals[host] for host in hosts if host in refusals])

    async def wait_for_primary(self, timeout: float) -> None:
        """Return once a primary was found when there had been none, or `timeout` seconds have passed."""
        await self._primaries.wait(timeout)

    async def _connect_to(self, target: Target, host: Host) -> Connection:
        """A connection to this host, if that is the log's primary."""
        try:
            connection = await self._reach(target, host)
            try:
                _notice_silence(connection)
                role = await connection.fetchrow(self._sql.find_role, timeout=CONNECT_TIMEOUT)
                assert role is not None  # noqa: S101 - a SELECT of scalars
                _refuse_engine(target, host, version=role["version"])
                _refuse_role(target, host, in_recovery=role["in_recovery"], read_only=role["read_only"])
                _refuse_encoding(target, host, role["encoding"])
                self._primaries.admit(connection, await self._find_timeline(connection), where=_name(target, host))
                await self._prepare(connection)
            except BaseException:
                connection.terminate()
                raise
        except Exception as error:
            translated = translate(error, where=_name(target, host))
            if translated is error:
                raise
            raise translated from error
        return connection

    async def _reach(self, target: Target, host: Host) -> Connection:
        """A connection to this host that is used as the way there demands: see `is_pooled()`.

        Each connection is asked, not the host once: tomorrow's may lead elsewhere.
        """
        if (target, host) not in self._pooled:
            connection = await self._dial(target, host)
            try:
                if await _backend_pid(connection) == connection.get_server_pid():
                    return connection
                await connection.close(timeout=CONNECT_TIMEOUT)
            except BaseException:
                connection.terminate()
                raise
            self._pooled.add((target, host))
            facts.emit("pooler found", server=_name(target, host))
        pooled = await self._dial(target, host, connection_class=_Pooled, statement_cache_size=0)
        try:
            # In one transaction: asyncpg turns JIT off in the session, looks the types up, and turns it on again.
            async with pooled.transaction():
                await pooled.fetchrow(_TYPES, timeout=CONNECT_TIMEOUT)
        except BaseException:
            pooled.terminate()
            raise
        return pooled

    async def _dial(self, target: Target, host: Host, **options: Any) -> Connection:
        loop = sockets.Loop()
        tls = dict(target.options)
        if context := _tls_context(tls):
            options["ssl"] = context
        connection: Connection = await asyncpg.connect(  # type: ignore[call-overload] # it takes several hosts, too
            # Only what cannot be said otherwise: what asyncpg reads from a DSN it reads by rules of its own.
            f"postgresql:///?{urlencode(tls, quote_via=quote)}" if tls else None,
            host=host.address or host.name or list(DEFAULT_HOSTS),
            port=host.port or 5432,
            user=target.user,
            password=target.password,
            passfile=target.passfile,
            # Without a name in its path the DSN above names a database of no name.
            database=target.database or os.environ.get("PGDATABASE") or target.user,
            timeout=target.connect_timeout or CONNECT_TIMEOUT,
            target_session_attrs="any",
            server_settings={**dict(target.settings), "application_name": self._name},
            loop=loop,
            **options,
        )
        # It looks up its own tasks by their loop.
        connection._loop = loop.running  # type: ignore[attr-defined] # noqa: SLF001 - asyncpg has no other way
        return connection

    async def _prepare(self, connection: Connection) -> None:
        """Make the session what the statements rely on. Raises ConfigError where that is not possible."""
        if not is_pooled(connection):
            await connection.execute(self._sql.prepare_session, timeout=CONNECT_TIMEOUT)
        elif await connection.fetchval(self._sql.hides_warnings, timeout=CONNECT_TIMEOUT):
            raise ConfigError(
                "client_min_messages hides warnings, and through a pooler pgbackend cannot change it: a commit without "
                "its standby would go unnoticed. Set it to warning for this role and database."
            )

    async def _find_timeline(self, connection: Connection) -> tuple[int, int] | None:
        """The cluster and its timeline; None for a service that does not tell."""
        try:
            row = await connection.fetchrow(self._sql.find_timeline, timeout=CONNECT_TIMEOUT)
        except asyncpg.PostgresConnectionError:
            raise
        except asyncpg.PostgresError:
            return None
        return (row["system_identifier"], row["timeline"]) if row else None

    @asynccontextmanager
    async def acquire(self, timeout: float = STATEMENT_TIMEOUT) -> AsyncIterator[Connection]:
        """A pooled connection. Errors inside come out as this package's; a connection cut off in work is dropped."""
        pool = self._pool
        if pool is None:
            raise ConnectionLostError("The connection pool is closed.")
        try:
            connection = await pool.acquire(timeout=timeout)
        except Exception as error:
            raise translate(error, where=self._target.where) from error
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
            return await repeat(lambda: connection.fetch(statement, *args, timeout=timeout), timeout)

    async def fetchrow(self, statement: str, *args: object, timeout: float = STATEMENT_TIMEOUT) -> Record | None:
        async with self.acquire(timeout) as connection:
            return await repeat(lambda: connection.fetchrow(statement, *args, timeout=timeout), timeout)

    async def fetchval(self, statement: str, *args: object, timeout: float = STATEMENT_TIMEOUT) -> Any:
        async with self.acquire(timeout) as connection:
            return await repeat(lambda: connection.fetchval(statement, *args, timeout=timeout), timeout)

    async def execute(self, statement: str, *args: object, timeout: float = STATEMENT_TIMEOUT) -> None:
        async with self.acquire(timeout) as connection:
            await repeat(lambda: connection.execute(statement, *args, timeout=timeout), timeout)


async def repeat(attempt: Callable[[], Awaitable[_Result]], timeout: float) -> _Result:
    """The result of `attempt()`, one transaction: made again while PostgreSQL rolls it back to resolve a conflict.

    Raises what the last attempt raised, once `timeout` seconds have passed.
    """
    backoff = GrowingDelay(cap=_REPEAT_PAUSE)
    deadline = time.monotonic() + timeout
    while True:
        try:
            return await attempt()
        except (asyncpg.PostgresError, DatabaseError) as error:
            if error.sqlstate not in _CONFLICTS or time.monotonic() > deadline:
                raise
            facts.emit("repeated after a conflict", level=logging.DEBUG, error=str(error))
        await backoff.wait()


def _tls_context(tls: dict[str, str]) -> ssl.SSLContext | None:
    """A context for sslrootcert=system, which asyncpg does not know.

    Raises ConfigError for a file that is not there, which asyncpg would tell as a failure of the network.
    """
    system = tls.get("sslrootcert") == "system"
    for name in ("sslcert", "sslkey", "sslcrl") if system else ("sslcert", "sslkey", "sslcrl", "sslrootcert"):
        if name in tls and not os.access(tls[name], os.R_OK):
            raise ConfigError(f"{name} in the DSN is {tls[name]!r}: there is no such file, or it may not be read.")
    if not system:
        return None
    context = ssl.create_default_context()
    if "sslcert" in tls:
        context.load_cert_chain(tls["sslcert"], tls.get("sslkey"), password=lambda: tls.get("sslpassword", ""))
    return context


def _name(target: Target, host: Host) -> str:
    """A host as errors call it: as the DSN says it when that names only one."""
    return str(host) if len(target.hosts) > 1 else target.where


def _refuse_engine(target: Target, host: Host, *, version: str) -> None:
    for mark, name in _OTHER_ENGINES.items():
        if mark in version.lower():
            raise DatabaseError(
                f"PostgreSQL at {_name(target, host)} is {name} ({version}): its locks do not show which transactions "
                "append, so events could be lost. Use PostgreSQL itself."
            )


def _refuse_role(target: Target, host: Host, *, in_recovery: bool, read_only: bool) -> None:
    if in_recovery:
        raise ConnectionLostError(
            f"PostgreSQL at {_name(target, host)} is a standby: connect to the primary.", sqlstate=STANDBY
        )
    if read_only and target.read_write:
        raise ConnectionLostError(
            f"PostgreSQL at {_name(target, host)} takes no writes: unset default_transaction_read_only."
        )


def _refuse_encoding(target: Target, host: Host, encoding: str) -> None:
    """Any other one lacks characters that events and errors have, and what has them could never be stored."""
    if encoding != "UTF8":
        raise SchemaError(
            f"The database at {_name(target, host)} has the encoding {encoding}: a log needs UTF8. Make one with "
            "CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0.",
            found=encoding,
            expected="UTF8",
        )


def _none_of(target: Target, refusals: Sequence[Exception]) -> Exception:
    """What is to be said when every host has refused."""
    if len(refusals) == 1 or not any(isinstance(error, ConnectionLostError) for error in refusals):
        return refusals[0]
    return ConnectionLostError(
        f"None of {target.where} is a primary now. " + " ".join(str(error) for error in refusals),
        sqlstate=STANDBY if any(getattr(error, "sqlstate", None) == STANDBY for error in refusals) else None,
    )


class _Primaries:
    """Which timeline the log has come to, as far as this process knows, and the connections to it."""

    def __init__(self) -> None:
        self._timelines: dict[int, int] = {}
        """By cluster. Another cluster is another database, restored or moved there: it has a count of its own."""
        self._connections: weakref.WeakKeyDictionary[Connection, tuple[tuple[int, int], asyncio.AbstractEventLoop]] = (
            weakref.WeakKeyDictionary()
        )
        self._waiters: set[asyncio.Future[None]] = set()
        self._guard = threading.Lock()
        self.missing = False
        """Whether the last look for a primary found none."""

    def found(self) -> None:
        """Somebody is connected to one: if it was missing, whoever waits for it may go on."""
        if not self.missing:
            return
        self.missing = False
        with self._guard:
            waiters, self._waiters = self._waiters, set()
        for waiter in waiters:
            with suppress(RuntimeError):
                waiter.get_loop().call_soon_threadsafe(_wake, waiter)

    async def wait(self, timeout: float) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        with self._guard:
            self._waiters.add(waiter)
        try:
            await asyncio.wait({waiter}, timeout=timeout)
        finally:
            with self._guard:
                self._waiters.discard(waiter)

    def admit(self, connection: Connection, life: tuple[int, int] | None, where: str) -> None:
        """Count this connection in, and close those that it shows to lead to a server that was left behind.

        Raises ConnectionLostError when it is this one.
        """
        if life is None:
            return
        cluster, timeline = life
        with self._guard:
            known = self._timelines.get(cluster, 0)
            if timeline < known:
                raise ConnectionLostError(
                    f"PostgreSQL at {where} was left behind by a failover: it is on timeline {timeline}, the log has "
                    f"gone on on {known}. Stop it, or make it a standby."
                )
            self._timelines[cluster] = timeline
            behind = [
                (other, loop)
                for other, (at, loop) in self._connections.items()
                if at[0] == cluster and at[1] < timeline
            ]
            for other, _ in behind:
                del self._connections[other]
            self._connections[connection] = life, asyncio.get_running_loop()
        for other, loop in behind:
            # In its own loop, which may be another thread's, and gone by now.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(_terminate, other)


def _wake(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)


def _terminate(connection: Connection) -> None:
    if not connection.is_closed():
        connection.terminate()


def _notice_silence(connection: Connection) -> None:
    """Have the kernel say that the connection is lost when the other machine has vanished, in work and at rest.

    Without it a statement on its way to such a machine waits for its timeout, and LISTEN for ever.
    """
    transport = connection._transport  # type: ignore[attr-defined] # noqa: SLF001 - asyncpg has no other way to its socket
    wire: socket.socket = transport.get_extra_info("socket")
    if wire.family == socket.AF_UNIX:
        return
    quiet, again = _KEEPALIVE
    for level, option, value in (
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, quiet),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, again),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _SILENCE * 1000),
    ):
        wire.setsockopt(level, option, value)


async def _backend_pid(connection: Connection) -> int:
    """Who answers. By COPY, the only way to ask in one message, and so of one backend whatever stands between."""
    answer = bytearray()

    async def keep(data: bytes) -> None:
        answer.extend(data)

    await connection.copy_from_query("SELECT pg_backend_pid()", output=keep, timeout=CONNECT_TIMEOUT)
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


def asks_for_other_values(error: DatabaseError) -> bool:
    """Whether a statement was refused for what it was given (or for its size), so that other values may pass.

    Of classes 22 and 23, and 54 (program_limit_exceeded); 53200 is out_of_memory.
    """
    return error.sqlstate is not None and (error.sqlstate[:2] in ("22", "23", "54") or error.sqlstate == "53200")


def is_out_of_segments(error: BaseException) -> bool:
    """Whether a position was drawn that no segment of the log holds."""
    # The same class as a CHECK's refusal, but no constraint has a name here.
    return isinstance(error, asyncpg.CheckViolationError) and error.constraint_name is None


def is_position_taken(error: BaseException) -> bool:
    """Whether the sequence gave out the position of an event that is there: the primary key of a segment refused it."""
    return isinstance(error, asyncpg.UniqueViolationError) and bool(
        re.fullmatch(r"events(_\d+)?_pkey", str(error.constraint_name))
    )


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
        if state == INSUFFICIENT_PRIVILEGE:
            return DatabaseError(
                f"This role lacks a privilege: {text} (SQLSTATE {state}). `pgbackend grants` prints the SQL that gives "
                "it: --producer to append, --consumer to run subscriptions, --operator to look and to move them.",
                sqlstate=state,
            )
        if where:
            return DatabaseError(
                f"{server} refused the connection: {text} (SQLSTATE {state}). Check user, password and database.",
                sqlstate=state,
            )
        return DatabaseError(f"PostgreSQL refused the statement: {text} (SQLSTATE {state}).", sqlstate=state)
    if isinstance(error, asyncpg.exceptions.ClientConfigurationError):
        return ConfigError(f"The DSN is not usable: {text}.")
    if isinstance(error, TimeoutError):
        return ConnectionLostError(f"{server} did not answer in time. Check that it runs and can be reached.")
    if isinstance(error, asyncpg.InterfaceError | OSError | asyncpg.InternalClientError):
        return ConnectionLostError(f"{server} cannot be reached: {text}. Check that it runs, and the DSN.")
    return error


def on_unconfirmed(connection: Connection, callback: Callable[[], None]) -> None:
    """Call `callback()` when a COMMIT on this connection has ended without its synchronous standby's word.

    The server says so in a warning, known by the function it comes from: when the wait was cancelled its SQLSTATE is
    that of any warning, 01000, and its text is in the server's language.
    """

    def listener(_: object, message: asyncpg.PostgresLogMessage) -> None:
        if getattr(message, "server_source_function", None) == "SyncRepWaitForLSN":
            callback()

    connection.add_log_listener(listener)
