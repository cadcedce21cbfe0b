"""Waiting for what no fact tells."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

Value = TypeVar("Value")


async def eventually(
    what: str, condition: Callable[[], Awaitable[Value]], timeout: float = 30.0, *, interval: float = 0.02
) -> Value:
    """The first true value of `condition`; TimeoutError that says `what` was waited for, and what was seen last."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    while True:
        if value := await condition():
            return value
        if loop.time() > deadline:
            raise TimeoutError(f"{what}: not within {timeout:g} s; last seen: {value!r}")
        await asyncio.sleep(interval)
