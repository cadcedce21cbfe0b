"""Pages: the events above a position and those in the holes below it, read in one snapshot.

A page is read in at most three statements: the rows without the large ones, then the large ones, and, when the driver
cannot decode a row, the others one by one. A redacted event counts as large, and is not found then. The promise of a
page: each visible event of it is in it, whole, or is listed in `Page.lost`; and all of it belongs to the incarnation
that this process is in.
"""

from bisect import bisect_right
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter

from pgbackend.codec.attributes import COLUMNS
from pgbackend.codec.event import POSITION, RECORDED_AT, WEIGHT, Event
from pgbackend.log.incarnation import Incarnation
from pgbackend.log.ranges import RangeSet
from pgbackend.postgres.connections import Record
from pgbackend.postgres.pool import Database
from pgbackend.postgres.sql.statements import LogSql

PAGE_EVENTS = 1000
"""The most events of a page, and the most in its holes, as the statements in log.sql have it."""
PAGE_BYTES = 16 << 20
"""The most bytes of large events in one page, unless the first one alone is larger."""
_LARGE = 16384
"""Bytes above which an event is fetched by itself, as the statements in log.sql have it."""
_UNDECODABLE = (ValueError, ArithmeticError)
"""The driver's errors for values that Python cannot hold, such as text that is no UTF-8."""
_YEAR_10000 = (2_921_940 * 86_400_000_000).to_bytes(8)
"""Its first microsecond, as `recorded_at` comes. As bytes, dates before 2000 and infinite ones are above it, too."""
# In C: a property of each event would take three times as long.
_position, _recorded_at, _weight = itemgetter(POSITION), itemgetter(RECORDED_AT), itemgetter(WEIGHT)


@dataclass(frozen=True, slots=True)
class Page:
    """The events that one read found, all in ascending order."""

    late: list[Event] = field(default_factory=list)
    """Events that appeared in holes."""
    events: list[Event] = field(default_factory=list)
    """Events above the holes."""
    more: bool = False
    """Whether there is more to read."""
    lost: Mapping[int, str | None] = field(default_factory=dict)
    """Events of this page that cannot be delivered, by position: the driver's error; None for a row that was deleted or
    redacted.

    Their `Event` has nothing but a position and the hash of its key.
    """
    measures: tuple[list[int], list[int]] | None = None
    """Positions and bytes of `events`. None where they are not known yet."""


class Pages:
    """Reads pages of one log."""

    def __init__(self, database: Database, sql: LogSql, incarnation: Incarnation) -> None:
        self._database = database
        self._sql = sql
        self._incarnation = incarnation

    async def read(self, *, after: int, holes: RangeSet, page: bool = True, hashes: bool = True) -> Page:
        """The events in `holes`, and those above `after` (unless not `page`). Raises IncarnationChanged.

        When the holes have more than a page, no event above them is returned. `hashes`: whether the events must have
        the hashes of their keys.
        """
        since = self._incarnation.id
        try:
            if holes:
                rows = await self._database.fetch(self._sql.read_page_and_holes, after, since, hashes, str(holes), page)
            else:
                rows = await self._database.fetch(self._sql.read_page, after, since, hashes)
        except _UNDECODABLE:
            return await self._read_decodable(after, holes, page=page)
        if not rows:
            await self._incarnation.verify()
            return Page()
        if max(map(_recorded_at, rows)) >= _YEAR_10000:
            return await self._read_decodable(after, holes, page=page)
        rows, split, more = _cut(rows, after)
        events = list(map(Event, rows))
        self._incarnation.see_event(events[-1].position, events[-1].recorded_at, since=since)
        positions, sizes = list(map(_position, rows)), list(map(_weight, rows))
        if max(sizes) > _LARGE:
            return await self._with_large(events, split, more=more)
        if split:
            return Page(events[:split], events[split:], more)
        return Page([], events, more, measures=(positions, sizes))

    async def _with_large(self, events: Sequence[Event], split: int, *, more: bool) -> Page:
        """The page of these events with the whole of its large ones. It ends early behind `PAGE_BYTES` of them."""
        wanted: list[int] = []
        total, end = 0, len(events)
        for index, event in enumerate(events):
            if event.weight > _LARGE:
                total += event.weight
                if wanted and total > PAGE_BYTES:
                    end = index
                    break
                wanted.append(event.position)

        def read_these(positions: Sequence[int]) -> Awaitable[list[Record]]:
            return self._database.fetch(self._sql.read_large, positions, self._incarnation.id)

        rows, errors = await _read_by_halves(read_these, wanted) if wanted else ([], {})
        whole = {row["position"]: Event(row) for row in rows}
        if len(whole) < len(wanted):
            await self._incarnation.verify()
        lost = {position: errors.get(position) for position in wanted if position not in whole}
        # A lost one has no content, like all that the page has without it.
        shown = [whole.get(event.position, event) for event in events[:end]]
        return Page(shown[:split], shown[split:], more or end < len(events), lost)

    async def _read_decodable(self, after: int, holes: RangeSet, *, page: bool) -> Page:
        """The page of which some rows cannot be decoded: the others, and which ones those are."""
        found = await self._database.fetch(self._sql.find_page, after, self._incarnation.id, str(holes), page)
        found, split, more = _cut(found, after)

        def read_these(positions: Sequence[int]) -> Awaitable[list[Record]]:
            these = str(RangeSet.of(positions))
            return self._database.fetch(self._sql.read_page_and_holes, 0, self._incarnation.id, True, these, False)

        whole: dict[int, Event] = {}
        errors = {row["position"]: f"it was recorded at {bad}" for row in found if (bad := row["bad_date"]) is not None}
        # Late ones and others apart, because one statement reads no more than a page.
        for part in (found[:split], found[split:]):
            if positions := [row["position"] for row in part if row["position"] not in errors]:
                rows, undecodable = await _read_by_halves(read_these, positions)
                whole |= {row["position"]: Event(row) for row in rows}
                errors |= undecodable
        await self._incarnation.verify()
        events = [whole.get(row["position"]) or _stub(row["position"], row["key_hash"]) for row in found]
        read = await self._with_large(events, split, more=more)
        shown = [event.position for event in (*read.late, *read.events)]
        lost = {position: errors.get(position) for position in shown if position not in whole}
        return replace(read, lost={**lost, **read.lost})


def _cut(rows: list[Record], after: int) -> tuple[list[Record], int, bool]:
    """The rows of one page, how many of them are late (at or below `after`), and whether there are more."""
    split = bisect_right(rows, after, key=itemgetter("position"))
    if split >= PAGE_EVENTS:
        return rows[:split], split, True
    return rows, split, len(rows) - split >= PAGE_EVENTS


def _stub(position: int, key_hash: int) -> Event:
    """Stands for an event whose row cannot be read."""
    return Event((*(None,) * len(COLUMNS), position, bytes(8), key_hash, 0))


async def _read_by_halves(
    read: Callable[[Sequence[int]], Awaitable[list[Record]]], positions: Sequence[int]
) -> tuple[list[Record], dict[int, str]]:
    """The rows at these positions; those that cannot be decoded are found by halves, each with its error."""
    try:
        return await read(positions), {}
    except _UNDECODABLE as error:
        if len(positions) == 1:
            return [], {positions[0]: f"{type(error).__name__}: {error}"}
    middle = len(positions) // 2
    rows, errors = await _read_by_halves(read, positions[:middle])
    other_rows, other_errors = await _read_by_halves(read, positions[middle:])
    return rows + other_rows, errors | other_errors
