"""Made-up runs in which attempts count, and events become dead letters: rightly, too early, and never."""

from dataclasses import replace

import pytest

from pgbackend.torture.audit import Letter
from pgbackend.torture.load import REJECTED, RETRY, SUBSCRIPTIONS, failures
from pgbackend.torture.plan import LEASE
from pgbackend.torture.verdict.rulings import ATTEMPTS, LETTERS, LOST
from tests.torture.verdict.story import Story

FLAKY = replace(SUBSCRIPTIONS["flaky"], shards=1)
WAIT = LEASE + 0.1
"""Seconds after which the next owner counts an attempt that nobody reported."""


def first(fails: int) -> int:
    """The first event that fails so often."""
    return next(number for number in range(1, 1000) if failures("flaky", FLAKY, f"p-{number}") == fails)


DOOMED, FINE, TWICE, REJECT = first(RETRY.attempts), first(0), first(2), first(REJECTED)


def flaky(number: int) -> Story:
    """w1 has a shard with one event, whose position is its number."""
    story = Story(FLAKY, "flaky")
    for earlier in range(number):
        story.send(earlier)
        story.outcome("rolled-back", earlier)
    story.produce(number)
    story.claim("w1")
    return story


def bury(story: Story, number: int, attempts: int) -> None:
    story.letters.append(Letter("flaky", f"p-{number}", attempts))


# Attempts that count.


def test_an_attempt_that_failed_counts() -> None:
    story = flaky(TWICE)
    story.fail("w1", TWICE)
    story.fail("w1", TWICE, attempt=2)
    story.handle("w1", TWICE, attempt=3)
    assert story.broken() == []


def test_an_attempt_that_neither_failed_nor_started_durably_does_not_count() -> None:
    story = flaky(FINE)
    story.dispatch("w1", FINE)
    story.kill("w1")
    story.claim("w2")
    story.handle("w2", FINE, attempt=2)
    assert story.broken() == [ATTEMPTS]


def test_an_attempt_whose_process_was_killed_counts() -> None:
    story = flaky(FINE)
    story.start_attempt("w1", FINE)
    story.kill("w1")
    story.wait(WAIT)
    story.claim("w2")
    story.handled("w2", story.start_attempt("w2", FINE, attempt=2))
    story.record("w2", FINE, None, None)
    judged = story.verdict()
    assert judged.kept
    assert judged.counted == {"kill": 1}


def test_an_attempt_whose_process_was_killed_before_it_noted_the_dispatch_counts() -> None:
    story = flaky(FINE)
    story.record("w1", FINE, 0, "worker")
    story.kill("w1")
    story.wait(WAIT)
    story.claim("w2")
    story.handled("w2", story.start_attempt("w2", FINE, attempt=2))
    assert story.broken() == []


def test_an_attempt_whose_process_was_killed_must_count() -> None:
    story = flaky(FINE)
    story.start_attempt("w1", FINE)
    story.kill("w1")
    story.wait(WAIT)
    story.claim("w2")
    story.handled("w2", story.start_attempt("w2", FINE))
    assert story.broken() == [ATTEMPTS]


def test_an_attempt_that_was_handled_and_not_committed_counts_only_if_its_process_was_killed() -> None:
    story = flaky(FINE)
    story.handled("w1", story.start_attempt("w1", FINE))
    story.note("w1", "presence")
    story.wait(WAIT)
    story.claim("w2")
    story.handled("w2", story.start_attempt("w2", FINE, attempt=2))
    assert ATTEMPTS in story.broken()


def test_an_attempt_whose_process_reported_that_it_lives_does_not_count() -> None:
    story = flaky(FINE)
    story.start_attempt("w1", FINE)
    story.fault("cut", "w1")
    story.wait(1)
    story.fault("restore", "w1")
    story.claim("w2")
    story.report_survival("w1", FINE)
    story.wait(WAIT)
    story.handled("w2", story.start_attempt("w2", FINE))
    assert story.broken() == []


def test_an_attempt_whose_worker_takes_it_back_does_not_count_and_leaves_the_suspect_as_it_was() -> None:
    story = flaky(FINE)
    story.start_attempt("w1", FINE)
    suspect = story.attempt[FINE][1]
    story.kill("w1")
    story.wait(WAIT)
    story.claim("w2")
    story.record("w2", FINE, 1, "worker 2")
    story.record("w2", FINE, 0, suspect)
    story.release("w2")
    story.claim("w1")
    story.handled("w1", story.start_attempt("w1", FINE, attempt=2))
    assert story.broken() == []


