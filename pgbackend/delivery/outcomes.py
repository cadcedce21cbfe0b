"""Outcomes: what became of an event that was not simply handled at its first dispatch. Pure.

The committer writes an outcome in the same statement as the offset that it belongs to. So a crash finds an event either
on the log's path or in redelivery, never in both and never in neither.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from uuid import UUID

from pgbackend.delivery.history import Step, joined
from pgbackend.model import Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduled:
    """The event failed, or is about to be dispatched with care, and is due again later."""

    position: int
    attempt: int
    """Attempts made, without one that starts now."""
    delay: float
    """Seconds until it is due."""
    error: str
    failure: Failure | None
    """Set once the main dispatcher gave the event up and the dead-letter dispatcher has its turn."""
    started_by: UUID | None = None
    """The worker that starts an attempt now. If it never reports the end, the attempt killed its process."""
    steps: tuple[Step, ...] = ()
    """What to append to the event's history."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """Nothing is due any more: the event was handled, or nobody wants it."""

    position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Buried:
    """The event becomes a dead letter."""

    position: int
    failure: Failure
    event_id: str | None = None
    event_source: str | None = None
    """For log messages. None when the event cannot be decoded."""
    steps: tuple[Step, ...] = ()
    """As in `Scheduled`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LetterDelivered:
    """A dead letter that an operator sent again was handled."""

    letter: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LetterFailed:
    """A dead letter failed again. It is due after `delay` seconds, or stays at rest if `delay` is None."""

    letter: int
    attempt: int
    delay: float | None
    error: str
    details: Mapping[str, str]
    started_by: UUID | None = None
    """As in `Scheduled`."""
    steps: tuple[Step, ...] = ()
    """As in `Scheduled`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """The log lost these rows before the subscription handled them. Kept on record."""

    lower: int
    upper: int
    """The first position behind the range."""


Outcome = Scheduled | Finished | Buried | LetterDelivered | LetterFailed | Skipped
OutcomeKey = tuple[str, int]


def outcome_key(outcome: Outcome) -> OutcomeKey:
    """A later outcome replaces an earlier one with the same key."""
    if isinstance(outcome, LetterDelivered | LetterFailed):
        return ("letter", outcome.letter)
    if isinstance(outcome, Skipped):
        return ("skipped", outcome.lower)
    return ("event", outcome.position)


def has_history(outcome: Outcome) -> bool:
    """Whether it has steps to append to the event's history."""
    return isinstance(outcome, Scheduled | Buried | LetterFailed) and bool(outcome.steps)


def following(earlier: Outcome | None, outcome: Outcome) -> Outcome:
    """The outcome that replaces an earlier one of its event, which may not be committed, with the steps of both."""
    if isinstance(earlier, Scheduled | Buried | LetterFailed) and earlier.steps:
        match outcome:
            case Scheduled() | Buried() | LetterFailed():
                return replace(outcome, steps=joined(earlier.steps, outcome.steps))
    return outcome


def without_texts(outcome: Outcome, placeholder: str) -> Outcome:
    """The same outcome, with `placeholder` for every text that a dispatcher supplied."""
    match outcome:
        case Scheduled(failure=failure):
            bare = failure and replace(failure, error=placeholder, details={})
            return replace(outcome, error=placeholder, failure=bare, steps=_without_errors(outcome.steps, placeholder))
        case Buried(failure=failure):
            steps = _without_errors(outcome.steps, placeholder)
            return replace(outcome, failure=replace(failure, error=placeholder, details={}), steps=steps)
        case LetterFailed():
            return replace(outcome, error=placeholder, details={}, steps=_without_errors(outcome.steps, placeholder))
        case _:
            return outcome


def _without_errors(steps: tuple[Step, ...], placeholder: str) -> tuple[Step, ...]:
    return tuple(step if step.error is None else replace(step, error=placeholder) for step in steps)
