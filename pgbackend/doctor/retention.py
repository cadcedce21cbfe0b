"""Retention and deduplication: whether what should go does go."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pgbackend.doctor.finding import Finding
from pgbackend.doctor.lines import shown_bytes, shown_time
from pgbackend.doctor.look import Look, Scene

_SLACK = 1.5
"""The part of `keep` that an event may be older: segments end late, and go one at a time."""
_LARGEST = 1.25
"""The same of `max_bytes`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionState:
    """A row of `find_retention_state`. Times in seconds. None: no limit."""

    keep: float | None
    max_age: float | None
    max_bytes: int | None
    oldest: float | None
    """Since the oldest event was recorded; None for an empty log."""
    bytes: int
    unremoved: int
    """Segments that were emptied long ago and are still attached."""
    workers: int
    """Living ones."""
    held_by_run: Sequence[str]
    """Subscriptions that a worker runs, and because of which events older than `keep` stay."""
    held_by_stopped: Sequence[str]
    """The same of those that nobody runs."""


def check_holders(rows: Sequence[RetentionState], scene: Scene) -> Iterator[Finding]:
    """Subscriptions that hold events beyond `keep`."""
    for row in rows:
        for name in row.held_by_stopped:
            yield Finding(
                check="held-log",
                severity="warning",
                subject=f"subscription {name}",
                what="Events older than `keep` stay because of it, and no worker runs it: the disk fills. Run it, "
                "delete it, or set a hard limit (`pgbackend retention --max-age`).",
                cure=scene.command("subscriptions", "delete", arguments=[name]),
                destroys="its offset, its events to retry and its dead letters",
            )
        for name in row.held_by_run:
            yield Finding(
                check="held-log",
                severity="note",
                subject=f"subscription {name}",
                what="Events older than `keep` stay because it is behind or retries them. A worker runs it, so wait, "
                "or make it faster: more shards, more concurrency.",
            )


def check_retention(rows: Sequence[RetentionState], scene: Scene) -> Iterator[Finding]:
    """Old events that nobody holds and nobody drops."""
    for row in rows:
        limits = [limit for limit in (row.keep, row.max_age) if limit is not None]
        is_held = bool(row.held_by_run or row.held_by_stopped)
        limit = row.max_age if is_held else min(limits, default=None)
        if limit is not None and row.oldest is not None and row.oldest > limit * _SLACK + scene.limits.leftover:
            yield Finding(
                check="retention-stalled",
                severity="warning",
                subject="retention",
                what=f"The oldest event is {shown_time(row.oldest)} old, and may be {shown_time(limit)}. "
                + (
                    "No worker runs, and only workers drop events: start one."
                    if not row.workers
                    else "Workers run: a stranger's lock (see lock-wait, old-transaction) or a foreign key (see "
                    "foreign-key) keeps them from dropping segments."
                ),
            )
        elif row.unremoved:
            yield Finding(
                check="retention-stalled",
                severity="warning",
                subject="retention",
                what=f"{row.unremoved} segments were emptied more than {shown_time(scene.limits.leftover)} ago and "
                "are still attached: transactions that use the log stay open one after the other (see "
                "old-transaction), or no worker runs. Their disk space is free already.",
            )


def check_size(rows: Sequence[RetentionState], scene: Scene) -> Iterator[Finding]:
    """A log that is larger than its hard limit."""
    for row in rows:
        if row.max_bytes is not None and row.bytes > row.max_bytes * _LARGEST:
            yield Finding(
                check="log-size",
                severity="warning",
                subject="retention",
                what=f"The log takes {shown_bytes(row.bytes)}, and `max_bytes` is {shown_bytes(row.max_bytes)}. "
                + (
                    "No worker runs, and only workers drop events: start one."
                    if not row.workers
                    else "Workers run, so a stranger's lock keeps them from it (see lock-wait), or the limit is "
                    "smaller than the segment that is being filled and its indexes."
                )
                + " The line shows the limits.",
                cure=scene.command("retention"),
            )


RETENTION = Look(
    title="retention",
    statement=lambda statements: statements.doctor_sql.find_retention_state,
    fact=RetentionState,
    checks=(check_holders, check_retention, check_size),
    arguments=lambda scene: (scene.limits.leftover,),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class OldKeys:
    """A row of `find_old_keys`: the partition of keys that are not needed any more."""

    name: str
    bytes: int
    window: float
    """Seconds of the log's window of deduplication."""
    since: float
    """Seconds since the present bucket of keys began, which is as long as two windows."""


def check_old_keys(rows: Sequence[OldKeys], scene: Scene) -> Iterator[Finding]:
    """Keys of events that nobody forgets: the next window finds the partition full."""
    for row in rows:
        # Processes forget keys every 5 s, so give them a part of a short window.
        if row.bytes and row.since >= min(scene.limits.leftover, row.window / 2):
            yield Finding(
                check="deduplication-stalled",
                severity="warning",
                subject=f"table {row.name}",
                what=f"It has {shown_bytes(row.bytes)} of keys whose window ended {shown_time(row.since)} ago. Every "
                "process of pgbackend forgets keys, so none runs, or a stranger holds a lock on the table. The line "
                "forgets them.",
                cure=f"SELECT {scene.where}.forget_keys();",
                destroys="keys whose window has passed",
            )


OLD_KEYS = Look(
    title="keys of deduplication",
    statement=lambda statements: statements.doctor_sql.find_old_keys,
    fact=OldKeys,
    checks=(check_old_keys,),
)
