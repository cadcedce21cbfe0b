"""The window of a shard: which positions are in flight, and what the offset may therefore say. Pure.

At or below its reading place, a position is in flight (taken on and not settled), an open hole (no event is visible
yet), put off (behind the subscription's end, pending until somebody alters the end), or settled. `mark()` turns that
into an offset:

    position  1  2  3  4  5  6  7  8  9           settled: 1 2 4 6 · in flight: 3 5 7 8 9
                                      │
    mark() == (6, {[3,4),[5,6)})      └ nothing above 6 is settled, so the offset ends there
"""

from collections.abc import Callable, Collection, Sequence

from pgbackend.log.ranges import Range, RangeSet


class Window:
    """Positions in flight, bounded by count and bytes."""

    __slots__ = (
        "_bytes", "_in_flight", "_put_off", "_seen", "_settled", "_top", "holes", "max_bytes", "max_events", "position",
    )  # fmt: skip

    def __init__(
        self, *, position: int, pending: RangeSet, max_events: int, max_bytes: int, seen: RangeSet | None = None
    ) -> None:
        """Start behind an offset. `pending`: the offset's, events and holes.

        `seen`: the part of it in which events were seen. They are read again.
        """
        self.position = position
        """The reading place: the log is read up to here."""
        self.holes = pending.copy()
        self.max_events = max_events
        self.max_bytes = max_bytes
        self._bytes = 0
        self._in_flight: dict[int, int] = {}
        """Their positions, and their bytes. Those in `_settled` may still be here."""
        self._settled: list[int] = []
        self._put_off = RangeSet()
        self._seen = RangeSet() if seen is None else seen.copy()
        self._top = position

    def __len__(self) -> int:
        """How many events are in flight."""
        return len(self._flying())

    @property
    def bytes(self) -> int:
        """The bytes of all events in flight."""
        self._flying()
        return self._bytes

    @property
    def full(self) -> bool:
        """Whether it takes no more. An empty window takes one event, however large."""
        return len(self._flying()) >= self.max_events or self._bytes >= self.max_bytes

    def fits(self, size: int) -> bool:
        """Whether an event of that size may be taken on now."""
        count = len(self._flying())
        return not count or (count < self.max_events and self._bytes + size <= self.max_bytes)

    def is_settled(self, upto: int) -> bool:
        """Whether everything up to a position was read and is not in flight."""
        return self.position >= upto and all(position > upto for position in self._flying())

    def owes(self, position: int) -> bool:
        """Whether a position that was read is in flight, put off, or a hole."""
        return position in self._flying() or position in self.holes or position in self._put_off

    def open(self, position: int, size: int) -> None:
        """Take on an event that is above `position` or in a hole."""
        self._flying()[position] = size
        self._bytes += size
        if position > self.position:
            self.position = position
        else:
            self._fill(position)

    def open_run(self, positions: Sequence[int], sizes: Sequence[int]) -> None:
        """The same for many at once, in ascending order, all above `position`."""
        self._flying().update(zip(positions, sizes, strict=True))
        self._bytes += sum(sizes)
        self.position = positions[-1]

    def skip(self, position: int) -> None:
        """Pass an event that is not for this subscription or shard."""
        if position > self.position:
            self.position = position
        else:
            self._fill(position)

    def skip_late(self, ranges: RangeSet) -> None:
        """Pass the events at these positions, at or below `position`: they are other shards'."""
        for lower, upper in ranges:
            self.holes.remove(lower, upper)
            self._seen.remove(lower, upper)
            self._put_off.remove(lower, upper)

    def put_off(self, position: int) -> None:
        """Leave an event pending for a later end of the subscription."""
        if position > self.position:
            # Together with the gap before it, which is dead or a hole: one range in all, not one for each event.
            self._put_off.add(self.position + 1, position + 1)
            self.position = position
        else:
            self._fill(position)
            self._put_off.add(position, position + 1)

    def _fill(self, position: int) -> None:
        self.holes.discard(position)
        if self._seen:
            self._seen.discard(position)
        if self._put_off:
            self._put_off.discard(position)

    def settle(self, position: int) -> None:
        """The event leaves the window, which must have it."""
        self._settled.append(position)

    def settler(self) -> Callable[[int], None]:
        """`settle()` as a function in C, for a deliverer that calls it for each event: it saves 3 % of a dispatch."""
        return self._settled.append

    def _flying(self) -> dict[int, int]:
        """Apply what was settled, and return the rest. Raises KeyError if a settled event was not in flight."""
        if self._settled:
            self._bytes -= sum(map(self._in_flight.pop, self._settled))
            self._top = max(self._top, *self._settled)
            self._settled.clear()
        return self._in_flight

    def add_hole(self, hole: Range) -> None:
        """Add a hole that the reader passed. The part at or below `position` is known already."""
        self.holes.add(max(hole[0], self.position + 1), hole[1])

    def close_hole(self, hole: Range) -> list[Range]:
        """Nothing can appear there any more. Returns the ranges in which events were seen before: those are gone."""
        lost = self._seen.within(*hole) if self._seen else []
        self.holes.remove(*hole)
        for part in lost:
            self._seen.remove(*part)
        return lost

    def lose(self, lower: int, upper: int) -> list[Range]:
        """The log lost this range. Returns the part that was neither settled nor in flight."""
        lost = self.holes.within(lower, upper)
        self.holes.remove(lower, upper)
        self._seen.remove(lower, upper)
        lower = max(lower, self.position + 1)
        return [*lost, (lower, upper)] if lower < upper else lost

    def advance(self, upto: int) -> None:
        """Everything up to here is in flight, settled, put off, or a hole."""
        self.position = max(self.position, upto)

    def seal(self) -> None:
        """From now on the offset covers all that was read, with everything in flight as pending."""
        self._flying()
        self._top = self.position

    def mark(self, settling: Collection[int] = ()) -> tuple[int, RangeSet]:
        """The offset to commit now: a position, and what is pending at or below it.

        `settling`: events in flight that this very commit settles. They stay in flight, in case it does not happen.
        The position never goes back. An event that fills a hole below an earlier mark is pending instead.
        """
        flying = self._flying()
        in_flight = sorted(flying.keys() - settling if settling else flying)
        if not in_flight:
            self._top = self.position
            return self.position, self._left_below(self.position)
        self._top = max(self._top, *settling, 0)
        above = next((position for position in in_flight if position > self._top), None)
        mark = self._top = self.position if above is None else above - 1
        pending = RangeSet.of(position for position in in_flight if position <= mark)
        left = self._left_below(mark)
        return mark, left.union(pending) if left else pending

    def unseen(self, mark: int) -> RangeSet:
        """Pending positions at or below a mark in which no event was seen: they may have been rolled back."""
        left = self._left_below(mark)
        return left.difference(self._seen) if left and self._seen else left

    def _left_below(self, limit: int) -> RangeSet:
        holes = self.holes.below(limit)
        return holes.union(self._put_off.below(limit)) if self._put_off else holes
