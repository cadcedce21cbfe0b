"""Dispatchers to HTTP targets, without a backend."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from yarl import URL

from pgbackend.codec.event import Event
from pgbackend.serve.egress.connections import Pool
from pgbackend.serve.egress.dispatcher import Endpoint, TargetDispatcher
from pgbackend.serve.egress.outcomes import public_url
from pgbackend.serve.egress.replies import Replies, ReplyBudget, Store

if TYPE_CHECKING:
    from pgbackend.serve.operations.metrics import TriggerMetrics


async def no_reply(events: Sequence[Event]) -> None:
    """A store for replies of targets that must not reply."""
    raise AssertionError(f"a reply of {len(events)} events")


def dispatcher_to(
    pool: Pool,
    url: str | URL,
    *,
    trigger: str = "billing",
    store: Store = no_reply,
    max_hops: int = 255,
    budget: ReplyBudget | None = None,
    metrics: "TriggerMetrics | None" = None,
    **endpoint: Any,
) -> TargetDispatcher:
    """A dispatcher to this URL. `endpoint`: more fields of `Endpoint`."""
    url = URL(url, encoded=True) if isinstance(url, str) else url
    replies = Replies(
        store, trigger=trigger, url=public_url(url), max_hops=max_hops, budget=budget or ReplyBudget(), metrics=metrics
    )
    return TargetDispatcher(pool, Endpoint(trigger=trigger, url=url, **endpoint), replies, metrics=metrics)
