"""The log lives beside an application's own Alembic: each of the two leaves the other alone."""

import asyncio
import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import psycopg
import pytest
import sqlalchemy
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Column, Index, Integer, MetaData, Table, Text, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from pgbackend import ConfigError, SchemaError, schema
from pgbackend.postgres import schema as schemas
from tests.support.databases import Sql, connected, execute
from tests.support.polling import eventually

pytestmark = [pytest.mark.direct, pytest.mark.owner]

ENVIRONMENT = """
from alembic import context
from pgbackend import schema

settings = context.config.attributes
with settings["engine"].connect() as connection:
    context.configure(
        connection=connection,
        target_metadata=settings["metadata"],
        include_schemas=True,
        include_object=schema.include_object(schema=settings["log"]),
    )
    with context.begin_transaction():
        context.run_migrations()
"""
REVISION = """
from alembic import context, op
from sqlalchemy import Column, Integer
from pgbackend import schema

revision, down_revision = "one", None
settings = context.config.attributes


def upgrade():
    op.create_table("before", Column("id", Integer, primary_key=True))
    schema.upgrade(op.get_bind(), schema=settings["log"])
    settings["midway"]()
    op.create_table("after", Column("id", Integer, primary_key=True))


def downgrade():
    op.drop_table("after")
    schema.downgrade(op.get_bind(), schema=settings["log"])
    op.drop_table("before")
"""


def engine_of(dsn: str, *, search_path: str = "public") -> sqlalchemy.Engine:
    return sqlalchemy.create_engine(
        "postgresql+psycopg://",
        creator=lambda: psycopg.connect(dsn, options=f"-c search_path={search_path}"),
        poolclass=NullPool,
    )


def host_metadata(name: str | None = None) -> MetaData:
    """The application's tables. Two are named like tables of the log."""
    tables = MetaData(schema=name)
    Table("before", tables, Column("id", Integer, primary_key=True))
    Table("after", tables, Column("id", Integer, primary_key=True))
    return tables


class Host:
    """An application's Alembic in a directory of its own."""

    def __init__(
        self, directory: Path, dsn: str, *, log: str = "pgbackend", midway: Callable[[], object] = lambda: None
    ) -> None:
        (directory / "versions").mkdir(parents=True)
        (directory / "env.py").write_text(ENVIRONMENT)
        (directory / "versions" / "one.py").write_text(REVISION)
        self.attributes: dict[str, Any] = {
            "engine": engine_of(dsn), "metadata": host_metadata(), "log": log, "midway": midway
        }  # fmt: skip
        self._directory = directory

    def run(self, call: Callable[..., Any], *arguments: str, **options: Any) -> Any:
        """Run one of Alembic's commands."""
        config = Config(stdout=io.StringIO(), attributes=self.attributes)
        config.set_main_option("script_location", str(self._directory))
        config.set_main_option("path_separator", "os")
        return call(config, *arguments, **options)


async def revision_of(sql: Sql, name: str = "pgbackend") -> str | None:
    return await schemas.find_revision(sql.fetch, name)


async def test_a_revision_of_the_host_creates_the_log_and_autogenerate_finds_nothing(
    empty_database: str, tmp_path: Path
) -> None:
    host = Host(tmp_path, empty_database)
    await asyncio.to_thread(host.run, command.upgrade, "head")

    await asyncio.to_thread(host.run, command.check)
    async with connected(empty_database) as sql:
        assert await revision_of(sql) == schemas.head()
        await asyncio.to_thread(host.run, command.downgrade, "base")
        assert await revision_of(sql) is None
        assert await sql.fetchval("SELECT to_regclass('before')") is None


@pytest.mark.parametrize("fails", ["later in the transaction", "in the log's own migration"])
async def test_a_revision_of_the_host_that_fails_leaves_nothing_of_the_log(
    empty_database: str, tmp_path: Path, fails: str
) -> None:
    def fail() -> None:
        raise RuntimeError("midway")

    host = Host(tmp_path, empty_database, midway=fail)
    if fails == "in the log's own migration":
        await execute(empty_database, "CREATE SCHEMA pgbackend; CREATE TABLE pgbackend.dead_letters ()")

    with pytest.raises((RuntimeError, sqlalchemy.exc.ProgrammingError)):
        await asyncio.to_thread(host.run, command.upgrade, "head")

    async with connected(empty_database) as sql:
        assert await sql.fetchval("SELECT to_regclass('pgbackend.events')") is None
        assert await sql.fetchval("SELECT to_regclass('before')") is None


