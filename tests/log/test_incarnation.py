"""A log that is set back, copied or restored under running workers loses and repeats no event."""

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest

from pgbackend import Backend, DatabaseError, ProbeError, SchemaError
from pgbackend.facts import Recorder
from tests.support.backends import started
from tests.support.databases import execute, query_value
from tests.support.dispatchers import Catch
from tests.support.events import make_event
from tests.support.polling import eventually
from tests.support.programs import programs

pytestmark = [pytest.mark.owner]  # they alter the log as its owner

SETTINGS: dict[str, Any] = {"commit_interval": 0.01, "poll_interval": 0.1, "drain_timeout": 1.0}


async def committed(dsn: str, position: int) -> None:
    """Return once the offsets of all subscriptions stand at this position."""

    async def reached() -> bool:
        return bool(await query_value(dsn, "SELECT min(position) FROM pgbackend.offsets") == position)

    await eventually(f"offsets stand at {position}", reached)


SET_BACK = {
    "truncated": "TRUNCATE pgbackend.events RESTART IDENTITY",
    "setval": "DELETE FROM pgbackend.events; SELECT setval('pgbackend.events_position_seq', 1, false)",
    "restarted": "DELETE FROM pgbackend.events; ALTER TABLE pgbackend.events ALTER COLUMN position RESTART WITH 1",
}


async def set_back(dsn: str, statements: str) -> None:
    """Run the statements, again after a deadlock: making a segment locks the sequence first, TRUNCATE locks it last."""
    while True:
        with suppress(asyncpg.DeadlockDetectedError):
            await execute(dsn, statements)
            return


@pytest.mark.parametrize("how", SET_BACK)
@pytest.mark.parametrize("produced", [3, 40], ids=["and stays behind", "and catches up"])
async def test_a_log_set_back_under_workers_ends_them_until_an_operator_repairs_it(
    database: str, how: str, produced: int
) -> None:
    first, second = Catch(), Catch()
    async with started(database, "a", first) as (backend, one), started(database, "b", second) as (_, other):
        await backend.produce_many([make_event(f"old {number}") for number in range(20)])
        await committed(database, 20)
        with Recorder() as recorder:
            # In one transaction, so that no worker looks in between.
            await set_back(
                database,
                SET_BACK[how] + ";"
                "INSERT INTO pgbackend.events (id, source, type) "
                f"SELECT 'new ' || n, '/s', 't' FROM generate_series(1, {produced}) AS n",
            )
            for task in (one, other):
                with pytest.raises(SchemaError, match=r"set back|behind its events"):
                    await asyncio.wait_for(task, 30)
            assert "set back" in str(recorder.all("incarnation changed")) or how != "setval"
        for refused in (Backend(database), Backend(database, schema="pgbackend", pool_size=1)):
            with pytest.raises(SchemaError, match=r"UPDATE .*offsets are right: DELETE FROM"):
                await refused.init()
        with pytest.raises(ProbeError, match="UPDATE"):
            await backend.probe()

    await execute(
        database, "UPDATE pgbackend.offsets SET position = 0, pending = '{}'; DELETE FROM pgbackend.incarnation"
    )
    async with started(database, "a", first), started(database, "b", second):
        await first.has(*[f"new {number}" for number in range(1, produced + 1)])
        await second.has(*[f"new {number}" for number in range(1, produced + 1)])


@pytest.mark.parametrize("how", SET_BACK)
async def test_a_log_reset_together_with_its_offsets_goes_on_by_itself(database: str, how: str) -> None:
    catch = Catch()
    async with started(database, "s", catch) as (backend, task):
        await backend.produce_many([make_event(f"old {number}") for number in range(20)])
        await committed(database, 20)
        await set_back(database, SET_BACK[how] + "; UPDATE pgbackend.offsets SET position = 0, pending = '{}'")
        await backend.produce_many([make_event(f"new {number}") for number in range(10)])
        await catch.has(*[f"new {number}" for number in range(10)])
        assert not task.done()


async def test_an_idle_worker_notices_that_the_log_was_set_back(database: str) -> None:
    """It runs no subscription, so it reads and commits nothing."""
    backend = Backend(database, **SETTINGS)
    await backend.init()
    await backend.produce_many([make_event(str(number)) for number in range(5)])
    with Recorder() as recorder:
        task = asyncio.create_task(backend.start())
        await recorder.wait("worker started")

        async def is_known() -> bool:
            return backend._lifecycle.opened().log.incarnation.highest_seen == 5

        await eventually("it knows the newest event", is_known)
        await set_back(database, SET_BACK["setval"])
        await recorder.wait("incarnation changed")
        await recorder.wait("worker started", count=2)
    await backend.stop()
    await task


async def test_offsets_above_the_log_end_the_worker(database: str) -> None:
    """A restore of that table alone does this."""
    catch = Catch()
    async with started(database, "s", catch) as (backend, task):
        await backend.produce(make_event("old"))
        await committed(database, 1)
        await execute(database, "UPDATE pgbackend.offsets SET position = 100")
        await backend.produce(make_event("new"))
        with pytest.raises(SchemaError, match="offsets \\(100\\)"):
            await asyncio.wait_for(task, 30)


