"""Which server is the log's primary: asked of each host, and kept apart from servers that a failover left behind.

A log has one primary, and every connection leads to it. Each new connection is therefore asked what it leads to, and is
closed again when that is

- a standby, which cannot run the log, or
- a server that a failover left behind: one on an older timeline than this process has seen of the same cluster. Only
  the timeline tells a former primary that is up again from the new one, and what it stores is thrown away in the end.

A connection to a newer timeline closes all those to older ones. The promise: from then on a process does not append to
one server while it reads from another, and nothing hangs on a dead server once any task has found the new one.
"""

import asyncio
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import asyncpg

from pgbackend.errors import ConfigError, ConnectionLostError, DatabaseError, SchemaError
from pgbackend.postgres.connections import CONNECT_TIMEOUT, Connection, Dialer, Record
from pgbackend.postgres.dsn import Host, Target
from pgbackend.postgres.errors import STANDBY, translate
from pgbackend.postgres.sql import load
from pgbackend.postgres.sql.statements import PrimariesSql

_NEXT_HOST = 0.5
"""Seconds that a host has to answer before the next host of the DSN is asked as well."""
_OTHER_ENGINES = {
    "-yb-": "YugabyteDB",
    "yugabyte": "YugabyteDB",
    "cockroachdb": "CockroachDB",
    "aurora dsql": "Aurora DSQL",
    "aurora limitless": "Aurora Limitless",
    "greenplum": "Greenplum",
    "cloudberry": "Cloudberry",
}
"""Databases that speak PostgreSQL's protocol but are not PostgreSQL, by a part of their `version()`."""


@dataclass(frozen=True, slots=True)
class _Timeline:
    """One branch of a cluster's history: each promotion begins a new one."""

    cluster: int
    number: int


