"""examples/django_orders.py: an order and its event are there together, and another process reacts to the event."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import aiohttp
import pytest

from tests.examples.orders import Orders
from tests.examples.programs import EXAMPLES, Program, running
from tests.support.databases import Sql
from tests.support.polling import eventually
from tests.support.ports import unasked_port

PROGRAM = EXAMPLES / "django_orders.py"

pytestmark = [pytest.mark.slow, pytest.mark.owner]


@pytest.fixture
def orders(sql: Sql) -> Orders:
    return Orders(sql, table="shop_order")


@asynccontextmanager
async def shop(dsn: str) -> AsyncIterator[tuple[Program, aiohttp.ClientSession]]:
    """The application, and a client of it."""
    address = f"127.0.0.1:{unasked_port()}"
    async with running(PROGRAM, "runserver", "--noreload", address, dsn=dsn) as program:
        await program.says(f"development server at http://{address}/")
        async with aiohttp.ClientSession(f"http://{address}") as client:

            async def listens() -> bool:
                with suppress(aiohttp.ClientConnectionError):
                    async with client.get("/orders/0") as answer:
                        return answer.status == 404
                return False

            await eventually("the application listens", listens)
            yield program, client


async def place(client: aiohttp.ClientSession, quantity: int) -> int:
    """The status of the answer."""
    async with client.post("/orders", data={"item": "book", "quantity": quantity}) as answer:
        return answer.status


async def test_an_order_is_shipped_when_another_process_has_handled_its_event(orders: Orders, database: str) -> None:
    async with shop(database) as (_, client), running(PROGRAM, "consume", dsn=database) as consumer:
        await consumer.says("Shipping orders.")
        async with client.post("/orders", data={"item": "book", "quantity": 2}) as answer:
            assert answer.status == 201
            number = (await answer.json())["order"]

        async def is_shipped() -> bool:
            async with client.get(f"/orders/{number}") as answer:
                return bool((await answer.json())["status"] == "shipped")

        await eventually("the order is shipped", is_shipped)
        await consumer.stop()
    assert await orders.shipped() == [number]


async def test_an_order_that_is_not_stored_leaves_no_event(orders: Orders, database: str) -> None:
    async with shop(database) as (_, client), running(PROGRAM, "consume", dsn=database) as consumer:
        await consumer.says("Shipping orders.")
        await orders.refuse_thirteen()
        answers = await asyncio.gather(*(place(client, quantity) for quantity in [1, 13] * 10))
        assert Counter(answers) == {201: 10, 500: 10}
        assert len(await orders.shipped()) == 10
        await consumer.stop()


async def test_orders_that_are_placed_while_no_consumer_lives_are_shipped_later(orders: Orders, database: str) -> None:
    async with shop(database) as (_, client):
        async with running(PROGRAM, "consume", dsn=database) as consumer:
            await consumer.says("Shipping orders.")
            await place(client, 1)
            await consumer.kill()
        await asyncio.gather(*(place(client, 1) for _ in range(20)))
        async with running(PROGRAM, "consume", dsn=database) as consumer:
            assert len(await orders.shipped()) == 21
            await consumer.stop()
