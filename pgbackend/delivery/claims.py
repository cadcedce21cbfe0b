"""Claims: in rounds, a worker takes its share of the shards and hands over what is another's share.

A round surveys all workers and shards, and works out who should run what (`sharing.py`); every worker comes to the same
plan. The round stores the pauses that dispatchers here have raised, and obeys those that are stored. It ends the pumps
of lost shards, switches to a new number of shards where the old ones are over, hands shards over to workers that ask
for them, and claims free ones.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from uuid import UUID

from pgbackend import facts
from pgbackend.delivery.handover import Handover
from pgbackend.delivery.pause_sync import PauseSync
from pgbackend.delivery.pumps import Pumps
from pgbackend.delivery.registration import Registration
from pgbackend.errors import DatabaseError, SchemaError
from pgbackend.log.log import Log
from pgbackend.log.notify import Notifier, Wakeup
from pgbackend.postgres.reconnect import GrowingDelay
from pgbackend.subscriptions.alterations import Alterations
from pgbackend.subscriptions.leases import Lease, Leases, Survey, SurveyedShard
from pgbackend.subscriptions.overview import Overview
from pgbackend.subscriptions.sharing import Peer, ShardKey, share

LONGEST_ROUND = 1.0
"""Seconds between two rounds, at most: a dead worker's shards do not wait for a long `poll_interval`."""
_JITTER = 0.05
"""Seconds that a worker waits at most between two rounds, whatever wakes it: workers must not go in step."""
_UNCLAIMED = 1.5
"""Seconds after which any worker takes a free shard: for two rounds, the worker that should have it did not."""


