"""Made-up runs that lose, double or invent events, and some that only look like it."""

from dataclasses import replace

import pytest

from pgbackend.torture.verdict.rulings import LOST, ONCE, SEEN
from tests.torture.verdict.story import PLAIN, Story


def test_a_run_without_faults_keeps_every_promise() -> None:
    story = Story()
    story.produce(1, 2, 3)
    story.claim("w1")
    story.handle("w1", 1, 2, 3)
    story.commit("w1", 3)
    judged = story.verdict()
    assert judged.kept
    assert judged.tallies["a"].handled == 3
    assert judged.outcomes == {"acknowledged": 3}


def test_an_event_that_is_never_dispatched_is_lost() -> None:
    story = Story()
    story.produce(1, 2)
    story.claim("w1")
    story.handle("w1", 2)
    assert story.broken() == [LOST]
    assert "p-1 at 1" in story.verdict().rulings[LOST].evidence[0]


def test_an_event_whose_dispatch_never_ends_is_lost() -> None:
    story = Story()
    story.produce(1)
    story.claim("w1")
    story.dispatch("w1", 1)
    assert story.broken() == [LOST]


def test_an_acknowledged_event_that_is_not_in_the_log_is_lost() -> None:
    story = Story()
    story.send(1)
    story.outcome("acknowledged", 1)
    assert story.broken() == [LOST]


def test_a_subscription_owes_events_acknowledged_after_its_creation_and_must_not_see_older_ones() -> None:
    story = Story(replace(PLAIN, midway=True))
    story.faults = [note for note in story.faults if note.kind != "created"]
    story.produce(1)
    story.chaos("creating", "a")
    story.send(2)
    story.outcome("acknowledged", 2)
    story.store(2, 2)
    story.chaos("created", "a")
    story.claim("w1", position=1)
    assert story.broken() == []
    story.produce(3)
    assert story.broken() == [LOST]
    story.handle("w1", 2, 3)
    assert story.broken() == []
    story.handle("w1", 1)
    assert SEEN in story.broken()


@pytest.mark.parametrize("outcome", ["refused", "rolled-back"])
def test_an_event_that_was_refused_or_rolled_back_must_not_be_in_the_log(outcome: str) -> None:
    story = Story()
    story.send(1)
    story.outcome(outcome, 1)
    story.claim("w1")
    assert story.broken() == []
    story.store(1, 1)
    story.handle("w1", 1)
    assert story.broken() == [ONCE]


def test_an_event_that_is_not_in_the_log_must_not_be_dispatched() -> None:
    story = Story()
    story.send(1)
    story.outcome("rolled-back", 1)
    story.claim("w1")
    story.handled("w1", story.dispatch("w1", 1, id_="p-1"))
    assert story.broken() == [SEEN]


def test_an_uncertain_event_may_be_in_the_log_once_and_not_twice() -> None:
    story = Story()
    story.send(1)
    story.outcome("uncertain", 1)
    story.claim("w1")
    assert story.broken() == []
    story.store(1, 1)
    story.handle("w1", 1)
    assert story.broken() == []
    story.store(1, 2)
    story.handle("w1", 2)
    assert story.broken() == [ONCE]
