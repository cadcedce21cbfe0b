"""Consoles: of a backend of its own, and of one that is not initialized."""

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


@pytest.fixture
def idle() -> Backend:
    """A backend that is not initialized: its console has files, and answers 503 where a request may read or act."""
    return Backend("postgresql://nobody@localhost/nowhere")


@pytest.fixture
async def gate(idle: Backend) -> AsyncIterator[Client]:
    """A client of its console, open to this machine."""
    async with served(app(idle)) as client:
        yield client
