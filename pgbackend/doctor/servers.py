"""The servers of a DSN, and the way to them: engine, version, encoding, primary and standbys, poolers, clocks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pgbackend.doctor.finding import Finding
from pgbackend.doctor.lines import ident, shown_time
from pgbackend.doctor.look import Limits, Scene, Session
from pgbackend.postgres.primaries import other_engine

_SUPPORTED = range(14, 19)
"""Major versions of PostgreSQL that the tests run on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """The answer of a host of the DSN: the columns of `examine_server` and `find_timeline`."""

    where: str
    version: str
    in_recovery: bool
    read_only: bool
    encoding: str
    cluster: int | None
    timeline: int | None
    """None, as the cluster, where the server does not let this role know."""

    @property
    def is_usable(self) -> bool:
        """Whether it may hold the log."""
        return other_engine(self.version) is None and not self.in_recovery


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreachable:
    """A host of the DSN that gave no answer."""

    where: str
    error: str


def check_hosts(servers: Sequence[Server], unreachable: Sequence[Unreachable]) -> Iterator[Finding]:
    """Faults of the hosts of the DSN as a group."""
    for host in unreachable:
        yield Finding(
            check="unreachable-host",
            severity="warning",
            subject=host.where,
            what=f"{host.error} The DSN names it, so after a failover the log may be out of reach. No line cures this: "
            "start the server, or take it out of the DSN.",
        )
    if servers and all(server.in_recovery for server in servers):
        yield Finding(
            check="standby",
            severity="error",
            subject=", ".join(server.where for server in servers),
            what="Every server that answers is a standby, and a standby takes no events. Name the primary in the DSN. "
            "If it is lost for good, promote one standby with the line below.",
            cure="SELECT pg_promote();",
            destroys="the possibility to go back: what the former primary has and this standby lacks is lost",
        )
    for server in servers:
        newest = max((other.timeline or 0 for other in servers if other.cluster == server.cluster), default=0)
        if server.timeline is not None and server.timeline < newest and not server.in_recovery:
            yield Finding(
                check="former-primary",
                severity="error",
                subject=server.where,
                what=f"A failover left this server behind: it is on timeline {server.timeline}, and the log continues "
                f"on {newest}. Events that it takes now are lost. Stop it, and make it a standby: `pg_ctl stop`, then "
                "`pg_rewind`.",
            )


def check_server(server: Server) -> Iterator[Finding]:
    """Why this server cannot hold a log."""
    if name := other_engine(server.version):
        yield Finding(
            check="engine",
            severity="error",
            subject=server.where,
            what=f"This server is {name} ({server.version}): its locks do not show which transactions append, so "
            "readers would miss events. No line cures this: use PostgreSQL itself.",
        )
        return
    if server.encoding != "UTF8":
        yield Finding(
            check="encoding",
            severity="error",
            subject=server.where,
            what=f"The database has the encoding {server.encoding}, which lacks characters of events. A database "
            "keeps its encoding: make another one, and a log in it.",
            cure="CREATE DATABASE events ENCODING 'UTF8' TEMPLATE template0;",
        )


def newest_primary(servers: Sequence[Server]) -> Server | None:
    """The server that holds the log: of several primaries the one on the newest timeline."""
    return max((one for one in servers if one.is_usable), key=lambda one: one.timeline or 0, default=None)


def check_session(scene: Scene) -> Iterator[Finding]:
    """Whether the server's version is tested, and whether the role sees other sessions."""
    session, major = scene.session, scene.session.version // 10_000
    if major not in _SUPPORTED:
        is_old = major < _SUPPORTED.start
        yield Finding(
            check="postgres-version",
            severity="error" if is_old else "note",
            subject=f"PostgreSQL {major}",
            what=f"pgbackend is tested on PostgreSQL {_SUPPORTED.start} to {_SUPPORTED.stop - 1}. "
            + ("Its statements fail on this one: upgrade PostgreSQL." if is_old else "No fault is known on this one."),
        )
    if not session.sees_all:
        yield Finding(
            check="limited-view",
            severity="note",
            subject=f"role {session.role}",
            what="This role does not see the transactions and queries of other roles' sessions, so findings about "
            "them may be missing or lack details.",
            cure=f"GRANT pg_read_all_stats TO {ident(session.role)};",
        )


def check_way(scene: Scene) -> Iterator[Finding]:
    """Whether a pooler is in the way."""
    if scene.is_pooled and not scene.has_listener:
        yield Finding(
            check="pooler",
            severity="note",
            subject="dsn",
            what="The DSN leads through a connection pooler, and no --listen-dsn was given. Without one, events of "
            "other processes are found by polling (up to `poll_interval`, 1 s), and a dead worker's shards wait for "
            "`lease_timeout`. Let --listen-dsn, or PGBACKEND_LISTEN_DSN, lead to PostgreSQL itself.",
        )


def check_listener(scene: Scene, session: Session | None, *, is_pooled: bool, error: str | None) -> Iterator[Finding]:
    """Whether `listen_dsn` leads to the same log, past every pooler. `error`: why there is no session."""
    if session is None:
        yield Finding(
            check="listen-dsn",
            severity="error",
            subject="listen_dsn",
            what=f"No worker starts: it keeps its leases on a connection of listen_dsn. {error}",
        )
        return
    if (session.server_start, session.database_oid) != (scene.session.server_start, scene.session.database_oid):
        yield Finding(
            check="listen-dsn",
            severity="error",
            subject="listen_dsn",
            what="listen_dsn leads to another server or database than dsn, so no worker could see that others live. "
            "Name the same database in both.",
        )
    elif is_pooled:
        yield Finding(
            check="pooler",
            severity="warning",
            subject="listen_dsn",
            what="listen_dsn leads through a connection pooler, where LISTEN does not last: workers hear nothing, and "
            "poll. Let it lead to PostgreSQL itself.",
        )


def check_clock(skew: float, limits: Limits) -> Iterator[Finding]:
    """Whether this machine's clock and the server's differ. `skew`: seconds that the server is ahead at least."""
    if abs(skew) > limits.clock_skew:
        yield Finding(
            check="clock-skew",
            severity="warning",
            subject="this machine's clock",
            what=f"The server's clock is {shown_time(abs(skew))} {'ahead of' if skew > 0 else 'behind'} this "
            "machine's. pgbackend goes by the server's: dates that you compute here, for seek or start, miss by that "
            "much. Let both machines follow a time server: the line below shows whether this one does.",
            cure="timedatectl status",
        )
