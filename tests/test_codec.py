import base64
import json
import math
import pickle
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from enum import Enum, IntEnum
from typing import Any
from unittest.mock import patch

import pytest
from cloudevents.core.base import BaseCloudEvent
from cloudevents.core.bindings.http import HTTPMessage, from_http, to_binary, to_structured
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v03.event import CloudEvent as CloudEvent03
from cloudevents.core.v1.event import CloudEvent
from hypothesis import given
from hypothesis import strategies as st

from pgbackend import sdk, wire
from pgbackend.attributes import COLUMNS, size_of
from pgbackend.errors import EventError
from pgbackend.event import Event, attributes_with
from pgbackend.sdk import encode
from pgbackend.wire import (
    ContentTypeError,
    mode_of,
    parse_batch,
    parse_binary,
    parse_structured,
    write_batch,
    write_binary,
    write_structured,
)

BARE: dict[str, Any] = {"specversion": "1.0", "id": "1", "source": "/s", "type": "t"}


def structured(**members: object) -> bytes:
    return json.dumps({**BARE, **members}).encode()


def with_member(text: str) -> bytes:
    """A structured event with members that no JSON writer would write."""
    return f'{{"specversion":"1.0","id":"1","source":"/s","type":"t",{text}}}'.encode()


def binary(body: bytes = b"", /, content_type: str | None = None, **headers: str | bytes) -> Event:
    octets = {name: value if isinstance(value, bytes) else value.encode() for name, value in headers.items()}
    given_headers = {b"ce-" + k.encode(): v for k, v in ({k: v.encode() for k, v in BARE.items()} | octets).items()}
    if content_type is not None:
        given_headers[b"Content-Type"] = content_type.encode()
    return parse_binary(given_headers.items(), body)


def again_binary(event: Event) -> Event:
    headers, body = write_binary(event)
    return parse_binary([(name.encode("ascii"), value.encode("ascii")) for name, value in headers], body)


def again_structured(event: Event) -> Event:
    return parse_structured(write_structured(event))


def again_batch(event: Event) -> Event:
    first, second = parse_batch(write_batch([event, event]))
    assert first == second
    return first


def sdk(data: object = None, **attributes: object) -> CloudEvent:
    return CloudEvent({**BARE, "time": datetime(2026, 1, 2, tzinfo=UTC), **attributes}, data)  # type: ignore[arg-type]


def put(event: BaseCloudEvent) -> Event:
    return Event(encode(event, max_event_bytes=1 << 20))


# ── bytes and texts stay what they were ──────────────────────────────────────────────────────────────────────────────

name = st.from_regex(r"[a-z0-9]{1,20}", fullmatch=True).filter(
    lambda name: name not in {"data", "dataschema", "datacontenttype", "partitionkey", "time", "subject", *BARE}
)
legal_characters = st.characters(exclude_categories=("Cc", "Cs", "Cn"))
text = st.text(legal_characters)
non_empty = st.text(legal_characters, min_size=1)
uri_reference = st.from_regex(r"[A-Za-z0-9/:._~é-]{1,20}(%[0-9A-F]{2}){0,2}", fullmatch=True)
extension = st.one_of(text, st.booleans(), st.integers(-(2**31), 2**31 - 1))
time = st.builds(
    lambda moment, fraction, zone: moment.strftime("%Y-%m-%dT%H:%M:%S").zfill(19) + fraction + zone,
    st.datetimes(min_value=datetime(1, 1, 1)),  # noqa: DTZ001 - the zone is drawn apart
    st.sampled_from(["", ".1", ".123456789", ".000000000000"]),
    st.sampled_from(["Z", "z", "+00:00", "-00:00", "+23:59"]),
)
attributes = st.builds(
    lambda required, optional, extensions: {**extensions, **required, **optional},
    st.fixed_dictionaries({"specversion": st.just("1.0"), "id": non_empty, "source": uri_reference, "type": non_empty}),
    st.fixed_dictionaries(
        {}, optional={"subject": non_empty, "time": time, "partitionkey": non_empty, "dataschema": st.just("urn:x")}
    ),
    st.dictionaries(name, extension, max_size=4),
)
json_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=12,
)
json_text = st.builds(
    lambda value, indent, ascii_only: json.dumps(value, indent=indent, ensure_ascii=ascii_only),
    json_value,
    st.sampled_from([None, 0, 1, "\t"]),
    st.booleans(),
)
content_type = st.sampled_from(
    [
        "application/json",
        "Application/JSON; charset=utf-8",
        "text/plain",
        "text/plain; charset=latin1",
        "text/json",
        "application/octet-stream",
        "application/x+json",
        "image/png",
        "text/csv ;header=present",
    ]
)


