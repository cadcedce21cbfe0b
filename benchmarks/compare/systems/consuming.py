"""A task that consumes pages until it is told to stop, between two pages: what it handled is acknowledged then."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager

WAIT = 0.2
"""Seconds that a consumer waits for events before it looks whether it should stop."""


@asynccontextmanager
async def consuming(consume: Callable[[asyncio.Event], Coroutine[None, None, None]]) -> AsyncIterator[None]:
    """While the task runs, which ends soon after the event is set. Not by cancellation: nats-py swallows it.

    When the task fails, the body is cancelled and the error raised in an ExceptionGroup.
    """
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(consume(stop))
        try:
            yield
        finally:
            stop.set()
