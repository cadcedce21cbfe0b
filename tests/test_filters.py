import json
from datetime import UTC, datetime
from typing import Any as Anything

import pytest
from cloudevents.core.v1.event import CloudEvent
from hypothesis import given
from hypothesis import strategies as st

from pgbackend.codec.event import Event
from pgbackend.codec.wire import parse_structured
from pgbackend.errors import ConfigError, EventError
from pgbackend.filters import CESQL, All, Any, Exact, Not, Prefix, Suffix
from pgbackend.model import EventFilter


def event(**members: object) -> Event:
    bare = {"specversion": "1.0", "id": "1", "source": "/shop/eu", "type": "order.created"}
    return parse_structured(json.dumps({**bare, **members}).encode())


def always(event: Event) -> bool:
    return True


def never(event: Event) -> bool:
    return False


@pytest.mark.parametrize(
    ("matches", "dialect"),
    [
        (True, Exact({"type": "order.created"})),
        (False, Exact({"type": "Order.created"})),
        (False, Exact({"type": "order"})),
        (True, Prefix({"type": "order."})),
        (True, Prefix({"type": "order.created"})),
        (False, Prefix({"type": "created"})),
        (True, Suffix({"type": ".created"})),
        (False, Suffix({"type": "order."})),
        (True, Exact({"type": "order.created", "source": "/shop/eu"})),
        (False, Exact({"type": "order.created", "source": "/shop/us"})),
        (True, Prefix({"type": "order", "source": "/shop/", "id": "1", "specversion": "1"})),
        (False, Suffix({"type": "created", "source": "us"})),
    ],
)
def test_texts_are_compared_exactly_and_every_attribute_counts(matches: bool, dialect: EventFilter) -> None:
    assert dialect(event()) is matches


@pytest.mark.parametrize("dialect", [Exact, Prefix, Suffix])
@pytest.mark.parametrize(
    "attribute",
    ["subject", "time", "dataschema", "schemaurl", "datacontenttype", "datamediatype", "partitionkey", "custom"],
)
def test_an_absent_attribute_matches_nothing_and_not_is_plain_negation(
    dialect: type[Exact] | type[Prefix] | type[Suffix], attribute: str
) -> None:
    absent = dialect({attribute: "x"})
    assert absent(event()) is False
    assert absent(event(**{attribute: None})) is False
    assert Not(absent)(event()) is True
    assert Not(Not(absent))(event()) is False


def test_an_empty_extension_is_present_but_begins_with_nothing() -> None:
    assert Prefix({"custom": "x"})(event(custom="")) is False
    assert Exact({"custom": "x"})(event(custom="")) is False


@pytest.mark.parametrize(
    ("value", "text"), [(42, "42"), (-1, "-1"), (0, "0"), (True, "true"), (False, "false"), ("é", "é"), ("1.0", "1.0")]
)
def test_values_compare_by_their_canonical_text(value: object, text: str) -> None:
    for dialect in (Exact, Prefix, Suffix):
        assert dialect({"custom": text})(event(custom=value))
        assert not dialect({"custom": text.upper() + "x"})(event(custom=value))


def test_time_compares_as_the_text_that_came_in() -> None:
    filtered = event(time="2026-01-02t03:04:05.123456789+00:00")
    assert Exact({"time": "2026-01-02t03:04:05.123456789+00:00"})(filtered)
    assert Prefix({"time": "2026-01-02"})(filtered)
    assert not Exact({"time": "2026-01-02T03:04:05.123456789Z"})(filtered)


def test_attribute_names_from_before_1_0_work() -> None:
    filtered = event(dataschema="urn:x", datacontenttype="text/plain", partitionkey="k")
    for attribute, text in {"dataschema": "urn:x", "datacontenttype": "text/plain", "partitionkey": "k"}.items():
        assert Exact({attribute: text})(filtered)
    assert Exact({"schemaurl": "urn:x"})(filtered)
    assert Exact({"datamediatype": "text/plain"})(filtered)
    assert Exact({"schemaurl": "own"})(event(dataschema="urn:x", schemaurl="own"))
    old = parse_structured(b'{"specversion":"0.3","id":"1","source":"/","type":"t","schemaurl":"urn:x"}')
    assert Exact({"schemaurl": "urn:x"})(old)
    assert Exact({"dataschema": "urn:x"})(old)


