"""The broker's actors keep the one contract of tests/support/lifecycle.py."""

from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from uuid import uuid4

import pytest

from pgbackend.backend import Backend
from pgbackend.serve.config import watch
from pgbackend.serve.config.load import load, load_file
from pgbackend.serve.config.reload import ConfigurationFile
from pgbackend.serve.egress.connections import Pool
from pgbackend.serve.egress.subscribing import SubscriptionFactory
from pgbackend.serve.egress.triggers import Triggers
from pgbackend.serve.operations.metrics import Metrics
from tests.support import lifecycle
from tests.support.lifecycle import Lifecycle
from tests.support.polling import eventually


def triggers(backend: Backend) -> Lifecycle:
    def make() -> Triggers:
        pool: Pool | None = None  # no trigger here has a target
        return Triggers(backend, SubscriptionFactory(pool, backend.produce_many, metrics=Metrics()))  # type: ignore[arg-type]

    async def use(triggers: Triggers) -> None:
        await triggers.apply(load(f"triggers: {{{uuid4()}: {{}}}}", origin="test"))
        await triggers.apply(load("{}", origin="test"))
        await triggers.converged()

    return Lifecycle(make, use)


class RunFile:
    """Follows a configuration file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: set[str] = set()

    async def run(self) -> None:
        async with aclosing(ConfigurationFile(self.path, load_file(self.path)).changes()) as configurations:
            async for configuration in configurations:
                self.names.update(configuration.triggers)


def configuration_file(path: Path) -> Lifecycle:
    path.write_text("{}")

    async def use(running: RunFile) -> None:
        name = str(uuid4())
        path.write_text(f"triggers: {{{name}: {{}}}}")
        await eventually("the change is seen", lambda: name in running.names, interval=0.005)

    return Lifecycle(lambda: RunFile(path), use)


@pytest.fixture(params=["triggers", "configuration file"])
def actor(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lifecycle:
    if request.param == "triggers":
        return triggers(request.getfixturevalue("backend"))
    monkeypatch.setattr(watch, "_MOMENT", 0.001)
    monkeypatch.setattr(watch, "_INTERVAL", 0.02)
    return configuration_file(tmp_path / "broker.yaml")


async def test_an_actor_can_be_cancelled_before_it_starts(actor: Lifecycle) -> None:
    await lifecycle.cancel_before_it_starts(actor)


@pytest.mark.parametrize("again", [False, True], ids=["once", "twice"])
async def test_an_actor_can_be_cancelled_at_every_await(actor: Lifecycle, *, again: bool, long: bool) -> None:
    """The first steps one by one, later ones farther and farther apart; all of them with --long."""
    stride: Callable[[int], int] = (lambda step: 1) if long else (lambda step: 1 + step // 8)
    assert await lifecycle.cancel_at_every_step(actor, again=again, stride=stride) > 1


async def test_an_actor_can_be_run_again(actor: Lifecycle) -> None:
    await lifecycle.run_again(actor)
