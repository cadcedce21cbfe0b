"""Examines a log: connects to all servers of its DSN, takes every look, and gathers the findings.

The connections are the doctor's own, because `Backend.init()` refuses the logs that need a doctor most. Each look is a
read-only transaction of one statement. The promise: a look that fails hides no other finding.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from pgbackend.doctor import (
    definition,
    horizon,
    privileges,
    retention,
    segments,
    servers,
    settings,
    subscriptions,
    tables,
    trust,
    waits,
)
from pgbackend.doctor.finding import SEVERITIES, Finding
from pgbackend.doctor.look import AnyLook, Limits, Scene, Session, Statements, not_seen
from pgbackend.doctor.servers import Server, Unreachable
from pgbackend.errors import ConfigError, ConnectionLostError, DatabaseError
from pgbackend.log.log import Log
from pgbackend.log.requirements import Fault, Requirements
from pgbackend.postgres import schema as revisions
from pgbackend.postgres.connections import Connection, Dialer, Record, is_pooled
from pgbackend.postgres.dsn import Host, Target
from pgbackend.postgres.errors import translate
from pgbackend.postgres.pool import Database
from pgbackend.postgres.sql import load
from pgbackend.postgres.sql.statements import DoctorSql, OverviewSql, PrimariesSql, SegmentsSql
from pgbackend.subscriptions.overview import explain_mistrust

_CONNECT_TIMEOUT = 5.0
"""Seconds that a host has to answer."""
_LOOK_TIMEOUT = 10.0
"""Seconds that a look may take. The server ends its statement after 5 s."""

_OF_SERVER: tuple[AnyLook, ...] = (
    settings.SETTINGS,
    settings.CAPACITY,
    settings.SYNCHRONY,
    horizon.SESSIONS,
    horizon.PREPARED,
    horizon.SLOTS,
    horizon.STANDBYS,
    waits.NOTIFICATIONS,
    waits.NOTIFY_WAITS,
)
"""Looks that need no log."""
_OF_LOG: tuple[AnyLook, ...] = (
    privileges.RIGHTS,
    waits.APPENDERS,
    waits.LOCK_WAITS,
    tables.TABLES,
    segments.RUNWAY,
    segments.SEGMENTS,
    segments.PRIVILEGES,
    segments.ADDITIONS,
    definition.COLUMNS,
    definition.RULES,
    definition.ROUTINES,
    subscriptions.SUBSCRIPTIONS,
    subscriptions.LOSSES,
    subscriptions.WORKERS,
    subscriptions.NEWEST_EVENT,
    retention.RETENTION,
    retention.OLD_KEYS,
)
"""Looks at the tables of the log at this version's revision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """The result: the things that were looked at, and the findings."""

    log: str
    """Schema and server, without credentials."""
    looked_at: tuple[str, ...]
    findings: tuple[Finding, ...]
    """The most severe first."""


async def examine(
    dsn: str, *, listen_dsn: str | None = None, schema: str = "pgbackend", limits: Limits | None = None
) -> Examination:
    """All findings about the log in `schema`. Nothing is changed, and no cure is run.

    Takes some seconds: each host of the DSN has 5 s to answer, and each look has 10 s at most. An operator's role sees
    most, and with `pg_read_all_stats` also other roles' sessions.

    Raises ConfigError for a DSN that cannot be used, ConnectionLostError when no server answers, and DatabaseError when
    all servers refuse the connection.
    """
    target = Target.of(dsn)
    dialer = Dialer(target.application_name or "pgbackend doctor")
    async with AsyncExitStack() as stack:
        connections, unreachable = await _connect(dialer, target, stack)
        gathered = _Gathered(log=f"{schema} on {target.where}")
        gathered.add("servers", servers.check_hosts(list(connections), unreachable))
        primary = servers.newest_primary(list(connections))
        for server in connections if primary is None else [primary]:
            gathered.add("engine", servers.check_server(server))
        if primary is not None:
            connection, limits = connections[primary], limits or Limits()
            session, skew = await _describe(connection, schema)
            gathered.add("clock", servers.check_clock(skew, limits))
            scene = Scene(
                schema=schema,
                session=session,
                is_pooled=is_pooled(connection),
                has_listener=listen_dsn is not None,
                limits=limits,
            )
            await _Examiner(connection, gathered, scene).run(dsn, listen_dsn, dialer)
    return gathered.examination()


