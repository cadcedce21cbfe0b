"""The xmin horizon and its holders, which keep VACUUM from removing rows, and the server from removing WAL.

`offsets` is updated many times a second. While something holds the horizon, its dead rows stay, and commits slow down.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pgbackend.doctor.finding import Finding
from pgbackend.doctor.lines import literal, session, shown_bytes, shown_query, shown_time
from pgbackend.doctor.look import Look, Scene

_ENDS = "the session and its transaction: what it did is rolled back"


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenTransaction:
    """A row of `list_sessions`. Times in seconds; None where this role may not see them."""

    pid: int
    role: str | None
    application: str | None
    state: str | None
    query: str | None
    age: float | None
    unchanged: float | None
    dead_rows: int
    """Those of the log's tables."""


def check_transactions(rows: Sequence[OpenTransaction], scene: Scene) -> Iterator[Finding]:
    """Sessions whose transaction has been open for long."""
    for row in rows:
        is_idle = (row.state or "").startswith("idle in transaction")
        limit = scene.limits.idle_age if is_idle else scene.limits.query_age
        if row.age is not None and row.age >= limit:
            doing = f"does nothing for {shown_time(row.unchanged)}" if is_idle else "is at work"
            yield Finding(
                check="old-transaction",
                severity="warning",
                subject=session(row.pid, row.application, row.role),
                what=f"Its transaction is open for {shown_time(row.age)} and {doing}; last query: "
                f"{shown_query(row.query)}. {_held(row.dead_rows)}"
                + (" idle_in_transaction_session_timeout would end such sessions." if is_idle else ""),
                cure=f"SELECT pg_terminate_backend({row.pid});",
                destroys=_ENDS,
            )


SESSIONS = Look(
    title="open transactions",
    statement=lambda statements: statements.doctor_sql.list_sessions,
    fact=OpenTransaction,
    checks=(check_transactions,),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A row of `list_prepared`."""

    gid: str
    role: str | None
    age: float
    dead_rows: int


def check_prepared(rows: Sequence[Prepared], scene: Scene) -> Iterator[Finding]:
    """Prepared transactions that wait for a coordinator for long."""
    for row in rows:
        if row.age >= scene.limits.idle_age:
            yield Finding(
                check="prepared-transaction",
                severity="warning",
                subject=f"prepared transaction {row.gid}",
                what=f"It is prepared for {shown_time(row.age)}, survives restarts, and ends only by hand. "
                f"{_held(row.dead_rows)} COMMIT PREPARED ends it, too, if its coordinator decided so.",
                cure=f"ROLLBACK PREPARED {literal(row.gid)};",
                destroys="what the transaction did",
            )


PREPARED = Look(
    title="prepared transactions",
    statement=lambda statements: statements.doctor_sql.list_prepared,
    fact=Prepared,
    checks=(check_prepared,),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A row of `list_slots`."""

    name: str
    type: str
    is_active: bool
    wal_status: str | None
    transactions: int | None
    catalog_transactions: int | None
    wal_bytes: int | None
    inactive: float | None
    """Seconds; None while it is active, and before PostgreSQL 17."""


def check_slots(rows: Sequence[Slot], scene: Scene) -> Iterator[Finding]:
    """Slots that nobody reads, that keep much WAL, or that hold VACUUM back."""
    for row in rows:
        holds = max(row.transactions or 0, row.catalog_transactions or 0)
        keeps = row.wal_bytes or 0
        reasons = [
            reason
            for reason, applies in (
                ("it has no reader" + (f" for {shown_time(row.inactive)}" if row.inactive else ""), not row.is_active),
                (f"it keeps {shown_bytes(keeps)} of WAL", keeps >= scene.limits.slot_bytes or not row.is_active),
                (f"it holds VACUUM back by {holds:,} transactions", holds >= scene.limits.horizon),
                ("the server has removed WAL that it needs", row.wal_status == "lost"),
            )
            if applies
        ]
        if reasons:
            yield Finding(
                check="replication-slot",
                severity="warning",
                subject=f"{row.type} replication slot {row.name}",
                what=f"{'; '.join(reasons).capitalize()}. The disk fills with WAL until the slot is read or dropped. "
                "Start its reader. If it has none any more, drop it.",
                cure=f"SELECT pg_drop_replication_slot({literal(row.name)});",
                destroys="the place of its reader, which must be set up anew",
            )


SLOTS = Look(
    title="replication slots",
    statement=lambda statements: statements.doctor_sql.list_slots,
    fact=Slot,
    checks=(check_slots,),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Standby:
    """A row of `list_standbys`."""

    application: str | None
    pid: int
    transactions: int
    dead_rows: int


def check_standbys(rows: Sequence[Standby], scene: Scene) -> Iterator[Finding]:
    """Standbys whose queries hold the primary's VACUUM back."""
    for row in rows:
        if row.transactions >= scene.limits.horizon:
            yield Finding(
                check="standby-feedback",
                severity="warning",
                subject=f"standby {row.application or row.pid}",
                what=f"A query on this standby holds VACUUM back by {row.transactions:,} transactions, because "
                f"hot_standby_feedback is on there. {_held(row.dead_rows)} Run the lines on the standby: the first "
                "finds the query, and the others make it no matter.",
                cure="SELECT pid, query FROM pg_stat_activity WHERE backend_xmin IS NOT NULL ORDER BY xact_start;\n"
                "ALTER SYSTEM SET hot_standby_feedback = off;\nSELECT pg_reload_conf();",
                destroys="long queries on the standby: they may be cancelled",
            )


STANDBYS = Look(
    title="standbys",
    statement=lambda statements: statements.doctor_sql.list_standbys,
    fact=Standby,
    checks=(check_standbys,),
)


def _held(dead_rows: int) -> str:
    return (
        "VACUUM removes no row that was deleted or updated since: offsets grow, and commits of offsets slow down. The "
        f"log's tables have {dead_rows:,} dead rows."
    )
