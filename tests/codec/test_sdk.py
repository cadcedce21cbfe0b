from datetime import UTC, datetime
from enum import Enum, IntEnum
from typing import Any
from unittest.mock import patch

import pytest
from cloudevents.core.bindings.http import HTTPMessage
from cloudevents.core.v1.event import CloudEvent
from hypothesis import given
from hypothesis import strategies as st

from pgbackend.codec.attributes import COLUMNS, event_size
from pgbackend.codec.event import Event
from pgbackend.codec.sdk import encode
from pgbackend.codec.wire import write_binary
from pgbackend.errors import EventError
from tests.support.codec import BARE, again_binary, again_structured, attributes, content_type, json_value, put, sdk


@given(attributes, json_value, st.none() | content_type)
def test_sdk_data_come_back_as_they_were_given(values: dict[str, Any], data: Any, kind: str | None) -> None:
    values.pop("time", None)
    given_attributes = values | ({"datacontenttype": kind} if kind else {})
    event = put(sdk(data, **given_attributes))
    for version in (event, again_structured(event)):
        came = version.get_data()
        assert came == data
        assert type(came) is type(data)
        assert version.get_attributes() == {"time": datetime(2026, 1, 2, tzinfo=UTC), **given_attributes}
    assert again_binary(event).data_bytes == event.data_bytes or data == ""


class Loose:
    """An event with unchecked attributes."""

    def __init__(self, attributes: dict[str, Any]) -> None:
        self._attributes = attributes

    def get_attributes(self) -> dict[str, Any]:
        return self._attributes

    def get_data(self) -> bytes:
        return b"{}"


anything = st.one_of(
    st.sampled_from(["", " ", "/s", "a b", "x\x00", "\ud800", "application/json", "2026-01-01T00:00:00Z"]),
    st.text(max_size=5), st.none(), st.integers(), st.booleans(), st.datetimes(timezones=st.sampled_from([UTC])),
    st.datetimes(), st.lists(st.text(max_size=2), max_size=2), st.binary(max_size=3),
)  # fmt: skip


@given(
    st.dictionaries(
        st.sampled_from([*BARE, "subject", "time", "datacontenttype", "dataschema", "partitionkey", "a"]),
        anything,
    )
)  # fmt: skip
def test_the_fast_road_of_plain_events_has_the_same_result(values: dict[str, Any]) -> None:
    def outcome() -> object:
        try:
            return encode(Loose({**BARE, **values}), max_event_bytes=1 << 20)  # type: ignore[arg-type] # as good as one
        except EventError as error:
            return str(error)

    fast = outcome()
    with patch("pgbackend.codec.sdk._plain_texts", lambda _: None):
        assert outcome() == fast


@given(st.binary(), st.none() | content_type)
def test_sdk_bytes_stay_bytes_whatever_the_content_type(data: bytes, kind: str | None) -> None:
    event = put(sdk(data, **({"datacontenttype": kind} if kind else {})))
    assert event.get_data() == data == again_structured(event).get_data()
    assert write_binary(event)[1] == data


def test_a_row_has_the_columns_in_order() -> None:
    row, _ = encode(
        sdk(
            {"a": 1}, subject="s", datacontenttype="application/json", dataschema="urn:x", partitionkey="k", n=1, b=True
        ),
        max_event_bytes=9999,
    )
    assert dict(zip(COLUMNS, row, strict=True)) == {
        "specversion": "1.0",
        "id": "1",
        "source": "/s",
        "type": "t",
        "subject": "s",
        "time": "2026-01-02T00:00:00Z",
        "datacontenttype": "application/json",
        "dataschema": "urn:x",
        "partitionkey": "k",
        "extensions": '{"n":1,"b":true}',
        "data": b'{"a":1}',
        "data_encoding": "json",
    }


def test_the_log_does_not_share_the_producers_objects() -> None:
    given_attributes, data, octets = {**BARE, "time": datetime.now(UTC)}, {"a": [1]}, bytearray(b"x")
    event, other = CloudEvent(given_attributes, data), CloudEvent(dict(given_attributes), octets)  # type: ignore[arg-type]
    (row, _), (other_row, _) = encode(event, max_event_bytes=9999), encode(other, max_event_bytes=9999)
    given_attributes["id"], octets[0] = "changed", 0
    data["a"].append(2)
    assert (row[1], row[10], other_row[10]) == ("1", b'{"a":[1]}', b"x")
    assert set(given_attributes) == {*BARE, "time"}


class Colour(str, Enum):  # noqa: UP042 - the kind whose str() is not its value
    RED = "red"


class Level(IntEnum):
    HIGH = 3


def test_extension_values_take_their_cloudevents_form() -> None:
    event = put(
        sdk(e=Colour.RED, i=Level.HIGH, b=b"\x00\xff", t=datetime(2026, 1, 2, 3, tzinfo=UTC), absent=None, flag=False)
    )
    assert {name: event.get_extension(name) for name in ("e", "i", "b", "t", "absent", "flag")} == {
        "e": "red",
        "i": 3,
        "b": "AP8=",
        "t": "2026-01-02T03:00:00Z",
        "absent": None,
        "flag": False,
    }
    assert {type(value) for value in event.get_attributes().values()} == {str, int, bool, datetime}
    assert dict(write_binary(event)[0])["ce-flag"] == "false"


@pytest.mark.parametrize(
    "value",
    [1.5, 2**31, {}, ["x"], object(), datetime(2026, 1, 1), 1 + 2j, "a\nb", "\ud800"],  # noqa: DTZ001 - without a zone
)
def test_attribute_values_that_the_sdk_lets_through_are_refused(value: object) -> None:
    with pytest.raises(EventError, match="'custom'"):
        encode(sdk(custom=value), max_event_bytes=9999)


@pytest.mark.parametrize("bad", ["foo\n", "datacontenttype"])
def test_names_and_content_types_that_the_sdk_lets_through_are_refused(bad: str) -> None:
    with pytest.raises(EventError):
        encode(sdk(**{bad: "text/plain\r\nX-Evil: 1"}), max_event_bytes=9999)


@pytest.mark.parametrize("thing", [None, {}, "event", HTTPMessage({}, b""), BARE])
def test_objects_that_are_not_events_are_refused(thing: Any) -> None:
    with pytest.raises(EventError, match="Expected a CloudEvent"):
        encode(thing, max_event_bytes=9999)


def test_size_is_checked_to_the_byte() -> None:
    event = sdk("é" * 100, datacontenttype="text/plain", subject="ü")
    row, _ = encode(event, max_event_bytes=9999)
    size = event_size(row)
    assert size == sum(len(value.encode() if isinstance(value, str) else value or b"") for value in row[:11])
    assert encode(event, max_event_bytes=size)[0] == row
    for too_large in (event, Event(row)):
        with pytest.raises(EventError, match="max_event_bytes"):
            encode(too_large, max_event_bytes=size - 1)