def differences(dsn: str, tables: MetaData, *, search_path: str, hook: Any) -> list[Any]:
    """The changes that autogenerate would make, as the names of its operations with those of the tables."""
    engine = engine_of(dsn, search_path=search_path)
    with engine.connect() as connection:
        options = {"include_schemas": True, "compare_type": True, "include_object": hook}
        found: list[Any] = list(compare_metadata(MigrationContext.configure(connection, opts=options), tables))
    engine.dispose()
    return sorted(f"{name} {what[-1].name}" for name, *what in found)


@pytest.fixture(
    params=[
        pytest.param(("pgbackend", "public"), id="of-its-own"),
        pytest.param(("public", "public"), id="public"),
        pytest.param(("app", "app"), id="that-is-the-applications"),
        pytest.param(("app", "public"), id="that-is-the-applications-by-name"),
    ]
)
async def place(request: pytest.FixtureRequest, empty_database: str) -> tuple[str, str]:
    """The log's schema and the connection's search_path, in a database with both kinds of tables."""
    log, path = request.param
    async with connected(empty_database) as sql:
        await sql.execute("CREATE SCHEMA app")
        await schemas.migrate(lambda: asyncpg.connect(empty_database), log)
        await sql.execute(f"CREATE TABLE {log}.host (id int PRIMARY KEY)")
        # Detached segments and new ones are the log's, too.
        await sql.execute(f"ALTER TABLE {log}.events DETACH PARTITION {log}.events_0")
    return log, path


async def test_autogenerate_leaves_the_log_alone_in_any_schema(empty_database: str, place: tuple[str, str]) -> None:
    log, path = place
    tables = MetaData(schema=None if log == path else log)
    Table("host", tables, Column("id", Integer, primary_key=True), Column("name", Text), Index("host_name", "name"))

    def find(hook: Any) -> list[Any]:
        return differences(empty_database, tables, search_path=path, hook=hook)

    bare = await asyncio.to_thread(find, None)
    left = await asyncio.to_thread(find, schema.include_object(schema=log))

    assert {"remove_table events", "remove_table events_0", "remove_table pgbackend_revision"} <= set(bare)
    assert left == ["add_column name", "add_index host_name"]


async def test_tables_of_the_host_that_are_named_like_the_logs_are_still_its_own(empty_database: str) -> None:
    await schemas.migrate(lambda: asyncpg.connect(empty_database), "pgbackend")
    statements = (
        "CREATE TABLE events (id text PRIMARY KEY, type text, subject text, data bytea)",
        "CREATE TABLE workers (id int PRIMARY KEY, name text)",
        "CREATE TABLE events_2024 (id text PRIMARY KEY, source text)",
    )
    for statement in statements:
        await execute(empty_database, statement)

    found = await asyncio.to_thread(
        differences, empty_database, MetaData(), search_path="public", hook=schema.include_object()
    )

    assert found == ["remove_table events", "remove_table events_2024", "remove_table workers"]


async def test_a_hook_of_the_host_decides_about_everything_else(empty_database: str) -> None:
    await schemas.migrate(lambda: asyncpg.connect(empty_database), "pgbackend")
    await execute(empty_database, "CREATE TABLE kept (id int PRIMARY KEY)")
    await execute(empty_database, "CREATE TABLE gone (id int PRIMARY KEY)")
    asked: list[str | None] = []

    def hook(item: Any, name: str | None, kind: str, reflected: bool, compare_to: Any) -> bool:
        asked.append(name)
        return name != "kept"

    found = await asyncio.to_thread(
        differences, empty_database, MetaData(), search_path="public", hook=schema.include_object(then=hook)
    )

    assert found == ["remove_table gone"]
    assert set(asked) == {"kept", "gone"}


async def test_migrations_in_threads_and_inside_the_hosts_do_not_disturb_each_other(
    empty_database: str, tmp_path: Path
) -> None:
    """While the host is in the middle of its revision, other threads migrate other logs from the first to the last."""
    inside, go_on = threading.Event(), threading.Event()

    def midway() -> None:
        inside.set()
        assert go_on.wait(60)

    def migrate(name: str) -> None:
        engine = engine_of(empty_database)
        for call in (schema.upgrade, schema.downgrade, schema.upgrade):
            with engine.begin() as connection:
                call(connection, schema=name)
        engine.dispose()

    host = Host(tmp_path, empty_database, midway=midway)
    hosts = asyncio.create_task(asyncio.to_thread(host.run, command.upgrade, "head"))
    try:
        assert await asyncio.to_thread(inside.wait, 60)
        await asyncio.gather(*(asyncio.to_thread(migrate, f"log {number}") for number in range(4)))
    finally:
        go_on.set()
    await hosts

    async with connected(empty_database) as sql:
        assert await sql.fetchval("SELECT to_regclass('after') IS NOT NULL")
        for name in ("pgbackend", *(f"log {number}" for number in range(4))):
            assert await revision_of(sql, name) == schemas.head()


