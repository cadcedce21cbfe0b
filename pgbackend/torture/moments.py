"""Conditions that must hold at each moment of a run: asked again and again, and noted for the verdict.

    moment WHAT FOUND WANTED

One statement asks for everything, so that each answer shows one snapshot of the database. An answer of which the two
numbers differ is a moment at which a transaction had taken effect in part.
"""

import asyncio
import time
from contextlib import suppress

import asyncpg

from pgbackend.postgres.pool import Database
from pgbackend.torture.records import Notes

PLACE = "moments"
_INTERVAL = 0.25
"""Seconds between two moments, at least."""
_SHARE = 20
"""The question takes one part in so many of the time. Its cost grows with the log."""
_LOST = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)


async def watch(dsn: str, question: str, notes: Notes) -> None:
    """Note moments until cancelled. Pauses while PostgreSQL is away."""
    while True:
        with suppress(*_LOST):
            connection = await Database(dsn).connect(timeout=10)
            try:
                while True:
                    began = time.monotonic()
                    rows = await connection.fetch(question, timeout=60)
                    for row in rows:
                        notes.note("moment", row["what"], row["found"], row["wanted"])
                    await asyncio.sleep(max(_INTERVAL, (_SHARE - 1) * (time.monotonic() - began)))
            finally:
                connection.terminate()
        await asyncio.sleep(_INTERVAL)
