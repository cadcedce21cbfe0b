"""The verdict: what was acknowledged, handled and committed, held against the promises. A pure function of the records.

Everything is read once, in the order of time, and what is kept of it is a few numbers for each event, in arrays by
position, so that an hour's records fit into memory. What counts as a violation, and what does not:

- An event is **lost** when it was acknowledged, or is in the log, and a subscription that had to handle it neither did
  nor has a dead letter of it.
- A **repeat** is a dispatch of an attempt that had begun before. It needs a new lease and a cause: the process that had
  begun it was killed, or was stopped, cut off, starved, or lost its connection shortly before the lease went. And what
  the offset row called settled when the lease was taken, and nothing was to be tried again, must not come at all.
- **Beside the new owner**: a process whose connections hold, and which runs, handles nothing under a lease that another
  has taken over. One that was hit may finish what it had begun, and may begin what it was just about to: one event when
  it wakes, or when it hears that its connection is gone, and whatever it begins before it can have heard, for a second.
- An event that was **at work when its process lost the shard**, or handled and not yet committed, may have that counted
  as a failed attempt, and so may become a dead letter though it never fails: after as many as it has attempts.
- **Late** events may come behind later ones of their key: those whose transaction was open for as long as `hole_wait`,
  or may have been; not what was acknowledged before the later one was even sent.
"""

from array import array
from bisect import bisect_left
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from pgbackend.log.ranges import RangeSet
from pgbackend.torture.evidence import Change, End, Stored
from pgbackend.torture.load import HOLE_WAIT, REJECTED, RETRY, SUBSCRIPTIONS, Terms, failures
from pgbackend.torture.records import Note

SECOND = 10**9
_SILENCE = 1 * SECOND
"""After so long without a tick a process was stopped, or starved: it has a lease to lose."""
_RECENT = 10 * SECOND
"""A blow explains what is lost within this time: longer than a lease, and the round that takes it over."""
_UNAWARE = 1 * SECOND
"""A process whose connection is gone may not have heard of it for so long."""
_UNCOMMITTED = 2000
"""More than a shard can have handled since its last commit: twice its window."""
_EVIDENCE = 5
"""Lines of evidence that are kept of each rule's violations."""

LOST = "nothing acknowledged is lost"
SEEN = "nothing is seen that is not in the log, or is older than its subscription"
ONCE = "each event is in the log once; what was refused or rolled back is not"
REPEATS = "repeats have a cause, and never what was settled"
COMMITS = "a former owner commits nothing"
OWNER = "a shard has one owner"
KEYS = "the events of a key come one after another, in log order"
STRICT = "strict is strict"
LETTERS = "dead letters are those that must be"
REST = "everything comes to rest"
RULES = (LOST, SEEN, ONCE, REPEATS, COMMITS, OWNER, KEYS, STRICT, LETTERS, REST)