def canonical(values: dict[str, Any]) -> dict[str, str]:
    return {name: {True: "true", False: "false"}[v] if isinstance(v, bool) else str(v) for name, v in values.items()}


@given(attributes, json_text, st.sampled_from([None, "application/json", "application/a+json"]), st.booleans())
def test_structured_json_is_kept_as_its_very_text(
    values: dict[str, Any], data: str, kind: str | None, first: bool
) -> None:
    if kind:
        values["datacontenttype"] = kind
    rest = json.dumps(values)[1:-1]
    body = f'{{"data" : {data} ,{rest}}}' if first else f'{{{rest},"data":\n{data}\n}}'
    event = parse_structured(body.encode())
    assert event.data_bytes == data.encode()
    assert event.attributes_text == canonical(values)
    assert again_structured(event).row == event.row == again_batch(event).row
    assert event.get_data() == json.loads(data)
    hop = again_binary(event)
    assert hop.data_bytes == event.data_bytes
    assert hop.attributes_text == event.attributes_text | {"datacontenttype": kind or "application/json"}


@given(attributes, text, st.sampled_from(["text/plain", "application/xml"]))
def test_structured_text_is_kept_as_text(values: dict[str, Any], data: str, kind: str) -> None:
    event = parse_structured(json.dumps({**values, "datacontenttype": kind, "data": data}).encode())
    assert event.get_data() == data
    assert again_structured(event).row == event.row
    assert (again_binary(event).data_bytes or b"") == data.encode()


@given(attributes, st.binary(), st.none() | content_type)
def test_structured_octets_are_kept(values: dict[str, Any], data: bytes, kind: str | None) -> None:
    body = {**values, "datacontenttype": kind, "data_base64": base64.b64encode(data).decode()}
    event = parse_structured(json.dumps(body).encode())
    assert event.get_data() == data
    assert again_structured(event).row == event.row == again_batch(event).row
    assert again_structured(again_binary(event)).data_bytes == (data or None)
    assert again_binary(event).attributes_text == event.attributes_text


@given(attributes, st.one_of(st.binary(min_size=1), json_text.map(str.encode)), st.none() | content_type)
def test_a_binary_body_is_kept_over_every_mix_of_modes(values: dict[str, Any], body: bytes, kind: str | None) -> None:
    start = parse_structured(json.dumps({**values, "datacontenttype": kind}).encode())
    headers, _ = write_binary(start)
    event = parse_binary([(k.encode(), v.encode()) for k, v in headers], body)
    assert event.data_bytes == body
    assert event.attributes_text == start.attributes_text
    assert again_binary(event).row == event.row
    if kind and "json" in kind:  # white space around a JSON text is the envelope's, once it stands in one
        assert (again_structured(event).data_bytes or b"").strip(b" \t\r\n") == body.strip(b" \t\r\n")
    else:
        assert again_structured(event).data_bytes == body
        assert again_binary(again_structured(event)).data_bytes == body
    assert again_structured(event).attributes_text == start.attributes_text


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
    """An event whose attributes nobody has checked."""

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
def test_the_short_way_of_plain_events_says_what_the_long_way_says(values: dict[str, Any]) -> None:
    def outcome() -> object:
        try:
            return encode(Loose({**BARE, **values}), max_event_bytes=1 << 20)  # type: ignore[arg-type] # as good as one
        except EventError as error:
            return str(error)

    short = outcome()
    with patch.object(_sdk, "_plain_texts", lambda _: None):
        assert outcome() == short


@given(st.binary(), st.none() | content_type)
def test_sdk_bytes_stay_bytes_whatever_the_content_type(data: bytes, kind: str | None) -> None:
    event = put(sdk(data, **({"datacontenttype": kind} if kind else {})))
    assert event.get_data() == data == again_structured(event).get_data()
    assert write_binary(event)[1] == data


@pytest.mark.parametrize(
    "moment",
    ["2026-01-02T03:04:05.123456789Z", "2016-12-31T23:59:60Z", "1985-04-12t23:20:50.52z", "2026-01-02T03:04:05-00:00"],
)
def test_times_keep_their_text_in_all_modes(moment: str) -> None:
    event = parse_structured(structured(time=moment))
    for version in (event, again_structured(event), again_binary(event), put(event)):
        assert version.attributes_text["time"] == moment
        assert version.attribute("time") == moment
    assert event.get_time() is not None


