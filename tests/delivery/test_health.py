from hypothesis import given
from hypothesis import strategies as st

from pgbackend.delivery.health import FAILURES_IN_A_ROW, TargetHealth
from pgbackend.retry import Retry


def down_target(retry: Retry) -> TargetHealth:
    health = TargetHealth(retry)
    for position in range(FAILURES_IN_A_ROW):
        health.failed(position, now=100.0, probe=False)
    assert health.down
    return health


def test_ten_different_events_in_a_row_take_a_target_down() -> None:
    health = TargetHealth(Retry())

    told = [health.failed(position, now=0.0, probe=False) for position in range(FAILURES_IN_A_ROW)]

    assert told == [False] * (FAILURES_IN_A_ROW - 1) + [True]


def test_one_event_that_fails_again_and_again_does_not() -> None:
    health = TargetHealth(Retry())
    for _ in range(100):
        health.failed(7, now=0.0, probe=False)

    assert not health.down


def test_a_success_begins_the_count_anew() -> None:
    health = TargetHealth(Retry())
    for position in range(FAILURES_IN_A_ROW - 1):
        health.failed(position, now=0.0, probe=False)
    assert not health.succeeded(), "it was not down"
    health.failed(99, now=0.0, probe=False)

    assert not health.down


def test_any_success_brings_it_up_and_says_so_once() -> None:
    health = down_target(Retry())

    assert health.succeeded()
    assert not health.succeeded()
    assert not health.down
    assert not health.failing


def test_the_waits_between_probes_grow_up_to_the_longest_of_the_policy() -> None:
    health = down_target(Retry(delay=1.0, max_delay=10.0))
    waits = [health.next_probe - 100.0]

    for probe in range(1, 9):
        health.failed(probe, now=1000.0, probe=True)
        waits.append(health.next_probe - 1000.0)

    assert waits == [1.0, 1.5, 2.25, 3.375, 5.0625, 7.59375, 10.0, 10.0, 10.0]
    assert health.probes == 8


def test_an_hour_of_probes_uses_up_no_event_of_ten() -> None:
    retry = Retry()
    health, now, attempts = down_target(retry), 100.0, [1] * FAILURES_IN_A_ROW

    while (now := health.next_probe) < 100.0 + 3600.0:
        event = attempts.index(min(attempts))
        attempts[event] += 1
        health.failed(event, now=now, probe=True)

    assert max(attempts) < retry.attempts


def test_probes_are_no_flood_even_without_a_delay() -> None:
    health = down_target(Retry(delay=0.0, max_delay=0.0))

    assert health.next_probe > 100.0


def test_a_probe_on_request_does_not_wait_and_the_waits_go_on_growing() -> None:
    health = down_target(Retry(delay=1.0, max_delay=600.0))
    health.failed(99, now=200.0, probe=True)

    health.probe_now()
    assert health.next_probe < 200.0
    health.failed(99, now=201.0, probe=True)
    assert health.next_probe == 201.0 + 1.5**2


@given(st.lists(st.one_of(st.none(), st.integers(0, 30)), max_size=200))
def test_it_is_down_after_failures_of_ten_events_with_no_success_between(outcomes: list[int | None]) -> None:
    health, failed, down = TargetHealth(Retry()), set[int](), False
    for outcome in outcomes:
        if outcome is None:
            health.succeeded()
            failed, down = set(), False
        else:
            health.failed(outcome, now=0.0, probe=False)
            failed.add(outcome)
            down = down or len(failed) >= FAILURES_IN_A_ROW
        assert health.down == down
        assert health.failing == bool(failed)


def test_a_paused_target_stays_so_whatever_those_at_work_still_say() -> None:
    health = TargetHealth(Retry())

    health.pause("gone")
    assert not health.succeeded()
    assert (health.paused, health.held) == ("gone", True)


def test_a_target_that_is_down_can_be_paused_and_is_up_again_only_for_the_next_one() -> None:
    health = down_target(Retry())
    assert health.held
    health.pause("gone")
    assert health.succeeded(), "it was down"
    assert health.held


def test_a_target_that_goes_on_is_up_or_down_as_before() -> None:
    up, down = TargetHealth(Retry()), down_target(Retry())
    for health in (up, down):
        health.pause("gone")
        health.pause(None)

    assert (up.paused, up.held) == (None, False)
    assert (down.paused, down.down, down.held) == (None, True, True)


def test_nobody_listens_to_a_retired_target() -> None:
    health = down_target(Retry())
    health.retire()
    for position in range(100, 100 + FAILURES_IN_A_ROW):
        assert not health.failed(position, now=0.0, probe=False)

    assert not health.succeeded()
    assert (health.held, health.down, health.paused) == (True, False, None), "whoever holds it looks for the new one"
