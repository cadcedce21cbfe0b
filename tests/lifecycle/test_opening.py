"""`init()` needs a server that answers, tables of this version, and a log that can be trusted."""

import asyncio
import uuid
from urllib.parse import urlsplit

import pytest

from pgbackend import Backend, ConnectionLostError, ProbeError, SchemaError
from pgbackend.postgres import schema
from pgbackend.torture.proxy import Proxy
from tests.support.databases import execute, query_value
from tests.support.events import make_event

NOWHERE = "postgresql://nobody@127.0.0.1:1/nothing"


async def test_an_unreachable_server_is_named() -> None:
    backend = Backend(NOWHERE)

    with pytest.raises(ConnectionLostError, match=r"127\.0\.0\.1"):
        await backend.init()
    await backend.stop()


@pytest.mark.owner
@pytest.mark.direct
@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
async def test_a_database_that_is_not_utf8_is_refused(server: str, encoding: str) -> None:
    name = f"pgbackend_test_{uuid.uuid4().hex[:12]}"
    await execute(server, f"CREATE DATABASE {name} ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0")
    backend = Backend(urlsplit(server)._replace(path=f"/{name}").geturl())
    try:
        with pytest.raises(SchemaError, match=f"{encoding}.*UTF8"):
            await backend.init()
    finally:
        await backend.stop()
        await execute(server, f"DROP DATABASE {name} WITH (FORCE)")


async def test_a_failed_init_can_be_tried_again(database: str) -> None:
    async with Proxy(database) as proxy:
        proxy.cut()
        backend = Backend(proxy.dsn)
        with pytest.raises(ConnectionLostError):
            await backend.init()
        proxy.restore()
        await backend.init()
        await backend.produce(make_event("a"))
        await backend.stop()


async def test_many_backends_can_init_an_empty_database_at_once(empty_database: str) -> None:
    backends = [Backend(empty_database) for _ in range(4)]
    await asyncio.gather(*(backend.init() for backend in backends))
    await backends[0].produce(make_event("a"))
    await asyncio.gather(*(backend.stop() for backend in backends))


async def test_init_without_migrating_creates_nothing(empty_database: str) -> None:
    backend = Backend(empty_database)

    with pytest.raises(SchemaError, match="pgbackend migrate"):
        await backend.init(migrate=False)
    await backend.init()
    await backend.stop()


@pytest.mark.parametrize("migrate", [True, False])
@pytest.mark.parametrize("revision", ["r9999", "0001", "0010"])
async def test_a_log_of_another_version_is_refused_and_unchanged(database: str, migrate: bool, revision: str) -> None:
    await execute(database, "UPDATE pgbackend.pgbackend_revision SET version_num = $1", revision)

    with pytest.raises(SchemaError) as caught:
        await Backend(database).init(migrate=migrate)
    assert (caught.value.found, caught.value.expected) == (revision, schema.head())
    assert await query_value(database, "SELECT version_num FROM pgbackend.pgbackend_revision") == revision


async def test_a_sequence_behind_its_events_is_refused(backend: Backend, database: str) -> None:
    await backend.produce_many([make_event(str(number)) for number in range(5)])
    await execute(database, "SELECT setval('pgbackend.events_position_seq', 2)")

    with pytest.raises(ProbeError, match="twice") as caught:
        await backend.probe()
    assert caught.value.checks["connection"] == caught.value.checks["schema"] == "ok"
    with pytest.raises(SchemaError, match="twice"):
        await Backend(database).init()
