"""`pgbackend migrate`."""

import asyncpg
import pytest

from pgbackend.postgres import schema
from tests.cli.conftest import Run


async def test_migrate_creates_the_log_once(run: Run, empty_database: str) -> None:
    missing = await run("migrate", "--check", "--dsn", empty_database)
    assert missing.exit_code == 1
    assert missing.stderr.endswith("holds no log. Run `pgbackend migrate`.\n")

    made = await run("migrate", "--dsn", empty_database)
    assert made.exit_code == 0, made.output
    assert f"from nothing to {schema.head()}" in made.stdout
    assert f"at {schema.head()} already" in (await run("migrate", "--dsn", empty_database)).stdout
    assert (await run("migrate", "--check", "--dsn", empty_database)).exit_code == 0


@pytest.mark.owner
async def test_migrate_to_an_older_revision_goes_back(run: Run, database: str) -> None:
    result = await run("migrate", "--to", "base", "--dsn", database)
    assert f"from {schema.head()} to nothing" in result.stdout
    assert (await run("migrate", "--check", "--dsn", database)).exit_code == 1


async def test_an_unknown_revision_changes_nothing_and_names_the_known_ones(run: Run, database: str) -> None:
    result = await run("migrate", "--to", "9999", "--dsn", database)
    assert result.exit_code == 1
    assert schema.head() in result.stderr
    assert (await run("migrate", "--check", "--dsn", database)).exit_code == 0


@pytest.mark.owner
async def test_a_log_of_a_version_before_the_first_release_is_refused(run: Run, database: str) -> None:
    connection = await asyncpg.connect(database)
    await connection.execute("UPDATE pgbackend.pgbackend_revision SET version_num = '0010'")
    await connection.close()
    for options in ([], ["--check"], ["--to", "base"]):
        result = await run("migrate", *options, "--dsn", database)
        assert result.exit_code == 1
        assert "before the first release" in result.stderr


async def test_printed_sql_creates_a_log_that_this_version_accepts(run: Run, empty_database: str) -> None:
    printed = await run("migrate", "--sql", "--schema", "Ours")
    assert printed.exit_code == 0
    connection = await asyncpg.connect(empty_database)
    await connection.execute(printed.stdout)
    await connection.close()
    assert (await run("migrate", "--check", "--schema", "Ours", "--dsn", empty_database)).exit_code == 0


async def test_contradicting_options_are_wrong_usage(run: Run) -> None:
    assert (await run("migrate", "--sql", "--check")).exit_code == 2
    assert (await run("migrate", "--check", "--to", "base")).exit_code == 2
    assert (await run("migrate")).exit_code == 2