class Primaries:
    """Connects to primaries. Safe to use from several threads, each with an event loop."""

    def __init__(self, dialer: Dialer) -> None:
        self._dialer = dialer
        self._sql = load(PrimariesSql, "primaries", schema="pgbackend")
        self._last: dict[Target, Host] = {}
        """The host that was the primary when it was last looked for."""
        self._newest: dict[int, int] = {}
        """The newest timeline seen, by cluster. Another cluster, restored or moved there, counts by itself."""
        self._connections: weakref.WeakKeyDictionary[Connection, tuple[_Timeline, asyncio.AbstractEventLoop]] = (
            weakref.WeakKeyDictionary()
        )
        self._is_missing = False
        """Whether the last look for a primary found none."""
        self._waiters: set[asyncio.Future[None]] = set()
        self._guard = threading.Lock()

    async def connect(self, target: Target, timeout: float) -> Connection:
        """A connection to the first host that is a primary. Hosts are asked in their order, the last primary first.

        The next host is asked when one refuses, or has not answered for half a second, and both are then waited for.
        While one keeps silent, those that refused are asked again: a standby may become the primary meanwhile.

        Raises ConnectionLostError, after `timeout` seconds at the latest, when no host is a primary now; its `sqlstate`
        is 25006 when one of them is a standby. Raises DatabaseError or ConfigError when all hosts refuse for another
        reason; ConfigError only for a target that has never led to a primary.
        """
        hosts = target.hosts
        last = self._last.get(target)
        waiting = deque(sorted(hosts, key=lambda host: host != last))
        refusals: dict[Host, Exception] = {}
        asked: dict[asyncio.Task[Connection], Host] = {}
        found: Connection | None = None
        try:
            async with asyncio.timeout(timeout):
                while waiting or asked:
                    if waiting:
                        host = waiting.popleft()
                        asked[asyncio.create_task(self._connect_to(target, host), name=f"connect to {host}")] = host
                    done, _ = await asyncio.wait(asked, timeout=_NEXT_HOST, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        host = asked.pop(task)
                        error = task.exception()
                        if error is None:
                            self._last[target] = host
                            self._wake_waiters()
                            found = task.result()
                            return found
                        assert isinstance(error, Exception)  # noqa: S101 - only this method cancels these tasks
                        refusals[host] = error
                    if not done and not waiting:
                        waiting.extend(host for host in hosts if host not in asked.values())
        except TimeoutError as error:
            # An earlier refusal of the same host says more.
            for host in asked.values():
                refusals.setdefault(host, translate(error, where=target.name_of(host)))
        finally:
            for task in asked:
                # In callbacks, because this wait may be cancelled in turn.
                task.add_done_callback(_close_unused)
                task.cancel()
            try:
                await asyncio.gather(*asked, return_exceptions=True)
            except asyncio.CancelledError:
                if found is not None:
                    found.terminate()
                raise
        self._is_missing = True
        refusal = _no_primary(target, [refusals[host] for host in hosts if host in refusals])
        if isinstance(refusal, ConfigError) and last is not None:
            # The DSN was good before: a certificate that is being replaced is an outage, which every loop waits out.
            raise ConnectionLostError(f"PostgreSQL at {target.where} cannot be reached now: {refusal}") from refusal
        raise refusal

    async def wait(self, timeout: float) -> None:
        """Return when a primary is found after none was, or `timeout` seconds have passed."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        with self._guard:
            self._waiters.add(waiter)
        try:
            await asyncio.wait({waiter}, timeout=timeout)
        finally:
            with self._guard:
                self._waiters.discard(waiter)

    async def _connect_to(self, target: Target, host: Host) -> Connection:
        """A prepared connection to this host, if it is the log's primary."""
        where = target.name_of(host)
        try:
            connection = await self._dialer.dial(target, host)
            try:
                server = await connection.fetchrow(self._sql.examine_server, timeout=CONNECT_TIMEOUT)
                assert server is not None  # noqa: S101 - a SELECT of scalars
                _check_server(target, where, server)
                self._admit(connection, await self._find_timeline(connection), where=where)
                await self._dialer.prepare(connection)
            except BaseException:
                connection.terminate()
                raise
        except Exception as error:
            translated = translate(error, where=where)
            if translated is error:
                raise
            raise translated from error
        return connection

    async def _find_timeline(self, connection: Connection) -> _Timeline | None:
        """The cluster and its timeline; None where the server does not let this role know."""
        try:
            row = await connection.fetchrow(self._sql.find_timeline, timeout=CONNECT_TIMEOUT)
        except asyncpg.PostgresConnectionError:
            raise
        except asyncpg.PostgresError:
            return None
        return _Timeline(row["cluster"], row["timeline"]) if row else None

    def _admit(self, connection: Connection, timeline: _Timeline | None, where: str) -> None:
        """Register this connection, and close those that lead to a server which it shows to be left behind.

        Raises ConnectionLostError when this connection leads to such a server itself.
        """
        if timeline is None:
            return
        with self._guard:
            newest = self._newest.get(timeline.cluster, 0)
            if timeline.number < newest:
                raise ConnectionLostError(
                    f"PostgreSQL at {where} was left behind by a failover: it is on timeline {timeline.number}, and "
                    f"the log continues on {newest}. Stop it, or make it a standby."
                )
            self._newest[timeline.cluster] = timeline.number
            outdated = [
                (other, loop)
                for other, (its, loop) in self._connections.items()
                if its.cluster == timeline.cluster and its.number < timeline.number
            ]
            for other, _ in outdated:
                del self._connections[other]
            self._connections[connection] = timeline, asyncio.get_running_loop()
        for other, loop in outdated:
            # In its own loop, which may be another thread's, and closed by now.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(_terminate, other)

    def _wake_waiters(self) -> None:
        """End all waits, if the primary was missing."""
        if not self._is_missing:
            return
        self._is_missing = False
        with self._guard:
            waiters, self._waiters = self._waiters, set()
        for waiter in waiters:
            with suppress(RuntimeError):
                waiter.get_loop().call_soon_threadsafe(_wake, waiter)


def _wake(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)


def _close_unused(task: "asyncio.Task[Connection]") -> None:
    """Close the connection that this task has made, if it has."""
    if not task.cancelled() and task.exception() is None:
        task.result().terminate()


def _terminate(connection: Connection) -> None:
    if not connection.is_closed():
        connection.terminate()


def _check_server(target: Target, where: str, server: Record) -> None:
    """Raise the error that says why this server cannot hold the log, if it cannot."""
    version, encoding = server["version"], server["encoding"]
    if name := other_engine(version):
        raise DatabaseError(
            f"PostgreSQL at {where} is {name} ({version}): its locks do not show which transactions append, so "
            "events could be lost. Use PostgreSQL itself."
        )
    if server["in_recovery"]:
        raise ConnectionLostError(f"PostgreSQL at {where} is a standby: connect to the primary.", sqlstate=STANDBY)
    if server["read_only"] and target.read_write:
        raise ConnectionLostError(f"PostgreSQL at {where} takes no writes: unset default_transaction_read_only.")
    if encoding != "UTF8":
        # Any other encoding lacks characters of events and errors, which could then never be stored.
        raise SchemaError(
            f"The database at {where} has the encoding {encoding}: a log needs UTF8. Make one with "
            "CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0.",
            found=encoding,
            expected="UTF8",
        )


def other_engine(version: str) -> str | None:
    """The name of the database that is not PostgreSQL but speaks its protocol, by `version` of `examine_server`."""
    return next((name for mark, name in _OTHER_ENGINES.items() if mark in version.lower()), None)


def _no_primary(target: Target, refusals: Sequence[Exception]) -> Exception:
    """The error for a DSN whose hosts all refused."""
    if len(refusals) == 1 or not any(isinstance(error, ConnectionLostError) for error in refusals):
        return refusals[0]
    return ConnectionLostError(
        f"None of {target.where} is a primary now. " + " ".join(str(error) for error in refusals),
        sqlstate=STANDBY if any(getattr(error, "sqlstate", None) == STANDBY for error in refusals) else None,
    )
