"""One connection to one host: dialled, recognised as a pooler's or a direct one, and prepared for our statements.

`Primaries` dials each host of a DSN and decides whether it is the primary. The promise: a connection is used as the way
to its server demands, and the kernel reports it as lost when the other machine vanishes.

A connection pooler (pgbouncer) in between is detected, not configured. PostgreSQL tells each client the process id of
its backend, for cancel requests. A pooler has to tell a number of its own, because the backend changes. So a number
other than `pg_backend_pid()` is a pooler's. Through a pooler nothing stays on the server between statements.
"""

import os
import socket
import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

import asyncpg

from pgbackend import facts
from pgbackend.errors import ConfigError
from pgbackend.postgres import sockets
from pgbackend.postgres.dsn import DEFAULT_HOSTS, Host, Target
from pgbackend.postgres.sql import load
from pgbackend.postgres.sql.statements import ConnectionsSql

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]
else:
    Connection = asyncpg.Connection  # generic in its stubs only
Record = asyncpg.Record
Transaction = asyncpg.transaction.Transaction

CONNECT_TIMEOUT = 10.0
"""Seconds that one host has to accept a connection, and to answer each statement that prepares it."""
_SILENCE = 10
"""Seconds without an acknowledgement after which the kernel reports a connection as lost: the machine vanished."""
_KEEPALIVE_IDLE, _KEEPALIVE_INTERVAL = 5, 2
"""Seconds of quiet before the kernel asks whether the other end is there, and between two such questions."""
_TYPES = "SELECT NULL::bigint[], NULL::boolean[], NULL::bytea[], NULL::integer[], NULL::tid[], NULL::uuid[]"
"""The types that asyncpg looks up before it first sends or reads a value of them."""


class _Pooled(Connection):
    """A connection through a pooler, without a statement cache: each statement may meet another backend.

    asyncpg then parses, asks for the types, parses again, binds and executes before its one Sync. For the pooler that
    is one transaction, so as on a direct connection no client can stop between a lock and the commit.
    """


def is_pooled(connection: Connection) -> bool:
    """Whether this connection leads through a pooler, where session state (LISTEN) is lost between statements."""
    # asyncpg's isinstance() takes any of its connections for one of any class.
    return type(getattr(connection, "_con", connection)) is _Pooled


def on_unconfirmed(connection: Connection, callback: Callable[[], None]) -> None:
    """Call `callback()` when a COMMIT on this connection ends without its synchronous standby's confirmation.

    The server says so in a warning, recognised by the function it comes from. Its SQLSTATE is that of any warning
    (01000) when the wait was cancelled, and its text is in the server's language.
    """

    def listener(_: object, message: asyncpg.PostgresLogMessage) -> None:
        if getattr(message, "server_source_function", None) == "SyncRepWaitForLSN":
            callback()

    connection.add_log_listener(listener)


def end_copy_with(connection: Connection) -> None:
    """Have a COPY fail when its connection is lost or terminated while it waits for room to write.

    asyncpg would let it wait for ever.
    """
    protocol = connection._protocol  # type: ignore[attr-defined] # noqa: SLF001 - the only way to end that wait
    connection.add_termination_listener(lambda _: protocol.resume_writing())


