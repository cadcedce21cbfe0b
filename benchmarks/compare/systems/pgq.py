"""PgQ: an extension in C, and pgqd, which ends its batches.

`pgq.insert_event()` stores one event; a batch is copied into the queue's current table, as PgQ's documentation allows.
Each reader is a consumer that asks for the next batch, reads it through a cursor and finishes it. PgQ has no
notifications, so consumers ask again after `_POLL`.
"""

import asyncio
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

import asyncpg

from benchmarks.compare.system import PAGE, CompareError, Count
from benchmarks.compare.systems import own_server, postgresql
from benchmarks.compare.systems.consuming import consuming

_DEBIAN = Path("/usr/lib/postgresql/15")
_QUEUE = "events"
_TICK = 0.01
"""Seconds between two looks of pgqd for new events; its default is 1."""
_POLL = 0.005
"""Seconds after which a consumer without events asks again."""
_PATIENCE = 10.0
_CURSOR_PAGE = 5 * PAGE


class PgQ:
    title = "PgQ (on PostgreSQL 15)"
    kind: Literal["log", "queue"] = "log"
    durability = postgresql.DURABILITY
    mode = (
        f"COPY into the current table; pgqd with ticker_period {_TICK:g}, ticker_max_lag 0; a cursor for each batch, "
        f"fetches of {_CURSOR_PAGE:,}; consumers ask every {_POLL * 1000:g} ms"
    )
    server = postgresql.PostgreSQL(
        _DEBIAN / "bin",
        needs=(_DEBIAN / "lib/pgq_lowlevel.so", "apt-get install postgresql-15 postgresql-15-pgq3 pgqd"),
    )

    async def versions(self, server: str) -> str:
        connection = await asyncpg.connect(server)
        extension = await connection.fetchval("SELECT default_version FROM pg_available_extensions WHERE name = 'pgq'")
        await connection.close()
        return f"{await postgresql.server_version(server)}, PgQ {extension}, asyncpg {version('asyncpg')}"

    @asynccontextmanager
    async def fresh(self, server: str, readers: Sequence[str]) -> AsyncIterator[str]:
        async with postgresql.fresh_database(server, "pgq_queue", _prepare) as dsn:
            connection = await asyncpg.connect(dsn)
            for reader in readers:
                await connection.execute("SELECT pgq.register_consumer($1, $2)", _QUEUE, reader)
            async with _ticker(dsn, connection):
                yield dsn
            await connection.close()

    def events(self, bodies: Sequence[bytes]) -> list[Any]:
        return [body.decode() for body in bodies]

    @asynccontextmanager
    async def producer(self, address: str, tasks: int) -> AsyncIterator["_Producer"]:
        async with postgresql.pool(address, tasks) as pool:
            yield _Producer(pool)

    @asynccontextmanager
    async def consumer(self, address: str, reader: str, count: Count) -> AsyncIterator[None]:
        connection = await asyncpg.connect(address)
        async with consuming(lambda stop: _consume(connection, reader, count, stop)):
            yield
        await connection.close()

    async def settle(self, address: str) -> None:
        connection = await asyncpg.connect(address)
        # The last events are in no batch until pgqd has looked once more.
        async with asyncio.timeout(_PATIENCE):
            while await connection.fetchval("SELECT ev_new FROM pgq.get_queue_info($1)", _QUEUE):  # noqa: ASYNC110 - it can only be polled
                await asyncio.sleep(_POLL)
        await connection.close()
        await postgresql.vacuum(address)

    async def left(self, address: str, readers: Sequence[str]) -> int:
        return await postgresql.one_value(
            address,
            "SELECT sum(pending_events) FROM pgq.get_consumer_info($1) WHERE consumer_name = any($2)",
            _QUEUE,
            list(readers),
        )


class _Producer:
    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]") -> None:
        self._pool = pool

    async def one(self, event: str) -> None:
        await self._pool.execute(f"SELECT pgq.insert_event('{_QUEUE}', 'order.created', $1)", event)

    async def many(self, events: Sequence[str]) -> None:
        now = datetime.now(UTC)
        records = [(now, "order.created", event) for event in events]
        async with self._pool.acquire() as connection, connection.transaction():
            # The answer is only valid in this transaction.
            schema, table = (await connection.fetchval("SELECT pgq.current_event_table($1)", _QUEUE)).split(".")
            await connection.copy_records_to_table(
                table, schema_name=schema, columns=["ev_time", "ev_type", "ev_data"], records=records
            )


async def _consume(
    connection: "asyncpg.Connection[asyncpg.Record]", reader: str, count: Count, stop: asyncio.Event
) -> None:
    async def handle(event: str) -> None:
        count(event.encode())

    while not stop.is_set():
        batch = await connection.fetchval("SELECT pgq.next_batch($1, $2)", _QUEUE, reader)
        if batch is None:
            await asyncio.sleep(_POLL)
            continue
        async with connection.transaction():
            rows = await connection.fetch(
                "SELECT ev_data FROM pgq.get_batch_cursor($1, 'batch', $2)", batch, _CURSOR_PAGE
            )
            while rows:
                for row in rows:
                    await handle(row["ev_data"])
                rows = await connection.fetch(f"FETCH {_CURSOR_PAGE} FROM batch") if len(rows) == _CURSOR_PAGE else []
        await connection.execute("SELECT pgq.finish_batch($1)", batch)


@asynccontextmanager
async def _ticker(dsn: str, connection: "asyncpg.Connection[asyncpg.Record]") -> AsyncIterator[None]:
    """While pgqd ends the batches of this database."""
    parts = urlsplit(dsn)
    query = parse_qs(parts.query)
    program = shutil.which("pgqd")
    if program is None:
        raise CompareError("pgqd is missing: apt-get install pgqd")
    async with own_server.fresh_directory(query["host"][0]) as directory:
        configuration = directory / "pgqd.ini"
        configuration.write_text(
            f"[pgqd]\nlogfile = {directory}/log\npidfile = {directory}/pid\nticker_period = {_TICK}\n"
            f"base_connstr = host={query['host'][0]} port={query['port'][0]} user={parts.username}\n"
            f"initial_database = {parts.path[1:]}\ndatabase_list = {parts.path[1:]}\n"
        )
        process = await asyncio.create_subprocess_exec(
            program, "-q", str(configuration), stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
        )
        try:
            async with asyncio.timeout(_PATIENCE):
                # The queue has a tick since it was created; the next one is pgqd's.
                while await connection.fetchval("SELECT count(*) FROM pgq.tick") < 2:  # noqa: ASYNC110 - as above
                    await asyncio.sleep(0.02)
            yield
        finally:
            process.terminate()
            await process.wait()


async def _prepare(dsn: str) -> None:
    connection = await asyncpg.connect(dsn)
    await connection.execute("CREATE EXTENSION pgq")
    await connection.execute("SELECT pgq.create_queue($1)", _QUEUE)
    await connection.execute("SELECT pgq.set_queue_config($1, 'ticker_max_lag', '0')", _QUEUE)
    await connection.close()
