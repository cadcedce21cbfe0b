"""The stored shards of a subscription: read in one statement, written back in one, if they are still the same.

A change reads the rows, decides in Python (`altering`, `resharding`), and writes with a compare-and-swap: the write
happens only if the subscription's row and the epochs of all its shards are those that were read, and, where the
decision used them, their positions too. Its promise: no lock is held between two round trips, so a client that dies or
hangs between reading and writing blocks nobody, and has changed nothing.

The races that the swap decides, each with a test in tests/subscriptions/test_shards.py:

- A worker claims or releases a shard, or commits to it, between read and write: the row has another version.
- Another call alters, reshards, switches or seeks between read and write: the rows have other epochs.
- A commit holds a row's lock when the write starts: once it is through, the locked row is not the one of the snapshot.
  Every change of `redeliveries` comes with one of the offset's row, so the same rows mean the same redeliveries.
- The subscription is deleted, or deleted and created anew: its row has another version, and its shards other epochs.
- The server begins another life: its incarnation is not the one in which the decision was made.
- A dead owner comes back to life: it may have committed nothing since, or its row would differ. The swap gives its
  shards new epochs, so it commits nothing afterwards either.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pgbackend.errors import DatabaseError
from pgbackend.log.log import Log
from pgbackend.log.ranges import RangeSet
from pgbackend.postgres.sql import load
from pgbackend.postgres.sql.statements import ShardsSql
from pgbackend.subscriptions.definitions import Definition

_DEADLOCK = "40P01"

Key = tuple[int, int]
"""Number of shards, and which of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OffsetRow:
    """The content of a shard's row."""

    shards: int
    shard: int
    position: int
    pending: RangeSet
    holes: RangeSet
    """The part of `pending` in which no event was seen."""
    until: int | None = None
    """Where the shard ends, because the number of shards changes."""

    @property
    def key(self) -> Key:
        return self.shards, self.shard


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredShard:
    """A shard as it was read."""

    row: OffsetRow
    epoch: int
    version: str
    """The row's version: every change gives it another one."""
    free: bool
    """Whether it has no owner, or a dead one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A subscription as it was read, with all its shards."""

    definition: Definition
    version: str
    """The version of the subscription's row."""
    incarnation: str | None
    """The server's life that this process works in."""
    shards: Sequence[StoredShard]

    @property
    def old(self) -> list[StoredShard]:
        """The shards that end at the barrier; none unless the number of shards changes."""
        return [shard for shard in self.shards if shard.row.until is not None]

    @property
    def current(self) -> list[StoredShard]:
        """The shards of the subscription's number. They wait for the old ones, if there are any."""
        return [shard for shard in self.shards if shard.row.until is None]

    @property
    def barrier(self) -> int | None:
        """Where the old shards end."""
        return max((shard.row.until for shard in self.shards if shard.row.until is not None), default=None)

    @property
    def free(self) -> bool:
        return all(shard.free for shard in self.shards)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """The rows to write. All others stay as they are."""

    definition: Definition
    written: Sequence[OffsetRow]
    """Rows to create or replace, each without an owner and under a new epoch."""
    removed: int | None = None
    """The shards of this number go."""
    drops_redeliveries_above: int | None = None
    """The subscription's failed events behind this position are not tried again; None keeps all of them."""
    ends_drain: bool = True
    """Whether workers may claim the shards at once, even if a call has asked for them to be released."""
    uses_positions: bool = True
    """Whether it was decided from the positions of the shards, so that none of them may have moved since."""


class Shards:
    """Reads and swaps the shards of subscriptions."""

    def __init__(self, log: Log, *, schema: str) -> None:
        self._log = log
        self._sql = load(ShardsSql, "shards", schema=schema)

    async def read(self, name: str) -> Stored | None:
        """The subscription and its shards in one snapshot; None when there is no such subscription."""
        incarnation = self._log.incarnation.id
        rows = await self._log.database.fetch(self._sql.read_shards, name)
        if not rows:
            return None
        return Stored(
            definition=Definition.of(rows[0]),
            version=rows[0]["version"],
            incarnation=incarnation,
            shards=[
                StoredShard(
                    row=OffsetRow(
                        shards=row["modulus"],
                        shard=row["shard"],
                        position=row["position"],
                        pending=RangeSet.parse(row["pending"]),
                        holes=RangeSet.parse(row["holes"]),
                        until=row["until"],
                    ),
                    epoch=row["epoch"],
                    version=row["shard_version"],
                    free=row["free"],
                )
                for row in rows
            ],
        )

    async def find_waiting(self, name: str) -> Mapping[Key, RangeSet]:
        """The positions of failed events that are to be tried again, by the shard that they belong to."""
        rows = await self._log.database.fetch(self._sql.find_waiting, name)
        return {(row["modulus"], row["shard"]): RangeSet.parse(row["positions"]) for row in rows}

    async def find_events(self, ranges: RangeSet, old: int, new: int) -> Mapping[Key, RangeSet]:
        """The positions in `ranges` that hold events, by their shard of `old` shards and of `new` shards."""
        if not ranges:
            return {}
        rows = await self._log.database.fetch(self._sql.find_events, str(ranges), old, new)
        return {(row["old_shard"], row["new_shard"]): RangeSet.parse(row["positions"]) for row in rows}

    async def swap(self, stored: Stored, change: Change) -> bool:
        """Write the change, if what was read is still there; whether it was.

        Raises IncarnationChanged when the server lives another life than at the time of the read.
        """
        new = change.definition
        try:
            rows = await self._log.database.fetch(
                self._sql.swap_shards,
                new.name, stored.version, stored.incarnation,
                new.order, new.shards, new.start_position, new.start_at, new.end_position, new.end_at, new.start_bound,
                change.removed, change.drops_redeliveries_above, change.ends_drain,
                [shard.row.shards for shard in stored.shards],
                [shard.row.shard for shard in stored.shards],
                [shard.epoch for shard in stored.shards],
                [shard.version if change.uses_positions else None for shard in stored.shards],
                [row.shards for row in change.written],
                [row.shard for row in change.written],
                [row.until for row in change.written],
                [row.position for row in change.written],
                [str(row.pending) for row in change.written],
                [str(row.holes) for row in change.written],
            )  # fmt: skip
        except DatabaseError as error:
            # The swap locks shards in their order, but the commit of a worker that still runs them does not.
            if error.sqlstate != _DEADLOCK:
                raise
            return False
        if not rows:
            await self._log.incarnation.verify(stored.incarnation)
        return bool(rows)

    async def set_start_bound(self, stored: Stored, start_bound: str | None) -> None:
        """The subscription was told to start there, which moves nothing. Does nothing if its row has changed."""
        await self._log.database.execute(self._sql.set_start_bound, stored.definition.name, stored.version, start_bound)
