"""What the fence takes for granted: a log that is set back, an altered sequence, another engine are never silent."""

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest

from pgbackend import Backend, DatabaseError, ProbeError, SchemaError
from pgbackend.embedded.server import EmbeddedServer
from pgbackend.facts import Recorder
from pgbackend.log.fence import Evidence
from pgbackend.log.log import Log
from pgbackend.log.ranges import RangeSet
from pgbackend.log.reader import Reader
from pgbackend.postgres import schema
from pgbackend.postgres.pool import Database
from pgbackend.subscriptions.locator import Locator
from tests.support.databases import execute, query_value
from tests.support.dispatchers import Catch
from tests.support.events import make_event
from tests.support.polling import eventually
from tests.support.programs import programs

# They alter the log as its owner.
pytestmark = [pytest.mark.owner]

SETTINGS: dict[str, Any] = {"commit_interval": 0.01, "poll_interval": 0.1, "drain_timeout": 1.0}


@asynccontextmanager
async def running(dsn: str, name: str, catch: Catch, **settings: Any) -> AsyncIterator[tuple[Backend, Any]]:
    """A backend that runs one subscription, and the task of its `start()`."""
    backend = Backend(dsn, **SETTINGS | settings)
    await backend.init()
    with Recorder() as recorder:
        task = asyncio.create_task(backend.start())
        try:
            await backend.subscribe(name, catch, start="earliest")
            await recorder.wait("lease claimed", subscription=name)
            yield backend, task
        finally:
            await backend.stop()
            with suppress(SchemaError):
                await task


async def committed(dsn: str, position: int) -> None:
    """Return once the offsets of all subscriptions are there."""

    async def reached() -> bool:
        return bool(await query_value(dsn, "SELECT min(position) FROM pgbackend.offsets") == position)

    await eventually(f"offsets stand at {position}", reached)


# Set back under a running worker.

SET_BACK = {
    "truncated": "TRUNCATE pgbackend.events RESTART IDENTITY",
    "setval": "DELETE FROM pgbackend.events; SELECT setval('pgbackend.events_position_seq', 1, false)",
    "restarted": "DELETE FROM pgbackend.events; ALTER TABLE pgbackend.events ALTER COLUMN position RESTART WITH 1",
}


async def set_back(dsn: str, statements: str) -> None:
    """Again when it meets the maintainer, which locks the sequence before a segment; TRUNCATE does it after."""
    while True:
        with suppress(asyncpg.DeadlockDetectedError):
            await execute(dsn, statements)
            return


@pytest.mark.parametrize("how", SET_BACK)
@pytest.mark.parametrize("produced", [3, 40], ids=["and stays behind", "and catches up"])
async def test_a_log_that_is_set_back_under_workers_ends_them_all_until_somebody_says_how_to_go_on(
    database: str, how: str, produced: int
) -> None:
    first, second = Catch(), Catch()
    async with running(database, "a", first) as (backend, one), running(database, "b", second) as (_, other):
        await backend.produce_many([make_event(f"old {number}") for number in range(20)])
        await committed(database, 20)
        with Recorder() as recorder:
            # In one go, so that no worker looks in between.
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
    async with running(database, "a", first), running(database, "b", second):
        await first.has(*[f"new {number}" for number in range(1, produced + 1)])
        await second.has(*[f"new {number}" for number in range(1, produced + 1)])


@pytest.mark.parametrize("how", SET_BACK)
async def test_a_log_that_is_begun_anew_with_its_offsets_goes_on_by_itself(database: str, how: str) -> None:
    catch = Catch()
    async with running(database, "s", catch) as (backend, task):
        await backend.produce_many([make_event(f"old {number}") for number in range(20)])
        await committed(database, 20)
        await set_back(database, SET_BACK[how] + "; UPDATE pgbackend.offsets SET position = 0, pending = '{}'")
        await backend.produce_many([make_event(f"new {number}") for number in range(10)])
        await catch.has(*[f"new {number}" for number in range(10)])
        assert not task.done()


async def test_an_idle_worker_notices_that_the_log_was_set_back(database: str) -> None:
    """It runs no subscription: nobody reads, nobody commits."""
    backend = Backend(database, **SETTINGS)
    await backend.init()
    await backend.produce_many([make_event(str(number)) for number in range(5)])
    with Recorder() as recorder:
        task = asyncio.create_task(backend.start())
        await recorder.wait("worker started")

        async def has_looked() -> bool:
            return backend._lifecycle.opened().log.incarnation.highest_seen == 5

        await eventually("it has looked", has_looked)
        await set_back(database, SET_BACK["setval"])
        await recorder.wait("incarnation changed")
        await recorder.wait("worker started", count=2)
    await backend.stop()
    await task


