"""Rules: nothing acknowledged is lost, nothing is stored twice or against what was said, nothing else is seen."""

from collections.abc import Mapping

from pgbackend.torture.load import Terms
from pgbackend.torture.verdict.events import ACKNOWLEDGED, REFUSED, ROLLED_BACK, Events
from pgbackend.torture.verdict.progress import Dispatch, Progress
from pgbackend.torture.verdict.rulings import LOST, NEVER, ONCE, SEEN, Verdict
from pgbackend.torture.verdict.timeline import Timeline


def check_log(events: Events, verdict: Verdict) -> None:
    """Check what is in the log against what the producers were told."""
    once, lost = verdict.rulings[ONCE], verdict.rulings[LOST]
    stored: set[str] = set()
    for position, id_ in events.stored():
        once.checked += 1
        verdict.stored += 1
        sent = events.find(id_)
        if sent is None:
            once.violated(f"{id_} is in the log at {position}, and nobody produced it")
        elif id_ in stored:
            once.violated(f"{id_} is in the log twice, the second time at {position}")
        elif sent.outcome in (REFUSED, ROLLED_BACK):
            once.violated(f"{id_} was {sent.outcome}, and is in the log at {position}")
        elif sent.outcome != ACKNOWLEDGED:
            verdict.uncertain_stored += 1
        stored.add(id_)
    for id_, sent in events.sent():
        if sent.acknowledged:
            lost.checked += 1
            if id_ not in stored:
                lost.violated(f"{id_} was acknowledged, and is not in the log")


def check_seen(
    dispatch: Dispatch, events: Events, subscriptions: Mapping[str, Terms], timeline: Timeline, verdict: Verdict
) -> None:
    """Check that the event is in the log, and not older than its subscription."""
    seen = verdict.rulings[SEEN]
    seen.checked += 1
    if events.id_at(dispatch.position) != dispatch.id:
        seen.violated(f"this event is not in the log there: {dispatch}")
        return
    terms = subscriptions.get(dispatch.subscription)
    if terms is not None and terms.midway:
        sent = events.find(dispatch.id)
        asked_at = timeline.creating.get(dispatch.subscription, NEVER)
        if sent is not None and sent.acknowledged and sent.ended_at < asked_at:
            seen.violated(f"it was acknowledged before the subscription was asked for: {dispatch}")


def is_owed(name: str, terms: Terms, id_: str, events: Events, timeline: Timeline) -> bool:
    """Whether a subscription must handle an event that is in the log."""
    if not terms.midway:
        return True
    created_at, sent = timeline.created.get(name), events.find(id_)
    if created_at is None or sent is None:
        return False
    return sent.sent_at > created_at or (sent.acknowledged and sent.ended_at > created_at)


def check_handled(
    name: str,
    terms: Terms,
    events: Events,
    progress: Progress,
    letters: Mapping[str, int],
    timeline: Timeline,
    verdict: Verdict,
) -> None:
    """Check that the subscription handled every event that it had to, or has a dead letter of it."""
    lost = verdict.rulings[LOST]
    for position, id_ in events.stored():
        lost.checked += 1
        if not progress.is_handled(position) and id_ not in letters and is_owed(name, terms, id_, events, timeline):
            lost.violated(f"{name} neither handled {id_} at {position} nor has a dead letter of it")
