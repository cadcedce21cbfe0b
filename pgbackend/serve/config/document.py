"""The text of a configuration file as plain values, each with the line where it stands.

Comes before the models of `config`, which say what may stand where. Scalars stay the text that was written, whatever
YAML would make of them: `42`, `true` and `2026-01-01` are text until a field asks for something else. JSON is read the
same way, so that its errors have lines too.
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
# An alias repeats what it names: a few lines can stand for billions of values.
_VALUES = 100_000


class Document:
    r"""A parsed text. `value` holds mappings, lists, text and None; `mistakes` what is wrong with it as a document.

    Raises ConfigError when there is no reading it at all.

    >>> document = Document("triggers:\n  billing: {concurrency: 8}\n", origin="broker.yaml")
    >>> document.value
    {'triggers': {'billing': {'concurrency': '8'}}}
    >>> document.where(("triggers", "billing", "concurrency"))
    'broker.yaml:2: triggers.billing.concurrency'
    """

    def __init__(self, text: str, *, origin: str) -> None:
        self.origin = origin
        self.mistakes: list[tuple[int, str]] = []
        """Line and message of each."""
        self._values = 0
        self._looked_up: dict[int, _Keys] = {}
        try:
            self._root = yaml.compose(_without_tabs(text), Loader=yaml.BaseLoader)
            self.value: Value = None if self._root is None else self._read(self._root, 0)
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            # Without names: what looks like one may be a password that nobody quoted.
            said = ", ".join(_NAMED.sub(r"\1", part) for part in (error.context, error.problem) if part)
            raise ConfigError(f"{origin}:{line}: not valid YAML: {said}.") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"{origin}: not valid YAML: {' '.join(str(error).split())}.") from None
        except RecursionError:
            raise ConfigError(f"{origin}: nested too deeply: expected at most {_DEPTH} levels.") from None

    def where(self, path: Path) -> str:
        """`origin:line: path`; the line of the nearest thing above when the path itself is not there."""
        return f"{self.origin}:{self.line(path)}: {render(path)}" if path else f"{self.origin}:{self.line(path)}"

    def line(self, path: Path) -> int:
        """The line, from 1, on which the value at `path`, or the nearest thing above it, begins."""
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
        """Each key with its value: as it is written there, else in another case: that is how the models find it."""
        keys = self._looked_up.get(id(node))
        if keys is None:
            keys = {str(key.value): (key, value) for key, value in reversed(node.value)}
            keys = {name.lower(): found for name, found in reversed(keys.items())} | keys
            # Kept, for a mapping of thousands may have as many mistakes.
            self._looked_up[id(node)] = keys
        return keys

    def _read(self, node: yaml.Node, depth: int) -> Value:
        self._count(node, depth)
        if node.tag not in _TAGS:
            self._note(node, "expected plain YAML, found a tag: text that begins with ! needs quotes")
        if isinstance(node, yaml.ScalarNode):
            return None if node.style is None and node.value in _NULLS else _whole(node.value)
        if isinstance(node, yaml.SequenceNode):
            return [self._read(below, depth + 1) for below in node.value]
        return self._read_mapping(node, depth)

    def _count(self, node: yaml.Node, depth: int) -> None:
        self._values += 1
        if depth > _DEPTH or self._values > _VALUES:
            limit = f"at most {_DEPTH} levels" if depth > _DEPTH else f"at most {_VALUES} values"
            raise ConfigError(self._at(node, f"expected {limit}, aliases written out"))

    def _read_mapping(self, node: yaml.Node, depth: int) -> dict[str, Value]:
        mapping: dict[str, Value] = {}
        merged: dict[str, Value] = {}
        for key, below in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self._note(key, "expected text as the key")
                continue
            name = _whole(key.value)
            if name == "<<" and key.style is None:
                for other in self._merged(below, depth):
                    merged = other | merged
            elif name in mapping:
                self._note(key, f"{name!r} stands twice in one mapping: expected each key once")
            else:
                mapping[name] = self._read(below, depth + 1)
        return merged | mapping

    def _merged(self, node: yaml.Node, depth: int) -> Iterator[dict[str, Value]]:
        for source in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if isinstance(source, yaml.MappingNode):
                self._count(source, depth + 1)
                yield self._read_mapping(source, depth + 1)
            else:
                self._note(source, "expected a mapping, or a list of mappings, to merge")

    def _note(self, node: yaml.Node, said: str) -> None:
        self.mistakes.append((node.start_mark.line + 1, self._at(node, said)))

    def _at(self, node: yaml.Node, said: str) -> str:
        return f"{self.origin}:{node.start_mark.line + 1}: {said}."


def render(path: Path) -> str:
    """A path as people write it.

    >>> render(("triggers", "billing", "filters", 0, "exact"))
    'triggers.billing.filters[0].exact'
    """
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            step = step if re.fullmatch(r"[\w/<-]+", step) else json.dumps(step)  # noqa: PLW2901 - the same step, quoted
            text += f".{step}" if text else step
    return text


def _without_tabs(text: str) -> str:
    """JSON may be indented by tabs and YAML may not; in valid JSON no tab is part of a value."""
    text = text.removeprefix("\ufeff")
    if "\t" in text:
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            return text
        return text.replace("\t", " ")
    return text


def _whole(text: str) -> str:
    """Text whose surrogate pairs, as JSON escapes them, are the characters they stand for."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
