import asyncio
import io
import os
import runpy
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, create_engine, inspect
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from pgbackend import Backend
from pgbackend.errors import SchemaError
from pgbackend.postgres import alembic_migrations, schema
from pgbackend.postgres.sql import quote_ident
from pgbackend.postgres.tables import metadata
from tests.support.databases import connected
from tests.support.polling import eventually

ROOT = Path(__file__).parents[2]

# All that the catalogs say about the tables of a schema, as text without the name of the schema.
TABLES = {
    "relations": """
        SELECT relname::text, relkind::text, relpersistence::text, array_to_string(reloptions, ' '),
               pg_get_partkeydef(oid)
        FROM pg_class
        WHERE relnamespace = $1::text::regnamespace AND NOT relispartition AND relname NOT LIKE 'pgbackend_revision%'
            AND relkind <> 'v'
        ORDER BY 1""",
    "columns": """
        SELECT relname::text, attnum, attname::text, format_type(atttypid, atttypmod), attnotnull, attidentity::text,
               attgenerated::text, pg_get_expr(adbin, adrelid), attcollation::regcollation::text, attstorage::text
        FROM pg_class
        JOIN pg_attribute ON attrelid = pg_class.oid AND attnum > 0
        LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
        WHERE relnamespace = $1::text::regnamespace AND relkind IN ('r', 'p') AND NOT relispartition
            AND relname <> 'pgbackend_revision'
        ORDER BY 1, 2""",
    "constraints": """
        SELECT relname::text, conname::text, contype::text, pg_get_constraintdef(pg_constraint.oid)
        FROM pg_constraint
        JOIN pg_class ON pg_class.oid = conrelid
        WHERE relnamespace = $1::text::regnamespace AND NOT relispartition AND relname <> 'pgbackend_revision'
        ORDER BY 1, 2""",
    "indexes": """
        SELECT indexrelid::regclass::text, pg_get_indexdef(indexrelid)
        FROM pg_index
        JOIN pg_class ON pg_class.oid = indrelid
        WHERE relnamespace = $1::text::regnamespace AND NOT relispartition AND relname <> 'pgbackend_revision'
        ORDER BY 1""",
    "sequences": """
        SELECT relname::text, seqtypid::regtype::text, seqstart, seqincrement, seqmax, seqmin, seqcache, seqcycle
        FROM pg_sequence
        JOIN pg_class ON pg_class.oid = seqrelid
        WHERE relnamespace = $1::text::regnamespace
        ORDER BY 1""",
}
# And about objects that SQLAlchemy's metadata cannot describe.
CATALOG = TABLES | {
    "views": """
        SELECT relname::text, pg_get_viewdef(oid), relowner::regrole::text
        FROM pg_class
        WHERE relnamespace = $1::text::regnamespace AND relkind = 'v'
        ORDER BY relname""",
    "functions": """
        SELECT pg_get_functiondef(oid), proowner::regrole::text, proacl::text
        FROM pg_proc
        WHERE pronamespace = $1::text::regnamespace
        ORDER BY proname, pg_get_function_identity_arguments(oid)""",
}


async def catalog(dsn: str, name: str) -> dict[str, list[tuple[object, ...]]]:
    async with connected(dsn) as connection:
        return {
            kind: [
                tuple(value.replace(f"{name}.", "") if isinstance(value, str) else value for value in row)
                for row in await connection.fetch(query, name)
            ]
            for kind, query in CATALOG.items()
        }


async def migrate(dsn: str, name: str = "pgbackend", *, to: str = "head") -> None:
    await schema.migrate(lambda: asyncpg.connect(dsn), name, to=to)


async def test_migrations_and_sqlalchemy_metadata_describe_the_same_tables(empty_database: str) -> None:
    await migrate(empty_database, "migrated")
    async with connected(empty_database) as connection:
        await connection.execute("CREATE SCHEMA described")
    engine = create_async_engine(
        "postgresql+asyncpg://", async_creator=lambda: asyncpg.connect(empty_database), poolclass=NullPool
    )
    async with engine.begin() as sqlalchemy_connection:
        await sqlalchemy_connection.run_sync(metadata("described").create_all)
    await engine.dispose()

    migrated = without_numbers(await catalog(empty_database, "migrated"))
    described = without_numbers(await catalog(empty_database, "described"))
    migrated["constraints"] = [row for row in migrated["constraints"] if row[1] != "events_valid"]
    for kind in TABLES:
        assert migrated[kind] == described[kind], kind
        assert migrated[kind], f"no {kind} found: the comparison would be empty"


