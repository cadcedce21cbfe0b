"""Targets to deliver to."""

from collections.abc import AsyncIterator

import pytest

from tests.serve.target import Target, listening


@pytest.fixture
async def target() -> AsyncIterator[Target]:
    async with listening() as running:
        yield running


@pytest.fixture
async def other_target() -> AsyncIterator[Target]:
    async with listening() as running:
        yield running
