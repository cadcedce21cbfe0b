"""Every setting and every command is on its page, and nothing that does not exist."""

import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import fields
from datetime import timedelta

import click
import pytest
from click.testing import CliRunner

from mkdocs_options import tables
from pgbackend import Backend, Retention, errors
from pgbackend.cli import main
from pgbackend.settings import Settings
from tests.support.pages import ROOT

SETTINGS = (ROOT / "docs/settings.md").read_text()
COMMANDS = main.list_commands(click.Context(main))


def test_the_table_has_every_setting_and_no_other() -> None:
    cells = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| .* \| .* \|$", SETTINGS, re.MULTILINE)
    named = [name for cell in cells for name in re.findall(r"\w+", cell)]
    assert set(named) == {field.name for field in fields(Settings)} | {"listen_dsn"}
    assert len(named) == len(set(named))


@pytest.mark.parametrize("setting", fields(Settings), ids=lambda field: field.name)
def test_the_table_has_the_defaults(setting: object) -> None:
    name, default = setting.name, setting.default  # type: ignore[attr-defined] # dataclasses.Field has no public type here
    (row,) = re.findall(rf"^\| (?=[^|]*`{name}`)(`\w+`(?:, `\w+`)*) \| (.*?) \| .*$", SETTINGS, re.MULTILINE)
    shown = dict(zip(re.findall(r"\w+", row[0]), re.split(r", (?=\d+ )", row[1]), strict=True))[name]
    match default:
        case None:
            assert shown == "as the log has it"
        case float():
            assert shown == f"{default} s"
        case int() if default >= 1 << 20:
            assert shown == f"{default >> 20} MiB"
        case int():
            assert shown == f"{default:,}"
        case _:
            assert not isinstance(default, timedelta)
            assert shown == f'`"{default}"`'


def test_the_page_of_the_broker_has_every_key_of_its_file() -> None:
    page = (ROOT / "docs/broker.md").read_text()
    missing = [key for key in _keys(json.loads((ROOT / "docs/broker.schema.json").read_text())) if key not in page]
    assert missing == []


def _keys(schema: object) -> Iterator[str]:
    """The keys of all mappings that the schema describes."""
    if isinstance(schema, dict):
        yield from schema.get("properties", {})
        for below in schema.values():
            yield from _keys(below)
    elif isinstance(schema, list):
        for below in schema:
            yield from _keys(below)


def test_the_page_of_the_retention_has_every_value() -> None:
    page = (ROOT / "docs/retention.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == [field.name for field in fields(Retention)]


def test_the_page_of_subscriptions_has_every_option() -> None:
    page = (ROOT / "docs/subscribing.md").read_text()
    options = inspect.signature(Backend.subscribe).parameters.keys() - {"self", "name", "dispatcher"}
    assert {option for option in options if f"    {option}=" not in page} == set()


def test_the_page_of_errors_has_every_error() -> None:
    page = (ROOT / "docs/errors.md").read_text()
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.PgBackendError)
    ]
    assert [kind.__name__ for kind in kinds if f"`{kind.__name__}`" not in page] == []


def test_the_options_of_every_command_are_listed() -> None:
    listed = tables()
    for path, command in _commands(main, "pgbackend"):
        for param in command.params:
            if isinstance(param, click.Option):
                assert f"`{param.opts[0]}`" in listed, (path, param.opts)
        if any(isinstance(param, click.Option) and param.name not in _SHARED for param in command.params):
            assert f"### `{path}`" in listed


def test_variables_are_those_that_click_reads() -> None:
    assert "| `--rounds` | `PGBACKEND_BENCH_ROUNDS` |" in tables()
    assert "| `--dsn` | `PGBACKEND_DSN` |" in tables()
    result = CliRunner().invoke(main, ["bench"], env={"PGBACKEND_BENCH_ROUNDS": "none"})
    assert "'none' is not a valid integer" in result.output


def test_every_command_is_in_the_table_of_commands_and_no_other() -> None:
    page = (ROOT / "docs/cli.md").read_text()
    assert set(re.findall(r"^\| `pgbackend ([\w-]+)` \|", page, re.MULTILINE)) == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    assert CliRunner().invoke(main, [command, "--help"]).exit_code == 0


_SHARED = ("dsn", "listen_dsn", "schema", "data_dir")


def _commands(group: click.Group, path: str) -> list[tuple[str, click.Command]]:
    context = click.Context(group)
    found: list[tuple[str, click.Command]] = []
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        found += (
            _commands(command, f"{path} {name}") if isinstance(command, click.Group) else [(f"{path} {name}", command)]
        )
    return found