def test_filters_combine_with_each_other_and_with_functions() -> None:
    assert All([always, Any([never, Exact({"id": "1"})]), Not(never)])(event())
    assert not All([always, never])(event())
    assert not Any([never, never])(event())
    assert Any(filter_ for filter_ in (never, always))(event())
    assert All([always])(event())


@given(st.lists(st.booleans(), min_size=1), st.booleans())
def test_combinations_are_plain_logic(results: list[bool], one: bool) -> None:
    filters = [always if result else never for result in results]
    assert All(filters)(event()) is all(results)
    assert Any(filters)(event()) is any(results)
    assert Not(always if one else never)(event()) is not one


@given(st.text(st.characters(exclude_categories=("Cc", "Cs", "Cn")), min_size=1), st.data())
def test_dialects_agree_with_python(text: str, draw: st.DataObject) -> None:
    needle = draw.draw(st.one_of(st.text(min_size=1), st.integers(1, len(text)).map(lambda n: text[:n])))
    filtered = event(subject=text)
    assert Exact({"subject": needle})(filtered) is (text == needle)
    assert Prefix({"subject": needle})(filtered) is text.startswith(needle)
    assert Suffix({"subject": needle})(filtered) is text.endswith(needle)


@pytest.mark.parametrize("dialect", [Exact, Prefix, Suffix])
@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"": "x"},
        {"type": ""},
        {"Type": "x"},
        {"ce-type": "x"},
        {"type\n": "x"},
        {"data": "x"},
        {"type": 42},
        {"type": None},
        {"type": True},
        {1: "x"},
        {"type": "x", "source": ""},
        [("type", "x")],
        "type",
        None,
    ],
)
def test_a_filter_without_meaning_is_refused_when_it_is_created(
    dialect: type[Exact] | type[Prefix] | type[Suffix], attributes: Anything
) -> None:
    with pytest.raises(ConfigError, match=dialect.__name__):
        dialect(attributes)


@pytest.mark.parametrize("combination", [All, Any])
@pytest.mark.parametrize("filters", [[], (), [None], [{"type": "x"}], "type", {"type": "x"}, None, always])
def test_combinations_of_nothing_or_of_no_filters_are_refused(
    combination: type[All] | type[Any], filters: Anything
) -> None:
    with pytest.raises(ConfigError, match=combination.__name__):
        combination(filters)


@pytest.mark.parametrize("inner", [None, {"type": "x"}, "type"])
def test_not_takes_a_filter(inner: Anything) -> None:
    with pytest.raises(ConfigError, match="Not"):
        Not(inner)


def test_filters_are_values() -> None:
    attributes = {"type": "x"}
    made = Exact(attributes)
    attributes["type"] = "y"
    assert made == Exact({"type": "x"}) != Exact({"type": "y"})
    other: object = Prefix({"type": "x"})
    assert made != other
    assert All([made, Not(made)]) == All((Exact({"type": "x"}), Not(made)))
    assert len({made, Exact({"type": "x"}), Any([made]), Any([made]), Suffix({"a": "b"}), Prefix({"a": "b"})}) == 4
    assert repr(All([made])) == "All(filters=(Exact(attributes={'type': 'x'}),))"
    with pytest.raises(AttributeError):
        made.attributes = {"type": "z"}  # type: ignore[misc]  # that is the point


@pytest.mark.parametrize(
    "dialect",
    [
        Exact({"type": "order.created", "items": "3"}),
        Exact({"time": "2026-01-02T03:04:05Z"}),
        Prefix({"datacontenttype": "text/"}),
        Suffix({"dataschema": "/schema"}),
        CESQL("items > 2 AND LENGTH(subject) = 2"),
        All([Prefix({"source": "/shop"}), Any([CESQL("EXISTS items"), Exact({"id": "2"})])]),
        Not(Exact({"id": "2"})),
    ],
    ids=repr,
)
def test_an_event_of_the_sdk_gives_the_same_result(dialect: EventFilter) -> None:
    attributes = {
        "id": "1", "source": "/shop", "type": "order.created", "subject": "eu", "items": 3,
        "datacontenttype": "text/plain", "dataschema": "https://shop/schema",
        "time": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
    }  # fmt: skip
    accepts: Anything = dialect
    assert accepts(CloudEvent(attributes, "text"))
    assert not All([dialect, Exact({"id": "2"})])(CloudEvent(attributes, "text"))  # type: ignore[arg-type] # the point
    with pytest.raises(EventError, match="Expected a CloudEvent"):
        accepts("no event")
