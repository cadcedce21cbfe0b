"""Decides what becomes of an event whose dispatch failed. Pure: `settlement.py` carries the decision out.

nobody wants it any more ────────────────▶ Drop
Pause, from the main dispatcher ─────────▶ PutBack
attempts are left, and it is no Reject ──▶ TryAgain
else, with a dead-letter dispatcher ─────▶ ToDeadLetter
else ────────────────────────────────────▶ Bury
"""

from dataclasses import dataclass, replace

from pgbackend.delivery.delivery import Delivery
from pgbackend.delivery.history import Step
from pgbackend.delivery.outcomes import Buried, Finished, LetterFailed, Outcome, Scheduled
from pgbackend.model import Failure
from pgbackend.retry import Retry
from pgbackend.thrown import Thrown

LONGEST_WAIT = 1e9
"""Seconds, 30 years: PostgreSQL would refuse a date beyond its calendar, and with it every other shard's commit."""


@dataclass(frozen=True, slots=True)
class Drop:
    """A changed filter refuses the event."""


@dataclass(frozen=True, slots=True)
class PutBack:
    """The target wants nothing more. This was no attempt."""


@dataclass(frozen=True, slots=True)
class TryAgain:
    """Dispatch the event again."""

    delay: float
    """Seconds from now."""


@dataclass(frozen=True, slots=True)
class ToDeadLetter:
    """Hand the event to the dead-letter dispatcher."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class Bury:
    """Make a dead letter of the event, or leave the one that it is at rest."""

    failure: Failure


Decision = Drop | PutBack | TryAgain | ToDeadLetter | Bury


def decide(
    delivery: Delivery, thrown: Thrown, retry: Retry, *, wanted: bool, has_dead_letter_dispatcher: bool
) -> Decision:
    """Decide what becomes of a delivery that ended with `thrown`. `wanted`: whether the present filter passes it."""
    event = delivery.event
    if not wanted:
        return Drop()
    if thrown.pauses and not delivery.given_up:
        return PutBack()
    if event.attempt < retry.attempts and not thrown.final:
        delay = max(retry.wait_before(event.attempt), min(thrown.delay, retry.max_delay))
        return TryAgain(min(delay, LONGEST_WAIT))
    if event.failure is not None:
        # The first dispatcher's error is why the event was given up; the second one's is a detail.
        details = {**event.failure.details, "dead_letter_error": thrown.error}
        return Bury(replace(event.failure, details=details))
    failure = Failure(error=thrown.error, attempts=event.attempt, details=thrown.details)
    if has_dead_letter_dispatcher and delivery.letter is None:
        return ToDeadLetter(failure)
    return Bury(failure)


def outcome_of(
    delivery: Delivery, decision: Drop | TryAgain | ToDeadLetter | Bury, *, error: str, details: dict[str, str]
) -> Outcome:
    """The outcome to commit for a decision. `error`, `details`: of the dispatch that failed."""
    event, letter = delivery.event, delivery.letter
    failed = Step(what="failed", attempt=event.attempt, error=error)
    match decision:
        case Drop():
            return Finished(position=event.position)
        case TryAgain(delay=delay) if letter is not None:
            return LetterFailed(
                letter=letter, attempt=event.attempt, delay=delay, error=error, details=details, steps=(failed,)
            )
        case TryAgain(delay=delay):
            return Scheduled(
                position=event.position,
                attempt=event.attempt,
                delay=delay,
                error=error,
                failure=event.failure,
                steps=(failed,),
            )
        case ToDeadLetter(failure=failure):
            steps = (failed, Step(what="given up"))
            return Scheduled(position=event.position, attempt=0, delay=0.0, error=error, failure=failure, steps=steps)
        case Bury() if letter is not None:
            steps = (failed, Step(what="buried"))
            return LetterFailed(
                letter=letter, attempt=event.attempt, delay=None, error=error, details=details, steps=steps
            )
        case Bury(failure=failure):
            return buried(delivery, failure, failed)


def buried(delivery: Delivery, failure: Failure, *steps: Step) -> Buried:
    """The outcome that makes a dead letter of an event of the log, after these steps."""
    event = delivery.event
    return Buried(
        position=event.position,
        failure=failure,
        event_id=event.id,
        event_source=event.source,
        steps=(*steps, Step(what="buried")),
    )
