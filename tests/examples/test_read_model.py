"""examples/read_model.py counts every order once, whatever becomes of its processes."""

import asyncio
import json
import random
import re
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from pgbackend import Backend
from tests.examples.programs import EXAMPLES, running
from tests.support.databases import Sql
from tests.support.polling import eventually

PROGRAM = EXAMPLES / "read_model.py"

pytestmark = [pytest.mark.slow, pytest.mark.owner]


class Shop:
    """Places orders, and knows what the table must have."""

    def __init__(self, backend: Backend, sql: Sql) -> None:
        self._backend = backend
        self._sql = sql
        self.placed = 0
        """Orders so far."""
        self._expected: Counter[tuple[str, str]] = Counter()

    @asynccontextmanager
    async def busy(self) -> AsyncIterator[None]:
        """Orders are placed all the time, and as many events of another type."""
        closing = asyncio.Event()

        async def place() -> None:
            while not closing.is_set():
                orders, others = [self._order() for _ in range(5)], [_event("order.viewed", {})] * 5
                await self._backend.produce_many(orders + others)
                await asyncio.sleep(0.005)  # the pace: the subscription keeps up

        placing = asyncio.create_task(place())
        await self.has_counted(await self.counted() + 50)
        yield
        closing.set()
        await placing

    def _order(self) -> bytes:
        customer, cents = random.choice("abcdefgh"), random.randrange(10_000)
        self.placed += 1
        self._expected["orders", customer] += 1
        self._expected["cents", customer] += cents
        return _event("order.placed", {"customer": customer, "cents": cents})

    async def counted(self) -> int:
        """How many orders are in the table."""
        counted: int = await self._sql.fetchval("SELECT coalesce(sum(orders), 0)::bigint FROM sales")
        return counted

    async def has_counted(self, at_least: int) -> None:
        """Return once so many orders are in the table."""

        async def have_counted() -> bool:
            return await self.counted() >= at_least

        await eventually(f"{at_least} orders are counted", have_counted)

    async def is_settled(self) -> None:
        """Return once the subscription owes nothing."""

        async def owes_nothing() -> bool:
            (status,) = (await self._backend.status()).subscriptions
            return not status.lag and not status.redeliveries

        await eventually("the subscription owes nothing", owes_nothing, timeout=120)

    async def is_counted_exactly(self) -> None:
        """The table is right, once the subscription owes nothing."""
        await self.is_settled()
        found: Counter[tuple[str, str]] = Counter()
        for customer, orders, cents in await self._sql.fetch("SELECT customer, orders, cents FROM sales"):
            found["orders", customer], found["cents", customer] = orders, cents
        assert found == self._expected
        assert await self.counted() == self.placed


def _event(kind: str, data: object) -> bytes:
    return json.dumps({
        "specversion": "1.0", "id": str(random.getrandbits(64)), "source": "/shop", "type": kind, "data": data,
    }).encode()  # fmt: skip


@pytest.fixture
def shop(backend: Backend, sql: Sql) -> Shop:
    return Shop(backend, sql)


async def test_each_order_counts_once_although_the_process_is_killed(shop: Shop, database: str) -> None:
    for _ in range(2):
        async with running(PROGRAM, dsn=database) as program:
            await program.says("Counting orders.")
            async with shop.busy():
                await program.kill()
            assert await shop.counted() < shop.placed
    async with running(PROGRAM, dsn=database) as program:
        await shop.is_counted_exactly()
        await program.stop()


async def test_the_event_of_the_first_lines_counts(shop: Shop, sql: Sql, database: str) -> None:
    (produce,) = re.findall(r"^SELECT .*;$", PROGRAM.read_text(), re.MULTILINE)
    async with running(PROGRAM, dsn=database) as program:
        await program.says("Counting orders.")
        await sql.execute(produce)
        await shop.has_counted(1)
        assert [tuple(row) for row in await sql.fetch("SELECT * FROM sales")] == [("ada", 1, 1250)]
        await program.stop()


async def test_a_rebuild_beside_running_processes_counts_each_order_once(shop: Shop, sql: Sql, database: str) -> None:
    async with running(PROGRAM, dsn=database) as first, running(PROGRAM, dsn=database) as second:
        for program in (first, second):
            await program.says("Counting orders.")
        async with shop.busy():
            for _ in range(3):
                await sql.execute("UPDATE sales SET orders = orders + 1, cents = 0")  # a mistake
                async with running(PROGRAM, "rebuild", dsn=database) as rebuild:
                    assert await rebuild.ended() == 0, rebuild.output
                assert rebuild.output == "Rebuilding.\n"
        await shop.is_counted_exactly()
        await first.stop()
        await second.stop()