async def test_offsets_that_somebody_puts_above_the_log_end_the_worker(database: str) -> None:
    """As from a dump of the table alone."""
    catch = Catch()
    async with running(database, "s", catch) as (backend, task):
        await backend.produce(make_event("old"))
        await committed(database, 1)
        await execute(database, "UPDATE pgbackend.offsets SET position = 100")
        await backend.produce(make_event("new"))
        with pytest.raises(SchemaError, match="offsets \\(100\\)"):
            await asyncio.wait_for(task, 30)


async def test_events_that_are_deleted_by_hand_set_nothing_back(database: str) -> None:
    catch = Catch()
    async with running(database, "s", catch) as (backend, task):
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
async def test_a_copy_that_takes_the_databases_place_is_another_life(server: str, database: str) -> None:
    """CREATE DATABASE … TEMPLATE copies all, the unlogged row and the numbers of tables and files included."""
    name = urlsplit(database).path[1:]
    catch = Catch()
    async with running(database, "s", catch) as (backend, task):
        await backend.produce_many([make_event(f"old {number}") for number in range(10)])
        await committed(database, 10)
        life = await query_value(database, "SELECT id FROM pgbackend.life")
        await backend.stop()
        await task
    await execute(server, f'CREATE DATABASE "{name}_copy" TEMPLATE "{name}"')
    async with running(database, "s", catch) as (backend, task):
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
async def test_a_dump_that_is_restored_under_a_running_worker_is_read_on_from(
    server: str, database: str, how: str, tmp_path: Path
) -> None:
    """The dump carries the unlogged row, too."""
    name, dump, script = urlsplit(database).path[1:], str(tmp_path / "dump"), tmp_path / "sql"
    bin_directory = programs(int((await query_value(server, "SHOW server_version")).partition(".")[0]))

    async def call(program: str, *arguments: str) -> None:
        running = await asyncio.create_subprocess_exec(bin_directory / program, *arguments)
        assert await running.wait() == 0

    catch = Catch()
    async with running(database, "s", catch) as (backend, task):
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


# Altered.

ALTERED = {
    "cache": "ALTER SEQUENCE pgbackend.events_position_seq CACHE 50",
    "cycle": "ALTER SEQUENCE pgbackend.events_position_seq CYCLE",
    "increment": "ALTER SEQUENCE pgbackend.events_position_seq INCREMENT 2",
    "backwards": "ALTER SEQUENCE pgbackend.events_position_seq INCREMENT -1 MINVALUE 1",
    "maximum": "ALTER SEQUENCE pgbackend.events_position_seq MAXVALUE 1000",
    "minimum": "ALTER SEQUENCE pgbackend.events_position_seq MINVALUE -5",
    "type": "ALTER SEQUENCE pgbackend.events_position_seq AS integer",
    "identity": "ALTER TABLE pgbackend.events ALTER COLUMN position SET GENERATED BY DEFAULT",
    "key": "ALTER TABLE pgbackend.events DROP CONSTRAINT events_pkey",
    "logged": "ALTER TABLE pgbackend.incarnation SET LOGGED",
    "unlogged": "ALTER TABLE pgbackend.offsets SET UNLOGGED",
}


@pytest.mark.parametrize("how", ALTERED)
async def test_an_altered_log_is_refused_and_ends_a_running_worker(database: str, how: str) -> None:
    catch = Catch()
    async with running(database, "s", catch) as (backend, task):
        await backend.produce(make_event("before"))
        await catch.has("before")
        await execute(database, ALTERED[how])
        with pytest.raises(SchemaError, match="Events could be lost"):
            await asyncio.wait_for(task, 30)
        with pytest.raises(ProbeError) as caught:
            await backend.probe()
        assert [name for name, text in caught.value.checks.items() if text != "ok"] == ["fence", "worker"]
    with pytest.raises(SchemaError, match="Events could be lost"):
        await Backend(database).init()


async def test_what_the_refusal_says_mends_an_altered_sequence(database: str) -> None:
    await execute(database, ALTERED["cache"])
    with pytest.raises(SchemaError) as caught:
        await Backend(database).init()
    mend = str(caught.value).partition("run ")[2].partition(", and start")[0]
    await execute(database, mend)
    backend = Backend(database)
    await backend.init()
    await backend.probe()
    await backend.stop()


