"""A backend that does things soon, and waits for what a subscription is to reach.

`name` is the subscription's; without one it is the only subscription of the log.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from pgbackend import Backend, ConsumerDispatcher, DeadLetter, SchemaError
from pgbackend.delivery.worker import Worker
from pgbackend.facts import Recorder
from pgbackend.model import SubscriptionStatus
from tests.support.events import make_event
from tests.support.polling import eventually

SOON: dict[str, Any] = {"commit_interval": 0.01, "poll_interval": 0.1, "hole_wait": 0.2}
"""Settings of `Backend`, in seconds: what happens in time anyway happens within a test."""


@asynccontextmanager
async def running(dsn: str, **settings: Any) -> AsyncIterator[Backend]:
    """A started backend with `SOON` and these settings, stopped at the end."""
    async with Backend(dsn, **{**SOON, **settings}) as backend:
        yield backend


async def produce(backend: Backend, *ids: str, key: str | None = None) -> None:
    """Events with these ids are in the log, in this order and in one transaction."""
    await backend.produce_many([make_event(id_, key=key) for id_ in ids])


async def status_of(backend: Backend, name: str | None = None) -> SubscriptionStatus:
    """The subscription's status."""
    found = (await backend.status()).subscriptions
    (status,) = [status for status in found if name in (None, status.name)]
    return status


async def settled(backend: Backend, name: str | None = None, timeout: float = 30.0) -> SubscriptionStatus:
    """The subscription's status once every event is settled, and no redelivery is left."""

    async def is_settled() -> SubscriptionStatus | None:
        status = await status_of(backend, name)
        return None if status.lag or status.redeliveries else status

    return await eventually(f"{name or 'the subscription'} owes nothing", is_settled, timeout)


async def complete(backend: Backend, name: str | None = None) -> None:
    """The subscription has reached its end."""

    async def is_complete() -> bool:
        return (await status_of(backend, name)).complete

    await eventually(f"{name or 'the subscription'} is complete", is_complete)


async def failed(backend: Backend, at_least: int = 1, name: str | None = None) -> None:
    """So many events wait for their redelivery; the subscription may have more to read."""

    async def have_failed() -> bool:
        return (await status_of(backend, name)).redeliveries >= at_least

    await eventually(f"{at_least} events wait for redelivery", have_failed)


async def waiting(backend: Backend, count: int, name: str | None = None) -> None:
    """Exactly so many events wait for their redelivery, and everything else is settled."""

    async def are_waiting() -> bool:
        status = await status_of(backend, name)
        return status.redeliveries == count and not status.lag

    await eventually(f"{count} events, and no more, wait for redelivery", are_waiting)


async def dead_letters(backend: Backend, count: int | None = None, name: str | None = None) -> list[DeadLetter]:
    """The dead letters, of one subscription or of all; with `count` once there are exactly so many."""
    found: list[DeadLetter] = []

    async def are_there() -> bool:
        found[:] = [letter async for letter in backend.dead_letters(name)]
        return count in (None, len(found))

    await eventually(f"{count} dead letters", are_there)
    return found


def worker_of(backend: Backend) -> Worker:
    """The worker that runs now, for tests of what no public call shows."""
    worker = backend._lifecycle.opened().runner.worker
    assert worker is not None, "no worker runs"
    return worker


@asynccontextmanager
async def started(
    dsn: str, name: str, dispatcher: ConsumerDispatcher, **settings: Any
) -> AsyncIterator[tuple[Backend, "asyncio.Task[None]"]]:
    """A backend that runs one subscription, read from the earliest event, and the task of its `start()`.

    At the end a task that has raised SchemaError has done so as the test expected.
    """
    backend = Backend(dsn, **{**SOON, "drain_timeout": 1.0, **settings})
    await backend.init()
    with Recorder() as recorder:
        task = asyncio.create_task(backend.start(), name="start")
        try:
            await backend.subscribe(name, dispatcher, start="earliest")
            await recorder.wait("lease claimed", subscription=name)
            yield backend, task
        finally:
            await backend.stop()
            with suppress(SchemaError):
                await task