def test_a_time_reads_as_a_datetime_as_far_as_that_goes() -> None:
    def read(moment: str) -> datetime | None:
        return parse_structured(structured(time=moment)).get_time()

    assert read("2026-01-02T03:04:05.123456789Z") == datetime(2026, 1, 2, 3, 4, 5, 123456, UTC)
    assert read("2016-12-31T23:59:60.5Z") == datetime(2016, 12, 31, 23, 59, 59, 500000, UTC)
    assert read("1985-04-12t23:20:50.5z") == datetime(1985, 4, 12, 23, 20, 50, 500000, UTC)
    assert read("2026-01-02T03:04:05+01:30") == datetime(2026, 1, 2, 3, 4, 5, 0, timezone(timedelta(minutes=90)))


def test_null_data_and_no_data_stay_apart() -> None:
    null, none = parse_structured(structured(data=None)), parse_structured(structured())
    assert (null.data_bytes, none.data_bytes) == (b"null", None)
    assert (null.get_data(), none.get_data()) == (None, None)
    assert b'"data":null' in write_structured(null)
    assert b"data" not in write_structured(none)
    assert write_binary(null)[1] == b"null"
    assert write_binary(none) == ([("ce-" + name, value) for name, value in BARE.items()], b"")


def test_json_that_python_would_change_passes_untouched() -> None:
    data = '{"n": 1.10, "n": 12345678901234567890.123456789, "e": 1E400, "u": "\\u00e9\\/"}'
    event = parse_structured(with_member(f'"data": {data}'))
    assert event.data_bytes == data.encode()
    assert data in write_structured(event).decode()


def test_a_json_string_is_not_parsed_again() -> None:
    event = parse_structured(structured(datacontenttype="application/json", data='{"a":1}'))
    assert event.get_data() == '{"a":1}'
    assert event.data_bytes == b'"{\\"a\\":1}"'


def test_an_object_under_another_content_type_stays_an_object() -> None:
    event = parse_structured(structured(datacontenttype="application/xml", data={"a": 1}))
    assert event.get_data() == {"a": 1} == again_structured(event).get_data()


def test_octets_that_are_no_content_of_their_type_travel_as_base64() -> None:
    for kind in ("application/json", "text/plain"):
        event = binary(b"\xff{", content_type=kind)
        assert event.get_data() == b"\xff{"
        assert json.loads(write_structured(event))["data_base64"] == base64.b64encode(b"\xff{").decode()
    assert "data_base64" in json.loads(write_structured(binary(b"NaN", content_type="application/json")))


def test_a_body_without_content_type_is_octets_and_gets_none() -> None:
    event = binary(b"[1]")
    assert event.get_data() == b"[1]"
    assert "content-type" not in dict(write_binary(event)[0])
    assert "content-type" not in dict(write_binary(parse_structured(structured(data_base64="AA==")))[0])


def test_data_without_content_type_are_said_to_be_json_in_binary_mode() -> None:
    assert dict(write_binary(parse_structured(structured(data=[1])))[0])["content-type"] == "application/json"


def test_data_in_front_and_data_in_a_string_are_told_apart() -> None:
    event = parse_structured(
        b'{"data":[1],"specversion":"1.0","id":"data","source":"\\"data\\"x"}'.replace(b'\\"', b"%22").replace(
            b"}", b',"type":"data","x":"data","datax":"1"}'
        )
    )
    assert event.data_bytes == b"[1]"
    assert event.get_extension("x") == "data"
    event = parse_structured(b'{"type":"data","id":"1","source":"/","\\u0064ata": [ 2 ],"specversion":"1.0"}')
    assert event.data_bytes == b"[ 2 ]"


def test_events_without_data_and_with_it_share_a_batch() -> None:
    events = parse_batch(
        b" [ " + structured() + b"," + structured(data={"data": 1}) + b" , " + structured(x=1) + b" ] "
    )
    assert [event.get_data() for event in events] == [None, {"data": 1}, None]
    assert parse_batch(b"[]") == parse_batch(b" [ ] ") == []
    assert write_batch([]) == b"[]"


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("missing", list(BARE))
def test_missing_attributes_are_not_invented(missing: str) -> None:
    members = {name: value for name, value in BARE.items() if name != missing}
    for bad in (members, {**members, missing: None}, {**members, missing: ""}, {**members, missing: 1}):
        with pytest.raises(EventError, match=missing):
            parse_structured(json.dumps(bad).encode())
    with pytest.raises(EventError, match=missing):
        parse_binary([(f"ce-{name}".encode(), value.encode()) for name, value in members.items()], b"")


def test_null_attributes_are_absent() -> None:
    event = parse_structured(structured(subject=None, time=None, dataschema=None, partitionkey=None, custom=None))
    assert event.attributes_text == BARE
    assert event.row == parse_structured(structured()).row


