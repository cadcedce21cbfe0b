"""The pump of a shard: events in from its cursor, through the dispatcher, out as settled positions.

    read ──another shard, before the start, or refused by the filter──▶ skipped
     │  └──behind the end──▶ pending, until somebody alters the end
     │ the window has room
     ▼
    backlog ──a deliverer takes it──▶ at work ──returns──▶ settled
     ▲                                   │ raises
     │                                   ├──attempts left──▶ order "none": a row of `redeliveries`, settled here
     │                                   │                   ordered: waits in the backlog, its lane with it
     ├─────────when due────────◀─────────┤
     │                                   ├──none left, or Reject──▶ the dead-letter dispatcher's, else a dead letter
     ├─────────Pause───────────◀─────────┤
                                         └──the process dies──▶ the next owner's, see care.py

Each arrow has a module: feed.py reads, backlog.py keeps what waits, deliverers.py and dispatching.py dispatch, and
settlement.py settles. The pump wires them for one shard. Its promise: no more is in flight than the window allows.
"""

import asyncio
import logging
from collections.abc import Collection, Mapping, Sequence
from time import monotonic

from pgbackend import facts
from pgbackend.delivery.alarm import Alarm
from pgbackend.delivery.backlog import Backlog, Carried
from pgbackend.delivery.care import Care, WorkerCare
from pgbackend.delivery.deliverers import Deliverers
from pgbackend.delivery.delivery import Delivery, Origin
from pgbackend.delivery.dispatching import Dispatching
from pgbackend.delivery.due import Due, DueRequest
from pgbackend.delivery.ending import until_settled
from pgbackend.delivery.feed import Feed
from pgbackend.delivery.gate import Gate
from pgbackend.delivery.groups import Groups
from pgbackend.delivery.outcomes import Buried, Finished, Skipped
from pgbackend.delivery.registration import Registration
from pgbackend.delivery.settlement import Settlement
from pgbackend.delivery.shard import Mark, Shard
from pgbackend.delivery.transactions import Transactions
from pgbackend.log.log import Log
from pgbackend.log.notify import Wakeup
from pgbackend.log.ranges import RangeSet
from pgbackend.log.tail import Cursor