async def test_autogenerate_finds_nothing_to_do(empty_database: str) -> None:
    await migrate(empty_database, "migrated")

    def differences(connection: Connection) -> list[object]:
        context = MigrationContext.configure(
            connection,
            opts={
                "compare_type": True,
                # Defaults are compared above: for a column of type json PostgreSQL has no "=", which this would use.
                "compare_server_default": False,
                "include_schemas": True,
                "version_table": alembic_migrations.VERSION_TABLE,
                "version_table_schema": "migrated",
                "include_name": lambda name, kind, _: kind != "schema" or name == "migrated",
                "include_object": lambda _, name, kind, *__: (
                    kind != "table" or not name.startswith(("events_", "recent_events_"))
                ),
            },
        )
        return list(compare_metadata(context, metadata("migrated")))

    engine = create_async_engine(
        "postgresql+asyncpg://", async_creator=lambda: asyncpg.connect(empty_database), poolclass=NullPool
    )
    async with engine.connect() as connection:
        assert await connection.run_sync(differences) == []
    await engine.dispose()


@pytest.mark.parametrize("revision", ["base", *schema.revisions()])
async def test_going_back_and_forwards_again_leaves_no_trace(empty_database: str, later: str, revision: str) -> None:
    await migrate(empty_database)
    at_head = await catalog(empty_database, "pgbackend")

    await migrate(empty_database, to=revision)
    await migrate(empty_database, to="base")
    at_base = await catalog(empty_database, "pgbackend")
    await migrate(empty_database, to=revision)
    await migrate(empty_database, to=later)

    assert not any(at_base.values())
    again = await catalog(empty_database, "pgbackend")
    assert without_numbers(again) == without_numbers(at_head)


def without_numbers(found: dict[str, list[tuple[object, ...]]]) -> dict[str, list[tuple[object, ...]]]:
    """A catalog without the numbers of columns: one that was dropped keeps its number."""
    return found | {"columns": [(row[0], *row[2:]) for row in found["columns"] if "dropped" not in str(row[2])]}


@pytest.mark.parametrize("revision", schema.revisions())
async def test_a_filled_log_of_each_past_revision_is_upgraded_with_its_events(
    empty_database: str, later: str, revision: str
) -> None:
    await migrate(empty_database, to=revision)
    async with connected(empty_database) as connection:
        await connection.execute("INSERT INTO pgbackend.events (id, source, type) VALUES ('1', '/s', 't')")
        await connection.execute("INSERT INTO pgbackend.subscriptions (name, ordering, shards) VALUES ('a', 'none', 1)")
        before = await connection.fetchrow("SELECT * FROM pgbackend.events")

        await migrate(empty_database)

        assert await schema.find_revision(connection.fetch, "pgbackend") == later
        after = await connection.fetchrow("SELECT * FROM pgbackend.events")
        kept = {name: value for name, value in dict(before or {}).items() if name != "key_hash"}
        assert dict(after or {}) == {**kept, "later": None}
        assert await connection.fetchval("SELECT count(*) FROM pgbackend.subscriptions") == 1


