"""Moments are noted all the time, whatever happens to the connection."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pgbackend.torture.moments import PLACE, watch
from pgbackend.torture.records import Note, Notes, read
from tests.support.databases import execute
from tests.support.polling import eventually

QUESTION = "SELECT 'rows' AS what, 1::bigint AS found, 2::bigint AS wanted"
END_OTHERS = """
SELECT pg_terminate_backend(pid)
FROM pg_stat_activity
WHERE pid <> pg_backend_pid() AND datname = current_database()
"""


@asynccontextmanager
async def watching(dsn: str, directory: Path, question: str) -> AsyncIterator[None]:
    notes = Notes(directory, PLACE)
    task = asyncio.create_task(watch(dsn, question, notes))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        notes.close()


async def moments(directory: Path, count: int) -> list[Note]:
    """The first moments."""
    await eventually(f"{count} moments are noted", lambda: len(list(read(directory, PLACE))) >= count)
    return list(read(directory, PLACE))[:count]


async def test_each_row_of_the_answer_is_a_note(empty_database: str, tmp_path: Path) -> None:
    async with watching(empty_database, tmp_path, QUESTION):
        for note in await moments(tmp_path, 2):
            assert (note.kind, note.fields) == ("moment", ["rows", "1", "2"])


@pytest.mark.direct
async def test_it_goes_on_after_its_connection_was_ended(empty_database: str, tmp_path: Path) -> None:
    async with watching(empty_database, tmp_path, QUESTION):
        seen = len(await moments(tmp_path, 1))
        await execute(empty_database, END_OTHERS)
        await moments(tmp_path, seen + 2)
