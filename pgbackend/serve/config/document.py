"""Parses the text of a configuration file into plain values, and knows the line of each.

`load` hands the values to the models. Scalars stay the text that was written: `42`, `true` and `2026-01-01` are text
until a field converts them. JSON is parsed as YAML, so its mistakes have line numbers too.
"""

import json
import re
from collections.abc import Iterator

import yaml

from pgbackend.errors import ConfigError

Value = str | None | list["Value"] | dict[str, "Value"]
Path = tuple[str | int, ...]
_Keys = dict[str, tuple[yaml.Node, yaml.Node]]

_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_TAGS = frozenset(
    f"tag:yaml.org,2002:{name}" for name in ("str", "seq", "map", "null", "bool", "int", "float", "timestamp")
)
_NAMED = re.compile(r"\b(alias|anchor|tag handle) (['\"]).*?\2")
_DEPTH = 64
# An alias repeats a whole value: a few lines of aliases can stand for billions of values.
_VALUES = 100_000


class Document:
    r"""A parsed text: its `value` of mappings, lists, text and None, and the `mistakes` in its YAML.

    Raises ConfigError when the text cannot be parsed at all.

    >>> document = Document("triggers:\n  billing: {concurrency: 8}\n", origin="broker.yaml")
    >>> document.value
    {'triggers': {'billing': {'concurrency': '8'}}}
    >>> document.where(("triggers", "billing", "concurrency"))
    'broker.yaml:2: triggers.billing.concurrency'
    """

    def __init__(self, text: str, *, origin: str) -> None:
        self.origin = origin
        self.mistakes: list[tuple[int, str]] = []
        """The line and the message of each mistake."""
        self._values = 0
        self._key_index: dict[int, _Keys] = {}
        try:
            self._root = yaml.compose(_without_tabs(text), Loader=yaml.BaseLoader)
            self.value: Value = None if self._root is None else self._read(self._root, 0)
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            # Drop the names of aliases and tags: an unquoted password can look like one.
            reason = ", ".join(_NAMED.sub(r"\1", part) for part in (error.context, error.problem) if part)
            raise ConfigError(f"{origin}:{line}: not valid YAML: {reason}.") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"{origin}: not valid YAML: {' '.join(str(error).split())}.") from None
        except RecursionError:
            raise ConfigError(f"{origin}: nested too deeply: expected at most {_DEPTH} levels.") from None

    def where(self, path: Path) -> str:
        """`origin:line: path`, with the line of `line()`."""
        return f"{self.origin}:{self.line(path)}: {render(path)}" if path else f"{self.origin}:{self.line(path)}"

    def line(self, path: Path) -> int:
        """The line, from 1, where the value at `path` begins; for an absent value that of its nearest parent."""
        node = self._root
        line = 1
        for step in path:
            below: yaml.Node | None = None
            if isinstance(node, yaml.MappingNode):
                keys = self._keys(node)
                if found := keys.get(str(step)) or keys.get(str(step).lower()):
                    below, line = found[1], found[0].start_mark.line + 1
            elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
                below = node.value[step]
                line = below.start_mark.line + 1
            if below is None:
                break
            node = below
        return line

    def _keys(self, node: yaml.MappingNode) -> _Keys:
        """Each key as written and in lower case, with its value; the spelling as written wins."""
        keys = self._key_index.get(id(node))
        if keys is None:
            keys = {str(key.value): (key, value) for key, value in reversed(node.value)}
            keys = {name.lower(): found for name, found in reversed(keys.items())} | keys
            # Cached: a mapping of thousands of triggers may have thousands of mistakes.
            self._key_index[id(node)] = keys
        return keys

    def _read(self, node: yaml.Node, depth: int) -> Value:
        self._count(node, depth)
        if node.tag not in _TAGS:
            self._add_mistake(node, "expected plain YAML, found a tag: put text that begins with ! into quotes")
        if isinstance(node, yaml.ScalarNode):
            return None if node.style is None and node.value in _NULLS else _join_surrogates(node.value)
        if isinstance(node, yaml.SequenceNode):
            return [self._read(below, depth + 1) for below in node.value]
        return self._read_mapping(node, depth)

    def _count(self, node: yaml.Node, depth: int) -> None:
        self._values += 1
        if depth > _DEPTH or self._values > _VALUES:
            limit = f"at most {_DEPTH} levels" if depth > _DEPTH else f"at most {_VALUES} values"
            raise ConfigError(self._message(node, f"expected {limit} after aliases are expanded"))

    def _read_mapping(self, node: yaml.Node, depth: int) -> dict[str, Value]:
        mapping: dict[str, Value] = {}
        merged: dict[str, Value] = {}
        for key, below in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self._add_mistake(key, "expected text as the key")
                continue
            name = _join_surrogates(key.value)
            if name == "<<" and key.style is None:
                for other in self._merged(below, depth):
                    merged = other | merged
            elif name in mapping:
                self._add_mistake(key, f"{name!r} occurs twice in this mapping: expected each key once")
            else:
                mapping[name] = self._read(below, depth + 1)
        return merged | mapping

    def _merged(self, node: yaml.Node, depth: int) -> Iterator[dict[str, Value]]:
        for source in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if isinstance(source, yaml.MappingNode):
                self._count(source, depth + 1)
                yield self._read_mapping(source, depth + 1)
            else:
                self._add_mistake(source, "expected a mapping, or a list of mappings, to merge")

    def _add_mistake(self, node: yaml.Node, problem: str) -> None:
        self.mistakes.append((node.start_mark.line + 1, self._message(node, problem)))

    def _message(self, node: yaml.Node, problem: str) -> str:
        return f"{self.origin}:{node.start_mark.line + 1}: {problem}."


def render(path: Path) -> str:
    """The path as text.

    >>> render(("triggers", "billing", "filters", 0, "exact"))
    'triggers.billing.filters[0].exact'
    """
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            name = step if re.fullmatch(r"[\w/<-]+", step) else json.dumps(step)
            text += f".{name}" if text else name
    return text


def _without_tabs(text: str) -> str:
    """The text, with spaces for tabs if it is JSON: YAML forbids tabs as indentation, and JSON has none in values."""
    text = text.removeprefix("\ufeff")
    if "\t" in text:
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            return text
        return text.replace("\t", " ")
    return text


def _join_surrogates(text: str) -> str:
    """The text with each surrogate pair, as JSON escapes it, replaced by its character."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