_UNKNOWN, _ACKNOWLEDGED, _REFUSED, _ROLLED_BACK, _UNCERTAIN = range(5)
_OUTCOMES = {"a": _ACKNOWLEDGED, "r": _REFUSED, "x": _ROLLED_BACK, "u": _UNCERTAIN}
_NO_TIME = -1
_HARMLESS = frozenset({"leave", "clock", "skipped"})
"""What costs nobody a lease: who leaves gives its own up, and only the monotonic clock counts."""
_BLOWS = frozenset({"kill", "leave", "stop", "cut", "stall", "terminate", "clock", "skipped"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """Everything that a run left behind."""

    produced: Iterable[Note]
    """By the producers, those of each place in the order of time."""
    log: Iterable[Stored]
    """By position."""
    changes: Iterable[Change]
    notes: Iterable[Note]
    """By the workers and by who did things to them, in the order of time."""
    end: End
    subscriptions: Mapping[str, Terms] = field(default_factory=lambda: SUBSCRIPTIONS)


@dataclass(slots=True)
class Ruling:
    """One promise, and what speaks against it."""

    checked: int = 0
    """How many facts were held against it."""
    violations: int = 0
    evidence: list[str] = field(default_factory=list)
    """The first violations."""

    def violated(self, evidence: str) -> None:
        self.violations += 1
        if len(self.evidence) < _EVIDENCE:
            self.evidence.append(evidence)


@dataclass(slots=True)
class Tally:
    """What one subscription did."""

    handled: int = 0
    """Different events."""
    dispatches: int = 0
    retries: int = 0
    repeats: Counter[str] = field(default_factory=Counter)
    """By their causes."""
    late: int = 0
    """First dispatches of late events behind later ones of their key."""
    letters: int = 0
    longest_gap: int = 0
    """Nanoseconds between two dispatches, while events were produced."""
    last_at: int = _NO_TIME


@dataclass(slots=True)
class Verdict:
    """The rulings, and what there was to judge."""

    rulings: dict[str, Ruling] = field(default_factory=lambda: {rule: Ruling() for rule in RULES})
    tallies: dict[str, Tally] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)
    """How many events were acknowledged, refused, rolled back, uncertain."""
    uncertain_stored: int = 0
    stored: int = 0
    blows: Counter[str] = field(default_factory=Counter)
    """How many of each kind there were, and how many were skipped."""
    takeovers: "array[int]" = field(default_factory=lambda: array("q"))
    """Nanoseconds from a blow until another process had the shard."""
    finished_beside: int = 0
    """Handlings that had begun when the lease was lost, and ended after another had the shard."""
    begun_waking: int = 0
    """Handlings that a process was just about to begin when it was stopped, or its connection went."""
    begun_unaware: int = 0
    """Handlings that it began before it heard that its connection was gone."""
    unprovoked: int = 0
    """Connections that workers lost, or spells in which they starved, without a blow that explains it."""
    commits: int = 0

    @property
    def kept(self) -> bool:
        """Whether every promise was kept."""
        return not any(ruling.violations for ruling in self.rulings.values())


def judge(records: Records) -> Verdict:
    """The verdict on a run."""
    judge = _Judge(records)
    judge.read_produced()
    judge.read_log()
    judge.read_changes()
    judge.read_notes()
    judge.read_end()
    return judge.verdict


class _Produced:
    """What a producer knows of its events, by their numbers."""

    def __init__(self) -> None:
        self.outcomes = bytearray()
        self.sent: array[int] = array("q")
        self.open_since: array[int] = array("q")
        self.ended: array[int] = array("q")
        self.stored = bytearray()

    def send(self, number: int, at: int, first: int) -> None:
        while len(self.outcomes) <= number:
            self.outcomes.append(_UNKNOWN)
            self.stored.append(0)
            for times in (self.sent, self.open_since, self.ended):
                times.append(_NO_TIME)
        self.sent[number] = at
        self.open_since[number] = self.sent[first]

    def end(self, number: int, at: int, outcome: int) -> None:
        self.outcomes[number] = outcome
        self.ended[number] = at


class _Progress:
    """What a subscription did with each position."""

    def __init__(self, size: int) -> None:
        self.epochs: array[int] = array("q", [0]) * size
        """Under which lease its last dispatch began; 0 before the first."""
        self.attempts = bytearray(size)
        self.interrupted = bytearray(size)
        """How often its process had lost the shard, killed, frozen or cut off, before its outcome was committed."""
        self.done = bytearray(size)


class _Process:
    """A process, as the notes tell of it so far."""

    def __init__(self, name: str, at: int) -> None:
        self.name = name
        self.killed_at = _NO_TIME
        self.hits: array[int] = array("q")
        """When something befell it, or ended that did."""
        self.cause = "nothing"
        self.struck_at = _NO_TIME
        """When the last blow fell."""
        self.lasting: set[str] = set()
        """Blows that have not ended."""
        self.broken_at = _NO_TIME
        """When its connections were broken last."""
        self.heard_at = _NO_TIME
        """When it heard last that its own sign of life was gone."""
        self.woke_at = _NO_TIME
        self.noted_at = at
        self.begun_at = _NO_TIME
        self.open: dict[str, _Handling] = {}

    def hit(self, at: int, cause: str) -> None:
        self.hits.append(at)
        self.cause = cause

    def was_hit(self, since: int, until: int) -> bool:
        """Whether anything befell it between these times, or was lasting."""
        silent = until - self.noted_at > _SILENCE
        return bool(self.lasting) or self.killed_at != _NO_TIME or silent or self.has_hit(since, until)

    def has_hit(self, since: int, until: int) -> bool:
        """Whether a blow fell, or ended, between these times."""
        return any(since <= at <= until for at in self.hits[bisect_left(self.hits, since) :][:1])


@dataclass(slots=True)
class _Lease:
    subscription: str
    shard: int
    epoch: int
    process: _Process
    claimed_at: int
    lost_at: int = _NO_TIME
    """When another one was noted to have been claimed on the same shard."""
    successor: "_Lease | None" = None
    given_up: bool = False
    """Whether its owner had said so before."""
    finished: deque[int] = field(default_factory=lambda: deque(maxlen=_UNCOMMITTED))
    """Positions that were handled, or given up, last."""

    def cause(self, at: int) -> str | None:
        """What explains that it was lost; None when nothing does."""
        process = self.process
        if process.killed_at != _NO_TIME:
            return "kill"
        since = (self.lost_at if self.lost_at != _NO_TIME else at) - _RECENT
        return process.cause if process.was_hit(since, at) else None


class _Handling(NamedTuple):
    """A dispatch that has begun."""

    lease: _Lease | None
    subscription: str
    position: int
    attempt: int
    note: Note


class _Claim(NamedTuple):
    made_by: str
    position: int
    pending: RangeSet


@dataclass(slots=True)
class _Lane:
    """What goes one after another: under one lease, and over all."""

    epoch: int = 0
    position: int = 0
    finished: bool = True
    top: int = 0
    """The highest position that was ever begun, and by whom and when."""
    top_process: _Process | None = None
    top_at: int = _NO_TIME


class _Judge:
    def __init__(self, records: Records) -> None:
        self.records = records
        self.verdict = Verdict()
        self._rulings = self.verdict.rulings
        self._terms = records.subscriptions
        self._producers: dict[str, _Produced] = {}
        # By position, the first of which is 1.
        self._ids: list[str] = [""]
        self._lanes: array[int] = array("i", [0])
        self._lane_numbers: dict[str, int] = {"-": 0}
        self._claims: dict[int, _Claim] = {}
        self._progress: dict[str, _Progress] = {}
        self._processes: dict[str, _Process] = {}
        self._leases: dict[int, _Lease] = {}
        self._owners: dict[tuple[str, int], _Lease] = {}
        self._order: dict[tuple[str, int], _Lane] = defaultdict(_Lane)
        self._creating: dict[str, int] = {}
        self._created: dict[str, int] = {}
        self._producing = False

    # What was produced, and what is there of it.

    def read_produced(self) -> None:
        for note in self.records.produced:
            producer = self._producers.get(note.place)
            if producer is None:
                producer = self._producers[note.place] = _Produced()
            match note.mark:
                case "p":
                    for number in map(int, note.fields):
                        producer.send(number, note.at, number)
                case "i":
                    # One of a transaction that has been open since its first.
                    producer.send(int(note.fields[0]), note.at, int(note.fields[1]))
                case "a" | "r" | "x" | "u":
                    for number in map(int, note.fields):
                        producer.end(number, note.at, _OUTCOMES[note.mark])
                case _:
                    pass
        names = {
            _ACKNOWLEDGED: "acknowledged", _REFUSED: "refused", _ROLLED_BACK: "rolled back", _UNCERTAIN: "uncertain",
            _UNKNOWN: "uncertain",
        }  # fmt: skip
        for producer in self._producers.values():
            for outcome, sent in zip(producer.outcomes, producer.sent, strict=True):
                if sent != _NO_TIME:
                    self.verdict.outcomes[names[outcome]] += 1

    def read_log(self) -> None:
        once = self._rulings[ONCE]
        for position, id_, lane in self.records.log:
            once.checked += 1
            self.verdict.stored += 1
            while len(self._ids) <= position:
                self._ids.append("")
                self._lanes.append(0)
            self._ids[position] = id_
            self._lanes[position] = self._lane_numbers.setdefault(lane, len(self._lane_numbers))
            producer, number = self._produced(id_)
            if producer is None:
                once.violated(f"{id_} is in the log at {position}, and nobody produced it")
                continue
            outcome = producer.outcomes[number]
            if producer.stored[number]:
                once.violated(f"{id_} is in the log twice, the second time at {position}")
            elif outcome in (_REFUSED, _ROLLED_BACK):
                what = "refused" if outcome == _REFUSED else "rolled back"
                once.violated(f"{id_} was {what}, and is in the log at {position}")
            elif outcome != _ACKNOWLEDGED:
                self.verdict.uncertain_stored += 1
            producer.stored[number] = 1
        lost = self._rulings[LOST]
        for place, producer in self._producers.items():
            for number, outcome in enumerate(producer.outcomes):
                if outcome == _ACKNOWLEDGED:
                    lost.checked += 1
                    if not producer.stored[number]:
                        lost.violated(f"{place}-{number} was acknowledged, and is not in the log")
        self._progress = {name: _Progress(len(self._ids)) for name in self._terms}
        self.verdict.tallies = {name: Tally() for name in self._terms}

    def _produced(self, id_: str) -> tuple[_Produced | None, int]:
        place, _, number = id_.rpartition("-")
        producer = self._producers.get(place)
        if producer is None or not number.isdecimal() or int(number) >= len(producer.outcomes):
            return None, 0
        return producer, int(number)

    # Who committed what.

    def read_changes(self) -> None:
        commits = self._rulings[COMMITS]
        for change in self.records.changes:
            commits.checked += 1
            if change.epoch != change.epoch_before:
                self._claims[change.epoch] = _Claim(change.made_by, change.position, RangeSet.parse(change.pending))
                if change.epoch < change.epoch_before or change.position != change.position_before:
                    commits.violated(f"a lease was taken with an older epoch, or another position: {change}")
                continue
            self.verdict.commits += 1
            claim = self._claims.get(change.epoch)
            if claim is None or claim.made_by != change.made_by:
                owner = claim.made_by if claim else "nobody"
                commits.violated(f"the lease was {owner}'s, and another process committed: {change}")
            elif change.position < change.position_before:
                commits.violated(f"an offset went back: {change}")

    # What was done, and handled.

    def read_notes(self) -> None:
        for note in self.records.notes:
            if note.place == "chaos":
                self._take_blow(note)
                continue
            process = self._processes.get(note.place)
            if note.mark == "start":
                self._processes[note.place] = _Process(note.fields[0], note.at)
                continue
            if process is None:
                continue
            if note.at - process.noted_at > _SILENCE:
                self._wake(process, note.at)
            process.noted_at = note.at
            match note.mark:
                case "b":
                    self._begin(process, note)
                case "e":
                    self._end(process, note)
                case "claim":
                    self._claim(process, note)
                case "released":
                    owner = self._owners.get((note.fields[0], int(note.fields[1])))
                    if owner is not None and owner.process is process:
                        owner.given_up = True
                case "presence" | "incarnation":
                    if not process.was_hit(note.at - _RECENT, note.at):
                        self.verdict.unprovoked += 1
                        process.hit(note.at, "lost connection")
                    else:
                        process.hit(note.at, process.cause)
                    process.heard_at = note.at
                case _:
                    pass

    def _wake(self, process: _Process, at: int) -> None:
        """A process says something again after a spell of silence."""
        stopped = process.has_hit(process.noted_at, at) and process.cause == "stop"
        if not stopped:
            self.verdict.unprovoked += 1
        process.woke_at = at
        process.hit(at, "stop" if stopped else "starving")

    def _take_blow(self, note: Note) -> None:
        if note.mark == "server" and note.fields[0] != "back":
            self.verdict.blows[f"server {note.fields[0]}"] += 1
        elif note.mark in _BLOWS and self._producing:
            self.verdict.blows[note.mark] += 1
        match note.mark:
            case "begin":
                self._producing = True
            case "over":
                self._producing = False
            case "creating":
                self._creating[note.fields[0]] = note.at
            case "created":
                self._created[note.fields[0]] = note.at
            case "server":
                for process in self._processes.values():
                    process.hit(note.at, "server restart")
                    if note.fields[0] != "back":
                        process.struck_at = process.broken_at = note.at
            case _:
                process_ = self._processes.get(note.fields[0])
                if process_ is not None:
                    self._take_own_blow(process_, note)

    def _take_own_blow(self, process: _Process, note: Note) -> None:
        at, mark = note.at, note.mark
        if mark in _HARMLESS:
            return
        process.struck_at = at if mark not in ("continue", "restore") else process.struck_at
        process.hit(at, {"continue": "stop", "restore": process.cause}.get(mark, mark))
        match mark:
            case "kill":
                process.killed_at = at
            case "stop" | "stall":
                process.lasting.add(mark)
            case "cut":
                process.lasting.add(mark)
                process.broken_at = at
            case "terminate":
                process.broken_at = at
            case "continue":
                process.lasting.discard("stop")
            case _:
                process.lasting -= {"cut", "stall"}

    def _claim(self, process: _Process, note: Note) -> None:
        subscription, shard, epoch = note.fields[0], int(note.fields[1]), int(note.fields[2])
        lease = self._leases[epoch] = _Lease(subscription, shard, epoch, process, note.at)
        owner = self._owners.get((subscription, shard))
        if owner is not None and owner.epoch > epoch:
            # It was stopped before it could say so; somebody else has taken the shard over meanwhile.
            lease.lost_at, lease.successor = owner.claimed_at, owner
            return
        self._owners[subscription, shard] = lease
        if owner is None:
            return
        owner.lost_at, owner.successor = note.at, lease
        former = owner.process
        progress, claim = self._progress[subscription], self._claims.get(epoch)
        at_work = [handling.position for handling in former.open.values() if handling.lease is owner]
        uncommitted = [
            position for position in set(owner.finished)
            if claim is not None and (position > claim.position or position in claim.pending)
        ]  # fmt: skip
        for position in at_work + uncommitted:
            if position < len(self._ids):
                progress.interrupted[position] = min(progress.interrupted[position] + 1, 255)
        if former is not process and not owner.given_up:
            struck_at = former.killed_at if former.killed_at != _NO_TIME else former.struck_at
            if struck_at > owner.claimed_at and (former.killed_at != _NO_TIME or owner.cause(note.at) is not None):
                self.verdict.takeovers.append(note.at - struck_at)

    def _begin(self, process: _Process, note: Note) -> None:
        serial, subscription, shard_, epoch_, position_, attempt_, id_ = note.fields
        shard, epoch, position, attempt = int(shard_), int(epoch_), int(position_), int(attempt_)
        lease = self._leases.get(epoch)
        handling = _Handling(lease, subscription, position, attempt, note)
        process.open[serial] = handling
        self._count(subscription, note.at)
        self._check_seen(handling, id_)
        owner = self._rulings[OWNER]
        owner.checked += 1
        if lease is None or (lease.subscription, lease.shard, lease.process) != (subscription, shard, process):
            owner.violated(f"handled without a lease: {note}")
        elif lease.lost_at != _NO_TIME:
            self._check_begun_beside(process, lease, note)
        process.begun_at = note.at
        if position >= len(self._ids) or subscription not in self._progress:
            return
        if lease is not None:
            self._check_repeat(handling, lease)
            terms = self._terms[subscription]
            if terms.order == "strict":
                self._check_order(handling, lease, self._rulings[STRICT], 0)
            elif terms.order == "key" and self._lanes[position]:
                self._check_order(handling, lease, self._rulings[KEYS], self._lanes[position])
        progress = self._progress[subscription]
        progress.epochs[position] = epoch
        progress.attempts[position] = min(attempt, 255)

    def _count(self, subscription: str, at: int) -> None:
        tally = self.verdict.tallies.get(subscription)
        if tally is None:
            return
        tally.dispatches += 1
        if self._producing and tally.last_at != _NO_TIME:
            tally.longest_gap = max(tally.longest_gap, at - tally.last_at)
        tally.last_at = at

    def _check_seen(self, handling: _Handling, id_: str) -> None:
        seen = self._rulings[SEEN]
        seen.checked += 1
        position = handling.position
        if position >= len(self._ids) or self._ids[position] != id_:
            seen.violated(f"handled what is not in the log: {handling.note}")
            return
        terms = self._terms.get(handling.subscription)
        if terms is not None and terms.midway:
            producer, number = self._produced(id_)
            creating = self._creating.get(handling.subscription, handling.note.at)
            if producer and producer.outcomes[number] == _ACKNOWLEDGED and producer.ended[number] < creating:
                seen.violated(f"it was acknowledged before the subscription was asked for: {handling.note}")

    def _check_begun_beside(self, process: _Process, lease: _Lease, note: Note) -> None:
        at = note.at
        fresh = process.begun_at
        if fresh < process.woke_at and at - process.woke_at < _UNAWARE:
            self.verdict.begun_waking += 1
        elif process.heard_at < process.broken_at and at - process.broken_at < _RECENT:
            if at - max(process.broken_at, lease.lost_at) < _UNAWARE:
                self.verdict.begun_unaware += 1
            else:
                self._violate_owner(lease, note, "begun long after its connection was broken")
        elif process.heard_at > lease.claimed_at and fresh < process.heard_at and at - process.heard_at < _UNAWARE:
            self.verdict.begun_waking += 1
        else:
            self._violate_owner(lease, note, "begun")

    def _violate_owner(self, lease: _Lease, note: Note, what: str) -> None:
        assert lease.successor is not None  # noqa: S101 - it was lost to one
        after = (note.at - lease.lost_at) / SECOND
        successor = lease.successor
        self._rulings[OWNER].violated(
            f"{what} beside {successor.process.name}, which took the shard with epoch {successor.epoch} "
            f"{after:.3f} s before: {note}"
        )

    def _check_repeat(self, handling: _Handling, lease: _Lease) -> None:
        repeats = self._rulings[REPEATS]
        repeats.checked += 1
        subscription, position, attempt = handling.subscription, handling.position, handling.attempt
        tally, progress = self.verdict.tallies[subscription], self._progress[subscription]
        before = progress.epochs[position]
        claim = self._claims.get(lease.epoch)
        if not before:
            # One that was handed over to redelivery before its first dispatch may be settled for the offset: no repeat.
            return
        if attempt == 1 and claim and position <= claim.position and position not in claim.pending:
            repeats.violated(f"settled when the lease was taken, at {claim.position}: {handling.note}")
            return
        if attempt > progress.attempts[position]:
            tally.retries += 1
            return
        former = self._leases.get(before)
        if before == lease.epoch:
            repeats.violated(f"twice under one lease: {handling.note}")
            return
        cause = former.cause(handling.note.at) if former is not None else None
        if cause is None:
            name = former.process.name if former is not None else "nobody"
            repeats.violated(f"nothing had befallen {name}, which had begun it under epoch {before}: {handling.note}")
        else:
            tally.repeats[cause] += 1

    def _check_order(self, handling: _Handling, lease: _Lease, ruling: Ruling, number: int) -> None:
        ruling.checked += 1
        position = handling.position
        lane = self._order[handling.subscription, number]
        strict = not number
        if lane.epoch == lease.epoch and lane.position != position:
            if not lane.finished:
                ruling.violated(f"begun while {lane.position} was not finished: {handling.note}")
            elif position < lane.position and (strict or not self._may_be_late(position, lane)):
                ruling.violated(f"begun behind {lane.position}: {handling.note}")
        if lease.epoch >= lane.epoch:
            lane.epoch, lane.position, lane.finished = lease.epoch, position, False
        if not self._progress[handling.subscription].epochs[position]:
            if position < lane.top:
                if strict or not self._may_be_late(position, lane):
                    ruling.violated(f"begun for the first time behind {lane.top}: {handling.note}")
                else:
                    self.verdict.tallies[handling.subscription].late += 1
            else:
                lane.top, lane.top_process, lane.top_at = position, lease.process, handling.note.at

    def _may_be_late(self, position: int, lane: _Lane) -> bool:
        """Whether an event may come behind the highest one of its lane so far."""
        producer, number = self._produced(self._ids[position])
        if producer is None or producer.outcomes[number] != _ACKNOWLEDGED:
            return True
        other, other_number = self._produced(self._ids[lane.top])
        ended, open_since = producer.ended[number], producer.open_since[number]
        if other is not None and ended < other.sent[other_number]:
            return False
        if ended - open_since >= HOLE_WAIT * SECOND / 2:
            return True
        # Who was stopped between a look at the open transactions and the next one thinks that they took long.
        return lane.top_process is not None and lane.top_process.was_hit(open_since, lane.top_at)

    def _end(self, process: _Process, note: Note) -> None:
        handling = process.open.pop(note.fields[0], None)
        if handling is None:
            return
        subscription, position, lease = handling.subscription, handling.position, handling.lease
        fine = note.fields[1] == "ok"
        if subscription in self._progress and position < len(self._ids):
            progress = self._progress[subscription]
            if fine and not progress.done[position]:
                progress.done[position] = 1
                self.verdict.tallies[subscription].handled += 1
            number = 0 if self._terms[subscription].order == "strict" else self._lanes[position]
            if lease is not None and (fine or self._is_final(handling)):
                lease.finished.append(position)
            lane = self._order.get((subscription, number))
            if lane is not None and lease is not None and (lane.epoch, lane.position) == (lease.epoch, position):
                lane.finished = fine or self._is_final(handling)
        if lease is not None and lease.lost_at > handling.note.at:
            if lease.cause(note.at) is None:
                self._violate_owner(lease, handling.note, "still at work")
            else:
                self.verdict.finished_beside += 1

    def _is_final(self, handling: _Handling) -> bool:
        fails = failures(handling.subscription, self._terms[handling.subscription], self._ids[handling.position])
        return fails == REJECTED or handling.attempt >= RETRY.attempts

    # How it ended.

    def read_end(self) -> None:
        end = self.records.end
        letters: dict[str, dict[str, int]] = defaultdict(dict)
        for letter in end.letters:
            letters[letter.subscription][letter.id] = letter.attempts
        for name, terms in self._terms.items():
            self._check_handled(name, terms, letters[name])
        rest = self._rulings[REST]
        rest.checked += len(end.offsets)
        for text in (*end.unsettled, *end.ended):
            rest.violated(text)
        head = len(self._ids) - 1
        for offset in end.offsets:
            if offset.position < head or offset.pending != "{}" or offset.owner is not None:
                rest.violated(f"{offset} with the log's head at {head}, and everybody gone")

    def _check_handled(self, name: str, terms: Terms, letters: dict[str, int]) -> None:
        lost, buried = self._rulings[LOST], self._rulings[LETTERS]
        tally, progress = self.verdict.tallies[name], self._progress[name]
        tally.letters = len(letters)
        for position, id_ in self._events():
            lost.checked += 1
            attempts = letters.pop(id_, None)
            if not progress.done[position] and attempts is None and self._is_owed(name, terms, id_):
                lost.violated(f"{name} neither handled {id_} at {position} nor has a dead letter of it")
            fails = failures(name, terms, id_)
            doomed = fails == REJECTED or fails >= RETRY.attempts
            if not doomed and attempts is None:
                continue
            buried.checked += 1
            # What a lost process was handling may count as failed: it may be what killed it.
            interrupted = progress.interrupted[position]
            tried = max(fails, 1 if doomed else 0) + interrupted
            if attempts is None:
                if self._is_owed(name, terms, id_):
                    buried.violated(f"{name} has no dead letter of {id_} at {position}, which fails each time")
            elif not doomed and tried < RETRY.attempts:
                buried.violated(f"{name} has a dead letter of {id_} at {position}, which fails {max(fails, 0)} times")
            elif not min(tried - interrupted, RETRY.attempts) <= attempts <= min(tried, RETRY.attempts):
                buried.violated(f"{name} gave up {id_} at {position} after {attempts} attempts")
        for id_ in letters:
            buried.violated(f"{name} has a dead letter of {id_}, which is not in the log")

    def _events(self) -> Iterator[tuple[int, str]]:
        return ((position, id_) for position, id_ in enumerate(self._ids) if id_)

    def _is_owed(self, name: str, terms: Terms, id_: str) -> bool:
        """Whether the subscription had to handle an event that is in the log."""
        if not terms.midway:
            return True
        created = self._created.get(name)
        producer, number = self._produced(id_)
        if created is None or producer is None:
            return False
        acknowledged = producer.outcomes[number] == _ACKNOWLEDGED
        return producer.sent[number] > created or (acknowledged and producer.ended[number] > created)