@pytest.mark.parametrize(
    "members",
    [
        {"subject": ""},
        {"subject": 1},
        {"dataschema": ""},
        {"dataschema": "relative/path"},
        {"dataschema": "urn:"},
        {"dataschema": "urn:a b"},
        {"datacontenttype": ""},
        {"datacontenttype": "json"},
        {"datacontenttype": "text/plain\r\nX-Evil: 1"},
        {"datacontenttype": "text/plain\n"},
        {"datacontenttype": "text/plain; é"},
        {"datacontenttype": "text/plain;" + "x" * 1000},
        {"source": "a b"},
        {"source": "/a%2"},
        {"source": "/a\n"},
        {"source": "/{id}"},
        {"source": "/a\u00a0b"},
        {"partitionkey": ""},
        {"partitionkey": 1},
        {"specversion": "0.2"},
        {"specversion": "1.0\n"},
        {"specversion": 1.0},
        {"Upper": "x"},
        {"": "x"},
        {"with_underscore": "x"},
        {"foo\n": "x"},
        {"é": "x"},
        {"٣": "x"},
        {"float": 1.5},
        {"float": 1e3},
        {"object": {}},
        {"list": ["x"]},
        {"big": 2**31},
        {"big": -(2**31) - 1},
    ],
)
def test_attributes_that_cloudevents_does_not_know_are_refused(members: dict[str, Any]) -> None:
    with pytest.raises(EventError, match="'1'"):  # it names the event
        parse_structured(structured(**members))


FORBIDDEN = [
    "\x00",
    "\x1f",
    "\n",
    "\x7f",
    "\x85",
    "\x9f",
    "\ufdd0",
    "\ufdef",
    "\ufffe",
    "\uffff",
    "\U0010ffff",
    "\U0001fffe",
]


@pytest.mark.parametrize("character", [*FORBIDDEN, "\ud800"])
@pytest.mark.parametrize("attribute", ["id", "type", "subject", "custom", "partitionkey"])
def test_forbidden_characters_are_refused_everywhere(character: str, attribute: str) -> None:
    with pytest.raises(EventError, match=attribute):
        parse_structured(structured(**{attribute: f"a{character}b"}))
    with pytest.raises(EventError, match=attribute):
        encode(sdk(**{attribute: f"a{character}b"}), max_event_bytes=9999)
    if character.isascii() or character in FORBIDDEN:
        with pytest.raises(EventError, match=attribute):
            binary(**{attribute: "a" + "".join(f"%{octet:02X}" for octet in character.encode()) + "b"})


@pytest.mark.parametrize(
    "moment",
    [
        "2026-W01-1T00:00:00Z",
        "20260101T000000Z",
        "2026-01-01T24:00:00Z",
        "2026-01-01T00:00:00,5Z",
        "2026-01-01",
        "2026-01-01T00:00:00",
        "2026-02-29T00:00:00Z",
        "1900-02-29T00:00:00Z",
        "2026-04-31T00:00:00Z",
        "now",
        "",
        "0000-01-01T00:00:00Z",
        "2026-01-01 00:00:00Z",
        "2026-01-01T00:00:61Z",
        "2026-01-01T00:00:00+24:00",
        "2026-01-01T00:00:00Z\n",
        "٢026-01-01T00:00:00Z",
        "2026-13-01T00:00:00Z",
        "2026-01-00T00:00:00Z",
        "2026-01-01T00:00:00.Z",
    ],
)
def test_times_that_rfc_3339_does_not_know_are_refused(moment: str) -> None:
    with pytest.raises(EventError, match="time"):
        parse_structured(structured(time=moment))


@pytest.mark.parametrize("day", ["2024-02-29", "2000-02-29", "2026-12-31", "2026-11-30", "2026-01-29", "0001-01-01"])
def test_days_that_exist_are_taken(day: str) -> None:
    assert parse_structured(structured(time=f"{day}T00:00:00Z")).get_time() is not None


