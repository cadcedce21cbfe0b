"""The Python and the SQL of the pages run, in their order, on a real log."""

import ast
import inspect
from datetime import timedelta
from typing import Any

import asyncpg
import pytest
from cloudevents.core.v1.event import CloudEvent

import pgbackend
from pgbackend import Backend, Event
from tests.docs.programs import PROGRAMS
from tests.support.backends import produce, running, settled
from tests.support.databases import Sql
from tests.support.events import make_event
from tests.support.pages import blocks
from tests.support.polling import eventually

# The pages' own tables belong to the owner.
pytestmark = [pytest.mark.direct, pytest.mark.owner]


async def run(page: str, backend: Backend, sql: Sql, **names: Any) -> dict[str, Any]:
    """Run the page's blocks in one namespace, which has pgbackend's public names, and return that."""

    async def bill(event: Event) -> None:
        """The handler that pages do not spell out."""

    async def post_to_billing(event: Event) -> None:
        raise RuntimeError("The target answers with 503.")

    await backend.subscribe("billing", bill)
    await backend.unsubscribe("billing")  # it is stored, and a page may run it
    await produce(backend, *(f"event {number}" for number in range(20)))
    public = {name: getattr(pgbackend, name) for name in pgbackend.__all__}
    namespace = public | {"asyncpg": asyncpg, "timedelta": timedelta, "CloudEvent": CloudEvent, "bill": bill}
    namespace |= {"backend": backend, "event": make_event("shown"), "post_to_billing": post_to_billing} | names
    for block in blocks(page, "python", "sql"):
        if block.language == "sql":
            await sql.execute(block.text)
            continue
        code = compile(block.text, str(block), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        result = eval(code, namespace)  # noqa: S307 - our own docs
        if inspect.isawaitable(result):
            await result
    return namespace


@pytest.mark.parametrize("page", sorted(PROGRAMS.keys() - {"docs/subscribing.md"}))
async def test_the_programs_of_a_page_run(page: str, database: str, sql: Sql) -> None:
    if PROGRAMS[page]:
        await sql.execute(PROGRAMS[page])
    handled: list[object] = []
    async with running(database) as backend, asyncpg.create_pool(database, min_size=1) as pool:
        await backend.subscribe("all", lambda event: handled.append(event.get_data()))
        await run(page, backend, sql, pool=pool)
        await settled(backend, "all")
    if page == "docs/producing.md":
        assert handled.count({"order": 17}) == 5  # three by Python, two by SQL
        assert await sql.fetchval("SELECT id FROM orders") == 17


async def test_the_subscriptions_of_the_page_handle_events(database: str, sql: Sql) -> None:
    await sql.execute(PROGRAMS["docs/subscribing.md"])
    async with running(database, drain_timeout=5.0) as backend:
        names = await run("docs/subscribing.md", backend, sql)
        assert names["important"](make_event("a")) is names["orders"](make_event("a")) is False
        transfer = {"from": 1, "to": 2, "amount": 30}
        await backend.produce(CloudEvent({"type": "transfer", "source": "/bank"}, transfer))

        async def is_booked() -> bool:
            return [row["balance"] for row in await sql.fetch("SELECT balance FROM accounts ORDER BY id")] == [70, 30]

        await eventually("the transfer is booked", is_booked)
        await settled(backend, "search")

    for card, signal in {None: "Reject", "expired": "RetryAfter", "stolen": "Pause"}.items():
        with pytest.raises(getattr(pgbackend, signal)):
            await names["charge"](CloudEvent({"type": "order.created", "source": "/shop"}, {"card": card}))
