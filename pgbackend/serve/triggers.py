"""Makes a subscription of each trigger in the configuration: its filter, its target, its second chance, its patience.

The backend does the rest; this module only says in its words what the file says in its own.
"""

from typing import TYPE_CHECKING, Literal

import aiohttp
from yarl import URL

from pgbackend.backend import Backend
from pgbackend.errors import ConfigError, SubscriptionMismatchError
from pgbackend.serve.config import Trigger
from pgbackend.serve.delivery import DeadLetterDelivery, Delivery, refuse_without_target

if TYPE_CHECKING:
    from pgbackend.model import ConsumerDispatcher


async def subscribe(backend: Backend, session: aiohttp.ClientSession, name: str, trigger: Trigger) -> None:
    """The trigger's subscription exists and delivers whenever `backend` runs.

    Raises ConfigError when the log knows it with another order, end or number of shards.
    """
    options = trigger.delivery_options
    mode, headers = trigger.target.mode, trigger.target.headers
    dispatcher: ConsumerDispatcher = refuse_without_target
    if trigger.target.url is not None:
        dispatcher = _delivery(session, trigger.target.url, name, options.timeout, mode, headers)
    dead_letter: ConsumerDispatcher | None = None
    if options.dead_letter_url is not None:
        # Without the target's headers: they may hold its secrets, and this is another party.
        dead_letter = DeadLetterDelivery(_delivery(session, options.dead_letter_url, name, options.timeout, mode, {}))
    try:
        await backend.subscribe(
            name,
            dispatcher,
            start=trigger.start,
            end=trigger.end,
            filter=trigger.predicate,
            order=trigger.order,
            concurrency=trigger.concurrency,
            shards=trigger.shards,
            retry=options.policy(),
            dead_letter=dead_letter,
        )
    except SubscriptionMismatchError as error:
        raise ConfigError(f"triggers.{name}: {error}") from error


def _delivery(
    session: aiohttp.ClientSession,
    url: URL,
    name: str,
    timeout: float,
    mode: Literal["binary", "structured"],
    headers: dict[str, str],
) -> Delivery:
    return Delivery(session, url, trigger=name, timeout=timeout, mode=mode, headers=headers)
