"""A consumer in plain SQL skips no event and repeats none: the statements of docs/sql-consumer.md, and the program in
JavaScript that uses them.
"""

import asyncio
import random
import re
from datetime import datetime

import pytest

from tests.examples.programs import EXAMPLES, ROOT, running
from tests.support.databases import Sql, connected
from tests.support.node import install
from tests.support.polling import eventually

PROGRAM = EXAMPLES / "node" / "consumer.js"
APPEND = "INSERT INTO pgbackend.events (id, source, type) VALUES ($1, '/shop', 'order.placed')"
PRODUCERS = 8

pytestmark = pytest.mark.owner

TABLES, EVIDENCE, LOCK, READ, MOVE = (
    statement.strip().removesuffix(";")
    for statement in re.findall(
        r"^```sql\n(.*?)^```$", (ROOT / "docs/sql-consumer.md").read_text(), re.MULTILINE | re.DOTALL
    )
)


# ── the statements ────────────────────────────────────────────────────────────────────────────────────────────────────


class Consumer:
    """Goes through the steps of the page."""

    def __init__(self, sql: Sql) -> None:
        self._sql = sql
        self.ids: list[str] = []

    async def take_evidence(self) -> tuple[int, set[str]]:
        row = await self._sql.fetchrow(EVIDENCE)
        assert row is not None
        return row["upto"], set(row["appenders"])

    async def consume(self, upto: int) -> None:
        """Handle all events up to there."""
        async with self._sql.transaction():
            position = await self._sql.fetchval(LOCK, "shipping")
            events = await self._sql.fetch(READ, position, upto)
            self.ids += [event["id"] for event in events]
            if events:
                await self._sql.execute(MOVE, "shipping", events[-1]["position"])


@pytest.fixture
async def consumer(sql: Sql) -> Consumer:
    await sql.execute(TABLES)
    return Consumer(sql)


def test_the_program_uses_the_statements_of_the_page() -> None:
    program = " ".join(PROGRAM.read_text().split())
    for statement in (EVIDENCE, LOCK, READ, MOVE):
        assert f"` {' '.join(statement.split())}`" in program


async def test_the_evidence_names_a_transaction_that_may_fill_a_hole_until_it_ends(
    consumer: Consumer, database: str
) -> None:
    async with connected(database) as late, connected(database) as soon:
        transaction = late.transaction()
        await transaction.start()
        await late.execute(APPEND, "late")
        await soon.execute(APPEND, "soon")

        upto, open_ = await consumer.take_evidence()
        assert upto == 2
        assert len(open_) == 1
        async with soon.transaction():
            await soon.execute(APPEND, "later")
            await transaction.commit()
            _, now = await consumer.take_evidence()
            assert len(now) == 1
            assert not now & open_
            await consumer.consume(upto)
    assert consumer.ids == ["late", "soon"]

    upto, open_ = await consumer.take_evidence()
    assert (upto, open_) == (3, set())
    await consumer.consume(upto)
    assert consumer.ids == ["late", "soon", "later"]


async def test_a_hole_of_a_rollback_is_passed(consumer: Consumer, database: str) -> None:
    async with connected(database) as producer:
        transaction = producer.transaction()
        await transaction.start()
        await producer.execute(APPEND, "undone")
        await transaction.rollback()
        await producer.execute(APPEND, "done")

    upto, open_ = await consumer.take_evidence()
    assert (upto, open_) == (2, set())
    await consumer.consume(upto)
    assert consumer.ids == ["done"]


async def test_a_failed_handler_leaves_the_consumer_where_it_was(consumer: Consumer, sql: Sql) -> None:
    await sql.execute(APPEND, "a")
    transaction = sql.transaction()
    await transaction.start()
    await consumer.consume(1)
    await transaction.rollback()
    await consumer.consume(1)
    assert consumer.ids == ["a", "a"]
    assert await sql.fetchval("SELECT position FROM consumers") == 1


# ── the program ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Load:
    """Transactions of many producers that commit late, roll back, set savepoints, and are prepared."""

    def __init__(self, dsn: str, *, prepares: bool) -> None:
        self._dsn = dsn
        self._prepares = prepares
        self.stopping = asyncio.Event()

    async def run(self) -> None:
        """Return once `stopping` is set and all transactions have ended."""
        async with asyncio.TaskGroup() as tasks:
            for number in range(PRODUCERS):
                tasks.create_task(self._produce(random.Random(number), str(number)))

    async def _produce(self, rng: random.Random, name: str) -> None:
        async with connected(self._dsn) as connection:
            made = 0
            while not self.stopping.is_set():
                made += 1
                await self._append(connection, rng, f"{name}/{made}")

    async def _append(self, connection: Sql, rng: random.Random, name: str) -> None:
        """One transaction."""
        await connection.execute("BEGIN")
        for number in range(rng.randint(1, 3)):
            await connection.execute(APPEND, f"{name}/{number}")
            await asyncio.sleep(rng.choice([0, 0, 0.01, 0.05, 0.2]))
        if rng.random() < 0.2:
            await connection.execute("SAVEPOINT s")
            await connection.execute(APPEND, f"{name}/undone")
            await asyncio.sleep(0.01)
            await connection.execute("ROLLBACK TO s")
        end = rng.choice(["COMMIT", "COMMIT", "ROLLBACK"])
        if self._prepares and rng.random() < 0.2:
            await connection.execute(f"PREPARE TRANSACTION '{name}'")
            await asyncio.sleep(0.05)
            end += f" PREPARED '{name}'"
        await connection.execute(end)


