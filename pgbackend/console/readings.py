"""Reads what the console shows, from PostgreSQL.

`api` asks for one reading a request. The promise: however many tabs are open, a process has at most two readings at
work, each in a read-only transaction that ends within 2.5 s; so the console cannot take the connections that producers
and workers need. What all tabs ask for is read once and shared for some seconds.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from pgbackend.backend import Backend
from pgbackend.codec.event import Event
from pgbackend.console.problems import unavailable
from pgbackend.errors import PgBackendError
from pgbackend.model import MAX_POSITION, DeadLetterGroup, Retention, SeekPreview
from pgbackend.postgres.connections import Connection, Record
from pgbackend.postgres.sql import load
from pgbackend.postgres.sql.statements import ConsoleSql
from pgbackend.recent import Recent
from pgbackend.subscriptions.definitions import not_found
from pgbackend.subscriptions.places import Place

Found = TypeVar("Found")

PATIENCE = 3.0
"""Seconds until a reading that waits for its turn or for PostgreSQL is given up."""
DATA_BYTES = 1 << 18
"""The data of an event is shown up to here."""
WAITING = 100
"""The failed events that are shown of a subscription."""

_READERS = 2
_COUNTING = 15.0
"""Seconds for counting the events of a long log, as a preview does: a million takes 0.1 s."""
_STATEMENT_TIMEOUT = "2500ms"
_AT_ONCE, _SOON, _LATER = 0.5, 2.0, 15.0
"""Seconds for which answers are shared: of the log's end, of the present, and of the past."""
_KEPT = 64
"""The most answers that are kept for others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """The log, its subscriptions and its workers."""

    log: Record
    appenders: Sequence[Record]
    subscriptions: Sequence[Record]
    workers: Sequence[Record]
    retention: Retention


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """The last hour by minutes."""

    minutes: Sequence[Record]
    backlogs: Sequence[int] | None
    """The number of events up to the end of each minute that a subscription owes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subscription:
    """One subscription with its shards, and the first of its failed events."""

    status: Record
    shards: Sequence[Record]
    waiting: Sequence[Record]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which events to look for. Patterns are those of LIKE; None matches all."""

    before: int = MAX_POSITION
    after: int = 0
    limit: int = 100
    type: str | None = None
    source: str | None = None
    subject: str | None = None
    id: str | None = None
    search: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Events, the newest first."""

    head: int
    rows: Sequence[Record]
    read_down_to: int
    """All positions from here up to where the page begins were looked at."""
    more: bool
    """Whether events may be below."""

    def above(self, position: int) -> "Page":
        """The same page without the events up to this position."""
        rows = [row for row in self.rows if row["position"] > position]
        if len(rows) == len(self.rows) and self.read_down_to > position:
            return self
        return replace(self, rows=rows, read_down_to=max(self.read_down_to, position + 1), more=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """One event and its state in each subscription."""

    event: Event
    """With the first bytes of its data."""
    encoding: str | None
    size: int | None
    """All bytes of its data."""
    outcomes: Sequence[Record]


class Readings:
    """Everything that the console reads of one backend's log."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._sql = load(ConsoleSql, "console", schema=backend.info().schema)
        self._turns = asyncio.Semaphore(_READERS)
        self._count_turns = asyncio.Semaphore(1)
        self._shared: dict[Hashable, Recent[_Answer[object]]] = {}

    async def overview(self) -> Overview:
        """The present state; at most 2 s old. Raises PgBackendError, as all readings do."""
        return await self._share("overview", self._read_overview, age=_SOON)

    async def history(self, subscription: str | None) -> History:
        """The last hour; at most 15 s old. `subscription`: with what it owes.

        Raises SubscriptionNotFoundError.
        """
        minutes = await self._share("minutes", self._read_minutes, age=_LATER)
        if subscription is None:
            return History(minutes=minutes, backlogs=None)

        async def read() -> Sequence[int]:
            ends: list[int | None] = [row["position"] for row in minutes[:-1]]
            return await self._read_backlogs(subscription, [*ends, None])

        # Read together with these minutes, or it may have one more or one less.
        key = ("backlogs", subscription, minutes[-1]["minute"])
        return History(minutes=minutes, backlogs=await self._share(key, read, age=_LATER))

    async def subscription(self, name: str) -> Subscription:
        """The subscription. Raises SubscriptionNotFoundError."""
        async with self._reading() as connection:
            status = await connection.fetchrow(self._sql.show_subscription, name)
            if status is None:
                raise not_found(name)
            return Subscription(
                status=status,
                shards=await connection.fetch(self._sql.show_shards, name),
                waiting=await connection.fetch(self._sql.show_waiting, name, WAITING),
            )

    async def events(self, wanted: Wanted) -> Page:
        """The newest events that match; those of the log's end without a filter are at most 0.5 s old."""
        newest = Wanted(limit=wanted.limit)
        if replace(wanted, after=0) == newest:
            # All tabs follow the end of the log, each from where it is.
            page = await self._share(newest, lambda: self._read_events(newest), age=_AT_ONCE)
            return page.above(wanted.after)
        return await self._share(wanted, lambda: self._read_events(wanted), age=0.0)

    async def event(self, position: int) -> Story | None:
        """The event at this position, or its copy among the dead letters; None if there is none."""
        async with self._reading() as connection:
            row = await connection.fetchrow(self._sql.show_event, position, DATA_BYTES)
            if row is None:
                row = await connection.fetchrow(self._sql.show_buried_event, position, DATA_BYTES)
            if row is None:
                return None
            outcomes = await connection.fetch(self._sql.show_outcomes, position, row["key_hash"])
            return Story(event=Event(row), encoding=row["data_encoding"], size=row["size"], outcomes=outcomes)

    async def data(self, position: int) -> bytes | None:
        """All of an event's data, empty without any; None if there is no such event."""
        async with self._reading() as connection:
            row = await connection.fetchrow(self._sql.show_data, position)
            if row is None:
                row = await connection.fetchrow(self._sql.show_buried_data, position)
            return None if row is None else row["data"] or b""

    async def groups(self, subscription: str | None) -> Sequence[DeadLetterGroup]:
        """The dead letters by what they failed of; at most 2 s old."""

        async def read() -> Sequence[DeadLetterGroup]:
            async with _in_turn(self._turns, PATIENCE):
                return await self._backend.dead_letter_groups(subscription)

        return await self._share(("groups", subscription), read, age=_SOON)

    async def letters(self, after: int, limit: int, *, subscription: str | None, group: str | None) -> Sequence[Record]:
        """Dead letters behind the id `after`, without their data."""
        async with self._reading() as connection:
            return await connection.fetch(self._sql.show_letters, after, subscription, group, limit)

    async def count_letters(
        self, ids: Sequence[int] | None, *, subscription: str | None, group: str | None
    ) -> tuple[int, int]:
        """How many letters these are, and how many of them are on their way again."""
        async with self._reading() as connection:
            row = await connection.fetchrow(self._sql.count_letters, ids, subscription, group)
            assert row is not None  # noqa: S101 - it counts
            return row["letters"], row["due"]

    async def preview_seek(self, name: str, place: Place) -> SeekPreview:
        """The outcome of a seek. One at a time, and beside the other readings, because it counts."""
        async with _in_turn(self._count_turns, _COUNTING):
            return await self._backend.preview_seek(name, place)

    def forget(self) -> None:
        """Read shared answers again: somebody has changed something."""
        self._shared.clear()

    # The statements of each.

    async def _read_overview(self) -> Overview:
        async with self._reading() as connection:
            log = await connection.fetchrow(self._sql.show_log)
            assert log is not None  # noqa: S101 - the view has one row
            appenders = await connection.fetch(self._sql.show_appenders)
            subscriptions = await connection.fetch(self._sql.show_subscriptions)
            workers = await connection.fetch(self._sql.show_workers)
        async with _in_turn(self._turns, PATIENCE):
            retention = await self._backend.retention()
        return Overview(log=log, appenders=appenders, subscriptions=subscriptions, workers=workers, retention=retention)

    async def _read_minutes(self) -> Sequence[Record]:
        async with self._reading() as connection:
            return await connection.fetch(self._sql.show_minutes)

    async def _read_backlogs(self, name: str, ends: Sequence[int | None]) -> Sequence[int]:
        async with self._reading() as connection:
            rows = await connection.fetch(self._sql.show_backlogs, name, ends)
        if not rows:
            raise not_found(name)
        return [row["backlog"] for row in rows]

    async def _read_events(self, wanted: Wanted) -> Page:
        async with self._reading() as connection:
            # Before the events: one that is appended in between is above the head, and comes with the next page.
            head = await connection.fetchval(self._sql.show_head)
            await connection.execute(self._sql.read_in_order)
            rows = await connection.fetch(
                self._sql.search_events,
                wanted.before, wanted.after, wanted.limit + 1,
                wanted.type, wanted.source, wanted.subject, wanted.id,
                None if wanted.search is None else wanted.search.lower(),
                None if wanted.search is None else escaped_forms(wanted.search),
            )  # fmt: skip
        return page_of(rows, wanted, head=head)

    # How they are read.

    @asynccontextmanager
    async def _reading(self) -> AsyncIterator[Connection]:
        """A connection in a transaction with a snapshot of its own."""
        async with _in_turn(self._turns, PATIENCE):
            # The console is a part of this package: its readings are no API.
            database = self._backend._lifecycle.opened().database  # noqa: SLF001
            async with (
                database.acquire(PATIENCE) as connection,
                connection.transaction(isolation="repeatable_read", readonly=True),
            ):
                await connection.execute(self._sql.limit_reading, _STATEMENT_TIMEOUT)
                yield connection

    async def _share(self, key: Hashable, read: Callable[[], Awaitable[Found]], *, age: float) -> Found:
        """An answer that is at most `age` seconds old, or newer than this call, for all who ask under this key."""

        async def ask() -> "_Answer[object]":
            # As a value: all who wait must get a failure at once, and not wait for one of their own after another.
            try:
                return _Answer(await read(), None)
            except PgBackendError as error:
                return _Answer(None, error)

        recent = self._shared.pop(key, None) or Recent(ask, age=age)
        # The newest last; the one that was asked for longest ago goes first.
        self._shared[key] = recent
        if len(self._shared) > _KEPT:
            self._shared.pop(next(iter(self._shared)))
        answer = await recent.get()
        if answer.error is not None:
            # Those who waited share it. The next one asks again, because PostgreSQL may be back.
            if self._shared.get(key) is recent:
                del self._shared[key]
            raise answer.error
        return answer.found  # type: ignore[return-value]  # the key stands for one kind of reading


@asynccontextmanager
async def _in_turn(turns: asyncio.Semaphore, seconds: float) -> AsyncIterator[None]:
    """A turn, which ends within so many seconds, the wait for it included. Raises ConnectionLostError."""
    try:
        async with asyncio.timeout(seconds), turns:
            yield
    except TimeoutError:
        raise unavailable(seconds) from None


@dataclass(frozen=True, slots=True)
class _Answer(Generic[Found]):
    found: Found | None
    error: PgBackendError | None


def page_of(rows: Sequence[Record], wanted: Wanted, *, head: int) -> Page:
    """The page, from the rows of `search_events`."""
    matching: list[Record] = []
    for row in rows:
        if row["is_match"] is None:  # the time was up here
            return Page(head=head, rows=matching, read_down_to=row["position"] + 1, more=True)
        if len(matching) == wanted.limit:
            return Page(head=head, rows=matching, read_down_to=matching[-1]["position"], more=True)
        if not row["is_match"]:  # the last of so many events
            return Page(head=head, rows=matching, read_down_to=row["position"], more=True)
        matching.append(row)
    return Page(head=head, rows=matching, read_down_to=wanted.after + 1, more=False)


def pattern_of(text: str) -> str:
    r"""The pattern of LIKE for a text, or for all that begin with it if it ends in an asterisk.

    >>> pattern_of("order.*"), pattern_of("100%_\\")
    ('order.%', '100\\%\\_\\\\')
    """
    plain = text.removesuffix("*")
    escaped = plain.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    return escaped if plain == text else f"{escaped}%"


def escaped_forms(text: str) -> list[str]:
    r"""The forms that a text may have in data, as PostgreSQL's encode(…, 'escape') writes them, in small letters.

    Only ASCII has one form for all cases there.

    >>> escaped_forms("Straße"), escaped_forms("A\\")
    (['stra\\303\\237e', 'strasse'], ['a\\\\'])
    """
    forms = (text, text.lower(), text.upper(), text.capitalize())
    return list(dict.fromkeys(_escaped(form) for form in forms))


def _escaped(text: str) -> str:
    pieces = []
    for byte in text.encode():
        if byte in (0, *range(0x80, 0x100)):
            pieces.append(f"\\{byte:03o}")
        else:
            pieces.append("\\\\" if byte == 0x5C else chr(byte).lower())
    return "".join(pieces)