async def test_a_log_with_events_is_checked_and_sharded_as_before_after_the_second_revision(
    empty_database: str,
) -> None:
    """Appends are checked in all segments: the one with events, those made ahead, and new ones. So is their order."""
    insert = "INSERT INTO pgbackend.events (id, source, type, subject) VALUES ($1, '/s', 't', $1)"
    await migrate(empty_database, to="r0001")
    async with connected(empty_database) as connection:
        await connection.executemany(insert, [(str(number),) for number in range(20)])
        hashes = await connection.fetch("SELECT position, key_hash FROM pgbackend.events ORDER BY position")

        await migrate(empty_database)

        query = "SELECT event_position, event_hash FROM pgbackend.key_hashes('{[0,1000)}') ORDER BY 1"
        assert [tuple(row) for row in await connection.fetch(query)] == [tuple(row) for row in hashes]
        await connection.execute("ALTER TABLE pgbackend.events ALTER COLUMN position RESTART WITH 95000000")
        (made,) = await connection.fetch("SELECT lower_bound FROM pgbackend.make_segment()")
        for position in (21, 30_000_000, made["lower_bound"]):
            await connection.execute(f"ALTER TABLE pgbackend.events ALTER COLUMN position RESTART WITH {position}")
            with pytest.raises(asyncpg.CheckViolationError, match='attribute "id" is empty'):
                await connection.execute(insert, "")
            await connection.execute(insert, "new")
        # A dump and its restore check every row.
        await connection.execute("ALTER TABLE pgbackend.events VALIDATE CONSTRAINT events_valid")
        await migrate(empty_database, to="r0001")
        with pytest.raises(asyncpg.CheckViolationError, match="events_id_not_empty"):
            await connection.execute(insert, "")
        again = await connection.fetch("SELECT position, key_hash FROM pgbackend.events ORDER BY position LIMIT 20")
        assert again == hashes


async def test_a_log_with_events_goes_on_after_the_third_revision_and_back(empty_database: str) -> None:
    await migrate(empty_database, to="r0002")
    async with connected(empty_database) as connection:
        await connection.execute("INSERT INTO pgbackend.events (id, source, type) VALUES ('1', '/s', 't')")

        await migrate(empty_database)

        assert await connection.fetchval("SELECT pgbackend.produce('t', '/s', 'null'::jsonb, id => '2')") == 2
        await migrate(empty_database, to="r0002")
        with pytest.raises(asyncpg.UndefinedFunctionError):
            await connection.fetchval("SELECT pgbackend.produce('t', '/s')")
        await connection.execute("INSERT INTO pgbackend.events (id, source, type) VALUES ('3', '/s', 't')")
        kept = await connection.fetch("SELECT position, id, data_encoding FROM pgbackend.events ORDER BY position")
        assert [tuple(row) for row in kept] == [(1, "1", None), (2, "2", "json"), (3, "3", None)]


async def test_a_log_that_was_used_before_the_fourth_revision_keeps_everything_and_can_go_back(
    empty_database: str,
) -> None:
    policy = "SELECT keep_us, max_age_us, max_bytes, dead_letters_us FROM pgbackend.retention"
    await migrate(empty_database, to="r0003")
    async with connected(empty_database) as connection:
        await connection.execute("INSERT INTO pgbackend.events (id, source, type) VALUES ('1', '/s', 't')")

        await migrate(empty_database)

        assert [tuple(row) for row in await connection.fetch(policy)] == [(None, None, None, None)]
        await connection.execute("UPDATE pgbackend.retention SET keep_us = 1")
        assert await connection.fetchval("SELECT last_position FROM pgbackend.cut_segment()") == 1
        await connection.execute("INSERT INTO pgbackend.events (id, source, type) VALUES ('2', '/s', 't')")
        assert await connection.fetchval("SELECT reason FROM pgbackend.empty_segment()") == "settled"
        await migrate(empty_database, to="r0003")
        await connection.execute("INSERT INTO pgbackend.events (id, source, type) VALUES ('3', '/s', 't')")
        kept = await connection.fetch("SELECT position, id FROM pgbackend.events ORDER BY position")
        assert [tuple(row) for row in kept] == [(10_000_000, "2"), (10_000_001, "3")]
        await migrate(empty_database)
        assert [tuple(row) for row in await connection.fetch(policy)] == [(None, None, None, None)]


