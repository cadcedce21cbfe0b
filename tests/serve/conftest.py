"""Targets to deliver to, and brokers in this process and in one of their own."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping

import pytest
import uvloop

from tests.serve.broker import Broker, Commits, serving
from tests.serve.target import Target, listening

_ON_UVLOOP = {
    "test_clients",
    "test_connection",
    "test_delivery",
    "test_egress",
    "test_hostile_targets",
    "test_hosts",
    "test_ingest",
    "test_listener",
    "test_tls",
}
"""Connections are the loop's, TLS too: what is said of them is tested on the loop that the broker runs on."""


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    if item.path.stem in _ON_UVLOOP:
        return {"uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.new_event_loop}


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
