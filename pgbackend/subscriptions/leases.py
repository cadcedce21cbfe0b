"""Leases: which worker runs which shard (I5). A worker surveys all shards, claims free ones and releases its own.

A claim gives the shard a new epoch. Whatever a former owner still sends under the old one changes nothing, so two
workers can never both commit for a shard, whoever believes what.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from pgbackend.errors import ConnectionLostError
from pgbackend.log.log import Log
from pgbackend.log.ranges import RangeSet
from pgbackend.model import Epoch, Order, Position
from pgbackend.postgres.sql import load
from pgbackend.postgres.sql.statements import LeasesSql
from pgbackend.subscriptions.pauses import PauseState
from pgbackend.subscriptions.sharing import Peer, ShardKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The right to run a shard: where the shard stands, and the subscription's terms.

    Any process may change the terms of a subscription, but only under new epochs. So the terms come with the lease, and
    no worker runs a shard by other terms than those of its epoch.
    """

    subscription: str
    shard: int
    shards: int
    epoch: Epoch
    until: int | None
    """The last position of the shard, while the number of shards changes: others take over behind it."""
    position: Position
    pending: RangeSet
    holes: RangeSet
    """The part of `pending` in which no event was seen: it may have been rolled back."""
    place: tuple[int, int]
    """The ctid of the offset's row."""
    complete: bool
    crashes: int
    """How many owners in a row died before they had settled what was open when they claimed the shard."""
    head: int
    """The highest position given out when it was claimed. A former owner's deliveries are at or below it."""
    order: Order
    start_position: int | None
    """Events at or below it are not delivered: the start was ahead of the log."""
    start_at: datetime | None
    """Events recorded at or before it are not delivered."""
    end_position: int | None
    """Events at or behind it are not delivered."""
    end_at: datetime | None
    """Events recorded at or after it are not delivered."""
    pause: PauseState
    """As it was when the shard was claimed. It may change under the same epoch."""

    @property
    def key(self) -> ShardKey:
        return self.subscription, self.shards, self.shard

    @property
    def stop(self) -> int | None:
        """The first position behind the lease; None while it has no end."""
        bounds = [self.end_position, None if self.until is None else self.until + 1]
        return min((bound for bound in bounds if bound is not None), default=None)

    @property
    def last_open(self) -> int:
        """The highest position that a former owner may have been dispatching."""
        return self.head if self.stop is None else min(self.head, self.stop - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class SurveyedShard:
    """A shard as every worker sees it."""

    key: ShardKey
    epoch: int
    owner: UUID | None
    free: bool
    """Whether it has no owner, or a dead one."""
    draining: bool
    """Whether a call that changes the subscription asks its workers to release it, and to claim it no more for now."""
    old: bool
    """Whether it ends at a barrier because the number of shards changes."""
    finished: bool
    """Whether it is old and has read up to the barrier."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """All living workers and all shards, as every worker sees them."""

    peers: Sequence[Peer]
    shards: Sequence[SurveyedShard]
    pauses: Mapping[str, PauseState]
    """By subscription."""

    def claimable(self) -> list[SurveyedShard]:
        """The shards that some worker may run now, by the same rules as the statement `claim`."""
        changing = {shard.key[0] for shard in self.shards if shard.old}
        return [
            shard
            for shard in self.shards
            if not shard.draining and not (shard.finished if shard.old else shard.key[0] in changing)
        ]


class Leases:
    """Surveys, claims and releases shards for one worker."""

    def __init__(self, log: Log, *, schema: str, worker: UUID) -> None:
        self._log = log
        self._sql = load(LeasesSql, "leases", schema=schema)
        self._worker = worker

    async def verify_presence(self) -> None:
        """This worker's heartbeat is visible where its leases are. Raises ConnectionLostError."""
        if not await self._log.database.fetchval(self._sql.find_worker, self._worker):
            raise ConnectionLostError(
                "listen_dsn does not lead to the same database as dsn, so other workers could not see that this one "
                "lives. Give the same database in both, or no listen_dsn."
            )

    async def survey(self) -> Survey:
        # Workers first: a shard's owner that is missing from the list has registered since, so it is alive.
        workers = await self._log.database.fetch(self._sql.survey_workers)
        shards = await self._log.database.fetch(self._sql.survey_shards)
        return Survey(
            peers=[Peer(row["id"], frozenset(row["subscriptions"]), row["asks"]) for row in workers],
            shards=[
                SurveyedShard(
                    key=(row["subscription"], row["shards"], row["shard"]),
                    epoch=row["epoch"],
                    owner=row["owner"],
                    free=row["free"],
                    draining=row["draining"],
                    old=row["old"],
                    finished=row["finished"],
                )
                for row in shards
            ],
            pauses={row["subscription"]: PauseState.of(row) for row in shards},
        )

    async def announce(self, subscriptions: Sequence[str], *, asks: bool) -> None:
        """The others see which subscriptions this worker runs, and whether it asks for more shards."""
        await self._log.database.execute(self._sql.announce, self._worker, subscriptions, asks)

    async def claim(self, shards: Sequence[ShardKey]) -> list[Lease]:
        """This worker owns those of the shards that were still free; their leases."""
        rows = await self._log.database.fetch(
            self._sql.claim,
            [subscription for subscription, _, _ in shards],
            [count for _, count, _ in shards],
            [shard for _, _, shard in shards],
            self._worker,
            self._log.incarnation.id,
        )
        return [
            Lease(
                subscription=row["subscription"],
                shard=row["shard"],
                shards=row["shards"],
                epoch=Epoch(row["epoch"]),
                until=row["until"],
                position=Position(row["position"]),
                pending=RangeSet.parse(row["pending"]),
                holes=RangeSet.parse(row["holes"]),
                place=row["ctid"],
                complete=row["completed_at"] is not None,
                crashes=row["crashes"],
                head=row["head"],
                order=row["ordering"],
                start_position=row["start_position"],
                start_at=row["start_at"],
                end_position=row["end_position"],
                end_at=row["end_at"],
                pause=PauseState.of(row),
            )
            for row in rows
        ]

    async def release(self, epochs: Sequence[int]) -> None:
        """The shards of these epochs are free, unless another worker has them already."""
        if epochs:
            await self._log.database.execute(self._sql.release, self._worker, epochs)

    async def leave(self) -> None:
        """This worker owns nothing and is not listed any more."""
        await self._log.database.execute(self._sql.leave, self._worker)

    async def delete_dead_workers(self) -> None:
        """The rows of workers that died long ago are gone."""
        await self._log.database.execute(self._sql.delete_dead_workers)