async def test_an_identity_with_another_sequence_is_refused(database: str) -> None:
    await execute(
        database,
        "ALTER SEQUENCE pgbackend.events_position_seq RENAME TO old_seq;CREATE SEQUENCE pgbackend.events_position_seq",
    )
    with pytest.raises(SchemaError, match="does not draw from"):
        await Backend(database).init()


# Other engines, by what they show.


@asynccontextmanager
async def catalog_owner(dsn: str) -> AsyncIterator[Any]:
    """A superuser who may change catalogs; of the test's own database only."""
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute("SET allow_system_table_mods = on")
        yield connection
    finally:
        await connection.close()


LOCKS = """
    CREATE OR REPLACE VIEW pg_catalog.pg_locks AS
    SELECT {columns}
    FROM pg_lock_status() AS held
    LEFT JOIN pg_stat_activity AS activity ON activity.pid = held.pid
    WHERE {shown}"""
COLUMNS = (
    "locktype, database, relation, page, tuple, virtualxid, transactionid, classid, objid, objsubid, {name}, held.pid, "
    "mode, granted, fastpath, waitstart"
)
VIEWS = {
    "hides young transactions": ("virtualtransaction", "activity.xact_start < clock_timestamp() - interval '1 s'"),
    "hides other sessions": ("virtualtransaction", "held.pid = pg_backend_pid()"),
    "hides other sessions' locks on tables": ("virtualtransaction", "locktype = 'virtualxid'"),
    "names no transactions": ("''::text AS virtualtransaction", "true"),
}


@pytest.mark.parametrize("what", VIEWS)
async def test_a_server_whose_locks_show_no_appenders_is_refused(database: str, what: str) -> None:
    backend = Backend(database)
    await backend.init()
    name, shown = VIEWS[what]
    async with catalog_owner(database) as catalog:
        await catalog.execute(LOCKS.format(columns=COLUMNS.format(name=name), shown=shown))
    with pytest.raises(ProbeError, match="pg_locks") as caught:
        await backend.probe()
    await backend.stop()

    assert [name for name, text in caught.value.checks.items() if text != "ok"] == ["fence"]
    with pytest.raises(SchemaError, match="pg_locks"):
        await Backend(database).init()


@pytest.mark.parametrize(
    ("version", "name"),
    [
        ("PostgreSQL 15.12-YB-2025.1.0.0-b0 on x86_64-pc-linux-gnu", "YugabyteDB"),
        ("CockroachDB CCL v25.2.0 (x86_64-pc-linux-gnu)", "CockroachDB"),
        ("PostgreSQL 12.12 (Greenplum Database 7.1.0)", "Greenplum"),
    ],
)
async def test_another_engine_is_refused_by_its_name(empty_database: str, version: str, name: str) -> None:
    async with catalog_owner(empty_database) as catalog:
        await catalog.execute(
            "CREATE OR REPLACE FUNCTION pg_catalog.version() RETURNS text LANGUAGE sql STABLE AS "
            f"$$ SELECT '{version}' $$"
        )
    with pytest.raises(DatabaseError, match=name):
        await Backend(empty_database).init()
    with pytest.raises(DatabaseError, match=name):
        await schema.migrate(Database(empty_database).connect, "pgbackend")


@pytest.mark.parametrize(
    ("table", "name"), [("sys.iam_pg_role_mappings", "DSQL"), ("rds_aurora.limitless_subclusters", "Limitless")]
)
async def test_a_service_is_known_by_its_catalog(empty_database: str, table: str, name: str) -> None:
    await execute(empty_database, f"CREATE SCHEMA {table.partition('.')[0]}; CREATE TABLE {table} ()")
    with pytest.raises(DatabaseError, match=name):
        await Backend(empty_database).init()


@pytest.mark.parametrize("table", ["events", "events_0", "offsets"])
async def test_a_log_whose_tables_are_distributed_is_refused(database: str, table: str) -> None:
    async with catalog_owner(database) as catalog:
        await catalog.execute("CREATE TABLE pg_catalog.pg_dist_partition (logicalrelid regclass)")
        await (citus := Backend(database)).init()
        await citus.probe()
        await catalog.execute(f"INSERT INTO pg_catalog.pg_dist_partition VALUES ('pgbackend.{table}')")
    with pytest.raises(ProbeError, match=f"Citus distributes the log's tables \\({table}\\)"):
        await citus.probe()
    await citus.stop()
    with pytest.raises(SchemaError, match="Citus"):
        await Backend(database).init()


