"""A reader of the log: pages in order, each proven by the fence before it is delivered.

A reader turns the log into a stream of batches. Taken one after another, they tell a subscription everything: the
events in the order of delivery, up to where the log is accounted for, and which holes were passed. This module does the
I/O of each round; `Fence` (pgbackend/log/fence.py) decides.

The promise: an event is in exactly one batch of a reader. A position at or below `upto` that was in none lies in an
open hole, or was removed from the log, or is dead.

**Removed events.** A segment that was removed looks like a rollback of everything in it. So whenever dead positions
reach from one segment into another, or to the end of the log, the reader looks up which segments there are. Positions
that a cut left unused were never events. Of a removed event that waits to be tried again a copy is kept, and the reader
reads that. A redacted event counts as removed. A single row that was deleted shows only where it had been read before:
here between the two reads of a large event, otherwise in the subscription that knows its position.
"""

import time
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from pgbackend import facts
from pgbackend.codec.event import Event
from pgbackend.errors import DatabaseError, SchemaError
from pgbackend.log.fence import Evidence, Fence
from pgbackend.log.log import Log
from pgbackend.log.ranges import Range, RangeSet, SegmentMap
from pgbackend.postgres.reconnect import GrowingDelay

_HELD_EVENTS = 5000
_HELD_BYTES = 32 << 20
"""The most that a reader keeps behind a hole that it waits for, give or take a page."""
_OPEN_HOLE_POLL = 0.25
"""Seconds between two reads while passed holes are open: a late event comes within a second of its commit."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """An event whose row the driver cannot decode: it has nothing but a position and the hash of its key."""

    event: Event
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Some events of a batch."""

    events: Sequence[Event]
    """In the order of delivery: first those that appeared in passed holes, then the log's next ones."""
    positions: Sequence[int]
    """The position of each event, in ascending order."""
    sizes: Sequence[int]
    """Bytes of each event, so that the subscriptions that share a batch do not each work them out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch(Share):
    """The findings of one round of a reader, and its events. Never changed: several subscriptions share it."""

    size: int
    """Bytes of all events."""
    upto: int
    """Everything at or below was in a batch, or lies in an open hole, or was removed, or is dead."""
    opened: Sequence[Range]
    """Holes that the reader has passed in this round."""
    closed: Sequence[Range]
    """Passed holes in which nothing can appear any more."""
    removed: Sequence[Range]
    """Positions at or below `upto` whose events were removed from the log. They may be in `closed` as well."""
    unreadable: Sequence[Unreadable]
    """Events at or below `upto` that cannot be delivered."""
    pause: float | None
    """Seconds until the reader should read again. None: after the next wake-up or poll."""

    _shares: dict[int, list[Share]] = field(default_factory=dict)
    """The events of each shard, by the number of shards. Made for the first shard that asks."""
    _ranges: list[RangeSet] = field(default_factory=list)
    """The positions of all events, once they were asked for."""

    def share(self, *, shard: int, shards: int) -> Share:
        """The events of one shard."""
        if shards not in self._shares:
            indices: list[list[int]] = [[] for _ in range(shards)]
            for index, event in enumerate(self.events):
                indices[event.key_hash % shards].append(index)
            self._shares[shards] = [
                Share(
                    events=[self.events[index] for index in mine],
                    positions=[self.positions[index] for index in mine],
                    sizes=[self.sizes[index] for index in mine],
                )
                for mine in indices
            ]
        return self._shares[shards][shard]

    def others(self, share: Share, *, upto: int) -> RangeSet:
        """The positions up to there of the events that are not in a share."""
        if not self.positions or self.positions[0] > upto:
            return RangeSet()
        if not self._ranges:
            self._ranges.append(RangeSet.of(self.positions))
        return self._ranges[0].below(upto).difference(RangeSet.of(share.positions))

    def __bool__(self) -> bool:
        return bool(self.events or self.opened or self.closed or self.removed or self.unreadable)


class Reader:
    """Reads on from one position. Only one task at a time may use it."""

    def __init__(
        self, log: Log, *, after: int, holes: Iterable[Range] = (), strict: bool = False, hashes: bool = True
    ) -> None:
        """`holes`: ranges at or below `after` that may still be filled. `strict`: wait at every hole, pass none."""
        self.position = after
        """Everything at or below was delivered in a batch, or lies in a hole that was passed, or is dead."""
        self.hashes = hashes
        """Whether the events that are read from now on get the hashes of their keys."""
        self._log = log
        self._fence = Fence(holes, strict=strict)
        self._segments = SegmentMap()
        self._top = after
        """Everything at or below was read. A hole holds back the events above `position`."""
        self._held: list[Event] = []
        """Events above `position` that were read, in order."""
        self._lost: dict[int, str | None] = {}
        """The events among those in `_held` that cannot be delivered: see `Page.lost`."""
        self._removed: list[Range] = []
        """Ranges above `position` that were removed from the log."""
        self._blocked_reads = 0
        """Reads in a row that brought nothing because a hole holds this reader back."""

    @property
    def is_blocked(self) -> bool:
        """Whether an open appender holds this reader back, or more holes do than can be passed."""
        return self._fence.barrier is not None

    @property
    def holds_events(self) -> bool:
        """Whether it has read events that it has not delivered."""
        return bool(self._held)

    def adopt(self, holes: Iterable[Range]) -> None:
        """Watch these holes too: what appears in them comes with a later batch."""
        self._fence.adopt(holes)
        self._segments.clear()

    async def read(self, *, prove: bool = False) -> Batch:
        """One round: evidence if there are holes, a page, and what both of them prove. `prove`: evidence in any case.

        With `prove` the end of the log is accounted for as well: positions that were drawn behind the last event are
        dead, or become a hole. Raises IncarnationChanged, and DatabaseError before anything has changed.
        """
        evidence = await self._take_evidence() if self._fence or prove else None
        has_room = self._has_room()
        page = await self._log.pages.read(
            after=self._top, holes=self._fence.ranges(), page=has_room, hashes=self.hashes
        )
        self._lost.update(page.lost)
        late = self._fill_holes(page.late)
        # While there are more late events to read, a hole without blockers may still have some.
        closed = self._fence.remove_dead() if self._fence and not (page.late and page.more) else []
        dead = [
            hole
            for hole in (*closed, *self._hold(page.events))
            # A passed hole may have been open for so long that its segment is gone by now.
            if hole[0] <= self.position or not self._segments.has_both(*hole)
        ]
        if prove and evidence is not None and has_room and not page.more:
            dead += self._account_for_end(evidence)
        if dead:
            removed, kept = await self._find_removed(dead)
            self._removed.extend(removed)
            self._fence.expect(kept)
        opened = self._fence.pass_overdue(self._log.clock, now=time.monotonic()) if self._fence else []
        before = self.position
        released = self._release()
        delivered, unreadable = self._without_lost([*late, *released] if late else released)
        if delivered is page.events and page.measures is not None:
            positions, sizes = page.measures
        else:
            positions, sizes = [event.position for event in delivered], [event.weight for event in delivered]
        return Batch(
            events=delivered,
            positions=positions,
            sizes=sizes,
            size=sum(sizes),
            upto=self.position,
            opened=opened,
            closed=[hole for hole in closed if hole[0] <= before],
            removed=self._take_removed(),
            unreadable=unreadable,
            pause=self._pause(more=page.more and has_room, progress=bool(delivered or opened or closed)),
        )

    async def _take_evidence(self) -> Evidence:
        evidence = await self._log.check()
        self._fence.apply_evidence(evidence)
        return evidence

    def _has_room(self) -> bool:
        return len(self._held) < _HELD_EVENTS and sum(event.weight for event in self._held) < _HELD_BYTES

    def _fill_holes(self, appeared: list[Event]) -> list[Event]:
        """Take events that appeared in holes. Returns those of passed holes; the others wait in `_held`."""
        if not appeared:
            return []
        passed = set(self._fence.fill([event.position for event in appeared]))
        waiting = [event for event in appeared if event.position not in passed]
        if waiting:
            self._held = sorted([*self._held, *waiting], key=_position)
        return [event for event in appeared if event.position in passed]

    def _hold(self, events: list[Event]) -> list[Range]:
        """Hold a page's events, and add the holes between them to the fence. Returns those that are dead already."""
        if not events:
            return []
        dead: list[Range] = []
        last = events[-1].position
        if last - self._top != len(events):
            before = self._top
            for event in events:
                if event.position != before + 1 and self._fence.add_missing(before + 1, event.position):
                    dead.append((before + 1, event.position))
                before = event.position
        self._top = last
        self._held = [*self._held, *events] if self._held else events
        return dead

    def _account_for_end(self, evidence: Evidence) -> list[Range]:
        """Account for the positions between the last event and `upto`. Returns them when they are dead."""
        if evidence.upto <= self._top:
            return []
        # The read began after the evidence was taken and showed nothing here: it is a hole like any other.
        end = (self._top + 1, evidence.upto + 1)
        self._top = evidence.upto
        if self._fence.add_missing(*end):
            return [end]
        # No event behind this hole shows that its segment is still there: look it up when the hole dies.
        self._segments.clear()
        return []

    async def _find_removed(self, dead: Sequence[Range]) -> tuple[list[Range], list[int]]:
        """The parts of these ranges whose events were removed, and apart from those the positions that have copies.

        Waits for a server that is away: the round has read events, and would lose them if it failed here.
        """
        delay = GrowingDelay(self._log.database)
        while True:
            try:
                extent = await self._log.find_segments()
                removed = RangeSet(dead).difference(extent.segments).difference(extent.unused)
                kept = await self._log.find_kept(removed) if removed else []
            except SchemaError:
                raise
            except DatabaseError as error:
                facts.emit("read failed", level=delay.failed(), failures=delay.failures, error=str(error))
                await delay.wait()
            else:
                self._segments.update(extent.segments)
                # Copies at or below `position` were read with the hole that they lie in.
                kept = [position for position in kept if position > self.position]
                return list(removed.difference((position, position + 1) for position in kept)), kept

    def _release(self) -> list[Event]:
        """Take the events below the barrier from `_held`, and move `position` up to it."""
        barrier = self._fence.barrier if self._fence else None
        if barrier is None:
            released, self._held = self._held, []
            self.position = self._top
            return released
        count = bisect_left(self._held, barrier, key=_position)
        released, self._held = self._held[:count], self._held[count:]
        self.position = max(self.position, barrier - 1)
        return released

    def _without_lost(self, events: list[Event]) -> tuple[list[Event], list[Unreadable]]:
        """The events that can be delivered, and those that cannot be read. Notes those whose rows were deleted."""
        if not self._lost:
            return events, []
        whole: list[Event] = []
        unreadable: list[Unreadable] = []
        for event in events:
            position = event.position
            if position not in self._lost:
                whole.append(event)
            elif (error := self._lost.pop(position)) is None:
                self._removed.append((position, position + 1))
            else:
                unreadable.append(Unreadable(event, error))
        return whole, unreadable

    def _take_removed(self) -> list[Range]:
        """The removed ranges at or below `position`. The others come when they are passed."""
        if not self._removed:
            return []
        removed = RangeSet(self._removed)
        reached = list(removed.below(self.position))
        self._removed = list(removed.difference(reached))
        return reached

    def _pause(self, *, more: bool, progress: bool) -> float | None:
        """Seconds until the next read: see `Batch.pause`."""
        if more or self._fence.needs_evidence:
            self._blocked_reads = 0
            return 0.0
        if self.is_blocked:
            # Most appenders end within a millisecond or two. A slower one costs a read every 25 ms.
            self._blocked_reads = 0 if progress else self._blocked_reads + 1
            # At most 8, where it reaches 25 ms: after 1,750 reads the power would be no float any more.
            return min(0.001 * 1.5 ** min(self._blocked_reads, 8), 0.025)
        return _OPEN_HOLE_POLL if self._fence else None


def _position(event: Event) -> int:
    return event.position
