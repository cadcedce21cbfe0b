"""Revisions, and functions that strangers removed or changed."""

from urllib.parse import urlsplit

import asyncpg
import pytest

from pgbackend import Backend
from pgbackend.postgres import schema
from pgbackend.postgres.sql import quote_ident
from tests.doctor.conftest import found, only
from tests.support.databases import connected, execute, query_value


async def test_a_schema_without_a_log_is_an_error_that_migrating_cures(empty_database: str) -> None:
    (finding,) = await found(empty_database, schema="Shop's log")
    assert (finding.check, finding.severity) == ("revision", "error")
    assert finding.cure == """pgbackend migrate --schema 'Shop'"'"'s log'"""


async def test_a_log_of_an_older_revision_is_an_error_that_migrating_cures(empty_database: str) -> None:
    await schema.migrate(lambda: asyncpg.connect(empty_database), "pgbackend", to=schema.revisions()[-2])
    finding = only(await found(empty_database), "revision")
    assert finding.cure == "pgbackend migrate"
    assert f"is at {schema.revisions()[-2]}" in finding.what


async def test_a_log_of_a_newer_version_is_an_error_that_no_line_cures(database: str) -> None:
    await execute(database, "UPDATE pgbackend.pgbackend_revision SET version_num = 'r9999'")
    (finding,) = await found(database)
    assert (finding.check, finding.cure) == ("revision", None)
    assert "migrated by a newer pgbackend" in finding.what


@pytest.mark.parametrize(
    ("statement", "subject"),
    [
        ("DROP FUNCTION pgbackend.blocked_keys(bytea[])", "function or view blocked_keys"),
        ("DROP TABLE pgbackend.skipped CASCADE", "table skipped"),
        ("ALTER TABLE pgbackend.events DROP CONSTRAINT events_valid", "check events_valid of events"),
        (
            (
                "CREATE OR REPLACE FUNCTION pgbackend.stays_locked(held text, patience integer) RETURNS boolean "
                "LANGUAGE plpgsql AS 'BEGIN RETURN false; END'"
            ),
            "function pgbackend.stays_locked(text,integer)",
        ),
    ],
)
async def test_what_the_migrations_make_and_is_not_there_is_an_error(
    database: str, statement: str, subject: str
) -> None:
    await execute(database, statement)
    drifts = {one.subject: one for one in await found(database) if one.check == "schema-drift"}
    assert drifts[subject].severity == "error"
    assert drifts[subject].cure == "pgbackend migrate --sql"


async def test_the_line_for_a_missing_index_names_the_schema_as_it_is(empty_database: str) -> None:
    name = """od'd "S" 100%{schema}"""
    await (backend := Backend(empty_database, schema=name)).init()
    await backend.stop()
    async with connected(empty_database) as connection:
        where = quote_ident(name)
        await connection.execute(f"DROP INDEX {where}.dead_letters_due")
        await connection.execute(f"ALTER TABLE {where}.offsets DROP CONSTRAINT offsets_until_not_negative")
        drifts = [one for one in await found(empty_database, schema=name) if one.check == "schema-drift"]
        assert len(drifts) == 2
        for drift in drifts:
            await connection.execute(str(drift.cure))
    assert await found(empty_database, schema=name) == []


async def test_the_line_for_a_function_names_its_schema_whatever_the_search_path_is(database: str) -> None:
    role = f"stranger_{urlsplit(database).path[-12:]}"
    name = await query_value(database, "SELECT current_database()")
    await execute(
        database,
        f"CREATE ROLE {role}; ALTER FUNCTION pgbackend.forget_letters() OWNER TO {role};"
        f'ALTER DATABASE "{name}" SET search_path = pgbackend, public',
    )
    try:
        cure = str(only(await found(database), "owner").cure)
        async with connected(database, search_path="public") as connection:
            await connection.execute(cure)
        assert await found(database) == []
    finally:
        await execute(database, f"DROP OWNED BY {role}; DROP ROLE {role}")