async def test_a_migration_is_not_carried_to_other_nodes_by_citus(empty_database: str) -> None:
    async with catalog_owner(empty_database) as catalog:
        settings = await catalog.fetchval("SELECT pg_get_viewdef('pg_settings'::regclass)")
        columns = await catalog.fetchval(
            "SELECT string_agg(CASE attname WHEN 'name' THEN quote_literal('citus.enable_ddl_propagation') "
            "ELSE 'NULL' END || '::' || format_type(atttypid, NULL), ', ' ORDER BY attnum) "
            "FROM pg_attribute WHERE attrelid = 'pg_settings'::regclass AND attnum > 0"
        )
        await catalog.execute(
            f"CREATE OR REPLACE VIEW pg_catalog.pg_settings AS {settings.rstrip(';')} UNION ALL SELECT {columns};"
            "CREATE TABLE public.seen (command text, setting text);"
            "CREATE FUNCTION public.see() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO public.seen "
            "VALUES (tg_tag, current_setting('citus.enable_ddl_propagation', true)); END $$;"
            "CREATE EVENT TRIGGER see ON ddl_command_start EXECUTE FUNCTION public.see()"
        )
    await schema.migrate(Database(empty_database).connect, 'in "quotes"')

    assert await query_value(empty_database, "SELECT array_agg(DISTINCT setting) FROM public.seen") == ["off"]
    assert await query_value(empty_database, "SELECT count(*) FROM public.seen WHERE command = 'CREATE SCHEMA'") == 1


# Evidence.


@asynccontextmanager
async def log_of(dsn: str, hole_wait: float = 0.0) -> AsyncIterator[Log]:
    database = Database(dsn)
    await database.open()
    try:
        log = Log(database, schema="pgbackend", hole_wait=hole_wait)
        await log.incarnation.enter()
        yield log
    finally:
        await database.close()


async def test_evidence_reads_the_sequence_before_the_locks(database: str) -> None:
    """Whatever draws a position while locks are listed is not covered by them."""
    async with catalog_owner(database) as catalog:
        await catalog.execute(
            "CREATE FUNCTION public.drawn() RETURNS boolean LANGUAGE sql AS "
            "$$ SELECT nextval('pgbackend.events_position_seq') > 0 $$;"
            + LOCKS.format(columns=COLUMNS.format(name="virtualtransaction"), shown="public.drawn()")
        )
        async with log_of(database) as log:
            evidence = await log.check()
            after = await catalog.fetchval("SELECT last_value FROM pgbackend.events_position_seq")

    assert evidence.upto == 0
    assert after > 0


async def test_functions_of_the_log_do_not_follow_the_callers_search_path(database: str) -> None:
    connection = await asyncpg.connect(database)
    await connection.execute(
        "CREATE SCHEMA trap; SET search_path = trap, pg_catalog;"
        "CREATE TABLE trap.pg_locks AS SELECT * FROM pg_catalog.pg_locks WHERE false;"
        "CREATE TABLE trap.incarnation (id uuid);"
        "CREATE FUNCTION trap.pg_sequence_last_value(regclass) RETURNS bigint LANGUAGE sql AS 'SELECT 99';"
        "CREATE FUNCTION trap.pg_backend_pid() RETURNS int LANGUAGE sql AS 'SELECT 0'"
    )
    async with connection.transaction():
        name = await connection.fetchval("SELECT pgbackend.open_appender()")
        row = await connection.fetchrow(
            "SELECT * FROM pgbackend.appenders_in_flight("
            "'pgbackend.events'::pg_catalog.regclass, 'pgbackend.events_position_seq'::pg_catalog.regclass)"
        )
    await connection.close()

    assert row is not None
    assert row["upto"] == 0
    assert row["appenders"] == [name]


@asynccontextmanager
async def own_server(directory: str) -> AsyncIterator[str]:
    server = EmbeddedServer(directory, settings={"fsync": "off", "max_prepared_transactions": "10"})
    yield await server.start()
    await server.stop()


OWN_NAME = "SELECT virtualtransaction FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'virtualxid'"
INSERT = "INSERT INTO pgbackend.events (id, source, type) VALUES ($1, '/s', 't')"