class Pump:
    """Delivers one shard until it is cancelled or its lease is lost."""

    def __init__(
        self,
        *,
        registration: Registration,
        shard: Shard,
        cursor: Cursor,
        log: Log,
        carried: Mapping[int, Carried],
        care: WorkerCare,
        transactions: Transactions,
        rounds: Wakeup,
    ) -> None:
        """`carried`: what a former owner of an ordered shard left behind. `rounds`: woken to store a pause."""
        order = shard.lease.order
        self.registration = registration
        self.shard = shard
        self.gate = Gate()
        self.due = Due(shard)
        self.care = Care(shard, registration, self.gate, care)
        self._backlog = Backlog(order=order, carried=carried)
        self._settlement = Settlement(shard, registration, self._backlog, self.due, self.care, rounds)
        self._feed = Feed(
            registration, shard, cursor, self._backlog, is_wanted=self._settlement.is_wanted, wake=self._stir
        )
        self._transactions = transactions
        self._groups = Groups(
            registration, shard, self.gate, self._backlog, self._settlement, self._feed, transactions, stir=self._stir
        )
        dispatching = Dispatching(
            registration, shard, self.gate, self._backlog, self.care, self._settlement, self._feed, self._groups,
            stir=self._stir,
        )  # fmt: skip
        self._deliverers = Deliverers(
            shard.name, registration, self.gate, self._backlog, single=order == "strict", step=dispatching.step
        )
        self._log = log
        self._reading: list[asyncio.Task[None]] = []
        self._alarm = Alarm(self._promote)
        """Rings when the next event of the backlog is due."""

    # A pump's life.

    async def run(self) -> None:
        """Deliver until cancelled."""
        if self.gate.stopped:
            return
        name, lease = self.shard.name, self.shard.lease
        async with asyncio.TaskGroup() as tasks:
            if not lease.complete:
                self._reading.append(tasks.create_task(self._feed.run(), name=f"feed {name}"))
                bounded = lease.end_position is not None or lease.end_at is not None
                # A shard that ends for good does not speak for those that take over from it.
                if bounded and lease.until is None:
                    tasks.create_task(self._complete(), name=f"complete {name}")
            try:
                await self._deliverers.run()
            finally:
                self._stop()
                await self._transactions.close()

    async def drain(self, timeout: float) -> None:
        """Start no dispatch; return once none runs, after `timeout` seconds at the latest.

        Cancelling the pump then cancels async dispatchers that still run. Threads cannot be cancelled: the log names
        them.
        """
        self._stop()
        if not await self.gate.until_quiet(timeout):
            self.report_slow("drain timed out")
        self.end()

    def end(self) -> None:
        """Start no dispatch, and leave what waits here to the shard's next owner. Call it once nothing is at work."""
        self._stop()
        self._feed.close()
        if self.shard.is_over:
            # The shards that take over find in its offset what is left.
            self.shard.seal()

    def lose(self) -> None:
        """The lease is gone: start no dispatch and commit nothing. Running handlers may end."""
        self.shard.lose()
        self.gate.stop()

    def resume(self) -> None:
        """End one hold of the gate."""
        if self.gate.release():
            self._deliverers.wake_all()

    def heed(self) -> None:
        """The subscription was paused, or goes on: each deliverer looks again."""
        if not self.gate.stopped:
            self._deliverers.wake_all()
            self._stir()

    def reconfigured(self) -> int:
        """Go on as the registration says now. Returns how many waiting events its filter refuses."""
        if self.gate.stopped:
            return 0
        refused = self._settlement.drop_refused()
        self._deliverers.resize()
        self._stir()
        return refused

    def _stop(self) -> None:
        """Start no dispatch, read nothing, and forget what waits."""
        self.gate.stop()
        self._backlog.clear()
        self._alarm.cancel()
        for task in self._reading:
            task.cancel()

    async def _complete(self) -> None:
        """Once the subscription's end is reached, have that committed."""
        await until_settled(self.shard, self._log)
        # Events behind the end are read again if somebody alters it.
        for task in self._reading:
            task.cancel()
        self._feed.close()
        self.shard.finish()
        facts.emit("subscription complete", subscription=self.registration.name, shard=self.shard.lease.shard)

    # Its state, for others.

    def state(self) -> str:
        """Its state in a few words, for `status()`."""
        if self.shard.complete:
            return "complete"
        health = self.registration.health
        if health.paused is not None:
            return f"paused: {health.paused}"
        if health.down:
            return "target down"
        if self._feed.blocked:
            return "waiting for an open transaction"
        ordered = self.shard.lease.order != "none"
        if ordered and self._feed.waits and not (self._backlog or self.gate.active):
            return "waiting for failed events: the window is full behind them"
        return "running"

    def report_slow(self, fact: str) -> None:
        """Name in the log what is still at work."""
        facts.emit(
            fact,
            level=logging.WARNING,
            shard=self.shard.name,
            events=[event.id for event in self.gate.at_work()][:10],
            threads=self.registration.threads is not None,
        )

    # Failed events that are due again.

    def request_due(self) -> DueRequest | None:
        """Its request for failed events that are due; None when it has no room, or is held or paused."""
        if self.gate.halted or self.shard.lost:
            return None
        return self.due.request(self.registration.health, dead_letters=self.registration.dispatch_dead is not None)

    def take_due(self, delivery: Delivery) -> None:
        """Take a failed event that is due, or drop it if the filter refuses it now."""
        is_letter = delivery.origin is Origin.LETTER
        if self.gate.stopped or (not is_letter and delivery.event.position in self.due):
            return
        self.due.begin(delivery.event, letter=delivery.letter)
        if is_letter or self._settlement.is_wanted(delivery.event):
            self._backlog.put(delivery)
            self._stir()
        else:
            self._settlement.drop(delivery)

    def skip_due(self, positions: Sequence[int]) -> None:
        """Skip failed events whose rows the log lost."""
        fresh = [position for position in positions if position not in self.due]
        if self.gate.stopped or self.shard.lost:
            return
        for position in fresh:
            self.due.skip(position)
            self.shard.record(Finished(position=position))
        for lower, upper in RangeSet.of(fresh):
            self.shard.record(Skipped(lower=lower, upper=upper))

    def waiting(self) -> dict[int, int]:
        """By position: the attempts made of each failed event whose time this pump knows by heart."""
        return self._backlog.waiting()

    def hasten(self, positions: Collection[int]) -> None:
        """Try these failed events again now."""
        if positions and not self.gate.stopped:
            self._backlog.hasten(positions, monotonic())
            self._stir()

    def committed(self, mark: Mark) -> None:
        """The mark is durable."""
        self.due.committed(mark)
        self.care.committed(mark)
        for outcome in mark.outcomes.values():
            if isinstance(outcome, Buried):
                facts.emit(
                    "event buried", level=logging.WARNING, subscription=self.registration.name,
                    position=outcome.position, event_id=outcome.event_id, event_source=outcome.event_source,
                    error=outcome.failure.error,
                )  # fmt: skip

    def _stir(self) -> None:
        """After any change: wake a deliverer and the feed as need be, and set the alarm for the next due event."""
        due = self._backlog.next_due()
        if due is not None and not self.gate.stopped:
            self._alarm.set(due)
        self._groups.look()
        self._deliverers.wake()
        self._feed.make_room()

    def _promote(self) -> None:
        self._backlog.promote(monotonic())
        self._stir()
