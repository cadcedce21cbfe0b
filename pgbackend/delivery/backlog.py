"""The backlog of a shard: the events that it has taken on and that are not at work. Pure.

    add() ──its lane is free──────────────▶ ready ──────────────────────────┐
      ├──another event of its lane is here──▶ parked ──that one leaves──▶ ready │
      ├──it failed under a former owner─────▶ later ──its time comes──▶ retries ┤
      └──the filter has not decided─────────▶ retries ──────────────────────┤
                                                                            ▼
                                     take_…() ──▶ at work ──▶ leave(), or back with put() or put_later()

`ready` holds plain events of the log, so the straight path of a healthy shard makes no other object. Everything else is
a `Delivery`. An event that comes back keeps its lane, so the events behind it keep waiting.
"""

import heapq
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from uuid import UUID

from pgbackend.codec.event import Event
from pgbackend.delivery.delivery import Delivery, next_attempt
from pgbackend.delivery.lanes import Lanes, sift
from pgbackend.model import Failure, Order


@dataclass(frozen=True, slots=True, kw_only=True)
class Carried:
    """A failed event of an ordered shard, as its former owner left it."""

    attempt: int
    """Attempts made."""
    due_at: float
    """When the next one is due, in monotonic seconds."""
    failure: Failure | None
    """Why it was given up, if it was."""
    started_by: UUID | None
    """The worker that started another attempt and never reported its end."""


