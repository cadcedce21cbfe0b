"""Decides how a subscription's offsets change with its terms. Pure: `shards.Shards` writes the change.

In order "none" a failed event is settled: its row in `redeliveries` is all that is owed of it. In the other orders it
stays pending, perhaps above the offset, and the row is only its count and its time. So a change between the two adds
those positions to what is pending, or takes them out and moves the offset up to the last of them.
"""

from collections.abc import Mapping
from dataclasses import replace

from pgbackend.log.ranges import RangeSet
from pgbackend.subscriptions.definitions import Definition
from pgbackend.subscriptions.places import Start
from pgbackend.subscriptions.shards import Change, Key, OffsetRow, Stored

_EVERYTHING = 0
"""Positions begin at 1."""


def move(stored: Stored, wanted: Definition, start: Start) -> Change:
    """Every shard is at `start`, with the wanted terms. A change of the number of shards ends with that.

    Failed events belong to the old place, so they are dropped. Dead letters stay.
    """
    barrier = stored.barrier
    return Change(
        definition=replace(wanted, start_position=start.start_position, start_at=start.start_at),
        written=[
            replace(shard.row, position=start.position, pending=start.pending, holes=start.pending)
            for shard in stored.current
        ],
        removed=None if barrier is None else stored.old[0].row.shards,
        drops_redeliveries_above=_EVERYTHING,
        uses_positions=False,
    )


def alter(stored: Stored, wanted: Definition, waiting: Mapping[Key, RangeSet]) -> Change:
    """Every shard owes the same events as before, in the wanted order. `waiting`: the failed events of each shard.

    While the number of shards changes, the old shards owe everything up to the barrier. Behind it the new ones read
    again what the old ones had failed at in order: in order "none" it starts anew, or it would be there twice.
    """
    was_ordered, is_ordered = stored.definition.order != "none", wanted.order != "none"
    barrier = stored.barrier
    written = []
    for shard in stored.shards:
        row, failed = shard.row, waiting.get(shard.row.key, RangeSet())
        if barrier is not None:
            failed = failed.below(barrier) if row.until is not None else RangeSet()
        if is_ordered and not was_ordered:
            row = replace(row, pending=row.pending.union(failed), holes=row.holes.difference(failed))
        elif was_ordered and not is_ordered:
            row = settle(row, failed)
        written.append(row)
    return Change(
        definition=wanted, written=written, drops_redeliveries_above=barrier if was_ordered and not is_ordered else None
    )


def settle(row: OffsetRow, events: RangeSet) -> OffsetRow:
    """The row once these events are settled: up to the last of them, with everything unread below it pending."""
    position = max([row.position, *(upper - 1 for _, upper in events)])
    # Positions that were not read yet count as holes: they may have no event.
    unread = RangeSet([(row.position + 1, position + 1)])
    return replace(
        row,
        position=position,
        pending=row.pending.union(unread).difference(events),
        holes=row.holes.union(unread).difference(events),
    )