async def test_a_log_with_events_has_views_of_its_status_after_the_seventh_revision_and_can_go_back(
    empty_database: str,
) -> None:
    await migrate(empty_database, to="r0006")
    async with connected(empty_database) as connection:
        await connection.execute("""
            SET search_path = pgbackend;
            INSERT INTO events (id, source, type) VALUES ('1', '/s', 't'), ('2', '/s', 't'), ('3', '/s', 't');
            INSERT INTO subscriptions (name, ordering, shards) VALUES ('a', 'none', 1);
            INSERT INTO offsets (subscription, shard, shards, position, epoch) VALUES ('a', 0, 1, 1, nextval('epochs'));
            INSERT INTO workers (id, name, lease_timeout) VALUES (gen_random_uuid(), 'here', '1 min');
            RESET search_path""")

        await migrate(empty_database)

        assert await connection.fetchval("SELECT lag_events FROM pgbackend.lag WHERE subscription = 'a'") == 2
        assert await connection.fetchval("SELECT head FROM pgbackend.log_status") == 3
        assert await connection.fetchval("SELECT is_alive FROM pgbackend.worker_status")
        await migrate(empty_database, to="r0006")
        with pytest.raises(asyncpg.UndefinedTableError):
            await connection.fetchval("SELECT * FROM pgbackend.lag")
        assert await connection.fetchval("SELECT count(*) FROM pgbackend.events") == 3


async def test_a_new_log_keeps_seven_days_and_dead_letters_for_thirty(empty_database: str) -> None:
    await migrate(empty_database)
    async with connected(empty_database) as connection:
        day = 86_400_000_000
        query = "SELECT keep_us, max_age_us, max_bytes, dead_letters_us FROM pgbackend.retention"
        assert [tuple(row) for row in await connection.fetch(query)] == [(7 * day, None, None, 30 * day)]


async def test_a_subscription_that_was_there_before_is_not_paused_and_a_downgrade_forgets_a_pause(
    empty_database: str,
) -> None:
    await migrate(empty_database, to="r0004")
    async with connected(empty_database) as connection:
        await connection.execute("INSERT INTO pgbackend.subscriptions (name, ordering, shards) VALUES ('s', 'none', 1)")
        former = await connection.fetch("SELECT * FROM pgbackend.subscriptions")

        await migrate(empty_database, to="r0005")

        added = "SELECT paused_at, paused_by, pause_reason, resumed_at, target FROM pgbackend.subscriptions"
        assert [tuple(row) for row in await connection.fetch(added)] == [(None,) * 5]
        with pytest.raises(asyncpg.CheckViolationError, match="pause_whole"):
            await connection.execute("UPDATE pgbackend.subscriptions SET paused_at = now()")
        with pytest.raises(asyncpg.CheckViolationError, match="paused_by_known"):
            await connection.execute(
                "UPDATE pgbackend.subscriptions SET paused_at = now(), paused_by = 'me', pause_reason = ''"
            )
        await connection.execute(
            "UPDATE pgbackend.subscriptions SET paused_at = now(), paused_by = 'operator', pause_reason = 'later'"
        )

        await migrate(empty_database, to="r0004")

        assert await connection.fetch("SELECT * FROM pgbackend.subscriptions") == former


async def test_a_log_with_failed_events_is_repaired_after_the_sixth_revision_and_goes_on_before_it(
    empty_database: str,
) -> None:
    await migrate(empty_database, to="r0005")
    async with connected(empty_database) as connection:
        await connection.execute("""
            INSERT INTO pgbackend.events (id, source, type, partitionkey, data)
            SELECT n, '/s', 't', 'key of ' || n, 'secret'::bytea FROM generate_series(1, 3) AS n""")
        await connection.execute("INSERT INTO pgbackend.subscriptions (name, ordering, shards) VALUES ('s', 'none', 1)")
        await connection.execute("""
            INSERT INTO pgbackend.redeliveries (subscription, position, key_hash, attempt, due_at, last_error)
            SELECT 's', position, 1, 1, now(), 'no' FROM pgbackend.events""")
        hashes = await connection.fetch("SELECT * FROM pgbackend.key_hashes('{[1,4)}')")

        await migrate(empty_database)

        assert await connection.fetch("SELECT * FROM pgbackend.key_hashes('{[1,4)}')") == hashes
        assert await connection.fetchval("SELECT tables FROM pgbackend.redact(2)") == [
            "pgbackend.events_0", "pgbackend.redeliveries",
        ]  # fmt: skip
        assert await connection.fetchval("SELECT pgbackend.bury_skipped('s', 3)") == 1
        await migrate(empty_database, to="r0005")
        left = "SELECT position, id, partitionkey, data FROM pgbackend.stored_events ORDER BY position"
        secret = b"secret"
        assert [tuple(row) for row in await connection.fetch(left)] == [
            (1, "1", "key of 1", secret), (2, "2", None, None), (3, "3", "key of 3", secret),
        ]  # fmt: skip
        await connection.execute("INSERT INTO pgbackend.events (id, source, type) VALUES ('4', '/s', 't')")
        await migrate(empty_database)
        assert await connection.fetchval("SELECT array_agg(position) FROM pgbackend.stored_events") == [1, 3, 4]


