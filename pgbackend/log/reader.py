"""One reader of the log: pages in order, each proven by the fence before anybody gets it.

A reader turns the log into a stream of `Batch`es. Applied one after another they tell a subscription all there is to
know: the events in the order of their admission, up to where the log is accounted for, and which holes were left
behind. Between `read_page` and a batch stands only `Gaps` (pgbackend/log/fence.py); this module does the I/O around it.

Its promise: an event is in exactly one batch of a reader, and a position at or below `upto` that was in none is either
in an open hole, or gone from the log, or dead for ever.

**Gone.** A removed segment looks like a roll-back of all that was in it. So whenever dead positions reach from one
segment into another, or to the log's end, the reader asks which segments there are. Single rows that somebody deleted
are seen as gone where they had been read once: between the two reads of a large event here, else by their subscription.
"""

import asyncio
import time
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import NoReturn

from pgbackend import facts
from pgbackend.codec.event import Event, RecordLike
from pgbackend.errors import DatabaseError, PgBackendError, SchemaError
from pgbackend.log.fence import AppenderClock, Evidence, Gaps
from pgbackend.log.ranges import Range, RangeSet
from pgbackend.model import BlockingAppender
from pgbackend.postgres.pool import STATEMENT_TIMEOUT, Connection, Database, GrowingDelay, Record
from pgbackend.postgres.sql import load
from pgbackend.postgres.sql.statements import HolesSql, LogSql

PAGE_EVENTS = 1000
"""As the statements in log.sql have it."""
PAGE_BYTES = 16 << 20
"""Of large events in one page; those beyond it are read with the next. A single one is read whatever its size."""
_HELD_EVENTS = 5000
_HELD_BYTES = 32 << 20
"""What a reader keeps that is visible but above a hole it still waits for."""
_OPEN_HOLE_POLL = 0.25
"""Seconds between looks at passed holes: an event comes within a second of its commit, also from plain SQL."""

_POSITION, _RECORDED_AT, _KEY_HASH, _WEIGHT = 12, 13, 14, 15
_UNDECODABLE = (ValueError, ArithmeticError)
"""What the driver raises for values that Python cannot hold: a date beyond the year 9999, text that is no UTF-8."""
_LARGE = 16384
"""Events that weigh more are read by themselves; as the statements in log.sql have it."""
_LANDMARKS = 16
"""Events that are remembered between two looks, to recognize the log by."""
_EPOCH = datetime.fromtimestamp(0, UTC)

_CHANGED = "The server was restarted after a crash or failed over, or the log was restored or its sequence altered."


class IncarnationChanged(PgBackendError):  # noqa: N818 - a signal between the actors, never seen outside
    """The server crashed or failed over, or the log was set back: positions may have been given out again.

    Begin anew from durable rows.
    """


@dataclass(frozen=True, slots=True)
class Unreadable:
    """An event whose row the driver cannot decode."""

    position: int
    key_hash: int
    error: str


@dataclass(frozen=True, slots=True)
class Page:
    """What one look at the log found, all in ascending order."""

    late: list[Event] = field(default_factory=list)
    """What appeared in holes."""
    events: list[Event] = field(default_factory=list)
    """Events above the holes."""
    more: bool = False
    """Whether there is more to read."""
    lost: Mapping[int, str | None] = field(default_factory=dict)
    """Positions of those among them that cannot be handed out, as the driver cannot decode them (and says why), or as
    they were deleted while they were being read (None). All that their `Event` has is a place and the hash of a key."""


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
    gone: Sequence[Range] = ()
    """Positions at or below `upto` that somebody has removed from the log; they may be in `closed` as well."""
    unreadable: Sequence[Unreadable] = ()
    """Events at or below `upto` that cannot be handed out."""

    def __bool__(self) -> bool:
        return bool(self.events or self.opened or self.closed or self.gone or self.unreadable)


