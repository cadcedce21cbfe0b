"""Judges a run: reads its records once, in the order of time, and gives each fact to the rules."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pgbackend.torture.audit import Change, FinalState, Start, Stored
from pgbackend.torture.load import SUBSCRIPTIONS, Terms
from pgbackend.torture.plan import LEASE
from pgbackend.torture.records import Note
from pgbackend.torture.verdict.attempts import Attempts, check_letters
from pgbackend.torture.verdict.events import Events
from pgbackend.torture.verdict.leases import Lease, Leases
from pgbackend.torture.verdict.order import Order
from pgbackend.torture.verdict.owners import Owners
from pgbackend.torture.verdict.progress import Dispatch, Progress
from pgbackend.torture.verdict.repeats import Repeats
from pgbackend.torture.verdict.rest import check_rest
from pgbackend.torture.verdict.rulings import COMMITS, NEVER, REPEATS, REST, SECOND, Tally, Verdict
from pgbackend.torture.verdict.stored import check_handled, check_log, check_seen
from pgbackend.torture.verdict.timeline import Timeline

_SILENCE = SECOND
"""A process that notes nothing for longer was silent: it notes that its event loop runs four times a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """Everything that a run left behind."""

    produced: Iterable[Note]
    """The producers' notes, those of each in the order of time."""
    log: Iterable[Stored]
    """By position."""
    changes: Iterable[Change]
    starts: Iterable[Start]
    faults: Iterable[Note]
    """Entries of the injector of faults and of the process that watched the machine, in the order of time."""
    notes: Iterable[Note]
    """The workers' notes, in the order of time."""
    state: FinalState
    subscriptions: Mapping[str, Terms] = field(default_factory=lambda: SUBSCRIPTIONS)


def judge(records: Records) -> Verdict:
    """The verdict on a run."""
    verdict = Verdict()
    events = Events(records.produced, records.log)
    check_log(events, verdict)
    timeline = Timeline(records.faults)
    leases = Leases(records.changes, verdict.rulings[COMMITS])
    reader = _Reader(records.subscriptions, events, timeline, leases, verdict)
    for note in records.notes:
        reader.read(note)
    reader.attempts.read(records.starts)

    letters: dict[str, dict[str, int]] = defaultdict(dict)
    for letter in records.state.letters:
        letters[letter.subscription][letter.id] = letter.attempts
    for name, terms in records.subscriptions.items():
        mine = letters[name]
        check_handled(name, terms, events, reader.progress[name], mine, timeline, verdict)
        check_letters(name, terms, events, reader.attempts, mine, timeline, verdict)
        verdict.tallies[name].letters = len(mine)
    check_rest(records.state, events, leases, timeline, verdict.rulings[REST])

    verdict.outcomes = events.outcomes()
    verdict.faults = timeline.counts
    verdict.commits = leases.commits
    verdict.stalls.extend(timeline.stalls())
    for lease in leases:
        _count_takeover(lease, timeline, verdict)
    if records.state.clock_moved:
        verdict.void.append(f"the server's clock was set by {records.state.clock_moved:+.3f} s")
    return verdict


class _Reader:
    """Reads the workers' notes."""

    def __init__(
        self, subscriptions: Mapping[str, Terms], events: Events, timeline: Timeline, leases: Leases, verdict: Verdict
    ) -> None:
        self._subscriptions = subscriptions
        self._events = events
        self._timeline = timeline
        self._verdict = verdict
        self.progress = {name: Progress(events.head + 1) for name in subscriptions}
        verdict.tallies = {name: Tally() for name in subscriptions}
        self._owners = Owners(leases, timeline, verdict)
        self._repeats = Repeats(leases, timeline, verdict.rulings[REPEATS])
        self._order = Order(events, subscriptions, timeline, verdict)
        self.attempts = Attempts(self.progress, timeline, verdict)
        self._places: dict[str, _Place] = {}

    def read(self, note: Note) -> None:
        if note.kind == "start":
            self._places[note.place] = _Place(note.fields[0], note.at)
        place = self._places[note.place]
        process = place.process
        if note.at - place.noted_at > _SILENCE and not self._was_stopped(process, place.noted_at, note.at):
            self._verdict.unplanned["silent"] += 1
        place.noted_at = note.at
        match note.kind:
            case "dispatch":
                serial, subscription, shard, epoch, position, attempt, id_ = note.fields
                dispatch = Dispatch(
                    process, note.at, subscription, int(shard), int(epoch), int(position), int(attempt), id_
                )
                place.at_work[serial] = dispatch
                self._dispatched(dispatch)
            case "handled" | "failed":
                if (ended := place.at_work.pop(note.fields[0], None)) is not None:
                    self._ended(ended, note.at, handled=note.kind == "handled")
            case "presence" | "incarnation":
                self._owners.heard(process, note.at)
                if not self._had_fault(process, note.at):
                    self._verdict.unplanned["lost connection"] += 1
            case "end":
                self._timeline.ended(process, note.at)
            case _:
                pass

    def _dispatched(self, dispatch: Dispatch) -> None:
        check_seen(dispatch, self._events, self._subscriptions, self._timeline, self._verdict)
        lease = self._owners.dispatched(dispatch)
        progress = self.progress.get(dispatch.subscription)
        if progress is None:
            return
        tally = self._verdict.tallies[dispatch.subscription]
        self._count_dispatch(dispatch, tally)
        if dispatch.position not in progress:
            return
        if lease is not None:
            self._repeats.dispatched(dispatch, lease, progress, tally)
            self._order.dispatched(dispatch, lease, progress)
        self.attempts.dispatched(dispatch)
        progress.dispatched(dispatch)

    def _count_dispatch(self, dispatch: Dispatch, tally: Tally) -> None:
        tally.dispatches += 1
        if self._timeline.is_producing(dispatch.at) and tally.last_at >= 0:
            tally.longest_gap = max(tally.longest_gap, dispatch.at - tally.last_at)
        tally.last_at = dispatch.at

    def _ended(self, dispatch: Dispatch, at: int, *, handled: bool) -> None:
        self._owners.ended(dispatch, at)
        progress = self.progress.get(dispatch.subscription)
        if progress is None or dispatch.position not in progress:
            return
        if not handled:
            progress.failed(dispatch)
        elif progress.handled(dispatch):
            self._verdict.tallies[dispatch.subscription].handled += 1
        self._order.ended(dispatch, handled=handled)

    def _was_stopped(self, process: str, since: int, until: int) -> bool:
        woke_at = self._timeline.woke_at(process, until)
        return since <= woke_at <= until

    def _had_fault(self, process: str, at: int) -> bool:
        cause = self._timeline.find_fault(process, at - round(LEASE * SECOND), at)
        return cause is not None and cause.planned


@dataclass(slots=True)
class _Place:
    """The process that runs in a place, as its notes tell so far."""

    process: str
    noted_at: int
    at_work: dict[str, Dispatch] = field(default_factory=dict)


def _count_takeover(lease: Lease, timeline: Timeline, verdict: Verdict) -> None:
    """Note how long after the fault another process owned the shard."""
    successor = lease.successor
    if successor is None or lease.released_at != NEVER or successor.process == lease.process:
        return
    cause = timeline.find_cause_of_loss(lease)
    if cause is not None and cause.planned and cause.since > lease.at:
        verdict.takeovers.append(successor.at - cause.since)
