"""Made-up runs that do not come to rest, or in which something ends that the plan did not end."""

from collections.abc import Callable

import pytest

from pgbackend.torture.verdict.rulings import COMMITS, LOST, REST
from tests.torture.verdict.story import Story


def settled() -> Story:
    """One event, handled."""
    story = Story()
    story.produce(1)
    story.claim("w1")
    story.handle("w1", 1)
    return story


def leave_unsettled(story: Story) -> None:
    story.unsettled.append("a/0 at 0 of 1")


def end_by_itself(story: Story) -> None:
    story.failures.append("w1.1 ended by itself with status 1")


def keep_an_owner(story: Story) -> None:
    story.owner = "somebody"


def keep_an_event_pending(story: Story) -> None:
    story.pending = "{[1,2)}"


def restart_the_server_without_a_plan(story: Story) -> None:
    story.life += 1
    story.commit("w1", 1)


@pytest.mark.parametrize(
    "spoil", [leave_unsettled, end_by_itself, keep_an_owner, keep_an_event_pending, restart_the_server_without_a_plan]
)
def test_whatever_does_not_come_to_rest_is_a_violation(spoil: Callable[[Story], None]) -> None:
    story = settled()
    assert story.broken() == []
    spoil(story)
    assert story.broken() == [REST]


def test_a_planned_restart_of_the_server_is_none() -> None:
    story = settled()
    story.restart_server("fast")
    story.commit("w1", 1)
    assert story.broken() == []


def test_times_cannot_be_trusted_when_the_servers_clock_was_set() -> None:
    story = settled()
    story.clock_moved = 1.5
    assert story.verdict().outcome == "not judged"
    assert not story.verdict().kept
    story.commit("w2", 1)
    assert story.verdict().outcome == "broken"
    assert story.broken() == [COMMITS]


def test_a_stall_of_the_machine_excuses_no_lost_event() -> None:
    story = settled()
    story.produce(2)
    story.stall_machine(5)
    assert story.verdict().outcome == "broken"
    assert story.broken() == [LOST]
