"""Lanes: which event waits behind which in an ordered shard. Pure.

The events of one key share a lane (`order="key"`), or all events share one (`order="strict"`). The first event of a
lane is at work, ready, or waits for its retry. The others are parked here, in log order. Under `order="key"` an event
without a key has no lane, and waits for nothing. A batch may take more events of a lane: they follow the first one.
"""

from collections import deque
from collections.abc import Callable
from typing import TypeVar

from pgbackend.codec.event import Event

_Item = TypeVar("_Item")


class Lanes:
    """The events that are parked behind others."""

    __slots__ = ("_following", "_parked", "_single")

    def __init__(self, *, single: bool) -> None:
        """`single`: one lane for all events."""
        self._single = single
        self._parked: dict[object, deque[Event]] = {}
        self._following: dict[object, int] = {}
        """How many events of a lane were taken from behind its first one, if any."""

    def lane_of(self, event: Event) -> object:
        """The lane of an event; None if it has none."""
        return "" if self._single else event.key

    def enter(self, event: Event) -> bool:
        """Whether the event is the first of its lane. Otherwise it is parked until `leave()` returns it."""
        lane = self.lane_of(event)
        if lane is None:
            return True
        parked = self._parked.get(lane)
        if parked is None:
            self._parked[lane] = deque()
            return True
        parked.append(event)
        return False

    def leave(self, event: Event) -> Event | None:
        """Remove the first event of a lane. Returns the one that is first now, unless it was taken already."""
        lane = self.lane_of(event)
        if lane is None:
            return None
        if self._following:
            following = self._following.pop(lane, 0)
            if following > 1:
                self._following[lane] = following - 1
            if following:
                return None
        parked = self._parked[lane]
        if parked:
            return parked.popleft()
        del self._parked[lane]
        return None

    def parked_behind(self, event: Event) -> int:
        """How many events are parked behind the first one of a lane."""
        return len(self._parked.get(self.lane_of(event), ()))

    def follow(self, event: Event, most: int, is_plain: Callable[[Event], bool]) -> list[Event]:
        """Take up to `most` events from behind the first one of a lane, up to the first that is not plain."""
        lane, taken = self.lane_of(event), list[Event]()
        if lane is None:
            return taken
        parked = self._parked[lane]
        while parked and len(taken) < most and is_plain(parked[0]):
            taken.append(parked.popleft())
        if taken:
            self._following[lane] = self._following.get(lane, 0) + len(taken)
        return taken

    def unfollow(self, event: Event) -> None:
        """Park an event again that was taken from behind the first one. Give back the last one first."""
        lane = self.lane_of(event)
        self._parked[lane].appendleft(event)
        following = self._following.pop(lane)
        if following > 1:
            self._following[lane] = following - 1

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
