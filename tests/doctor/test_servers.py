"""Servers that cannot hold a log, and ways that do not lead to it."""

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import asyncpg
import pytest

from pgbackend.doctor import examination, examine
from pgbackend.doctor.look import Session
from pgbackend.errors import ConfigError, ConnectionLostError
from tests.doctor.conftest import found, only
from tests.doctor.relay import pooled
from tests.support.databases import connected, execute, query_value
from tests.support.ports import unasked_port


@pytest.mark.parametrize(
    ("version", "name"),
    [
        ("PostgreSQL 15.12-YB-2025.1.0.0-b0 on x86_64-pc-linux-gnu", "YugabyteDB"),
        ("PostgreSQL 12.12 (Greenplum)", "Greenplum"),
    ],
)
async def test_another_engine_is_an_error_that_no_line_cures(database: str, version: str, name: str) -> None:
    await execute(
        database,
        "SET allow_system_table_mods = on; CREATE OR REPLACE FUNCTION pg_catalog.version() RETURNS text "
        f"LANGUAGE sql STABLE AS $$ SELECT '{version}' $$",
    )
    (finding,) = await found(database)
    assert (finding.check, finding.severity, finding.cure) == ("engine", "error", None)
    assert name in finding.what


async def test_a_server_whose_locks_hide_appenders_fails_the_fence(database: str) -> None:
    await execute(
        database,
        "SET allow_system_table_mods = on; CREATE OR REPLACE VIEW pg_catalog.pg_locks AS "
        "SELECT held.* FROM pg_lock_status() AS held WHERE held.pid = pg_backend_pid()",
    )
    finding = only(await found(database), "fence")
    assert "pg_locks does not show the lock" in finding.what
    assert finding.severity == "error"


async def test_a_log_that_citus_distributes_fails_the_fence(database: str) -> None:
    await execute(
        database,
        "SET allow_system_table_mods = on; CREATE TABLE pg_catalog.pg_dist_partition (logicalrelid regclass);"
        "INSERT INTO pg_catalog.pg_dist_partition VALUES ('pgbackend.events')",
    )
    finding = only(await found(database), "fence")
    assert "Citus distributes the log's tables (events)" in finding.what
    assert finding.cure == """SELECT undistribute_table('"pgbackend"."events"');"""


