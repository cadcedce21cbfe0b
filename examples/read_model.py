"""A read model: a table of sales, kept by a transactional subscription. Each order counts exactly once.

PGBACKEND_DSN=postgresql://localhost/shop python examples/read_model.py           # run it as often as you like
PGBACKEND_DSN=postgresql://localhost/shop python examples/read_model.py rebuild   # also while others run

It counts events like this one:

SELECT pgbackend.produce('order.placed', '/shop', '{"customer": "ada", "cents": 1250}');
"""

import asyncio
import os
import signal
import sys
from collections import Counter

import asyncpg

from pgbackend import Backend, Event, filters

DSN = os.environ["PGBACKEND_DSN"]
NAME = "sales"

TABLE = "CREATE TABLE IF NOT EXISTS sales (customer text PRIMARY KEY, orders bigint NOT NULL, cents bigint NOT NULL)"
ADD = """
    INSERT INTO sales (customer, orders, cents)
    VALUES ($1, $2, $3)
    ON CONFLICT (customer) DO UPDATE
    SET orders = sales.orders + excluded.orders,
        cents = sales.cents + excluded.cents"""


async def count(events: list[Event], connection: "asyncpg.Connection[asyncpg.Record]") -> None:
    """Add these orders to the table, in the transaction that also moves the subscription's offset behind them."""
    orders: Counter[str] = Counter()
    cents: Counter[str] = Counter()
    for event in events:
        order = event.get_data()
        orders[order["customer"]] += 1
        cents[order["customer"]] += order["cents"]
    # Sorted, so that transactions of several shards would lock the rows in one order.
    await connection.executemany(ADD, [(customer, orders[customer], cents[customer]) for customer in sorted(orders)])


async def run() -> None:
    """Keep the table until a signal comes."""
    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    async with Backend(DSN) as backend:
        await backend.subscribe(
            NAME, count, start="earliest", filter=filters.Exact({"type": "order.placed"}), transactional=True, batch=100
        )
        print("Counting orders.", flush=True)
        await stopping.wait()


async def rebuild() -> None:
    """Empty the table, and have the subscription fill it from the earliest event. If this fails, run it again.

    TRUNCATE waits for the transactions that count, and new ones wait for this one. When those go on, the subscription
    has moved, so they cannot commit.
    """
    backend = Backend(DSN)
    await backend.init()
    connection = await asyncpg.connect(DSN)
    async with connection.transaction():
        await connection.execute("TRUNCATE sales")
        await backend.seek(NAME, "earliest")
    await connection.close()
    await backend.stop()
    print("Rebuilding.")


async def create_table() -> None:
    """Create the table unless it exists. An application has migrations for that."""
    connection = await asyncpg.connect(DSN)
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock(hashtext('sales'))")  # two processes may start at once
        await connection.execute(TABLE)
    await connection.close()


async def main() -> None:
    """Run, or rebuild."""
    await create_table()
    await (rebuild() if sys.argv[1:] == ["rebuild"] else run())


if __name__ == "__main__":
    asyncio.run(main())
