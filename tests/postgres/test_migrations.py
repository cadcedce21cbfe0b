import asyncio
import io
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine, inspect
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from pgbackend.postgres import schema
from pgbackend.postgres.sql import quote_ident
from pgbackend.postgres.tables import metadata
from tests.support.polling import eventually

ROOT = Path(__file__).parents[2]

# Everything that PostgreSQL says about the tables of a schema, as text that does not name the schema.
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
# And about what SQLAlchemy's metadata has no place for.
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
        ORDER BY proname""",
}


@asynccontextmanager
async def connected(dsn: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    connection = await asyncpg.connect(dsn)
    try:
        yield connection
    finally:
        await connection.close()


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

    migrated, described = await catalog(empty_database, "migrated"), await catalog(empty_database, "described")
    for kind in TABLES:
        assert migrated[kind] == described[kind], kind
        assert migrated[kind], f"no {kind} found: the comparison would be empty"


async def test_autogenerate_finds_nothing_to_do(empty_database: str) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext
    from sqlalchemy import Connection

    await migrate(empty_database, "migrated")

    def differences(connection: Connection) -> list[object]:
        context = MigrationContext.configure(
            connection,
            opts={
                "compare_type": True,
                # Defaults are compared above: for a column of type json PostgreSQL has no "=", which this would use.
                "compare_server_default": False,
                "include_schemas": True,
                "version_table": schema.VERSION_TABLE,
                "version_table_schema": "migrated",
                "include_name": lambda name, kind, _: kind != "schema" or name == "migrated",
                "include_object": lambda _, name, kind, *__: kind != "table" or not name.startswith("events_"),
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
async def test_each_revision_goes_back_to_base_and_forwards_again_without_a_trace(
    empty_database: str, revision: str
) -> None:
    await migrate(empty_database)
    at_head = await catalog(empty_database, "pgbackend")

    await migrate(empty_database, to=revision)
    await migrate(empty_database, to="base")
    at_base = await catalog(empty_database, "pgbackend")
    await migrate(empty_database, to=revision)
    await migrate(empty_database)

    assert not any(at_base.values())
    assert await catalog(empty_database, "pgbackend") == at_head


@pytest.mark.parametrize("revision", schema.revisions())
async def test_a_filled_log_of_each_past_revision_is_upgraded_with_its_events(
    empty_database: str, revision: str
) -> None:
    await migrate(empty_database, to=revision)
    async with connected(empty_database) as connection:
        await connection.execute("INSERT INTO pgbackend.events (id, source, type) VALUES ('1', '/s', 't')")
        await connection.execute("INSERT INTO pgbackend.subscriptions (name, ordering, shards) VALUES ('a', 'none', 1)")
        before = await connection.fetch("SELECT * FROM pgbackend.events")

        await migrate(empty_database)

        assert await connection.fetch("SELECT * FROM pgbackend.events") == before
        assert await connection.fetchval("SELECT count(*) FROM pgbackend.subscriptions") == 1


async def test_where_older_subscriptions_were_told_to_start_is_not_known(empty_database: str) -> None:
    await migrate(empty_database, to="0001")
    async with connected(empty_database) as connection:
        await connection.execute("INSERT INTO pgbackend.subscriptions (name, ordering, shards) VALUES ('a', 'none', 1)")
        await migrate(empty_database)
        await connection.execute("INSERT INTO pgbackend.subscriptions (name, ordering, shards) VALUES ('b', 'none', 1)")
        found = await connection.fetch("SELECT name, start_bound FROM pgbackend.subscriptions ORDER BY name")

    assert [tuple(row) for row in found] == [("a", "unknown"), ("b", None)]


async def test_functions_with_the_rights_of_an_owner_have_those_of_who_owns_the_tables(empty_database: str) -> None:
    """Also when a superuser migrates; and nobody else may call them."""
    role = "tenant_" + urlsplit(empty_database).path[-12:]
    async with connected(empty_database) as connection:
        await connection.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'secret'")
        try:
            await connection.execute(f"CREATE SCHEMA pgbackend AUTHORIZATION {role}")
            await schema.migrate(
                lambda: asyncpg.connect(empty_database, user=role, password="secret"), "pgbackend", to="0002"
            )
            await migrate(empty_database)
            rows = await connection.fetch("""
                SELECT proname::text, prosecdef, proowner::regrole::text,
                    proconfig @> ARRAY['search_path=pg_catalog, pg_temp'],
                    has_function_privilege('pg_monitor', oid, 'EXECUTE')
                FROM pg_proc
                WHERE pronamespace = 'pgbackend'::regnamespace
                ORDER BY proname""")
            await connection.execute(f"SET ROLE {role}")
            await connection.execute("SELECT pgbackend.make_segment()")
            await connection.execute("SELECT * FROM pgbackend.living_workers")
        finally:
            await connection.execute("RESET ROLE")
            await connection.execute(f"DROP OWNED BY {role} CASCADE")
            await connection.execute(f"DROP ROLE {role}")

    assert [tuple(row) for row in rows] == [
        ("appender_began", True, role, True, False),
        ("appenders_in_flight", False, role, True, False),
        ("bury", True, role, True, False),
        ("end_life", True, role, True, False),
        ("find_distributed", False, role, True, False),
        ("make_segment", True, role, True, False),
        ("make_segment_of", False, role, True, False),
        ("open_appender", True, role, True, False),
    ]


async def test_who_was_let_write_into_segments_is_not_any_more(empty_database: str) -> None:
    role = "writer_" + urlsplit(empty_database).path[-12:]
    writing = "SELECT has_table_privilege($1, 'pgbackend.events_0', 'INSERT, UPDATE, DELETE, TRUNCATE')"
    await migrate(empty_database, to="0002")
    async with connected(empty_database) as connection:
        await connection.execute(f"CREATE ROLE {role}")
        try:
            await connection.execute(f"GRANT ALL ON ALL TABLES IN SCHEMA pgbackend TO {role}, PUBLIC")
            assert await connection.fetchval(writing, role)
            await migrate(empty_database)
            assert not await connection.fetchval(writing, role)
            assert await connection.fetchval("SELECT has_table_privilege($1, 'pgbackend.events_0', 'SELECT')", role)
        finally:
            await connection.execute(f"DROP OWNED BY {role}")
            await connection.execute(f"DROP ROLE {role}")


async def test_sql_written_offline_makes_the_same_tables_as_a_migration(empty_database: str) -> None:
    name = "of%s:line"
    await migrate(empty_database, "online")
    async with connected(empty_database) as connection:
        await connection.execute(schema.offline_sql(name))
        await connection.execute(f"ALTER SCHEMA {quote_ident(name)} RENAME TO offline")

    assert await catalog(empty_database, "offline") == await catalog(empty_database, "online")
    await schema.migrate(lambda: asyncpg.connect(empty_database), "offline")


async def test_sql_written_offline_for_the_way_back_removes_the_tables(empty_database: str) -> None:
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

revision, down_revision = "0003", None


def upgrade():
    op.create_table("before", Column("id", Integer))
    context.config.attributes["midway"]()
    op.create_table("after", Column("id", Integer))
"""


