"""The JSON Schema of the configuration file, for editors; `pgbackend serve --print-schema` prints it."""

from typing import Any

from pgbackend.serve.config.models import Configuration


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of the file.

    It is stricter than `load()` in two ways: keys must have the documented case, and each key needs a value. It cannot
    check everything that `load()` checks: whether secrets exist, an end before its start, mistakes in CESQL.
    """
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "pgbackend serve"}
    return {**head, **_tidied(Configuration.model_json_schema(by_alias=True))}


def _tidied(node: Any) -> Any:
    """The schema without what only pydantic needs: titles, None as a value, defaults that are whole sections."""
    if isinstance(node, list):
        return [_tidied(item) for item in node]
    if not isinstance(node, dict):
        return node
    options = [option for option in node.get("anyOf", ()) if option != {"type": "null"}]
    if "anyOf" in node and len(options) == 1:
        node = options[0] | {key: below for key, below in node.items() if key != "anyOf"}
    if "patternProperties" in node:
        node = node | {"additionalProperties": False}
    return {
        key: _tidied(below)
        for key, below in node.items()
        if not (key == "title" and isinstance(below, str))
        and not (key == "default" and (below is None or isinstance(below, list | dict)))
    }
