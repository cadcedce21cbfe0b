"""The JSON Schema for editors is current, and agrees with the broker about valid and invalid files."""

import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import event, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from pgbackend.errors import ConfigError
from pgbackend.serve.config.load import load
from pgbackend.serve.config.schema import json_schema
from tests.serve.config.test_models import EVERYTHING, MISTAKES

ROOT = Path(__file__).parents[3]
VALIDATOR = Draft202012Validator(json_schema())


class _Editor(yaml.SafeLoader):
    """Reads YAML as editors do: numbers and booleans have their types, dates are text."""


_Editor.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith("timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def seen(text: str) -> Any:
    return yaml.load(textwrap.dedent(text), Loader=_Editor)  # noqa: S506 - a SafeLoader


def test_the_schema_in_the_documentation_is_current() -> None:
    kept = json.loads((ROOT / "docs" / "broker.schema.json").read_text(encoding="utf-8"))
    assert kept == json_schema(), "run `pgbackend serve --print-schema > docs/broker.schema.json`"


def test_the_schema_is_valid_and_describes_every_key() -> None:
    schema = json_schema()
    Draft202012Validator.check_schema(schema)
    sections = [schema, *schema["$defs"].values()]
    assert all(section["additionalProperties"] is False for section in sections)
    unexplained = [
        f"{section['description']} {name}"
        for section in sections
        for name, below in section["properties"].items()
        if not _explained(below, schema)
    ]
    assert not unexplained


def _explained(below: dict[str, Any], schema: dict[str, Any]) -> bool:
    if "$ref" in below:
        below = schema["$defs"][below["$ref"].rpartition("/")[2]]
    return bool(below.get("description"))


def _documented() -> Iterator[str]:
    for file in sorted(ROOT.glob("docs/*.md")):
        for block in re.findall(r"```yaml\n(.*?)```", file.read_text(encoding="utf-8"), re.DOTALL):
            if re.search(r"^triggers:", block, re.MULTILINE):
                yield block
    for folder in ("examples", "deploy"):
        for file in sorted((ROOT / folder).glob("**/broker*.yaml")):
            yield file.read_text(encoding="utf-8")


RIGHT = [
    EVERYTHING,
    *_documented(),
    "triggers: {a: {filters: [{exact: {type: 42, time: 2026-01-01, a: true, b: 1e3}}]}}",
    "triggers: {a: {concurrency: '8', shards: 2, bounds: {byId: {start: 0, end: 20}}}}",
    'triggers: {a: {target: {url: "", headers: {X-Version: 1}, deliveryOptions: {retry: 5}}}}',
    "triggers: {a: {bounds: {byDate: {start: 2026-01-01t00:00:00.000000001+01:00}}}}",
    "triggers: {a: {deliveryOptions: {backoffDelay: '+P1Y2M3W4DT5H6M7,5S', timeout: PT1M1H}}}",
    'ingest: {user: "", password: ""}',
]


@pytest.mark.parametrize("text", RIGHT, ids=[text.strip()[:40] for text in RIGHT])
def test_a_file_that_the_broker_accepts_is_valid_for_an_editor(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in re.findall(r"env: (\w+)", text):
        monkeypatch.setenv(name, "secret")
    load(textwrap.dedent(text), origin="broker.yaml")
    VALIDATOR.validate(seen(text))


# A schema cannot check these: secrets, relations of two values, duplicate keys, reserved headers, parts of URLs, bounds
# of durations.
BEYOND = re.compile(
    r"NOT_SET|/not/there|/dev/zero|strict, shards: 2|start: 5, end|ingest: {password: x}|'a:b'|Order: none|x: 1, X: 2"
    r"|ce-id|Content-Length|PgBackend-Attempt|99999|02-30|a: {}, a: {}|cesql|{data: x}|retry: 5\.0"
    r"|a%3Ab|a\.\.b|x{64}|token: {env|PT0\.05S"
)


def _readable(text: str) -> bool:
    try:
        seen(text)
    except (yaml.YAMLError, RecursionError):
        return False
    return True


def test_a_file_that_the_broker_refuses_is_invalid_for_an_editor() -> None:
    # Check this here: as a filter of the parameters it would cost a second in every worker of xdist.
    texts = [text for text, _ in MISTAKES if not BEYOND.search(text) and _readable(text)]
    assert len(texts) > 30
    assert [text for text in texts if VALIDATOR.is_valid(seen(text))] == []


TEXTS = """
    x 0 5 42.5 -1 PT1S PT0S P1D pt1s http://h/ /h ftp://h key strict linear binary latest earliest 2026-01-01
    2026-01-01T00:00:00Z type='x'
    """
SCALARS = st.sampled_from(["", "é\n", 0, 1, 7, 10**20, 1.5, True, *TEXTS.split()])
KEYS = sorted({name for section in [json_schema(), *json_schema()["$defs"].values()] for name in section["properties"]})
NAMES = st.sampled_from([*KEYS, "type", "source", "Type", "X-Key", "env", "file", "t1", "", "unknown"])
FILES = st.recursive(
    SCALARS, lambda below: st.lists(below, max_size=3) | st.dictionaries(NAMES, below, max_size=4), max_leaves=12
)
SHAPES = {name: section["properties"] for name, section in json_schema()["$defs"].items()} | {
    "Configuration": json_schema()["properties"]
}


@st.composite
def section(draw: st.DrawFn, name: str = "Configuration", depth: int = 0) -> Any:
    """A mostly valid section: its own keys, with valid values or others."""
    found: dict[str, Any] = {}
    shape = SHAPES[name]
    keys = st.sampled_from(sorted(shape))
    for key in draw(st.lists(keys, max_size=1 if name == "Filter" else 4, unique=True)):
        found[key] = draw(_below(shape[key], depth + 1)) if draw(st.integers(0, 9)) else draw(FILES)
    return found


def _below(shape: dict[str, Any], depth: int) -> st.SearchStrategy[Any]:
    if depth > 6:
        return SCALARS
    if "$ref" in shape:
        return section(shape["$ref"].rpartition("/")[2], depth)
    if shape.get("type") == "array":
        return st.lists(_below(shape["items"], depth + 1), max_size=2)
    if shape.get("type") == "object":
        values = shape.get("additionalProperties") or next(iter(shape["patternProperties"].values()))
        return st.dictionaries(NAMES, _below(values, depth + 1), max_size=2)
    if "enum" in shape:
        return st.sampled_from(shape["enum"])
    return st.sampled_from(shape["examples"]) | SCALARS if "examples" in shape else SCALARS


@given(section() | FILES)
@settings(max_examples=500)
def test_any_file_is_refused_with_a_message_or_valid_for_an_editor(file: Any) -> None:
    try:
        load(json.dumps(file), origin="broker.yaml")
    except ConfigError as error:
        event("refused")
        problems = error.problems
    else:
        event("taken")
        VALIDATOR.validate(file)
        return
    assert problems
    for problem in problems:
        assert problem.startswith("broker.yaml:")
        assert problem.endswith((".", "?"))
        assert problem.isprintable()
