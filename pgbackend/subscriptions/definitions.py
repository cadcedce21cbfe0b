"""Subscriptions as they stand in the database: created, checked, moved, altered, deleted, listed.

Creating one is where "from now on" is decided: whatever is acknowledged after `create()` returns is delivered, and
nothing older is replayed. For `latest` that takes the fence: positions up to the log's head may still be open.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import groupby
from typing import Literal

from pgbackend.errors import (
    ConfigError,
    DatabaseError,
    SubscriptionBusyError,
    SubscriptionExistsError,
    SubscriptionMismatchError,
    SubscriptionNotFoundError,
    shown,
)
from pgbackend.log.fence import MAX_PENDING_RANGES
from pgbackend.log.log import Log
from pgbackend.log.ranges import RangeSet
from pgbackend.model import MAX_POSITION, Epoch, Order, Position, ShardStatus, SubscriptionStatus
from pgbackend.postgres.connections import Record
from pgbackend.postgres.sql import load, quote_ident, quote_literal
from pgbackend.postgres.sql.statements import SubscriptionsSql

Place = int | datetime | Literal["earliest", "latest"]


@dataclass(frozen=True, slots=True)
class _Offset:
    """Where offsets are put, and what is not to be delivered from there on."""

    position: int
    pending: RangeSet = field(default_factory=RangeSet)
    start_position: int | None = None
    """Events at or below it are not delivered."""
    start_at: datetime | None = None
    """Nor those recorded at or before it."""


_EARLIEST, _LATEST = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
_SKEW = timedelta(seconds=60)
"""`recorded_at` follows positions but for how long an appender can be held up between drawing one and the other."""

_IMPATIENCE, _PATIENCE = 0.01, 0.25
"""Seconds between two tries at shards that run elsewhere, at first and at most."""
_REST = 5.0
"""Seconds beyond its patience that somebody who had a subscription rest may need to say that it need not any more."""
_DEADLOCK = "40P01"
_UNKNOWN = "unknown"
"""The start bound of subscriptions that are older than it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """What is stored of a subscription besides its offsets."""

    name: str
    order: Order
    shards: int
    end_position: int | None
    end_at: datetime | None
    start_bound: str | None = None
    """The position or date that it was told to start at last; None for the log's beginning or end."""
    version: str = ""
    """Of its row: another one when anything else in it is another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What of a definition can be altered."""

    order: Order
    end_position: int | None
    end_at: datetime | None
    start: Place

    def are_those_of(self, stored: Definition) -> bool:
        return self._are_but_for_start(stored) and stored.start_bound == bound(self.start)

    def disturb(self, stored: Definition) -> bool:
        """Whether the subscription has to rest while it becomes so."""
        return not self._are_but_for_start(stored) or self.move(stored)

    def move(self, stored: Definition) -> bool:
        """Whether it is to start at another place than it was told before: those that are older are taken at it."""
        return (wanted := bound(self.start)) is not None and stored.start_bound not in (wanted, _UNKNOWN)

    def _are_but_for_start(self, stored: Definition) -> bool:
        return (self.order, self.end_position, self.end_at) == (stored.order, stored.end_position, stored.end_at)


def in_utc(date: datetime, what: str) -> datetime:
    """The date in UTC, between the first and the last one that there are: the driver makes those two infinite.

    Raises ConfigError for one without a time zone, or before the year 1 or after 9999 in UTC.

    >>> in_utc(_LATEST, "end").isoformat()
    '9999-12-31T23:59:59.999998+00:00'
    """
    try:
        aware = date.utcoffset() is not None
        moved = date.astimezone(UTC) if aware else date
    except Exception:  # noqa: BLE001 - a time zone may be anybody's code
        raise ConfigError(f"{what} is {shown(date)}: no date of the years 1 to 9999 in UTC.") from None
    if not aware:
        raise ConfigError(f"{what} is {shown(date)}, without a time zone: expected an aware datetime.")
    moment = timedelta(microseconds=1)
    return min(max(moved, _EARLIEST + moment), _LATEST - moment)


