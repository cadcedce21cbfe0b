"""Waiting for what no fact tells."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, overload

Value = TypeVar("Value")


@overload
async def eventually(
    what: str, condition: Callable[[], Awaitable[Value | None]], timeout: float = 30.0, *, interval: float = 0.02
) -> Value: ...
@overload
async def eventually(
    what: str, condition: Callable[[], bool], timeout: float = 30.0, *, interval: float = 0.02
) -> bool: ...
async def eventually(what: str, condition: Callable[[], Any], timeout: float = 30.0, *, interval: float = 0.02) -> Any:
    """The first true value of `condition`, which is asked every `interval` seconds.

    After `timeout` seconds a TimeoutError says `what` was waited for, and what was seen last.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        if loop.time() > deadline:
            raise TimeoutError(f"{what}: not within {timeout:g} s; last seen: {value!r}")
        await asyncio.sleep(interval)