class _Gathered:
    """Findings so far."""

    def __init__(self, *, log: str) -> None:
        self._log = log
        self._looked_at: dict[str, None] = {}
        self._findings: list[Finding] = []

    def add(self, title: str, findings: Iterator[Finding] | Sequence[Finding]) -> None:
        """Something was looked at."""
        self._looked_at[title] = None
        self._findings.extend(findings)

    def add_note(self, note: Finding) -> None:
        """Something could not be looked at."""
        self._findings.append(note)

    def examination(self) -> Examination:
        return Examination(
            log=self._log,
            looked_at=tuple(self._looked_at),
            findings=tuple(sorted(self._findings, key=lambda one: -SEVERITIES.index(one.severity))),
        )


class _Examiner:
    """Takes the looks at one primary."""

    def __init__(self, connection: Connection, gathered: _Gathered, scene: Scene) -> None:
        self._connection = connection
        self._gathered = gathered
        self._scene = scene
        self._statements = Statements(
            doctor_sql=load(DoctorSql, "doctor", schema=scene.schema),
            overview_sql=load(OverviewSql, "overview", schema=scene.schema),
            segments_sql=load(SegmentsSql, "segments", schema=scene.schema),
        )

    async def run(self, dsn: str, listen_dsn: str | None, dialer: Dialer) -> None:
        """Take every look."""
        scene = self._scene
        self._gathered.add("session", servers.check_session(scene))
        self._gathered.add("way to the server", servers.check_way(scene))
        if listen_dsn is not None:
            self._gathered.add("listen_dsn", await self._check_listener(listen_dsn, dialer))
        await self._look(_OF_SERVER)
        if await self._find_log():
            await self._look(_OF_LOG)
            await self._check_fence(dsn, listen_dsn)

    async def _look(self, looks: Sequence[AnyLook]) -> None:
        for look in looks:
            try:
                self._gathered.add(look.title, await look.run(self._read, self._statements, self._scene))
            except DatabaseError as error:
                self._miss(look.title, error)

    def _miss(self, title: str, error: ConfigError | DatabaseError) -> None:
        """Note that something could not be looked at. Raises the error when the connection is gone."""
        if self._connection.is_closed():
            # All later looks would fail in the same way, and an examination without them proves nothing.
            raise error
        self._gathered.add_note(not_seen(title, error, self._scene))

    async def _read(self, statement: str, *args: object, is_limited: bool = True) -> Sequence[Record]:
        limit = self._statements.doctor_sql.limit_transaction if is_limited else None
        return await _read(self._connection, limit, statement, *args)

    async def _find_log(self) -> bool:
        """Whether there is a log at the revision of this version, as far as this role may see."""
        try:
            found = await revisions.find_revision(self._read, self._scene.schema)
        except DatabaseError as error:
            self._miss("revision", error)
            # Each look says by itself what it may not see.
            return self._scene.session.log is not None
        findings = list(trust.check_revision(found, self._scene))
        self._gathered.add("revision", findings)
        return not findings

    async def _check_fence(self, dsn: str, listen_dsn: str | None) -> None:
        """The proofs of `Backend.init()`, by its own means: of the tables, of the server, of the offsets."""
        schema = self._scene.schema
        try:
            # It does not wait for locks. Where it has to, the proofs below would wait for long.
            (extremes,) = await self._read(self._statements.overview_sql.find_extremes)
        except DatabaseError as error:
            self._miss("fence", error)
            return
        self._gathered.add("offsets", trust.check_offsets(explain_mistrust(extremes, schema=schema), self._scene))
        database = Database(dsn, listen_dsn=listen_dsn, pool_size=2)
        try:
            async with _limited(_LOOK_TIMEOUT):
                await database.open(_CONNECT_TIMEOUT)
                requirements = Requirements(Log(database, schema=schema, hole_wait=0.0), schema=schema)
                faults = await requirements.find_faults()
                if not faults and (problem := await requirements.test_evidence()):
                    faults = [Fault(problem)]
                self._gathered.add("fence", trust.check_fence(faults, self._scene))
        except (ConfigError, DatabaseError) as error:
            # ConfigError: pgbackend refuses this session, as `hidden-warnings` says.
            self._miss("fence", error)
        finally:
            await database.close()

    async def _check_listener(self, listen_dsn: str, dialer: Dialer) -> list[Finding]:
        session, pooled, refusal = None, False, None
        async with AsyncExitStack() as stack:
            try:
                found, unreachable = await _connect(dialer, Target.of(listen_dsn), stack)
                refusal = " ".join(one.error for one in unreachable)
                primary = servers.newest_primary(list(found))
                if primary is not None:
                    pooled = is_pooled(found[primary])
                    session, _ = await _describe(found[primary], self._scene.schema)
            except DatabaseError as error:
                refusal = str(error)
        return list(servers.check_listener(self._scene, session, is_pooled=pooled, error=refusal))


