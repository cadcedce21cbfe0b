"""The segments of `events`, and what strangers have added to the log's tables or may do to them."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pgbackend.doctor.finding import Finding
from pgbackend.doctor.lines import ident
from pgbackend.doctor.look import Look, Scene
from pgbackend.log.segments import AHEAD_POSITIONS, AHEAD_SEGMENTS, Reach

_BOUNDS = re.compile(r"FOR VALUES FROM \('(\d+)'\) TO \('(\d+)'\)")


def check_runway(rows: Sequence[Reach], scene: Scene) -> Iterator[Finding]:
    """Whether enough segments are ahead of the log. Workers make more when less than the whole runway is there."""
    for row in rows:
        width = (row.upper or 0) - (row.lower or 0)
        ahead = max(0, (row.upper or 0) - row.head - 1)
        if not row.is_exhausted and ahead >= min(AHEAD_POSITIONS, AHEAD_SEGMENTS * width) / 2:
            continue
        yield Finding(
            check="segment-runway",
            severity="error" if row.is_exhausted else "warning",
            subject="segments of events",
            what=(
                f"No segment holds position {row.head + 1}, so INSERTs in plain SQL fail."
                if row.is_exhausted
                else f"Segments end after {ahead:,} more positions; then INSERTs in plain SQL fail."
            )
            + " Workers make segments, so none has run for long, or something keeps `events` locked (see lock-wait). "
            "Start a worker, or run the line below, which makes the next ones.",
            cure=f"SELECT {scene.where}.make_segment() FROM generate_series(1, {AHEAD_SEGMENTS});",  # noqa: S608 - for people
        )


RUNWAY = Look(
    title="segment runway",
    statement=lambda statements: statements.segments_sql.find_reach,
    fact=Reach,
    checks=(check_runway,),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A row of `list_segments`."""

    schema: str
    name: str
    bounds: str
    is_detaching: bool
    has_owner: bool
    is_at_home: bool


def check_segments(rows: Sequence[Segment], scene: Scene) -> Iterator[Finding]:
    """Partitions of `events` that the log has not made, or that hang between attached and detached."""
    for row in rows:
        table = f"{ident(row.schema)}.{ident(row.name)}"
        bounds = _BOUNDS.fullmatch(row.bounds or "")
        if row.is_detaching:
            yield Finding(
                check="detach-pending",
                severity="error",
                subject=f"segment {row.name}",
                what="A DETACH … CONCURRENTLY of this partition was interrupted. It blocks every other detach, so "
                "retention drops nothing, and its events are invisible. The line ends the detach.",
                cure=f"ALTER TABLE {scene.where}.events DETACH PARTITION {table} FINALIZE;",
                destroys="the segment's place in the log: its events are no longer read",
            )
        elif row.bounds == "DEFAULT":
            yield Finding(
                check="default-partition",
                severity="error",
                subject=f"partition {row.name}",
                what="A DEFAULT partition takes positions that no segment holds, keeps retention from dropping, and "
                "each new segment must search it. Detach it. If it has events, append them again from it: they leave "
                "the log.",
                cure=f"ALTER TABLE {scene.where}.events DETACH PARTITION {table};",
                destroys="the place in the log of the events that are in it",
            )
        elif bounds is None or row.name != f"events_{bounds[1]}" or not row.is_at_home or not row.has_owner:
            yield Finding(
                check="foreign-segment",
                severity="warning",
                subject=f"partition {row.name}",
                what=f"The log has not made this partition ({row.bounds}): its name, schema, owner or bounds are "
                "others. The newest segment is found by its name, and retention empties only segments that the log's "
                "owner owns. Once all subscriptions are past it, detach it.",
                cure=f"ALTER TABLE {scene.where}.events DETACH PARTITION {table};",
                destroys="the place in the log of the events that are in it",
            )


SEGMENTS = Look(
    title="segments",
    statement=lambda statements: statements.doctor_sql.list_segments,
    fact=Segment,
    checks=(check_segments,),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Privilege:
    """A row of `list_privileges`."""

    name: str
    kind: str
    is_segment: bool
    column: str | None
    grantee: str
    """As SQL: regrole has quoted it where it must be."""
    privilege: str


def check_privileges(rows: Sequence[Privilege], scene: Scene) -> Iterator[Finding]:
    """Privileges with which others than the owner could make readers miss events."""
    for (grantee, name), held in _grouped(rows).items():
        names = sorted({row.privilege + (f" ({ident(row.column)})" if row.column else "") for row in held})
        noun = "SEQUENCE" if held[0].kind == "S" else "TABLE"
        yield Finding(
            check="unsafe-privilege",
            severity="error",
            subject=f"{grantee} on {name}",
            what=f"{grantee} has {', '.join(names)} on {name}. With that it can change or delete events, choose "
            "positions, or append past the lock that readers go by, and subscriptions miss events. `pgbackend grants` "
            "prints what roles need.",
            cure="\n".join(f"REVOKE {one} ON {noun} {scene.where}.{ident(name)} FROM {grantee};" for one in names),
        )


def _grouped(rows: Sequence[Privilege]) -> dict[tuple[str, str], list[Privilege]]:
    groups: dict[tuple[str, str], list[Privilege]] = {}
    for row in rows:
        groups.setdefault((row.grantee, row.name), []).append(row)
    return groups


PRIVILEGES = Look(
    title="privileges of others",
    statement=lambda statements: statements.doctor_sql.list_privileges,
    fact=Privilege,
    checks=(check_privileges,),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Addition:
    """A row of `list_additions`."""

    kind: str
    name: str
    schema: str
    relation: str
    detail: str | None
    """The function of a trigger; the table that a foreign key refers to."""


def check_additions(rows: Sequence[Addition], scene: Scene) -> Iterator[Finding]:  # noqa: ARG001 - as all checks
    """Triggers, rules and foreign keys that others have put on the log's tables."""
    for row in rows:
        table = f"{ident(row.schema)}.{ident(row.relation)}"
        if row.kind == "foreign key":
            yield Finding(
                check="foreign-key",
                severity="warning",
                subject=f"foreign key {row.name} of {row.relation}",
                what=f"It refers to {row.detail}. Retention cannot drop a segment that another table refers to.",
                cure=f"ALTER TABLE {table} DROP CONSTRAINT {ident(row.name)};",
                destroys="the constraint",
            )
        else:
            yield Finding(
                check="trigger",
                severity="warning",
                subject=f"{row.kind} {row.name} on {row.relation}",
                what=f"It runs{f' {row.detail}' if row.detail else ''} inside the statements of producers and "
                "workers: it makes them slower, can block them, and fails them when it fails. Use a subscription for "
                "what it does.",
                cure=f"DROP {row.kind.upper()} {ident(row.name)} ON {table};",
                destroys=f"the {row.kind}",
            )


ADDITIONS = Look(
    title="triggers and foreign keys",
    statement=lambda statements: statements.doctor_sql.list_additions,
    fact=Addition,
    checks=(check_additions,),
)
