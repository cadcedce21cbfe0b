"""Every code block of every page is run, or checked against what there is. `FIGURES` lists those that only show."""

import configparser
import re
import shlex
from collections.abc import Callable, Iterator
from textwrap import indent

import click
import pytest
import yaml
from click.testing import CliRunner

from pgbackend.cli import main
from pgbackend.postgres.dsn import describe_dsn
from tests.docs.programs import PROGRAMS
from tests.support.pages import ROOT, Block, every_block

SHELL = {"pgbackend", "make", "python", ".venv/bin/python", "curl", "docker", "createuser", "pip", "tail"}
"""A block without a language whose first word is one of these is a terminal."""
TOOLS = {"createuser", "curl", "docker", "psql", "tail", "zstd"}
"""Programs of others in terminals. Only the paths that they get are checked."""
FIGURES = {
    "docs/architecture.md": "diagrams",
    "docs/broker.md:broker.yaml:9": "a message; tests/serve/config has a test of its kind",
    "docs/doctor.md:1 WARNING": "a report; tests/doctor makes each finding",
    "docs/dsn.md": "the two forms of a DSN, with words for their parts",
    "docs/export.md:{": "the beginning of a line; the rest differs",
    "docs/torture.md:pgbackend torture, plan": "a report, cut",
}
"""Blocks that only show something: their page, the way they begin, and what they are."""
ELSEWHERE = {
    "README.md": "tests/test_readme.py runs the first program and compares its output",
    "docs/status.md": "tests/test_status_page.py and tests/postgres/test_grants.py run its SQL",
    "docs/tutorial.md": "tests/docs/test_tutorial.py runs the whole page",
    "docs/outbox.md": "tests/outbox/test_docs.py runs each of its programs with its library",
    "docs/sql-consumer.md": "tests/examples/test_sql_consumer.py compares its statements with those that it runs",
}
"""Pages whose blocks in `python`, `console`, `sql` or without a language are run by another test."""


def check(block: Block) -> None:
    """The block is what its language says. KeyError where nothing checks it."""
    first = block.text.split(maxsplit=1)[0]
    if block.language == "" and first in SHELL:
        for command in _commands(block.text):
            _check_command(command)
    elif block.language == "" and first.startswith("postgresql://"):
        for line in block.text.splitlines():
            assert describe_dsn(line.partition(" #")[0].strip())
    elif block.language == "" and first == "$":
        _check_session(block.text)
    else:
        CHECKS[block.language](block.text)


def _is_figure(block: Block) -> bool:
    return any(f"{block.page}:{block.text}".startswith(figure) for figure in FIGURES) and block.language == ""


def _is_run_elsewhere(block: Block) -> bool:
    if block.language in ("python", "sql") and block.page in PROGRAMS:
        return True
    is_shell = block.language == "" and block.text.split(maxsplit=1)[0] in SHELL
    return block.page in ELSEWHERE and block.language in ("python", "console", "sql", "") and not is_shell


CHECKED = [block for block in every_block() if not _is_figure(block) and not _is_run_elsewhere(block)]


