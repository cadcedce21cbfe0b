"""A console of a backend of its own."""

from collections.abc import AsyncIterator

import pytest

from pgbackend import Backend
from pgbackend.console import app
from tests.support.console import Client, served


@pytest.fixture
async def console(backend: Backend) -> AsyncIterator[Client]:
    """A client of the console of `backend`, open to this machine."""
    async with served(app(backend)) as client:
        yield client
