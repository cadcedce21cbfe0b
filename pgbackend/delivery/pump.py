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

The promises: no more is in flight than the window allows; no dispatch starts while the lease is in doubt; no
transaction is open while a dispatcher runs (I4).
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from time import monotonic

from pgbackend import facts
from pgbackend.delivery.alarm import Alarm
from pgbackend.delivery.backlog import Backlog, Carried
from pgbackend.delivery.care import EXAMINE_AGAIN, LEASE_POLL, Care, WorkerCare
from pgbackend.delivery.deliverers import Deliverer, Deliverers
from pgbackend.delivery.delivery import Delivery, Origin
from pgbackend.delivery.due import Due, DueRequest
from pgbackend.delivery.ending import until_settled
from pgbackend.delivery.feed import Feed
from pgbackend.delivery.gate import Gate
from pgbackend.delivery.outcomes import Buried, Finished, Skipped
from pgbackend.delivery.registration import Registration
from pgbackend.delivery.settlement import Settlement
from pgbackend.delivery.shard import Mark, Shard
from pgbackend.log.log import Log
from pgbackend.log.ranges import RangeSet
from pgbackend.log.tail import Cursor

_BREATH = 0.02
"""Seconds after which a deliverer lets the event loop's other tasks run."""


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
    ) -> None:
        """`carried`: what a former owner of an ordered shard left behind."""
        order = shard.lease.order
        self.registration = registration
        self.shard = shard
        self.gate = Gate()
        self.due = Due(shard)
        self.care = Care(shard, registration, self.gate, care)
        self._backlog = Backlog(order=order, carried=carried)
        self._settlement = Settlement(shard, registration, self._backlog, self.due, self.care)
        self._feed = Feed(
            registration, shard, cursor, self._backlog, is_wanted=self._settlement.is_wanted, wake=self._stir
        )
        self._deliverers = Deliverers(
            shard.name, registration, self.gate, self._backlog, single=order == "strict", step=self._step
        )
        self._log = log
        self._reading: list[asyncio.Task[None]] = []
        self._alarm = Alarm(self._promote)
        """Rings when the next event of the backlog is due."""
        self._probe_turn = asyncio.Lock()

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
        """The lease is gone: start no dispatch and commit nothing. What is at work may end."""
        self.shard.lose()
        self.gate.stop()

    def resume(self) -> None:
        """End one hold of the gate."""
        if self.gate.release():
            self._deliverers.wake_all()

    def reconfigured(self) -> int:
        """Go on as the registration says now. Returns how many waiting events its filter refuses."""
        if self.gate.stopped:
            return 0
        refused = self._drop_refused()
        self._deliverers.resize()
        self._stir()
        return refused

    def _drop_refused(self) -> int:
        registration, shard, backlog = self.registration, self.shard, self._backlog
        if registration.filter is None or shard.lost:
            return 0
        parked, removed = backlog.sift(self._settlement.is_wanted)
        for event in parked:
            for position in backlog.forget_carried(event.position, event.position + 1):
                shard.record(Finished(position=position))
            shard.window.settle(event.position)
        for delivery in removed:
            self._settlement.drop(delivery)
        shard.changed()
        return len(parked) + len(removed)

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
        # What is read from now on is for a later end, should there be one.
        for task in self._reading:
            task.cancel()
        self._feed.close()
        self.shard.finish()
        facts.emit("subscription complete", subscription=self.registration.name, shard=self.shard.lease.shard)

    # What it says of itself.

    def state(self) -> str:
        """What it is doing, in a few words, for `status()`."""
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
        """What it takes now of the failed events that are due; None when it has no room, or is held or paused."""
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

    def committed(self, mark: Mark) -> None:
        """The mark is durable."""
        self.due.committed(mark)
        for outcome in mark.outcomes.values():
            if isinstance(outcome, Buried):
                facts.emit(
                    "event buried", level=logging.WARNING, subscription=self.registration.name,
                    position=outcome.position, event_id=outcome.event_id, event_source=outcome.event_source,
                    error=outcome.failure.error,
                )  # fmt: skip

    # Delivering.

    def _stir(self) -> None:
        """After any change: wake a deliverer and the feed as need be, and set the alarm for the next due event."""
        due = self._backlog.next_due()
        if due is not None and not self.gate.stopped:
            self._alarm.set(due)
        self._deliverers.wake()
        self._feed.make_room()

    def _promote(self) -> None:
        self._backlog.promote(monotonic())
        self._stir()

    async def _step(self, deliverer: Deliverer) -> None:
        """Do what is most urgent, or wait until there is something to do."""
        backlog, health = self._backlog, self.registration.health
        if self.gate.halted or health.paused is not None or not backlog:
            await self._deliverers.idle()
        elif not self.shard.may_dispatch():
            # In doubt, not lost: the heartbeat says which within moments.
            await asyncio.sleep(LEASE_POLL)
        elif backlog.given_up:
            await self._attempt(deliverer, backlog.given_up.popleft())
        elif health.down:
            await self._probe(deliverer)
        elif backlog.retries:
            await self._attempt(deliverer, backlog.retries.popleft())
        elif self.care.active:
            await self._attempt(deliverer, Delivery(backlog.ready.popleft()))
        else:
            await self._deliver_ready(deliverer)

    async def _deliver_ready(self, deliverer: Deliverer) -> None:
        """The straight path: dispatch what is ready until something else is more urgent."""
        gate, shard, window, tenure, feed = self.gate, self.shard, self.shard.window, self.shard.tenure, self._feed
        backlog, ready = self._backlog, self._backlog.ready
        retries, given_up = backlog.retries, backlog.given_up
        health, dispatch, ordered = self.registration.health, self.registration.dispatch, shard.lease.order != "none"
        if len(ready) > 1:
            # Each wakes the next: all are at work when dispatching takes time, and one when it does not.
            self._deliverers.wake()
        breath = monotonic() + _BREATH
        while (
            ready
            and not (retries or given_up or health.held or gate.halted or deliverer.spent)
            and (now := monotonic()) < tenure.valid_until
        ):
            if now > breath:
                # A dispatcher that never waits must not keep commits and other subscriptions waiting.
                await asyncio.sleep(0)
                breath = monotonic() + _BREATH
                continue
            event = ready.popleft()
            position = event.position
            if (error := await deliverer.dispatch(position, event, dispatch)) is not None:
                self._settlement.failed(Delivery(event), error, health)
                self._stir()
                continue
            if not shard.lost:
                window.settle(position)
                if not shard.is_queued:
                    shard.changed()
            if health.failing:
                self._settlement.succeed(health)
            if ordered:
                backlog.leave(event)
                if backlog.next_due() is not None:
                    self._stir()
            if feed.waits:
                feed.make_room()

    async def _attempt(self, deliverer: Deliverer, delivery: Delivery, *, probe: bool = False) -> None:
        """Dispatch one delivery apart from the straight path: a retry, a probe, a dead letter, or with care."""
        self._deliverers.wake()
        try:
            if self.care.covers(delivery):
                await self._dispatch_with_care(deliverer, delivery, probe=probe)
            else:
                await self._dispatch(deliverer, delivery, probe=probe)
        finally:
            self._stir()

    async def _probe(self, deliverer: Deliverer) -> None:
        """While the target is down: one event at a time, when its health allows it."""
        health, backlog, gate = self.registration.health, self._backlog, self.gate
        async with self._probe_turn:
            while health.down and health.paused is None and not (gate.halted or backlog.given_up):
                left = health.next_probe - monotonic()
                if left <= 0 and not health.probing:
                    break
                # Look often: another shard's probe may take long, and given-up events need not wait for it.
                await asyncio.sleep(min(left, LEASE_POLL) if left > 0 else LEASE_POLL)
            if not health.down or health.paused is not None or gate.halted or backlog.given_up:
                return
            if not self.shard.may_dispatch():
                return
            health.probing = True
            try:
                # Retries and new events in turn.
                if (delivery := backlog.take_probe(retry=health.probes % 2 == 1)) is not None:
                    await self._attempt(deliverer, delivery, probe=True)
            finally:
                health.probing = False

    async def _dispatch_with_care(self, deliverer: Deliverer, delivery: Delivery, *, probe: bool) -> None:
        """Dispatch a delivery alone, once it is durable that the attempt starts."""
        settlement, health = self._settlement, self.registration.health
        try:
            if delivery.suspect:
                examined = await self.care.examine(delivery)
                if examined is None:
                    self._backlog.put_later(delivery, monotonic() + EXAMINE_AGAIN)
                    return
                delivery = examined
            async with self.care.alone(delivery) as is_alone:
                if self.gate.stopped or settlement.drop_if_unwanted(delivery, health):
                    return
                if not is_alone or self._is_held(delivery, probe=probe):
                    settlement.put_back(delivery)
                    return
                if delivery.suspect and delivery.event.attempt > self.registration.retry.attempts:
                    settlement.exhaust(delivery, self.registration.health)
                    return
                # At work from here on: a drain waits for it.
                self.gate.begin(delivery.slot, delivery.event)
                try:
                    delivery = settlement.hand_over(delivery)
                    self._feed.make_room()
                    if await self.care.record_start(delivery):
                        if not settlement.drop_if_unwanted(delivery, health):
                            await self._dispatch(deliverer, delivery, probe=probe)
                        self.care.survived()
                        if self.shard.lost:
                            await self.care.report_survival(delivery)
                finally:
                    self.gate.end(delivery.slot)
        except asyncio.CancelledError:
            # The process or the lease ends, and nobody can say that this event did it.
            settlement.put_back(delivery)
            raise

    def _is_held(self, delivery: Delivery, *, probe: bool) -> bool:
        """Whether a delivery that was taken before a wait may not be dispatched any more."""
        health = self.registration.health
        return self.gate.halted or health.paused is not None or (health.down and not (probe or delivery.given_up))

    async def _dispatch(self, deliverer: Deliverer, delivery: Delivery, *, probe: bool) -> None:
        """Ask the filter if that is still to be done, call the dispatcher, and settle what comes of it."""
        registration, settlement, event = self.registration, self._settlement, delivery.event
        health = registration.health
        dispatch = registration.dispatch_dead if delivery.given_up else registration.dispatch
        if dispatch is None:
            settlement.bury_for_want_of_dispatcher(delivery)
            return
        if settlement.is_undecided(delivery):
            try:
                wanted = registration.matches(event)
            except BaseException as error:  # noqa: BLE001 - a user's predicate may raise anything
                settlement.failed(delivery, error, health, probe=probe, asked=False)
                return
            if not wanted:
                settlement.drop(delivery)
                return
            self._backlog.undecided.discard(event.position)
        raised = await deliverer.dispatch(delivery.slot, event, dispatch)
        if raised is None:
            settlement.handled(delivery, health)
        else:
            settlement.failed(delivery, raised, health, probe=probe)