async def test_failed_events_and_dead_letters_have_an_empty_history_after_the_eighth_revision_and_go_on_before_it(
    empty_database: str,
) -> None:
    await migrate(empty_database, to="r0007")
    async with connected(empty_database) as connection:
        await connection.execute("""
            INSERT INTO pgbackend.events (id, source, type) SELECT n, '/s', 't' FROM generate_series(1, 4) AS n""")
        await connection.execute("INSERT INTO pgbackend.subscriptions (name, ordering, shards) VALUES ('s', 'none', 1)")
        await connection.execute("""
            INSERT INTO pgbackend.redeliveries (subscription, position, key_hash, attempt, due_at, last_error)
            SELECT 's', position, 1, 1, now(), 'no' FROM pgbackend.events""")
        skip = "SELECT pgbackend.bury_skipped('s', $1)"
        assert await connection.fetchval(skip, 1) == 1
        files = "SELECT array_agg(relfilenode ORDER BY relname) FROM pg_class WHERE relname = ANY ($1)"
        tables = ["redeliveries", "dead_letters"]
        before = await connection.fetchval(files, tables)

        await migrate(empty_database)

        assert await connection.fetchval(files, tables) == before, "a table was rewritten"
        kept = """
            SELECT position, jsonb_path_query_array(history, '$[*].what')::text FROM pgbackend.dead_letters
            UNION ALL
            SELECT position, history::text FROM pgbackend.redeliveries
            ORDER BY position"""
        assert [tuple(row) for row in await connection.fetch(kept)] == [(1, "[]"), (2, "[]"), (3, "[]"), (4, "[]")]
        assert await connection.fetchval(skip, 2) == 1
        assert [tuple(row) for row in await connection.fetch(kept)] == [
            (1, "[]"), (2, '["skipped"]'), (3, "[]"), (4, "[]"),
        ]  # fmt: skip

        await migrate(empty_database, to="r0007")
        assert await connection.fetchval(skip, 3) == 1
        assert await connection.fetchval("SELECT tables FROM pgbackend.redact(4)") == [
            "pgbackend.events_0", "pgbackend.redeliveries",
        ]  # fmt: skip
        await migrate(empty_database)
        assert [tuple(row) for row in await connection.fetch(kept)] == [(1, "[]"), (2, "[]"), (3, "[]"), (4, "[]")]


async def test_each_revision_that_changes_a_log_has_a_test_with_data() -> None:
    assert schema.revisions() == ["r0001", "r0002", "r0003", "r0004", "r0005", "r0006", "r0007", "r0008"], (
        "test the new revision on a log with data, then add it here"
    )


