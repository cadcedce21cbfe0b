"""Rules of the plans with an application: what transactional subscriptions did, and what held at each moment.

They need no cause for anything: no fault explains an effect that is missing, doubled or there in part. So a run of such
a plan is never "not judged".
"""

from collections import Counter
from collections.abc import Container, Iterable, Sequence
from typing import Protocol

from pgbackend.torture.records import Note
from pgbackend.torture.verdict.events import Events
from pgbackend.torture.verdict.judge import Records
from pgbackend.torture.verdict.leases import Leases
from pgbackend.torture.verdict.rest import check_rest
from pgbackend.torture.verdict.rulings import COMMITS, EFFECTS, KEYS, LOST, MOMENTS, REST, Verdict
from pgbackend.torture.verdict.stored import check_log
from pgbackend.torture.verdict.timeline import Timeline


class Effect(Protocol):
    """The effects of a subscription for one event."""

    @property
    def subscription(self) -> str: ...

    @property
    def position(self) -> int: ...

    @property
    def id(self) -> str: ...


def check_run(records: Records, moments: Iterable[Note], verdict: Verdict) -> Events:
    """Check the log, the commits, the moments and the rest. Returns the events."""
    events = Events(records.produced, records.log)
    check_log(events, verdict)
    timeline = Timeline(records.faults)
    leases = Leases(records.changes, verdict.rulings[COMMITS])
    check_rest(records.state, events, leases, timeline, verdict.rulings[REST])
    ruling = verdict.rulings[MOMENTS]
    for note in moments:
        ruling.checked += 1
        what, found, wanted = note.fields
        if found != wanted:
            ruling.violated(f"{note.at / 1e9:.6f} {what} was {found} instead of {wanted}")
    if not ruling.checked:
        ruling.violated("no moment was noted")
    verdict.outcomes = events.outcomes()
    verdict.faults = timeline.counts
    verdict.commits = leases.commits
    verdict.stalls.extend(timeline.stalls())
    return events


def check_effects(
    name: str, effects: Sequence[Effect], events: Events, letters: Container[str], verdict: Verdict
) -> None:
    """Check that each event in the log took effect once, except those with a dead letter, and nothing else did."""
    ruling, lost = verdict.rulings[EFFECTS], verdict.rulings[LOST]
    times: Counter[str] = Counter()
    for effect in effects:
        ruling.checked += 1
        times[effect.id] += 1
        if events.id_at(effect.position) != effect.id:
            ruling.violated(f"{effect} took effect, and is not in the log there")
        elif times[effect.id] > 1:
            ruling.violated(f"{effect} took effect for the {times[effect.id]}. time")
        elif effect.id in letters:
            ruling.violated(f"{effect} took effect, and has a dead letter")
    for position, id_ in events.stored():
        lost.checked += 1
        if id_ not in times and id_ not in letters:
            lost.violated(f"{id_} at {position} took no effect in {name}, and has no dead letter")


def check_order(effects: Iterable[Effect], events: Events, verdict: Verdict) -> None:
    """Check that no event took effect behind one of its key that was sent after it was acknowledged.

    `effects`: of a subscription that is ordered by key, in the order in which they were noted.
    """
    ruling = verdict.rulings[KEYS]
    last: dict[int, tuple[int, str]] = {}
    for effect in effects:
        sent, lane = events.find(effect.id), events.lane_at(effect.position) if events.id_at(effect.position) else 0
        if sent is None or not lane:
            continue
        ruling.checked += 1
        latest, by = last.get(lane, (-1, ""))
        if sent.acknowledged and sent.ended_at < latest:
            ruling.violated(f"{effect} was acknowledged before {by} was sent, and took effect after it")
        last[lane] = max((latest, by), (sent.sent_at, effect.id))
