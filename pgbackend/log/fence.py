"""The fence: the proof that a missing position is dead, or else which transactions may still fill it (I2, I3).

PostgreSQL assigns positions before commit. A reader that sees 5 and 7 but not 6 has found a hole. Its appender, the
transaction that drew 6, is still open or has rolled back. A reader that goes on loses the events of open appenders:
46 % of all events, measured with 16 producers and some rollbacks.

**The proof** rests on two facts about PostgreSQL:

    F1. An INSERT takes `RowExclusiveLock` on the table that it names (the parent `events`) before it draws a position.
    F2. A transaction keeps that lock until after every new snapshot shows its commit.

A reader takes three steps, in this order:

    1. Read the sequence: every position up to `upto` has been drawn.
    2. List the transactions that hold the lock: the evidence.
    3. Take a snapshot and read a page.

Take any position p ≤ `upto`, and the transaction T that drew it. T drew p before step 1 ended, so by F1 it had the
lock by then. If T is not in the evidence, it had given the lock up by the end of step 2, so T is over. If it committed,
the snapshot of step 3 shows p (F2). So a position ≤ `upto` that the snapshot lacks belongs to a transaction in the
evidence, or it is dead: no event will ever have it. (Transactions that come later draw higher positions.) When later
evidence no longer has that transaction either, the same argument holds for it and the next snapshot:

    A hole is dead once a snapshot lacks it that was taken after every transaction in its evidence was gone.

A savepoint that is rolled back gives up its lock early. That is sound: what it inserted can never appear.

The order of the steps is what makes this true:

- Evidence that is listed before the sequence is read misses an appender that comes between the two. So one function of
  the log takes steps 1 and 2, which leaves no planner the choice. (Citus's planner listed the locks first, and 34 to 46
  of 107,227 events were lost.)
- A page that is read before the evidence may lack events that were committed in between. So a hole is declared dead
  only on a read that began after its evidence was taken.

**Prepared transactions.** `PREPARE TRANSACTION` gives an appender a new name in `pg_locks` ("-1/<xid>", no pid), and
its old name disappears. So when one of a hole's appenders disappears, every prepared transaction that is new takes its
place. Some versions keep the old name until the server restarts. A clean restart numbers all others from the beginning,
and a new transaction may get an old name. So evidence carries the server's start time: after another start, every
transaction that holds the lock takes the place of the hole's appenders.

**Patience.** A reader waits for an appender at most `hole_wait`, counted from when this process first saw it open, not
from the hole. With one open appender under load, half of all events were late when each hole was waited for, and 14 of
34,301 when each appender was. A hole whose appenders are all overdue is passed: the reader goes on behind it, keeps it
open, and still delivers what appears in it.

**Limits.** Evidence counts in one incarnation only: pgbackend/log/incarnation.py. What the proof takes for granted
about the tables and the server is checked before any worker starts, and while it runs: pgbackend/log/requirements.py.

Rejected: `pg_snapshot_xmin(pg_current_snapshot())` on an xid column, as outboxes often have it. One unrelated long
transaction anywhere in the cluster stops it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from pgbackend.log.ranges import Range, RangeSet

MAX_PENDING_RANGES = 1000
"""The most holes that a reader passes: an update of an offset takes 5 ms with 1,000 ranges, 58 ms with 10,000."""

_PREPARED = "-1/"


@dataclass(frozen=True, slots=True)
class Evidence:
    """The transactions that may hold a position at or below `upto` open: those in `appenders`, and no others."""

    upto: int
    appenders: frozenset[str]
    incarnation: str | None
    server_start: datetime | None = None
    """When the server began to give these names to transactions."""

    def still_open(self, blockers: frozenset[str], *, since: "Evidence") -> frozenset[str]:
        """The transactions of this evidence that may be one of the `blockers`, which the evidence `since` has."""
        if self.server_start != since.server_start:
            # Only prepared transactions outlive a restart, and names say nothing about which ones they are.
            return self.appenders
        if blockers <= self.appenders:
            return blockers
        # A blocker that is gone has ended, or has become one of the prepared transactions that are new.
        prepared = {name for name in self.appenders - since.appenders if name.startswith(_PREPARED)}
        return (blockers & self.appenders) | prepared


class AppenderClock:
    """How long each appender has been open, as far as this process has seen. Times are monotonic seconds."""

    def __init__(self, *, hole_wait: float) -> None:
        self.hole_wait = hole_wait
        self._first_seen: dict[str, float] = {}

    def observe(self, appenders: Iterable[str], *, now: float) -> None:
        """Count from now for the appenders that are new in the latest evidence, and forget those that are gone."""
        present = set(appenders)
        gone = [seen for name, seen in self._first_seen.items() if name not in present]
        for name in present:
            if name not in self._first_seen:
                # A prepared transaction may be any of those that are gone: count from the one seen first.
                self._first_seen[name] = min(gone, default=now) if name.startswith(_PREPARED) else now
        self._first_seen = {name: seen for name, seen in self._first_seen.items() if name in present}

    def is_overdue(self, appender: str, *, now: float) -> bool:
        """Whether readers have waited `hole_wait` for it. False when it is gone: later evidence settles its holes."""
        seen = self._first_seen.get(appender)
        return seen is not None and now - seen >= self.hole_wait


class _Hole:
    """One range of missing positions."""

    __slots__ = ("blockers", "lower", "passed", "upper")

    def __init__(self, lower: int, upper: int, blockers: frozenset[str] | None, *, passed: bool) -> None:
        self.lower = lower
        self.upper = upper
        self.blockers = blockers
        """The transactions that may fill it. Empty: it is dead. None: no evidence covers it yet."""
        self.passed = passed
        """Whether the reader went on behind it, so that it is pending for every subscription."""


class Fence:
    """The holes that one reader knows, and who may still fill each. Pure: the reader feeds it evidence and reads.

    In each round the reader makes these calls, in this order:

        apply_evidence   with fresh evidence; then it reads a page and the `ranges()` in one snapshot
        fill             with the positions that appeared in holes
        remove_dead      for the holes that the snapshot proves dead
        add_missing      for each range that the page lacks
        pass_overdue     for the holes that are not waited for any longer
    """

    def __init__(self, passed: Iterable[Range] = (), *, strict: bool = False) -> None:
        """`passed`: holes that an offset lists as pending. `strict`: no hole is ever passed."""
        self._strict = strict
        self._evidence: Evidence | None = None
        self._holes = [_Hole(lower, upper, None, passed=not strict) for lower, upper in passed]

    def __len__(self) -> int:
        return len(self._holes)

    @property
    def needs_evidence(self) -> bool:
        """Whether no evidence covers some hole yet, so that the next round should come at once."""
        return any(hole.blockers is None for hole in self._holes)

    @property
    def barrier(self) -> int | None:
        """The first position that holds the reader back: it delivers only what is below. None: nothing does."""
        return min((hole.lower for hole in self._holes if not hole.passed), default=None)

    def ranges(self) -> RangeSet:
        """All holes."""
        return RangeSet((hole.lower, hole.upper) for hole in self._holes)

    def adopt(self, ranges: Iterable[Range]) -> None:
        """Add holes that another reader has passed."""
        unknown = RangeSet(ranges)
        for hole in self._holes:
            unknown.remove(hole.lower, hole.upper)
        if unknown:
            self._holes.extend(_Hole(lower, upper, None, passed=True) for lower, upper in unknown)
            self._holes.sort(key=lambda hole: hole.lower)

    def apply_evidence(self, evidence: Evidence) -> None:
        """Holes that had no evidence get their blockers, if this evidence covers them. Others lose those now gone."""
        before = self._evidence
        for hole in self._holes:
            if hole.blockers is None:
                if hole.upper - 1 <= evidence.upto:
                    hole.blockers = evidence.appenders
            elif before is not None:
                hole.blockers = evidence.still_open(hole.blockers, since=before)
        self._evidence = evidence

    def fill(self, positions: Sequence[int]) -> list[int]:
        """Take positions (ascending) that have appeared out of the holes. Returns those that lay in passed holes."""
        late: list[int] = []
        kept: list[_Hole] = []
        index = 0
        for hole in self._holes:
            rest = RangeSet([(hole.lower, hole.upper)])
            while index < len(positions) and positions[index] < hole.lower:
                index += 1
            while index < len(positions) and positions[index] < hole.upper:
                rest.discard(positions[index])
                if hole.passed:
                    late.append(positions[index])
                index += 1
            kept.extend(_Hole(lower, upper, hole.blockers, passed=hole.passed) for lower, upper in rest)
        self._holes = kept
        return late

    def remove_dead(self) -> list[Range]:
        """Remove and return the holes without blockers. Only after a whole read that began after `apply_evidence`."""
        # `not blockers` alone would include None, which means that no evidence covers the hole.
        dead = [(hole.lower, hole.upper) for hole in self._holes if hole.blockers is not None and not hole.blockers]
        if dead:
            self._holes = [hole for hole in self._holes if hole.blockers is None or hole.blockers]
        return dead

    def add_missing(self, lower: int, upper: int) -> bool:
        """Add a range that a page lacks, unless it is dead already. Returns whether it is."""
        if lower >= upper:
            return False
        # The page was read after the evidence was taken, so evidence that covers the range counts.
        covered = self._evidence is not None and upper - 1 <= self._evidence.upto
        blockers = self._evidence.appenders if covered and self._evidence else None
        if blockers is not None and not blockers:
            return True
        self._holes.append(_Hole(lower, upper, blockers, passed=False))
        return False

    def expect(self, positions: Iterable[int]) -> None:
        """Wait for events at these positions, of which copies are there to be read."""
        self._holes.extend(_Hole(position, position + 1, None, passed=False) for position in positions)
        self._holes.sort(key=lambda hole: hole.lower)

    def pass_overdue(self, clock: AppenderClock, *, now: float) -> list[Range]:
        """Pass the first holes, as far as all their appenders are overdue. Returns those holes."""
        if self._strict:
            return []
        room = MAX_PENDING_RANGES - sum(hole.passed for hole in self._holes)
        opened: list[Range] = []
        for hole in self._holes:
            if hole.passed:
                continue
            # No blockers: the next read shows its events or proves it dead, so do not pass it now.
            if not hole.blockers or room <= 0:
                break
            if not all(clock.is_overdue(name, now=now) for name in hole.blockers):
                break
            hole.passed = True
            opened.append((hole.lower, hole.upper))
            room -= 1
        return opened