class Backlog:
    """Says what to do next, and is told what became of it."""

    __slots__ = ("_carried", "_lanes", "_later", "_pushed", "given_up", "ready", "retries", "undecided")

    def __init__(self, *, order: Order, carried: Mapping[int, Carried]) -> None:
        """`carried`: by position, what a former owner of an ordered shard left behind."""
        self.ready: deque[Event] = deque()
        """Events of the log that may be dispatched now, in log order."""
        self.retries: deque[Delivery] = deque()
        """Deliveries that are dispatched one by one."""
        self.given_up: deque[Delivery] = deque()
        """The same for the dead-letter dispatcher: a target that is down does not hold them."""
        self.undecided: set[int] = set()
        """Positions of events that the filter must still decide on. It is asked just before their dispatch."""
        self._later: list[tuple[float, int, Delivery]] = []
        """A heap by due time, in monotonic seconds."""
        self._pushed = 0
        self._lanes = None if order == "none" else Lanes(single=order == "strict")
        self._carried = dict(carried)

    def __bool__(self) -> bool:
        """Whether something can be taken now."""
        return bool(self.ready or self.retries or self.given_up)

    def next_due(self) -> float | None:
        """When the next event that waits for its time is due, in monotonic seconds."""
        return self._later[0][0] if self._later else None

    # In.

    def add(self, event: Event) -> None:
        """Take on an event of the log: it is ready, or waits for its lane, its time or the filter."""
        # The lane first: a late event may have it, and the carried due time counts once the lane is free.
        if self._lanes is None or self._lanes.enter(event):
            self._queue(event)

    def add_run(self, events: Sequence[Event]) -> None:
        """Take on events of the log that have no lane and wait for nothing."""
        self.ready.extend(events)

    def put(self, delivery: Delivery) -> None:
        """Queue a delivery behind the others."""
        self._queue_of(delivery).append(delivery)

    def put_back(self, delivery: Delivery) -> None:
        """Queue a delivery that was taken and not dispatched, before the others."""
        self._queue_of(delivery).appendleft(delivery)

    def put_later(self, delivery: Delivery, due: float) -> None:
        """Queue a delivery from `due` on, in monotonic seconds."""
        self._pushed += 1
        heapq.heappush(self._later, (due, self._pushed, delivery))

    def promote(self, now: float) -> None:
        """Queue the deliveries whose time has come."""
        while self._later and self._later[0][0] <= now:
            self.put(heapq.heappop(self._later)[2])

    def waiting(self) -> dict[int, int]:
        """By position: the attempts made of each failed event that waits here for its time.

        Without those that may have killed their process: they wait for a report, not for their time.
        """
        found = {position: kept.attempt for position, kept in self._carried.items() if kept.started_by is None}
        for _, _, delivery in self._later:
            if delivery.letter is None and not delivery.suspect:
                found[delivery.event.position] = delivery.event.attempt - 1
        return found

    def hasten(self, positions: Collection[int], now: float) -> None:
        """The time of these failed events has come."""
        for position in positions:
            if position in self._carried:
                self._carried[position] = replace(self._carried[position], due_at=now)
        self._later = [
            (min(due, now) if delivery.event.position in positions else due, number, delivery)
            for due, number, delivery in self._later
        ]
        heapq.heapify(self._later)

    # Out.

    def take_probe(self, *, retry: bool) -> Delivery | None:
        """Take what tells most about a target that is down. `retry`: prefer a retry to an event that is new.

        Of the retries it takes the one with most attempts left, of the new events the last one: the first ones may be a
        run of bad events with good ones behind it.
        """
        if self.retries and (retry or not self.ready):
            delivery = min(self.retries, key=_attempt)
            self.retries.remove(delivery)
            return delivery
        return Delivery(self.ready.pop()) if self.ready else None

    def has_group(self, most: int) -> bool:
        """Whether `take_group()` would take that many."""
        if self._lanes is None or len(self.ready) >= most:
            return len(self.ready) >= most
        behind = map(self._lanes.parked_behind, self.ready)
        return len(self.ready) + sum(behind) >= most

    def take_group(self, most: int) -> list[Event]:
        """Take up to so many ready events, and in ordered modes those that wait only for them: in log order."""
        group: list[Event] = []
        while self.ready and len(group) < most:
            event = self.ready.popleft()
            group.append(event)
            if self._lanes is not None and len(group) < most:
                group += self._lanes.follow(event, most - len(group), self._is_plain)
        group.sort(key=_position)
        return group

    def put_back_group(self, events: Sequence[Event]) -> None:
        """Put back what `take_group()` took, or the rest of it, in its order and before all others."""
        if self._lanes is None:
            self.ready.extendleft(reversed(events))
            return
        first: list[Event] = []
        behind: list[Event] = []
        lanes = set[object]()
        for event in events:
            lane = self._lanes.lane_of(event)
            (first if lane is None or lane not in lanes else behind).append(event)
            lanes.add(lane)
        self.ready.extendleft(reversed(first))
        for event in reversed(behind):
            self._lanes.unfollow(event)

    def hold_back(self, events: Sequence[Event]) -> None:
        """Park these events, which `take_group()` took from behind others, in their lanes again, in front."""
        if self._lanes is not None:
            for event in reversed(events):
                self._lanes.unfollow(event)

    def lane_of(self, event: Event) -> object:
        """The events of one lane wait for each other. None: the event has no lane."""
        return None if self._lanes is None else self._lanes.lane_of(event)

    def leave(self, event: Event) -> None:
        """The event is done with: the next one of its lane may go."""
        if self.undecided:
            self.undecided.discard(event.position)
        if self._lanes is not None and (following := self._lanes.leave(event)) is not None:
            self._queue(following)

    def sift(self, is_wanted: Callable[[Event], bool]) -> tuple[list[Event], list[Delivery]]:
        """Remove the events that nobody wants any more; dead letters that an operator sent again stay.

        Returns those that were parked, and those that had their lane: call `leave()` for each of the latter.
        """
        parked = [] if self._lanes is None else self._lanes.sift(is_wanted)
        removed = [Delivery(event) for event in sift(self.ready, is_wanted)]
        doubtful = sift(self.ready, lambda event: event.position not in self.undecided)

        def stays(delivery: Delivery) -> bool:
            return delivery.letter is not None or is_wanted(delivery.event)

        removed += sift(self.retries, stays) + sift(self.given_up, stays)
        kept = []
        for entry in self._later:
            if stays(entry[2]):
                kept.append(entry)
            else:
                removed.append(entry[2])
        self._later = kept
        heapq.heapify(self._later)
        self.retries.extend(map(Delivery, doubtful))
        return parked, removed

    def clear(self) -> None:
        """Forget what waits: the shard's next owner reads it again."""
        self.ready.clear()
        self.retries.clear()
        self.given_up.clear()
        self._later.clear()

    # Events that a former owner left behind.

    @property
    def carried(self) -> Iterable[int]:
        """Positions of a former owner's failed events that have not come by yet."""
        return self._carried.keys()

    def forget_carried(self, lower: int, upper: int) -> list[int]:
        """Drop what a former owner left of these positions, `upper` not included. Returns those that it had."""
        if not self._carried:
            return []
        some = [lower] if upper == lower + 1 else [one for one in self._carried if lower <= one < upper]
        return [position for position in some if self._carried.pop(position, None) is not None]

    def _queue(self, event: Event) -> None:
        before = self._carried.pop(event.position, None) if self._carried else None
        if before is not None:
            attempt = next_attempt(before.attempt, before.started_by)
            event = event.with_delivery(attempt=attempt, failure=before.failure)
            self.put_later(Delivery(event, started_by=before.started_by), before.due_at)
        elif event.position in self.undecided:
            self.put(Delivery(event))
        else:
            self.ready.append(event)

    def _is_plain(self, event: Event) -> bool:
        return event.position not in self._carried and event.position not in self.undecided

    def _queue_of(self, delivery: Delivery) -> deque[Delivery]:
        return self.given_up if delivery.given_up else self.retries


def _position(event: Event) -> int:
    return event.position


def _attempt(delivery: Delivery) -> int:
    return delivery.event.attempt
