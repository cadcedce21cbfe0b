"""`probe()` names the check that fails, and leaves nothing behind."""

import uuid
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import pytest

from pgbackend import Backend, ProbeError
from pgbackend.log.log import Log
from pgbackend.log.requirements import Requirements
from pgbackend.log.segments import Segments
from pgbackend.log_check import LogCheck
from pgbackend.postgres.pool import Database
from pgbackend.subscriptions.overview import Overview
from pgbackend.torture.proxy import Proxy
from tests.support.databases import execute, query_value
from tests.support.events import make_event


async def test_probe_names_the_check_that_fails(database: str) -> None:
    async with Proxy(database) as proxy:
        backend = Backend(proxy.dsn)
        await backend.init()
        await backend.probe()
        proxy.cut()
        with pytest.raises(ProbeError) as caught:
            await backend.probe()
        assert caught.value.checks.keys() == {"connection"}
        proxy.restore()
        await backend.probe()
        await execute(database, "UPDATE pgbackend.pgbackend_revision SET version_num = '9999'")
        with pytest.raises(ProbeError, match="9999") as caught:
            await backend.probe()
        assert caught.value.checks["connection"] == "ok"
        assert "9999" in caught.value.checks["schema"]
        await backend.stop()


@pytest.fixture
async def plain_role(backend: Backend, database: str) -> AsyncIterator[tuple[str, str]]:
    """A role that may use the log but create nothing in it, and its DSN."""
    role = f"plain_{uuid.uuid4().hex[:12]}"
    await execute(database, f"CREATE ROLE {role} LOGIN PASSWORD 'plain'")
    await execute(database, f"GRANT USAGE ON SCHEMA pgbackend TO {role}")
    await execute(database, f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA pgbackend TO {role}")
    await execute(database, f"GRANT USAGE, SELECT ON ALL SEQUENCES IN SCHEMA pgbackend TO {role}")
    for function in ("open_appender()", "find_distributed(regclass)", "appenders_in_flight(regclass, regclass)"):
        await execute(database, f"GRANT EXECUTE ON FUNCTION pgbackend.{function} TO {role}")
    parts = urlsplit(database)
    yield role, parts._replace(netloc=f"{role}:plain@{parts.netloc.rpartition('@')[2]}").geturl()
    await execute(database, f"DROP OWNED BY {role}")
    await execute(database, f"DROP ROLE {role}")


async def test_probe_commits_and_leaves_nothing_behind(database: str, plain_role: tuple[str, str]) -> None:
    backend = Backend(plain_role[1])
    await backend.init(migrate=False)
    await backend.produce(make_event("a"))
    flushed = "SELECT pg_current_wal_flush_lsn() - '0/0'::pg_lsn"
    state = """SELECT ARRAY[
        (SELECT last_value FROM pgbackend.events_position_seq),
        (SELECT sum(pg_relation_size(oid)) FROM pg_class WHERE relnamespace = 'pgbackend'::regnamespace),
        (SELECT count(*) FROM pgbackend.events)
    ]"""
    before = await query_value(database, state)
    wal = await query_value(database, flushed)
    for _ in range(3):
        await backend.probe()
    after = await query_value(database, state)
    await backend.stop()

    assert after == before
    assert await query_value(database, flushed) > wal, "nothing was made durable"


@pytest.mark.direct
async def test_probe_reports_a_missing_privilege(database: str, plain_role: tuple[str, str]) -> None:
    role, dsn = plain_role
    backend = Backend(dsn)
    await backend.init(migrate=False)
    await execute(database, f"REVOKE INSERT ON pgbackend.events FROM {role}")
    with pytest.raises(ProbeError, match="pgbackend grants --producer") as caught:
        await backend.probe()
    await execute(database, f"GRANT INSERT ON pgbackend.events TO {role}")
    await backend.probe()
    await backend.stop()

    assert failed(caught.value.checks) == {"privilege"}
    assert "write" not in caught.value.checks


@pytest.mark.direct
async def test_probe_reports_read_only_transactions(database: str, plain_role: tuple[str, str]) -> None:
    role, dsn = plain_role
    await execute(database, f"ALTER ROLE {role} SET default_transaction_read_only = on")
    assert failed(await run_check(dsn)) == {"writable"}


@pytest.mark.direct
async def test_probe_reports_missing_segments(backend: Backend, database: str, plain_role: tuple[str, str]) -> None:
    segments_until = (await backend.status()).segments_until
    await execute(database, f"SELECT setval('pgbackend.events_position_seq', {segments_until})")
    assert failed(await run_check(plain_role[1])) == {"segments"}
    # The owner may create segments, so its probe does.
    await backend.probe()


async def run_check(dsn: str) -> dict[str, str]:
    """The checks alone, without the writes of `init()`."""
    database = Database(dsn)
    await database.open()
    try:
        log = Log(database, schema="pgbackend", hole_wait=1.0)
        check = LogCheck(
            database,
            Overview(database, schema="pgbackend"),
            Requirements(log, schema="pgbackend"),
            Segments(database, schema="pgbackend"),
            schema="pgbackend",
        )
        return await check.run_once(timeout=20.0)
    finally:
        await database.close()


def failed(checks: dict[str, str]) -> set[str]:
    return {name for name, text in checks.items() if text != "ok"}
