"""The load of a run: its subscriptions, and which events fail in which of them. Pure.

Whether an event fails follows from its id, so every process and the verdict know it without asking.
"""

import hashlib
from dataclasses import dataclass

from pgbackend.model import Order
from pgbackend.retry import Retry
from pgbackend.torture.plan import LEASE

HOLE_WAIT = 0.3
"""Seconds: `hole_wait` of the run."""
SETTINGS: dict[str, float] = {"lease_timeout": LEASE, "hole_wait": HOLE_WAIT, "drain_timeout": 10.0}
"""Settings of the workers' backends."""
PRODUCE_TIMEOUT = 5.0
RETRY = Retry(attempts=4, delay=0.05, max_delay=0.2)
REJECTED = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """A subscription of the run."""

    order: Order
    shards: int
    concurrency: int
    delay: float
    """Seconds that a dispatch takes at most. One in a hundred takes up to `long` instead."""
    long: float = 0.0
    doomed: float = 0.0
    """The share of events that fail each time and become dead letters. Half as many again are rejected at once."""
    failing: float = 0.0
    """The share of events that fail once or twice before they are handled."""
    retry: Retry = RETRY
    transactional: bool = False
    batches: tuple[int | None, ...] = (None,)
    """`batch` of the first worker, the second, and so on."""
    midway: bool = False
    """Whether it is created in the middle of the run, as "latest". The others exist before the first event."""


SUBSCRIPTIONS: dict[str, Terms] = {
    "plain": Terms(order="none", shards=4, concurrency=8, delay=0.01, long=0.4),
    "keyed": Terms(order="key", shards=3, concurrency=16, delay=0.01, long=0.2, failing=0.01),
    "strict": Terms(order="strict", shards=1, concurrency=1, delay=0.002, failing=0.002),
    "flaky": Terms(order="none", shards=2, concurrency=8, delay=0.005, long=0.3, doomed=0.02, failing=0.1),
    "midway": Terms(order="key", shards=2, concurrency=8, delay=0.01, long=0.2, midway=True),
}


def failures(subscription: str, terms: Terms, id_: str) -> int:
    """How many attempts at an event fail; `RETRY.attempts` if all do, REJECTED if the first is a `Reject`.

    >>> [failures("flaky", SUBSCRIPTIONS["flaky"], f"producer-0-{n}") for n in (0, 9, 4, 3, 37)]
    [0, 1, 2, 4, -1]
    """
    lot = int.from_bytes(hashlib.blake2b(f"{subscription} {id_}".encode(), digest_size=5).digest())
    share = (lot >> 8) / (1 << 32)
    if share < terms.doomed:
        return RETRY.attempts
    if share < terms.doomed * 1.5:
        return REJECTED
    if share < terms.doomed * 1.5 + terms.failing:
        return 1 + lot % 2
    return 0
