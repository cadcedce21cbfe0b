from hypothesis import given
from hypothesis import strategies as st

from pgbackend.codec.event import Event
from pgbackend.delivery.decide import (
    LONGEST_WAIT,
    Bury,
    Decision,
    Drop,
    PutBack,
    ToDeadLetter,
    TryAgain,
    decide,
    outcome_of,
)
from pgbackend.delivery.delivery import Delivery, Origin
from pgbackend.delivery.outcomes import Buried, Finished, LetterFailed, Scheduled, outcome_key
from pgbackend.model import Failure
from pgbackend.retry import Retry
from pgbackend.thrown import Thrown
from tests.support.events import log_row


@st.composite
def deliveries(draw: st.DrawFn) -> Delivery:
    origin = draw(st.sampled_from(Origin))
    given_up = origin is not Origin.LETTER and draw(st.booleans())
    failure = Failure(error="first", attempts=3, details={"a": "1"}) if given_up else None
    one = Event(log_row(7), draw(st.integers(1, 12)), failure)
    return Delivery(one, origin, letter=5 if origin is Origin.LETTER else None, started_by=draw(st.none() | st.uuids()))


@st.composite
def errors(draw: st.DrawFn) -> Thrown:
    kind = draw(st.sampled_from(["error", "reject", "pause", "retry after"]))
    return Thrown(
        error="said", reason="said", details={"b": "2"}, pauses=kind == "pause", final=kind in {"reject", "pause"},
        delay=draw(st.floats(0.0, 1e12)) if kind == "retry after" else 0.0,
    )  # fmt: skip


policies = st.builds(
    Retry, attempts=st.integers(1, 10), delay=st.floats(0.0, 100.0), max_delay=st.floats(100.0, 1000.0),
    backoff=st.sampled_from(["constant", "linear", "exponential"]),
)  # fmt: skip


def decided(delivery: Delivery, thrown: Thrown, retry: Retry, *, wanted: bool = True, second: bool = False) -> Decision:
    return decide(delivery, thrown, retry, wanted=wanted, has_dead_letter_dispatcher=second)


@given(delivery=deliveries(), thrown=errors(), retry=policies, second=st.booleans())
def test_an_unwanted_event_is_dropped_whatever_it_raised(
    delivery: Delivery, thrown: Thrown, retry: Retry, *, second: bool
) -> None:
    assert decided(delivery, thrown, retry, wanted=False, second=second) == Drop()


@given(delivery=deliveries(), thrown=errors(), retry=policies, second=st.booleans())
def test_each_failure_has_one_answer(delivery: Delivery, thrown: Thrown, retry: Retry, *, second: bool) -> None:
    decision = decided(delivery, thrown, retry, second=second)
    attempt = delivery.event.attempt
    if thrown.pauses and not delivery.given_up:
        assert decision == PutBack()
    elif thrown.final or attempt >= retry.attempts:
        second_turn = second and not delivery.given_up and delivery.letter is None
        assert isinstance(decision, ToDeadLetter if second_turn else Bury)
    else:
        assert isinstance(decision, TryAgain)
        assert (
            min(retry.wait_before(attempt), LONGEST_WAIT)
            <= decision.delay
            <= max(retry.max_delay, retry.wait_before(attempt))
        )


@given(delivery=deliveries(), thrown=errors(), retry=policies, second=st.booleans())
def test_the_outcome_belongs_to_the_event_or_the_letter(
    delivery: Delivery, thrown: Thrown, retry: Retry, *, second: bool
) -> None:
    decision = decided(delivery, thrown, retry, second=second)
    if isinstance(decision, PutBack):
        return
    outcome = outcome_of(delivery, decision, error=thrown.error, details=thrown.details)

    assert outcome_key(outcome) == (("event", 7) if delivery.letter is None else ("letter", 5))
    match decision:
        case TryAgain(delay=delay):
            assert isinstance(outcome, Scheduled | LetterFailed)
            assert (outcome.attempt, outcome.delay, outcome.started_by) == (delivery.event.attempt, delay, None)
        case ToDeadLetter(failure=failure):
            assert isinstance(outcome, Scheduled)
            assert (outcome.attempt, outcome.failure) == (0, failure)
        case Bury(failure=failure) if delivery.letter is None:
            assert isinstance(outcome, Buried)
            assert outcome.failure == failure
        case Bury():
            assert isinstance(outcome, LetterFailed)
            assert outcome.delay is None


def test_the_first_dispatchers_error_stays_the_reason_of_a_dead_letter() -> None:
    first = Failure(error="first", attempts=3, details={"a": "1"})
    delivery = Delivery(Event(log_row(7), 5, first), Origin.REDELIVERY)
    thrown = Thrown(error="second", reason="second", details={}, pauses=False, final=False, delay=0.0)

    decision = decided(delivery, thrown, Retry(attempts=5))

    assert isinstance(decision, Bury)
    assert (decision.failure.error, decision.failure.attempts) == ("first", 3)
    assert decision.failure.details == {"a": "1", "dead_letter_error": "second"}


def test_a_dropped_event_leaves_no_row() -> None:
    delivery = Delivery(Event(log_row(7)))

    assert outcome_of(delivery, Drop(), error="", details={}) == Finished(position=7)