@pytest.mark.parametrize(
    "body",
    [
        with_member('"id":"2"'),
        with_member('"x":"1","x":"1"'),
        with_member('"x":"1","x":"1","data":1'),
        with_member('"data":1,"data":1'),
        with_member('"data":1,"\\u0064ata":1'),
        with_member('"data":1,"data_base64":"AA=="'),
        with_member('"data":null,"data_base64":"AA=="'),
        with_member('"data_base64":"e!!A=="'),
        with_member('"data_base64":"AAA"'),
        with_member('"data_base64":"é"'),
        with_member('"data_base64":1'),
        with_member('"data":NaN'),
        with_member('"data":[-Infinity]'),
        with_member('"x":NaN'),
        with_member('"data":"\t"'),
        with_member('"data":[1,]'),
        with_member('"data":'),
        with_member('"data":1,'),
        with_member(""),
        with_member('"data":1 2'),
        with_member('"data" 1'),
        with_member('"data":' + "[" * 100_000),
        with_member('"data":' + "[" * 100_000 + "]" * 100_000),
        with_member('"data":' + '{"a":' * 100_000 + "1" + "}" * 100_000),
        with_member('"x":' + "[" * 100_000 + "]" * 100_000 + ',"data":1'),
        with_member('"data":' + "9" * 10_000),
        with_member('"x":' + "9" * 10_000),
        with_member('"x":' + "9" * 4_000),
        with_member('"datacontenttype":"text/plain","data":"\\ud800"'),
        structured() + b"x",
        structured() + structured(),
        b"[" + structured() + b"]",
        b"",
        b" ",
        b"null",
        b'"x"',
        b"{",
        b"{}",
        b"{,}",
        b"{1:2}",
        structured()[:-1],
        structured().decode().encode("utf-16"),
        b"\xef\xbb\xbf" + structured(),
        structured(subject="x").replace(b'"x"', b'"\xff"'),
    ],
)
def test_bodies_that_are_no_event_are_refused(body: bytes) -> None:
    with pytest.raises(EventError):
        parse_structured(body)
    with pytest.raises(EventError):
        parse_batch(b"[" + structured() + b"," + body + b"]")


@pytest.mark.parametrize(
    "body", [b"{}", b"[", b"[1]", b"[]]", b"[] x", b"", structured(), b"[" + structured() + b" 1]"]
)
def test_batches_that_are_none_are_refused(body: bytes) -> None:
    with pytest.raises(EventError):
        parse_batch(body)


plain_value = st.from_regex(rb"[!-~]{1,8}", fullmatch=True)
odd_value = st.sampled_from(
    [
        b"",
        b" a",
        b"a ",
        b"a b",
        b'"q"',
        b"%41",
        b"%",
        b"\xc3\xa9",
        b"\x7f",
        b"a\\b",
        b"2026-01-02T03:04:05Z",
        b"text/plain ",
        b"text/plain; a=b ",
        b"text/plain;a=b\t",
        b"application/json",
    ]
)
message_headers = st.builds(
    lambda usual, more: [*usual.items(), *more],
    st.fixed_dictionaries(
        {b"ce-specversion": st.just(b"1.0"), b"ce-id": plain_value, b"ce-source": plain_value, b"ce-type": plain_value},
        optional={b"content-type": plain_value | odd_value, b"ce-time": odd_value, b"ce-subject": plain_value},
    ),
    st.lists(
        st.tuples(
            st.sampled_from(
                [
                    b"ce-x",
                    b"ce-partitionkey",
                    b"ce-data",
                    b"ce-id",
                    b"ce-dataschema",
                    b"ce-X",
                    b"ce-",
                    b"ce-_",
                    b"ce-datacontenttype",
                    b"ce-subject",
                    b"ce-schemaurl",
                    b"host",
                    b"content-type",
                ]
            ),
            plain_value | odd_value,
        ),
        max_size=3,
    ),
)


@given(message_headers, st.binary(max_size=3))
def test_the_short_way_of_plain_headers_leads_to_the_same_event_or_error(
    headers: list[tuple[bytes, bytes]], body: bytes
) -> None:
    # A name in capitals is not plain.
    the_long_way = outcome([(b"X-NAME", b""), *headers], body)
    assert outcome(headers, body) == the_long_way


def outcome(headers: list[tuple[bytes, bytes]], body: bytes) -> object:
    try:
        return parse_binary(headers, body).row
    except EventError as error:
        return str(error)


def test_most_headers_go_the_short_way() -> None:
    usual = [(b"host", b"x"), (b"ce-specversion", b"1.0"), (b"ce-id", b"1"), (b"ce-source", b"/"), (b"ce-type", b"t")]
    assert wire._plain_row(usual, b"") is not None
    usual += [(b"ce-time", b"2026-01-02T03:04:05.678Z"), (b"content-type", b"text/plain; charset=utf-8")]
    usual += [(b"ce-partitionkey", b"eu"), (b"ce-traceparent", b"00-4bf9-00f0-01")]
    assert wire._plain_row(usual, b"x") is not None


@given(st.binary() | st.text().map(str.encode) | json_text.map(str.encode))
def test_arbitrary_bytes_raise_nothing_but_event_errors(body: bytes) -> None:
    for parse in (parse_structured, parse_batch, lambda body: parse_batch(b"[" + body + b"]")):
        try:
            parse(body)
        except EventError:
            continue


@given(attributes, json_text, st.data())
def test_damaged_events_raise_nothing_but_event_errors(values: dict[str, Any], data: str, draw: st.DataObject) -> None:
    body = bytearray((json.dumps(values)[:-1] + f',"data":{data}}}').encode())
    for _ in range(draw.draw(st.integers(1, 3))):
        body[draw.draw(st.integers(0, len(body) - 1))] = draw.draw(st.sampled_from(b'"\\{}[],:\x00 \xffaN1'))
    try:
        event = parse_structured(bytes(body))
    except EventError:
        return
    assert again_structured(event).row == event.row