async def test_a_superuser_who_migrates_leaves_no_function_that_others_may_call(empty_database: str) -> None:
    """The functions belong to the owner of the tables, and PUBLIC may not call them."""
    await migrate(empty_database)
    async with connected(empty_database) as connection:
        rows = await connection.fetch("""
            SELECT proname::text AS name,
                prosecdef AS with_owners_rights,
                proowner = (SELECT relowner FROM pg_class WHERE oid = 'pgbackend.events'::regclass) AS is_owners,
                proconfig @> ARRAY['search_path=pg_catalog, pg_temp'] AS has_search_path,
                has_function_privilege('pg_monitor', oid, 'EXECUTE') AS is_public
            FROM pg_proc
            WHERE pronamespace = 'pgbackend'::regnamespace
            ORDER BY proname""")

    assert {row["name"]: row["with_owners_rights"] for row in rows} == {
        "appender_began": True,
        "appenders_in_flight": False,
        "blocked_keys": True,
        "blocked_keys_of": False,
        "bury": True,
        "bury_skipped": True,
        "check_event": False,
        "claim_keys": True,
        "claim_keys_soon": False,
        "claim_new_keys": True,
        "cut_segment": True,
        "cut_segment_of": False,
        "empty_segment": True,
        "empty_segment_of": False,
        "encode_event": False,
        "end_life": True,
        "event_key": False,
        "find_distributed": False,
        "find_holders": True,
        "first_copies": False,
        "forget_keys": True,
        "forget_keys_of": False,
        "forget_letters": True,
        "forget_removed": True,
        "join_history": False,
        "key_hash": False,
        "key_hashes": True,
        "make_segment": True,
        "make_segment_of": False,
        "open_appender": True,
        "produce": False,
        "record_cuts_of": False,
        "redact": True,
        "redact_of": False,
        "remove_segments": True,
        "remove_segments_of": False,
        "segments_of": False,
        "stays_locked": False,
        "unsettled": False,
        "waiting_events": True,
    }
    assert all(row["is_owners"] for row in rows)
    # These see nothing but their arguments, and depend on no search_path.
    public = {"check_event", "join_history", "key_hash"}
    assert {row["name"] for row in rows if row["is_public"]} == public
    assert all(row["has_search_path"] != row["is_public"] for row in rows)


async def test_default_privileges_let_no_role_write_segments_or_dead_letters(empty_database: str) -> None:
    role = "writer_" + urlsplit(empty_database).path[-12:]
    async with connected(empty_database) as connection:
        await connection.execute(f"CREATE ROLE {role}")
        try:
            await connection.execute(f"ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO {role}, PUBLIC")
            await migrate(empty_database)
            may = {
                (table, privilege): await connection.fetchval(
                    "SELECT has_table_privilege($1, $2, $3)", role, f"pgbackend.{table}", privilege
                )
                for table in ("events_0", "dead_letters")
                for privilege in ("SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE")
            }
        finally:
            await connection.execute(f"DROP OWNED BY {role}")
            await connection.execute("ALTER DEFAULT PRIVILEGES REVOKE ALL ON TABLES FROM PUBLIC")
            await connection.execute(f"DROP ROLE {role}")

    assert may["events_0", "SELECT"]
    assert not any(may["events_0", privilege] for privilege in ("INSERT", "UPDATE", "DELETE", "TRUNCATE"))
    assert not may["dead_letters", "INSERT"]


async def test_a_log_of_a_version_before_the_first_release_is_refused(empty_database: str) -> None:
    await migrate(empty_database)
    before = await catalog(empty_database, "pgbackend")
    async with connected(empty_database) as connection:
        for revision in (f"{number:04}" for number in range(1, 11)):
            await connection.execute("UPDATE pgbackend.pgbackend_revision SET version_num = $1", revision)
            for to in ("head", "base"):
                with pytest.raises(SchemaError, match=r"before the first release.*Make a new log in another schema"):
                    await migrate(empty_database, to=to)
            found = await schema.find_revision(connection.fetch, "pgbackend")
            with pytest.raises(SchemaError, match=rf"revision {revision}\)") as caught:
                schema.check(found, "pgbackend")
            assert (caught.value.found, caught.value.expected) == (revision, schema.head())
    assert await catalog(empty_database, "pgbackend") == before


async def test_a_log_without_a_version_table_is_refused_as_well(empty_database: str) -> None:
    """The first versions kept their revision in `alembic_version`, which may be the host's."""
    await migrate(empty_database)
    async with connected(empty_database) as connection:
        await connection.execute("ALTER TABLE pgbackend.pgbackend_revision RENAME TO alembic_version")

    with pytest.raises(SchemaError, match="before the first release"):
        await migrate(empty_database)
    with pytest.raises(SchemaError, match="before the first release"):
        await Backend(empty_database).init(migrate=False)


