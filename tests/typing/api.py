"""The code of the README type-checks as people write it. mypy reads this file; nothing runs it."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import asyncpg
from cloudevents.core.base import BaseCloudEvent
from cloudevents.core.v1.event import CloudEvent
from sqlalchemy.orm import Session

from pgbackend import (
    Backend,
    ConsumerDispatcher,
    DeadLetter,
    Event,
    EventProducer,
    HistoryEntry,
    Info,
    Interface,
    ProbeError,
    ProduceUncertainError,
    Redaction,
    Reject,
    Retry,
    RetryAfter,
    Status,
    Subscribable,
    WaitingEvent,
    filters,
    outbox,
    schema,
)


async def first_screen() -> None:
    billed = asyncio.Event()

    async def bill(event: Event) -> None:
        print(event.position, event.type, event.get_data())  # noqa: T201 - as in the README
        billed.set()

    async with Backend.embedded("./pgdata") as backend:
        await backend.subscribe("billing", bill)
        await backend.produce(CloudEvent({"type": "order.created", "source": "/shop"}, {"order": 17}))
        await billed.wait()


async def subscribing(backend: Backend) -> None:
    async def bill(event: Event) -> None:
        if event.attempt > 3:
            raise Reject("no such customer", details={"customer": "17"})
        raise RetryAfter("closed", delay=60)

    def in_a_thread(event: Event) -> None:
        assert event.data_bytes is not None

    given_up: ConsumerDispatcher = in_a_thread
    await backend.subscribe(
        "billing",
        bill,
        start="latest",
        end=None,
        filter=filters.Prefix({"type": "order."}),
        order="none",
        concurrency=64,
        retry=Retry(attempts=5, delay=1.0, backoff="exponential", max_delay=600.0),
        dead_letter=given_up,
    )
    await backend.subscribe("audit", in_a_thread, start=datetime.now(UTC), filter=lambda event: event.id != "1")
    await backend.seek("billing", "earliest")
    await backend.seek("billing", 17)
    await backend.reconfigure("billing", in_a_thread, concurrency=8, retry=Retry(attempts=3), dead_letter=given_up)
    await backend.alter_subscription("billing", order="key", end=datetime.now(UTC), start="latest")
    await backend.unsubscribe("billing")
    await backend.delete_subscription("billing")


async def operating(backend: Backend) -> None:
    info: Info = backend.info()
    status: Status = await backend.status()
    letters: AsyncIterator[DeadLetter] = backend.dead_letters("billing")
    async for letter in letters:
        count: int = await backend.redeliver(letter.id)
    count = await backend.redeliver(subscription="billing")
    async for waiting in backend.waiting("billing"):
        failed: WaitingEvent = waiting
        entry: HistoryEntry = failed.history[0]
        assert entry.attempt == 1
        count = await backend.retry_now("billing", position=failed.position)
        await backend.skip("billing", failed.position)
        redaction: Redaction = await backend.redact(failed.position)
        assert redaction.tables
    try:
        await backend.probe()
    except ProbeError as error:
        checks: dict[str, str] = error.checks
        assert checks
    lag: float | None = status.subscriptions[0].lag_seconds
    assert lag
    assert info.name
    assert status.head == count


async def producing(producer: EventProducer, event: BaseCloudEvent) -> None:
    try:
        await producer.produce(event)
    except ProduceUncertainError:
        await producer.produce(event)


async def in_a_transaction(
    backend: Backend, event: Event, connection: "asyncpg.Connection[asyncpg.Record]", session: Session
) -> None:
    async with connection.transaction():
        await backend.produce(event, connection=connection)
        await backend.produce_many([event], connection=connection, notify=True)
    with session.begin():
        outbox.produce(session, event)
        outbox.produce_many(session, (event for _ in range(2)), schema="other", notify=True)
        schema.upgrade(session.connection(), schema="other")


async def protocols(backend: Backend, event: Event) -> None:
    interface: Interface = backend
    subscribable: Subscribable = backend
    await interface.init()
    await subscribable.unsubscribe("billing")
    # An event from a dispatcher can be produced again.
    await backend.produce_many([event])
