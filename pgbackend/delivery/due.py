"""The failed events of a shard that are due again: what is at work of them, and when the next ones are. Pure.

They come from `redeliveries` and `dead_letters`, a few at a time, and until what became of them is committed they must
not be taken again: a row can be seen before its commit is answered.
"""

import heapq
from time import monotonic

from pgbackend.codec.event import Event
from pgbackend.delivery.health import TargetHealth
from pgbackend.delivery.outcomes import Buried, Finished, LetterDelivered, LetterFailed, Scheduled
from pgbackend.delivery.shard import DueRequest, Mark, Shard

_ROOM = 200
"""How many events that are due again a shard takes at a time for its target, and as many more for what was given up."""
_PROBE_ROOM = 20
"""The same for a target that is down."""


class Due:
    """Keeps one shard's account of them."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._ordered = shard.lease.order != "none"
        self._events: dict[int, int] = {}
        """Sizes by position, of what is at work from `redeliveries` or on its way there."""
        self._given_up: set[int] = set()
        """Those of them that are for the dead-letter dispatcher."""
        self._letters: dict[int, int] = {}
        """Sizes by dead letter, of those that were sent again."""
        self._gone: set[int] = set()
        """Events whose rows are gone, until that is on record."""
        self._times: list[float] = []

    def __len__(self) -> int:
        """How many are at work."""
        return len(self._events) + len(self._letters)

    def __contains__(self, position: int) -> bool:
        """Whether the event is at work already."""
        return position in self._events or position in self._gone

    def begin(self, event: Event, *, letter: int | None = None) -> None:
        """It is at work as one of those that are due again, or as a dead letter."""
        if letter is None:
            self._events[event.position] = event.weight
            if event.failure is not None:
                self._given_up.add(event.position)
        else:
            self._letters[letter] = event.weight

    def skip(self, position: int) -> None:
        """It was due, and its row is gone from the log."""
        self._gone.add(position)

    def ask(self, health: TargetHealth, *, dead_letters: bool) -> DueRequest | None:
        """What there is room for; None when there is none, or the target wants nothing.

        `dead_letters`: whether there is a dispatcher for what was given up. A target that is down does not hold that.
        """
        if health.paused is not None:
            return None
        room = (_PROBE_ROOM if health.down else _ROOM) - (len(self) - len(self._given_up))
        room_for_all = 2 * _ROOM - len(self)
        given_up = room <= 0 and dead_letters
        room = room_for_all if given_up else min(room, room_for_all)
        room_bytes = self._shard.window.max_bytes - sum(self._events.values()) - sum(self._letters.values())
        if room <= 0 or room_bytes <= 0:
            return None
        return DueRequest(
            lease=self._shard.lease,
            events=not self._ordered,
            given_up=given_up,
            room=room,
            room_bytes=room_bytes,
            positions=[*self._events, *self._gone],
            letters=list(self._letters),
        )

    def committed(self, mark: Mark) -> None:
        """What the mark says is durable now: what is at work no more may be found due again."""
        now = monotonic()
        for outcome in mark.outcomes.values():
            match outcome:
                case Scheduled(started=True) | LetterFailed(started=True):
                    pass  # at work
                case Scheduled(position=position, delay=delay):
                    self._leave(position)
                    if not self._ordered:
                        heapq.heappush(self._times, now + delay)
                case Finished(position=position) | Buried(position=position):
                    self._leave(position)
                case LetterDelivered(letter=letter) | LetterFailed(letter=letter):
                    self._letters.pop(letter, None)

    def _leave(self, position: int) -> None:
        self._events.pop(position, None)
        self._gone.discard(position)
        self._given_up.discard(position)

    def next(self) -> float | None:
        """When something that was scheduled here is due, in monotonic seconds."""
        return self._times[0] if self._times else None

    def passed(self, now: float) -> None:
        """The times up to now have been seen to."""
        while self._times and self._times[0] <= now:
            heapq.heappop(self._times)
