"""Filters decide which events a subscription takes. They are the dialects of CloudEvents' Subscriptions API.

`subscribe(filter=…)` takes one of these, or any function of an `Event`; filters combine. A direct call also takes an
event of the SDK, and raises `EventError` if it is not valid. The promise: texts are compared exactly, case included;
integers and booleans by their canonical text (`42`, `true`), in CESQL by their type; `time` by the text that came in.
An attribute that an event lacks matches nothing, in any dialect. A filter that cannot mean anything raises
`ConfigError` when it is created.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING
from typing import Any as Anything

from pgbackend import facts
from pgbackend.codec import cesql
from pgbackend.codec.attributes import is_name
from pgbackend.codec.sdk import as_event
from pgbackend.errors import ConfigError

if TYPE_CHECKING:
    from cloudevents.core.base import BaseCloudEvent

    from pgbackend.codec.attributes import ExtensionValue
    from pgbackend.codec.event import Event
    from pgbackend.model import EventFilter

_Lookup = Callable[["Event"], str | None]
_Matches = Callable[[Anything], bool]
"""Takes an `Event`. Raises AttributeError for an event of the SDK."""


@dataclass(frozen=True, slots=True)
class Exact:
    """Matches when each named attribute is exactly this text.

    >>> from pgbackend.codec.wire import parse_structured
    >>> event = parse_structured(b'{"specversion":"1.0","id":"1","source":"/shop","type":"order.created","items":3}')
    >>> Exact({"type": "order.created", "items": "3"})(event)
    True
    >>> Exact({"subject": "x"})(event)
    False
    """

    attributes: Mapping[str, str]
    _matches: _Matches = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        texts = _checked("Exact", self.attributes)
        object.__setattr__(self, "attributes", texts)
        object.__setattr__(self, "_matches", _all([_exact(_lookup(name), text) for name, text in texts.items()]))

    def __call__(self, event: "Event | BaseCloudEvent") -> bool:
        """Whether the event matches."""
        try:
            return self._matches(event)
        except AttributeError:
            # An event of the SDK. A type check before would slow down all others.
            return self._matches(as_event(event))

    def __hash__(self) -> int:
        return hash(frozenset(self.attributes.items()))


@dataclass(frozen=True, slots=True)
class Prefix:
    """Matches when each named attribute begins with this text."""

    attributes: Mapping[str, str]
    _matches: _Matches = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        texts = _checked("Prefix", self.attributes)
        object.__setattr__(self, "attributes", texts)
        object.__setattr__(self, "_matches", _all([_prefix(_lookup(name), text) for name, text in texts.items()]))

    def __call__(self, event: "Event | BaseCloudEvent") -> bool:
        """Whether the event matches."""
        try:
            return self._matches(event)
        except AttributeError:
            # An event of the SDK. A type check before would slow down all others.
            return self._matches(as_event(event))

    def __hash__(self) -> int:
        return hash(frozenset(self.attributes.items()))


@dataclass(frozen=True, slots=True)
class Suffix:
    """Matches when each named attribute ends with this text."""

    attributes: Mapping[str, str]
    _matches: _Matches = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        texts = _checked("Suffix", self.attributes)
        object.__setattr__(self, "attributes", texts)
        object.__setattr__(self, "_matches", _all([_suffix(_lookup(name), text) for name, text in texts.items()]))

    def __call__(self, event: "Event | BaseCloudEvent") -> bool:
        """Whether the event matches."""
        try:
            return self._matches(event)
        except AttributeError:
            # An event of the SDK. A type check before would slow down all others.
            return self._matches(as_event(event))

    def __hash__(self) -> int:
        return hash(frozenset(self.attributes.items()))


@dataclass(frozen=True, slots=True)
class All:
    """Matches when all of these filters match."""

    filters: Iterable["EventFilter"]
    _matches: "EventFilter" = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        filters = _members("All", self.filters)
        object.__setattr__(self, "filters", filters)
        object.__setattr__(self, "_matches", _all(filters))

    def __call__(self, event: "Event") -> bool:
        """Whether the event matches."""
        return self._matches(event)


@dataclass(frozen=True, slots=True)
class Any:
    """Matches when at least one of these filters matches."""

    filters: Iterable["EventFilter"]
    _matches: "EventFilter" = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        filters = _members("Any", self.filters)
        object.__setattr__(self, "filters", filters)
        object.__setattr__(self, "_matches", _any(filters))

    def __call__(self, event: "Event") -> bool:
        """Whether the event matches."""
        return self._matches(event)


@dataclass(frozen=True, slots=True)
class Not:
    """Matches when this filter does not match, for example because an attribute is absent.

    >>> Not(Prefix({"subject": "draft/"}))
    Not(filter=Prefix(attributes={'subject': 'draft/'}))
    """

    filter: "EventFilter"

    def __post_init__(self) -> None:
        if not callable(self.filter):
            raise ConfigError(f"Not takes a filter, not {self.filter!r}.")

    def __call__(self, event: "Event") -> bool:
        """Whether the event matches."""
        return not self.filter(event)


@dataclass(frozen=True, slots=True)
class CESQL:
    """Matches when this expression in CloudEvents SQL, version 1, is true. If its evaluation fails, it does not match.

    >>> from pgbackend.codec.wire import parse_structured
    >>> event = parse_structured(b'{"specversion":"1.0","id":"1","source":"/shop","type":"order.created","items":3}')
    >>> CESQL("type LIKE 'order.%' AND items > 2")(event)
    True
    >>> CESQL("subject != 'x'")(event), CESQL("NOT EXISTS subject OR subject != 'x'")(event)
    (False, True)

    An evaluation fails when the event lacks an attribute, at a division by zero, or where a text should be a number but
    is not. AND and OR do not evaluate an operand that they do not need. AND and OR bind equally: use parentheses.

    Raises `ConfigError` with line and column when the text is not an expression. By the specification, a call of an
    unknown function is an error of evaluation: it is logged here, and `mistake` describes it.
    """

    text: str
    mistake: str | None = field(init=False, repr=False, compare=False)
    """A call of an unknown function, which fails with every event that gets that far. Otherwise None."""
    _evaluate: cesql.Evaluate = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        expression = cesql.compile_expression(self.text, _value)
        if expression.mistake is not None:
            facts.emit("filter cannot match", level=logging.WARNING, mistake=expression.mistake)
        object.__setattr__(self, "mistake", expression.mistake)
        object.__setattr__(self, "_evaluate", expression.evaluate)

    def __call__(self, event: "Event | BaseCloudEvent") -> bool:
        """Whether the event matches."""
        try:
            return self._evaluate(event) is True
        except AttributeError:
            # An event of the SDK. A type check before would slow down all others.
            return self._evaluate(as_event(event)) is True


def _checked(dialect: str, attributes: object) -> dict[str, str]:
    if not isinstance(attributes, Mapping) or not attributes:
        raise ConfigError(f'{dialect} takes at least one attribute, as in {dialect}({{"type": "…"}}).')
    for name, text in attributes.items():
        if not isinstance(name, str) or not is_name(name) or name == "data":
            raise ConfigError(f"{dialect}: {name!r} is not an attribute name. Use lower-case letters and digits.")
        if not isinstance(text, str) or not text:
            raise ConfigError(f"{dialect}: {name} is compared to {text!r}. Use a string that is not empty.")
    return dict(attributes)


def _members(dialect: str, filters: object) -> tuple["EventFilter", ...]:
    members = tuple(filters) if isinstance(filters, Iterable) and not isinstance(filters, str | Mapping) else ()
    if not members or not all(callable(member) for member in members):
        raise ConfigError(f"{dialect} takes a list of at least one filter, not {filters!r}.")
    return members


def _lookup(name: str) -> _Lookup:
    """The function that finds an attribute's text. It is chosen once, not for each event."""
    if name in ("id", "source", "type", "subject", "specversion"):
        return attrgetter(name)
    if name == "schemaurl":  # its name before 1.0; an extension of that name wins
        return lambda event: event.attribute(name) or event.get_dataschema()
    if name == "dataschema":
        return lambda event: event.get_dataschema()
    if name == "datamediatype":
        return lambda event: event.attribute(name) or event.get_datacontenttype()
    return lambda event: event.attribute(name)


def _value(name: str) -> "Callable[[Event], ExtensionValue | None]":
    """The function that finds an attribute's value under exactly this name."""
    if name in ("id", "source", "type", "subject", "specversion"):
        return attrgetter(name)
    return lambda event: event.value(name)


def _exact(lookup: _Lookup, text: str) -> "EventFilter":
    return lambda event: lookup(event) == text


def _prefix(lookup: _Lookup, text: str) -> "EventFilter":
    return lambda event: (found := lookup(event)) is not None and found.startswith(text)


def _suffix(lookup: _Lookup, text: str) -> "EventFilter":
    return lambda event: (found := lookup(event)) is not None and found.endswith(text)


def _all(filters: "list[EventFilter] | tuple[EventFilter, ...]") -> "EventFilter":
    if len(filters) == 1:
        return filters[0]

    def matches(event: "Event") -> bool:
        for member in filters:  # noqa: SIM110 - a generator would cost more than most filters
            if not member(event):
                return False
        return True

    return matches


def _any(filters: tuple["EventFilter", ...]) -> "EventFilter":
    def matches(event: "Event") -> bool:
        for member in filters:  # noqa: SIM110 - as above
            if member(event):
                return True
        return False

    return matches
