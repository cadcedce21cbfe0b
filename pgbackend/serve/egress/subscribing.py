"""Turns a trigger of the configuration into the options of its subscription: dispatchers, filter, retries."""

from typing import TYPE_CHECKING, TypedDict

from yarl import URL

from pgbackend.serve.config.models import Trigger
from pgbackend.serve.egress.connections import Pool
from pgbackend.serve.egress.dispatcher import DeadLetterDispatcher, Endpoint, TargetDispatcher, reject_without_target
from pgbackend.serve.egress.outcomes import public_url
from pgbackend.serve.egress.replies import Replies, ReplyBudget, Store

if TYPE_CHECKING:
    from pgbackend.model import ConsumerDispatcher, EventFilter
    from pgbackend.retry import Retry
    from pgbackend.serve.operations.metrics import Metrics
    from pgbackend.serve.operations.tracing import Tracing


class SubscriptionOptions(TypedDict):
    """The options that `subscribe()` and `reconfigure()` have in common."""

    dispatcher: "ConsumerDispatcher"
    dead_letter: "ConsumerDispatcher | None"
    filter: "EventFilter | None"
    concurrency: int
    retry: "Retry"
    target: str


class SubscriptionFactory:
    """Makes the options of subscriptions, with what all triggers of a process share."""

    def __init__(
        self, pool: Pool, store: Store, *, metrics: "Metrics", tracing: "Tracing | None" = None, max_hops: int = 255
    ) -> None:
        """`store` takes the events of replies; a chain of replies has at most `max_hops`."""
        self._pool = pool
        self._store = store
        self._metrics = metrics
        self._tracing = tracing
        self._max_hops = max_hops
        self._budget = ReplyBudget()

    def options(self, name: str, trigger: Trigger) -> SubscriptionOptions:
        """The options of the trigger's subscription."""
        delivery = trigger.delivery_options
        dispatcher: ConsumerDispatcher = reject_without_target
        if trigger.target.url is not None:
            dispatcher = self._dispatcher(name, trigger, trigger.target.url)
        dead_letter: ConsumerDispatcher | None = None
        if (url := delivery.dead_letter_url) is not None:
            dead_letter = DeadLetterDispatcher(self._dispatcher(name, trigger, url, is_target=False))
        return {
            "dispatcher": dispatcher,
            "dead_letter": dead_letter,
            "filter": trigger.predicate,
            "concurrency": trigger.concurrency,
            "retry": delivery.policy(),
            "target": trigger.digest(),
        }

    def forget(self, name: str) -> None:
        """The metrics no longer show the trigger."""
        self._metrics.forget(name)

    def _dispatcher(self, name: str, trigger: Trigger, url: URL, *, is_target: bool = True) -> TargetDispatcher:
        """A dispatcher to the target, or to the dead-letter URL, which must not get the secrets in the headers."""
        metrics = self._metrics.trigger(name) if is_target else None
        endpoint = Endpoint(
            trigger=name,
            url=url,
            timeout=trigger.delivery_options.timeout,
            mode=trigger.target.mode,
            header_coding=trigger.target.header_coding if is_target else "percent",
            headers=trigger.target.headers if is_target else {},
        )
        replies = Replies(
            self._store,
            trigger=name,
            url=public_url(url),
            max_hops=self._max_hops,
            budget=self._budget,
            metrics=metrics,
            tracing=self._tracing,
        )
        return TargetDispatcher(self._pool, endpoint, replies, metrics=metrics, tracing=self._tracing)
