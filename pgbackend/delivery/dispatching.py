"""Dispatching: what a deliverer of a shard does next.

    most urgent first: given-up events ▶ a probe, if the target is down ▶ retries ▶ what is ready

The promises: no dispatch starts while the shard is held, the target paused, or the lease in doubt; no transaction is
open while a dispatcher runs (I4), unless the subscription is transactional. `groups.py` dispatches batches and those.
"""

import asyncio
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING

from pgbackend.delivery.backlog import Backlog
from pgbackend.delivery.care import EXAMINE_AGAIN, LEASE_POLL, Care
from pgbackend.delivery.deliverers import Deliverer
from pgbackend.delivery.delivery import Delivery
from pgbackend.delivery.feed import Feed
from pgbackend.delivery.gate import Gate
from pgbackend.delivery.groups import Groups
from pgbackend.delivery.registration import Registration
from pgbackend.delivery.settlement import Settlement
from pgbackend.delivery.shard import Shard

if TYPE_CHECKING:
    from pgbackend.delivery.health import TargetHealth

_BREATH = 0.02
"""Seconds after which a deliverer lets the event loop's other tasks run."""


class Dispatching:
    """Takes deliveries from the backlog, and hands what comes of them to the settlement."""

    def __init__(
        self,
        registration: Registration,
        shard: Shard,
        gate: Gate,
        backlog: Backlog,
        care: Care,
        settlement: Settlement,
        feed: Feed,
        groups: Groups,
        *,
        stir: Callable[[], None],
    ) -> None:
        """`stir`: called when something in the backlog or the window may have changed."""
        self._registration = registration
        self._shard = shard
        self._gate = gate
        self._backlog = backlog
        self._care = care
        self._settlement = settlement
        self._feed = feed
        self._groups = groups
        self._stir = stir
        self._probed: TargetHealth | None = None
        """The health of the target that a deliverer is about to probe, or probes."""

    async def step(self, deliverer: Deliverer) -> None:
        """Do what is most urgent, or wait until there is something to do."""
        backlog, health = self._backlog, self._registration.health
        if self._gate.halted or health.paused is not None or not backlog:
            await deliverer.idle()
        elif not self._shard.may_dispatch():
            # In doubt, not lost: the heartbeat says which within moments.
            await asyncio.sleep(LEASE_POLL)
        elif backlog.given_up:
            await self._attempt(deliverer, backlog.given_up.popleft())
        elif health.down:
            await self._probe(deliverer)
        elif backlog.retries:
            await self._attempt(deliverer, backlog.retries.popleft())
        elif self._care.active:
            await self._attempt(deliverer, Delivery(backlog.ready.popleft()))
        elif self._registration.grouped:
            await self._groups.deliver_ready(deliverer)
        else:
            await self._deliver_ready(deliverer)

    async def _deliver_ready(self, deliverer: Deliverer) -> None:
        """The straight path: dispatch what is ready until something else is more urgent."""
        gate, shard, window, tenure, feed = self._gate, self._shard, self._shard.window, self._shard.tenure, self._feed
        backlog, ready = self._backlog, self._backlog.ready
        retries, given_up, settle = backlog.retries, backlog.given_up, window.settler()
        health, dispatch, ordered = self._registration.health, self._registration.dispatch, shard.lease.order != "none"
        if len(ready) > 1:
            # Each wakes the next: all are at work when dispatching takes time, and one when it does not.
            deliverer.wake_next()
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
                settle(position)
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
        deliverer.wake_next()
        try:
            if self._care.covers(delivery):
                await self._dispatch_with_care(deliverer, delivery, probe=probe)
            else:
                await self._dispatch(deliverer, delivery, probe=probe)
        finally:
            self._stir()

    async def _probe(self, deliverer: Deliverer) -> None:
        """While the target is down: one event at a time, when its health allows it."""
        health, backlog, gate = self._registration.health, self._backlog, self._gate
        if self._probed is health:
            # Not waiting for its turn: another target may take this one's place before the probe ends.
            await deliverer.idle()
            return
        self._probed = health
        try:
            while health.down and health.paused is None and not (gate.halted or backlog.given_up):
                left = health.next_probe - monotonic()
                if left <= 0 and not health.probing:
                    break
                # Look often: another shard's probe may take long, and given-up events need not wait for it.
                await asyncio.sleep(min(left, LEASE_POLL) if left > 0 else LEASE_POLL)
            if not health.down or health.paused is not None or gate.halted or backlog.given_up:
                return
            if not self._shard.may_dispatch():
                return
            health.probing = True
            try:
                # Retries and new events in turn.
                if (delivery := backlog.take_probe(retry=health.probes % 2 == 1)) is not None:
                    await self._attempt(deliverer, delivery, probe=True)
            finally:
                health.probing = False
        finally:
            if self._probed is health:
                self._probed = None

    async def _dispatch_with_care(self, deliverer: Deliverer, delivery: Delivery, *, probe: bool) -> None:
        """Dispatch a delivery alone, once it is durable that the attempt starts."""
        settlement, health = self._settlement, self._registration.health
        try:
            async with self._care.alone(delivery) as is_alone:
                if delivery.suspect and not self._gate.stopped:
                    # Here, and not before the wait, in which the worker may report.
                    examined = await self._care.examine(delivery) if is_alone else None
                    if examined is None:
                        # Other events need this deliverer meanwhile.
                        self._backlog.put_later(delivery, monotonic() + EXAMINE_AGAIN)
                        return
                    delivery = examined
                if self._gate.stopped or settlement.drop_if_unwanted(delivery, health):
                    return
                if not is_alone or self._is_held(delivery, probe=probe):
                    settlement.put_back(delivery)
                    return
                if delivery.suspect and delivery.event.attempt > self._registration.retry.attempts:
                    settlement.exhaust(delivery, self._registration.health)
                    return
                # At work from here on: a drain waits for it.
                self._gate.begin(delivery.slot, delivery.event)
                try:
                    delivery = settlement.hand_over(delivery)
                    self._feed.make_room()
                    if await self._care.record_start(delivery):
                        if self._registration.health.paused is not None:
                            # While PostgreSQL recorded the start.
                            settlement.put_back(delivery)
                            return
                        if not settlement.drop_if_unwanted(delivery, health):
                            await self._dispatch(deliverer, delivery, probe=probe)
                        self._care.survived()
                finally:
                    self._gate.end(delivery.slot)
        except asyncio.CancelledError:
            # The process or the lease ends, and nobody can say that this event did it.
            settlement.put_back(delivery)
            raise

    def _is_held(self, delivery: Delivery, *, probe: bool) -> bool:
        """Whether a delivery that was taken before a wait may not be dispatched any more."""
        health = self._registration.health
        return self._gate.halted or health.paused is not None or (health.down and not (probe or delivery.given_up))

    async def _dispatch(self, deliverer: Deliverer, delivery: Delivery, *, probe: bool) -> None:
        """Ask the filter if that is still to be done, call the dispatcher, and settle what comes of it."""
        registration, settlement, event = self._registration, self._settlement, delivery.event
        health = registration.health
        dispatch = registration.dispatch_dead if delivery.given_up else registration.dispatch
        if dispatch is None:
            settlement.bury_for_want_of_dispatcher(delivery)
            return
        if settlement.is_undecided(delivery):
            try:
                wanted = registration.matches(event)
            except BaseException as error:  # noqa: BLE001 - a user's predicate may raise anything
                settlement.failed(delivery, error, health, probe=probe, at_fault=False)
                return
            if not wanted:
                settlement.drop(delivery)
                return
            self._backlog.undecided.discard(event.position)
        if registration.grouped:
            await self._groups.deliver(deliverer, delivery, dispatch, probe=probe)
            return
        raised = await deliverer.dispatch(delivery.slot, event, dispatch)
        if raised is None:
            settlement.handled(delivery, health)
        else:
            settlement.failed(delivery, raised, health, probe=probe)
