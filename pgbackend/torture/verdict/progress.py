"""Facts: what became of each event in each subscription so far. Arrays by position."""

from array import array
from typing import NamedTuple

_MOST_ATTEMPTS = 7
"""Attempts that fit into the bits of a byte: more than `RETRY` allows."""


class Dispatch(NamedTuple):
    """A dispatch, as its process noted it when it started."""

    process: str
    at: int
    subscription: str
    shard: int
    epoch: int
    position: int
    attempt: int
    id: str

    def __str__(self) -> str:
        return (
            f"{self.at / 1e9:.6f} {self.process} dispatched {self.subscription}/{self.shard} position {self.position} "
            f"({self.id}), attempt {self.attempt}, epoch {self.epoch}"
        )


class Progress:
    """One subscription's progress with each position."""

    def __init__(self, size: int) -> None:
        self._epochs: array[int] = array("q", [0]) * size
        self._attempts = bytearray(size)
        self._failed = bytearray(size)
        self._handled = bytearray(size)

    def __contains__(self, position: int) -> bool:
        return 0 < position < len(self._epochs)

    def epoch(self, position: int) -> int:
        """The newest lease under which it was dispatched; 0 before the first dispatch."""
        return self._epochs[position]

    def attempt(self, position: int) -> int:
        """The number of its last attempt."""
        return self._attempts[position]

    def is_handled(self, position: int) -> bool:
        return bool(self._handled[position])

    def failed_attempts(self, position: int) -> set[int]:
        """The numbers of the attempts that failed."""
        return {attempt for attempt in range(1, _MOST_ATTEMPTS + 1) if self._failed[position] >> attempt & 1}

    def dispatched(self, dispatch: Dispatch) -> None:
        position = dispatch.position
        self._epochs[position] = max(self._epochs[position], dispatch.epoch)
        self._attempts[position] = min(dispatch.attempt, 255)

    def handled(self, dispatch: Dispatch) -> bool:
        """Note that a handler returned. Returns whether it is the first time for this event."""
        was_handled, self._handled[dispatch.position] = self._handled[dispatch.position], 1
        return not was_handled

    def failed(self, dispatch: Dispatch) -> None:
        """Note that a handler raised."""
        self._failed[dispatch.position] |= 1 << min(dispatch.attempt, _MOST_ATTEMPTS)
