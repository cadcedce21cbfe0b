"""Which pause a process obeys, by what it reads and what it has yet to store."""

from datetime import UTC, datetime, timedelta

from pgbackend.delivery.pausing import Hold, Pausing
from pgbackend.model import Paused
from pgbackend.subscriptions.pauses import PauseState

NOW = datetime(2026, 1, 1, tzinfo=UTC)
RUNNING = PauseState(None, None)
RESUMED = PauseState(None, NOW + timedelta(seconds=1))
BY_OPERATOR = PauseState(Paused(at=NOW, by="operator", reason="later"), None)
BY_DISPATCHER = PauseState(Paused(at=NOW, by="dispatcher", reason="410 Gone"), None)
GONE = Hold("dispatcher", "gone", raised_here=True)


def heeding(*states: PauseState | None) -> Pausing:
    pausing = Pausing()
    for state in states:
        pausing.heed(state)
    return pausing


def test_a_process_obeys_what_is_stored() -> None:
    assert heeding(RUNNING).hold is None
    assert heeding(BY_OPERATOR).hold == Hold("operator", "later")
    assert heeding(BY_DISPATCHER).hold == Hold("dispatcher", "410 Gone")
    assert heeding(BY_DISPATCHER, BY_OPERATOR).hold == Hold("operator", "later")
    for paused in (BY_OPERATOR, BY_DISPATCHER):
        assert heeding(paused, RESUMED).hold is None


def test_a_dispatchers_pause_holds_until_it_is_stored() -> None:
    pausing = heeding(RUNNING)
    assert pausing.pause("gone")
    assert not pausing.pause("gone for good"), "no news"
    pausing.heed(RUNNING)
    assert (pausing.hold, pausing.new_pause is None) == (GONE, False)

    pausing.heed(BY_DISPATCHER)
    assert pausing.hold == Hold("dispatcher", "410 Gone", raised_here=True)
    assert pausing.new_pause is None, "another process was first"


def test_a_resume_voids_a_pause_that_was_raised_before_it() -> None:
    pausing = heeding(RUNNING)
    pausing.pause("gone")
    pausing.heed(RESUMED)
    assert (pausing.hold, pausing.new_pause) == (None, None)

    pausing.pause("gone again")
    assert pausing.new_pause is not None
    assert pausing.new_pause.resumed_at == RESUMED.resumed_at, "raised after it"


def test_a_dispatcher_that_is_paused_by_an_operator_asks_for_nothing() -> None:
    pausing = heeding(BY_OPERATOR)
    assert not pausing.pause("gone")
    assert pausing.new_pause is None


def test_a_pause_that_was_raised_here_stays_in_force_though_another_process_has_a_new_target() -> None:
    """This process runs the old dispatcher."""
    for first in ([BY_DISPATCHER], []):
        pausing = heeding(RUNNING)
        pausing.pause("gone")
        for state in (*first, RUNNING, RUNNING):
            pausing.heed(state)
        assert pausing.hold is not None
        pausing.reconfigure(None)
        assert pausing.hold is None


def test_a_pause_that_was_raised_elsewhere_ends_with_the_row() -> None:
    """This process may have the new dispatcher already, and saw the last pause by an old one."""
    assert heeding(BY_DISPATCHER, RUNNING).hold is None
    pausing = heeding(RUNNING)
    pausing.pause("gone")
    for state in (BY_OPERATOR, RUNNING):
        pausing.heed(state)
    assert pausing.hold is None, "the operator's pause took its place"


def test_an_operators_pause_ends_only_by_a_resume() -> None:
    pausing = heeding(BY_OPERATOR)
    pausing.reconfigure("new")
    pausing.heed(BY_OPERATOR)
    assert pausing.hold == Hold("operator", "later")


def test_the_old_pause_does_not_count_while_a_new_target_is_to_be_stored() -> None:
    pausing = heeding(BY_DISPATCHER)
    pausing.reconfigure("new")
    pausing.heed(BY_DISPATCHER)
    assert pausing.hold is None


def test_the_new_targets_own_pause_is_not_the_old_one() -> None:
    pausing = heeding(BY_DISPATCHER)
    pausing.reconfigure("new")
    assert pausing.pause("gone")
    pausing.heed(BY_DISPATCHER)
    assert pausing.hold == GONE
    assert pausing.new_pause is not None, "it is still to be stored"


def test_a_second_reconfiguration_is_stored_though_the_first_was_on_its_way() -> None:
    pausing = Pausing()
    pausing.reconfigure("a")
    first = pausing.new_target
    assert first is not None
    pausing.reconfigure("b")
    pausing.stored_target(first)
    assert pausing.new_target is not None
    assert pausing.new_target.target == "b"
    pausing.stored_target(pausing.new_target)
    assert pausing.new_target is None


def test_a_deleted_subscription_takes_its_pause_with_it() -> None:
    pausing = heeding(BY_DISPATCHER, None, RUNNING)
    assert (pausing.hold, pausing.new_pause) == (None, None)