async def _connect(
    dialer: Dialer, target: Target, stack: AsyncExitStack
) -> tuple[dict[Server, Connection], list[Unreachable]]:
    """A connection to each server of the DSN that answers; `stack` closes it. The others, and why.

    Raises the first server's error when none answers, and ConfigError.
    """
    connections: dict[Server, Connection] = {}
    unreachable: list[Unreachable] = []
    errors: list[DatabaseError] = []
    asked = (_reach(dialer, target, host, stack) for host in target.hosts)
    # Not the first error alone: the stack must not be closed while others still connect.
    for host, result in zip(target.hosts, await asyncio.gather(*asked, return_exceptions=True), strict=True):
        if isinstance(result, DatabaseError):
            errors.append(result)
            unreachable.append(Unreachable(where=target.name_of(host), error=str(result)))
        elif isinstance(result, BaseException):
            raise result
        else:
            server, connection = result
            connections[server] = connection
    if not connections:
        raise errors[0]
    return connections, unreachable


async def _reach(dialer: Dialer, target: Target, host: Host, stack: AsyncExitStack) -> tuple[Server, Connection]:
    """This host and a connection to it, which `stack` closes. Raises errors of this package."""
    where = target.name_of(host)
    async with _limited(_CONNECT_TIMEOUT, where=where):
        connection = await dialer.dial(target, host)
        stack.callback(connection.terminate)
        return await _identify(connection, where), connection


async def _identify(connection: Connection, where: str) -> Server:
    sql = load(PrimariesSql, "primaries", schema="pgbackend")
    row = await connection.fetchrow(sql.examine_server)
    assert row is not None  # noqa: S101 - a SELECT of scalars
    timeline: Record | None = None
    try:
        async with _limited(_CONNECT_TIMEOUT):
            if not row["in_recovery"]:
                timeline = await connection.fetchrow(sql.find_timeline)
    except ConnectionLostError:
        raise
    except DatabaseError:
        pass  # managed servers do not let every role know
    return Server(
        where=where,
        **dict(row),
        cluster=timeline["cluster"] if timeline else None,
        timeline=timeline["timeline"] if timeline else None,
    )


async def _describe(connection: Connection, schema: str) -> tuple[Session, float]:
    """The session of this connection, and how many seconds the server's clock is ahead of this machine's at least."""
    sql = load(DoctorSql, "doctor", schema=schema)
    before = time.time()
    (row,) = await _read(connection, sql.limit_transaction, sql.describe_session)
    after = time.time()
    session = Session(**dict(row))
    return session, _skew(session.server_time.timestamp(), before, after)


async def _read(connection: Connection, limit: str | None, statement: str, *args: object) -> Sequence[Record]:
    """The rows of one statement in a read-only transaction of its own. Raises errors of this package."""
    async with _limited(_LOOK_TIMEOUT), connection.transaction(isolation="read_committed", readonly=True):
        if limit is not None:
            await connection.fetchrow(limit)
        return await connection.fetch(statement, *args)


@asynccontextmanager
async def _limited(seconds: float, *, where: str | None = None) -> AsyncIterator[None]:
    """The body ends within the time, and its errors come out as this package's. `where`: it connects to that server."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except Exception as error:
        translated = translate(error, where=where)
        if translated is error:
            raise
        raise translated from error


def _skew(server: float, before: float, after: float) -> float:
    """How far the server's clock is ahead of this machine's at least, whatever part of the round trip came first.

    >>> _skew(110.0, 100.0, 101.0), _skew(100.5, 100.0, 101.0), _skew(90.0, 100.0, 101.0)
    (9.0, 0.0, -10.0)
    """
    return max(0.0, server - after) + min(0.0, server - before)