def test_an_attempt_of_a_process_without_a_fault_does_not_count() -> None:
    story = flaky(FINE)
    story.start_attempt("w1", FINE)
    story.note("w1", "presence")
    story.wait(WAIT)
    story.claim("w2")
    story.handled("w2", story.start_attempt("w2", FINE, attempt=2))
    assert ATTEMPTS in story.broken()
    assert "w1.1" in story.verdict().rulings[ATTEMPTS].evidence[0]


def test_a_lost_connection_excuses_no_attempt_when_a_worker_can_connect_again() -> None:
    story = flaky(FINE)
    story.start_attempt("w1", FINE)
    story.fault("terminate", "w1")
    story.claim("w2")
    story.wait(WAIT)
    story.handled("w2", story.start_attempt("w2", FINE, attempt=2))
    assert story.broken() == [ATTEMPTS]


@pytest.mark.parametrize(("seconds", "broken"), [(0.9, [ATTEMPTS]), (2.1, [])])
def test_a_process_that_was_cut_off_for_too_long_to_report_is_excused(seconds: float, broken: list[str]) -> None:
    story = flaky(FINE)
    story.start_attempt("w1", FINE)
    story.fault("cut", "w1")
    story.claim("w2")
    story.wait(seconds)
    story.fault("restore", "w1")
    story.wait(LEASE - seconds)
    story.handled("w2", story.start_attempt("w2", FINE, attempt=2))
    assert story.broken() == broken


def test_no_living_process_loses_an_attempt_before_a_lease_has_passed_since_its_start() -> None:
    story = flaky(FINE)
    story.start_attempt("w1", FINE)
    story.fault("cut", "w1")
    story.claim("w2")
    story.wait(LEASE - 0.2)
    story.handled("w2", story.start_attempt("w2", FINE, attempt=2))
    assert story.broken() == [ATTEMPTS]


@pytest.mark.parametrize("fault", ["stop", "stall"])
@pytest.mark.parametrize(("seconds", "broken"), [(6.0, [ATTEMPTS]), (61.0, [])])
def test_a_frozen_process_whose_connection_is_open_has_a_minute(fault: str, seconds: float, broken: list[str]) -> None:
    story = flaky(FINE)
    story.start_attempt("w1", FINE)
    story.fault(fault, "w1")
    story.silent = frozenset({"w1"})
    story.wait(seconds)
    story.claim("w2")
    story.handled("w2", story.start_attempt("w2", FINE, attempt=2))
    assert story.broken() == broken


def test_a_frozen_process_loses_its_connection_with_the_server() -> None:
    story = flaky(FINE)
    story.start_attempt("w1", FINE)
    story.fault("stop", "w1")
    story.silent = frozenset({"w1"})
    story.restart_server()
    story.claim("w2")
    story.wait(WAIT)
    story.handled("w2", story.start_attempt("w2", FINE, attempt=2))
    assert story.broken() == []


@pytest.mark.parametrize(("seconds", "broken"), [(0.5, []), (2.5, [ATTEMPTS])])
def test_a_process_that_is_frozen_again_before_it_could_connect_is_excused(seconds: float, broken: list[str]) -> None:
    story = flaky(FINE)
    story.start_attempt("w1", FINE)
    story.restart_server()
    story.claim("w2")
    story.wait(seconds)
    story.fault("stop", "w1")
    story.silent = frozenset({"w1"})
    story.wait(WAIT)
    story.handled("w2", story.start_attempt("w2", FINE, attempt=2))
    assert story.broken() == broken


def test_a_process_that_the_server_waited_for_after_its_restart_is_not_excused() -> None:
    story = flaky(FINE)
    story.start_attempt("w1", FINE)
    story.restart_server(seconds=4)
    story.claim("w2")
    story.wait(2.1)
    story.handled("w2", story.start_attempt("w2", FINE, attempt=2))
    assert story.broken() == [ATTEMPTS]


def test_a_process_that_left_in_order_is_excused_only_if_the_server_was_away() -> None:
    for away in (True, False):
        story = flaky(FINE)
        story.start_attempt("w1", FINE)
        story.fault("leave", "w1")
        if away:
            story.chaos("server", "fast")
        story.note("w1", "end")
        if away:
            story.chaos("server", "back")
        story.claim("w2")
        story.wait(WAIT)
        story.handled("w2", story.start_attempt("w2", FINE, attempt=2))
        assert (ATTEMPTS in story.broken()) is not away


def test_a_stall_of_the_machine_leaves_an_attempt_unjudged() -> None:
    story = flaky(FINE)
    story.start_attempt("w1", FINE)
    story.stall_machine(3)
    story.claim("w2")
    story.wait(0.2)
    story.handled("w2", story.start_attempt("w2", FINE, attempt=2))
    assert story.broken() == []
    assert story.unjudged() == [ATTEMPTS]


