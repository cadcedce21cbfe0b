from collections.abc import AsyncIterator

import pytest

from pgbackend import Backend
from tests.support.backends import running
from tests.support.events import make_event


@pytest.fixture
async def log(database: str) -> AsyncIterator[Backend]:
    """A running backend on a log that holds the events 0 to 9."""
    async with running(database) as backend:
        await backend.produce_many([make_event(str(number)) for number in range(10)])
        yield backend
