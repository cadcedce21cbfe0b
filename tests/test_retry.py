import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgbackend.errors import ConfigError
from pgbackend.retry import Backoff, Retry

seconds = st.floats(min_value=0, max_value=3e9, allow_nan=False)
backoff = st.sampled_from(["constant", "linear", "exponential"])
policies = st.builds(Retry, attempts=st.integers(1, 200), delay=seconds, max_delay=seconds, backoff=backoff)


@given(policies)
def test_there_is_one_wait_between_two_attempts(policy: Retry) -> None:
    assert len(policy.waits()) == policy.attempts - 1
    assert policy.waits() == tuple(policy.wait(retry) for retry in range(1, policy.attempts))


@given(policies, st.integers(1, 10**9))
def test_no_wait_is_longer_than_max_delay_or_negative(policy: Retry, retry: int) -> None:
    assert 0 <= policy.wait(retry) <= policy.max_delay


@given(policies, st.integers(1, 10**9))
def test_waits_never_get_shorter(policy: Retry, retry: int) -> None:
    assert policy.wait(retry) <= policy.wait(retry + 1)


@given(policies)
def test_the_first_wait_is_the_delay(policy: Retry) -> None:
    assert policy.wait(1) == min(policy.delay, policy.max_delay)


@given(st.integers(1, 60), st.integers(0, 1000))
def test_waits_follow_the_formula(retry: int, delay: int) -> None:
    def wait(backoff: Backoff) -> float:
        return Retry(delay=delay, backoff=backoff, max_delay=3e9).wait(retry)

    assert wait("constant") == delay
    assert wait("linear") == delay * retry
    assert wait("exponential") == min(delay * 2 ** (retry - 1), 3e9)


@given(st.floats(min_value=0, max_value=3e9), st.integers(1025, 10**9))
def test_late_retries_wait_max_delay(longest: float, retry: int) -> None:
    assert Retry(delay=1.0, max_delay=longest).wait(retry) == longest


@pytest.mark.parametrize(
    "options",
    [
        {"attempts": 0},
        {"attempts": -1},
        {"attempts": 1.0},
        {"attempts": True},
        {"attempts": "5"},
        {"delay": -1},
        {"delay": math.nan},
        {"delay": math.inf},
        {"delay": "1"},
        {"delay": None},
        {"max_delay": -0.1},
        {"max_delay": math.inf},
        {"attempts": 2**31},
        {"attempts": 10**5000},
        {"delay": 3.2e9},
        {"max_delay": 10**5000},
        {"jitter": 10.5},
        {"jitter": True},
        {"jitter": -1},
        {"jitter": math.nan},
        {"backoff": "quadratic"},
        {"backoff": None},
    ],
)
def test_invalid_settings_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"Retry.{next(iter(options))}"):
        Retry(**options)


def test_a_policy_is_a_value() -> None:
    assert Retry() == Retry(attempts=5, delay=1.0, backoff="exponential", max_delay=600.0)
    assert len({Retry(), Retry(), Retry(attempts=1)}) == 2
    assert Retry(attempts=1).waits() == ()
    with pytest.raises(AttributeError):
        Retry().delay = 2.0  # type: ignore[misc]  # that is the point
