"""Databases of a test's own; one statement or one connection to them, past the engine, as the owner."""

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, TypeAlias
from urllib.parse import urlsplit

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


@asynccontextmanager
async def new_database(server: str, *, template: str) -> AsyncIterator[str]:
    """DSN of a copy of the database `template`, dropped at the end."""
    name = f"pgbackend_test_{uuid.uuid4().hex[:12]}"
    async with connected(server) as connection:
        # Copying files takes 13 ms of CPU time, the default of PostgreSQL 15 and newer, WAL_LOG, 28.
        strategy = "strategy file_copy" if connection.get_server_version().major >= 15 else ""
        await connection.execute(f'create database "{name}" template "{template}" {strategy}')
    try:
        yield dsn_of(server, name)
    finally:
        async with connected(server) as connection:
            await connection.execute(f'drop database if exists "{name}" with (force)')


def dsn_of(server: str, database: str) -> str:
    """The DSN of another database on the same server."""
    return urlsplit(server)._replace(path=f"/{database}").geturl()


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
