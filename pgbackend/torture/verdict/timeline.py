"""Facts: which fault hit which process when, and what each of them explains. The only causes there are.

A lease is explained as lost at a time t if

- its process was killed before t;
- the server crashed between the claim and t, which ends every lease. A fast shutdown keeps the leases; it explains
  what is lost until a lease's time after the server is back;
- its process was stopped, cut off or stalled, or lost a connection to `terminate` or `lose`, and t is not later than a
  lease's time (3 s) after the end of that: within it, a process that works finds its way back;
- the machine stood still, and t is not later than a lease's time after that. This is no planned cause: see __init__.py.

A process that lives is explained as unable to report an attempt if the plan left it no two seconds in a row, in the
lease's time before the attempt was counted, in which it and the server worked. A worker needs up to two seconds,
because its pause between two tries grows to 1.5 s. A process that was told to leave is explained if the server was away
when it ended. A stop or a stall explains nothing while it lasts and the connection is open, up to a minute: the server
shows that the process is there, and the next owner waits. The connection is open if no other fault was at work in the
two seconds before the stop, or since.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from pgbackend.torture.plan import LEASE
from pgbackend.torture.records import Note
from pgbackend.torture.verdict.leases import Lease
from pgbackend.torture.verdict.rulings import NEVER, SECOND, Cause

TOLERANCE = SECOND // 20
"""Two clocks may differ by so much: the server's time is translated with an error of half a round trip."""
AFTERMATH = round(LEASE * SECOND)
"""For so long after its end a fault explains that a lease is lost."""
RETURN = 2 * SECOND
"""The longest time in which a worker that can reach the server connects and reports."""
FROZEN = 60 * SECOND
"""For so long a process without a sign of life, but with a connection, counts as alive. See `care.py`."""
_CRASHES = ("immediate", "kill", "failover")
_COUNTED = ("kill", "leave", "stop", "cut", "stall", "lose", "terminate", "clock", "skipped")


@dataclass(slots=True)
class Fault:
    """A fault of one process or of the server. Without duration it ends when it begins."""

    kind: str
    since: int
    until: int = NEVER

    def overlaps(self, since: int, until: int) -> bool:
        return self.since <= until and since <= self.until


@dataclass(slots=True)
class _Process:
    faults: list[Fault] = field(default_factory=list)
    killed_at: int = NEVER
    ended_at: int = NEVER


