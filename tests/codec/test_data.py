import base64
import json
import math
from collections.abc import Callable
from datetime import UTC, datetime
from enum import IntEnum, StrEnum

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgbackend.codec.data import encode_data
from pgbackend.codec.event import Event
from pgbackend.codec.sdk import encode
from pgbackend.codec.wire import parse_structured, write_structured
from pgbackend.errors import EventError
from tests.support.codec import again_structured, put, sdk, structured


def test_a_json_string_is_not_parsed_again() -> None:
    event = parse_structured(structured(datacontenttype="application/json", data='{"a":1}'))
    assert event.get_data() == '{"a":1}'
    assert event.data_bytes == b'"{\\"a\\":1}"'


def test_an_object_under_another_content_type_stays_an_object() -> None:
    event = parse_structured(structured(datacontenttype="application/xml", data={"a": 1}))
    assert event.get_data() == {"a": 1} == again_structured(event).get_data()


circle: list[object] = []
circle.append(circle)
deep: list[object] = []
for _ in range(100_000):
    deep = [deep]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({1: "x"}, "key 1"),
        ({"a": {None: 1}}, "key None"),
        ({"a": (1, 2)}, "tuple"),
        ((1, 2), "tuple"),
        ({"a": {1}}, "set"),
        ([b"x"], "bytes"),
        ([datetime(2026, 1, 1, tzinfo=UTC)], "datetime"),
        (math.nan, "JSON"),
        ([math.inf], "JSON"),
        ({"a": object()}, "object"),
        (object(), "object"),
        ("\ud800", "surrogate"),
        (["\ud83d\ude00"], "surrogate"),
        (circle, "nested"),
        (deep, "nested"),
        (10**5000, "JSON"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_data_that_json_would_change_is_refused_with_the_reason(data: object, reason: str) -> None:
    with pytest.raises(EventError, match=reason):
        encode(sdk(data), max_event_bytes=1 << 20)
    if data == "\ud800":
        with pytest.raises(EventError, match=reason):
            encode(sdk(data, datacontenttype="text/plain"), max_event_bytes=9999)


@pytest.mark.parametrize(
    "make",
    [
        lambda: parse_structured(structured(data_base64=base64.b64encode("é".encode()).decode())),
        lambda: put(sdk("é".encode())),
    ],
)
def test_octets_in_utf8_stay_octets(make: Callable[[], Event]) -> None:
    event = make()
    assert event.get_data() == "é".encode()
    assert json.loads(write_structured(event))["data_base64"] == "w6k="


class Kind(StrEnum):
    ORDER = "order"


class Count(IntEnum):
    TWO = 2


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats()
    | st.text(st.characters())
    | st.sampled_from([*Kind, *Count, 1e16, -0.0, 5e-324, "null", 1 << 64]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(json_values)
def test_data_is_written_as_json_would_write_its_value(value: object) -> None:
    try:
        plain = json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except ValueError:  # NaN, infinity, a lone surrogate
        with pytest.raises(EventError):
            encode_data(value, None)
        return
    written, _ = encode_data(value, "application/json")
    assert (written is None) == (value is None)
    if written is not None:
        assert repr(json.loads(written)) == repr(json.loads(plain))
