"""Rules: the events of a key, or of a strict subscription, are handled one after another, in log order.

Under one lease nothing excuses another order, except that an event may be late: its transaction was open for
`hole_wait` when a later event of its key was dispatched. A process that was hit by a fault may have taken a short
transaction for such a long one, because it counts from its first look to its last. In strict order no event may be
late.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from pgbackend.torture.load import HOLE_WAIT, REJECTED, RETRY, Terms, failures
from pgbackend.torture.verdict.events import Events
from pgbackend.torture.verdict.leases import Lease
from pgbackend.torture.verdict.progress import Dispatch, Progress
from pgbackend.torture.verdict.rulings import KEYS, SECOND, STRICT, Ruling, Verdict
from pgbackend.torture.verdict.timeline import Timeline

_STRICT_LANE = 0


@dataclass(slots=True)
class _Lane:
    """The last event of a key, or of a strict subscription, under the newest lease; and the highest one so far."""

    epoch: int = 0
    position: int = 0
    is_finished: bool = True
    highest: int = 0
    highest_by: str = ""
    highest_at: int = 0


class Order:
    """Checks each dispatch against the last one of its lane."""

    def __init__(
        self, events: Events, subscriptions: Mapping[str, Terms], timeline: Timeline, verdict: Verdict
    ) -> None:
        self._events = events
        self._subscriptions = subscriptions
        self._timeline = timeline
        self._verdict = verdict
        self._lanes: dict[tuple[str, int], _Lane] = defaultdict(_Lane)

    def dispatched(self, dispatch: Dispatch, lease: Lease, progress: Progress) -> None:
        """`progress`: before this dispatch."""
        if (number := self._lane_number(dispatch)) is None:
            return
        lane, position = self._lanes[dispatch.subscription, number], dispatch.position
        ruling = self._verdict.rulings[STRICT if number == _STRICT_LANE else KEYS]
        ruling.checked += 1
        if lane.epoch == lease.epoch and lane.position != position:
            if not lane.is_finished:
                ruling.violated(f"dispatched while {lane.position} was not finished: {dispatch}")
            elif position < lane.position:
                self._check_late(dispatch, lane, ruling, f"dispatched after {lane.position}")
        if lease.epoch >= lane.epoch:
            lane.epoch, lane.position, lane.is_finished = lease.epoch, position, False
        if progress.epoch(position):
            return
        if position > lane.highest:
            lane.highest, lane.highest_by, lane.highest_at = position, dispatch.process, dispatch.at
        elif self._check_late(dispatch, lane, ruling, f"dispatched for the first time after {lane.highest}"):
            self._verdict.tallies[dispatch.subscription].late += 1

    def ended(self, dispatch: Dispatch, *, handled: bool) -> None:
        """A dispatch ended."""
        if (number := self._lane_number(dispatch)) is None:
            return
        lane = self._lanes[dispatch.subscription, number]
        if (lane.epoch, lane.position) == (dispatch.epoch, dispatch.position):
            terms = self._subscriptions[dispatch.subscription]
            is_rejected = failures(dispatch.subscription, terms, dispatch.id) == REJECTED
            lane.is_finished = handled or is_rejected or dispatch.attempt >= RETRY.attempts

    def _lane_number(self, dispatch: Dispatch) -> int | None:
        """The lane that orders the event; None if none does."""
        order = self._subscriptions[dispatch.subscription].order
        if order == "strict":
            return _STRICT_LANE
        return (self._events.lane_at(dispatch.position) or None) if order == "key" else None

    def _check_late(self, dispatch: Dispatch, lane: _Lane, ruling: Ruling, finding: str) -> bool:
        """Check an event behind the highest one of its lane. Returns whether it may be late."""
        finding = f"{finding}: {dispatch}"
        sent, later = self._events.find(dispatch.id), self._events.find(self._events.id_at(lane.highest))
        if self._subscriptions[dispatch.subscription].order == "strict":
            ruling.violated(finding)
        elif sent is None or not sent.acknowledged:
            # Its transaction may have been open for any time.
            return True
        elif later is not None and sent.ended_at < later.sent_at:
            ruling.violated(f"acknowledged before the later event was sent, and {finding}")
        elif sent.ended_at - sent.open_since >= HOLE_WAIT * SECOND / 2:
            return True
        else:
            cause = self._timeline.find_fault(lane.highest_by, sent.open_since, lane.highest_at)
            return ruling.is_explained(cause, finding)
        return False
