"""Every setting has a default and bounds, and Backend takes each of them."""

import dataclasses
import inspect
from typing import Any

import pytest

from pgbackend import Backend, ConfigError
from pgbackend.settings import Settings

NOWHERE = "postgresql://nobody@127.0.0.1:1/nothing"


@pytest.mark.parametrize(
    "setting",
    [
        {"hole_wait": -1}, {"hole_wait": 1e10}, {"poll_interval": 0}, {"poll_interval": 1e300},
        {"commit_interval": float("nan")}, {"commit_interval": 10**400}, {"lease_timeout": float("inf")},
        {"lease_timeout": 1e12}, {"lease_timeout": 86_401}, {"produce_timeout": "30"}, {"produce_timeout": 1e10},
        {"drain_timeout": True}, {"drain_timeout": 1e10}, {"pool_size": 0}, {"pool_size": 1001},
        {"max_event_bytes": 1.5}, {"max_event_bytes": (256 << 20) + 1}, {"window_events": -1},
        {"window_events": 100_001}, {"window_bytes": True}, {"window_bytes": 1 << 41}, {"buffer_bytes": 0},
        {"buffer_bytes": 10**5000},
    ],
    ids=lambda setting: next(iter(setting)),
)  # fmt: skip
def test_a_setting_out_of_its_bounds_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(setting))} is "):
        Settings(**setting)


def test_the_refusal_names_the_value_and_the_bounds() -> None:
    with pytest.raises(ConfigError, match=r"lease_timeout is 1000000000000\.0: .* from 0\.001 to 86400"):
        Settings(lease_timeout=1e12)
    with pytest.raises(ConfigError, match=r"buffer_bytes is an integer of 16610 bits: .* from 1 to 1099511627776"):
        Settings(buffer_bytes=10**5000)


@pytest.mark.parametrize(
    "setting",
    [{"hole_wait": 0}, {"drain_timeout": 0}, {"poll_interval": 0.001}, {"lease_timeout": 86_400}, {"pool_size": 1}],
    ids=lambda setting: next(iter(setting)),
)
def test_a_setting_at_its_bound_is_accepted(setting: dict[str, Any]) -> None:
    assert dataclasses.asdict(Settings(**setting)) == {**dataclasses.asdict(Settings()), **setting}


def test_backend_takes_every_setting_with_its_default() -> None:
    parameters = inspect.signature(Backend).parameters
    defaults = {name: one.default for name, one in parameters.items() if name not in ("dsn", "listen_dsn")}
    assert defaults == dataclasses.asdict(Settings())


@pytest.mark.parametrize(
    "argument",
    [
        {"schema": ""}, {"schema": "a\0b"}, {"dsn": "mysql://db"}, {"dsn": "not a dsn"}, {"listen_dsn": "nonsense"},
        {"window_events": 0},
    ],
    ids=ascii,
)  # fmt: skip
def test_backend_refuses_an_argument_before_it_connects(argument: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Backend(**{"dsn": NOWHERE, **argument})
