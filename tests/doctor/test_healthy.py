"""A healthy log has no finding, and the doctor leaves nothing behind."""

import asyncio
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime

from pgbackend import Backend
from pgbackend.doctor import Limits, examination, examine
from pgbackend.doctor.look import Look, Scene, Session, Statements
from pgbackend.postgres.sql import load
from pgbackend.postgres.sql.statements import DoctorSql, OverviewSql, SegmentsSql
from tests.doctor.conftest import found
from tests.support.databases import connected, query_rows, query_value
from tests.support.dispatchers import Catch
from tests.support.events import make_event

SESSION = Session(
    database="app",
    role="me",
    version=180_000,
    sees_all=True,
    is_owner=True,
    log=1,
    database_oid=1,
    server_start=datetime.now(UTC),
    server_time=datetime.now(UTC),
)


async def test_a_log_in_use_has_no_finding(database: str) -> None:
    catch = Catch()

    async def produce(backend: Backend) -> None:
        for number in range(10_000):
            await backend.produce_many([make_event(f"{number}-{i}") for i in range(10)])

    async with Backend(database) as backend:
        await backend.subscribe("billing", catch, shards=2, order="key")
        producing = asyncio.create_task(produce(backend))
        await catch.has("0-0")
        seen = await examine(database, listen_dsn=database)
        producing.cancel()
        await asyncio.wait([producing])
    assert [one for one in seen.findings if one.subject != "setting fsync"] == []
    assert len(seen.looked_at) > 30


async def test_an_examination_leaves_nothing_behind(database: str) -> None:
    tables = "SELECT relname::text, relfilenode FROM pg_class WHERE relnamespace = 'pgbackend'::regnamespace ORDER BY 1"
    before = await query_rows(database, tables)
    assert await found(database) == []
    assert await query_rows(database, tables) == before
    assert await query_value(database, "SELECT is_called FROM pgbackend.events_position_seq") is False
    assert await query_rows(database, "SELECT * FROM pgbackend.incarnation") == []


async def test_each_look_reads_the_columns_of_its_facts(database: str) -> None:
    """Most looks find no row in a healthy log."""
    scene = Scene(schema="pgbackend", session=SESSION, is_pooled=False, has_listener=False, limits=Limits())
    statements = Statements(
        doctor_sql=load(DoctorSql, "doctor", schema="pgbackend"),
        overview_sql=load(OverviewSql, "overview", schema="pgbackend"),
        segments_sql=load(SegmentsSql, "segments", schema="pgbackend"),
    )
    async with connected(database) as connection:
        for look in (*examination._OF_SERVER, *examination._OF_LOG):
            assert isinstance(look, Look)
            assert is_dataclass(look.fact)
            prepared = await connection.prepare(look.statement(statements))
            columns = {attribute.name for attribute in prepared.get_attributes()}
            assert columns == {field.name for field in fields(look.fact)}, look.title
            assert len(prepared.get_parameters()) == len(look.arguments(scene)), look.title
