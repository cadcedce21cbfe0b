"""Care: finds the event that kills the process which handles it, without harm to the others (I7).

A process that dies reports nothing. The next owner of its shard knows only that the owner died before it settled what
was open; the shard's `crashes` counts such deaths in a row. From the second one on, the shard is run with care: its
events are dispatched one at a time, alone among everything that this process runs with care, and the start of each
attempt is committed before the dispatch. If nobody reports the end, the next owner finds a suspect. A suspect is always
dispatched alone, and is given up when its attempts are used up, like any other event.

A process may also live and lose its lease or its server during an attempt, or before the outcome is committed. It then
reports that it lives, and the attempt does not count. So a suspect waits first: as long as the server has the worker's
connection, for a minute at most, because then the process is frozen; and without the connection for `lease_timeout`, in
which a worker can find its way back. That time starts when the attempt did, and again when the server was started, when
the shard was claimed, and when the connection was last seen. An attempt that ended with the server counts if the same
event was at work when three lives of the server in a row ended: an event may kill PostgreSQL.

Care ends after as many events as the former owner may have had open, or after a minute; twice as long with each further
crash. Slow events must not be dispatched one by one for hours, nor wait for another subscription's dispatcher that
hangs. The count of crashes ends when everything is settled that was open when the shard was claimed. A shard whose
owners died of something else is slower for a moment, no more.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from time import monotonic
from uuid import UUID

from pgbackend import facts
from pgbackend.delivery.decide import LONGEST_WAIT
from pgbackend.delivery.delivery import Delivery, next_attempt
from pgbackend.delivery.gate import Gate
from pgbackend.delivery.history import Step
from pgbackend.delivery.outcomes import LetterFailed, Outcome, OutcomeKey, Scheduled, outcome_key
from pgbackend.delivery.redelivery import Redelivery, Start
from pgbackend.delivery.registration import Registration
from pgbackend.delivery.shard import Mark, Shard
from pgbackend.errors import DatabaseError
from pgbackend.postgres.reconnect import GrowingDelay
from pgbackend.thrown import describe

LEASE_POLL = 0.05
"""Seconds between looks at whether the lease is certain again."""
EXAMINE_AGAIN = 1.0
"""Seconds until a suspect is looked at again."""
_SUSPICIOUS = 2
"""Crashes in a row. One alone is a deployment, a power cut, an operator's kill -9."""
_ENOUGH = 10.0
"""Seconds of care after which twice as many events as a shard has at work are enough: with slow ones, no more were."""
_LONGEST = 60.0
"""Seconds of care after the second crash. The next owner starts behind what was settled by then."""
_SETTLED_AFTER = 30.0
"""Seconds after the claim in which every retry that was due by then has come: they come within a second or two."""
_FROZEN = 60.0
"""Seconds for which a suspect waits for a process whose connection is open and which reports nothing."""


class ProcessDied(Exception):  # noqa: N818 - recorded for an event, never raised
    """The error of an attempt that started and whose end nobody reported."""

    def __init__(self) -> None:
        super().__init__("the process that was handling it ended without a word")


