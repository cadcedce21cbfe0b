"""The plan follows from its seed alone, and can be carried out."""

from collections import defaultdict
from itertools import pairwise
from typing import get_args

import pytest

from pgbackend.torture.plan import Name, Plan

KINDS = {"kill", "stop", "cut", "stall", "terminate", "clock", "leave", "subscribe"}
OF_APPLICATIONS = KINDS - {"subscribe"} | {"lose"}
RESTARTS = {"server fast", "server immediate", "server kill"}


def test_each_seed_gives_its_own_plan_again() -> None:
    assert str(Plan.make(3, 60, server=True)) == str(Plan.make(3, 60, server=True))
    assert str(Plan.make(3, 60, server=True)) != str(Plan.make(4, 60, server=True))


def test_the_plan_of_a_seed_does_not_change_from_one_version_to_the_next() -> None:
    """A bug report names a seed. Change these lines if the plan must change."""
    assert [str(step) for step in Plan.make(1, 24, server=True).steps[:3]] == [
        "    2.000 s  leave worker-0 for 0.251 s",
        "    2.553 s  stop worker-1 for 0.770 s",
        "    3.337 s  server immediate server",
    ]


def test_each_name_gives_another_plan() -> None:
    plans = [Plan.make(1, 60, server=True, name=name) for name in get_args(Name)]
    assert [plan.name for plan in plans] == ["log", "bank", "orders"]
    assert len({str(plan) for plan in plans}) == 3


@pytest.mark.parametrize("server", [True, False])
@pytest.mark.parametrize("name", ["bank", "orders"])
def test_a_plan_of_an_application_of_two_minutes_has_every_kind_of_fault(name: Name, server: bool) -> None:
    for seed in range(20):
        kinds = {step.kind for step in Plan.make(seed, 120, server=server, name=name).steps}
        assert kinds == OF_APPLICATIONS | (RESTARTS if server else set())


@pytest.mark.parametrize("server", [True, False])
def test_a_plan_of_a_minute_has_every_kind_of_fault(server: bool) -> None:
    for seed in range(20):
        kinds = {step.kind for step in Plan.make(seed, 60, server=server).steps}
        assert kinds == KINDS | (RESTARTS if server else set())


@pytest.mark.parametrize("name", ["bank", "orders"])
def test_applications_have_a_calm_after_each_storm(name: Name) -> None:
    times = [step.at for step in Plan.make(1, 180, server=True, name=name).steps]
    calms = [(before, after) for before, after in pairwise(times) if after - before > 40]
    assert [(round(before, -1), round(after, -1)) for before, after in calms] == [(30, 80), (110, 150)]


def test_no_target_has_two_faults_one_worker_is_up_and_every_fault_ends_before_the_plan() -> None:
    for seed in range(60):
        plan = Plan.make(seed, 120, server=True, name=get_args(Name)[seed % 3])
        busy: dict[str, float] = defaultdict(float)
        down: dict[str, float] = {}
        for step in plan.steps:
            assert 0 <= step.at <= step.at + step.seconds < plan.seconds
            if step.target:
                assert step.at >= busy[step.target]
                busy[step.target] = step.at + step.seconds
            if step.kind in ("kill", "stop", "leave"):
                down[step.target] = step.at + step.seconds
                assert sum(end > step.at for end in down.values()) < len(plan.workers)
