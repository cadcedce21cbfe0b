"""Decides how a subscription gets another number of shards. Pure: `shards.Shards` writes the change.

    running ── reshard(n) ──▶ old shards run to the barrier, new ones wait ── switch() ──▶ running with n shards
       ▲                                     │    ▲
       └───── reshard(the old number) ───────┘    └── reshard(m): m new ones wait instead

The barrier is the highest offset at the time. The old shards go on to there and no further; the new ones start there
and can be claimed once all old ones have read that far and are released. Its promise: at any time every event belongs
to exactly one shard, the old one of its key up to the barrier and the new one behind it, and a switch hands over
whatever the old shard still owed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from pgbackend.log.ranges import RangeSet
from pgbackend.subscriptions.shards import Change, Key, OffsetRow, Stored


def reshard(stored: Stored, shards: int) -> Change | None:
    """The subscription has that many shards from a barrier on; None while a worker has one that must change for it."""
    old, current, barrier = stored.old, stored.current, stored.barrier
    definition = replace(stored.definition, shards=shards)
    if barrier is None:
        if not stored.free:
            return None
        barrier = max(shard.row.position for shard in current)
        ending = [replace(shard.row, until=barrier) for shard in current]
        return Change(definition=definition, written=ending + _new_rows(shards, barrier))
    waiting = current[0].row.shards
    if old[0].row.shards == shards:
        if not stored.free:
            return None
        # Back to the old number before the switch: the old shards just go on.
        return Change(definition=definition, written=[replace(shard.row, until=None) for shard in old], removed=waiting)
    # The old shards run on meanwhile. Only those that wait for them are replaced.
    return Change(definition=definition, written=_new_rows(shards, barrier), removed=waiting, uses_positions=False)


def _new_rows(shards: int, barrier: int) -> list[OffsetRow]:
    return [
        OffsetRow(shards=shards, shard=shard, position=barrier, pending=RangeSet(), holes=RangeSet())
        for shard in range(shards)
    ]


def can_switch(stored: Stored) -> bool:
    """Whether every old shard is released and has read up to the barrier, or to the subscription's end before it."""
    end = stored.definition.end_position
    return bool(stored.old) and all(
        shard.free
        and shard.row.until is not None
        and shard.row.position >= (shard.row.until if end is None else min(shard.row.until, end - 1))
        for shard in stored.old
    )


def find_doubtful(stored: Stored) -> RangeSet:
    """Positions that some old shards owe and others do not: `switch` must know which of them hold events.

    Each belongs to one of the shards if it holds an event. To the others it was a hole.
    """
    owed = [_owed(shard.row) for shard in stored.old]
    everywhere = owed[0]
    for other in owed[1:]:
        everywhere = _intersection(everywhere, other)
    return _union(owed).difference(everywhere)


def switch(stored: Stored, events: Mapping[Key, RangeSet]) -> Change:
    """The new shards take over what the old ones owe, and the old ones are gone.

    `events`: the doubtful positions that hold events, by old and new shard. Such an event goes to its new shard if its
    old one owes it, and was settled otherwise. Everything else that is owed goes to each of the new shards, because the
    key of an open hole is not known before it appears.
    """
    owed = {shard.row.shard: _owed(shard.row) for shard in stored.old}
    seen = _union(shard.row.pending.difference(shard.row.holes) for shard in stored.old)
    unknown = _union(owed.values()).difference(_union(events.values()))
    known: dict[int, RangeSet] = {}
    for (old, new), positions in events.items():
        known[new] = known.get(new, RangeSet()).union(_intersection(positions, owed[old]))
    return Change(
        definition=stored.definition,
        written=[
            replace(
                shard.row, pending=unknown.union(known.get(shard.row.shard, RangeSet())), holes=unknown.difference(seen)
            )
            for shard in stored.current
        ],
        removed=stored.old[0].row.shards,
        ends_drain=False,
    )


def _owed(row: OffsetRow) -> RangeSet:
    """The unsettled positions of an old shard up to the barrier.

    A shard that is finished because the subscription ends before the barrier has not read what lies between: that is
    owed as well, for the case that the end becomes a later one.
    """
    assert row.until is not None  # noqa: S101 - an old shard
    return row.pending.union(RangeSet([(row.position + 1, row.until + 1)]))


def _union(sets: Iterable[RangeSet]) -> RangeSet:
    return RangeSet(part for ranges in sets for part in ranges)


def _intersection(one: RangeSet, other: RangeSet) -> RangeSet:
    return one.difference(one.difference(other))
