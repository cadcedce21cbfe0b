"""The programs of docs/outbox.md run as they are written, each with its library."""

import ast
import asyncio
import inspect
from typing import Any

import asyncpg
import psycopg
import pytest
import sqlalchemy
from alembic import context, op
from alembic.config import Config
from alembic.operations import Operations
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from cloudevents.core.v1.event import CloudEvent
from sqlalchemy import MetaData
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import NullPool

from pgbackend import Backend, Event, filters, schema
from tests.support.backends import running
from tests.support.databases import Sql
from tests.support.dispatchers import Catch
from tests.support.events import make_event
from tests.support.outbox import Django
from tests.support.pages import ROOT, blocks

pytestmark = [pytest.mark.direct, pytest.mark.owner]

BLOCKS = [block.text for block in blocks("docs/outbox.md", "python")]
IN_A_TRANSACTION = [block for block in BLOCKS if "INTO orders" in block or "Order(" in block]


class Base(DeclarativeBase):
    """The application's tables."""


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)


async def run(block: str, names: dict[str, Any]) -> None:
    """Run a block: in this loop if it awaits something, else in a thread."""
    code = compile(block, "docs", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    if code.co_flags & inspect.CO_COROUTINE:
        await eval(code, names)  # noqa: S307 - our own docs
    else:
        await asyncio.to_thread(exec, code, names)


@pytest.mark.parametrize("block", IN_A_TRANSACTION)
async def test_an_order_and_its_event_are_stored_together(
    block: str, database: str, backend: Backend, sql: Sql
) -> None:
    await sql.execute("CREATE TABLE orders (id int PRIMARY KEY)")
    engine = create_async_engine(
        "postgresql+asyncpg://", async_creator=lambda: asyncpg.connect(database), poolclass=NullPool
    )
    sync_engine = sqlalchemy.create_engine(
        "postgresql+psycopg://", creator=lambda: psycopg.connect(database), poolclass=NullPool
    )
    names = {"backend": backend, "event": make_event("a"), "dsn": database, "engine": engine, "psycopg": psycopg}
    names |= {"AsyncSession": AsyncSession, "Session": Session, "sync_engine": sync_engine, "Order": Order}
    if "django" in block:
        django = Django()
        names["open_django"], names["close_django"] = lambda: django.open(database, autocommit=True), django.close
        block = f"open_django()\n{block}\nclose_django()"
    async with asyncpg.create_pool(database, min_size=1) as pool:
        await run(block, names | {"pool": pool})
    await engine.dispose()

    assert await sql.fetchval("SELECT count(*) FROM orders") == 1
    assert await sql.fetchval("SELECT count(*) > 0 FROM pgbackend.events")


async def test_the_docs_have_a_program_for_each_library() -> None:
    assert len(IN_A_TRANSACTION) == 5


async def test_a_dispatcher_produces_with_its_effects(database: str, sql: Sql) -> None:
    (block,) = [block for block in BLOCKS if "transactional=True" in block]
    await sql.execute("CREATE TABLE shipments (id int PRIMARY KEY)")
    catch = Catch()
    async with running(database, poll_interval=3600.0) as backend:
        names = {"backend": backend, "event": make_event("shipped"), "asyncpg": asyncpg}
        await run(block, names | {"Event": Event, "filters": filters})
        await backend.subscribe("all", catch)
        await backend.produce(CloudEvent({"id": "order", "type": "order.created", "source": "/shop"}, {"order": 17}))
        await catch.has("order", "shipped")

    assert await sql.fetchval("SELECT id FROM shipments") == 17
    assert await sql.fetchval("SELECT count(*) FROM pgbackend.events") == 2


async def test_the_revision_creates_the_log_and_deletes_it(empty_database: str, sql: Sql) -> None:
    (block,) = [block for block in BLOCKS if "op.get_bind()" in block]
    names: dict[str, Any] = {}
    await run(block, names)
    engine = sqlalchemy.create_engine(
        "postgresql+psycopg://", creator=lambda: psycopg.connect(empty_database), poolclass=NullPool
    )

    def exists(connection: sqlalchemy.Connection) -> object:
        return connection.exec_driver_sql("SELECT to_regclass('pgbackend.events') IS NOT NULL").scalar_one()

    def migrate() -> None:
        with engine.begin() as connection, Operations.context(MigrationContext.configure(connection)):
            assert op.get_bind() is connection
            names["upgrade"]()
            assert exists(connection)
            names["downgrade"]()
            assert not exists(connection)

    await asyncio.to_thread(migrate)
    engine.dispose()


async def test_the_environment_has_the_hook(database: str) -> None:
    (block,) = [block for block in BLOCKS if "context.configure" in block]
    engine = sqlalchemy.create_engine(
        "postgresql+psycopg://", creator=lambda: psycopg.connect(database), poolclass=NullPool
    )
    with (
        engine.connect() as connection,
        EnvironmentContext(Config(), ScriptDirectory(str(ROOT / "migrations"))) as environment,
    ):
        exec(block, {"context": context, "connection": connection, "metadata": MetaData(), "schema": schema})  # noqa: S102 - as above
        assert callable(environment.get_context().opts["include_object"])
    engine.dispose()