class Timeline:
    """The faults of a run, and the stalls of its machine."""

    def __init__(self, notes: Iterable[Note]) -> None:
        """`notes`: of whoever injected the faults, and of the process that watched the machine."""
        self._processes: dict[str, _Process] = {}
        self._outages: list[Fault] = []
        self._stalls: list[Fault] = []
        self._producing = [NEVER, NEVER]
        self.creating: dict[str, int] = {}
        """When each subscription was asked for."""
        self.created: dict[str, int] = {}
        """When each subscription existed."""
        self.counts: Counter[str] = Counter()
        """How many faults of each kind there were, and how many were skipped."""
        for note in notes:
            self._read(note)

    def _read(self, note: Note) -> None:
        at, fields = note.at, note.fields
        if note.kind in _COUNTED and self.is_producing(at):
            self.counts[note.kind] += 1
        match note.kind:
            case "begin":
                self._producing[0] = at
            case "over":
                self._producing[1] = at
            case "creating":
                self.creating[fields[0]] = at
            case "created":
                self.created[fields[0]] = at
            case "server":
                self._read_outage(at, fields[0])
            case "stall" if note.place == "machine":
                self._stalls.append(Fault(f"stall of the {fields[0]}", int(fields[1]), int(fields[2])))
            case "kill":
                self._process(fields[0]).killed_at = at
            case "stop" | "cut" | "stall" | "lose":
                self._process(fields[0]).faults.append(Fault(note.kind, at))
            case "terminate":
                self._process(fields[0]).faults.append(Fault(note.kind, at, at))
            case "continue" | "restore":
                self._process(fields[0]).faults[-1].until = at
            case _:
                # A clock that jumps, or a process that leaves in order, costs no lease.
                pass

    def _read_outage(self, at: int, mode: str) -> None:
        if mode == "back":
            self._outages[-1].until = at
        else:
            self.counts[f"server {mode}"] += 1
            self._outages.append(Fault(mode, at))

    def _process(self, name: str) -> _Process:
        return self._processes.setdefault(name, _Process())

    def ended(self, process: str, at: int) -> None:
        """Note that a process ended in order."""
        self._process(process).ended_at = at

    # Facts.

    def is_producing(self, at: int) -> bool:
        """Whether producers and faults were at work."""
        return self._producing[0] <= at <= self._producing[1]

    def restarts(self) -> int:
        """How often the plan restarted the server."""
        return len(self._outages)

    def stalls(self) -> Iterator[str]:
        """When the machine stood still, in words."""
        for stall in self._stalls:
            after = (stall.since - self._producing[0]) / SECOND
            yield f"{stall.kind} for {(stall.until - stall.since) / SECOND:.1f} s, {after:.1f} s after the start"

    def life(self, began_at: int) -> int:
        """The number of a life of the server, counted by its crashes. `began_at`: when PostgreSQL was started."""
        return sum(outage.kind in _CRASHES and outage.since <= began_at + TOLERANCE for outage in self._outages)

    def was_killed(self, process: str, at: int) -> bool:
        """Whether the plan had killed it by then."""
        return self._process(process).killed_at <= at + TOLERANCE

    def woke_at(self, process: str, at: int) -> int:
        """When its last stop before `at` ended; -1 if it had none."""
        faults = self._process(process).faults
        return max((fault.until for fault in faults if fault.kind == "stop" and fault.until <= at), default=-1)

    def broken_at(self, process: str, at: int) -> int:
        """When the plan last broke a connection of the process before `at`; -1 if it never did."""
        own = (fault for fault in self._process(process).faults if fault.kind in ("cut", "lose", "terminate"))
        return max((fault.since for fault in (*own, *self._outages) if fault.since <= at), default=-1)

    # Explanations.

    def find_fault(self, process: str, since: int, until: int) -> Cause | None:
        """A fault of the process or of the server between two times, or else a stall of the machine; None without."""
        for fault in self._process(process).faults:
            if fault.overlaps(since, until):
                return Cause(fault.kind, fault.since)
        for outage in self._outages:
            if outage.overlaps(since, until):
                return Cause("server restart", outage.since)
        return self._find_stall(since, until)

    def find_cause_of_loss(self, lease: Lease) -> Cause | None:
        """The cause for which the process lost the lease when it ended."""
        at, process = lease.ended_at, self._process(lease.process)
        if process.killed_at <= at + TOLERANCE:
            return Cause("kill", process.killed_at)
        for outage in self._outages:
            if self._explains(outage, lease, at):
                return Cause("server restart", outage.since)
        for fault in process.faults:
            if fault.overlaps(at - AFTERMATH, at + TOLERANCE):
                return Cause(fault.kind, fault.since)
        return self._find_stall(at - AFTERMATH, at)

    def _explains(self, outage: Fault, lease: Lease, at: int) -> bool:
        """Whether an outage of the server explains that a lease was lost."""
        if not lease.at <= outage.until or at + TOLERANCE < outage.since:
            return False
        if at <= outage.until:
            return True
        in_another_life = lease.successor is None or lease.successor.life != lease.life
        return in_another_life and (outage.kind in _CRASHES or at <= outage.until + AFTERMATH)

    def find_cause_of_silence(self, process: str, at: int) -> Cause | None:
        """The cause for which a live process had not reported by then that it outlived an attempt."""
        mine = self._process(process)
        stall = self._find_stall(min(at, mine.ended_at) - AFTERMATH, at)
        if mine.ended_at <= at:
            return self._find_outage(mine.ended_at) or stall
        if self._is_seen_connected(mine, at):
            return stall
        return self._find_hold(mine, at) or stall

    def _find_outage(self, at: int) -> Cause | None:
        """The restart of the server that was under way."""
        for outage in self._outages:
            if outage.since <= at <= outage.until:
                return Cause("server restart", outage.since)
        return None

    def _is_seen_connected(self, process: _Process, at: int) -> bool:
        """Whether the server has a connection of a process that is stopped or stalled, and not for too long."""
        for fault in process.faults:
            if fault.kind in ("stop", "stall") and fault.since <= at <= fault.until:
                others = (other for other in (*process.faults, *self._outages) if other is not fault)
                was_broken = any(other.overlaps(fault.since - RETURN, at) for other in others)
                return not was_broken and at - fault.since < FROZEN
        return False

    def _find_hold(self, process: _Process, at: int) -> Cause | None:
        """The cause that left the process no time to report within a lease's time; None if it had enough."""
        holds = [fault for fault in (*process.faults, *self._outages) if fault.kind != "terminate"]
        free_since, last = at - AFTERMATH, None
        for hold in sorted(holds, key=lambda hold: hold.since):
            if not hold.overlaps(at - AFTERMATH, at):
                continue
            if hold.since - free_since >= RETURN:
                return None
            free_since, last = max(free_since, hold.until), hold
        if last is None or at - free_since >= RETURN:
            return None
        return Cause("server restart" if last in self._outages else last.kind, last.since)

    def _find_stall(self, since: int, until: int) -> Cause | None:
        for stall in self._stalls:
            if stall.overlaps(since, until):
                return Cause(stall.kind, stall.since, planned=False)
        return None
