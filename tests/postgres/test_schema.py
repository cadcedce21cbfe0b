import asyncio
import logging
import re
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from pgbackend.errors import ConfigError, ConnectionLostError, DatabaseError, SchemaError
from pgbackend.postgres import alembic_migrations, schema
from pgbackend.postgres.connections import Connection
from pgbackend.postgres.pool import Database
from pgbackend.postgres.sql import quote_ident
from tests.support.databases import connected

EVENT = "INSERT INTO pgbackend.events (id, source, type) VALUES ('1', '/plain', 'sql')"
NAMES = ["pgbackend", "Quo\"te's %s%(c)d%% a:b::c :d", "dots.in it back\\slash\\:x", "äöü 🐘", "x" * 63]


@pytest.fixture
async def database(empty_database: str) -> AsyncIterator[Database]:
    database = Database(empty_database)
    await database.open()
    yield database
    await database.close()


@pytest.mark.parametrize("name", NAMES)
async def test_a_schema_of_any_name_is_migrated_forwards_and_backwards(database: Database, name: str) -> None:
    await schema.migrate(database.connect, name)
    assert await schema.find_revision(database.fetch, name) == schema.head()
    assert await database.fetchval(f"SELECT count(*) FROM {quote_ident(name)}.events") == 0

    await schema.migrate(database.connect, name, to="base")
    assert await schema.find_revision(database.fetch, name) is None


async def test_the_revision_is_none_where_there_is_no_log(database: Database) -> None:
    assert await schema.find_revision(database.fetch, "pgbackend") is None


async def test_two_logs_live_side_by_side(database: Database) -> None:
    await schema.migrate(database.connect, "one")
    await schema.migrate(database.connect, "two")
    await schema.migrate(database.connect, "two", to="base")

    assert await schema.find_revision(database.fetch, "one") == schema.head()
    assert await schema.find_revision(database.fetch, "two") is None


async def test_migrating_at_head_changes_nothing(database: Database) -> None:
    await schema.migrate(database.connect, "pgbackend")
    await database.execute(EVENT)

    await schema.migrate(database.connect, "pgbackend")

    assert await database.fetchval("SELECT count(*) FROM pgbackend.events") == 1


@pytest.mark.slow
@pytest.mark.direct
async def test_many_processes_can_migrate_at_once(database: Database, empty_database: str) -> None:
    """Two processes and this one wait for the lock. Each then sees what the one before committed, although the default
    isolation level of its connection would show it the time before the wait.
    """

    async def strict() -> Connection:
        return await asyncpg.connect(
            empty_database, server_settings={"default_transaction_isolation": "repeatable read"}
        )

    lock = "SELECT pg_advisory_lock(hashtextextended('pgbackend migrate pgbackend', 0))"
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'advisory'"
    serializable = (
        empty_database + ("&" if "?" in empty_database else "?") + "default_transaction_isolation=serializable"
    )
    async with connected(empty_database) as gate:
        await gate.execute(lock)
        runs = [
            await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "alembic", "upgrade", "head"),
                cwd=Path(__file__).parents[2],
                env={"PGBACKEND_DSN": serializable},
                stderr=asyncio.subprocess.PIPE,
            )
            for _ in range(2)
        ]
        inside = asyncio.create_task(schema.migrate(strict, "pgbackend"))
        deadline = time.monotonic() + 30
        while await gate.fetchval(waiting) < 3:
            assert time.monotonic() < deadline, "three migrators should wait for the lock"
            await asyncio.sleep(0.05)
        await gate.execute("SELECT pg_advisory_unlock_all()")
        ends = [(await run.communicate(), run.returncode) for run in runs]
        await inside

    assert [code for _, code in ends] == [0, 0], ends
    assert await schema.find_revision(database.fetch, "pgbackend") == schema.head()


async def test_concurrent_calls_in_one_process_are_safe(database: Database) -> None:
    async with asyncio.TaskGroup() as tasks:
        for name in ("one", "one", "two", "two"):
            tasks.create_task(schema.migrate(database.connect, name))

    assert await schema.find_revision(database.fetch, "one") == schema.head()
    assert await schema.find_revision(database.fetch, "two") == schema.head()


