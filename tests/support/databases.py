"""One statement or one connection, straight to a database and past the engine, as its owner."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, TypeAlias

import asyncpg

Sql: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
"""A connection past the engine."""


@asynccontextmanager
async def connected(dsn: str, **settings: str) -> AsyncIterator[Sql]:
    """A connection, closed at the end; `settings` are the server's, for this session."""
    connection = await asyncpg.connect(dsn, server_settings=settings)
    try:
        yield connection
    finally:
        await connection.close()


async def execute(dsn: str, statement: str, *args: object) -> str:
    """The command tag, once the statement has ended. Without `args` it may be several statements."""
    async with connected(dsn) as connection:
        return await connection.execute(statement, *args)


async def query_value(dsn: str, query: str, *args: object) -> Any:
    """The first column of the first row; None when there is no row."""
    async with connected(dsn) as connection:
        return await connection.fetchval(query, *args)


async def query_rows(dsn: str, query: str, *args: object) -> list[tuple[Any, ...]]:
    """All rows, as tuples that a test can compare."""
    async with connected(dsn) as connection:
        return [tuple(row) for row in await connection.fetch(query, *args)]


async def clock(dsn: str) -> datetime:
    """The time by the server's clock."""
    now: datetime = await query_value(dsn, "SELECT clock_timestamp()")
    return now
