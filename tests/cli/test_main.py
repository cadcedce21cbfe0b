"""All commands handle usage, environment and unreachable servers alike."""

import asyncio
import shlex
import sys
import time
from pathlib import Path

import pytest

from tests.cli.conftest import Run


async def test_python_m_is_the_same_command() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "pgbackend", "--version", stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert out.decode().startswith("pgbackend 0.")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
async def test_a_standard_stream_may_be_closed(database: str, closed: str) -> None:
    process = await asyncio.create_subprocess_shell(
        f"{shlex.quote(sys.executable)} -m pgbackend produce --dsn {shlex.quote(database)} {closed}",
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, complaint = await process.communicate()
    assert (process.returncode, complaint.decode()) == (0, "")


async def test_a_full_disk_is_one_line_whatever_is_printed(database: str) -> None:
    process = await asyncio.create_subprocess_shell(
        f"{shlex.quote(sys.executable)} -m pgbackend status --dsn {shlex.quote(database)} > /dev/full",
        stderr=asyncio.subprocess.PIPE,
    )
    _, complaint = await process.communicate()
    assert process.returncode == 1
    assert complaint.decode() == "Error: The output cannot be written: No space left on device.\n"


async def test_an_unknown_command_is_wrong_usage(run: Run) -> None:
    assert (await run("explode")).exit_code == 2


@pytest.mark.parametrize("command", [["status"], ["migrate"], ["dead-letters", "list"]])
async def test_a_missing_dsn_is_wrong_usage_if_there_is_no_embedded_log(
    run: Run, command: list[str], tmp_path: Path
) -> None:
    result = await run(*command)
    assert result.exit_code == 2
    assert "--dsn" in result.stderr
    assert "PGBACKEND_DSN" in result.stderr
    assert f"no embedded log in {tmp_path / 'default'}" in " ".join(result.stderr.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [["status"], ["migrate"], ["migrate", "--check"], ["dead-letters", "list"]])
async def test_an_unreachable_server_is_one_clear_line(run: Run, command: list[str]) -> None:
    result = await run(*command, "--dsn", "postgresql://nobody@localhost:1/nowhere")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("Error: PostgreSQL at localhost:1/nowhere cannot be reached: ")


@pytest.mark.parametrize(
    "command",
    [
        ["status"],
        *(pytest.param(command, marks=pytest.mark.slow) for command in (["migrate"], ["dead-letters", "list"])),
    ],
)
async def test_a_server_that_does_not_answer_is_one_clear_line_within_seconds(run: Run, command: list[str]) -> None:
    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_server(say_nothing, "127.0.0.1", 0) as silent:
        port = silent.sockets[0].getsockname()[1]
        begun = time.monotonic()
        result = await run(*command, "--dsn", f"postgresql://nobody@127.0.0.1:{port}/nowhere?sslmode=disable")
    assert time.monotonic() - begun < 30
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "did not answer" in result.stderr


async def test_a_malformed_dsn_is_one_clear_line(run: Run) -> None:
    result = await run("status", "--dsn", "mysql://localhost/x")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: The DSN's scheme is ")


@pytest.mark.parametrize("command", [["status"], ["tail", "--count", "1"], ["export", "-"]])
async def test_an_empty_dsn_is_no_other_database(run: Run, command: list[str]) -> None:
    result = await run(*command, "--dsn", "")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: The DSN is not a URL")


async def test_options_can_come_from_the_environment(run: Run, database: str) -> None:
    assert (await run("status", env={"PGBACKEND_DSN": database})).exit_code == 0
    result = await run("status", env={"PGBACKEND_DSN": database, "PGBACKEND_SCHEMA": "elsewhere"})
    assert result.exit_code == 1
    assert '"elsewhere" holds no log. Run `pgbackend migrate`.' in result.stderr
    assert (await run("status", env={"PGBACKEND_DSN": database, "PGBACKEND_STATUS_JSON": "1"})).stdout.startswith("{")


async def test_a_version_variable_of_the_deployment_is_ignored(run: Run, database: str) -> None:
    result = await run("migrate", env={"PGBACKEND_DSN": database, "PGBACKEND_VERSION": "1"})
    assert "already" in result.stdout
