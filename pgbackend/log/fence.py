"""The fence: proves that a missing position is dead, or says who may still fill it (I2, I3).

Positions are given out before commit. A reader that sees 5 and 7 does not know of 6: its appender may be open, or may
have rolled back. Reading on past it loses the event, measured with 16 producers and some rollbacks: 46 % of them.

**The proof.** An INSERT locks its table (`RowExclusiveLock` on the parent `events`) before it draws a position from the
sequence, and holds that lock until after its commit is visible to everybody. So:

    1. read the sequence: every position up to `upto` was drawn by a transaction that had the lock by then;
    2. then list who holds the lock: the evidence. A transaction that drew one of those positions is in it, or is over;
    3. then take a snapshot. A position ≤ `upto` that it does not show belongs to somebody in the evidence, or is dead.

    A hole is dead once a snapshot still lacks it that was taken after everybody in its evidence was gone.

The steps' order is the whole point. Evidence taken before the sequence was read misses an appender that came between; a
page read before the evidence shows holes that have been filled since: that page is never used to declare one dead. A
function of the log takes 1 and 2, so that no planner has a say in their order (Citus's took 2 first: of 107,227 events
34 to 46 were lost).

**Prepared transactions.** `PREPARE TRANSACTION` gives an appender a new name in `pg_locks` ("-1/<xid>", no pid) and its
old one disappears. So a prepared transaction that turns up when a blocker goes takes the blocker's place. Some versions
keep the old name until the server restarts. A clean restart begins all other names anew, and a new transaction may get
the old name. So evidence carries the server's start time: after another start, everybody who holds the lock takes the
blockers' place.

**Patience.** A reader waits for an appender at most `hole_wait`, counted from when this process first saw it open, not
once a hole: with one open appender under load, waiting once a hole made half of all events late, once an appender 14
of 34,301. Holes whose appenders are all overdue are passed: they stay listed, and what appears in them is still read.

**Failover.** Locks and virtual transactions are a server's own: evidence of one says nothing of another, nor of the
same one after a crash. What a promoted standby has is what WAL says, up to some point, and WAL is one order:

- The sequence is at or above every event and offset that is there: it writes ahead, up to 32 values, before it gives
  one out. So positions may be left out at the switch, which nobody holds: dead with the first evidence.
- An offset is there only with all that it was committed on. A hole that had been found dead is dead here as well: its
  appender has no commit record, nor will it get one.
- An appender that was open has ended. A prepared one is there, with its locks, before the first connection is let in.
- After an asynchronous failover the point may be some way back, and the sequence with it: positions that had been seen
  are given out once more, to other events. Whatever a process remembers of them is void.

So no memory crosses a switch. A row in an unlogged table names the life of the server, its incarnation; recovery and
promotion empty that table. Evidence, pages, claims, offset commits and new offsets all depend on it, and when it is
another one the worker ends (`IncarnationChanged`) and the next begins from the rows that are there.

**Restores.** Positions are also given out again when the log is set back under a server that lives on. A dump carries
the unlogged row, so the identity of a life is more than its id (view `life`): the table's oid, which a restored table
does not share; the row's xmin, which a restored row does not share; the sequence's file, which a copy of the database
has elsewhere, and which TRUNCATE … RESTART IDENTITY and each ALTER SEQUENCE replace. `setval()` leaves no such trace.
So a process ends the life for all others (`end_life`) when the sequence stands below a position that it has seen, or
when an event that it knew has become another one. Offsets may then stand above events that are new: the life is
marked as set back, and no worker starts in it before a human has said how to go on.

**What it takes for granted** is looked up and tried before any worker starts, and looked up again while it runs:
pgbackend/log/requirements.py.

Rejected: `pg_snapshot_xmin(pg_current_snapshot())` on an xid column, as outboxes often have it: one unrelated long
transaction anywhere in the cluster stops it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from pgbackend.log.ranges import Range, RangeSet

MAX_PENDING_RANGES = 1000
"""At this many passed holes a reader stops reading ahead: an offset's update takes 5 ms with 1,000 ranges, 58 with
10,000."""

_PREPARED = "-1/"


@dataclass(frozen=True, slots=True)
class Evidence:
    """Who may hold a position at or below `upto` open: everybody in `appenders`, and nobody else."""

    upto: int
    appenders: frozenset[str]
    incarnation: str | None
    server_start: datetime | None = None
    """When the server began to give these names to transactions."""

    def still_open(self, blockers: frozenset[str], *, since: "Evidence") -> frozenset[str]:
        """The `blockers` of the evidence `since` that are in this one too, by whatever name."""
        if self.server_start != since.server_start:
            # Only prepared transactions outlive a restart, but an old name says nothing about who they are.
            return self.appenders
        if blockers <= self.appenders:
            return blockers
        # Somebody went: by an end, or under the new name of a prepared transaction.
        prepared = {name for name in self.appenders - since.appenders if name.startswith(_PREPARED)}
        return (blockers & self.appenders) | prepared


class AppenderClock:
    """Since when each appender is known to be open, for the whole process. Times are monotonic seconds."""

    def __init__(self, *, hole_wait: float) -> None:
        self.hole_wait = hole_wait
        self._first_seen: dict[str, float] = {}

    def observe(self, appenders: Iterable[str], *, now: float) -> None:
        """Take the latest evidence: newcomers begin to count, who is gone is forgotten."""
        present = set(appenders)
        gone = [seen for name, seen in self._first_seen.items() if name not in present]
        for name in present:
            if name not in self._first_seen:
                # A prepared transaction has been open for longer than its name; give it the oldest name that went.
                self._first_seen[name] = min(gone, default=now) if name.startswith(_PREPARED) else now
        self._first_seen = {name: seen for name, seen in self._first_seen.items() if name in present}

    def is_overdue(self, appender: str, *, now: float) -> bool:
        """Whether it has been waited for long enough. One that is gone is not: the next round resolves what it held."""
        seen = self._first_seen.get(appender)
        return seen is not None and now - seen >= self.hole_wait


class _Hole:
    """One run of missing positions."""

    __slots__ = ("blockers", "lower", "passed", "upper")

    def __init__(self, lower: int, upper: int, blockers: frozenset[str] | None, *, passed: bool) -> None:
        self.lower = lower
        self.upper = upper
        self.blockers = blockers
        """Who may fill it; None: no evidence covers it yet."""
        self.passed = passed
        """Whether the reader went on beyond it, so that it is pending for every subscription."""


class Fence:
    """What one reader knows about the positions it has not seen. Pure: it is told of evidence and of reads.

    In each round the reader calls, in this order: `apply_evidence` with fresh evidence; a read of a page together with
    `ranges()` in one snapshot; `fill` with what appeared; `remove_dead`; `add_missing` with what the page lacks.
    """

    def __init__(self, passed: Iterable[Range] = (), *, strict: bool = False) -> None:
        """`passed`: holes taken over from an offset. `strict` (for `strict`): no hole is ever passed."""
        self._strict = strict
        self._evidence: Evidence | None = None
        self._holes = [_Hole(lower, upper, None, passed=not strict) for lower, upper in passed]

    def __len__(self) -> int:
        return len(self._holes)

    @property
    def unproven(self) -> bool:
        """Whether some gap has no evidence yet, so that the next round should come at once."""
        return any(gap.blockers is None for gap in self._holes)

    @property
    def waiting(self) -> bool:
        """Whether some gap holds the reader back."""
        return any(not gap.passed for gap in self._holes)

    def ranges(self) -> RangeSet:
        return RangeSet((gap.lower, gap.upper) for gap in self._holes)

    def adopt(self, ranges: Iterable[Range]) -> None:
        """Watch holes that another reader has passed."""
        fresh = RangeSet(ranges)
        for gap in self._holes:
            fresh.remove(gap.lower, gap.upper)
        if fresh:
            self._holes.extend(_Hole(lower, upper, None, passed=True) for lower, upper in fresh)
            self._holes.sort(key=lambda gap: gap.lower)

    def apply_evidence(self, evidence: Evidence) -> None:
        """Take evidence: gaps it covers get their blockers, others lose those that are gone."""
        before = self._evidence
        for gap in self._holes:
            if gap.blockers is None:
                if gap.upper - 1 <= evidence.upto:
                    gap.blockers = evidence.appenders
            elif before is not None:
                gap.blockers = evidence.still_open(gap.blockers, since=before)
        self._evidence = evidence

    def fill(self, positions: Sequence[int]) -> list[int]:
        """Take out positions (ascending) that have appeared; those of them in holes that were passed."""
        late: list[int] = []
        kept: list[_Hole] = []
        index = 0
        for gap in self._holes:
            rest = RangeSet([(gap.lower, gap.upper)])
            while index < len(positions) and positions[index] < gap.lower:
                index += 1
            while index < len(positions) and positions[index] < gap.upper:
                rest.discard(positions[index])
                if gap.passed:
                    late.append(positions[index])
                index += 1
            kept.extend(_Hole(lower, upper, gap.blockers, passed=gap.passed) for lower, upper in rest)
        self._holes = kept
        return late

    def remove_dead(self) -> list[Range]:
        """Forget the gaps that nobody can fill any more. Only after a read that began after `apply_evidence`."""
        dead = [(gap.lower, gap.upper) for gap in self._holes if gap.blockers is not None and not gap.blockers]
        if dead:
            self._holes = [gap for gap in self._holes if gap.blockers is None or gap.blockers]
        return dead

    def add_missing(self, lower: int, upper: int) -> bool:
        """A page lacks these positions; whether they are dead. Evidence older than the page that covers them holds."""
        if lower >= upper:
            return False
        covered = self._evidence is not None and upper - 1 <= self._evidence.upto
        blockers = self._evidence.appenders if covered and self._evidence else None
        if blockers is None or blockers:
            self._holes.append(_Hole(lower, upper, blockers, passed=False))
            return False
        return True

    def pass_overdue(self, clock: AppenderClock, *, now: float) -> list[Range]:
        """Go beyond the gaps in front whose appenders are all overdue; what was passed."""
        if self._strict:
            return []
        room = MAX_PENDING_RANGES - sum(gap.passed for gap in self._holes)
        opened: list[Range] = []
        for gap in self._holes:
            if gap.passed:
                continue
            # Nobody is left to fill it: what it has comes with the next reads, before what is behind it.
            if not gap.blockers or room <= 0:
                break
            if not all(clock.is_overdue(name, now=now) for name in gap.blockers):
                break
            gap.passed = True
            opened.append((gap.lower, gap.upper))
            room -= 1
        return opened

    def first_blocked(self) -> int | None:
        """The first position that the reader must not go beyond yet; None when nothing holds it back."""
        return min((gap.lower for gap in self._holes if not gap.passed), default=None)
