"""How a process handles a subscription, for tests of single parts."""

from typing import Any

from pgbackend import Retry
from pgbackend.delivery.registration import Handling


def make_handling(**options: Any) -> Handling:
    """The defaults of `subscribe()`, with these options."""
    defaults = {
        "dispatcher": print, "dead_letter": None, "filter": None, "concurrency": 64, "retry": Retry(),
        "transactional": False, "batch": None, "batch_wait": 0.0, "target": None,
    }  # fmt: skip
    return Handling(**{**defaults, **options})