async def test_deleting_events_by_hand_does_not_set_the_log_back(database: str) -> None:
    catch = Catch()
    async with started(database, "s", catch) as (backend, task):
        with Recorder() as recorder:
            await backend.produce_many([make_event(str(number)) for number in range(5)])
            await committed(database, 5)
            await execute(database, "DELETE FROM pgbackend.events")
            await backend.produce(make_event("new"))
            await catch.has("new")
            await execute(database, "TRUNCATE pgbackend.events")
            await backend.produce(make_event("newer"))
            await catch.has("newer")
        assert not recorder.all("incarnation changed")
        assert not task.done()


@pytest.mark.direct
async def test_a_copy_in_the_place_of_the_database_is_another_incarnation(server: str, database: str) -> None:
    """CREATE DATABASE … TEMPLATE copies everything: the unlogged row, and the numbers of tables and files."""
    name = urlsplit(database).path[1:]
    catch = Catch()
    async with started(database, "s", catch) as (backend, task):
        await backend.produce_many([make_event(f"old {number}") for number in range(10)])
        await committed(database, 10)
        life = await query_value(database, "SELECT id FROM pgbackend.life")
        await backend.stop()
        await task
    await execute(server, f'CREATE DATABASE "{name}_copy" TEMPLATE "{name}"')
    async with started(database, "s", catch) as (backend, task):
        await backend.produce_many([make_event(f"lost {number}") for number in range(30)])
        await committed(database, 40)
        await execute(server, f'DROP DATABASE "{name}" WITH (FORCE)')
        await execute(server, f'ALTER DATABASE "{name}_copy" RENAME TO "{name}"')
        assert await query_value(database, "SELECT id FROM pgbackend.life") != life
        new = [make_event(f"new {number}") for number in range(50)]
        await eventually("it is back", lambda: produced(backend, new))
        await catch.has(*[f"new {number}" for number in range(50)])
        assert not task.done()


async def produced(backend: Backend, events: list[Any]) -> bool:
    try:
        await backend.produce_many(events)
    except DatabaseError:
        return False
    return True


RESTORES = {
    "into another database that takes its name": (),
    "in place of the schema": ("--section=pre-data", "--section=data", "--section=post-data"),
    "of the rows alone": ("--data-only", "--disable-triggers"),
}


@pytest.mark.direct
@pytest.mark.slow
@pytest.mark.parametrize("how", RESTORES)
async def test_a_worker_reads_on_from_a_dump_that_is_restored_under_it(
    server: str, database: str, how: str, tmp_path: Path
) -> None:
    """The dump carries the unlogged row."""
    name, dump, script = urlsplit(database).path[1:], str(tmp_path / "dump"), tmp_path / "sql"
    bin_directory = programs(int((await query_value(server, "SHOW server_version")).partition(".")[0]))

    async def call(program: str, *arguments: str) -> None:
        running = await asyncio.create_subprocess_exec(bin_directory / program, *arguments)
        assert await running.wait() == 0

    catch = Catch()
    async with started(database, "s", catch) as (backend, task):
        await backend.produce_many([make_event(f"old {number}") for number in range(10)])
        await committed(database, 10)
        await call("pg_dump", "-Fc", "-f", dump, database)
        await backend.produce_many([make_event(f"lost {number}") for number in range(30)])
        await committed(database, 40)
        with Recorder() as recorder:
            if not RESTORES[how]:
                await execute(server, f'CREATE DATABASE "{name}_new"')
                await call("pg_restore", "-d", f"{database.replace(name, name + '_new')}", dump)
                await execute(server, f'DROP DATABASE "{name}" WITH (FORCE)')
                await execute(server, f'ALTER DATABASE "{name}_new" RENAME TO "{name}"')
            else:
                tables = (
                    "SELECT string_agg(oid::regclass::text, ', ') FROM pg_class WHERE relkind IN ('r', 'p') "
                    "AND relnamespace = 'pgbackend'::regnamespace AND NOT relispartition"
                )
                first = (
                    f"TRUNCATE {await query_value(database, tables)};"
                    if "--data-only" in RESTORES[how]
                    else "DROP SCHEMA pgbackend CASCADE;"
                )
                await call("pg_restore", *RESTORES[how], "-f", str(script), dump)
                script.write_text(first + script.read_text())
                arguments = ("-X", "-q", "-1", "-v", "ON_ERROR_STOP=1", "-o", "/dev/null", "-f", str(script), database)
                await call("psql", *arguments)
            await recorder.wait("worker started")
        new = [make_event(f"new {number}") for number in range(60)]
        await eventually("it is back", lambda: produced(backend, new))
        await catch.has(*[f"new {number}" for number in range(60)])
        assert not task.done()