def migrate_host(directory: Path, midway: Callable[[], object]) -> set[str]:
    """Run another application's own Alembic, on a database of its own; the tables that it made."""
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


async def test_a_log_is_migrated_while_the_hosts_own_alembic_runs_in_a_thread(
    empty_database: str, tmp_path: Path
) -> None:
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
        assert await schema.found(connection.fetch, "pgbackend") == schema.head()


@pytest.mark.direct
async def test_the_hosts_own_alembic_runs_in_a_thread_while_a_log_is_migrated(
    empty_database: str, tmp_path: Path
) -> None:
    waiting = "SELECT count(*) > 0 FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'advisory'"
    async with connected(empty_database) as gate:
        await gate.execute("SELECT pg_advisory_lock(hashtextextended('pgbackend migrate pgbackend', 0))")
        migrating = asyncio.create_task(migrate(empty_database))
        await eventually("the migration waits for its turn", lambda: gate.fetchval(waiting))

        tables = await asyncio.to_thread(migrate_host, tmp_path / "host", lambda: None)
        await gate.execute("SELECT pg_advisory_unlock_all()")
        await migrating

        assert tables == {"before", "after", "alembic_version"}
        assert await schema.found(gate.fetch, "pgbackend") == schema.head()


@pytest.mark.parametrize("content", [[], ["0003"], ["9999"], ["0001", "0002"]])
async def test_a_hosts_alembic_version_in_the_same_schema_is_neither_touched_nor_believed(
    empty_database: str, content: list[str]
) -> None:
    async with connected(empty_database) as connection:
        await connection.execute("CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY)")
        await connection.executemany("INSERT INTO alembic_version VALUES ($1)", [(number,) for number in content])

        await migrate(empty_database, "public")
        assert await schema.found(connection.fetch, "public") == schema.head()
        await migrate(empty_database, "public", to="base")
        await migrate(empty_database, "public")
        await migrate(empty_database, "public")

        kept = await connection.fetch("SELECT version_num FROM alembic_version ORDER BY 1")
        assert [row["version_num"] for row in kept] == content
        assert await schema.found(connection.fetch, "public") == schema.head()


