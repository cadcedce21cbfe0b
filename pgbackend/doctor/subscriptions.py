"""Subscriptions and workers: what nobody runs, what does not get on, and what was lost."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pgbackend.doctor.finding import Finding
from pgbackend.doctor.lines import shown_time
from pgbackend.doctor.look import Look, Scene

_ERROR_LENGTH = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Subscription:
    """A row of `list_subscriptions`. Times in seconds."""

    name: str
    ordering: str
    lowest: int
    """The offset of its slowest shard."""
    is_complete: bool
    is_run: bool
    """Whether a living worker runs any of its shards."""
    crashes: int
    """The most owners of a shard that died in a row."""
    open_ranges: int
    """The most ranges that are pending in a shard."""
    old_shards: int
    """Shards of the former number, while that changes."""
    is_reshard_idle: bool
    """Whether no living worker runs any of those."""
    paused: float | None
    """Since it was paused; None while it is not."""
    paused_by: str | None
    """`operator` or `dispatcher`."""
    pause_reason: str | None
    oldest: float | None
    """Since the first event above the lowest offset was recorded; None without one."""
    dead_letters: int
    overdue: float | None
    """Since the first of its failed events should have been tried again; negative if that is ahead."""
    retried: int | None
    """The first position that waits for its next attempt."""
    attempt: int | None
    last_error: str | None


def check_abandoned(rows: Sequence[Subscription], scene: Scene) -> Iterator[Finding]:
    """Subscriptions that nobody runs, though they owe events."""
    for row in rows:
        if row.is_complete or row.is_run or row.paused is not None or row.oldest is None:
            continue
        is_old = row.oldest >= scene.limits.unrun_age
        yield Finding(
            check="abandoned-subscription",
            severity="warning" if is_old else "note",
            subject=f"subscription {row.name}",
            what=f"No worker runs it, and the oldest event above its offset ({row.lowest:,}) is "
            f"{shown_time(row.oldest)} old. It keeps the log from dropping events, unless a hard limit does. Start "
            "its worker. If nobody needs it any more, delete it.",
            cure=scene.command("subscriptions", "delete", arguments=[row.name]),
            destroys="its offset, its events to retry and its dead letters",
        )


def check_paused(rows: Sequence[Subscription], scene: Scene) -> Iterator[Finding]:
    """Subscriptions that are paused though they owe events."""
    for row in rows:
        if row.is_complete or row.paused is None or row.oldest is None:
            continue
        who = "An operator" if row.paused_by == "operator" else "Its dispatcher"
        yield Finding(
            check="paused-subscription",
            severity="warning" if row.paused >= scene.limits.unrun_age else "note",
            subject=f"subscription {row.name}",
            what=f"{who} has paused it {shown_time(row.paused)} ago: {_cut(row.pause_reason)}. It keeps the log from "
            "dropping events, unless a hard limit does. The line has it go on.",
            cure=scene.command("subscriptions", "resume", arguments=[row.name]),
        )


def check_dead_letters(rows: Sequence[Subscription], scene: Scene) -> Iterator[Finding]:
    """Subscriptions whose dead letters pile up."""
    for row in rows:
        if row.dead_letters >= scene.limits.dead_letters:
            yield Finding(
                check="dead-letters",
                severity="warning",
                subject=f"subscription {row.name}",
                what=f"It has {row.dead_letters:,} dead letters or more. The line lists their errors. Then mend the "
                "handler and `redeliver` them, or `purge` them.",
                cure=scene.command("dead-letters", "list", "--by-group", "--subscription", row.name),
            )


def check_overdue(rows: Sequence[Subscription], scene: Scene) -> Iterator[Finding]:
    """Failed events that nobody tries again, though a worker runs."""
    for row in rows:
        if not row.is_run or row.paused is not None or row.overdue is None:
            continue
        if row.overdue >= scene.limits.overdue:
            yield Finding(
                check="overdue-retries",
                severity="warning",
                subject=f"subscription {row.name}",
                what=f"A failed event should have been tried again {shown_time(row.overdue)} ago, and a worker runs "
                "the subscription. Its target is down, or its handlers are busy or stuck. Last error: "
                f"{_cut(row.last_error)}. No line cures this: `status()` in its process, or the log of the worker, "
                "says which.",
            )


def check_crashes(rows: Sequence[Subscription], scene: Scene) -> Iterator[Finding]:
    """Shards whose owners die one after the other."""
    for row in rows:
        if row.crashes >= scene.limits.crashes:
            yield Finding(
                check="crash-loop",
                severity="error",
                subject=f"subscription {row.name}",
                what=f"{row.crashes} owners of a shard died in a row, so an event may kill its process, or the "
                "process has too little memory. Workers now dispatch its events one at a time to find the one, and "
                "give it up when its attempts are used up. No line cures this: look for the end of the processes in "
                "their logs.",
            )


def check_reshards(rows: Sequence[Subscription], scene: Scene) -> Iterator[Finding]:  # noqa: ARG001 - as all checks
    """Changes of the number of shards that do not end."""
    for row in rows:
        if row.old_shards and row.is_reshard_idle:
            yield Finding(
                check="stuck-reshard",
                severity="warning",
                subject=f"subscription {row.name}",
                what=f"Its number of shards changes, and no worker runs the {row.old_shards} old shards, which must "
                "read on to the place of the change first. No line cures this: start a worker of the subscription.",
            )


def check_strict(rows: Sequence[Subscription], scene: Scene) -> Iterator[Finding]:
    """Strict subscriptions that wait for an event that fails."""
    for row in rows:
        if row.ordering == "strict" and row.retried is not None:
            yield Finding(
                check="strict-wait",
                severity="warning" if (row.attempt or 0) >= scene.limits.attempts else "note",
                subject=f"subscription {row.name}",
                what=f"It is strict, and all later events wait for the one at {row.retried:,}, which has failed "
                f"{row.attempt} times. Last error: {_cut(row.last_error)}. Mend the handler or its target. The line "
                "goes on behind the event, which becomes a dead letter.",
                cure=scene.command("subscriptions", "skip", "--yes", arguments=[row.name, str(row.retried)]),
            )


def check_open_ranges(rows: Sequence[Subscription], scene: Scene) -> Iterator[Finding]:
    """Shards that are about to stop, because too many positions are open."""
    for row in rows:
        if row.open_ranges >= scene.limits.open_ranges:
            yield Finding(
                check="pending-limit",
                severity="warning",
                subject=f"subscription {row.name}",
                what=f"{row.open_ranges} ranges of positions are pending in a shard, and readers stop at 1,000. "
                "Appenders that stay open (see open-appender), or events that fail one after the other, keep them "
                "open. No line cures this: end those.",
            )


SUBSCRIPTIONS = Look(
    title="subscriptions",
    statement=lambda statements: statements.doctor_sql.list_subscriptions,
    fact=Subscription,
    checks=(
        check_abandoned,
        check_paused,
        check_dead_letters,
        check_overdue,
        check_crashes,
        check_reshards,
        check_strict,
        check_open_ranges,
    ),
    arguments=lambda scene: (scene.limits.dead_letters,),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """A row of `list_losses`."""

    subscription: str
    positions: int
    first: int
    last: int
    age: float


def check_losses(rows: Sequence[Loss], scene: Scene) -> Iterator[Finding]:
    """Events that were dropped lately before a subscription had handled them."""
    for row in rows:
        yield Finding(
            check="lost-events",
            severity="warning",
            subject=f"subscription {row.subscription}",
            what=f"It lost up to {row.positions:,} events ({row.first:,} to {row.last:,}), the last ones "
            f"{shown_time(row.age)} ago: a hard limit of the retention dropped them, or somebody deleted or "
            "redacted them. No line brings them back. The line shows the limits; raise them, or let the subscription "
            "catch up.",
            cure=scene.command("retention"),
        )


LOSSES = Look(
    title="lost events",
    statement=lambda statements: statements.doctor_sql.list_losses,
    fact=Loss,
    checks=(check_losses,),
    arguments=lambda scene: (scene.limits.recent,),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A row of `list_workers`. Times in seconds."""

    name: str
    silent: float
    """Since its last sign of life; negative if that is ahead of the server's clock."""
    is_alive: bool
    shards: int