async def test_an_encoding_that_lacks_characters_is_an_error(server: str, database: str) -> None:
    name = f"{await query_value(database, 'SELECT current_database()')}_latin"
    async with connected(server) as connection:
        await connection.execute(f"CREATE DATABASE {name} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
        try:
            findings = await found(database.replace(name.removesuffix("_latin"), name))
        finally:
            await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
    assert only(findings, "encoding").what.startswith("The database has the encoding LATIN1")
    assert only(findings, "revision").cure == "pgbackend migrate", "and goes on to look"


async def test_a_database_that_takes_no_writes_is_an_error_and_the_lines_open_it(database: str) -> None:
    name = await query_value(database, "SELECT current_database()")
    await execute(database, f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
    finding = only(await found(database), "read-only")
    assert finding.severity == "error"
    async with connected(database) as connection:
        for line in str(finding.cure).splitlines():
            await connection.execute(line)
    assert await found(database) == []


async def test_a_setting_of_the_dsn_is_cured_in_the_dsn(database: str) -> None:
    finding = only(await found(f"{database}&synchronous_commit=off"), "durability")
    assert finding.cure is None
    assert "The DSN or the environment (PGOPTIONS) sets it" in finding.what


async def test_the_server_of_the_tests_would_lose_data_in_a_crash(database: str) -> None:
    if await query_value(database, "SELECT current_setting('fsync')") == "on":
        pytest.skip("it has fsync")
    finding = next(one for one in (await examine(database)).findings if one.subject == "setting fsync")
    assert (finding.check, finding.severity, finding.cure) == ("durability", "error", None)


async def test_a_host_that_does_not_answer_hides_nothing_of_the_other(database: str) -> None:
    user, name = (
        await query_value(database, "SELECT current_user"),
        await query_value(database, "SELECT current_database()"),
    )
    directory = database.partition("host=")[2].partition("&")[0]
    dsn = f"host=localhost,{directory} port={unasked_port()},5432 user={user} dbname={name}"
    seen = await examine(dsn)
    assert only(seen.findings, "unreachable-host").severity == "warning"
    assert "fence" in seen.looked_at


async def test_a_server_that_cannot_be_reached_cannot_be_examined() -> None:
    with pytest.raises(ConnectionLostError, match="cannot be reached"):
        await examine(f"postgresql://nobody@localhost:{unasked_port()}/nowhere")
    with pytest.raises(ConfigError, match="scheme"):
        await examine("mysql://localhost/x")


async def test_an_examination_that_loses_its_connection_fails(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read = examination._read

    async def cut(connection: asyncpg.Connection, limit: str, statement: str, *args: object) -> object:
        if "list_subscriptions" in statement:
            connection.terminate()
        return await read(connection, limit, statement, *args)

    monkeypatch.setattr(examination, "_read", cut)
    with pytest.raises(ConnectionLostError):
        await examine(database)


async def test_a_clock_of_this_machine_that_differs_is_found(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time
    monkeypatch.setattr("pgbackend.doctor.examination.time", SimpleNamespace(time=lambda: now() - 3600))
    finding = only(await found(database), "clock-skew")
    assert finding.what.startswith("The server's clock is 1.0 h ahead of this machine's")


async def test_a_listen_dsn_that_leads_elsewhere_is_an_error(server: str, database: str) -> None:
    assert await found(database, listen_dsn=database) == []
    elsewhere = only(await found(database, listen_dsn=server), "listen-dsn")
    nowhere = only(await found(database, listen_dsn=f"postgresql://me@localhost:{unasked_port()}/x"), "listen-dsn")
    assert "another server or database" in elsewhere.what
    assert "cannot be reached" in nowhere.what
    assert elsewhere.severity == nowhere.severity == "error"


async def test_a_pooler_in_the_way_is_found_on_both_ways(database: str) -> None:
    async with pooled(database) as dsn:
        assert [(one.check, one.severity) for one in await found(dsn)] == [("pooler", "note")]
        assert await found(dsn, listen_dsn=database) == []
        (deaf,) = await found(database, listen_dsn=dsn)
        assert (deaf.check, deaf.severity, deaf.subject) == ("pooler", "warning", "listen_dsn")


async def test_settings_that_a_pooler_keeps_are_worse_through_it(database: str) -> None:
    name = await query_value(database, "SELECT current_database()")
    changed = {
        "default_transaction_isolation": "'serializable'",
        "statement_timeout": "'2s'",
        "idle_in_transaction_session_timeout": "'1s'",
        "client_min_messages": "error",
    }
    for setting, value in changed.items():
        await execute(database, f'ALTER DATABASE "{name}" SET {setting} = {value}')
    assert [one.check for one in await found(database)] == ["isolation"], "a direct session overrides them"

    async with pooled(database) as dsn:
        ill = {one.subject.removeprefix("setting "): one for one in await found(dsn, listen_dsn=database)}
        # The fence cannot be proven over a connection that pgbackend refuses.
        assert ill.keys() - {"fence"} == changed.keys()
        assert {one.check for one in ill.values()} >= {"isolation", "timeouts", "hidden-warnings"}
        for setting in changed:
            assert ill[setting].severity in ("warning", "error")
            await execute(database, str(ill[setting].cure))
        assert await found(dsn, listen_dsn=database) == []


@pytest.mark.parametrize(("version", "severity"), [(130_022, "error"), (190_000, "note")])
async def test_a_version_that_is_not_tested_is_named(
    database: str, monkeypatch: pytest.MonkeyPatch, version: int, severity: str
) -> None:
    describe = examination._describe

    async def of_another_version(*args: Any) -> tuple[Session, float]:
        session, skew = await describe(*args)
        return replace(session, version=version), skew

    monkeypatch.setattr(examination, "_describe", of_another_version)
    assert only(await found(database), "postgres-version").severity == severity