async def test_a_log_that_kept_its_revision_in_alembic_version_goes_on_from_there(empty_database: str) -> None:
    await migrate(empty_database, to="0004")
    async with connected(empty_database) as connection:
        await connection.execute("INSERT INTO pgbackend.events (id, source, type) VALUES ('1', '/s', 't')")
        await connection.execute("ALTER TABLE pgbackend.pgbackend_revision RENAME TO alembic_version")

        await migrate(empty_database)

        assert await schema.found(connection.fetch, "pgbackend") == schema.head()
        assert await connection.fetchval("SELECT count(*) FROM pgbackend.events") == 1


async def test_the_owner_of_such_a_log_can_read_its_revision_when_a_superuser_migrates(empty_database: str) -> None:
    role = "tenant_" + urlsplit(empty_database).path[-12:]
    async with connected(empty_database) as connection:
        await connection.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'secret'")
        try:
            await connection.execute(f"CREATE SCHEMA pgbackend AUTHORIZATION {role}")
            await schema.migrate(
                lambda: asyncpg.connect(empty_database, user=role, password="secret"), "pgbackend", to="0004"
            )
            await connection.execute("ALTER TABLE pgbackend.pgbackend_revision RENAME TO alembic_version")

            await migrate(empty_database)

            await connection.execute(f"SET ROLE {role}")
            assert await schema.found(connection.fetch, "pgbackend") == schema.head()
        finally:
            await connection.execute("RESET ROLE")
            await connection.execute(f"DROP OWNED BY {role} CASCADE")
            await connection.execute(f"DROP ROLE {role}")


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


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+asyncpg"])
async def test_the_alembic_command_migrates_in_a_checkout(empty_database: str, scheme: str) -> None:
    dsn = scheme + "://" + empty_database.partition("://")[2]

    up = await asyncio.to_thread(alembic, "upgrade", "head", PGBACKEND_DSN=dsn, PGBACKEND_SCHEMA="by Hand")
    current = await asyncio.to_thread(alembic, "current", PGBACKEND_DSN=dsn, PGBACKEND_SCHEMA="by Hand")

    assert up.returncode == 0, up.stderr
    assert f"{schema.head()} (head)" in current.stdout, current.stderr
    async with connected(empty_database) as connection:
        assert await connection.fetchval('SELECT count(*) FROM "by Hand".events') == 0


async def test_the_alembic_command_prints_sql_and_goes_back_in_a_checkout(empty_database: str) -> None:
    settings = {"PGBACKEND_DSN": empty_database, "PGBACKEND_SCHEMA": "by Hand"}
    printed = await asyncio.to_thread(alembic, "upgrade", "head", "--sql", **settings)
    assert printed.returncode == 0, printed.stderr
    async with connected(empty_database) as connection:
        await connection.execute(printed.stdout)
        assert await schema.found(connection.fetch, "by Hand") == schema.head()

        down = await asyncio.to_thread(alembic, "downgrade", "base", **settings)

        assert down.returncode == 0, down.stderr
        assert await schema.found(connection.fetch, "by Hand") is None


def test_the_alembic_command_without_a_dsn_says_what_to_set() -> None:
    done = alembic("upgrade", "head", PGBACKEND_DSN="")

    assert done.returncode != 0
    assert "Set PGBACKEND_DSN" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
async def test_an_installed_wheel_brings_its_migrations(empty_database: str, tmp_path: Path) -> None:
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
            "from pgbackend import schema\n"
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