async def test_printed_sql_creates_the_same_log_as_a_migration(empty_database: str) -> None:
    name = "of%s:line"
    await migrate(empty_database, "online")
    async with connected(empty_database) as connection:
        await connection.execute(schema.offline_sql(name))
        await connection.execute(f"ALTER SCHEMA {quote_ident(name)} RENAME TO offline")

    assert await catalog(empty_database, "offline") == await catalog(empty_database, "online")
    await schema.migrate(lambda: asyncpg.connect(empty_database), "offline")


async def test_printed_sql_to_base_removes_the_log(empty_database: str) -> None:
    await migrate(empty_database)
    async with connected(empty_database) as connection:
        await connection.execute(schema.offline_sql("pgbackend", "head:base"))

    assert not any((await catalog(empty_database, "pgbackend")).values())


HOST_ENVIRONMENT = """
from alembic import context

with context.config.attributes["engine"].begin() as connection:
    context.configure(connection=connection)
    with context.begin_transaction():
        context.run_migrations()
"""
HOST_REVISION = """
from alembic import context, op
from sqlalchemy import Column, Integer

revision, down_revision = "r0001", None


def upgrade():
    op.create_table("before", Column("id", Integer))
    context.config.attributes["midway"]()
    op.create_table("after", Column("id", Integer))
"""


def migrate_host(directory: Path, midway: Callable[[], object]) -> set[str]:
    """Run another application's Alembic on a database of its own, and return the tables that it created."""
    (directory / "versions").mkdir(parents=True)
    (directory / "env.py").write_text(HOST_ENVIRONMENT)
    (directory / "versions" / "one.py").write_text(HOST_REVISION)
    engine = create_engine(f"sqlite:///{directory / 'host.db'}")
    config = Config(stdout=io.StringIO(), attributes={"engine": engine, "midway": midway})
    config.set_main_option("script_location", str(directory))
    config.set_main_option("path_separator", "os")
    command.upgrade(config, "head")
    try:
        return set(inspect(engine).get_table_names())
    finally:
        engine.dispose()


async def test_migrating_works_while_the_hosts_alembic_runs_in_a_thread(empty_database: str, tmp_path: Path) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def midway() -> None:
        inside.set()
        assert go_on.wait(30)

    host = asyncio.create_task(asyncio.to_thread(migrate_host, tmp_path / "host", midway))
    try:
        assert await asyncio.to_thread(inside.wait, 30)
        await migrate(empty_database)
        schema.offline_sql("pgbackend")
    finally:
        go_on.set()

    assert await host == {"before", "after", "alembic_version"}
    async with connected(empty_database) as connection:
        assert await schema.find_revision(connection.fetch, "pgbackend") == schema.head()


@pytest.mark.direct
async def test_the_hosts_alembic_works_in_a_thread_while_a_migration_runs(empty_database: str, tmp_path: Path) -> None:
    waiting = "SELECT count(*) > 0 FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'advisory'"
    async with connected(empty_database) as gate:
        await gate.execute("SELECT pg_advisory_lock(hashtextextended('pgbackend migrate pgbackend', 0))")
        migrating = asyncio.create_task(migrate(empty_database))
        await eventually("the migration waits for its turn", lambda: gate.fetchval(waiting))

        tables = await asyncio.to_thread(migrate_host, tmp_path / "host", lambda: None)
        await gate.execute("SELECT pg_advisory_unlock_all()")
        await migrating

        assert tables == {"before", "after", "alembic_version"}
        assert await schema.find_revision(gate.fetch, "pgbackend") == schema.head()


async def test_the_hosts_alembic_version_in_the_same_schema_is_ignored(empty_database: str) -> None:
    async with connected(empty_database) as connection:
        await connection.execute("CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY)")
        await connection.execute("INSERT INTO alembic_version VALUES ('r0001'), ('0002')")

        await migrate(empty_database, "public")
        assert await schema.find_revision(connection.fetch, "public") == schema.head()
        await migrate(empty_database, "public", to="base")
        await migrate(empty_database, "public")

        kept = await connection.fetch("SELECT version_num FROM alembic_version ORDER BY version_num")
        assert [row["version_num"] for row in kept] == ["0002", "r0001"]
        assert await schema.find_revision(connection.fetch, "public") == schema.head()


