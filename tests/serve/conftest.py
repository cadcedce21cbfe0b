"""Targets to deliver to, and brokers in this process and in one of their own."""

from collections.abc import AsyncIterator

import pytest

from tests.serve.broker import Broker, serving
from tests.serve.target import Target, listening


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
