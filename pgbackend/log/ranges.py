"""Sets of positions as ranges: holes, pending events, segments. A rolled-back bulk load is one range, however long.

A range is a pair (lower, upper) with `lower` inside and `upper` outside, as PostgreSQL prints an int8range. Pure.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence

Range = tuple[int, int]

_RANGE_TEXT = re.compile(r"\[(-?\d+),(-?\d+)\)")


class RangeSet:
    """Disjoint ranges in order. Ranges that touch become one.

    >>> holes = RangeSet([(1, 5), (5, 7), (10, 11)])
    >>> str(holes), 6 in holes, 7 in holes
    ('{[1,7),[10,11)}', True, False)
    >>> holes.remove(3, 4)
    >>> list(holes)
    [(1, 3), (4, 7), (10, 11)]
    """

    __slots__ = ("_lowers", "_uppers")

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        self._lowers: list[int] = []
        self._uppers: list[int] = []
        for lower, upper in ranges:
            self.add(lower, upper)

    @classmethod
    def parse(cls, text: str) -> "RangeSet":
        """From the text of an int8multirange."""
        return cls((int(lower), int(upper)) for lower, upper in _RANGE_TEXT.findall(text))

    @classmethod
    def of(cls, positions: Iterable[int]) -> "RangeSet":
        """From positions in ascending order."""
        ranges = cls()
        lowers, uppers = ranges._lowers, ranges._uppers
        for position in positions:
            if uppers and uppers[-1] == position:
                uppers[-1] = position + 1
            else:
                lowers.append(position)
                uppers.append(position + 1)
        return ranges

    def add(self, lower: int, upper: int) -> None:
        if lower >= upper:
            return
        # The ranges that touch or overlap: from the first that ends at or above `lower` to the last that begins at or
        # below `upper`.
        first = bisect_left(self._uppers, lower)
        last = bisect_right(self._lowers, upper)
        if first < last:
            lower = min(lower, self._lowers[first])
            upper = max(upper, self._uppers[last - 1])
        self._lowers[first:last] = [lower]
        self._uppers[first:last] = [upper]

    def remove(self, lower: int, upper: int) -> None:
        if lower >= upper:
            return
        first = bisect_right(self._uppers, lower)
        last = bisect_left(self._lowers, upper)
        if first >= last:
            return
        left, right = self._lowers[first], self._uppers[last - 1]
        kept = [(a, b) for a, b in ((left, lower), (upper, right)) if a < b]
        self._lowers[first:last] = [a for a, _ in kept]
        self._uppers[first:last] = [b for _, b in kept]

    def discard(self, position: int) -> bool:
        """Remove one position. Returns whether it was there."""
        if position not in self:
            return False
        self.remove(position, position + 1)
        return True

    def below(self, limit: int) -> "RangeSet":
        """The part at or below `limit`."""
        part = RangeSet()
        count = bisect_right(self._lowers, limit)
        part._lowers = self._lowers[:count]
        part._uppers = self._uppers[:count]
        if part._uppers and part._uppers[-1] > limit + 1:
            part._uppers[-1] = limit + 1
        return part

    def union(self, other: "RangeSet") -> "RangeSet":
        return RangeSet([*self, *other])

    def difference(self, other: Iterable[Range]) -> "RangeSet":
        rest = self.copy()
        for lower, upper in other:
            rest.remove(lower, upper)
        return rest

    def within(self, lower: int, upper: int) -> list[Range]:
        """The parts that lie between `lower` and `upper`."""
        first = bisect_right(self._uppers, lower)
        last = bisect_left(self._lowers, upper)
        parts = zip(self._lowers[first:last], self._uppers[first:last], strict=True)
        return [(max(a, lower), min(b, upper)) for a, b in parts]

    def copy(self) -> "RangeSet":
        twin = RangeSet()
        twin._lowers = self._lowers.copy()
        twin._uppers = self._uppers.copy()
        return twin

    def count(self) -> int:
        """How many positions there are."""
        return sum(self._uppers) - sum(self._lowers)

    def __contains__(self, position: object) -> bool:
        if not isinstance(position, int):
            return False
        index = bisect_right(self._lowers, position) - 1
        return index >= 0 and position < self._uppers[index]

    def __iter__(self) -> Iterator[Range]:
        return iter(list(zip(self._lowers, self._uppers, strict=True)))

    def __len__(self) -> int:
        """How many ranges there are."""
        return len(self._lowers)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RangeSet):
            return NotImplemented
        return self._lowers == other._lowers and self._uppers == other._uppers

    __hash__ = None  # type: ignore[assignment] # it changes

    def __str__(self) -> str:
        """As the text of an int8multirange."""
        return "{" + ",".join(f"[{lower},{upper})" for lower, upper in self) + "}"

    def __repr__(self) -> str:
        return f"RangeSet.parse({str(self)!r})"


class SegmentMap:
    """The segments that a reader knows, from the last time that it looked them up."""

    def __init__(self) -> None:
        self._segments: list[Range] = []

    def update(self, segments: Sequence[Range]) -> None:
        """These are the segments, in order."""
        self._segments = list(segments)

    def clear(self) -> None:
        """No segment is known any more."""
        self._segments = []

    def has_both(self, lower: int, upper: int) -> bool:
        """Whether both positions belong to one segment that is known."""
        index = bisect_right(self._segments, (lower + 1,)) - 1
        return index >= 0 and upper < self._segments[index][1]