class Claims:
    """Runs the rounds of one worker."""

    def __init__(
        self,
        worker: UUID,
        log: Log,
        leases: Leases,
        alterations: Alterations,
        pauses: PauseSync,
        overview: Overview,
        registrations: Mapping[str, Registration],
        pumps: Pumps,
        handover: Handover,
        notifier: Notifier,
        *,
        rounds: Wakeup,
        poll_interval: float,
    ) -> None:
        """`rounds`: when it wakes, the next round begins."""
        self._worker = worker
        self._log = log
        self._leases = leases
        self._alterations = alterations
        self._pauses = pauses
        self._overview = overview
        self._registrations = registrations
        self._pumps = pumps
        self._handover = handover
        self._notifier = notifier
        self._rounds = rounds
        self._interval = min(poll_interval, LONGEST_ROUND)
        self._one_round = asyncio.Lock()
        self._free_since: dict[ShardKey, float] = {}
        """When each free shard was first seen free, in monotonic seconds."""

    async def run(self) -> None:
        """Claim until cancelled."""
        delay = GrowingDelay(self._log.database)
        while True:
            known = self._rounds.count
            try:
                async with self._one_round:
                    await self.run_once()
            except SchemaError:
                raise
            except DatabaseError as error:
                facts.emit("claim failed", level=delay.failed(), failures=delay.failures, error=str(error))
                await delay.wait()
                continue
            delay.reset()
            # Bounds the rounds while many shards change hands, each with a wake-up for all. It stands before the wait,
            # so that a worker which lost a shard after a quiet time acts at once.
            await asyncio.sleep(_JITTER * random.random())  # noqa: S311 - not a secret
            await self._rounds.wait(since=known, timeout=self._interval)

    def wake(self) -> None:
        """Begin the next round at once."""
        self._rounds.wake()

    async def run_once(self) -> None:
        """One round."""
        # An idle worker commits and reads nothing, so it checks for a new incarnation here.
        await self._log.incarnation.verify_not_set_back()
        await self._pauses.store()
        known = self._pumps.epochs()
        survey = await self._leases.survey()
        self._pauses.obey(survey.pauses)
        worker = self._worker
        held = {shard.epoch for shard in survey.shards if shard.owner == worker}
        self.drop_lost(known, held)
        for pump in self._pumps:
            pump.care.forget_crashes(redelivering=bool(pump.due))
        # Claimed, but the connection broke before the pump started. Or given up after a COMMIT without an answer.
        if unused := [epoch for epoch in held if epoch not in known]:
            await self._leases.release(unused)
            self._rounds.wake()
        await self._switch_shards(survey)
        self._handover.begin(self._must_leave(survey), at_once=True)

        me = Peer(worker, self._runnable(), asks=True)
        peers = {peer.id: peer for peer in survey.peers} | {worker: me}
        leaving = self._handover.leaving()
        shards = {shard.key: shard for shard in survey.claimable()}
        plan = share(
            {key: None if shard.free or shard.epoch in leaving else shard.owner for key, shard in shards.items()},
            list(peers.values()),
        )
        # A shard whose pump is still ending here would run twice in this process.
        here = {pump.shard.lease.key for pump in self._pumps}
        wanted = [
            key for key, owner in plan.items() if owner == worker and shards[key].owner != worker and key not in here
        ]
        await self._announce(survey, me, asks=any(not shards[key].free for key in wanted))
        self._handover.begin(
            shard.epoch
            for key, shard in shards.items()
            if shard.owner == worker and key in plan and plan[key] != worker and peers[plan[key]].asks
        )
        unclaimed = [key for key in self._unclaimed(shards, me) if key not in here]
        await self._claim([key for key in wanted if shards[key].free] + unclaimed)

    async def heed_pauses(self) -> None:
        """This worker obeys what was stored about pauses before this call."""
        # Between two rounds: one that has asked before would obey what it was told then.
        async with self._one_round:
            self._pauses.obey((await self._leases.survey()).pauses)

    def drop_lost(self, known: set[int], held: set[int] | frozenset[int]) -> None:
        """This worker still has those of its `known` leases that are `held`."""
        for epoch in known - held:
            if (pump := self._pumps.get(epoch)) is not None:
                self._handover.lose(pump.shard)

    @asynccontextmanager
    async def between_rounds(self) -> AsyncIterator[None]:
        """No round is under way: each has started the pumps of what it claimed."""
        async with self._one_round:
            yield

    def _runnable(self) -> frozenset[str]:
        """The subscriptions whose shards this worker can run now."""
        return frozenset(name for name, registration in self._registrations.items() if not registration.changing)

    async def _switch_shards(self, survey: Survey) -> None:
        """Where the number of shards changes and the old ones are over, let the new ones begin."""
        are_over: dict[str, bool] = {}
        for shard in survey.shards:
            if shard.old:
                subscription = shard.key[0]
                are_over[subscription] = are_over.get(subscription, True) and shard.finished and shard.free
        for subscription, over in are_over.items():
            if over and subscription in self._registrations and await self._alterations.switch(subscription):
                facts.emit("shards switched", subscription=subscription)
                self._rounds.wake()
                await self._notifier.notify_leases()

    def _must_leave(self, survey: Survey) -> list[int]:
        """The shards that this worker gives up whoever gets them: a call drains them, or they are finished."""
        draining = {shard.epoch for shard in survey.shards if shard.draining}
        return [
            pump.shard.lease.epoch for pump in self._pumps if pump.shard.lease.epoch in draining or pump.shard.is_over
        ]

    async def _announce(self, survey: Survey, me: Peer, *, asks: bool) -> None:
        """Tell the others what this worker runs, and that it asks for some of their shards, as long as it does."""
        announced = next((peer for peer in survey.peers if peer.id == me.id), None)
        if announced is not None and (asks or announced.asks or announced.subscriptions != me.subscriptions):
            await self._leases.announce(sorted(me.subscriptions), asks=asks)
            if asks and not announced.asks:
                # Notify on the first request only; the others survey at once.
                await self._notifier.notify_leases()

    def _unclaimed(self, shards: Mapping[ShardKey, SurveyedShard], me: Peer) -> list[ShardKey]:
        """Shards that are free for long, whoever should have them."""
        now = time.monotonic()
        self._free_since = {key: self._free_since.get(key, now) for key, shard in shards.items() if shard.free}
        return [
            key for key, since in self._free_since.items() if now - since > _UNCLAIMED and key[0] in me.subscriptions
        ]

    async def _claim(self, keys: Sequence[ShardKey]) -> None:
        lapses = self._pumps.tenure.lapses
        for lease in await self._leases.claim(list(dict.fromkeys(keys))) if keys else ():
            if lease.position > lease.head and (problem := await self._overview.find_mistrust()):
                raise SchemaError(problem)
            registration = self._registrations.get(lease.subscription)
            if registration is None or registration.changing:
                # Unsubscribed or altered at this moment.
                await self._leases.release([lease.epoch])
            else:
                await self._begin(lease, registration, lapses)

    async def _begin(self, lease: Lease, registration: Registration, lapses: int) -> None:
        """A pump runs for the lease. `lapses`: of the tenure, when the lease was asked for."""
        carried = await self._pumps.find_carried(lease)
        if (
            lapses != self._pumps.tenure.lapses
            or registration.changing
            or self._registrations.get(registration.name) is not registration
        ):
            # The process froze, or was cut off, while the answer was on its way, so others may own the shard by now. If
            # this worker still does, the next round releases it and claims it again.
            self._rounds.wake()
        else:
            # It may have been paused since the survey, or have registered after it.
            self._pauses.obey_one(registration, lease.pause)
            self._pumps.start(lease, registration, carried)
