"""Skips one event of a subscription, whatever its state: it becomes a dead letter, on record.

    workers release the shards (`draining`) ──▶ the shard of the event is swapped ──▶ it goes on without the event
       └──events are at work for too long──▶ the shard is taken from its worker ──▲

While the workers drain, what is at work ends. If that settles the event, there is nothing to skip any more, and the
call says so. Otherwise the event is unread, pending, or in `redeliveries`, because a released shard keeps nothing in
memory. So `skip()` decides from the stored row: the position is settled there, and what lies unread below it is
pending. One statement writes that row under a new epoch, if it is still the one that was read, deletes the row in
`redeliveries`, and makes the dead letter.

Why that is sound:

- Nothing is lost. The new row owes what the old one owed, except for the event, which is a dead letter by the same
  commit. A process that dies before it has changed nothing, and one that dies after it has no work left.
- A former owner commits nothing more, because its epoch is not there any more (I5). So no result of an attempt that is
  still under way counts, and the event is not scheduled, buried or settled a second time.
- Events come again only where a shard is taken from its worker: those that were in flight there, or were handled since
  the last commit (I6). One of the latter may be the event itself.
- Two calls for one event: the second finds another row than it has read, reads again, and finds the event settled.
- While the number of shards changes, only old shards are swapped. `switch` takes over what they owe.
"""

import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

from pgbackend.errors import EventNotFoundError, EventSettledError, SubscriptionBusyError
from pgbackend.log.log import Log
from pgbackend.log.ranges import RangeSet
from pgbackend.postgres.reconnect import GrowingDelay
from pgbackend.postgres.sql import load
from pgbackend.postgres.sql.statements import ShardsSql
from pgbackend.subscriptions.altering import settle
from pgbackend.subscriptions.definitions import not_found
from pgbackend.subscriptions.draining import Drain
from pgbackend.subscriptions.shards import OffsetRow, Shards, Stored, StoredShard

_PATIENCE = 30.0
"""Seconds in which a swap gets between the commits of a worker that goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """The state of a position in the log and in `redeliveries`."""

    is_redacted: bool
    key_hash: int | None
    """The hash of the event's key; None if the log has no event there."""
    is_waiting: bool
    """Whether it waits to be tried again."""


def skip(stored: Stored, position: int, standing: Standing) -> tuple[StoredShard, OffsetRow]:
    """The shard that owes the event, and its row without it.

    Raises EventNotFoundError, EventSettledError, and SubscriptionBusyError when the event is for a shard that waits for
    another number of shards to begin.
    """
    name = stored.definition.name
    if standing.is_redacted:
        raise EventNotFoundError(
            f"The event at position {position} is redacted: a subscription that has not handled it skips it by itself."
        )
    if standing.key_hash is None:
        raise EventNotFoundError(
            f"There is no event at position {position}: the position was never used, its transaction was rolled back "
            "or is still open, or retention has dropped it."
        )
    for shard in stored.old or stored.current:
        row = shard.row
        if standing.key_hash % row.shards != row.shard:
            continue
        if position in row.pending or row.position < position <= (row.until or position):
            return shard, settle(row, RangeSet([(position, position + 1)]))
        if standing.is_waiting and position <= row.position:
            # In order "none" its row in `redeliveries` is all that is owed of it.
            return shard, row
    if stored.barrier is not None and position > stored.barrier:
        raise SubscriptionBusyError(
            f"The event at position {position} belongs to the new shards of subscription {name!r}, which begin when "
            f"the old ones have reached position {stored.barrier}. Try again then.",
            workers=(),
        )
    raise EventSettledError(
        f"Subscription {name!r} has settled the event at position {position}: it was handled, refused by its filter, "
        "skipped, or became a dead letter, or the subscription began behind it."
    )


class Skips:
    """Skips events."""

    def __init__(self, log: Log, *, schema: str) -> None:
        self._log = log
        self._sql = load(ShardsSql, "shards", schema=schema)
        self._shards = Shards(log, schema=schema)

    async def skip(self, name: str, position: int, *, patience: float, on_drain: Callable[[], Awaitable[None]]) -> None:
        """The event is a dead letter of the subscription, which goes on without it.

        All workers are asked to drain the subscription, if one runs the event's shard; `on_drain` is awaited after the
        request. A shard that is not released after `patience` seconds is taken from its worker. Raises as the function
        `skip()` does, SubscriptionNotFoundError, and SubscriptionBusyError when the shard changed at each try.
        """
        drain = Drain(self._log.database, self._sql, name, patience=patience, on_request=on_drain)
        deadline = time.monotonic() + patience + _PATIENCE
        is_requested = is_refused = False
        delay = GrowingDelay(self._log.database, cap=0.25)
        async with AsyncExitStack() as stack:
            while True:
                stored = await self._shards.read(name)
                if stored is None:
                    raise not_found(name)
                shard, row = skip(stored, position, await self._find_standing(name, position))
                if shard.free or is_refused:
                    if await self._swap(stored, shard, row, position):
                        return
                    if time.monotonic() > deadline:
                        raise SubscriptionBusyError(
                            f"The event at position {position} was not skipped: its shard of subscription {name!r} "
                            "kept changing. Try again.",
                            workers=(),
                        )
                elif is_requested:
                    # The event at work may be this very one, and may never end.
                    is_refused = await _is_refused(drain)
                else:
                    await stack.enter_async_context(drain.requested())
                    is_requested = True
                await delay.wait()

    async def _find_standing(self, name: str, position: int) -> Standing:
        row = await self._log.database.fetchrow(self._sql.find_standing, name, position)
        assert row is not None  # noqa: S101 - a SELECT of scalars
        return Standing(**row)

    async def _swap(self, stored: Stored, shard: StoredShard, row: OffsetRow, position: int) -> bool:
        """Write the shard's row and the dead letter, if the shard is still as it was read; whether it was.

        Raises IncarnationChanged.
        """
        rows = await self._log.database.fetch(
            self._sql.skip_event,
            stored.definition.name, row.shards, row.shard, shard.epoch, shard.version, stored.incarnation,
            position, row.position, str(row.pending), str(row.holes),
        )  # fmt: skip
        if not rows:
            await self._log.incarnation.verify(stored.incarnation)
        return bool(rows)


async def _is_refused(drain: Drain) -> bool:
    """Whether a worker does not release its shards. Otherwise the request goes on."""
    try:
        await drain.renew()
    except SubscriptionBusyError:
        return True
    return False
