"""examples/fastapi_orders.py: an order and its event are there together, and the event's handler reacts."""

import asyncio
import re
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import aiohttp
import pytest

from tests.examples.orders import Orders
from tests.examples.programs import Program, running
from tests.support.databases import Sql
from tests.support.polling import eventually

# SQLAlchemy's asyncpg needs settings of its own behind a pooler.
pytestmark = [pytest.mark.slow, pytest.mark.owner, pytest.mark.direct]

UVICORN = -signal.SIGTERM
"""uvicorn shuts down, and then ends by the signal."""


@asynccontextmanager
async def shop(dsn: str) -> AsyncIterator[tuple[Program, aiohttp.ClientSession]]:
    """The application, and a client of it."""
    command = [sys.executable, "-m", "uvicorn", "--app-dir", "examples", "fastapi_orders:app", "--port", "0"]
    async with running(*command, dsn=dsn) as program:
        (url,) = re.findall(r"running on (http\S+)", await program.says("Uvicorn running on"))
        # uvicorn closes a connection after an error of the application, just when a client may use it again.
        async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(force_close=True)) as client:
            yield program, client


async def place(client: aiohttp.ClientSession, quantity: int) -> int:
    """The status of the answer."""
    async with client.post("/orders", json={"item": "book", "quantity": quantity}) as answer:
        return answer.status


@pytest.fixture
def orders(sql: Sql) -> Orders:
    return Orders(sql, table="orders")


async def test_an_order_is_shipped_when_its_event_has_been_handled(orders: Orders, database: str) -> None:
    async with shop(database) as (program, client):
        async with client.post("/orders", json={"item": "book", "quantity": 2}) as answer:
            assert answer.status == 201
            number = (await answer.json())["order"]

        async def is_shipped() -> bool:
            async with client.get(f"/orders/{number}") as answer:
                return bool((await answer.json())["status"] == "shipped")

        await eventually("the order is shipped", is_shipped)
        await program.stop(UVICORN)
    assert await orders.shipped() == [number]


async def test_an_order_that_is_not_stored_leaves_no_event(orders: Orders, database: str) -> None:
    async with shop(database) as (program, client):
        await orders.refuse_thirteen()
        assert Counter(await asyncio.gather(*(place(client, 13) for _ in range(10)))) == {500: 10}
        assert Counter(await asyncio.gather(*(place(client, 30) for _ in range(10)))) == {201: 3, 409: 7}
        assert len(await orders.shipped()) == 3
        await program.stop(UVICORN)


async def test_a_killed_application_leaves_no_order_without_its_event(orders: Orders, sql: Sql, database: str) -> None:
    placed: list[int] = []

    async def keep_placing(client: aiohttp.ClientSession) -> None:
        with suppress(aiohttp.ClientError):
            while True:
                placed.append(await place(client, 1))

    async with shop(database) as (program, client):
        await sql.execute('UPDATE stock SET "left" = 1000000')
        async with asyncio.TaskGroup() as tasks:
            for _ in range(8):
                tasks.create_task(keep_placing(client))
            await eventually("orders are placed", lambda: len(placed) > 50)
            await program.kill()
    assert set(placed) == {201}

    async with shop(database) as (program, _):
        assert len(await orders.shipped()) >= len(placed)
        await program.stop(UVICORN)