class Log:
    """The log as readers see it: pages, evidence, and the life of the server that both belong to."""

    def __init__(self, database: Database, *, schema: str, hole_wait: float) -> None:
        self.sql = load(LogSql, "log", schema=schema)
        self._holes_sql = load(HolesSql, "holes", schema=schema)
        self.database = database
        self.clock = AppenderClock(hole_wait=hole_wait)
        self._one_check = asyncio.Lock()
        self._incarnation: str | None = None
        self._server_start: datetime | None = None
        self._known = 0
        """The highest position that was seen in this incarnation."""
        self._landmarks: dict[int, str] = {}
        """Events that were seen in it, by position, and when they were recorded: the newest at the last look, and the
        ends of pages since then."""
        self._segments: list[Range] = []
        """Those that were there when somebody looked last."""

    @property
    def incarnation(self) -> str | None:
        """The life of the server that this process works in; None before `enter_incarnation()`."""
        return self._incarnation

    async def enter_incarnation(self) -> str:
        """Learn the server's present life, or name it when it has none yet."""
        while True:
            found = await self.database.fetchval(self.sql.find_incarnation)
            if isinstance(found, str):
                if found != self._incarnation:
                    # The names of transactions begin anew as well: nobody has been waited for yet.
                    self.clock = AppenderClock(hole_wait=self.clock.hole_wait)
                    self._known, self._landmarks = 0, {}
                self._incarnation = found
                return found
            await self.database.execute(self.sql.begin_incarnation)

    async def verify_incarnation(self, since: str | None = None) -> None:
        """Raise IncarnationChanged when the server's life is not the one this process works in, or did at `since`."""
        found = await self.database.fetchval(self.sql.find_incarnation)
        if found != (since or self._incarnation):
            await self.look_for_set_back()
            raise IncarnationChanged(_CHANGED)

    async def look_for_set_back(self) -> None:
        """Return when the log still is the one that this process knows. Raises IncarnationChanged.

        When it was set back in this life, that ends the life: every process of the log notices.
        """
        mine, known, landmarks = self._incarnation, self._known, dict(self._landmarks)
        signs = await self.database.fetchrow(self.sql.find_signs, list(landmarks), list(landmarks.values()))
        assert signs is not None  # noqa: S101 - a SELECT of scalars
        if mine is None or mine != self._incarnation:
            return
        found = signs["incarnation"]
        if _is_in_place(found, mine):
            # Without an answer the sequence is just being altered; the next look has one.
            if signs["head"] is not None and signs["head"] < known:
                await self._end_life(f"its sequence stands at {signs['head']}, below position {known}, which was read")
            # An event that is only gone may have been deleted. Once the sequence was restarted, it counts as replaced.
            if signs["replaced"] or (signs["missing"] and found != mine):
                await self._end_life("positions that were read no longer hold the events that were there")
        if found != mine:
            raise IncarnationChanged(_CHANGED)
        for position in landmarks:
            self._landmarks.pop(position, None)
        if signs["position"] is not None:
            self._landmarks[signs["position"]] = signs["recorded_at"]
            self._see(signs["position"])

    async def check(self) -> Evidence:
        """Take the evidence that the fence needs. Serial, so that the clock never goes back to older evidence."""
        async with self._one_check:
            mine, known = self._incarnation, self._known
            evidence = await self.take_evidence()
            if mine is not None and evidence.incarnation != mine:
                await self.look_for_set_back()
                raise IncarnationChanged(_CHANGED)
            if mine is not None and mine == self._incarnation:
                if evidence.upto < known:
                    await self._end_life(
                        f"its sequence stands at {evidence.upto}, below position {known}, which was read"
                    )
                self._see(evidence.upto)
            if evidence.server_start != self._server_start:
                # The names of transactions began anew, so nobody has been waited for yet.
                self.clock = AppenderClock(hole_wait=self.clock.hole_wait)
                self._server_start = evidence.server_start
            self.clock.observe(evidence.appenders, now=time.monotonic())
            return evidence

    async def take_evidence(
        self, connection: Connection | None = None, *, timeout: float = STATEMENT_TIMEOUT
    ) -> Evidence:
        """The evidence as it is, held against nothing that this process knows; on one's own connection, if need be."""
        row = await (connection or self.database).fetchrow(self._holes_sql.appenders_in_flight, timeout=timeout)
        assert row is not None  # noqa: S101 - a function of scalars
        return Evidence(row["upto"], frozenset(row["appenders"]), row["incarnation"], row["server_start"])

    def _see(self, position: int) -> None:
        self._known = max(self._known, position)

    def _pass(self, row: Record) -> None:
        """A page ends with this row."""
        position, at = row[_POSITION], row[_RECORDED_AT]
        self._see(position)
        # The driver shows the infinite dates as the first and the last ones.
        if isinstance(at, datetime) and 1 < at.year < 9999 and len(self._landmarks) < _LANDMARKS:
            self._landmarks[position] = str((at - _EPOCH) // timedelta(microseconds=1))

    async def _end_life(self, why: str) -> NoReturn:
        """End the life for all processes of the log, because the log was set back in it."""
        try:
            await self.database.execute(self.sql.end_life, self._incarnation)
        except DatabaseError as error:
            # This process begins anew in any case.
            why += f" (and the other processes could not be told: {error})"
        raise IncarnationChanged(f"The log was set back: {why}.")

    async def appenders(self) -> tuple[BlockingAppender, ...]:
        """Who is appending right now, oldest first, for people."""
        return tuple(
            BlockingAppender(
                **{name: row[name] for name in ("virtual_transaction", "pid", "gid", "application", "age")}
            )
            for row in await self.database.fetch(self._holes_sql.describe_appenders)
        )

    async def oldest_appender(self) -> datetime | None:
        """When the oldest open appender's transaction began; None when that cannot be seen of each of them."""
        begun = [row["xact_start"] for row in await self.database.fetch(self._holes_sql.describe_appenders)]
        return None if None in begun else min(begun, default=None)

    def is_in_one_segment(self, lower: int, upper: int) -> bool:
        """Whether both positions belong to one segment that was there when somebody looked last."""
        index = bisect_right(self._segments, (lower + 1,)) - 1
        return index >= 0 and upper < self._segments[index][1]

    async def find_removed(self, ranges: Sequence[Range]) -> list[Range]:
        """The parts of these ranges for which the log has no segment any more."""
        rows = await self.database.fetch(self.sql.find_segments)
        self._segments = [(row["lower"], row["upper"]) for row in rows]
        return list(RangeSet(ranges).difference(self._segments))

    async def find_first_segment(self) -> int:
        """Where the log's first segment begins."""
        rows = await self.database.fetch(self.sql.find_segments)
        return rows[0]["lower"] if rows else 0

    def forget_segments(self) -> None:
        """The next question about a segment looks at the catalog again."""
        self._segments = []

    async def read(self, *, after: int, holes: RangeSet, page: bool = True) -> Page:
        """What appeared in `holes`, and what is above `after` (unless not `page`).

        When the holes have more than a page, nothing of what is above them is returned.
        """
        mine = self._incarnation
        try:
            if holes:
                rows = await self.database.fetch(self.sql.read_page_and_holes, after, mine, str(holes), page)
            else:
                rows = await self.database.fetch(self.sql.read_page, after, mine)
        except _UNDECODABLE:
            return await self._read_apart(after, holes, page=page)
        if not rows:
            await self.verify_incarnation()
            return Page()
        split = next((i for i, row in enumerate(rows) if row[_POSITION] > after), len(rows)) if holes else 0
        if split >= PAGE_EVENTS:
            rows = rows[:split]
        if mine == self._incarnation:
            self._pass(rows[-1])
        more = split >= PAGE_EVENTS or len(rows) - split >= PAGE_EVENTS
        if any(row[_WEIGHT] > _LARGE for row in rows):
            return await self._with_large(rows, after, more=more)
        events = [Event(row, row[_POSITION], row[_RECORDED_AT]) for row in rows]
        return Page(events[:split], events[split:], more)

    async def _read_apart(self, after: int, holes: RangeSet, *, page: bool) -> Page:
        """The same when a row among them cannot be decoded: the others, and which those are."""
        found = await self.database.fetch(self.sql.find_page, after, self._incarnation, str(holes), page)
        split = sum(row["position"] <= after for row in found)
        if split >= PAGE_EVENTS:
            found = found[:split]
        more = split >= PAGE_EVENTS or len(found) - split >= PAGE_EVENTS
        stubs = {row["position"]: _stub(row["position"], row["key_hash"]) for row in found}

        def read_these(positions: Sequence[int]) -> Awaitable[list[Record]]:
            these = str(RangeSet.of(positions))
            return self.database.fetch(self.sql.read_page_and_holes, 0, self._incarnation, these, False)

        whole: dict[int, Record] = {}
        errors = {row["position"]: f"it was recorded at {bad}" for row in found if (bad := row["bad_date"]) is not None}
        # Apart, because one statement reads no more than a page.
        for part in (found[:split], found[split:]):
            if positions := [row["position"] for row in part if row["position"] not in errors]:
                rows, undecodable = await _one_by_one(read_these, positions)
                whole |= {row[_POSITION]: row for row in rows}
                errors |= undecodable
        await self.verify_incarnation()
        read = await self._with_large([whole.get(position, stub) for position, stub in stubs.items()], after, more=more)
        lost = {
            event.position: errors.get(event.position)
            for event in (*read.late, *read.events)
            if event.position not in whole
        }
        return replace(read, lost={**lost, **read.lost})

    async def _with_large(self, rows: Sequence[RecordLike], after: int, *, more: bool) -> Page:
        """The page of these rows with the whole of its large ones. It ends early behind `PAGE_BYTES` of them."""
        wanted: list[int] = []
        total, end = 0, len(rows)
        for index, row in enumerate(rows):
            if (weight := row[_WEIGHT]) > _LARGE:
                total += weight
                if wanted and total > PAGE_BYTES:
                    end = index
                    break
                wanted.append(row[_POSITION])

        def read_these(positions: Sequence[int]) -> Awaitable[list[Record]]:
            return self.database.fetch(self.sql.read_large, positions, self._incarnation)

        large, errors = await _one_by_one(read_these, wanted) if wanted else ([], {})
        found = {row[_POSITION]: row for row in large}
        if len(found) < len(wanted):
            await self.verify_incarnation()
        events: list[Event] = []
        for row in rows[:end]:
            position = row[_POSITION]
            whole = row if row[_WEIGHT] <= _LARGE else found.get(position, _stub(position, row[_KEY_HASH]))
            events.append(Event(whole, position, whole[_RECORDED_AT]))
        split = sum(event.position <= after for event in events)
        lost = {position: errors.get(position) for position in wanted if position not in found}
        return Page(events[:split], events[split:], more or end < len(rows), lost)


def _stub(position: int, key_hash: int) -> RecordLike:
    """In the place of a row that cannot be had."""
    return (None,) * _POSITION + (position, None, key_hash, 0)


async def _one_by_one(
    read: Callable[[Sequence[int]], Awaitable[list[Record]]], positions: Sequence[int]
) -> tuple[list[Record], dict[int, str]]:
    """The rows at these positions; those that cannot be decoded are found by halves, each with its error."""
    try:
        return await read(positions), {}
    except _UNDECODABLE as error:
        if len(positions) == 1:
            return [], {positions[0]: f"{type(error).__name__}: {error}"}
    middle = len(positions) // 2
    rows, errors = await _one_by_one(read, positions[:middle])
    other_rows, other_errors = await _one_by_one(read, positions[middle:])
    return rows + other_rows, errors | other_errors


def _is_in_place(found: str | None, mine: str) -> bool:
    """Whether that is the life `mine`, but for the file of the sequence: see the view `life`."""
    return found is not None and found.rpartition("/")[0] == mine.rpartition("/")[0]


class Reader:
    """Reads on from a position. Not safe for two tasks at once."""

    def __init__(self, log: Log, *, after: int, holes: Iterable[Range] = (), patient: bool = False) -> None:
        """`holes`: ranges at or below `after` that may still be filled. `patient`: wait for every hole (`strict`)."""
        self._log = log
        self._gaps = Gaps(holes, patient=patient)
        self._top = after
        self._held: list[Event] = []
        self._held_bytes = 0
        self._blocked_reads = 0
        self._gone: list[Range] = []
        """Found to be removed from the log, and not told yet."""
        self._lost: dict[int, str | None] = {}
        """Positions among the held ones: see `Page.lost`."""
        self.position = after
        log.forget_segments()

    def adopt(self, holes: Iterable[Range]) -> None:
        """Also watch these holes from now on; what appears in them comes with a later batch."""
        self._gaps.adopt(holes)
        self._log.forget_segments()

    @property
    def waiting(self) -> bool:
        """Whether an appender holds it back: by what it may still append, or by more holes than can be passed."""
        return self._gaps.waiting

    def open_holes(self) -> RangeSet:
        """Everything at or below `position` that may still be filled."""
        return self._gaps.ranges().below(self.position)

    async def read(self, *, prove: bool = False) -> Batch:
        """One round: evidence if there are gaps (or to `prove` that the log's end is its end), a page, a verdict."""
        evidence: Evidence | None = None
        if self._gaps or prove:
            evidence = await self._log.check()
            self._gaps.narrow(evidence)
        room = len(self._held) < _HELD_EVENTS and self._held_bytes < _HELD_BYTES
        found = await self._log.read(after=self._top, holes=self._gaps.ranges(), page=room)
        late, more = found.late, found.more
        self._lost.update(found.lost)
        # After the read: what is still missing now, and has nobody left to fill it, is dead.
        passed = set(self._gaps.fill([event.position for event in late])) if late else set()
        closed = self._gaps.bury() if self._gaps and not (late and more) else []
        dead = [gap for gap in closed if not self._log.is_in_one_segment(*gap)]
        dead += self._take(found.events)
        if prove and evidence is not None and room and not more and evidence.upto > self._top:
            # Nothing above the last row was visible after the evidence: the rest up to its `upto` is a hole as well.
            if self._gaps.add(self._top + 1, evidence.upto + 1):
                dead.append((self._top + 1, evidence.upto + 1))
            else:
                # No event above it shows that its segment is still there.
                self._log.forget_segments()
            self._top = evidence.upto
        if dead:
            self._gone.extend(await self._find_removed(dead))
        events = [event for event in late if event.position in passed]
        appeared = [event for event in late if event.position not in passed]
        if appeared:
            self._held = sorted([*self._held, *appeared], key=lambda event: event.position)
            self._held_bytes += sum(event.weight for event in appeared)
        opened = self._gaps.pass_overdue(self._log.clock, now=time.monotonic()) if self._gaps else []
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
            gone=self._passed_gone() if self._gone else (),
            unreadable=unreadable,
        )

    async def _find_removed(self, dead: Sequence[Range]) -> list[Range]:
        """What of these positions has no segment. Waits for a server that is away: what this round has read is here."""
        backoff = GrowingDelay(self._log.database)
        while True:
            try:
                return await self._log.find_removed(dead)
            except SchemaError:
                raise
            except DatabaseError as error:
                facts.emit("read failed", level=backoff.failed(), failures=backoff.failures, error=str(error))
                await backoff.wait()

    def _passed_gone(self) -> list[Range]:
        """Ranges that are gone at or below `position`; the rest is told when it is passed."""
        gone = RangeSet(self._gone)
        passed = list(gone.below(self.position))
        self._gone = list(gone.difference(passed))
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
                self._gone.append((position, position + 1))
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
                    and self._gaps.add(top + 1, event.position)
                    and not self._log.is_in_one_segment(top + 1, event.position)
                ):
                    dead.append((top + 1, event.position))
                top = event.position
        self._top = last
        if self._held:
            self._held.extend(page)
            self._held_bytes += sum(event.weight for event in page)
        else:
            self._held = page
            self._held_bytes = sum(event.weight for event in page) if self._gaps.waiting else 0
        return dead

    def _release(self) -> list[Event]:
        """The held events that no hole holds back any more; moves `position` along."""
        limit = self._gaps.limit() if self._gaps else None
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
        if more or self._gaps.unproven:
            self._blocked_reads = 0
            return 0.0
        if self._gaps.waiting:
            # Most appenders are over in a millisecond or two; one that is not costs a look every 25 ms.
            self._blocked_reads = 0 if progress else self._blocked_reads + 1
            # Not beyond 8, where it is 25 ms: after 1,750 looks, 44 s, the power is no float any more.
            return min(0.001 * 1.5 ** min(self._blocked_reads, 8), 0.025)
        return _OPEN_HOLE_POLL if self._gaps else None
