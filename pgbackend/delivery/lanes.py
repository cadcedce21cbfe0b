"""Lanes: which event waits behind which in an ordered shard. Pure.

The events of one key share a lane (`order="key"`), or all events share one (`order="strict"`). The first event of a
lane is at work, ready, or waits for its retry. The others are parked here, in log order. Under `order="key"` an event
without a key has no lane, and waits for nothing.
"""

from collections import deque
from collections.abc import Callable
from typing import TypeVar

from pgbackend.codec.event import Event

_Item = TypeVar("_Item")


class Lanes:
    """The events that are parked behind others."""

    __slots__ = ("_parked", "_single")

    def __init__(self, *, single: bool) -> None:
        """`single`: one lane for all events."""
        self._single = single
        self._parked: dict[object, deque[Event]] = {}

    def enter(self, event: Event) -> bool:
        """Whether the event is the first of its lane. Otherwise it is parked until `leave()` returns it."""
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
        """Remove the first event of a lane. Returns the one that is first now."""
        lane = "" if self._single else event.key
        if lane is None:
            return None
        parked = self._parked[lane]
        if parked:
            return parked.popleft()
        del self._parked[lane]
        return None

    def sift(self, is_wanted: Callable[[Event], bool]) -> list[Event]:
        """Remove and return the parked events that are not wanted."""
        return [event for parked in self._parked.values() for event in sift(parked, is_wanted)]


def sift(queue: deque[_Item], is_wanted: Callable[[_Item], bool]) -> list[_Item]:
    """Remove and return what is not wanted; the rest keeps its order."""
    kept: list[_Item] = []
    refused: list[_Item] = []
    for item in queue:
        (kept if is_wanted(item) else refused).append(item)
    if refused:
        queue.clear()
        queue.extend(kept)
    return refused
