"""The log's tables as PostgreSQL keeps them: dead rows, size, vacuum, owners, policies."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pgbackend.doctor.finding import Finding
from pgbackend.doctor.lines import ident, shown_bytes, shown_time
from pgbackend.doctor.look import Look, Scene

_SMALL = (
    "offsets",
    "workers",
    "subscriptions",
    "incarnation",
    "retention",
    "deduplication",
    "segments",
    "redeliveries",
)
"""Tables that have few rows, however many events there are."""
_MULTIXACTS_STOP = 1_600_000_000
_WRAPS = 2_000_000_000
_EMPTIED_WHOLE = "recent_events"
"""Its partitions are truncated, so autovacuum is off on purpose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A row of `list_tables`."""

    name: str
    is_partition: bool
    kind: str
    """As pg_class.relkind: r, p, S or v."""
    owner: str
    log_owner: str | None
    live_rows: int
    dead_rows: int
    vacuumed: float | None
    """Seconds since the last vacuum."""
    bytes: int
    transactions: int | None
    """Since the table was frozen."""
    multixacts: int | None
    is_unvacuumed: bool
    has_policies: bool


def check_dead_rows(rows: Sequence[Table], scene: Scene) -> Iterator[Finding]:
    """Tables with more dead rows than living ones."""
    for row in rows:
        if row.dead_rows >= scene.limits.dead_rows and row.dead_rows > row.live_rows:
            last = f"{shown_time(row.vacuumed)} ago" if row.vacuumed is not None else "never"
            yield Finding(
                check="dead-rows",
                severity="warning",
                subject=f"table {row.name}",
                what=f"It has {row.dead_rows:,} dead rows and {row.live_rows:,} living ones; the last vacuum was "
                f"{last}. Statements read over them. If something holds the horizon (see old-transaction, "
                "prepared-transaction, replication-slot), end that first: VACUUM removes nothing before.",
                cure=f"VACUUM {scene.where}.{ident(row.name)};",
            )


def check_bloat(rows: Sequence[Table], scene: Scene) -> Iterator[Finding]:
    """Small tables that have become large files."""
    for row in rows:
        if row.name in _SMALL and row.bytes >= scene.limits.table_bytes:
            yield Finding(
                check="bloat",
                severity="warning",
                subject=f"table {row.name}",
                what=f"It takes {shown_bytes(row.bytes)} for {row.live_rows:,} rows. VACUUM makes the room usable "
                "again, and gives none back. The line below gives it back, and locks the table while it runs, for "
                "seconds at most: workers wait.",
                cure=f"SET lock_timeout = '2s';\nVACUUM FULL {scene.where}.{ident(row.name)};",
            )


def check_autovacuum(rows: Sequence[Table], scene: Scene) -> Iterator[Finding]:
    """Tables that autovacuum is kept from."""
    for row in rows:
        if row.is_unvacuumed and not row.name.startswith(_EMPTIED_WHOLE):
            yield Finding(
                check="autovacuum",
                severity="warning",
                subject=f"table {row.name}",
                what="Autovacuum is off for this table, so its dead rows stay.",
                cure=f"ALTER TABLE {scene.where}.{ident(row.name)} RESET (autovacuum_enabled);",
            )


def check_wraparound(rows: Sequence[Table], scene: Scene) -> Iterator[Finding]:
    """Tables that vacuum has not frozen for very long: PostgreSQL stops in the end."""
    for row in rows:
        age = max(row.transactions or 0, row.multixacts or 0)
        if age >= scene.limits.wraparound:
            yield Finding(
                check="wraparound",
                severity="error" if age >= _MULTIXACTS_STOP else "warning",
                subject=f"table {row.name}",
                what=f"It was frozen {age:,} transactions ago. Before {_WRAPS:,}, PostgreSQL takes no more writes. If "
                "something holds the horizon, end that first: the vacuum freezes nothing before.",
                cure=f"VACUUM (FREEZE) {scene.where}.{ident(row.name)};",
            )


def check_owners(rows: Sequence[Table], scene: Scene) -> Iterator[Finding]:
    """Tables, sequences and views that belong to another role than `events` does."""
    for row in rows:
        if row.log_owner is not None and row.owner != row.log_owner:
            noun = {"S": "SEQUENCE", "v": "VIEW"}.get(row.kind, "TABLE")
            yield Finding(
                check="owner",
                severity="error",
                subject=f"{noun.lower()} {row.name}",
                what=f"It belongs to {row.owner}, and the log to {row.log_owner}: functions with the owner's rights "
                "fail on it, so segments are neither made nor dropped, or letters not buried.",
                # regrole has quoted the name where it must be.
                cure=f"ALTER {noun} {scene.where}.{ident(row.name)} OWNER TO {row.log_owner};",
            )


def check_policies(rows: Sequence[Table], scene: Scene) -> Iterator[Finding]:
    """Tables with row-level security, which hides rows from roles that do not own them."""
    for row in rows:
        if row.has_policies:
            yield Finding(
                check="row-security",
                severity="error",
                subject=f"table {row.name}",
                what="Row-level security is on: roles that do not own the table miss the rows that policies hide, so "
                "events count as rolled back and are lost to subscriptions.",
                cure=f"ALTER TABLE {scene.where}.{ident(row.name)} DISABLE ROW LEVEL SECURITY;",
                destroys="the protection by its policies, which stay stored",
            )


TABLES = Look(
    title="tables",
    statement=lambda statements: statements.doctor_sql.list_tables,
    fact=Table,
    checks=(check_dead_rows, check_bloat, check_autovacuum, check_wraparound, check_owners, check_policies),
)