@pytest.mark.parametrize("lives", [2, 3])
def test_an_event_at_work_when_three_lives_of_the_server_in_a_row_ended_is_suspected(lives: int) -> None:
    story = flaky(FINE)
    for life in range(lives):
        story.start_attempt("w1", FINE)
        story.restart_server()
        story.claim("w1")
        if life + 1 < lives:
            story.report_survival("w1", FINE)
        story.wait(WAIT)
    story.handled("w1", story.start_attempt("w1", FINE, attempt=2))
    assert story.broken() == ([] if lives == 3 else [ATTEMPTS])
    if lives == 3:
        assert story.verdict().counted == {"three lives of the server": 1}


def test_three_lives_of_the_server_that_were_not_in_a_row_suspect_no_event() -> None:
    story = flaky(FINE)
    for life in range(3):
        story.start_attempt("w1", FINE)
        story.restart_server()
        story.claim("w1")
        if life == 0:
            # One life ends without it.
            story.report_survival("w1", FINE)
            story.restart_server()
            story.claim("w1")
        elif life == 1:
            story.report_survival("w1", FINE)
        story.wait(WAIT)
    story.handled("w1", story.start_attempt("w1", FINE, attempt=2))
    assert story.broken() == [ATTEMPTS]


# Dead letters.


def test_an_event_that_always_fails_must_become_a_dead_letter() -> None:
    story = flaky(DOOMED)
    for attempt in range(1, RETRY.attempts + 1):
        story.fail("w1", DOOMED, attempt=attempt)
    assert story.broken() == [LOST, LETTERS]
    bury(story, DOOMED, RETRY.attempts)
    assert story.broken() == []


@pytest.mark.parametrize("attempts", [1, RETRY.attempts])
def test_a_dead_letter_before_all_attempts_are_made_is_a_violation(attempts: int) -> None:
    story = flaky(DOOMED)
    story.fail("w1", DOOMED)
    bury(story, DOOMED, attempts)
    assert story.broken() == [LETTERS]


def test_a_dead_letter_of_an_event_that_does_not_fail_is_a_violation() -> None:
    story = flaky(FINE)
    story.handle("w1", FINE)
    bury(story, FINE, RETRY.attempts)
    assert story.broken() == [LETTERS]


def test_a_rejected_event_has_one_attempt_and_one_for_each_that_counted_before() -> None:
    story = flaky(REJECT)
    story.start_attempt("w1", REJECT)
    story.kill("w1")
    story.wait(WAIT)
    story.claim("w2")
    story.failed("w2", story.start_attempt("w2", REJECT, attempt=2))
    story.record("w2", REJECT, None, None)
    for attempts in (1, 2, 3):
        story.letters.clear()
        bury(story, REJECT, attempts)
        assert story.broken() == ([] if attempts == 2 else [LETTERS])


def test_an_event_that_was_at_work_at_each_of_four_kills_becomes_a_dead_letter() -> None:
    story = flaky(FINE)
    for attempt in range(1, RETRY.attempts + 1):
        story.start_attempt("w1", FINE, attempt=attempt)
        story.kill("w1")
        story.wait(WAIT)
        story.claim("w1")
    story.record("w1", FINE, None, None)
    bury(story, FINE, RETRY.attempts)
    assert story.broken() == []


def test_an_event_that_was_at_work_at_three_kills_must_not_become_a_dead_letter() -> None:
    story = flaky(FINE)
    for attempt in range(1, RETRY.attempts):
        story.start_attempt("w1", FINE, attempt=attempt)
        story.kill("w1")
        story.wait(WAIT)
        story.claim("w1")
    story.handled("w1", story.start_attempt("w1", FINE, attempt=RETRY.attempts))
    story.record("w1", FINE, None, None)
    assert story.broken() == []
    bury(story, FINE, RETRY.attempts)
    assert story.broken() == [LETTERS]


def test_a_last_attempt_that_was_lost_with_the_lease_must_not_bury_the_event() -> None:
    story = flaky(TWICE)
    story.fail("w1", TWICE)
    story.fail("w1", TWICE, attempt=2)
    story.start_attempt("w1", TWICE, attempt=3)
    story.kill("w1")
    story.wait(WAIT)
    story.claim("w2")
    story.handled("w2", story.start_attempt("w2", TWICE, attempt=4))
    story.note("w2", "presence")
    story.wait(WAIT)
    story.claim("w1")
    story.record("w1", TWICE, None, None)
    bury(story, TWICE, RETRY.attempts)
    assert story.broken() == [ATTEMPTS]


def test_a_dead_letter_of_an_event_that_is_not_in_the_log_is_a_violation() -> None:
    story = flaky(FINE)
    story.handle("w1", FINE)
    story.letters.append(Letter("flaky", "p-4711", RETRY.attempts))
    assert story.broken() == [LETTERS]