def checked_place(place: object, what: str) -> Place:
    """The place with its date in UTC. Raises ConfigError for what is no place in a log."""
    if isinstance(place, datetime):
        return in_utc(place, what)
    if isinstance(place, str) and place in ("earliest", "latest"):
        return "earliest" if place == "earliest" else "latest"
    if isinstance(place, int) and not isinstance(place, bool) and 0 <= place <= MAX_POSITION:
        return place
    raise ConfigError(
        f"{what} is {shown(place)}: expected 'earliest', 'latest', a position (0 to {MAX_POSITION}), "
        "or an aware datetime."
    )


def checked_end(end: object, what: str) -> int | datetime | None:
    """The end with its date in UTC. Raises ConfigError for what is no end."""
    if isinstance(end, datetime):
        return in_utc(end, what)
    if end is None or (isinstance(end, int) and not isinstance(end, bool) and 1 <= end <= MAX_POSITION):
        return end
    raise ConfigError(f"{what} is {shown(end)}: expected a position (1 to {MAX_POSITION}), an aware datetime, or None.")


def bound(place: Place) -> str | None:
    """The one text that a position or date is stored as.

    >>> bound(17), bound("latest")
    ('17', None)
    >>> bound(datetime(2026, 1, 1, 2, tzinfo=UTC))
    '2026-01-01T02:00:00.000000+00:00'
    """
    if isinstance(place, datetime):
        return place.astimezone(UTC).isoformat(timespec="microseconds")
    return str(place) if isinstance(place, int) else None