@pytest.mark.parametrize("block", CHECKED, ids=str)
def test_a_block_says_what_there_is(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("INGEST_PASSWORD", "INGEST_TOKEN", "CONSOLE_PASSWORD", "BILLING_AUTH"):
        monkeypatch.setenv(name, "secret")
    check(block)


def test_the_list_of_figures_is_short_and_true() -> None:
    pages = {block.page for block in every_block()}
    assert len(FIGURES) <= 8
    assert {figure.partition(":")[0] for figure in FIGURES} <= pages
    assert all(any(f"{block.page}:{block.text}".startswith(figure) for block in every_block()) for figure in FIGURES)
    assert ELSEWHERE.keys() <= pages


def _commands(text: str) -> Iterator[list[str]]:
    """The commands of a terminal, without comments, redirections and loops."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|;&<>")
        lexer.whitespace_split = True
        command: list[str] = []
        for word in lexer:
            if set(word) <= set("|;&"):
                yield command
                command = []
            else:
                command.append(word)
        if command:
            yield command


def _check_command(words: list[str]) -> None:
    for place, word in enumerate(words):
        if set(word) <= set("<>"):
            words = words[:place]
            break
    program, *arguments = words
    for path in re.findall(r"(?<![\w/.])(?:benchmarks|deploy|docs|examples|tests)/[\w./-]*", " ".join(arguments)):
        assert (ROOT / path).exists(), path
    match program:
        case "pgbackend":
            _check_pgbackend(arguments)
        case "make":
            assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), arguments[0]
        case "python" | ".venv/bin/python":
            source = (ROOT / arguments[0]).read_text()
            assert all(each in source for each in arguments[1:] if each.startswith("--")), arguments
        case _:
            assert program in TOOLS, program


def _check_pgbackend(arguments: list[str]) -> None:
    """The command and its options exist, and their values have the right type."""
    command: click.Command = main
    context = click.Context(main, info_name="pgbackend")
    while isinstance(command, click.Group):
        name, *arguments = arguments
        found = command.get_command(context, name)
        assert found is not None, name
        command, context = found, click.Context(found, info_name=name, parent=context)
    given, _, _ = command.make_parser(context).parse_args([*arguments])
    for param in command.params:
        value = given.get(param.name or "")  # a text, or several; not the mark of an option that may stand alone
        if isinstance(value, str | list) and not isinstance(param.type, click.File):
            param.type_cast_value(context, value)


def _check_session(text: str) -> None:
    """`$ pgbackend …`, and what it prints. `…` stands for any text."""
    command, printed = text.removeprefix("$ pgbackend ").split("\n", 1)
    result = CliRunner().invoke(main, shlex.split(command))
    assert re.fullmatch(re.escape(printed).replace("…", ".*"), result.output), result.output


def _check_yaml(text: str) -> None:
    from pgbackend.serve.config.load import load

    documents = list(yaml.safe_load_all(text))
    for document in documents:
        if "kind" in document:
            _check_manifest(document)
        elif "filters" in document:
            load("triggers:\n  shown:\n" + indent(text, "    "), origin="docs")
        elif "groups" in document:
            for rule in document["groups"][0]["rules"]:
                _check_promql(rule["expr"])
        elif "scrape_configs" not in document:
            load(text, origin="docs")


def _check_manifest(document: dict[str, object]) -> None:
    """A Kubernetes object that runs the broker gives it options that it has; a ConfigMap has a valid file."""
    from pgbackend.serve.config.load import load

    known = {option.envvar for option in _serve().params}
    match document:
        case {"kind": "Deployment", "spec": {"template": {"spec": {"containers": [container], "volumes": volumes}}}}:
            program, *arguments = container["args"]
            assert program == "serve"
            given, _, _ = _serve().make_parser(click.Context(_serve())).parse_args(arguments)
            ports = {port["name"]: port["containerPort"] for port in container["ports"]}
            assert ports == {"events": 8080, "admin": int(given["admin_port"])}
            assert {each["name"] for each in container["env"]} <= known
            probes = [container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")]
            assert {(probe["path"], probe["port"]) for probe in probes} == {("/healthz", "admin"), ("/readyz", "admin")}
            assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in volumes}
        case {"kind": "ConfigMap", "data": data} if isinstance(data, dict):
            for name, text in data.items():
                load(text, origin=name)
        case {"kind": "Service"}:
            pass
        case _:
            raise AssertionError(document)


def _serve() -> click.Command:
    from pgbackend.cli.serve import serve

    return serve


def _check_promql(text: str) -> None:
    """The metrics of the expression are in the tables of docs/metrics.md."""
    page = (ROOT / "docs/metrics.md").read_text()
    documented = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    for name in re.findall(r"\b(?:pgbackend|messaging|process)_\w+", text):
        base = re.sub(r"_(bucket|sum|count)$", "", name)
        assert {name, base} & documented or f"`{name}`" in page, name


def _check_ini(text: str) -> None:
    parser = configparser.ConfigParser()
    parser.read_string(text)
    assert parser["pgbouncer"]["pool_mode"] == "transaction"


CHECKS: dict[str, Callable[[str], None]] = {"yaml": _check_yaml, "promql": _check_promql, "ini": _check_ini}
"""How a block of a language is checked. A block in another one fails the test, until it is run or listed."""