@given(
    st.lists(
        st.tuples(
            st.sampled_from([b"ce-id", b"CE-source", b"ce-type", b"ce-specversion", b"ce-x", b"content-type"])
            | st.binary().map(lambda octets: b"ce-" + octets),
            st.binary() | st.just(b"1.0"),
        )
    ),
    st.binary(),
)
def test_arbitrary_headers_raise_nothing_but_event_errors(headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    try:
        event = parse_binary(headers, body)
    except EventError:
        return
    assert again_binary(event).row == event.row


def test_errors_name_the_event_the_attribute_and_the_index() -> None:
    with pytest.raises(EventError, match=r"Batch, index 1: Event '9' of '/s': attribute 'subject' is empty"):
        parse_batch(b"[" + structured() + b"," + structured(id="9", subject="") + b"]")
    with pytest.raises(EventError) as caught:
        parse_structured(structured(id="x" * 100_000, subject=""))
    assert len(str(caught.value)) < 300


# ── modes and headers ────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_mode_is_chosen_by_content_type_alone() -> None:
    assert mode_of("application/cloudevents+json") == "structured"
    assert mode_of("Application/CloudEvents+JSON ; charset=UTF-8") == "structured"
    assert mode_of("APPLICATION/cloudevents-batch+json;x=y") == "batch"
    assert {mode_of(kind) for kind in (None, "", "application/json", "text/plain", "application/cloudevent")} == {
        "binary"
    }
    for unknown in (
        "application/cloudevents+xyz",
        "application/cloudevents-batch+avro",
        "application/cloudevents-batch",
    ):
        with pytest.raises(ContentTypeError, match="cloudevents"):
            mode_of(unknown)


@pytest.mark.parametrize(
    ("octets", "text"),
    [
        (b"caf%C3%A9", "café"),
        (b"caf%c3%a9", "café"),
        ("café".encode(), "café"),
        (b"100%", "100%"),
        (b"100%zz%4", "100%zz%4"),
        (b"%2525", "%25"),
        (b'"a \\"b\\" \\\\c"', 'a "b" \\c'),
        (b'"%20"', " "),
        (b'"', '"'),
        (b'""', ""),
        (b" \t x \t", "x"),
        (b"%41%42", "AB"),
        (b"%F0%9F%98%80", "😀"),
    ],
)
def test_headers_are_unquoted_then_decoded_once(octets: bytes, text: str) -> None:
    assert binary(custom=octets).get_extension("custom") == text


@pytest.mark.parametrize("octets", [b"%C0%A0", b"%ff", b"\xff", b"%ED%A0%80", b"%F4%90%80%80", b"a%0D%0Ab", b"%00"])
def test_headers_that_decode_to_no_text_are_refused(octets: bytes) -> None:
    with pytest.raises(EventError, match="custom"):
        binary(custom=octets)


def test_headers_are_percent_coded_as_the_binding_says() -> None:
    event = parse_structured(structured(custom=' "100%" é😀~!', flag=True, number=-5))
    headers = dict(write_binary(event)[0])
    assert headers["ce-custom"] == "%20%22100%25%22%20%C3%A9%F0%9F%98%80~!"
    assert (headers["ce-flag"], headers["ce-number"]) == ("true", "-5")


@given(text)
def test_every_legal_text_survives_a_header(value: str) -> None:
    event = parse_structured(structured(custom=value))
    assert all(header.isascii() and header.isprintable() and " " not in header for _, header in write_binary(event)[0])
    assert again_binary(event).get_extension("custom") == value


def test_header_names_come_in_any_case() -> None:
    headers = [(f"CE-{name.title()}".encode(), value.encode()) for name, value in BARE.items()]
    event = parse_binary([*headers, (b"CONTENT-TYPE", b"text/plain"), (b"Host", b"x")], b"x")
    assert event.attributes_text == {**BARE, "datacontenttype": "text/plain"}


@pytest.mark.parametrize("header", [b"ce-id", b"ce-datacontenttype", b"ce-data", b"ce-data_base64", b"ce-", b"ce-\xe9"])
def test_headers_that_no_event_has_are_refused(header: bytes) -> None:
    headers = [(f"ce-{name}".encode(), value.encode()) for name, value in BARE.items()]
    with pytest.raises(EventError):
        parse_binary([*headers, (header, b"x/y")], b"")
    with pytest.raises(EventError):
        parse_binary([*headers, (b"content-type", b"text/plain"), (b"Content-Type", b"text/plain")], b"")


def test_a_message_without_ce_headers_is_not_an_event() -> None:
    with pytest.raises(ContentTypeError):
        parse_binary([(b"content-type", b"application/json")], b"{}")


def test_binary_mode_refuses_content_types_that_would_be_read_as_another_message() -> None:
    event = parse_structured(structured(datacontenttype="application/cloudevents+json", data={}))
    with pytest.raises(EventError, match="structured"):
        write_binary(event)
    assert again_structured(event).row == event.row
    row = list(event.row)
    row[6] = "text/plain\r\nX-Evil: 1"  # what plain SQL may do
    with pytest.raises(EventError, match="content type"):
        write_binary(Event(tuple(row)))
    row[6], row[9] = None, '{"x\\r\\nevil": "1"}'
    with pytest.raises(EventError, match="attribute name"):
        write_binary(Event(tuple(row)))


# ── SDK events ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_row_has_the_columns_in_order() -> None:
    row = encode(
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
    row, other_row = encode(event, max_event_bytes=9999), encode(other, max_event_bytes=9999)
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
def test_data_that_json_would_change_are_refused_with_the_reason(data: object, reason: str) -> None:
    with pytest.raises(EventError, match=reason):
        encode(sdk(data), max_event_bytes=1 << 20)
    if data == "\ud800":
        with pytest.raises(EventError, match=reason):
            encode(sdk(data, datacontenttype="text/plain"), max_event_bytes=9999)


@pytest.mark.parametrize("thing", [None, {}, "event", HTTPMessage({}, b""), BARE])
def test_things_that_are_no_event_are_refused(thing: Any) -> None:
    with pytest.raises(EventError, match="Expected a CloudEvent"):
        encode(thing, max_event_bytes=9999)


def test_size_is_checked_to_the_byte() -> None:
    event = sdk("é" * 100, datacontenttype="text/plain", subject="ü")
    row = encode(event, max_event_bytes=9999)
    size = size_of(row)
    assert size == sum(len(value.encode() if isinstance(value, str) else value or b"") for value in row[:11])
    assert encode(event, max_event_bytes=size) == row
    for too_large in (event, Event(row)):
        with pytest.raises(EventError, match="max_event_bytes"):
            encode(too_large, max_event_bytes=size - 1)


def test_old_events_come_back_as_old_events() -> None:
    old = CloudEvent03(
        {**BARE, "specversion": "0.3", "time": datetime(2026, 1, 2, tzinfo=UTC), "schemaurl": "urn:x"}, {"a": 1}
    )
    event = put(old)
    assert event.get_attributes() == old.get_attributes()
    assert (event.get_dataschema(), event.attribute("schemaurl"), event.attribute("dataschema")) == (
        "urn:x",
        "urn:x",
        None,
    )
    assert event.get_data() == {"a": 1}
    assert dict(write_binary(event)[0])["ce-schemaurl"] == "urn:x"
    assert again_structured(event).row == event.row
    assert again_binary(event).attributes_text == event.attributes_text | {"datacontenttype": "application/json"}


def test_old_octets_stand_in_data_and_say_so() -> None:
    attributes = {**BARE, "specversion": "0.3", "datacontentencoding": "base64", "datacontenttype": "image/png"}
    event = put(CloudEvent03(dict(attributes), b"\x00\xff"))
    written = json.loads(write_structured(event))
    assert (written["data"], written["datacontentencoding"]) == ("AP8=", "base64")
    assert again_structured(event).data_bytes == b"\x00\xff"
    headers, body = write_binary(event)
    assert body == b"\x00\xff"
    assert "ce-datacontentencoding" not in dict(headers)
    encoded = binary(b"AP8=", specversion="0.3", datacontentencoding="base64")
    assert again_binary(encoded).row == encoded.row
    assert again_structured(encoded).data_bytes == b"\x00\xff"
    with pytest.raises(EventError, match="schemaurl"):
        parse_structured(structured(specversion="0.3", dataschema="urn:x"))


# ── the event that dispatchers get ───────────────────────────────────────────────────────────────────────────────────


def test_the_sdks_bindings_and_formats_take_our_events() -> None:
    event: BaseCloudEvent = put(sdk({"a": [1]}, subject="s", datacontenttype="application/json", n=1, flag=True))
    message = to_structured(event, JSONFormat())
    assert parse_structured(message.body).row == (*encode(event, max_event_bytes=9999)[:10], b'{"a": [1]}', "json")
    back = from_http(to_binary(event, JSONFormat()), JSONFormat())
    assert back.get_data() == {"a": [1]}
    assert from_http(
        HTTPMessage(dict(write_binary(put(event))[0]), write_binary(put(event))[1]), JSONFormat()
    ).get_data()


def test_getters_agree_with_the_sdks() -> None:
    theirs = sdk("x", subject="s", datacontenttype="text/plain", dataschema="urn:x", partitionkey="k", n=1)
    ours = put(theirs)
    getters = ("id", "source", "type", "specversion", "datacontenttype", "dataschema", "subject", "time", "data")
    for getter in (*getters, "attributes"):
        assert getattr(ours, f"get_{getter}")() == getattr(theirs, f"get_{getter}")()
    for attribute in (*getters, "partitionkey", "n", "missing"):
        assert ours.get_extension(attribute) == theirs.get_extension(attribute)


def test_what_one_subscription_changes_another_does_not_see() -> None:
    event = put(sdk({"a": [1]}, n=1))
    event.get_data()["a"].append(2)
    event.get_attributes()["n"] = 2
    event.attributes_text["n"] = "2"
    assert (event.get_data(), event.get_extension("n"), event.attributes_text["n"]) == ({"a": [1]}, 1, "1")
    for attribute in ("position", "attempt", "id", "row", "new"):
        with pytest.raises(AttributeError):
            setattr(event, attribute, 1)


def test_a_database_record_is_as_good_as_a_row() -> None:
    row = parse_structured(structured(n=1)).row
    event = Event((*row, 7, datetime(2026, 1, 1, tzinfo=UTC), 99), 7)
    assert event.row == row
    assert event.position == 7
    assert encode(event, max_event_bytes=9999) == row
    assert event.attributes_text == {**BARE, "n": "1"}
    assert parse_structured(write_structured(event)).row == row


def test_a_delivery_is_a_copy() -> None:
    event = Event(parse_structured(structured()).row, 7, datetime(2026, 1, 1, tzinfo=UTC))
    again = event.with_delivery(attempt=3)
    assert (event.attempt, again.attempt, again.with_delivery().attempt) == (1, 3, 3)
    assert again.row is event.row
    assert (again.position, again.recorded_at) == (7, event.recorded_at)
    assert again == event == pickle.loads(pickle.dumps(event))  # noqa: S301 - our own
    assert len({again, event}) == 1
    assert "'t' id='1' source='/s'" in repr(event)


def test_the_key_is_the_partition_key_else_the_subject_within_its_source() -> None:
    assert parse_structured(structured(partitionkey="k", subject="s")).key == ("partitionkey", "k")
    assert parse_structured(structured(subject="s")).key == ("/s", "s")
    assert parse_structured(structured()).key is None


def test_plain_sql_may_store_what_no_codec_would() -> None:
    row = list(parse_structured(structured()).row)
    row[9:] = ['{ "n" : 1.50, "o": {"a": []}, "absent": null }', b"{", "json"]
    event = Event(tuple(row))
    assert event.get_data() == b"{"
    assert event.attributes_text == {**BARE, "n": "1.5", "o": '{"a":[]}'}
    for forged in (b'1,"id":"2"', b'1}, {"id":"2"', b""):
        row[10:] = [forged, "json"]
        assert again_structured(Event((*tuple(row[:9]), "{}", *row[10:]))).get_data() == forged
    row[10:] = [b"\xff", "text"]
    assert Event(tuple(row)).get_data() == b"\xff"
    row[5] = "yesterday"
    with pytest.raises(EventError, match="time"):
        Event(tuple(row)).get_time()


def test_extension_attributes_can_be_added_and_replaced() -> None:
    event = Event(parse_structured(structured(n=1, kept=True, partitionkey="k", data=[1])).row, 5)
    changed = attributes_with(event, {"n": "2", "knativeerrordata": 'é"\\', "partitionkey": "other"})
    assert changed.attributes_text == {
        **BARE,
        "partitionkey": "other",
        "n": "2",
        "kept": "true",
        "knativeerrordata": 'é"\\',
    }
    assert (changed.position, changed.data_bytes) == (5, b"[1]")
    assert event.get_extension("n") == 1
    assert again_structured(changed).row == changed.row
    for bad in (
        {"id": "x"},
        {"data": "x"},
        {"Upper": "x"},
        {"x": "a\nb"},
        {"extensions": ""},
        {"partitionkey": "\x00"},
    ):
        if bad != {"extensions": ""}:
            with pytest.raises(EventError):
                attributes_with(event, bad)


@pytest.mark.parametrize(
    "make",
    [
        lambda: parse_structured(structured(data_base64=base64.b64encode("é".encode()).decode())),
        lambda: put(sdk("é".encode())),
    ],
)
def test_octets_that_happen_to_be_utf8_stay_octets(make: Callable[[], Event]) -> None:
    event = make()
    assert event.get_data() == "é".encode()
    assert json.loads(write_structured(event))["data_base64"] == "w6k="