@pytest.fixture
def connection(empty_database: str) -> Iterator[sqlalchemy.Connection]:
    engine = engine_of(empty_database)
    with engine.connect() as connection:
        yield connection
    engine.dispose()


async def test_the_settings_of_the_callers_transaction_stay(connection: sqlalchemy.Connection) -> None:
    names = ("search_path", "statement_timeout", "idle_in_transaction_session_timeout", "lock_timeout")

    def settings() -> list[object]:
        return [connection.execute(text(f"SHOW {name}")).scalar_one() for name in names]

    connection.execute(text("SET search_path = public, \"strange, one\", ''"))
    connection.execute(text("SET statement_timeout = '2min'"))
    connection.execute(text("SET LOCAL lock_timeout = '123ms'"))
    before = settings()

    schema.upgrade(connection)

    assert settings() == before == ['public, "strange, one", ""', "2min", "0", "123ms"]
    schema.downgrade(connection, to="r0001")
    assert settings() == before


async def test_functions_in_the_search_path_do_not_get_into_the_log(connection: sqlalchemy.Connection) -> None:
    """PostgreSQL prefers one whose parameters fit better, so any role that may create some could have it called."""
    connection.execute(
        text(
            "CREATE FUNCTION public.hashtextextended(text, integer) RETURNS bigint LANGUAGE sql "
            "IMMUTABLE AS 'SELECT -1::bigint'"
        )
    )

    schema.upgrade(connection)

    expected = "pg_catalog.hashtextextended('k', 1::bigint) & 9223372036854775807"
    found = connection.execute(text(f"SELECT pgbackend.key_hash('k', NULL, 's', 'i') = {expected}"))
    assert found.scalar_one()


async def test_nothing_is_committed_and_a_second_migrator_waits(
    connection: sqlalchemy.Connection, empty_database: str
) -> None:
    def second() -> None:
        engine = engine_of(empty_database)
        with engine.begin() as other:
            schema.upgrade(other)
        engine.dispose()

    waiting = "SELECT count(*) > 0 FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'advisory'"
    async with connected(empty_database) as sql:
        schema.upgrade(connection)
        other = asyncio.create_task(asyncio.to_thread(second))
        await eventually("the second one waits", lambda: sql.fetchval(waiting))
        assert await sql.fetchval("SELECT to_regclass('pgbackend.events')") is None

        connection.rollback()

        await other
        assert await revision_of(sql) == schemas.head()


async def test_an_asynchronous_connection_migrates_by_run_sync(empty_database: str) -> None:
    engine = create_async_engine(
        "postgresql+asyncpg://", async_creator=lambda: asyncpg.connect(empty_database), poolclass=NullPool
    )
    async with engine.begin() as connection:
        await connection.run_sync(schema.upgrade, schema="100%s :x")
    await engine.dispose()

    async with connected(empty_database) as sql:
        assert await revision_of(sql, "100%s :x") == schemas.head()


async def test_a_schema_of_any_name_can_be_migrated_through_psycopg(
    connection: sqlalchemy.Connection, empty_database: str
) -> None:
    schema.upgrade(connection, schema="100%s :x %")
    connection.commit()

    async with connected(empty_database) as sql:
        assert await revision_of(sql, "100%s :x %") == schemas.head()


async def test_a_log_of_a_newer_version_is_left_alone(connection: sqlalchemy.Connection) -> None:
    schema.upgrade(connection)
    connection.execute(text("UPDATE pgbackend.pgbackend_revision SET version_num = 'r9999'"))

    with pytest.raises(SchemaError, match="newer pgbackend"):
        schema.upgrade(connection)


@pytest.mark.parametrize("given", [None, "postgresql://localhost/app", sqlalchemy])
def test_something_that_is_no_connection_is_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"no connection of SQLAlchemy to PostgreSQL\. Give it `op\.get_bind\(\)`"):
        schema.upgrade(given)


def test_a_connection_that_commits_each_statement_is_refused(connection: sqlalchemy.Connection) -> None:
    each = connection.execution_options(isolation_level="AUTOCOMMIT")

    with pytest.raises(ConfigError, match="AUTOCOMMIT"):
        schema.upgrade(each)
    with pytest.raises(ConfigError, match="AUTOCOMMIT"):
        schema.downgrade(each)


def test_an_unknown_revision_is_refused(connection: sqlalchemy.Connection) -> None:
    with pytest.raises(ConfigError, match="no revision 'r9999'"):
        schema.downgrade(connection, to="r9999")
