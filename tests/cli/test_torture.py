"""`pgbackend torture` as a user runs it, on an embedded server that is killed too."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pgbackend.torture.chaos import PROGRAMS
from pgbackend.torture.plan import Plan
from pgbackend.torture.report import Report
from pgbackend.torture.verdict.rulings import LOST, REPEATS, Verdict
from tests.cli.conftest import Run
from tests.support.figures import report
from tests.torture import broken


async def test_print_plan_only_prints_the_plan(run: Run) -> None:
    result = await run("torture", "--print-plan", "--seed", "7", "--minutes", "2")
    assert result.exit_code == 0
    assert result.stdout == f"{Plan.make(7, 120.0, server=True)}\n"
    assert "server kill" in result.stdout
    with_dsn = await run("torture", "--print-plan", "--seed", "7", "--minutes", "2", "--dsn", "postgresql://me@db/app")
    assert "server" not in with_dsn.stdout
    bank = await run("torture", "--print-plan", "--plan", "bank", "--seed", "7", "--minutes", "2")
    assert bank.stdout == f"{Plan.make(7, 120.0, server=True, name='bank')}\n"
    assert "lose producer" in bank.stdout


async def test_one_line_says_that_the_database_does_not_answer(run: Run) -> None:
    result = await run("torture", "--dsn", "postgresql://nobody@localhost:1/nowhere")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("Error: PostgreSQL")
    assert "cannot be reached" in result.stderr


async def test_a_system_without_proc_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgbackend.cli.torture.sys.platform", "darwin")
    result = await run("torture")
    assert result.exit_code == 2
    assert "only Linux has" in result.stderr


def kept() -> Verdict:
    return Verdict()


def broken_promise() -> Verdict:
    verdict = Verdict(stalls=["stall of the disk for 2.5 s, 7.0 s after the start"])
    verdict.rulings[REPEATS].unjudged = verdict.rulings[LOST].violations = 1
    return verdict


def stalled_machine() -> Verdict:
    verdict = Verdict(stalls=["stall of the disk for 2.5 s, 7.0 s after the start"])
    verdict.rulings[REPEATS].unjudged = 1
    return verdict


@pytest.mark.parametrize(
    ("judge", "code", "title"),
    [
        (kept, 0, "every promise was kept"),
        (broken_promise, 1, "PROMISES WERE BROKEN"),
        (stalled_machine, 3, "NOT JUDGED: the machine had a stall of the disk for 2.5 s, 7.0 s after the start"),
    ],
)
async def test_the_exit_code_says_what_the_verdict_is(
    run: Run, monkeypatch: pytest.MonkeyPatch, judge: Callable[[], Verdict], code: int, title: str
) -> None:
    async def run_plan(plan: Plan, **_: object) -> Report:
        return Report(plan=plan, server="a server", verdict=judge(), drained=0.0)

    monkeypatch.setattr("pgbackend.cli.torture.run", run_plan)
    result = await run("torture", "--seed", "1")
    assert result.exit_code == code
    assert f"plan log, seed 1, 60 s: {title}\n" in result.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["bank", "orders"])
async def test_transactions_are_whole_while_everything_fails(run: Run, tmp_path: Path, name: str, long: bool) -> None:
    page, minutes = tmp_path / "report.md", "3" if long else "0.4"
    result = await run("torture", "--plan", name, "--minutes", minutes, "--seed", "1", "--report", str(page))
    report(result.output)
    assert result.exit_code == 0, result.output
    assert f"plan {name}, seed 1" in page.read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_every_promise_is_kept_while_everything_fails(run: Run, tmp_path: Path, long: bool) -> None:
    page, records = tmp_path / "report.md", tmp_path / "records"
    minutes = "5" if long else "0.4"
    result = await run("torture", "--minutes", minutes, "--seed", "1", "--report", str(page), "--keep", str(records))
    report(result.output)
    assert result.exit_code == 0, result.output
    assert "every promise was kept" in page.read_text()
    assert (records / "worker-0.notes").exists()
    again = await run("torture", "--minutes", minutes, "--keep", str(records))
    assert again.exit_code == 1
    assert "is not empty" in again.output


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_a_broken_promise_is_exit_code_1_with_its_evidence(
    run: Run, empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PROGRAMS, "worker", broken.__file__)
    result = await run("torture", "--minutes", "0.2", "--seed", "1", "--dsn", empty_database, env={"BROKEN": "fence"})
    report(result.output)
    assert result.exit_code == 1
    assert "PROMISES WERE BROKEN" in result.output
    assert "neither handled" in result.output
