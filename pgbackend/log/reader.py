"""One reader of the log: pages in order, each proven by the fence before anybody gets it.

A reader turns the log into a stream of `Batch`es. Applied one after another they tell a subscription all there is to
know: the events in the order of their admission, up to where the log is accounted for, and which holes were left
behind. Only `Fence` (pgbackend/log/fence.py) stands between `read_page` and a batch; this module does the I/O.

Its promise: an event is in exactly one batch of a reader, and a position at or below `upto` that was in none is either
in an open hole, or gone from the log, or dead for ever.

**Gone.** A removed segment looks like a roll-back of all that was in it. So whenever dead positions reach from one
segment into another, or to the log's end, the reader asks which segments there are. Single rows that somebody deleted
are seen as gone where they had been read once: between the two reads of a large event here, else by their subscription.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pgbackend import facts
from pgbackend.codec.event import Event
from pgbackend.errors import DatabaseError, SchemaError
from pgbackend.log.fence import Evidence, Fence
from pgbackend.log.log import Log
from pgbackend.log.ranges import Range, RangeSet
from pgbackend.log.segments import SegmentMap
from pgbackend.postgres.reconnect import GrowingDelay

_HELD_EVENTS = 5000
_HELD_BYTES = 32 << 20
"""What a reader keeps that is visible but above a hole it still waits for."""
_OPEN_HOLE_POLL = 0.25
"""Seconds between looks at passed holes: an event comes within a second of its commit, also from plain SQL."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """An event whose row the driver cannot decode."""

    position: int
    key_hash: int
    error: str


@dataclass(frozen=True, slots=True)
class Batch:
    """What one read found out. Never changed once it is made: several subscriptions share it."""

    events: Sequence[Event]
    """In the order of admission: first those that appeared in passed holes, then the log's next ones."""
    positions: Sequence[int]
    sizes: Sequence[int]
    """Of each event, so that the subscriptions that share a batch do not each work them out."""
    upto: int
    """Everything at or below is in a batch, in an open hole, or dead."""
    opened: Sequence[Range]
    """Holes that are now behind the reader, and may still be filled."""
    closed: Sequence[Range]
    """Holes behind the reader in which nothing can appear any more."""
    size: int
    """Bytes of its events, about."""
    again: float | None
    """Seconds until the reader should look again by itself; None: when there is a hint or the clock says so."""
    removed: Sequence[Range] = ()
    """Positions at or below `upto` that somebody has removed from the log; they may be in `closed` as well."""
    unreadable: Sequence[Unreadable] = ()
    """Events at or below `upto` that cannot be handed out."""

    def __bool__(self) -> bool:
        return bool(self.events or self.opened or self.closed or self.removed or self.unreadable)


