"""Answers that many ask for at once: the broker's probes and metrics, and the console, ask PostgreSQL through it.

The promise: however many callers ask, one question is open at a time, and an answer serves all who waited for it.
"""

import asyncio
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Generic, TypeVar

Answer = TypeVar("Answer")


class Recent(Generic[Answer]):
    """The latest answer of `ask()`; it is asked again once the answer is more than `age` seconds old."""

    def __init__(self, ask: Callable[[], Awaitable[Answer]], *, age: float = 0.0) -> None:
        self._ask = ask
        self._age = age
        self._answer: Answer
        self._answered_at = float("-inf")
        self._asking = asyncio.Lock()

    async def get(self) -> Answer:
        """An answer that is at most `age` seconds old, or newer than this call. Raises what `ask()` raises."""
        called_at = monotonic()
        # A caller that is cancelled while it asks leaves the question to the next one that waits here.
        async with self._asking:
            if self._answered_at + self._age <= called_at:
                self._answer = await self._ask()
                self._answered_at = monotonic()
            return self._answer
