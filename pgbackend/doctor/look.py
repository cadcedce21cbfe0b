"""A look: one read of the catalogs or of the log, and the checks that conclude from its rows.

A look that fails (a privilege is missing, another version, a view that a managed server lacks) becomes a note. It hides
no other finding.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Generic, Protocol, TypeVar

from pgbackend.doctor.finding import Finding
from pgbackend.doctor.lines import command, ident
from pgbackend.errors import DatabaseError, PgBackendError
from pgbackend.postgres.connections import Record
from pgbackend.postgres.errors import INSUFFICIENT_PRIVILEGE
from pgbackend.postgres.sql.statements import DoctorSql, OverviewSql, SegmentsSql

FactT = TypeVar("FactT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """From when on something counts. Times are in seconds."""

    appender_age: float = 5.0
    """An open appender. Readers have waited for `hole_wait` (1 s) by then."""
    lock_wait: float = 1.0
    """A session that waits for a lock on a table of the log."""
    idle_age: float = 60.0
    """A session that does nothing in its open transaction, and a prepared transaction."""
    query_age: float = 300.0
    """A transaction that is at work."""
    horizon: int = 1_000_000
    """Transactions that a slot or a standby holds VACUUM back by."""
    slot_bytes: int = 1 << 30
    """WAL that a slot keeps."""
    dead_rows: int = 50_000
    """Dead rows of a table, if they are more than its living ones."""
    table_bytes: int = 256 << 20
    """Size of a table that has few rows."""
    wraparound: int = 1_000_000_000
    """Transactions since a table was frozen; PostgreSQL stops at 2,147 million."""
    notify_queue: float = 0.1
    """Used part of the queue of notifications; PostgreSQL refuses each NOTIFY at 1."""
    clock_skew: float = 5.0
    """Difference between two clocks."""
    unrun_age: float = 86_400.0
    """The oldest event that a subscription owes and that nobody runs."""
    dead_letters: int = 1_000
    """Dead letters of one subscription."""
    overdue: float = 600.0
    """How long ago a failed event should have been tried again."""
    crashes: int = 2
    """Owners of a shard that died in a row."""
    attempts: int = 3
    """Failed attempts of the event that a strict subscription waits for. Fewer may be a passing fault."""
    open_ranges: int = 900
    """Ranges of a shard that are pending. Readers stop at 1,000."""
    recent: float = 7 * 86_400.0
    """How long a loss stays a finding."""
    leftover: float = 3_600.0
    """How long what should be gone may stay: emptied segments, keys of events, rows of dead workers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """The connection that looks: rows of `describe_session`."""

    database: str
    role: str
    version: int
    """As server_version_num: 180006 for 18.6."""
    sees_all: bool
    """Whether the role sees what other roles' sessions do."""
    is_owner: bool
    """Whether the role has the rights of the log's owner."""
    log: int | None
    """The oid of `events`; None where there is no log."""
    database_oid: int
    server_start: datetime
    server_time: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """The surroundings that every check may need to know."""

    schema: str
    session: Session
    is_pooled: bool
    has_listener: bool
    """Whether there is a `listen_dsn`."""
    limits: Limits

    @property
    def where(self) -> str:
        """The log's schema, quoted."""
        return ident(self.schema)

    def command(self, *words: str, arguments: Sequence[str] = ()) -> str:
        """The line of a command for this log: see `lines.command`."""
        return command(*words, arguments=arguments, schema=self.schema)


@dataclass(frozen=True, slots=True, kw_only=True)
class Statements:
    """The statements of all looks."""

    doctor_sql: DoctorSql
    overview_sql: OverviewSql
    segments_sql: SegmentsSql


Check = Callable[[Sequence[FactT], Scene], Iterable[Finding]]
"""Pure: the rows of a look, and what all checks know; the findings."""


class Reading(Protocol):
    """Runs one statement in a read-only transaction of its own. Raises errors of this package."""

    async def __call__(self, statement: str, *args: object, is_limited: bool = True) -> Sequence[Record]: ...


class AnyLook(Protocol):
    """A look, whatever its facts are."""

    @property
    def title(self) -> str: ...

    async def run(self, read: Reading, statements: Statements, scene: Scene) -> list[Finding]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Look(Generic[FactT]):
    """One read and its checks."""

    title: str
    """The thing that is looked at, for people."""
    statement: Callable[[Statements], str]
    fact: Callable[..., FactT]
    """Takes the columns of a row by name."""
    checks: tuple[Check[FactT], ...]
    arguments: Callable[[Scene], tuple[object, ...]] = lambda _: ()
    """The statement's parameters."""
    is_limited: bool = True
    """Whether the server ends it when it takes long. Not when it reads settings, because the limits are settings."""

    async def run(self, read: Reading, statements: Statements, scene: Scene) -> list[Finding]:
        """The findings. Raises DatabaseError when the read fails."""
        rows = await read(self.statement(statements), *self.arguments(scene), is_limited=self.is_limited)
        facts = [self.fact(**dict(row)) for row in rows]
        return [finding for check in self.checks for finding in check(facts, scene)]


def not_seen(title: str, error: PgBackendError, scene: Scene) -> Finding:
    """The note that something could not be looked at, and what would let this role look."""
    lacks = isinstance(error, DatabaseError) and error.sqlstate == INSUFFICIENT_PRIVILEGE
    return Finding(
        check="not-examined",
        severity="note",
        subject=title,
        what=f"The doctor could not look at it, so it may hide a fault: {str(error.__cause__ or error).rstrip('.')}."
        + (" The SQL that the line prints lets this role look." if lacks else ""),
        cure=scene.command("grants", "--operator", scene.session.role) if lacks else None,
    )
