"""Roles with few rights: the things that they see and lack."""

from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import pytest

from pgbackend.doctor.privileges import _lacking
from pgbackend.postgres.grants import Right, grants, rights
from tests.doctor.conftest import found, only
from tests.support.databases import connected, execute

ROLE = "pgbackend_patient"


@pytest.fixture
async def dsn(server: str, database: str) -> AsyncIterator[str]:
    """The log, as a role without any privilege on it."""
    async with connected(server) as connection:
        await connection.execute(f"CREATE ROLE {ROLE} LOGIN PASSWORD 'secret'")
    yield urlsplit(database)._replace(netloc=f"{ROLE}:secret@").geturl()
    await execute(database, f"DROP OWNED BY {ROLE}; DROP ROLE {ROLE}")


async def test_a_role_without_rights_is_told_so_and_what_it_cannot_see(dsn: str) -> None:
    findings = await found(dsn)
    assert only(findings, "missing-privilege").cure == f"pgbackend grants --consumer {ROLE}"
    assert only(findings, "limited-view").cure == f'GRANT pg_read_all_stats TO "{ROLE}";'
    blind = [one for one in findings if one.check == "not-examined"]
    assert {"subscriptions", "retention", "fence"} <= {one.subject for one in blind}
    assert {one.severity for one in blind} == {"note"}
    assert blind[0].cure == f"pgbackend grants --operator {ROLE}"


async def test_a_role_that_lacks_a_few_rights_gets_the_lines_that_give_them(database: str, dsn: str) -> None:
    await execute(database, grants("pgbackend", consumers=[ROLE]))
    assert {one.check for one in await found(dsn)} == {"limited-view"}, "a consumer sees everything of the log"

    await execute(
        database,
        f"REVOKE UPDATE ON pgbackend.workers FROM {ROLE}; REVOKE UPDATE (asked_at) ON pgbackend.workers FROM {ROLE};"
        f"REVOKE EXECUTE ON FUNCTION pgbackend.bury(jsonb) FROM {ROLE}",
    )
    finding = only(await found(dsn), "missing-privilege")
    assert finding.severity == "warning"
    assert "rights of a consumer" in finding.what
    assert f'GRANT EXECUTE ON FUNCTION "pgbackend".bury(jsonb) TO "{ROLE}";' in str(finding.cure).splitlines()
    for line in str(finding.cure).splitlines():
        await execute(database, line)
    assert {one.check for one in await found(dsn)} == {"limited-view"}


async def test_the_view_of_others_sessions_can_be_given(database: str, dsn: str) -> None:
    await execute(database, grants("pgbackend", operators=[ROLE]))
    await execute(database, str(only(await found(dsn), "limited-view").cure))
    assert await found(dsn) == []


@pytest.mark.parametrize("kind", ["producer", "reader"])
async def test_a_role_that_sees_little_has_notes_and_nothing_worse(database: str, dsn: str, kind: str) -> None:
    await execute(database, grants("pgbackend", **{f"{kind}s": [ROLE]}))
    findings = await found(dsn)
    assert {one.check for one in findings} == {"limited-view", "not-examined"}
    assert {one.severity for one in findings} == {"note"}


def test_a_role_counts_as_what_its_rights_explain() -> None:
    kinds = rights()
    nothing = "", frozenset[Right]()
    for one in kinds.values():
        assert all(_lacking(one | other, kinds) == nothing for other in kinds.values())
    reading = frozenset(right for own in kinds.values() for right in own if right.privilege in ("SELECT", "USAGE"))
    assert _lacking(reading, kinds) == nothing, "a role that may read everything, such as a monitor's, is of no kind"
    bury = next(right for right in kinds["consumer"] if right.object.startswith("bury"))
    assert _lacking(kinds["consumer"] - {bury}, kinds) == ("consumer", frozenset({bury}))
