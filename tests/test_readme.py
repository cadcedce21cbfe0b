"""The README is true: its program runs, its SQL and YAML are accepted, its tables name what there is."""

import asyncio
import inspect
import os
import re
import sys
from pathlib import Path

import asyncpg
import pytest
from click.testing import CliRunner

from pgbackend import Backend
from pgbackend.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def _blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for name, text in fenced if name == language]


async def test_first_program_runs_as_written_and_prints_what_it_says(tmp_path: Path) -> None:
    program, output = _blocks("python")[0], _blocks("")[0]
    assert len(program.splitlines()) <= 20
    (tmp_path / "program.py").write_text(program)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "program.py",
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    assert (out.decode(), err.decode(), process.returncode) == (output, "", 0)


async def test_sql_producer_is_accepted_and_delivered(backend: Backend, database: str) -> None:
    handled: asyncio.Queue[object] = asyncio.Queue()
    running = asyncio.create_task(backend.start())
    await backend.subscribe("billing", lambda event: handled.put_nowait(event.get_data()), start="earliest")
    connection = await asyncpg.connect(database)
    await connection.execute(_blocks("sql")[0])
    await connection.close()
    async with asyncio.timeout(10):
        assert await handled.get() == {"order": 17}
    await backend.stop()
    await running


def test_broker_configuration_is_accepted() -> None:
    from pgbackend.serve.config.load import load

    (text,) = _blocks("yaml")
    assert list(load(text, origin="README.md").triggers) == ["billing"]


def test_settings_table_is_the_constructor() -> None:
    documented = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", README.partition("## Settings")[2], re.MULTILINE)
    names = [name for cell in documented for name in re.findall(r"\w+", cell)]
    parameters = inspect.signature(Backend).parameters
    assert names == [name for name in parameters if name != "dsn"]


@pytest.mark.parametrize(
    ("setting", "shown"),
    [
        ("hole_wait", "1.0 s"),
        ("poll_interval", "1.0 s"),
        ("commit_interval", "0.1 s"),
        ("lease_timeout", "15.0 s"),
        ("produce_timeout", "30.0 s"),
        ("drain_timeout", "30.0 s"),
        ("pool_size", "4"),
    ],
)
def test_settings_table_has_the_defaults(setting: str, shown: str) -> None:
    default = inspect.signature(Backend).parameters[setting].default
    assert shown.removesuffix(" s") == str(default)
    assert f"| `{setting}` | {shown} |" in README


def test_every_command_is_in_the_table_and_the_other_way_round() -> None:
    documented = set(re.findall(r"^\| `pgbackend ([\w-]+)` \|", README, re.MULTILINE))
    listed = set(main.list_commands(None))  # type: ignore[arg-type] # our group does not look at it
    assert documented == listed
    for command in listed:
        assert CliRunner().invoke(main, [command, "--help"]).exit_code == 0