@pytest.mark.direct
async def test_a_role_without_create_on_the_database_uses_a_schema_made_for_it(database: Database) -> None:
    role = "tenant_" + (await database.fetchval("SELECT current_database()"))[-12:]
    await database.execute(f"CREATE ROLE {role}")
    try:
        await database.execute(f"CREATE SCHEMA theirs AUTHORIZATION {role}")

        async def connect() -> Connection:
            connection = await database.connect()
            await connection.execute(f"SET ROLE {role}")
            return connection

        await schema.migrate(connect, "theirs")
        assert await schema.find_revision(database.fetch, "theirs") == schema.head()
        with pytest.raises(DatabaseError, match="permission denied") as caught:
            await schema.migrate(connect, "others")
        assert caught.value.sqlstate == "42501"
    finally:
        await database.execute(f"DROP OWNED BY {role} CASCADE")
        await database.execute(f"DROP ROLE {role}")


async def test_a_cancelled_migration_returns_when_it_is_rolled_back(database: Database, empty_database: str) -> None:
    lock = "SELECT pg_advisory_lock(hashtextextended('pgbackend migrate pgbackend', 0))"
    others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'advisory'"
    async with connected(empty_database) as gate:
        await gate.execute(lock)
        migrating = asyncio.create_task(schema.migrate(database.connect, "pgbackend"))
        deadline = time.monotonic() + 30
        while not await gate.fetchval(others):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)

        # Cancel a second one as well.
        second = asyncio.create_task(schema.migrate(database.connect, "elsewhere"))
        await asyncio.sleep(0)
        second.cancel()
        migrating.cancel()
        with pytest.raises(asyncio.CancelledError):
            await migrating
        with pytest.raises(asyncio.CancelledError):
            await second

        await gate.execute("SELECT pg_advisory_unlock_all()")
        assert await schema.find_revision(database.fetch, "pgbackend") is None
        assert await schema.find_revision(database.fetch, "elsewhere") is None
    # The lock is free again.
    await schema.migrate(database.connect, "pgbackend")


async def test_a_failed_migration_changes_nothing(database: Database) -> None:
    await database.execute("CREATE SCHEMA pgbackend")
    await database.execute("CREATE TABLE pgbackend.workers ()")

    with pytest.raises(DatabaseError, match='"workers" already exists') as caught:
        await schema.migrate(database.connect, "pgbackend")

    assert caught.value.sqlstate == "42P07"
    assert await schema.find_revision(database.fetch, "pgbackend") is None
    tables = "SELECT count(*) FROM pg_class WHERE relnamespace = 'pgbackend'::regnamespace AND relkind IN ('r', 'p')"
    assert await database.fetchval(tables) == 1


@pytest.mark.slow
async def test_a_migration_soon_gives_up_waiting_for_a_table_in_use(database: Database, empty_database: str) -> None:
    await schema.migrate(database.connect, "pgbackend")
    async with connected(empty_database) as producer, producer.transaction():
        await producer.execute(EVENT)
        with pytest.raises(DatabaseError, match="keeps one of its tables locked") as caught:
            await schema.migrate(database.connect, "pgbackend", to="base")

    assert caught.value.sqlstate == "55P03"
    assert await schema.find_revision(database.fetch, "pgbackend") == schema.head()


async def test_migrating_an_unreachable_server_is_a_lost_connection() -> None:
    with pytest.raises(ConnectionLostError):
        await schema.migrate(Database("postgresql://nobody@127.0.0.1:1/none").connect, "pgbackend")


async def test_an_unknown_revision_is_refused_before_any_connection() -> None:
    async def never() -> Connection:
        raise AssertionError("connected")

    with pytest.raises(ConfigError, match="no revision '9999'"):
        await schema.migrate(never, "pgbackend", to="9999")
    with pytest.raises(ConfigError, match="no revision '9999'"):
        schema.offline_sql("pgbackend", "9999")
    with pytest.raises(ConfigError, match="1 to 63 bytes"):
        await schema.migrate(never, "x" * 64)


async def test_a_log_of_a_newer_pgbackend_is_left_alone(database: Database) -> None:
    await schema.migrate(database.connect, "pgbackend")
    await database.execute("UPDATE pgbackend.pgbackend_revision SET version_num = '7777'")

    with pytest.raises(SchemaError, match="newer pgbackend; upgrade it") as caught:
        await schema.migrate(database.connect, "pgbackend")

    assert (caught.value.found, caught.value.expected) == ("7777", schema.head())


def test_check_says_what_is_found_and_what_to_do() -> None:
    schema.check(schema.head(), "pgbackend")

    with pytest.raises(SchemaError, match=r'"pgbackend" holds no log\. Run `pgbackend migrate`\.') as caught:
        schema.check(None, "pgbackend")
    assert (caught.value.found, caught.value.expected) == (None, schema.head())

    with pytest.raises(SchemaError, match=r"is at 7777.*migrated by a newer pgbackend; upgrade it"):
        schema.check("7777", "pgbackend")


