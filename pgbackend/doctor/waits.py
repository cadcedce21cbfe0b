"""Things that others wait for: open appenders, locks on the log's tables, notifications."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pgbackend.doctor.finding import Finding
from pgbackend.doctor.lines import literal, session, shown_query, shown_time
from pgbackend.doctor.look import Look, Scene

_ENDS = "the session and its transaction: what it did is rolled back"


@dataclass(frozen=True, slots=True, kw_only=True)
class Appender:
    """A row of `list_appenders`."""

    pid: int | None
    """None for a prepared transaction, which `gid` names."""
    gid: str | None
    role: str | None
    application: str | None
    state: str | None
    query: str | None
    age: float | None
    """Seconds; None where neither this role nor the log's owner may see it."""


def check_appenders(rows: Sequence[Appender], scene: Scene) -> Iterator[Finding]:
    """Transactions that readers of the log had to wait for, and that still keep positions open."""
    for row in rows:
        if row.age is not None and row.age < scene.limits.appender_age:
            continue
        is_prepared = row.pid is None
        subject = f"prepared transaction {row.gid}" if is_prepared else session(row.pid, row.application, row.role)
        doing = (
            "" if is_prepared else f" It is {row.state or 'in an unknown state'}; last query: {shown_query(row.query)}."
        )
        yield Finding(
            check="open-appender",
            # An unknown age is no evidence: an appender is open for milliseconds while it appends.
            severity="note" if row.age is None else "warning",
            subject=subject,
            what=f"This transaction has appended to the log and is open for {shown_time(row.age)}.{doing} Readers "
            "waited for it once; `strict` subscriptions and events of its own wait until it ends. End it from its "
            "program if you can."
            + (
                " ALTER ROLE … SET idle_in_transaction_session_timeout ends such sessions in future." if row.pid else ""
            ),
            cure=f"ROLLBACK PREPARED {literal(row.gid or '')};"
            if is_prepared
            else f"SELECT pg_terminate_backend({row.pid});",
            destroys="what the transaction did, its events included" if is_prepared else _ENDS,
        )


APPENDERS = Look(
    title="open appenders",
    statement=lambda statements: statements.doctor_sql.list_appenders,
    fact=Appender,
    checks=(check_appenders,),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LockWait:
    """A row of `list_lock_waits`."""

    pid: int
    relation: str
    mode: str
    waited: float | None
    blocker: int | None
    """0 for a prepared transaction; None if the wait was over in the meantime."""
    application: str | None
    role: str | None
    state: str | None
    query: str | None


def check_lock_waits(rows: Sequence[LockWait], scene: Scene) -> Iterator[Finding]:
    """Sessions that wait for a lock on a table of the log, by what they wait for."""
    for blocker in dict.fromkeys(row.blocker for row in rows if row.blocker is not None):
        waiting = [row for row in rows if row.blocker == blocker and (row.waited or 0.0) >= scene.limits.lock_wait]
        if not waiting:
            continue
        first = waiting[0]
        pids = ", ".join(str(row.pid) for row in waiting)
        what = (
            f"Sessions wait for it (pid {pids}), the first one for {shown_time(first.waited)}, because it holds a "
            f"lock on {first.relation} that conflicts with {first.mode}. Everybody behind them waits, too."
        )
        if blocker == 0:
            yield Finding(
                check="lock-wait",
                severity="error",
                subject="a prepared transaction",
                what=f"{what} The line lists all of them: end the one with ROLLBACK PREPARED and its gid.",
                cure="SELECT gid, prepared, owner FROM pg_prepared_xacts ORDER BY prepared;",
            )
        else:
            yield Finding(
                check="lock-wait",
                severity="error",
                subject=session(blocker, first.application, first.role),
                what=f"{what} Its query: {shown_query(first.query)}.",
                cure=f"SELECT pg_terminate_backend({blocker});",
                destroys=_ENDS,
            )


LOCK_WAITS = Look(
    title="lock waits",
    statement=lambda statements: statements.doctor_sql.list_lock_waits,
    fact=LockWait,
    checks=(check_lock_waits,),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NotificationHolder:
    """A row of `list_notification_holders`: the queue, and a session that may hold it, if there is one."""

    usage: float
    """From 0 to 1, of the whole server."""
    pid: int | None
    database: str | None
    application: str | None
    query: str | None
    age: float | None


def check_notifications(rows: Sequence[NotificationHolder], scene: Scene) -> Iterator[Finding]:
    """Whether the queue of notifications fills up, and who may be to blame."""
    usage = max((row.usage for row in rows), default=0.0)
    if usage < scene.limits.notify_queue:
        return
    suspects = [row for row in rows if row.pid is not None]
    named = "; ".join(
        f"{session(row.pid, row.application)} in database {row.database}, open for {shown_time(row.age)}, last query: "
        f"{shown_query(row.query)}"
        for row in suspects
    )
    yield Finding(
        check="notification-queue",
        severity="error" if usage >= 0.5 else "warning",
        subject="queue of notifications",
        what=f"{usage:.2%} of the server's queue of notifications is in use. A session that listens and stays in an "
        "open transaction keeps it from being emptied. When it is full, every NOTIFY fails: pgbackend then finds "
        "events by polling, and programs that send NOTIFY themselves fail. Oldest open transactions: "
        f"{named or 'none is visible'}.",
        cure="\n".join(f"SELECT pg_terminate_backend({row.pid});" for row in suspects[:1]) or None,
        destroys=_ENDS if suspects else None,
    )


NOTIFICATIONS = Look(
    title="queue of notifications",
    statement=lambda statements: statements.doctor_sql.list_notification_holders,
    fact=NotificationHolder,
    checks=(check_notifications,),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NotifyWait:
    """A row of `find_notify_waits`; none while nobody waits."""

    sessions: int
    waited: float | None
    """Seconds of the longest wait."""
    pid: int | None
    application: str | None
    wait_event: str | None
    """The thing that the holder of the lock waits for."""


def check_notify_waits(rows: Sequence[NotifyWait], scene: Scene) -> Iterator[Finding]:
    """Commits with a NOTIFY that wait for each other."""
    for row in rows:
        if (row.waited or 0.0) >= scene.limits.lock_wait:
            yield Finding(
                check="notify-wait",
                severity="warning",
                subject=session(row.pid, row.application) if row.pid else "NOTIFY",
                what=f"{row.sessions} sessions wait in their COMMIT for the server's one lock of NOTIFY, the first "
                f"one for {shown_time(row.waited)}. The session that holds it waits for "
                f"{row.wait_event or 'its own commit'}. No line cures this: let programs send one NOTIFY for many "
                "events, and see synchronous-standby if commits wait for a standby.",
            )


NOTIFY_WAITS = Look(
    title="waits for NOTIFY",
    statement=lambda statements: statements.doctor_sql.find_notify_waits,
    fact=NotifyWait,
    checks=(check_notify_waits,),
)
