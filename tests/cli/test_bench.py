"""`pgbackend bench` measures everything and leaves nothing behind. Its figures depend on the machine."""

import json

import asyncpg
import pytest

from tests.cli.conftest import Run


@pytest.mark.direct
@pytest.mark.slow
async def test_bench_measures_everything_and_leaves_nothing(run: Run, empty_database: str) -> None:
    result = await run("bench", "--events", "1000", "--rounds", "1", "--json", "--dsn", empty_database)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert {(each["unit"], each["limit"]) for each in report["measurements"]} == {
        ("events/s", 0.8),
        ("events/s", 3.0),
        ("events/s", 0.5),
        ("events/s", 0.4),
        ("ms", 4.0),
        ("ms", 8.0),
    }
    assert all(each["ours"] > 0 and each["bare"] > 0 for each in report["measurements"])
    assert "fsync" in report["machine"]["postgresql"]
    connection = await asyncpg.connect(empty_database)
    assert not await connection.fetch("select from pg_namespace where nspname like 'pgbackend%'")
    await connection.close()
