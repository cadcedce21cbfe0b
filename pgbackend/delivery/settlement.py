"""Settlement: what becomes of an event of a shard after its dispatch, or instead of one.

Everything that a deliverer learns of an event passes here: `decide.py` decides, this module logs, and has the outcome
committed. Its promise: a position is settled in the same step of the event loop in which what became of the event is
recorded, so that one commit carries both (I7).
"""

import logging
from dataclasses import replace
from time import monotonic

from pgbackend import facts
from pgbackend.codec.event import Event
from pgbackend.delivery.backlog import Backlog
from pgbackend.delivery.care import Care, ProcessDied
from pgbackend.delivery.decide import Decision, PutBack, ToDeadLetter, TryAgain, buried, decide, outcome_of
from pgbackend.delivery.delivery import Delivery, Origin
from pgbackend.delivery.due import Due
from pgbackend.delivery.health import TargetHealth
from pgbackend.delivery.outcomes import Finished, LetterDelivered, Outcome, Scheduled
from pgbackend.delivery.registration import Registration
from pgbackend.delivery.shard import Shard
from pgbackend.log.notify import Wakeup
from pgbackend.thrown import Thrown, leave_process


class Settlement:
    """Takes deliveries in, and gives outcomes and settled positions out."""

    def __init__(
        self, shard: Shard, registration: Registration, backlog: Backlog, due: Due, care: Care, rounds: Wakeup
    ) -> None:
        self._shard = shard
        self._registration = registration
        self._backlog = backlog
        self._due = due
        self._care = care
        self._rounds = rounds
        self._ordered = shard.lease.order != "none"
        self._strict = shard.lease.order == "strict"

    def is_wanted(self, event: Event) -> bool:
        """Whether the filter lets the event through, as far as is known by now: see `Registration.passes()`."""
        registration, undecided = self._registration, self._backlog.undecided
        if self._care.active and registration.filter is not None:
            # The filter may be what kills the process: ask it once the start of the attempt is recorded.
            undecided.add(event.position)
            return True
        return registration.passes(event, undecided)

    def is_undecided(self, delivery: Delivery) -> bool:
        """Whether the filter must be asked before the dispatch. A dead letter and a given-up event passed it once."""
        return delivery.letter is None and not delivery.given_up and delivery.event.position in self._backlog.undecided

    # The ends of a delivery.

    def handled(self, delivery: Delivery, health: TargetHealth) -> None:
        """Its dispatcher returned. `health`: of the target that it had."""
        if not delivery.given_up:
            self.succeed(health)
        if delivery.letter is not None:
            self.finish(delivery, LetterDelivered(letter=delivery.letter))
        else:
            self.drop(delivery)

    def handled_at_once(self, event: Event, health: TargetHealth) -> None:
        """Its first dispatch handled an event of the log, so there is no row to delete. Five times as fast in lanes."""
        self.succeed(health)
        if not self._shard.lost:
            self._backlog.leave(event)
            self._shard.window.settle(event.position)
            self._shard.changed()

    def committed(self, delivery: Delivery, health: TargetHealth) -> None:
        """Its dispatcher returned, and its outcome is committed with the dispatcher's transaction."""
        if not delivery.given_up:
            self.succeed(health)
        if delivery.origin is Origin.LOG:
            self._backlog.leave(delivery.event)
        else:
            self._backlog.undecided.discard(delivery.event.position)

    def succeed(self, health: TargetHealth) -> None:
        """The target handled an event."""
        if health.succeeded():
            facts.emit("target is up", level=logging.WARNING, subscription=self._registration.name)

    def failed(
        self,
        delivery: Delivery,
        error: BaseException,
        health: TargetHealth,
        *,
        probe: bool = False,
        at_fault: bool = True,
    ) -> None:
        """Its dispatcher raised `error`, or its filter. `at_fault`: whether the target may be the reason.

        SystemExit and KeyboardInterrupt end the process next.
        """
        event, registration = delivery.event, self._registration
        if leave_process(error, subscription=registration.name, position=event.position):
            self._care.process_ends(delivery)
        thrown = Thrown.of(error)
        decision = decide(
            delivery,
            thrown,
            registration.retry,
            # Reconfigured while it was at work: the filter of now counts.
            wanted=not health.retired or delivery.letter is not None or self.is_wanted(event),
            has_dead_letter_dispatcher=registration.dispatch_dead is not None,
        )
        if isinstance(decision, PutBack):
            self.put_back(delivery)
            self.pause(event, thrown, health)
            return
        self._log(event, thrown, decision)
        # Under order="strict" nothing can be probed past the event that fails, so every attempt counts.
        counts = at_fault and not (delivery.given_up or thrown.final or self._strict)
        if counts and health.failed(event.position, now=monotonic(), probe=probe):
            facts.emit("target is down", level=logging.WARNING, subscription=registration.name, error=thrown.error)
        outcome = outcome_of(delivery, decision, error=thrown.error, details=thrown.details)
        if self._ordered and isinstance(outcome, Scheduled):
            # Only the count and the time are durable. The position stays pending, and its lane waits.
            self._shard.record(outcome)
            following = event.with_delivery(attempt=outcome.attempt + 1, failure=outcome.failure)
            self._backlog.put_later(Delivery(following), monotonic() + outcome.delay)
        else:
            self.finish(delivery, outcome)

    def drop(self, delivery: Delivery) -> None:
        """Nothing is to be done about the event any more."""
        self.finish(delivery, Finished(position=delivery.event.position))

    def drop_if_unwanted(self, delivery: Delivery, health: TargetHealth) -> bool:
        """Drop a delivery that was reconfigured away since its target had this health; whether it was."""
        if health is self._registration.health or delivery.letter is not None or self.is_wanted(delivery.event):
            return False
        self.drop(delivery)
        return True

    def drop_refused(self) -> int:
        """Drop the waiting events that the filter refuses now. Returns how many."""
        registration, shard, backlog = self._registration, self._shard, self._backlog
        if registration.filter is None or shard.lost:
            return 0
        parked, removed = backlog.sift(self.is_wanted)
        for event in parked:
            for position in backlog.forget_carried(event.position, event.position + 1):
                shard.record(Finished(position=position))
            shard.window.settle(event.position)
        for delivery in removed:
            self.drop(delivery)
        shard.changed()
        return len(parked) + len(removed)

    def bury_for_want_of_dispatcher(self, delivery: Delivery) -> None:
        """The event was on its way to a dead-letter dispatcher that this process does not have."""
        assert delivery.event.failure is not None  # noqa: S101 - only given-up events get here
        self.finish(delivery, buried(delivery, delivery.event.failure))

    def exhaust(self, delivery: Delivery, health: TargetHealth) -> None:
        """A suspect has no attempt left: nobody ever reported how its last one ended."""
        attempts = self._registration.retry.attempts
        event = delivery.event.with_delivery(attempt=attempts)
        self.failed(replace(delivery, event=event), ProcessDied(), health)

    def put_back(self, delivery: Delivery) -> None:
        """The delivery waits again as it did before it was taken: what was done was no attempt."""
        if delivery.recorded:
            self._care.take_back(delivery)
            if delivery.origin is not Origin.LOG and not delivery.suspect:
                # With that commit it is found among what is due.
                return
        self._backlog.put_back(replace(delivery, recorded=False))

    def hand_over(self, delivery: Delivery) -> Delivery:
        """The delivery leaves the window for redelivery, where its recorded start counts, unless its lane needs it."""
        if not self._ordered and delivery.origin is Origin.LOG:
            self._due.begin(delivery.event)
            self._shard.window.settle(delivery.event.position)
            return replace(delivery, origin=Origin.REDELIVERY, recorded=True)
        return replace(delivery, recorded=True)

    def finish(self, delivery: Delivery, outcome: Outcome) -> None:
        """The delivery leaves the shard's care; its outcome is committed with the offset."""
        event, shard = delivery.event, self._shard
        if shard.lost:
            return
        if delivery.origin is not Origin.LOG:
            self._backlog.undecided.discard(event.position)
            shard.record(outcome)
            return
        # An event that never failed has no row to delete, except perhaps a former owner's in ordered modes.
        if self._ordered or not isinstance(outcome, Finished):
            shard.record(outcome)
        if isinstance(outcome, Scheduled):
            self._due.begin(event)
        self._backlog.leave(event)
        shard.window.settle(event.position)
        shard.changed()

    def pause(self, event: Event, signal: Thrown, health: TargetHealth) -> None:
        """Dispatch nothing more to a target that wants nothing more. The next round stores that."""
        if not health.retired and self._registration.pause(event, signal):
            self._rounds.wake()

    def _log(self, event: Event, thrown: Thrown, decision: Decision) -> None:
        """Name the event, its error, and what follows."""
        subscription = self._registration.name
        facts.emit(
            "dispatch failed",
            subscription=subscription, position=event.position, event_id=event.id, event_source=event.source,
            attempt=event.attempt, error=thrown.error,
        )  # fmt: skip
        if isinstance(decision, TryAgain):
            facts.emit(
                "retry scheduled", level=logging.DEBUG,
                subscription=subscription, position=event.position, attempt=event.attempt, delay=decision.delay,
            )  # fmt: skip
        elif isinstance(decision, ToDeadLetter):
            facts.emit(
                "event given up", level=logging.WARNING, subscription=subscription, position=event.position,
                event_id=event.id, event_source=event.source, error=thrown.error,
            )  # fmt: skip
