"""Made-up runs that dispatch the events of a key, or of a strict subscription, in another order."""

import pytest

from pgbackend.torture.load import Terms
from pgbackend.torture.verdict.rulings import KEYS
from pgbackend.torture.verdict.rulings import STRICT as STRICT_ORDER
from tests.torture.verdict.story import KEYED, STRICT, Story

BOTH = pytest.mark.parametrize(("terms", "rule"), [(KEYED, KEYS), (STRICT, STRICT_ORDER)], ids=["key", "strict"])


@BOTH
def test_a_later_event_before_an_earlier_one_is_a_violation(terms: Terms, rule: str) -> None:
    story = Story(terms)
    story.produce(1, 2, lane="k")
    story.claim("w1")
    story.handle("w1", 2, 1)
    assert story.broken() == [rule]


@BOTH
def test_two_events_of_a_lane_at_once_are_a_violation(terms: Terms, rule: str) -> None:
    story = Story(terms)
    story.produce(1, 2, lane="k")
    story.claim("w1")
    first, second = story.dispatch("w1", 1), story.dispatch("w1", 2)
    story.handled("w1", first)
    story.handled("w1", second)
    assert story.broken() == [rule]


@BOTH
def test_an_event_before_a_failed_one_of_its_lane_is_retried_is_a_violation(terms: Terms, rule: str) -> None:
    story = Story(terms)
    story.produce(1, 2, lane="k")
    story.claim("w1")
    story.fail("w1", 1)
    story.handle("w1", 2)
    story.handle("w1", 1, attempt=2)
    assert story.broken() == [rule]


def test_events_of_different_keys_and_without_one_may_pass_each_other() -> None:
    story = Story(KEYED)
    story.produce(1, lane="k")
    story.produce(2, lane="l")
    story.produce(3, 4)
    story.claim("w1")
    story.handle("w1", 4, 2, 3, 1)
    assert story.broken() == []


def test_after_a_takeover_a_key_starts_again_at_what_was_not_settled() -> None:
    story = Story(KEYED)
    story.produce(1, 2, lane="k")
    story.claim("w1")
    story.handle("w1", 1, 2)
    story.kill("w1")
    story.claim("w2")
    story.handle("w2", 1, 2)
    assert story.broken() == []
    story.kill("w2")
    story.claim("w1")
    story.handle("w1", 2, 1)
    assert story.broken() == [KEYS]


def handle_late(story: Story, seconds: float, *, known: bool = True, stopped: bool = False) -> None:
    """2 is handled before 1, whose transaction was open for so long."""
    story.send(1, first=1)
    story.produce(2, lane="k")
    story.claim("w1")
    if stopped:
        story.fault("stop", "w1")
        story.fault("continue", "w1")
    story.handle("w1", 2)
    story.wait(seconds)
    if known:
        story.outcome("acknowledged", 1)
    story.store(1, 1, "k")
    story.handle("w1", 1)


def test_an_event_whose_transaction_was_open_for_long_may_be_late() -> None:
    story = Story(KEYED)
    handle_late(story, 0.5)
    judged = story.verdict()
    assert judged.kept
    assert judged.tallies["a"].late == 1


def test_an_event_may_be_late_if_nobody_knows_when_it_was_committed() -> None:
    story = Story(KEYED)
    handle_late(story, 0.01, known=False)
    assert story.broken() == []


def test_an_event_whose_transaction_was_short_must_not_be_late() -> None:
    story = Story(KEYED)
    handle_late(story, 0.01)
    assert story.broken() == [KEYS]


def test_a_process_that_was_stopped_may_take_a_short_transaction_for_a_long_one() -> None:
    story = Story(KEYED)
    handle_late(story, 0.01, stopped=True)
    assert story.broken() == []


def test_in_strict_order_no_event_may_be_late() -> None:
    story = Story(STRICT)
    handle_late(story, 0.5)
    assert story.broken() == [STRICT_ORDER]


def test_an_event_that_was_acknowledged_before_the_other_was_sent_must_not_be_late() -> None:
    story = Story(KEYED)
    story.send(1, first=1)
    story.wait(0.5)
    story.outcome("acknowledged", 1)
    story.store(1, 1, "k")
    story.produce(2, lane="k")
    story.claim("w1")
    story.handle("w1", 2, 1)
    assert story.broken() == [KEYS]
