"""Bare asyncpg: the limit for everything that stores events in PostgreSQL.

A table with a number and the bytes, INSERT for one event and COPY for a batch. A reader fetches pages, awaits a handler
for each event and commits its offset after each page. When there is a reader, each transaction notifies it.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any, Literal

import asyncpg

from benchmarks.compare.system import PAGE, Count
from benchmarks.compare.systems import postgresql
from benchmarks.compare.systems.consuming import WAIT, consuming

_SCHEMA = """
    CREATE TABLE events (position bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, event bytea NOT NULL);
    CREATE TABLE readers (name text PRIMARY KEY, position bigint NOT NULL)"""
_INSERT = "INSERT INTO events (event) VALUES ($1)"
_INSERT_AND_NOTIFY = """
    WITH stored AS (INSERT INTO events (event) VALUES ($1) RETURNING position)
    SELECT pg_notify('events', '') FROM stored"""


class Bare:
    title = "bare asyncpg (the limit)"
    kind: Literal["log", "queue"] = "log"
    durability = postgresql.DURABILITY
    mode = f"INSERT, COPY; pages of {PAGE:,}, an offset for each page; NOTIFY in the transaction if there is a reader"
    server = postgresql.EMBEDDED

    async def versions(self, server: str) -> str:
        return f"{await postgresql.server_version(server)}, asyncpg {version('asyncpg')}"

    @asynccontextmanager
    async def fresh(self, server: str, readers: Sequence[str]) -> AsyncIterator[str]:
        async with postgresql.fresh_database(server, "bare", _prepare) as dsn:
            connection = await asyncpg.connect(dsn)
            await connection.executemany("INSERT INTO readers VALUES ($1, 0)", [(reader,) for reader in readers])
            await connection.close()
            yield dsn

    def events(self, bodies: Sequence[bytes]) -> list[Any]:
        return list(bodies)

    @asynccontextmanager
    async def producer(self, address: str, tasks: int) -> AsyncIterator["_Producer"]:
        async with postgresql.pool(address, tasks) as pool:
            yield _Producer(pool, notifies=await pool.fetchval("SELECT EXISTS (SELECT FROM readers)"))

    @asynccontextmanager
    async def consumer(self, address: str, reader: str, count: Count) -> AsyncIterator[None]:
        connection, listener = await asyncpg.connect(address), await asyncpg.connect(address)
        woken = asyncio.Event()
        await listener.add_listener("events", lambda *_: woken.set())
        async with consuming(lambda stop: _consume(connection, reader, count, woken, stop)):
            yield
        await listener.close()
        await connection.close()

    async def settle(self, address: str) -> None:
        await postgresql.vacuum(address)

    async def left(self, address: str, readers: Sequence[str]) -> int:
        return await postgresql.one_value(
            address,
            "SELECT sum((SELECT max(position) FROM events) - position) FROM readers WHERE name = any($1)",
            list(readers),
        )


class _Producer:
    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]", *, notifies: bool) -> None:
        self._pool = pool
        self._notifies = notifies

    async def one(self, event: bytes) -> None:
        await self._pool.execute(_INSERT_AND_NOTIFY if self._notifies else _INSERT, event)

    async def many(self, events: Sequence[bytes]) -> None:
        records = [(event,) for event in events]
        async with self._pool.acquire() as connection:
            if not self._notifies:
                await connection.copy_records_to_table("events", columns=["event"], records=records)
                return
            async with connection.transaction():
                await connection.copy_records_to_table("events", columns=["event"], records=records)
                await connection.execute("NOTIFY events")


async def _consume(
    connection: "asyncpg.Connection[asyncpg.Record]",
    reader: str,
    count: Count,
    woken: asyncio.Event,
    stop: asyncio.Event,
) -> None:
    async def handle(event: bytes) -> None:
        count(event)

    read = await connection.prepare(
        f"SELECT position, event FROM events WHERE position > $1 ORDER BY position LIMIT {PAGE}"
    )
    commit = await connection.prepare("UPDATE readers SET position = $2 WHERE name = $1")
    position = await connection.fetchval("SELECT position FROM readers WHERE name = $1", reader)
    while not stop.is_set():
        woken.clear()
        while not stop.is_set() and (rows := await read.fetch(position)):
            for row in rows:
                await handle(row["event"])
            position = rows[-1]["position"]
            await commit.fetch(reader, position)
        try:
            async with asyncio.timeout(WAIT):
                await woken.wait()
        except TimeoutError:
            continue


async def _prepare(dsn: str) -> None:
    connection = await asyncpg.connect(dsn)
    await connection.execute(_SCHEMA)
    await connection.close()
