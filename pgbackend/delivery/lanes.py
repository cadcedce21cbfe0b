"""Who waits behind whom in an ordered shard. Pure.

A lane is what goes one after another: the events of one key (`order="key"`), or all there are (`order="strict"`). Its
first event is the pump's: being dispatched, ready, or waiting to be tried again. The others are parked here, in the
order in which they came. An event without a key has no lane, and waits for nobody.
"""

from collections import deque
from collections.abc import Callable

from pgbackend.codec.event import Event


class Lanes:
    """The events that are parked behind others."""

    __slots__ = ("_parked", "_single")

    def __init__(self, *, single: bool) -> None:
        """`single`: one lane for all events."""
        self._single = single
        self._parked: dict[object, deque[Event]] = {}

    def enter(self, event: Event) -> bool:
        """Whether the event is the first of its lane; if not, it is parked until `leave()` hands it out."""
        lane = "" if self._single else event.key
        if lane is None:
            return True
        parked = self._parked.get(lane)
        if parked is None:
            self._parked[lane] = deque()
            return True
        parked.append(event)
        return False

    def leave(self, event: Event) -> Event | None:
        """The first of a lane is done with: the one that is the first now, if one is there."""
        lane = "" if self._single else event.key
        if lane is None:
            return None
        parked = self._parked[lane]
        if parked:
            return parked.popleft()
        del self._parked[lane]
        return None

    def sift(self, wanted: Callable[[Event], bool]) -> list[Event]:
        """Take out what is parked and not wanted any more."""
        return [event for parked in self._parked.values() for event in sift(parked, wanted)]


def sift(queue: deque[Event], wanted: Callable[[Event], bool]) -> list[Event]:
    """Take out of a queue what is not wanted any more; the rest stays in its order."""
    kept: list[Event] = []
    refused: list[Event] = []
    for event in queue:
        (kept if wanted(event) else refused).append(event)
    if refused:
        queue.clear()
        queue.extend(kept)
    return refused