def alembic(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "alembic", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


async def test_the_alembic_command_migrates_in_a_checkout(empty_database: str) -> None:
    dsn = "postgresql+asyncpg://" + empty_database.partition("://")[2]

    up = await asyncio.to_thread(alembic, "upgrade", "head", PGBACKEND_DSN=dsn, PGBACKEND_SCHEMA="by Hand")

    assert up.returncode == 0, up.stderr
    async with connected(empty_database) as connection:
        assert await schema.find_revision(connection.fetch, "by Hand") == schema.head()


@pytest.mark.slow
async def test_the_alembic_command_prints_sql_and_goes_back_in_a_checkout(empty_database: str) -> None:
    settings = {"PGBACKEND_DSN": empty_database, "PGBACKEND_SCHEMA": "by Hand"}
    printed = await asyncio.to_thread(alembic, "upgrade", "head", "--sql", **settings)
    assert printed.returncode == 0, printed.stderr
    async with connected(empty_database) as connection:
        await connection.execute(printed.stdout)
        assert await schema.find_revision(connection.fetch, "by Hand") == schema.head()

        down = await asyncio.to_thread(alembic, "downgrade", "base", **settings)

        assert down.returncode == 0, down.stderr
        assert await schema.find_revision(connection.fetch, "by Hand") is None


@pytest.mark.slow
async def test_the_alembic_command_refuses_a_log_of_a_version_before_the_first_release(empty_database: str) -> None:
    await migrate(empty_database)
    async with connected(empty_database) as connection:
        await connection.execute("UPDATE pgbackend.pgbackend_revision SET version_num = '0005'")

    done = await asyncio.to_thread(alembic, "upgrade", "head", PGBACKEND_DSN=empty_database)

    assert done.returncode != 0
    assert "before the first release" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_new_revision_is_made_from_a_template_that_runs(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "migrations", tmp_path / "migrations")
    shutil.copy(ROOT / "alembic.ini", tmp_path)
    done = alembic(
        *("-c", str(tmp_path / "alembic.ini"), "revision", "--rev-id", "r9999", "-m", "9999 leases have zones")
    )
    assert done.returncode == 0, done.stderr

    module = runpy.run_path(str(tmp_path / "migrations" / "versions" / "9999_leases_have_zones.py"))

    assert (module["revision"], module["down_revision"]) == ("r9999", schema.head())
    operations = Operations(MigrationContext.configure(dialect_name="postgresql", opts={"as_sql": True}))
    module["upgrade"](op=operations)
    module["downgrade"](op=operations)


@pytest.mark.slow
def test_the_alembic_command_without_a_dsn_says_what_to_set() -> None:
    done = alembic("upgrade", "head", PGBACKEND_DSN="")

    assert done.returncode != 0
    assert "Set PGBACKEND_DSN" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
async def test_an_installed_wheel_contains_the_migrations(empty_database: str, tmp_path: Path) -> None:
    def build_and_run() -> str:
        dist, site = tmp_path / "dist", tmp_path / "site"
        subprocess.run(
            [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(dist), str(ROOT)],
            check=True,
            timeout=120,
        )
        (wheel,) = dist.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
        script = (
            "import asyncio, sys, asyncpg, pgbackend\n"
            "from pgbackend.postgres import schema\n"
            "asyncio.run(schema.migrate(lambda: asyncpg.connect(sys.argv[1]), 'installed'))\n"
            "print(pgbackend.__file__, schema.head())\n"
        )
        return subprocess.run(
            [sys.executable, "-c", script, empty_database],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(site)},
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout

    printed = await asyncio.to_thread(build_and_run)

    assert printed.split() == [str(tmp_path / "site" / "pgbackend" / "__init__.py"), schema.head()]
    async with connected(empty_database) as connection:
        assert await connection.fetchval("SELECT version_num FROM installed.pgbackend_revision") == schema.head()
