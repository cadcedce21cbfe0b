"""Targets to deliver to, and brokers in this process and in one of their own."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping

import pytest
import uvloop

from tests.serve.support.broker import Broker, Commits, serving
from tests.serve.support.target import Target, listening


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The broker runs on uvloop, whose connections differ from asyncio's, so its tests do as well."""
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
    """A broker that takes events in and has no trigger."""
    async with serving(database) as running:
        yield running


@pytest.fixture
def commits(monkeypatch: pytest.MonkeyPatch) -> Commits:
    return Commits(monkeypatch)
