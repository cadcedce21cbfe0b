"""How long to wait before an event is tried again: a policy, and nothing else."""

import math
import random
from dataclasses import dataclass
from typing import Literal

from pgbackend.errors import ConfigError

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
    """How often an event is dispatched at most, the first try included."""
    delay: float = 1.0
    """Seconds before the first retry."""
    backoff: Backoff = "exponential"
    """The wait before retry n: `delay` (constant), `delay·n` (linear), `delay·2ⁿ⁻¹` (exponential)."""
    max_delay: float = 600.0
    """The longest wait, in seconds."""
    jitter: float = 0.0
    """Up to this share of a wait is added to it at random, so that failures do not come back in step."""

    def __post_init__(self) -> None:
        if not isinstance(self.attempts, int) or isinstance(self.attempts, bool) or self.attempts < 1:
            raise ConfigError(f"Retry.attempts is {self.attempts!r}: expected a whole number of at least 1.")
        for name in ("delay", "max_delay", "jitter"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                raise ConfigError(f"Retry.{name} is {value!r}: expected a finite number of at least 0.")
        if self.backoff not in ("constant", "linear", "exponential"):
            raise ConfigError(f"Retry.backoff is {self.backoff!r}: expected constant, linear or exponential.")

    def wait(self, retry: int) -> float:
        """Seconds before retry number `retry` (1 is the second attempt), without jitter."""
        if self.backoff == "constant":
            wait = self.delay
        elif self.backoff == "linear":
            wait = self.delay * retry
        else:
            # 2¹⁰²⁴ is no float; from 2⁶⁴ on any delay has long met its limit.
            wait = self.delay * 2.0 ** min(retry - 1, 64)
        return min(wait, self.max_delay)

    def wait_before(self, retry: int) -> float:
        """The same with jitter: what is really waited."""
        return self.wait(retry) * (1.0 + self.jitter * random.random())  # noqa: S311 - not a secret

    def waits(self) -> tuple[float, ...]:
        """The waits between all attempts, in order."""
        return tuple(self.wait(n) for n in range(1, self.attempts))
