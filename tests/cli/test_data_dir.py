"""Commands without a DSN use the embedded log that `pgbackend serve` made."""

import json
from pathlib import Path

import pytest

from pgbackend import Backend
from tests.cli.conftest import Run
from tests.support.embedded_user import nothing_is_left
from tests.support.events import make_event


@pytest.fixture
async def embedded_log(tmp_path: Path) -> Path:
    """The directory of an embedded log with one event, whose server does not run."""
    backend = Backend.embedded(tmp_path)
    await backend.init()
    await backend.produce(make_event("one"))
    await backend.stop()
    return tmp_path


@pytest.mark.slow
async def test_status_shares_the_server_of_a_running_broker(run: Run, embedded_log: Path) -> None:
    backend = Backend.embedded(embedded_log)
    await backend.init()
    result = await run("status", "--json", "--data-dir", str(embedded_log))
    assert json.loads(result.stdout)["head"] == 1, result.output
    await backend.produce(make_event("two"))
    await backend.stop()


@pytest.mark.slow
async def test_status_runs_the_server_for_itself_when_no_broker_does(run: Run, embedded_log: Path) -> None:
    result = await run("status", "--json", env={"PGBACKEND_DATA_DIR": str(embedded_log)})
    assert json.loads(result.stdout)["head"] == 1, result.output
    await nothing_is_left(embedded_log)


@pytest.mark.slow
async def test_a_command_without_options_uses_the_default_directory(
    run: Run, embedded_log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgbackend.embedded.server.default_directory", lambda: embedded_log)
    for command in (["subscriptions", "list"], ["dead-letters", "list"], ["migrate", "--check"]):
        result = await run(*command)
        assert result.exit_code == 0, result.output
    assert f"embedded in {embedded_log}" in result.stdout


async def test_a_directory_without_a_log_is_one_clear_line_and_stays_empty(run: Run, tmp_path: Path) -> None:
    result = await run("status", "--data-dir", str(tmp_path))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        f"Error: There is no embedded log in {tmp_path}. `pgbackend serve --data-dir {tmp_path}` makes one.\n"
    )
    assert list(tmp_path.iterdir()) == []


async def test_a_dsn_and_a_directory_are_wrong_usage(run: Run, tmp_path: Path) -> None:
    result = await run("status", "--dsn", "postgresql:///x", "--data-dir", str(tmp_path))
    assert result.exit_code == 2
    assert "not both" in result.stderr
