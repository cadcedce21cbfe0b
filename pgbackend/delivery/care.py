"""Care: finds the event that kills the process which handles it, without harm to the others (I7).

A process that dies reports nothing. The next owner of its shard knows only that the owner died before it settled what
was open; the shard's `crashes` counts such deaths in a row. From the second one on, the shard is run with care: its
events are dispatched one at a time, alone among everything that this process runs with care, and the start of each
attempt is committed before the dispatch. If nobody reports the end, the next owner finds a suspect. A suspect is always
dispatched alone, and is given up when its attempts are used up, like any other event.

Care ends after as many events as the former owner may have had open, or after a minute; twice as long with each further
crash. Slow events must not be dispatched one by one for hours, nor wait for another subscription's dispatcher that
hangs. The count of crashes ends when everything is settled that was open when the shard was claimed. A shard whose
owners died of something else is slower for a moment, no more.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from time import monotonic

from pgbackend import facts
from pgbackend.delivery.decide import LONGEST_WAIT
from pgbackend.delivery.delivery import Delivery
from pgbackend.delivery.gate import Gate
from pgbackend.delivery.outcomes import LetterFailed, Outcome, Scheduled, outcome_key
from pgbackend.delivery.registration import Registration
from pgbackend.delivery.shard import Shard
from pgbackend.errors import DatabaseError
from pgbackend.failures import describe
from pgbackend.postgres.reconnect import GrowingDelay

LEASE_POLL = 0.05
"""Seconds between looks at whether the lease is certain again."""
_SUSPICIOUS = 2
"""Crashes in a row. One alone is a deployment, a power cut, an operator's kill -9."""
_ENOUGH = 10.0
"""Seconds of care after which twice the concurrency in events is enough: with slow events, no more were open."""
_LONGEST = 60.0
"""Seconds of care after the second crash. The next owner starts behind what was settled by then."""
_SETTLED_AFTER = 30.0
"""Seconds after the claim in which every retry that was due by then has come: they come within a second or two."""


class ProcessDied(Exception):  # noqa: N818 - recorded for an event, never raised
    """The error of an attempt that started and whose end nobody reported."""

    def __init__(self) -> None:
        super().__init__("the process that was handling it ended without a word")


class Care:
    """Whether a shard is run with care, for how long, and how a dispatch with care starts."""

    def __init__(
        self,
        shard: Shard,
        registration: Registration,
        gate: Gate,
        *,
        alone: asyncio.Lock,
        commit: Callable[[], Awaitable[object]],
    ) -> None:
        """`alone`: held by the one dispatch with care of this process. `commit`: commits at once."""
        self.active = shard.lease.crashes >= _SUSPICIOUS
        """Whether all events of the shard are dispatched with care."""
        self._shard = shard
        self._registration = registration
        self._gate = gate
        self._alone = alone
        self._commit = commit
        self._longest = _LONGEST * 2.0 ** min(max(shard.lease.crashes - _SUSPICIOUS, 0), 10)
        self._dispatched = 0
        self._since = monotonic()

    def covers(self, delivery: Delivery) -> bool:
        """Whether a delivery must be dispatched with care."""
        return self.active or delivery.suspect

    @asynccontextmanager
    async def alone(self, delivery: Delivery) -> AsyncIterator[bool]:
        """Wait until nothing else is dispatched with care. False if that took longer than there is care.

        A suspect waits as long as it takes.
        """
        try:
            async with asyncio.timeout(None if delivery.suspect else self._left()):
                await self._alone.acquire()
        except TimeoutError:
            self.active = False
            yield False
            return
        try:
            yield True
        finally:
            self._alone.release()

    async def record_start(self, delivery: Delivery) -> bool:
        """Make durable that the attempt starts. False if the shard was given up meanwhile."""
        recorded = self._record(delivery, attempt=delivery.event.attempt, started=True)
        delay = GrowingDelay(cap=1.0)
        while not self._gate.stopped:
            try:
                await self._commit()
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
        self._record(delivery, attempt=delivery.event.attempt - 1, started=delivery.suspect)

    def survived(self) -> None:
        """The process lives after one more dispatch with care."""
        self._dispatched += 1
        enough = self._dispatched >= 2 * self._registration.concurrency and monotonic() - self._since > _ENOUGH
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

    def _record(self, delivery: Delivery, *, attempt: int, started: bool) -> Outcome:
        """Have the number of attempts committed, and whether the last one has only started."""
        event, error = delivery.event, describe(ProcessDied())
        delay = min(self._registration.retry.wait_before(max(attempt, 1)), LONGEST_WAIT) if started else 0.0
        outcome: Outcome
        if delivery.letter is not None:
            outcome = LetterFailed(
                letter=delivery.letter, attempt=attempt, delay=delay, error=error, details={}, started=started
            )
        else:
            outcome = Scheduled(
                position=event.position,
                attempt=attempt,
                delay=delay,
                error=error,
                failure=event.failure,
                started=started,
            )
        self._shard.record(outcome)
        return outcome
