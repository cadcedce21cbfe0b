"""The retry policy of a subscription: how often a failed event is tried, and how long to wait before each try.

Delivery asks it after each failure. It only computes; delivery schedules.
"""

import random
from dataclasses import dataclass
from typing import Literal

from pgbackend.errors import ConfigError, shown

_MOST_ATTEMPTS = 2**31 - 1
"""The highest value of the column `attempt`."""
_CENTURY = 36_525 * 86_400
"""The longest wait, in seconds. PostgreSQL can store every date within it."""

Backoff = Literal["constant", "linear", "exponential"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """When a failed event is tried again, and how often.

    >>> Retry(attempts=4, delay=1.0).waits()
    (1.0, 2.0, 4.0)
    >>> Retry(attempts=4, delay=1.0, backoff="linear", max_delay=2.5).waits()
    (1.0, 2.0, 2.5)
    """

    attempts: int = 5
    """The most attempts of one event, the first included."""
    delay: float = 1.0
    """Seconds before the first retry."""
    backoff: Backoff = "exponential"
    """The wait before retry n: `delay` (constant), `delay·n` (linear), `delay·2ⁿ⁻¹` (exponential)."""
    max_delay: float = 600.0
    """The longest wait, in seconds."""
    jitter: float = 0.0
    """A random part of the wait, up to this share, is added, so that failed events do not all come back at once."""

    def __post_init__(self) -> None:
        attempts = self.attempts
        if not isinstance(attempts, int) or isinstance(attempts, bool) or not 1 <= attempts <= _MOST_ATTEMPTS:
            raise ConfigError(
                f"Retry.attempts is {shown(attempts)}: expected a whole number from 1 to {_MOST_ATTEMPTS}."
            )
        for name, at_most in (("delay", _CENTURY), ("max_delay", _CENTURY), ("jitter", 10.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= at_most:
                raise ConfigError(f"Retry.{name} is {shown(value)}: expected a number from 0 to {at_most:.0f}.")
        if self.backoff not in ("constant", "linear", "exponential"):
            raise ConfigError(f"Retry.backoff is {self.backoff!r}: expected constant, linear or exponential.")

    def wait(self, retry: int) -> float:
        """Seconds before retry number `retry` (1 is the second attempt), without jitter."""
        if self.backoff == "constant":
            wait = self.delay
        elif self.backoff == "linear":
            wait = self.delay * retry
        else:
            # A float cannot hold 2¹⁰²⁴. Any delay has met its limit long before 2⁶⁴.
            wait = self.delay * 2.0 ** min(retry - 1, 64)
        return min(wait, self.max_delay)

    def wait_before(self, retry: int) -> float:
        """Seconds before retry number `retry`, with jitter: the real wait."""
        return self.wait(retry) * (1.0 + self.jitter * random.random())  # noqa: S311 - not a secret

    def waits(self) -> tuple[float, ...]:
        """The waits between all attempts, in order."""
        return tuple(self.wait(n) for n in range(1, self.attempts))