@dataclass(frozen=True, slots=True)
class WorkerCare:
    """The state that all shards of a worker share for dispatches with care."""

    worker: UUID
    redelivery: Redelivery
    commit: Callable[[], Awaitable[object]]
    """Commits at once."""
    grace: float
    """Seconds that a worker without a connection has to report before its attempt counts."""
    alone: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by the one dispatch with care of this process."""
    unreported: dict[tuple[int, OutcomeKey], Delivery] = field(default_factory=dict)
    """Attempts that may be on record as started, and whose end is not, by the epoch of their shard."""


class Care:
    """Whether a shard is run with care, for how long, and how a dispatch with care starts."""

    def __init__(self, shard: Shard, registration: Registration, gate: Gate, common: WorkerCare) -> None:
        self.active = shard.lease.crashes >= _SUSPICIOUS
        """Whether all events of the shard are dispatched with care."""
        self._shard = shard
        self._registration = registration
        self._gate = gate
        self._common = common
        self._longest = _LONGEST * 2.0 ** min(max(shard.lease.crashes - _SUSPICIOUS, 0), 10)
        self._dispatched = 0
        self._since = monotonic()
        self._connected_at: dict[int, float] = {}
        """When the connection of each suspect's worker was last seen, by the suspect's slot."""

    def covers(self, delivery: Delivery) -> bool:
        """Whether a delivery must be dispatched with care."""
        return self.active or delivery.suspect

    @asynccontextmanager
    async def alone(self, delivery: Delivery) -> AsyncIterator[bool]:
        """Wait until nothing else is dispatched with care. False if that took too long.

        Then a suspect must wait again, and other events need no care any more.
        """
        try:
            async with asyncio.timeout(EXAMINE_AGAIN if delivery.suspect else self._left()):
                await self._common.alone.acquire()
        except TimeoutError:
            if not delivery.suspect:
                self.active = False
            yield False
            return
        try:
            yield True
        finally:
            self._common.alone.release()

    async def examine(self, delivery: Delivery) -> Delivery | None:
        """A suspect as its worker's report leaves it; None while that worker may still report.

        Without a report it stays a suspect, and its last attempt counts.
        """
        try:
            start = await self._common.redelivery.find_start(self._shard.lease.subscription, delivery)
        except DatabaseError as error:
            facts.emit("suspect not examined", level=logging.DEBUG, shard=self._shard.name, error=str(error))
            return None
        if start is None:
            return delivery
        started_by = None if start.started_by == self._common.worker else start.started_by
        if started_by is not None and self._may_still_report(delivery, start):
            return None
        self._connected_at.pop(delivery.slot, None)
        attempt = next_attempt(start.attempt, started_by)
        return replace(delivery, event=delivery.event.with_delivery(attempt=attempt), started_by=started_by)

    def _may_still_report(self, delivery: Delivery, start: Start) -> bool:
        """Whether the worker that started a suspect's last attempt may be on its way back."""
        now = monotonic()
        if start.connected:
            self._connected_at[delivery.slot] = now
            return start.overdue < _FROZEN
        absent_since = max(self._since, self._connected_at.get(delivery.slot, self._since))
        return min(now - absent_since, start.server_age) < self._common.grace

    async def report_survival(self) -> None:
        """The shard is given up, and this process lives: its attempts whose end is not on record do not count.

        Returns once that is on record.
        """
        common, lease = self._common, self._shard.lease
        delay = GrowingDelay(cap=1.0)
        while mine := {key: delivery for key, delivery in common.unreported.items() if key[0] == lease.epoch}:
            try:
                for key, delivery in mine.items():
                    await common.redelivery.report_survival(common.worker, lease.subscription, delivery)
                    common.unreported.pop(key, None)
            except DatabaseError as error:
                facts.emit("survival not reported", level=delay.failed(), shard=self._shard.name, error=str(error))
                await delay.wait()

    async def record_start(self, delivery: Delivery) -> bool:
        """Make durable that the attempt starts. False if the shard was given up meanwhile."""
        made = delivery.event.attempt - 1
        steps: tuple[Step, ...] = ()
        if delivery.started_by is not None:
            # The last attempt counts from now on. If this is taken back, it is recorded again: by this id only once.
            died = delivery.started_by.hex[:8]
            steps = (Step(what="failed", attempt=made, error=describe(ProcessDied()), id=died),)
        recorded = self._record(delivery, attempt=made, started_by=self._common.worker, steps=steps)
        # Before the commit, whose answer may be lost.
        self._common.unreported[self._shard.lease.epoch, outcome_key(recorded)] = delivery
        delay = GrowingDelay(cap=1.0)
        while not self._gate.stopped:
            try:
                await self._common.commit()
                break
            except DatabaseError as error:
                if self._shard.outcomes.get(outcome_key(recorded)) is not recorded:
                    # This shard's part was committed. PostgreSQL refused another shard's.
                    break
                facts.emit("attempt not recorded", level=delay.failed(), shard=self._shard.name, error=str(error))
            await delay.wait()
        while not self._gate.stopped:
            if self._shard.may_dispatch():
                return True
            await asyncio.sleep(LEASE_POLL)
        self.take_back(delivery)
        return False

    def take_back(self, delivery: Delivery) -> None:
        """Have it committed that the recorded attempt did not take place."""
        made = delivery.event.attempt - 1
        self._record(delivery, attempt=made - 1 if delivery.suspect else made, started_by=delivery.started_by)

    def process_ends(self, delivery: Delivery) -> None:
        """This delivery ends the process, which must not report that it outlived an attempt."""
        if delivery.recorded:
            self._common.unreported.clear()

    def committed(self, mark: Mark) -> None:
        """The mark is durable, and with it the end of attempts."""
        for key, outcome in mark.outcomes.items():
            starts = isinstance(outcome, Scheduled | LetterFailed) and outcome.started_by == self._common.worker
            # Another attempt may have started since, whose record waits for the next mark.
            if not starts and key not in self._shard.outcomes:
                self._common.unreported.pop((self._shard.lease.epoch, key), None)

    def survived(self) -> None:
        """The process lives after one more dispatch with care."""
        self._dispatched += 1
        enough = self._dispatched >= 2 * self._registration.most_at_work and monotonic() - self._since > _ENOUGH
        if enough or self._dispatched >= self._shard.window.max_events or self._left() <= 0:
            self.active = False

    def forget_crashes(self, *, redelivering: bool) -> None:
        """Have the crashes forgotten once everything is settled that was open when the shard was claimed.

        `redelivering`: whether events of `redeliveries` are at work here.
        """
        shard = self._shard
        if (
            shard.crashes
            and not (shard.forgets_crashes or redelivering)
            and monotonic() - self._since > _SETTLED_AFTER
            and (shard.lease.complete or shard.window.is_settled(shard.lease.last_open))
        ):
            self.active = False
            shard.forget_crashes()

    def _left(self) -> float:
        """For how many seconds the shard may still be run with care."""
        return self._longest - (monotonic() - self._since)

    def _record(
        self, delivery: Delivery, *, attempt: int, started_by: UUID | None, steps: tuple[Step, ...] = ()
    ) -> Outcome:
        """Have the attempts made committed, and which worker starts another one."""
        event, error = delivery.event, describe(ProcessDied())
        delay = 0.0
        if started_by is not None:
            wait = self._registration.retry.wait_before(delivery.event.attempt)
            delay = min(max(wait, self._common.grace), LONGEST_WAIT)
        outcome: Outcome
        if delivery.letter is not None:
            outcome = LetterFailed(
                letter=delivery.letter,
                attempt=attempt,
                delay=delay,
                error=error,
                details={},
                started_by=started_by,
                steps=steps,
            )
        else:
            outcome = Scheduled(
                position=event.position,
                attempt=attempt,
                delay=delay,
                error=error,
                failure=event.failure,
                started_by=started_by,
                steps=steps,
            )
        return self._shard.record(outcome)
