"""The applications of the plans "bank" and "orders": what they do, and what their questions about each moment find."""

import random
from typing import Any

import pytest

from pgbackend import Backend, Event, Retry
from pgbackend.torture.applications import APPLICATIONS, bank, orders
from pgbackend.torture.audit import Audit
from pgbackend.torture.plan import Name
from tests.support.backends import dead_letters, running, settled
from tests.support.databases import Sql, connected

pytestmark = pytest.mark.owner

SCHEMA = "pgbackend"
TRANSFERS = 40
"""Enough for one that is declined; the ids are those of a place with one transfer to the closed account."""


async def install(database: str, name: Name) -> None:
    await Audit(database, SCHEMA).install(APPLICATIONS[name].tables)


async def moment(sql: Sql, name: Name) -> dict[str, tuple[int, int]]:
    """The value that the question finds, and the one that it should."""
    rows = await sql.fetch(APPLICATIONS[name].moment.format(schema=SCHEMA))
    return {row["what"]: (row["found"], row["wanted"]) for row in rows}


async def wrong(sql: Sql, name: Name) -> dict[str, int]:
    return {what: found for what, (found, wanted) in (await moment(sql, name)).items() if found != wanted}


async def transfer(backend: Backend, *numbers: int, batch: int | None = None) -> None:
    """The transfers are produced, and the bank "single" has settled them."""
    terms = bank.SUBSCRIPTIONS["single"]

    async def handle(work: Any, connection: Any) -> None:
        events: list[Event] = work if isinstance(work, list) else [work]
        await bank.apply(SCHEMA, "single", terms, events, connection)

    await backend.produce_many([bank.make_event(f"p-{number}", random.Random()) for number in numbers])
    retry = Retry(attempts=5, delay=0.0)
    await backend.subscribe("single", handle, start="earliest", transactional=True, batch=batch, retry=retry)
    await settled(backend)


@pytest.mark.parametrize("batch", [None, 7])
async def test_a_bank_makes_each_transfer_once_and_rejects_those_to_the_closed_account(
    database: str, sql: Sql, batch: int | None
) -> None:
    numbers = range(55 - TRANSFERS, 56)
    closed = [number for number in numbers if bank.transfer(f"p-{number}").target == bank.CLOSED]
    assert closed == [55]
    await install(database, "bank")
    async with running(database) as backend:
        await transfer(backend, *numbers, batch=batch)
        assert [letter.event.id for letter in await dead_letters(backend, 1)] == ["p-55"]
        assert await wrong(sql, "bank") == {}
    noted = [row["id"] for row in await sql.fetch("SELECT id FROM pgbackend.torture_effects ORDER BY position")]
    assert noted == [f"p-{number}" for number in numbers if number not in closed]
    assert (await moment(sql, "bank"))["single:total"] == (40_000, 40_000)


async def test_the_question_about_the_bank_finds_each_way_to_disagree(database: str, sql: Sql) -> None:
    await install(database, "bank")
    async with running(database) as backend:
        await transfer(backend, 1, 2)
    assert await wrong(sql, "bank") == {}

    await sql.execute("UPDATE pgbackend.offsets SET position = 1")
    assert await wrong(sql, "bank") == {"single:effects_of_unsettled_events": 1}
    await sql.execute("UPDATE pgbackend.offsets SET position = 2, pending = '{[1,2)}'")
    assert await wrong(sql, "bank") == {"single:effects_of_unsettled_events": 1}
    await sql.execute("UPDATE pgbackend.offsets SET pending = '{}'")
    await sql.execute("""
        INSERT INTO pgbackend.redeliveries (subscription, position, key_hash, attempt, due_at, last_error)
        VALUES ('single', 2, 0, 1, now(), '')
    """)
    assert await wrong(sql, "bank") == {"single:effects_of_unsettled_events": 1}
    await sql.execute("DELETE FROM pgbackend.redeliveries")

    await sql.execute("DELETE FROM pgbackend.torture_effects WHERE position = 2")
    assert await wrong(sql, "bank") == {"single:settled_without_effect": 1}
    await sql.execute("UPDATE pgbackend.offsets SET position = 1")
    assert await wrong(sql, "bank") == {}

    one = "SET balance = balance {} WHERE subscription = 'single' AND account = 'account-0'"
    await sql.execute(f"UPDATE pgbackend.torture_accounts {one.format('- 1')}")
    assert await wrong(sql, "bank") == {"single:total": 39_999}
    await sql.execute(f"UPDATE pgbackend.torture_accounts {one.format('+ 1 - 5000')}")
    assert await wrong(sql, "bank") == {"single:total": 35_000, "single:overdrawn_accounts": 1}


async def test_the_question_about_the_orders_finds_each_way_to_disagree(database: str, sql: Sql) -> None:
    await install(database, "orders")
    async with running(database) as backend, connected(database) as connection:
        for number in range(6):
            async with connection.transaction():
                await orders.place(backend, SCHEMA, f"p-{number}", "key", connection)
    assert await sql.fetchval("SELECT count(*) FROM pgbackend.torture_orders") == 6
    assert await wrong(sql, "orders") == {}
    await sql.execute("DELETE FROM pgbackend.torture_orders WHERE id = 'p-1'")
    assert await wrong(sql, "orders") == {"events_without_order": 1}
    await sql.execute("INSERT INTO pgbackend.torture_orders (id) VALUES ('p-1'), ('p-6'), ('p-7')")
    assert await wrong(sql, "orders") == {"orders_without_event": 2}