def check_workers(rows: Sequence[Worker], scene: Scene) -> Iterator[Finding]:
    """Rows of dead workers that nobody deletes, and signs of life from the future."""
    for row in rows:
        if -row.silent >= scene.limits.clock_skew:
            yield Finding(
                check="clock-jump",
                severity="warning",
                subject=f"worker {row.name}",
                what=f"Its last sign of life is {shown_time(-row.silent)} ahead of the server's clock, so the clock "
                "went back. If the worker is dead, its shards wait that much longer. If it is, delete its row.",
                cure=f"DELETE FROM {scene.where}.workers WHERE heartbeat_at > now();",  # noqa: S608 - for people
                destroys="the leases of these workers; one that lives registers again",
            )
        elif not row.is_alive and row.silent >= scene.limits.leftover:
            yield Finding(
                check="dead-worker",
                severity="note",
                subject=f"worker {row.name}",
                what=f"It died {shown_time(row.silent)} ago, owns {row.shards} shards, and no worker has deleted its "
                "row since: none runs. Start one; it takes the shards over. The line deletes such rows.",
                cure=f"DELETE FROM {scene.where}.workers WHERE heartbeat_at < now() - interval '1 h';",  # noqa: S608 - as above
                destroys="the rows of workers that died more than an hour ago; one that was frozen registers again",
            )


WORKERS = Look(
    title="workers",
    statement=lambda statements: statements.doctor_sql.list_workers,
    fact=Worker,
    checks=(check_workers,),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewestEvent:
    """A row of `find_newest_event`."""

    position: int
    age: float


def check_newest_event(rows: Sequence[NewestEvent], scene: Scene) -> Iterator[Finding]:
    """An event from the future: the server's clock went back."""
    for row in rows:
        if -row.age >= scene.limits.clock_skew:
            yield Finding(
                check="clock-jump",
                severity="warning",
                subject=f"event {row.position}",
                what=f"It was recorded {shown_time(-row.age)} ahead of the server's clock, so the clock went back, or "
                "a failover led to a server whose clock is behind. Dates for seek and retention miss by that much "
                "until the clock has caught up. Let all servers follow a time server: the line, run there, shows "
                "whether one does.",
                cure="timedatectl status",
            )


NEWEST_EVENT = Look(
    title="newest event",
    statement=lambda statements: statements.doctor_sql.find_newest_event,
    fact=NewestEvent,
    checks=(check_newest_event,),
)


def _cut(error: str | None) -> str:
    line = " ".join((error or "unknown").split())
    return line if len(line) <= _ERROR_LENGTH else line[: _ERROR_LENGTH - 1] + "…"
