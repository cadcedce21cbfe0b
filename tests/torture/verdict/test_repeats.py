"""Made-up runs that repeat events: with a planned cause, with none, and with what is no cause."""

import pytest

from pgbackend.torture.plan import LEASE
from pgbackend.torture.verdict.rulings import REPEATS, SECOND
from tests.torture.verdict.story import Story


def handle_two_and_settle_one(story: Story) -> None:
    """w1 handles 1 and 2, and commits that 1 is settled."""
    story.produce(1, 2)
    story.claim("w1")
    story.handle("w1", 1, 2)
    story.commit("w1", 1)
    story.wait(0.1)


def take_over(story: Story) -> None:
    """w2 claims the shard and handles 2 again."""
    story.claim("w2")
    story.handle("w2", 2)


def test_a_repeat_after_a_kill_is_counted() -> None:
    story = Story()
    handle_two_and_settle_one(story)
    story.kill("w1")
    story.wait(0.7)
    take_over(story)
    judged = story.verdict()
    assert judged.kept
    assert judged.tallies["a"].repeats == {"kill": 1}
    (takeover,) = judged.takeovers
    assert takeover == pytest.approx(0.7 * SECOND, abs=100)


def test_a_repeat_of_a_settled_event_is_a_violation_whatever_happened() -> None:
    story = Story()
    handle_two_and_settle_one(story)
    story.kill("w1")
    story.claim("w2")
    story.handle("w2", 1, 2)
    assert story.broken() == [REPEATS]


def test_an_event_that_was_pending_or_waited_for_redelivery_at_the_claim_is_not_settled() -> None:
    story = Story()
    handle_two_and_settle_one(story)
    story.kill("w1")
    story.claim("w2", position=2, pending="{[1,2)}")
    story.handle("w2", 1)
    assert story.broken() == []


def test_the_first_dispatch_of_an_event_that_was_handed_over_to_redelivery_is_no_repeat() -> None:
    story = Story()
    handle_two_and_settle_one(story)
    story.kill("w1")
    story.produce(3)
    story.claim("w2", position=3, pending="{[2,3)}")
    story.handle("w2", 2, 3)
    assert story.broken() == []


def test_a_repeat_without_a_fault_is_a_violation() -> None:
    story = Story()
    handle_two_and_settle_one(story)
    take_over(story)
    assert story.broken() == [REPEATS]


def test_a_lost_connection_without_a_fault_is_counted_and_excuses_nothing() -> None:
    story = Story()
    handle_two_and_settle_one(story)
    story.note("w1", "presence")
    take_over(story)
    assert story.broken() == [REPEATS]
    assert story.verdict().unplanned == {"lost connection": 1}


def test_a_silence_without_a_fault_is_counted_and_excuses_nothing() -> None:
    story = Story()
    handle_two_and_settle_one(story)
    story.silent = frozenset({"w1"})
    story.wait(5)
    take_over(story)
    story.note("w1", "tick")
    assert story.broken() == [REPEATS]
    assert story.verdict().unplanned == {"silent": 1}


def test_a_stop_is_a_cause_and_no_silence() -> None:
    story = Story()
    handle_two_and_settle_one(story)
    story.fault("stop", "w1")
    story.silent = frozenset({"w1"})
    story.wait(5)
    take_over(story)
    story.fault("continue", "w1")
    story.note("w1", "tick")
    judged = story.verdict()
    assert judged.kept
    assert judged.tallies["a"].repeats == {"stop": 1}
    assert not judged.unplanned


@pytest.mark.parametrize("fault", ["clock", "leave", "skipped"])
def test_a_fault_that_costs_no_lease_is_no_cause(fault: str) -> None:
    story = Story()
    handle_two_and_settle_one(story)
    story.fault(fault, "w1")
    take_over(story)
    assert story.broken() == [REPEATS]


def test_a_fault_of_another_process_is_no_cause() -> None:
    story = Story()
    handle_two_and_settle_one(story)
    story.fault("terminate", "w2")
    take_over(story)
    assert story.broken() == [REPEATS]


@pytest.mark.parametrize(("seconds", "broken"), [(LEASE - 0.1, []), (LEASE + 0.1, [REPEATS])])
def test_a_fault_explains_a_loss_until_a_lease_after_its_end(seconds: float, broken: list[str]) -> None:
    story = Story()
    handle_two_and_settle_one(story)
    story.fault("cut", "w1")
    story.wait(2)
    story.fault("restore", "w1")
    story.wait(seconds)
    take_over(story)
    assert story.broken() == broken


def test_a_fault_after_the_loss_is_no_cause() -> None:
    story = Story()
    handle_two_and_settle_one(story)
    story.claim("w2")
    story.wait(1)
    story.kill("w1")
    story.handle("w2", 2)
    assert story.broken() == [REPEATS]


@pytest.mark.parametrize(("mode", "broken"), [("kill", []), ("immediate", []), ("fast", [REPEATS])])
def test_a_crash_ends_every_lease_and_a_fast_shutdown_explains_a_loss_for_a_moment(
    mode: str, broken: list[str]
) -> None:
    story = Story()
    handle_two_and_settle_one(story)
    story.restart_server(mode)
    story.wait(LEASE + 0.1)
    take_over(story)
    assert story.broken() == broken


def test_a_crash_does_not_explain_the_loss_of_a_lease_that_was_claimed_after_it() -> None:
    story = Story()
    story.restart_server()
    handle_two_and_settle_one(story)
    story.wait(1)
    take_over(story)
    assert story.broken() == [REPEATS]


def test_a_repeat_after_an_orderly_release_is_a_violation() -> None:
    story = Story()
    handle_two_and_settle_one(story)
    story.release("w1")
    take_over(story)
    assert story.broken() == [REPEATS]


def test_a_repeat_by_a_former_owner_that_comes_second_is_explained_by_its_own_loss() -> None:
    story = Story()
    story.produce(1)
    epoch = story.claim("w1")
    story.fault("terminate", "w1")
    story.claim("w2")
    story.handle("w2", 1)
    story.handle("w1", 1, epoch=epoch)
    assert REPEATS not in story.broken()


def test_the_same_attempt_twice_under_one_lease_is_a_violation_whatever_happened() -> None:
    story = Story()
    story.produce(1)
    story.claim("w1")
    story.fault("terminate", "w1")
    story.handle("w1", 1, 1)
    assert story.broken() == [REPEATS]


def test_the_next_attempt_after_a_failure_is_a_retry() -> None:
    story = Story()
    story.produce(1)
    story.claim("w1")
    story.fail("w1", 1)
    story.handle("w1", 1, attempt=2)
    judged = story.verdict()
    assert judged.kept
    assert judged.tallies["a"].retries == 1


def test_a_repeat_that_only_a_stall_of_the_machine_explains_is_not_judged() -> None:
    story = Story()
    handle_two_and_settle_one(story)
    story.stall_machine(1.5)
    take_over(story)
    judged = story.verdict()
    assert judged.outcome == "not judged"
    assert story.unjudged() == [REPEATS]
    assert story.broken() == []
    assert len(judged.stalls) == 1


def test_a_stall_of_the_machine_excuses_nothing_that_happens_later() -> None:
    story = Story()
    story.stall_machine(1.5)
    story.wait(LEASE + 0.1)
    handle_two_and_settle_one(story)
    take_over(story)
    assert story.verdict().outcome == "broken"
    assert story.unjudged() == []


def test_a_stall_of_the_machine_without_a_finding_spoils_nothing() -> None:
    story = Story()
    handle_two_and_settle_one(story)
    story.stall_machine(1.5)
    assert story.verdict().kept