class Reader:
    """Reads on from a position. Not safe for two tasks at once."""

    def __init__(self, log: Log, *, after: int, holes: Iterable[Range] = (), strict: bool = False) -> None:
        """`holes`: ranges at or below `after` that may still be filled. `strict`: wait for every hole (`strict`)."""
        self._log = log
        self._fence = Fence(holes, strict=strict)
        self._top = after
        self._held: list[Event] = []
        self._held_bytes = 0
        self._blocked_reads = 0
        self._removed: list[Range] = []
        """Found to be removed from the log, and not told yet."""
        self._lost: dict[int, str | None] = {}
        """Positions among the held ones: see `Page.lost`."""
        self.position = after
        self._segments = SegmentMap()

    def adopt(self, holes: Iterable[Range]) -> None:
        """Also watch these holes from now on; what appears in them comes with a later batch."""
        self._fence.adopt(holes)
        self._segments.clear()

    @property
    def waiting(self) -> bool:
        """Whether an appender holds it back: by what it may still append, or by more holes than can be passed."""
        return self._fence.waiting

    def open_holes(self) -> RangeSet:
        """Everything at or below `position` that may still be filled."""
        return self._fence.ranges().below(self.position)

    async def read(self, *, prove: bool = False) -> Batch:
        """One round: evidence if there are gaps (or to `prove` that the log's end is its end), a page, a verdict."""
        evidence: Evidence | None = None
        if self._fence or prove:
            evidence = await self._log.check()
            self._fence.apply_evidence(evidence)
        room = len(self._held) < _HELD_EVENTS and self._held_bytes < _HELD_BYTES
        found = await self._log.pages.read(after=self._top, holes=self._fence.ranges(), page=room)
        late, more = found.late, found.more
        self._lost.update(found.lost)
        # After the read: what is still missing now, and has nobody left to fill it, is dead.
        passed = set(self._fence.fill([event.position for event in late])) if late else set()
        closed = self._fence.remove_dead() if self._fence and not (late and more) else []
        dead = [gap for gap in closed if not self._segments.has_both(*gap)]
        dead += self._take(found.events)
        if prove and evidence is not None and room and not more and evidence.upto > self._top:
            # Nothing above the last row was visible after the evidence: the rest up to its `upto` is a hole as well.
            if self._fence.add_missing(self._top + 1, evidence.upto + 1):
                dead.append((self._top + 1, evidence.upto + 1))
            else:
                # No event above it shows that its segment is still there.
                self._segments.clear()
            self._top = evidence.upto
        if dead:
            self._removed.extend(await self._find_removed(dead))
        events = [event for event in late if event.position in passed]
        appeared = [event for event in late if event.position not in passed]
        if appeared:
            self._held = sorted([*self._held, *appeared], key=lambda event: event.position)
            self._held_bytes += sum(event.weight for event in appeared)
        opened = self._fence.pass_overdue(self._log.clock, now=time.monotonic()) if self._fence else []
        before = self.position
        released = self._release()
        admitted = [*events, *released] if events else released
        unreadable: list[Unreadable] = []
        if self._lost:
            admitted, unreadable = self._without_lost(admitted)
        sizes = [event.weight for event in admitted]
        return Batch(
            events=admitted,
            positions=[event.position for event in admitted],
            sizes=sizes,
            upto=self.position,
            opened=opened,
            closed=[gap for gap in closed if gap[0] <= before],
            size=sum(sizes),
            again=self._again(more=more and room, progress=bool(admitted or opened or closed)),
            removed=self._passed_removed() if self._removed else (),
            unreadable=unreadable,
        )

    async def _find_removed(self, dead: Sequence[Range]) -> list[Range]:
        """What of these positions has no segment. Waits for a server that is away: what this round has read is here."""
        backoff = GrowingDelay(self._log.database)
        while True:
            try:
                segments = await self._log.find_segments()
            except SchemaError:
                raise
            except DatabaseError as error:
                facts.emit("read failed", level=backoff.failed(), failures=backoff.failures, error=str(error))
                await backoff.wait()
            else:
                self._segments.update(segments)
                return list(RangeSet(dead).difference(segments))

    def _passed_removed(self) -> list[Range]:
        """Ranges that are gone at or below `position`; the rest is told when it is passed."""
        gone = RangeSet(self._removed)
        passed = list(gone.below(self.position))
        self._removed = list(gone.difference(passed))
        return passed

    def _without_lost(self, admitted: list[Event]) -> tuple[list[Event], list[Unreadable]]:
        """The events that can be handed out, and those that cannot be read; notes those that are gone."""
        whole: list[Event] = []
        unreadable: list[Unreadable] = []
        for event in admitted:
            position = event.position
            if position not in self._lost:
                whole.append(event)
            elif (error := self._lost.pop(position)) is None:
                self._removed.append((position, position + 1))
            else:
                unreadable.append(Unreadable(position, event.key_hash, error))
        return whole, unreadable

    def _take(self, page: list[Event]) -> list[Range]:
        """Keep a page's events, and note what is missing between them; what of that is dead, beyond one segment."""
        dead: list[Range] = []
        if not page:
            return dead
        top = self._top
        last = page[-1].position
        if last - top != len(page):
            for event in page:
                if (
                    event.position != top + 1
                    and self._fence.add_missing(top + 1, event.position)
                    and not self._segments.has_both(top + 1, event.position)
                ):
                    dead.append((top + 1, event.position))
                top = event.position
        self._top = last
        if self._held:
            self._held.extend(page)
            self._held_bytes += sum(event.weight for event in page)
        else:
            self._held = page
            self._held_bytes = sum(event.weight for event in page) if self._fence.waiting else 0
        return dead

    def _release(self) -> list[Event]:
        """The held events that no hole holds back any more; moves `position` along."""
        limit = self._fence.first_blocked() if self._fence else None
        if limit is None:
            released, self._held, self._held_bytes = self._held, [], 0
            self.position = self._top
            return released
        count = 0
        for event in self._held:
            if event.position > limit:
                break
            count += 1
        released, self._held = self._held[:count], self._held[count:]
        if released:
            self._held_bytes = sum(event.weight for event in self._held)
        self.position = max(self.position, limit - 1)
        return released

    def _again(self, *, more: bool, progress: bool) -> float | None:
        if more or self._fence.unproven:
            self._blocked_reads = 0
            return 0.0
        if self._fence.waiting:
            # Most appenders are over in a millisecond or two; one that is not costs a look every 25 ms.
            self._blocked_reads = 0 if progress else self._blocked_reads + 1
            # Not beyond 8, where it is 25 ms: after 1,750 looks, 44 s, the power is no float any more.
            return min(0.001 * 1.5 ** min(self._blocked_reads, 8), 0.025)
        return _OPEN_HOLE_POLL if self._fence else None