def test_check_of_a_past_revision_says_to_migrate(later: str) -> None:
    past = schema.revisions()[0]
    with pytest.raises(SchemaError, match=rf"is at {past}, this version needs {later}\. Run `pgbackend migrate`\."):
        schema.check(past, "pgbackend")


async def test_the_hosts_logging_is_left_alone(database: Database) -> None:
    root = logging.getLogger()
    mine = logging.getLogger("host.application")
    before = (root.level, list(root.handlers), mine.disabled, logging.getLogger("alembic").level)

    await schema.migrate(database.connect, "pgbackend")
    schema.offline_sql("pgbackend")

    assert (root.level, list(root.handlers), mine.disabled, logging.getLogger("alembic").level) == before


async def test_migrating_prints_nothing_and_starts_no_thread(
    database: Database, capfd: pytest.CaptureFixture[str]
) -> None:
    before = threading.active_count()

    await schema.migrate(database.connect, "pgbackend")

    assert capfd.readouterr() == ("", "")
    assert threading.active_count() == before


# Checks of the tables, which hold for every INSERT.

VALID: dict[str, dict[str, object]] = {
    "nanoseconds": {"time": "2024-02-29T23:59:59.123456789Z"},
    "leap second": {"time": "2016-12-31T23:59:60Z"},
    "offset": {"time": "2024-02-29T23:59:59.5-03:30"},
    "lower case": {"time": "2024-02-29t23:59:59z"},
    "long fraction": {"time": "2024-02-29T23:59:59.000000000000000000001+00:00"},
    "extensions": {"extensions": '{"traceparent": "00-1", "sequence": 7, "sampled": true, "dataref": "/x"}'},
    "no data": {"datacontenttype": "application/json"},
    "empty data": {"data": b""},
    "json data": {"data": b"null", "data_encoding": "json"},
    "all": {"subject": "s", "dataschema": "d", "partitionkey": "k", "data": b"\0\xff", "data_encoding": "base64"},
}
INVALID: dict[str, list[dict[str, object]]] = {
    'attribute "specversion" is empty': [{"specversion": ""}],
    'attribute "id" is empty': [{"id": ""}],
    'attribute "source" is empty': [{"source": ""}],
    'attribute "type" is empty': [{"type": ""}],
    'attribute "subject" is empty': [{"subject": ""}],
    'attribute "datacontenttype" is empty': [{"datacontenttype": ""}],
    'attribute "dataschema" is empty': [{"dataschema": ""}],
    'attribute "partitionkey" is empty': [{"partitionkey": ""}],
    'attribute "time" is no RFC 3339 timestamp': [
        {"time": time}
        for time in (
            "",
            "now",
            "2024-02-29",
            "2024-02-29 23:59:59Z",
            "2024-02-29T23:59:59",
            "2024-02-29T23:59Z",
            "2024-02-29 23:59:59.5+00",
            "2024-02-29T23:59:59+00",
            "20240229T235959Z",
            "2024-02-29T23:59:59,5Z",
            "2024-02-29T23:59:59Z\n",
            " 2024-02-29T23:59:59Z",
            "٢٠٢٤-02-29T23:59:59Z",
        )
    ],
    '"extensions" is no JSON object': [{"extensions": text} for text in ("[]", "1", "null", '"x"')],
    '"extensions" has a member that has a column of its own': [
        {"extensions": '{"partitionkey": "k"}'},
        {"extensions": '{"traceparent": "00-1", "id": "2"}'},
        {"extensions": '{"data": null}'},
    ],
    "the attributes have more than 65536 bytes": [
        {"subject": "é" * 32_768},
        {"extensions": f'{{"a": "{"x" * 65_536}"}}'},
    ],
    '"data_encoding" is neither json nor text nor base64': [
        {"data": b"x", "data_encoding": "utf-8"},
        {"data": b"x", "data_encoding": ""},
    ],
    '"data_encoding" is set, and there is no data': [{"data_encoding": "json"}],
}


async def insert(connection: "asyncpg.Connection[asyncpg.Record]", columns: dict[str, object]) -> asyncpg.Record:
    columns = {"id": "1", "source": "/plain", "type": "sql"} | columns
    values = ", ".join(f"${number}" for number in range(1, len(columns) + 1))
    row = await connection.fetchrow(
        f"INSERT INTO pgbackend.events ({', '.join(columns)}) VALUES ({values}) RETURNING *", *columns.values()
    )
    assert row is not None
    return row


