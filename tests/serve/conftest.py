"""Targets and brokers as fixtures."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping

import pytest
import uvloop

from tests.serve.support.broker import Broker, Commits, serving
from tests.serve.support.target import Target, listening


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run serve's tests on uvloop, as the broker does: its connections differ from asyncio's."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
async def target() -> AsyncIterator[Target]:
    async with listening() as running:
        yield running


@pytest.fixture
async def other_target() -> AsyncIterator[Target]:
    async with listening() as running:
        yield running


@pytest.fixture
async def broker(database: str) -> AsyncIterator[Broker]:
    """A broker without triggers."""
    async with serving(database) as running:
        yield running


@pytest.fixture
def commits(monkeypatch: pytest.MonkeyPatch) -> Commits:
    return Commits(monkeypatch)
