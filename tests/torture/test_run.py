"""Real runs: the real worker passes, broken ones are found out, and the database is left as it was."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import asyncpg
import pytest

from pgbackend.torture.chaos import PROGRAMS
from pgbackend.torture.plan import LEASE, Plan, Step
from pgbackend.torture.run import judge_directory, run
from pgbackend.torture.verdict.rulings import COMMITS, MOMENTS, OWNER, PAIRS
from tests.support.figures import report
from tests.torture import broken

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

BEYOND = 1.5 * LEASE


def stop_each_worker() -> Plan:
    """Each of two workers is stopped for longer than its lease, and goes on. One of them owns the shards."""
    stops = [Step(2.0, "stop", "worker-0", BEYOND), Step(3.5 + BEYOND, "stop", "worker-1", BEYOND)]
    plan = Plan.make(1, 2 * BEYOND + 5.0, server=False, workers=2)
    return replace(plan, steps=(Step(1.0, "subscribe", ""), *stops))


@pytest.fixture
def break_workers(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Break the workers in this way."""

    def break_workers(what: str) -> None:
        monkeypatch.setitem(PROGRAMS, "worker", broken.__file__)
        monkeypatch.setenv("BROKEN", what)

    return break_workers


async def test_the_real_worker_passes_and_the_database_is_left_as_it_was(empty_database: str, tmp_path: Path) -> None:
    plan = stop_each_worker()
    result = await run(plan, dsn=empty_database, keep=tmp_path / "kept")
    report(result.text())
    assert result.verdict.outcome == "kept"
    assert result.verdict.takeovers
    # The verdict follows from the records alone.
    assert judge_directory(tmp_path / "kept", plan) == result.verdict
    assert (tmp_path / "kept" / "report.md").read_text() == result.markdown()
    connection = await asyncpg.connect(empty_database)
    assert not await connection.fetch("select from pg_namespace where nspname like 'pgbackend%'")
    await connection.close()


async def test_a_worker_that_commits_without_its_epoch_is_found_out(
    empty_database: str, break_workers: Callable[[str], None]
) -> None:
    break_workers("epochs")
    result = await run(stop_each_worker(), dsn=empty_database)
    report(result.text())
    assert result.verdict.rulings[COMMITS].violations


async def test_a_worker_that_dispatches_while_its_lease_is_in_doubt_is_found_out(
    empty_database: str, break_workers: Callable[[str], None]
) -> None:
    break_workers("doubt")
    result = await run(stop_each_worker(), dsn=empty_database)
    report(result.text())
    assert result.verdict.rulings[OWNER].violations


async def test_a_worker_that_commits_effects_before_the_offset_is_found_out(
    empty_database: str, break_workers: Callable[[str], None]
) -> None:
    break_workers("apart")
    result = await run(Plan.make(1, 20.0, server=False, name="bank"), dsn=empty_database)
    report(result.text())
    assert result.verdict.rulings[MOMENTS].violations


async def test_a_shop_that_commits_orders_before_their_events_is_found_out(
    empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PROGRAMS, "producer", broken.__file__)
    monkeypatch.setenv("BROKEN", "halves")
    result = await run(Plan.make(1, 12.0, server=False, name="orders"), dsn=empty_database)
    report(result.text())
    assert result.verdict.rulings[PAIRS].violations
