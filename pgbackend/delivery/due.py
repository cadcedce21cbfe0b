"""The account of a shard's failed events that come back: which are at work, and when the next ones are due. Pure.

They come from `redeliveries` and `dead_letters`, a few at a time. An event must not be taken again until its outcome is
committed: a query may see its old row before the commit is answered.
"""

import heapq
from dataclasses import dataclass
from time import monotonic
from uuid import UUID

from pgbackend.codec.event import Event
from pgbackend.delivery.health import TargetHealth
from pgbackend.delivery.outcomes import Buried, Finished, LetterDelivered, LetterFailed, Scheduled
from pgbackend.delivery.shard import Mark, Shard
from pgbackend.subscriptions.leases import Lease

_ROOM = 200
"""Events that a shard takes at a time for its target, and as many again for its dead-letter dispatcher."""
_PROBE_ROOM = 20
"""The same for a target that is down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DueRequest:
    """Takes a shard's failed events when they are due."""

    lease: Lease
    events: bool
    """Whether also from `redeliveries`. In ordered modes failed events wait in the backlog."""
    given_up: bool
    """Whether only events for the dead-letter dispatcher."""
    room: int
    room_bytes: int
    positions: list[int]
    """At work already."""
    letters: list[int]
    """Dead letters at work already."""


class Due:
    """Keeps one shard's account."""

    __slots__ = ("_events", "_given_up", "_gone", "_letters", "_ordered", "_shard", "_times")

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._ordered = shard.lease.order != "none"
        self._events: dict[int, int] = {}
        """Sizes by position: events at work from `redeliveries`, or on their way there."""
        self._given_up: set[int] = set()
        """Those of them that are for the dead-letter dispatcher."""
        self._letters: dict[int, int] = {}
        """Sizes by id: dead letters at work."""
        self._gone: set[int] = set()
        """Events whose rows the log lost, until that is on record."""
        self._times: list[float] = []
        """A heap of due times, in monotonic seconds."""

    def __len__(self) -> int:
        """How many are at work."""
        return len(self._events) + len(self._letters)

    def __contains__(self, position: int) -> bool:
        """Whether the event is at work, or known to be gone."""
        return position in self._events or position in self._gone

    def begin(self, event: Event, *, letter: int | None = None) -> None:
        """The event is at work from `redeliveries`, or as a dead letter."""
        if letter is None:
            self._events[event.position] = event.weight
            if event.failure is not None:
                self._given_up.add(event.position)
        else:
            self._letters[letter] = event.weight

    def skip(self, position: int) -> None:
        """The event was due, and the log lost its row."""
        self._gone.add(position)

    def request(self, health: TargetHealth, *, dead_letters: bool) -> DueRequest | None:
        """A request for as much as there is room for; None without room, or while the target is paused.

        `dead_letters`: whether there is a dead-letter dispatcher. A target that is down does not hold its events back.
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
        """The mark is durable: its events may be found due again."""
        now = monotonic()
        for outcome in mark.outcomes.values():
            match outcome:
                case Scheduled(started_by=UUID()) | LetterFailed(started_by=UUID()):
                    pass  # at work
                case Scheduled(position=position, delay=delay):
                    self._leave(position)
                    if not self._ordered:
                        heapq.heappush(self._times, now + delay)
                case Finished(position=position) | Buried(position=position):
                    self._leave(position)
                case LetterDelivered(letter=letter) | LetterFailed(letter=letter):
                    self._letters.pop(letter, None)

    def next_time(self) -> float | None:
        """When the next event that was scheduled here is due, in monotonic seconds."""
        return self._times[0] if self._times else None

    def drop_times(self, now: float) -> None:
        """Forget the due times up to now: somebody looks for those events."""
        while self._times and self._times[0] <= now:
            heapq.heappop(self._times)

    def _leave(self, position: int) -> None:
        self._events.pop(position, None)
        self._gone.discard(position)
        self._given_up.discard(position)