@pytest.mark.slow
@pytest.mark.direct
async def test_a_prepared_append_is_not_buried_when_a_restart_gives_its_name_to_another(tmp_path: Path) -> None:
    """A restart names transactions anew, from the beginning: a prepared one has another name from then on."""
    with tempfile.TemporaryDirectory(prefix="pgbackend-test-", ignore_cleanup_errors=True) as directory:
        async with own_server(directory) as dsn:
            await schema.migrate(Database(dsn).connect, "pgbackend")
        # Started a moment ago: small numbers, which come again soon.
        async with own_server(directory) as dsn:
            connections = [await asyncpg.connect(dsn) for _ in range(10)]
            # Not one of the first slots, which the server's own sessions may have next time.
            *others, connection = connections
            for other in others:
                await other.close()
            for _ in range(60):
                await connection.execute("SELECT 1")
            await connection.execute("BEGIN")
            await connection.execute(INSERT, "prepared")
            name = await connection.fetchval(OWN_NAME)
            await connection.execute("PREPARE TRANSACTION 'p'")
            await connection.close()
            await execute(dsn, INSERT, "next")
            database = Database(dsn)
            await database.open()
            log = Log(database, schema="pgbackend", hole_wait=0.0)
            await log.incarnation.enter()
            reader, seen = Reader(log, after=0), list[str]()

            async def has_read(id_: str) -> bool:
                try:
                    seen.extend(event.id for event in (await reader.read(prove=True)).events)
                except DatabaseError:
                    return False  # the connection from before the restart
                return id_ in seen

            await eventually("what is behind the hole is read", lambda: has_read("next"))
            await database.close()
        async with own_server(directory) as dsn:
            # Its socket may be elsewhere.
            log.database = Database(dsn)
            await log.database.open()
            clash = await meet(dsn, name)
            await clash.execute(INSERT, "clash")
            await eventually("evidence has the other one", lambda: evidence_has(log, name))
            await has_read("")
            await clash.execute("ROLLBACK")
            await clash.execute(INSERT, "last")
            await eventually("the log is read to its end", lambda: has_read("last"))
            await clash.execute("COMMIT PREPARED 'p'")
            await eventually("the prepared one is read", lambda: has_read("prepared"))
            await clash.close()
            await log.database.close()


async def evidence_has(log: Log, name: str) -> bool:
    try:
        return name in (await log.check()).appenders
    except DatabaseError:
        return False


async def meet(dsn: str, name: str) -> "asyncpg.Connection[asyncpg.Record]":
    """A session in an open transaction of this name."""
    slot, number = name.split("/")
    others = []
    while True:
        connection = await asyncpg.connect(dsn)
        mine = (await connection.fetchval(OWN_NAME)).split("/")
        if mine[0] == slot:
            break
        others.append(connection)
        assert len(others) < 60, f"no session got slot {slot}"
    assert int(mine[1]) < int(number), "its numbers have begun anew"
    while True:
        await connection.execute("BEGIN")
        if await connection.fetchval(OWN_NAME) == name:
            break
        await connection.execute("ROLLBACK")
    for other in others:
        await other.close()
    return connection


def test_after_a_restart_everybody_may_be_who_was_waited_for() -> None:
    before, after = (datetime(2026, 1, day, tzinfo=UTC) for day in (1, 2))
    old = Evidence(9, frozenset({"3/7", "4/1"}), "life", before)
    new = Evidence(9, frozenset({"-1/70", "3/7"}), "life", after)

    assert new.still_open(frozenset({"4/1"}), since=old) == {"-1/70", "3/7"}
    assert replace(new, server_start=before).still_open(frozenset({"3/7"}), since=old) == {"3/7"}
    assert replace(new, server_start=before).still_open(frozenset({"4/1"}), since=old) == {"-1/70"}


async def test_the_end_of_the_log_is_found_across_a_restart(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `subscribe()` begins: what a prepared append holds open is still to come."""
    start = datetime(2026, 1, 1, tzinfo=UTC)
    found = [
        Evidence(2, frozenset({"3/7"}), "life", start),
        Evidence(2, frozenset({"-1/70", "3/7"}), "life", start + timedelta(days=1)),
        Evidence(2, frozenset({"-1/70"}), "life", start + timedelta(days=1)),
    ]
    async with log_of(database, hole_wait=0.2) as log:
        await log.database.execute(INSERT, "visible")
        await log.database.execute("SELECT nextval('pgbackend.events_position_seq')")

        async def check() -> Evidence:
            return found.pop(0) if len(found) > 1 else found[0]

        monkeypatch.setattr(log, "check", check)
        latest = await Locator(log).locate_latest()

    assert (latest.position, latest.pending) == (2, RangeSet([(2, 3)]))
