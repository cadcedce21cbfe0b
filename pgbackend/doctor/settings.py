"""Settings of the server, the database and the role that hurt a log, and limits that are nearly reached."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pgbackend.doctor.finding import Finding, Severity
from pgbackend.doctor.lines import ident, shown_time
from pgbackend.doctor.look import Look, Scene

_PROCESS_CONNECTIONS = 6
"""Connections of one more process: `pool_size` (4), one that appends and one that listens."""
_LOCKS_OF_SEGMENT = 2
"""A statement that looks into all segments locks each, and its index."""
_STATEMENT_TIMEOUT_MS = 15_000
"""pgbackend's own timeout of a statement. The server's may be longer, and not shorter."""
_TIMEOUTS = (
    "statement_timeout",
    "lock_timeout",
    "transaction_timeout",
    "idle_in_transaction_session_timeout",
    "idle_session_timeout",
)

_PLACES = {
    "client": " The DSN or the environment (PGOPTIONS) sets it: take it out there.",
    "command line": " The command that starts the server sets it: take it out there.",
    "environment variable": " The environment of the server sets it: take it out there.",
}
"""Where a setting can come from that no statement undoes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A row of `list_settings`."""

    name: str
    setting: str
    """In milliseconds where it is a time."""
    source: str
    """The place that sets it, as in pg_settings."""


def check_durability(settings: Sequence[Setting], scene: Scene) -> Iterator[Finding]:
    """Settings with which a crash loses what was acknowledged."""
    known = {one.name: one for one in settings}
    severities: dict[str, tuple[Severity, str]] = {
        "fsync": ("error", "a crash of the machine can destroy the whole database"),
        "full_page_writes": ("error", "a crash of the machine can leave torn pages that nothing repairs"),
    }
    for name, (severity, effect) in severities.items():
        if name in known and known[name].setting == "off":
            yield _of_setting(
                known[name], scene, severity, f"{name} is off: {effect}.", wanted="on", check="durability"
            )
    commit = known.get("synchronous_commit")
    if commit is not None and commit.setting == "off":
        yield _of_setting(
            commit, scene, "warning", check="durability", wanted="on",
            what="synchronous_commit is off: produce() returns before its event is on disk, and a crash of the server "
            "loses the last events that were acknowledged (of up to about 0.6 s).",
        )  # fmt: skip
    elif commit is not None and commit.setting == "local":
        yield _of_setting(
            commit, scene, "note", check="durability", wanted="on",
            what="synchronous_commit is local: commits do not wait for a synchronous standby, so a failover can lose "
            "the last events that were acknowledged.",
        )  # fmt: skip


def check_reading_only(settings: Sequence[Setting], scene: Scene) -> Iterator[Finding]:
    """Whether transactions may write."""
    for one in settings:
        if one.name == "default_transaction_read_only" and one.setting == "on":
            yield _of_setting(
                one, scene, "error", check="read-only", wanted="off",
                what="Transactions are read-only by default: nothing can be produced, and no offset is committed.",
            )  # fmt: skip


def check_session_settings(settings: Sequence[Setting], scene: Scene) -> Iterator[Finding]:
    """Settings that pgbackend overrides in its sessions, and cannot override through a pooler."""
    for one in settings:
        if one.name == "default_transaction_isolation" and one.setting != "read committed":
            yield _of_setting(
                one, scene, "warning" if scene.is_pooled else "note", check="isolation", wanted="'read committed'",
                what=f"Transactions are {one.setting} by default. Their commits conflict with each other, and are "
                "repeated. "
                + (
                    "pgbackend cannot change that through a pooler."
                    if scene.is_pooled
                    else "pgbackend overrides it in its own sessions; programs that append in plain SQL must repeat."
                ),
            )  # fmt: skip
        elif one.name in _TIMEOUTS and scene.is_pooled and 0 < int(one.setting) < _STATEMENT_TIMEOUT_MS:
            yield _of_setting(
                one, scene, "warning", check="timeouts", wanted="0",
                what=f"{one.name} is {shown_time(int(one.setting) / 1000)}, and pgbackend cannot change that through a "
                "pooler: the server ends statements or sessions that take longer, and they are repeated.",
            )  # fmt: skip
        elif one.name == "client_min_messages" and one.setting in ("error", "fatal", "panic") and scene.is_pooled:
            yield _of_setting(
                one, scene, "error", check="hidden-warnings", wanted="warning",
                what="client_min_messages hides warnings, and pgbackend cannot change that through a pooler: it "
                "refuses to work, because a commit without its standby would go unnoticed.",
            )  # fmt: skip


def check_vacuum_settings(settings: Sequence[Setting], scene: Scene) -> Iterator[Finding]:
    """Whether autovacuum runs at all."""
    for one in settings:
        if one.name in ("autovacuum", "track_counts") and one.setting == "off":
            yield _of_setting(
                one, scene, "warning", check="autovacuum", wanted="on",
                what=f"{one.name} is off, so autovacuum cleans no table: offsets grow with each commit, and get slow.",
            )  # fmt: skip


def _of_setting(one: Setting, scene: Scene, severity: Severity, what: str, *, check: str, wanted: str) -> Finding:
    return Finding(
        check=check,
        severity=severity,
        subject=f"setting {one.name}",
        what=what + _PLACES.get(one.source, ""),
        cure=None if one.source in _PLACES else "\n".join(_undoing(one, scene, wanted)),
    )


def _undoing(one: Setting, scene: Scene, wanted: str) -> Iterator[str]:
    """The statements that undo a setting where it was made."""
    database, role = ident(scene.session.database), ident(scene.session.role)
    if one.name == "default_transaction_read_only":
        # The session that runs the next line has it, too.
        yield f"SET {one.name} = off;"
    if one.source == "database":
        yield f"ALTER DATABASE {database} RESET {one.name};"
    elif one.source == "user":
        yield f"ALTER ROLE {role} RESET {one.name};"
    elif one.source == "database user":
        yield f"ALTER ROLE {role} IN DATABASE {database} RESET {one.name};"
    else:
        yield f"ALTER SYSTEM SET {one.name} = {wanted};"
        yield "SELECT pg_reload_conf();"


SETTINGS = Look(
    title="settings",
    statement=lambda statements: statements.doctor_sql.list_settings,
    fact=Setting,
    checks=(check_durability, check_reading_only, check_session_settings, check_vacuum_settings),
    is_limited=False,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """A row of `find_capacity`. None: no limit."""

    server_limit: int
    server_used: int
    database_limit: int | None
    database_used: int
    role_limit: int | None
    role_used: int
    locks: int
    segments: int


def check_connections(rows: Sequence[Capacity], scene: Scene) -> Iterator[Finding]:
    """Whether another process of pgbackend could connect."""
    database, role = scene.session.database, scene.session.role
    for row in rows:
        for subject, limit, used, cure in (
            ("the server", row.server_limit, row.server_used, "ALTER SYSTEM SET max_connections ="),
            (
                f"database {database}",
                row.database_limit,
                row.database_used,
                f"ALTER DATABASE {ident(database)} CONNECTION LIMIT",
            ),
            (f"role {role}", row.role_limit, row.role_used, f"ALTER ROLE {ident(role)} CONNECTION LIMIT"),
        ):
            if limit is not None and limit - used < _PROCESS_CONNECTIONS:
                yield Finding(
                    check="connections",
                    severity="warning",
                    subject=subject,
                    what=f"{used} of {limit} connections are taken. One more process of pgbackend takes up to "
                    f"{_PROCESS_CONNECTIONS}, and one that lost its connections may not get them back. Use a pooler, "
                    "start fewer processes, or raise the limit; that of the server counts after a restart.",
                    cure=f"{cure} {2 * limit + 20};",
                )


def check_locks(rows: Sequence[Capacity], scene: Scene) -> Iterator[Finding]:  # noqa: ARG001 - as all checks
    """Whether statements that look into all segments find room in the table of locks."""
    for row in rows:
        needed = row.segments * _LOCKS_OF_SEGMENT
        if needed * 2 > row.locks:
            yield Finding(
                check="locks",
                severity="warning",
                subject="setting max_locks_per_transaction",
                what=f"The log has {row.segments} segments, and a statement that looks into all of them takes "
                f"{needed} of the server's {row.locks} locks. Two at once may fail with `out of shared memory`. Raise "
                "the setting and restart the server, or let retention drop segments.",
                cure=f"ALTER SYSTEM SET max_locks_per_transaction = {max(128, needed)};",
            )


CAPACITY = Look(
    title="limits of connections and locks",
    statement=lambda statements: statements.doctor_sql.find_capacity,
    fact=Capacity,
    checks=(check_connections, check_locks),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Synchrony:
    """A row of `find_synchrony`."""

    names: str
    connected: int
    waiting: int
    sees_all: bool

    @property
    def needed(self) -> int:
        """How many standbys each commit waits for."""
        count = re.match(r"\s*(?:FIRST|ANY)?\s*(\d+)\s*\(", self.names, re.IGNORECASE)
        return 0 if not self.names.strip() else int(count[1]) if count else 1


def check_synchrony(rows: Sequence[Synchrony], scene: Scene) -> Iterator[Finding]:  # noqa: ARG001 - as all checks
    """Whether commits can end."""
    for row in rows:
        # A role without the right to see other sessions sees no standby's state.
        if row.sees_all and row.connected < row.needed:
            yield Finding(
                check="synchronous-standby",
                severity="error",
                subject="setting synchronous_standby_names",
                what=f"Each commit waits for {row.needed} of {row.names!r}, and {row.connected} are connected; "
                f"{row.waiting} sessions wait now. Start the standby. The line below lets commits end without it.",
                cure="ALTER SYSTEM SET synchronous_standby_names = '';\nSELECT pg_reload_conf();",
                destroys="the promise that a failover loses no acknowledged event, until you set the names again",
            )


SYNCHRONY = Look(
    title="synchronous standbys",
    statement=lambda statements: statements.doctor_sql.find_synchrony,
    fact=Synchrony,
    checks=(check_synchrony,),
)