class Subscriptions:
    """Reads and writes `subscriptions`, and makes and removes their `offsets`."""

    def __init__(self, log: Log, *, schema: str) -> None:
        self._log = log
        self._schema = schema
        self._sql = load(SubscriptionsSql, "subscriptions", schema=schema)

    async def ensure(self, wanted: Definition, start: Place) -> Definition:
        """Create the subscription at `start`, or return the one that is there.

        Raises SubscriptionMismatchError when that one's order, shards or end are others.
        """
        found = await self.find(wanted.name)
        if found is None:
            life = self._log.incarnation.id
            offset = await self._locate(start)
            created = await self._log.database.fetchval(
                self._sql.create_subscription,
                wanted.name, wanted.order, wanted.shards, offset.start_at, wanted.end_position, wanted.end_at,
                offset.position, str(offset.pending), bound(start), offset.start_position, life,
            )  # fmt: skip
            if created is None:
                await self._log.incarnation.verify(life)
            found = await self.find(wanted.name)
            if found is None:
                raise SubscriptionNotFoundError(f"Subscription {wanted.name!r} was deleted while it was being created.")
            if created is not None:
                return found
        differences = [
            f"{label} is {getattr(found, name)!r}, not {getattr(wanted, name)!r}"
            for name, label in (
                ("order", "its order"),
                ("shards", "its shard count"),
                ("end_position", "its end position"),
                ("end_at", "its end date"),
            )
            if getattr(found, name) != getattr(wanted, name)
        ]
        if differences:
            raise SubscriptionMismatchError(
                f"Subscription {wanted.name!r} exists, and {', '.join(differences)}. "
                "Subscribe with what is stored, or change that first: order and end with `alter_subscription()`, the "
                "shard count with `reshard()`."
            )
        return found

    async def find(self, name: str) -> Definition | None:
        row = await self._log.database.fetchrow(self._sql.find_subscription, name)
        if row is None:
            return None
        return Definition(
            name=row["name"],
            order=row["ordering"],
            shards=row["shards"],
            end_position=row["end_position"],
            end_at=row["end_at"],
            start_bound=row["start_bound"],
            version=row["version"],
        )

    async def seek(self, name: str, place: Place) -> None:
        """Move every shard to `place` under a new epoch, and drop what was waiting to be tried again."""
        pause = _IMPATIENCE
        while (stored := await self.find(name)) is not None:
            life = self._log.incarnation.id
            if await self._change(stored, stored, await self._locate(place), life, at_once=True):
                return
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, _PATIENCE)
        raise not_found(name)

    async def compare(self, name: str, terms: Terms) -> Definition | None:
        """What is stored, if it is not what `terms` say. Raises ConfigError when it cannot be."""
        stored = await self.find(name)
        if stored is None:
            raise not_found(name)
        if terms.order == "strict" and stored.shards != 1:
            raise ConfigError(
                f"Subscription {name!r} cannot be strict with {stored.shards} shards: log order needs a single one."
            )
        return None if terms.are_those_of(stored) else stored

    async def alter(self, name: str, terms: Terms, *, patience: float, on_rest: Callable[[], Awaitable[None]]) -> bool:
        """What is stored is as `terms` say; whether it was this call that made it so.

        Where somebody still runs one of its shards, all who do are asked to let what is at work end and to give theirs
        up; `on_rest` is awaited once that is asked. Raises SubscriptionBusyError when one of them refuses, or has not
        done so in `patience` seconds. Several calls for the same do it once.
        """
        deadline = time.monotonic() + patience
        pause = _IMPATIENCE
        async with AsyncExitStack() as rest:
            while (stored := await self.compare(name, terms)) is not None:
                start_bound = bound(terms.start)
                if not terms.disturb(stored):
                    await self._log.database.execute(self._sql.note_start_bound, name, stored.version, start_bound)
                    continue
                wanted = replace(
                    stored,
                    order=terms.order, end_position=terms.end_position, end_at=terms.end_at, start_bound=start_bound,
                )  # fmt: skip
                life = self._log.incarnation.id
                offset = await self._locate(terms.start) if terms.move(stored) else None
                if await self._change(stored, wanted, offset, life, at_once=False):
                    return True
                if pause == _IMPATIENCE:
                    await rest.enter_async_context(self._at_rest(name, patience, on_rest))
                else:
                    await self._stay_at_rest(name, deadline, on_rest)
                await asyncio.sleep(pause)
                pause = min(pause * 1.5, _PATIENCE)
        return False

    @asynccontextmanager
    async def _at_rest(self, name: str, patience: float, on_rest: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
        """Entered once all who run it are asked to give its shards up; until it is left nobody claims one.

        It ends by itself a little after `patience` seconds, whatever becomes of this call.
        """
        await self._log.database.execute(self._sql.rest, name, patience + _REST)
        try:
            await on_rest()
            yield
        finally:
            await self._log.database.execute(self._sql.rest, name, 0.0)

    async def _stay_at_rest(self, name: str, deadline: float, on_rest: Callable[[], Awaitable[None]]) -> None:
        """Ask for it again where it is over: another call that has what it wanted ends it for all.

        Raises SubscriptionBusyError when a worker has refused, or the deadline is past.
        """
        left = deadline - time.monotonic()
        row = await self._log.database.fetchrow(self._sql.rest_again, name, max(left, 0.0) + _REST)
        assert row is not None  # noqa: S101 - a SELECT of scalars
        if row["refused"] or left <= 0:
            owners = [row["name"] for row in await self._log.database.fetch(self._sql.find_owners, name)]
            raise busy(name, owners)
        if row["again"]:
            await on_rest()

    async def refuse_rest(self, name: str) -> None:
        """Tell whoever wants the subscription to rest that something is at work here for too long."""
        await self._log.database.execute(self._sql.refuse_rest, name)

    async def _change(
        self, stored: Definition, wanted: Definition, offset: _Offset | None, life: str | None, *, at_once: bool
    ) -> bool:
        """What is stored is as wanted, all shards at `offset` unless that is None; or nothing has changed, try again.

        `life` of the server: the one in which the offset was found. `at_once`: whoever runs a shard is not waited for.
        """
        position, pending = (None, RangeSet()) if offset is None else (offset.position, offset.pending)
        start_at, start_position = (None, None) if offset is None else (offset.start_at, offset.start_position)
        changed = await self._exclusively(
            self._sql.alter_subscription,
            stored.name, stored.version, at_once, wanted.order, wanted.end_position, wanted.end_at,
            wanted.start_bound, position, str(pending), start_at, start_position, life,
        )  # fmt: skip
        if not changed:
            await self._log.incarnation.verify()
        return changed

    async def _exclusively(self, statement: str, *args: object) -> bool:
        """Run a statement that locks all shards of a subscription; whether it changed anything."""
        try:
            return bool(await self._log.database.fetch(statement, *args))
        except DatabaseError as error:
            # It locks the shards in their order; the commit of one who still runs them does not.
            if error.sqlstate != _DEADLOCK:
                raise
            return False

    async def reshard(self, name: str, shards: int, *, patience: float, on_rest: Callable[[], Awaitable[None]]) -> bool:
        """The subscription has that many shards; whether it was this call that made it so.

        Whoever runs it is asked to let what is at work end and to give its shards up; `on_rest` is awaited once that is
        asked. Should some still have a way to go to where the farthest one is, they go on to there before the new ones
        begin: see `switch()`. Raises SubscriptionBusyError when one of them refuses, or has not done so in `patience`
        seconds.
        """
        if await self._of_other_shards(name, shards) is None:
            return False
        deadline = time.monotonic() + patience
        pause = _IMPATIENCE
        async with self._at_rest(name, patience, on_rest):
            while (stored := await self._of_other_shards(name, shards)) is not None:
                if await self._exclusively(self._sql.reshard, name, stored.version, shards):
                    await self.switch(name)
                    return True
                await self._stay_at_rest(name, deadline, on_rest)
                await asyncio.sleep(pause)
                pause = min(pause * 1.5, _PATIENCE)
        return False

    async def _of_other_shards(self, name: str, shards: int) -> Definition | None:
        """What is stored, if its number of shards is another one. Raises ConfigError when it cannot be changed."""
        stored = await self.find(name)
        if stored is None:
            raise not_found(name)
        if stored.order == "strict" and shards != 1:
            raise ConfigError(f"Subscription {name!r} is strict: log order needs a single shard, not {shards}.")
        return stored if stored.shards != shards else None

    async def switch(self, name: str) -> bool:
        """The new shards may be claimed; or nothing has changed: the old ones are not over, or somebody has one."""
        return await self._exclusively(self._sql.switch_shards, name)

    async def delete(self, name: str) -> None:
        if await self._log.database.fetchval(self._sql.delete_subscription, name) is None:
            raise not_found(name)

    async def _locate(self, place: Place) -> _Offset:
        """Where the offsets are put for a place. Not in front of the log's first segment.

        Events removed earlier were never owed to a later subscription, so they do not count as skipped for it.
        """
        if place == "latest":
            return _Offset(*await self._latest())
        offset = await self._locate_behind(place)
        before = await self._log.find_first_segment() - 1
        if offset.position >= before:
            return offset
        return replace(offset, position=max(offset.position, min(before, (await self._log.check()).upto)))

    async def _locate_behind(self, place: Place) -> _Offset:
        if isinstance(place, str):
            return _Offset(0)
        if isinstance(place, datetime):
            return _Offset(await self._position_before(place), start_at=place)
        head = (await self._log.check()).upto
        # No offset stands ahead of the log: it would look as if the log had been set back.
        return _Offset(place) if place <= head else _Offset(head, start_position=place)

    async def _latest(self) -> tuple[int, RangeSet]:
        """The log's head, and what at or below it may still appear: those events are acknowledged after this."""
        evidence = await self._log.check()
        head, blockers = evidence.upto, evidence.appenders
        began = time.monotonic()
        pause = 0.001
        while blockers:
            overdue = all(self._log.clock.is_overdue(name, now=time.monotonic()) for name in blockers)
            if overdue or time.monotonic() - began > self._log.clock.hole_wait:
                return head, await self._open_holes(head)
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, 0.025)
            before, evidence = evidence, await self._log.check()
            blockers = evidence.still_open(blockers, since=before)
        return head, RangeSet()

    async def _open_holes(self, head: int) -> RangeSet:
        """Every position up to `head` that is missing and may belong to an appender that is open now."""
        floor = await self._floor()
        rows = await self._log.database.fetch(self._log.sql.find_holes, floor, head, MAX_PENDING_RANGES + 1)
        if len(rows) > MAX_PENDING_RANGES:
            names = ", ".join(str(a.pid or a.gid) for a in await self._log.appenders())
            raise DatabaseError(
                f"Where the log ends cannot be said: transactions that append to it are open (pid {names}), "
                f"and more than {MAX_PENDING_RANGES} gaps may be theirs. End them, or start at a position."
            )
        return RangeSet((row["lower"], row["upper"]) for row in reversed(rows))

    async def _floor(self) -> int:
        """A position that no open appender's lie at or below: the last one recorded before the oldest of them began."""
        begun = await self._log.oldest_appender_start()
        return 0 if begun is None else await self._position_before(begun)

    async def _position_before(self, date: datetime) -> int:
        """A position at or below which nothing was recorded after `date`. By bisection over the primary key."""
        if date < _EARLIEST + _SKEW:
            return 0
        date = min(date, datetime.now(UTC) + timedelta(days=1)) - _SKEW
        low, high = 0, (await self._log.check()).upto
        while low < high:
            middle = (low + high + 1) // 2
            row = await self._log.database.fetchrow(self._log.sql.find_position, middle, date)
            if row is not None and row["is_before"]:
                low = max(middle, row["position"])
            else:
                high = middle - 1
        return low

    async def statuses(self, *, head: int, running: dict[str, str]) -> tuple[SubscriptionStatus, ...]:
        """All subscriptions, by name. `running`: what this process has to say of those that it runs."""
        rows = await self._log.database.fetch(self._sql.list_status)
        return tuple(
            self._status(name, list(shards), head=head, state=running.get(name))
            for name, shards in groupby(rows, key=lambda row: str(row["name"]))
        )

    def _status(self, name: str, rows: list, *, head: int, state: str | None) -> SubscriptionStatus:  # type: ignore[type-arg] # records
        shards = tuple(
            ShardStatus(
                shard=row["shard"],
                shards=row["shards"],
                position=Position(row["position"]),
                pending=RangeSet.parse(row["pending"]).count(),
                epoch=Epoch(row["epoch"]),
                owner=str(row["owner"]) if row["owner"] else None,
                owner_name=row["owner_name"],
                until=None if row["until"] is None else Position(row["until"]),
            )
            for row in rows
        )
        owned = any(shard.owner_name for shard in shards)
        complete = all(row["completed_at"] for row in rows)
        return SubscriptionStatus(
            name=name,
            order=rows[0]["ordering"],
            shards=shards,
            lag=0 if complete else max(max(0, head - shard.position) + shard.pending for shard in shards),
            lag_seconds=None if complete else max(0.0, *(row["lag_seconds"] or 0.0 for row in rows)),
            redeliveries=rows[0]["redeliveries"],
            dead_letters=rows[0]["dead_letters"],
            skipped=rows[0]["skipped"],
            last_error=rows[0]["last_error"],
            complete=complete,
            state=state or ("elsewhere" if owned else "stopped"),
        )

    async def places(self) -> tuple[int, int, int]:
        """The highest offset, the highest event, the sequence's value."""
        row = await self._find_places()
        return row["offset_position"], row["event_position"], row["head"]

    async def distrust(self) -> str | None:
        """Why the stored offsets cannot be trusted as they are, and how to mend that; None when they can."""
        row = await self._find_places()
        offset, event, head = row["offset_position"], row["event_position"], row["head"]
        where = quote_ident(self._schema)
        move = f"UPDATE {where}.offsets SET position = 0, pending = '{{}}'"  # noqa: S608 - for people
        trust = f"DELETE FROM {where}.incarnation"  # noqa: S608 - as above
        if head < max(offset, event):
            restore = f"SELECT setval({quote_literal(f'{where}.events_position_seq')}, {max(offset, event)})"
            return (
                f"The log's sequence stands at {head}, behind its events ({event}) or offsets ({offset}): positions "
                "would be given out twice, and subscriptions would skip events. Stop all producers and workers. Where "
                f"only the sequence is wrong, run {restore}. Where the log was emptied or is an older one, run {move} "
                f"WHERE position > {head}: those subscriptions then handle all that it has."
                + (f" Then say that offsets are right: {trust}." if row["set_back"] else "")
            )
        if row["set_back"]:
            return (
                "The log was set back while workers ran, below positions that they had read: subscriptions would skip "
                "events. Stop all workers. Move the subscriptions to where they are to go on "
                f"({move} has them handle all there is). Then say that offsets are right: {trust}."
            )
        return None

    async def _find_places(self) -> Record:
        row = await self._log.database.fetchrow(self._sql.find_places)
        assert row is not None  # noqa: S101 - a SELECT of scalars
        return row


def not_found(name: str) -> SubscriptionNotFoundError:
    return SubscriptionNotFoundError(f"There is no subscription {name!r}. `pgbackend status` lists those there are.")


def busy(name: str, workers: Sequence[str]) -> SubscriptionBusyError:
    return SubscriptionBusyError(
        f"Subscription {name!r} was not changed: events are still at work in {', '.join(workers) or 'a worker'} that "
        "take longer than its `drain_timeout`. Try again when they have ended, or stop that process first.",
        workers=workers,
    )


def exists(name: str) -> SubscriptionExistsError:
    return SubscriptionExistsError(
        f"Subscription {name!r} is running in this backend already. Use another name, or unsubscribe it first."
    )
