"""Made-up runs in which a former owner goes on, and commits: what it may still do, and what it may not."""

from pgbackend.torture.verdict.rulings import COMMITS, LOST, OWNER
from tests.torture.verdict.story import Story


def take_over_during_a_stop(story: Story) -> None:
    """w1 is stopped, w2 claims the shard with everything in it settled, w1 goes on."""
    story.fault("stop", "w1")
    story.silent = frozenset({"w1"})
    story.wait(5)
    story.claim("w2", position=9)
    story.wait(1)
    story.fault("continue", "w1")
    story.silent = frozenset()


def test_a_commit_by_a_former_owner_is_a_violation() -> None:
    story = Story()
    story.produce(1)
    story.claim("w1")
    story.fault("terminate", "w1")
    epoch = story.epoch
    story.claim("w2")
    story.handle("w2", 1)
    story.commit("w1", 1)
    assert epoch == 1
    assert story.broken() == [COMMITS]


def test_a_commit_by_the_process_that_was_in_the_place_before_is_a_violation() -> None:
    story = Story()
    story.produce(1)
    story.claim("w1")
    former = story.processes["w1"]
    story.kill("w1")
    story.claim("w1")
    story.handle("w1", 1)
    story.commit("w1", 1, process=former)
    assert story.broken() == [COMMITS]


def test_a_commit_after_the_release_is_a_violation() -> None:
    story = Story()
    story.produce(1)
    story.claim("w1")
    story.handle("w1", 1)
    story.release("w1")
    story.commit("w1", 1)
    assert story.broken() == [COMMITS]


def test_an_offset_that_goes_back_is_a_violation() -> None:
    story = Story()
    story.produce(1, 2)
    story.claim("w1")
    story.handle("w1", 1, 2)
    story.commit("w1", 2)
    story.commit("w1", 1)
    assert story.broken() == [COMMITS]


def test_a_dispatch_without_a_lease_is_a_violation() -> None:
    story = Story()
    story.produce(1)
    story.claim("w1")
    story.handle("w2", 1)
    assert story.broken() == [OWNER]


def test_a_process_without_a_fault_must_not_be_at_work_when_another_owns_the_shard() -> None:
    story = Story()
    story.produce(1)
    story.claim("w1")
    serial = story.dispatch("w1", 1)
    story.claim("w2", position=1)
    story.wait(0.2)
    story.handled("w1", serial)
    assert story.broken() == [OWNER]


def test_an_overlap_after_a_lost_connection_without_a_fault_is_a_violation() -> None:
    story = Story()
    story.produce(1)
    story.claim("w1")
    serial = story.dispatch("w1", 1)
    story.note("w1", "presence")
    story.claim("w2", position=1)
    story.wait(0.2)
    story.handled("w1", serial)
    assert story.broken() == [OWNER]


def test_an_overlap_that_only_a_stall_of_the_machine_explains_is_not_judged() -> None:
    story = Story()
    story.produce(1)
    story.claim("w1")
    serial = story.dispatch("w1", 1)
    story.stall_machine(1.2)
    story.claim("w2", position=1)
    story.wait(0.2)
    story.handled("w1", serial)
    assert story.broken() == []
    assert story.unjudged() == [OWNER]


def test_a_process_that_was_stopped_may_end_what_had_started() -> None:
    story = Story()
    story.produce(1)
    story.claim("w1")
    serial = story.dispatch("w1", 1)
    take_over_during_a_stop(story)
    story.handled("w1", serial)
    judged = story.verdict()
    assert judged.kept
    assert judged.overlaps.finished == 1


def test_a_process_that_wakes_may_start_one_dispatch_and_not_two() -> None:
    story = Story()
    story.produce(1, 2)
    epoch = story.claim("w1")
    take_over_during_a_stop(story)
    story.handle("w1", 1, epoch=epoch)
    judged = story.verdict()
    assert judged.overlaps.about_to_start == 1
    assert not judged.rulings[OWNER].violations
    story.handle("w1", 2, epoch=epoch)
    assert story.broken() == [OWNER]


def test_a_process_that_has_been_awake_for_long_may_start_nothing() -> None:
    story = Story()
    story.produce(1)
    epoch = story.claim("w1")
    take_over_during_a_stop(story)
    story.wait(2)
    story.handle("w1", 1, epoch=epoch)
    assert story.broken() == [OWNER]


def test_a_process_that_has_not_heard_of_the_cut_may_go_on_for_a_second() -> None:
    story = Story()
    story.produce(1, 2, 3)
    epoch = story.claim("w1")
    story.fault("cut", "w1")
    story.claim("w2", position=9)
    story.wait(0.5)
    story.handle("w1", 1, 2, epoch=epoch)
    judged = story.verdict()
    assert not judged.rulings[OWNER].violations
    assert judged.overlaps.unaware == 2
    story.wait(0.6)
    story.handle("w1", 3, epoch=epoch)
    assert story.broken() == [OWNER]


def test_a_process_that_has_heard_of_the_cut_may_only_start_what_it_was_about_to() -> None:
    story = Story()
    story.produce(1, 2, 3)
    epoch = story.claim("w1")
    story.fault("cut", "w1")
    story.note("w1", "presence")
    story.claim("w2", position=9)
    story.wait(0.5)
    story.handle("w1", 1, epoch=epoch)
    assert story.verdict().overlaps.about_to_start == 1
    story.handle("w1", 2, epoch=epoch)
    assert story.broken() == [LOST, OWNER]


def test_a_dispatch_after_the_release_is_a_violation_whatever_happened() -> None:
    story = Story()
    story.produce(1)
    story.claim("w1")
    story.fault("terminate", "w1")
    story.release("w1")
    story.wait(0.1)
    story.handle("w1", 1)
    assert story.broken() == [OWNER]


def test_a_dispatch_that_outlasts_the_release_is_a_violation() -> None:
    story = Story()
    story.produce(1)
    story.claim("w1")
    serial = story.dispatch("w1", 1)
    story.release("w1")
    story.wait(0.1)
    story.handled("w1", serial)
    assert story.broken() == [OWNER]
