"""Which events a subscription takes: predicates on attributes, in the dialects of CloudEvents' Subscriptions API.

`subscribe(filter=…)` takes one of these or any function of an `Event`; they combine. Called on their own, they take an
event of the SDK as well, and raise `EventError` for what is no valid one. What they promise: texts are
compared exactly, case included; integers and booleans by their canonical text (`42`, `true`), in CESQL by their type;
`time` by the text that came in; and an attribute that an event lacks matches nothing, whatever the dialect. A filter
that could never mean anything raises `ConfigError` when it is made.
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
"""Of an `Event`; fails with AttributeError for an event of the SDK."""


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
            # An event of the SDK: asking for its type first would cost each other one.
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
            # An event of the SDK: asking for its type first would cost each other one.
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
            # An event of the SDK: asking for its type first would cost each other one.
            return self._matches(as_event(event))

    def __hash__(self) -> int:
        return hash(frozenset(self.attributes.items()))


@dataclass(frozen=True, slots=True)
class All:
    """Matches when every one of these filters does."""

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
    """Matches when at least one of these filters does."""

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
    """Matches when this filter does not; so also when an attribute that it names is absent.

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
    """Matches when this expression in CloudEvents SQL, version 1, is true; not when its evaluation fails anywhere.

    >>> from pgbackend.codec.wire import parse_structured
    >>> event = parse_structured(b'{"specversion":"1.0","id":"1","source":"/shop","type":"order.created","items":3}')
    >>> CESQL("type LIKE 'order.%' AND items > 2")(event)
    True
    >>> CESQL("subject != 'x'")(event), CESQL("NOT EXISTS subject OR subject != 'x'")(event)
    (False, True)

    An attribute that the event lacks is an error, as are a division by zero and a text that is no number where one is
    wanted; what AND and OR need not evaluate is none. AND and OR bind equally: use parentheses.

    Raises `ConfigError` with line and column when the text is no expression. A call of a function that does not exist
    is, in the words of the specification, an error of evaluation: it is logged here, and `mistake` says it.
    """

    text: str
    mistake: str | None = field(init=False, repr=False, compare=False)
    """What fails with every event that the evaluation gets so far with; None when nothing is sure to."""
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
            # An event of the SDK: asking for its type first would cost each other one.
            return self._evaluate(as_event(event)) is True


def _checked(dialect: str, attributes: object) -> dict[str, str]:
    if not isinstance(attributes, Mapping) or not attributes:
        raise ConfigError(f'{dialect} takes at least one attribute, as in {dialect}({{"type": "…"}}).')
    for name, text in attributes.items():
        if not isinstance(name, str) or not is_name(name) or name == "data":
            raise ConfigError(f"{dialect}: {name!r} is no attribute name. Use lower-case letters and digits.")
        if not isinstance(text, str) or not text:
            raise ConfigError(f"{dialect}: {name} is compared to {text!r}. Use a string that is not empty.")
    return dict(attributes)


def _members(dialect: str, filters: object) -> tuple["EventFilter", ...]:
    members = tuple(filters) if isinstance(filters, Iterable) and not isinstance(filters, str | Mapping) else ()
    if not members or not all(callable(member) for member in members):
        raise ConfigError(f"{dialect} takes a list of at least one filter, not {filters!r}.")
    return members


def _lookup(name: str) -> _Lookup:
    """How to find an attribute's text: the way there is decided once, not for each event."""
    if name in ("id", "source", "type", "subject", "specversion"):
        return attrgetter(name)
    if name == "schemaurl":  # the name before 1.0, unless an event has an extension of that name
        return lambda event: event.attribute(name) or event.get_dataschema()
    if name == "dataschema":
        return lambda event: event.get_dataschema()
    if name == "datamediatype":
        return lambda event: event.attribute(name) or event.get_datacontenttype()
    return lambda event: event.attribute(name)


def _value(name: str) -> "Callable[[Event], ExtensionValue | None]":
    """How to find an attribute's value under exactly this name."""
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
        for member in filters:  # noqa: SIM110 - a generator would cost more than most of what it asks
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