async def test_an_insert_of_id_source_and_type_is_a_valid_append(database: Database) -> None:
    await schema.migrate(database.connect, "pgbackend")
    async with database.acquire() as connection:
        row = await insert(connection, {})

    assert list(row.keys()) == [
        *("position", "recorded_at", "specversion", "id", "source", "type", "subject", "time"),
        *("datacontenttype", "dataschema", "partitionkey", "extensions", "data", "data_encoding"),
    ]
    assert (row["position"], row["specversion"], row["extensions"], row["data"]) == (1, "1.0", "{}", None)


async def test_valid_cloudevents_are_stored_unchanged(database: Database) -> None:
    await schema.migrate(database.connect, "pgbackend")
    async with database.acquire() as connection:
        for case, columns in VALID.items():
            row = await insert(connection, columns)
            assert {name: row[name] for name in columns} == columns, case


async def test_invalid_cloudevents_are_refused_by_a_named_constraint(database: Database, empty_database: str) -> None:
    await schema.migrate(database.connect, "pgbackend")
    async with connected(empty_database) as connection:
        for fault, cases in INVALID.items():
            for columns in cases:
                with pytest.raises(asyncpg.CheckViolationError, match=re.escape(fault)) as caught:
                    await insert(connection, columns)
                assert caught.value.constraint_name == "events_valid"


async def test_positions_come_from_the_sequence_only(database: Database) -> None:
    await schema.migrate(database.connect, "pgbackend")
    async with database.acquire() as connection:
        with pytest.raises(asyncpg.GeneratedAlwaysError):
            await insert(connection, {"position": 5})


async def test_events_of_one_key_have_one_hash_and_it_is_never_negative(database: Database) -> None:
    await schema.migrate(database.connect, "pgbackend")

    async def key_hash(
        *,
        partitionkey: str | None = None,
        subject: str | None = None,
        source: str = "/plain",
        id: str = "1",  # noqa: A002
    ) -> int:
        hashed: int = await database.fetchval(
            "SELECT pgbackend.key_hash($1, $2, $3, $4)", partitionkey, subject, source, id
        )
        return hashed

    by_partition_key = await key_hash(partitionkey="k", subject="s", id="1")
    by_subject = await key_hash(subject="s", id="1")
    by_id = await key_hash(id="1")

    assert by_partition_key == await key_hash(partitionkey="k", source="/other", id="2")
    assert by_subject == await key_hash(subject="s", id="2")
    assert by_subject != await key_hash(subject="s", source="/other")
    assert by_id == await key_hash(id="1")
    assert by_id != await key_hash(id="2")
    assert len({by_partition_key, by_subject, by_id, await key_hash(subject="k"), await key_hash(id="k")}) == 5
    for number in range(100):
        assert await key_hash(id=str(number)) >= 0


async def test_deleting_a_subscription_deletes_its_rows(database: Database) -> None:
    await schema.migrate(database.connect, "pgbackend")
    async with database.acquire() as connection:
        await connection.execute("""
            SET search_path = pgbackend;
            INSERT INTO subscriptions (name, ordering, shards) VALUES ('a', 'none', 1);
            INSERT INTO offsets (subscription, shard, shards, position, epoch) VALUES ('a', 0, 1, 0, nextval('epochs'));
            INSERT INTO redeliveries VALUES ('a', 1, 1, 1, now(), 'error');
            INSERT INTO dead_letters (subscription, position, recorded_at, key_hash, specversion, id, source, type,
                extensions, attempts, error) VALUES ('a', 1, now(), 1, '1.0', '1', 's', 't', '{}', 5, 'error');
            DELETE FROM subscriptions;
            RESET search_path""")
        for table in ("offsets", "redeliveries", "dead_letters"):
            assert await connection.fetchval(f"SELECT count(*) FROM pgbackend.{table}") == 0


def test_files_are_named_after_their_revisions_in_the_order_that_alembic_finds() -> None:
    scripts = alembic_migrations.scripts()
    assert schema.revisions() == [script.revision for script in scripts.walk_revisions()][::-1]


def test_alembic_and_sqlalchemy_are_imported_only_to_migrate() -> None:
    code = "import sys, pgbackend.cli, pgbackend.serve.app; print({'alembic', 'sqlalchemy'} & {*sys.modules})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout == "set()\n"