async def can_prepare(sql: Sql) -> bool:
    """Whether the server has prepared transactions."""
    return bool(await sql.fetchval("SHOW max_prepared_transactions") != "0")


class Naive:
    """A consumer that only looks behind the last position that it saw."""

    def __init__(self, sql: Sql) -> None:
        self._sql = sql
        self.seen: list[int] = []

    async def run(self, stopping: asyncio.Event) -> None:
        query = "SELECT position FROM pgbackend.events WHERE position > $1 ORDER BY position"
        while not stopping.is_set():
            last = self.seen[-1] if self.seen else 0
            self.seen += [row["position"] for row in await self._sql.fetch(query, last)]
            await asyncio.sleep(0.005)


async def shipped(sql: Sql) -> list[str]:
    """The orders that were shipped, in the order in which they were."""
    return [row["order_id"] for row in await sql.fetch("SELECT order_id FROM shipments ORDER BY number")]


async def placed(sql: Sql) -> dict[int, str]:
    """The orders that were placed, in the order of the log."""
    query = "SELECT position, id FROM pgbackend.events WHERE type = 'order.placed' ORDER BY position"
    return {row["position"]: row["id"] for row in await sql.fetch(query)}


async def has_shipped(sql: Sql, at_least: int) -> None:
    async def have_shipped() -> bool:
        return len(await shipped(sql)) >= at_least

    await eventually(f"{at_least} orders are shipped", have_shipped, timeout=60)


async def has_looked(sql: Sql) -> None:
    """Return once a program has taken the evidence three times more."""
    query = (
        "SELECT query_start FROM pg_stat_activity WHERE query LIKE '%appenders_in_flight%' AND pid <> pg_backend_pid()"
    )
    seen: set[datetime] = set()

    async def have_looked() -> bool:
        seen.update(row["query_start"] for row in await sql.fetch(query))
        return len(seen) > 3

    await eventually("the program looks", have_looked, interval=0.005)


@pytest.mark.slow
async def test_a_program_in_javascript_ships_each_order_once_and_in_order(sql: Sql, database: str) -> None:
    install(PROGRAM.parent)
    load = Load(database, prepares=await can_prepare(sql))
    async with connected(database) as looking, asyncio.TaskGroup() as tasks:
        naive = Naive(looking)
        tasks.create_task(load.run())
        tasks.create_task(naive.run(load.stopping))
        for wanted in (50, 150):
            async with (
                running("node", PROGRAM, dsn=database) as first,
                running("node", PROGRAM, dsn=database) as second,
            ):
                for program in (first, second):
                    await program.says("Shipping orders.")
                await has_shipped(sql, wanted)
                await first.kill()
                await has_shipped(sql, wanted + 50)
                await second.kill()
        load.stopping.set()
    await sql.execute(APPEND, "last")
    async with running("node", PROGRAM, dsn=database) as program:
        await eventually(
            "the last order is shipped", lambda: sql.fetchval("SELECT 1 FROM shipments WHERE order_id = 'last'")
        )
        await program.stop()

    events = await placed(sql)
    assert await shipped(sql) == list(events.values())
    produced = await sql.fetch("SELECT subject FROM pgbackend.events WHERE type = 'order.shipped' ORDER BY position")
    assert [row["subject"] for row in produced] == list(events.values())
    # The load is one that makes a naive consumer lose events.
    assert {position for position in events if position < naive.seen[-1]} - set(naive.seen)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["COMMIT", "COMMIT PREPARED 'late'"])
async def test_the_program_waits_for_a_transaction_that_stays_open(sql: Sql, database: str, end: str) -> None:
    if "PREPARED" in end and not await can_prepare(sql):
        pytest.skip("this server has max_prepared_transactions = 0")
    install(PROGRAM.parent)
    async with running("node", PROGRAM, dsn=database) as program, connected(database) as late:
        await program.says("Shipping orders.")
        await late.execute("BEGIN")
        await late.execute(APPEND, "late")
        await sql.execute(APPEND, "soon")
        await has_looked(sql)
        if "PREPARED" in end:
            await late.execute("PREPARE TRANSACTION 'late'")
            await has_looked(sql)
        assert await shipped(sql) == []
        await late.execute(end)
        await has_shipped(sql, 2)
        assert await shipped(sql) == ["late", "soon"]
        await program.stop()