class Dialer:
    """Opens connections under one application name, and remembers which hosts are poolers."""

    def __init__(self, application_name: str) -> None:
        self._application_name = application_name
        self._sql = load(ConnectionsSql, "connections", schema="pgbackend")
        self._poolers: set[tuple[Target, Host]] = set()

    async def dial(self, target: Target, host: Host) -> Connection:
        """A connection to this host, direct or pooled as `is_pooled()` then says. Raises asyncpg's errors and OSError.

        Every connection to a host that is not known as a pooler is asked: tomorrow's may lead through one.
        """
        if (target, host) not in self._poolers:
            connection = await self._open(target, host)
            try:
                if await _backend_pid(connection) == connection.get_server_pid():
                    _notice_silence(connection)
                    return connection
                await connection.close(timeout=CONNECT_TIMEOUT)
            except BaseException:
                connection.terminate()
                raise
            self._poolers.add((target, host))
            facts.emit("pooler found", server=target.name_of(host))
        pooled = await self._open(target, host, connection_class=_Pooled, statement_cache_size=0)
        try:
            # One transaction: asyncpg turns JIT off in the session, looks the types up, and turns it on again.
            async with pooled.transaction():
                await pooled.fetchrow(_TYPES, timeout=CONNECT_TIMEOUT)
            _notice_silence(pooled)
        except BaseException:
            pooled.terminate()
            raise
        return pooled

    async def prepare(self, connection: Connection) -> None:
        """Return when the session is as the statements need it. Raises ConfigError where that is not possible."""
        if not is_pooled(connection):
            await connection.execute(self._sql.prepare_session, timeout=CONNECT_TIMEOUT)
        elif await connection.fetchval(self._sql.hides_warnings, timeout=CONNECT_TIMEOUT):
            raise ConfigError(
                "client_min_messages hides warnings, and through a pooler pgbackend cannot change it: a commit without "
                "its standby would go unnoticed. Set it to warning for this role and database."
            )

    async def _open(self, target: Target, host: Host, **options: Any) -> Connection:
        loop = sockets.Loop()
        tls = dict(target.options)
        if context := _tls_context(tls):
            options["ssl"] = context
        connection: Connection = await asyncpg.connect(  # type: ignore[call-overload] # it takes several hosts, too
            # Only the options that asyncpg takes in no other way: it reads DSNs by rules of its own.
            f"postgresql:///?{urlencode(tls, quote_via=quote)}" if tls else None,
            host=host.address or host.name or list(DEFAULT_HOSTS),
            port=host.port or 5432,
            user=target.user,
            password=target.password,
            passfile=target.passfile,
            # Without a name in its path the DSN above names a database with an empty name.
            database=target.database or os.environ.get("PGDATABASE") or target.user,
            timeout=target.connect_timeout or CONNECT_TIMEOUT,
            target_session_attrs="any",
            server_settings={**dict(target.settings), "application_name": self._application_name},
            loop=loop,
            **options,
        )
        # asyncpg finds its own tasks by their loop.
        connection._loop = loop.running  # type: ignore[attr-defined] # noqa: SLF001 - asyncpg has no other way
        return connection


def _tls_context(tls: dict[str, str]) -> ssl.SSLContext | None:
    """A context for sslrootcert=system, which asyncpg does not know.

    Raises ConfigError for a file that cannot be read, which asyncpg would report as a failure of the network.
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


async def _backend_pid(connection: Connection) -> int:
    """The process id of the backend that answers.

    By COPY: the only way to ask in one message, and therefore of one backend, whatever stands in between.
    """
    answer = bytearray()

    async def keep(data: bytes) -> None:
        answer.extend(data)

    await connection.copy_from_query("SELECT pg_backend_pid()", output=keep, timeout=CONNECT_TIMEOUT)
    return int(answer)


def _notice_silence(connection: Connection) -> None:
    """Have the kernel report the connection as lost when the other machine vanishes, in use and at rest.

    Otherwise a statement on its way to such a machine waits for its timeout, and LISTEN waits forever.
    """
    transport = connection._transport  # type: ignore[attr-defined] # noqa: SLF001 - asyncpg has no other way to its socket
    wire: socket.socket = transport.get_extra_info("socket")
    if wire.family == socket.AF_UNIX:
        return
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", _KEEPALIVE_IDLE),
        ("TCP_KEEPALIVE", _KEEPALIVE_IDLE),  # its name on macOS
        ("TCP_KEEPINTVL", _KEEPALIVE_INTERVAL),
        ("TCP_USER_TIMEOUT", _SILENCE * 1000),  # Linux only
    ):
        if option := getattr(socket, name, None):
            wire.setsockopt(socket.IPPROTO_TCP, option, value)
