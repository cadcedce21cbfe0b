import base64
import json
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
from cloudevents.core.v03.event import CloudEvent as CloudEvent03
from hypothesis import example, given
from hypothesis import strategies as st

from pgbackend.codec import binary_mode, json_format
from pgbackend.codec.attributes import Row, event_size
from pgbackend.codec.event import Event
from pgbackend.codec.wire import (
    ContentTypeError,
    TooLargeError,
    mode_of,
    parse_batch,
    parse_binary,
    parse_structured,
    write_binary,
    write_structured,
)
from pgbackend.errors import EventError
from tests.support.codec import (
    BARE,
    again_batch,
    again_binary,
    again_structured,
    attributes,
    binary,
    content_type,
    json_text,
    put,
    structured,
    text,
)


def with_member(text: str) -> bytes:
    """A structured event with extra members as raw text."""
    return f'{{"specversion":"1.0","id":"1","source":"/s","type":"t",{text}}}'.encode()


def canonical(values: dict[str, Any]) -> dict[str, str]:
    return {name: {True: "true", False: "false"}[v] if isinstance(v, bool) else str(v) for name, v in values.items()}


# ── round trips ──────────────────────────────────────────────────────────────────────────────


@given(attributes, json_text, st.sampled_from([None, "application/json", "application/a+json"]), st.booleans())
def test_structured_json_keeps_its_exact_text(values: dict[str, Any], data: str, kind: str | None, first: bool) -> None:
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


def test_data_that_does_not_fit_its_content_type_is_written_as_base64() -> None:
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


def test_json_data_without_content_type_gets_one_in_binary_mode() -> None:
    assert dict(write_binary(parse_structured(structured(data=[1])))[0])["content-type"] == "application/json"


def test_a_data_member_is_not_confused_with_the_text_data() -> None:
    event = parse_structured(
        b'{"data":[1],"specversion":"1.0","id":"data","source":"\\"data\\"x"}'.replace(b'\\"', b"%22").replace(
            b"}", b',"type":"data","x":"data","datax":"1"}'
        )
    )
    assert event.data_bytes == b"[1]"
    assert event.get_extension("x") == "data"
    event = parse_structured(b'{"type":"data","id":"1","source":"/","\\u0064ata": [ 2 ],"specversion":"1.0"}')
    assert event.data_bytes == b"[ 2 ]"


@pytest.mark.parametrize("filler", ["[1,2]", '"\\u00e9"', '{"a": null}', "123456789", "true", "-1.5e3", '"x"'])
@pytest.mark.parametrize("length", [4080, 4090, 4095, 4096, 4097, 4100, 9000])
def test_a_size_limit_does_not_change_the_events_of_a_batch(filler: str, length: int) -> None:
    """With a limit, large values are read from slices, which may end anywhere."""
    for shift in range(20):
        data = "[" + " " * shift + ",".join([filler] * (length // len(filler))) + "," + "7" * 30 + "]"
        event = b'{"specversion":"1.0","id":"1","source":"/s","type":"t","data":%b}' % data.encode()
        body = b"[" + b",".join([event] * 3) + b"]"
        for most in (len(event), 10_000, 100_000):
            if most >= len(event):
                assert list(parse_batch(body, max_characters=most)) == list(parse_batch(body))
        with pytest.raises(TooLargeError, match="Batch, index 0: Event '1' of '/s' is too large"):
            list(parse_batch(body, max_characters=len(event) - 40))


@pytest.mark.parametrize("number", ["1" * 4200, "1" * 4090 + ".5", "-1e" + "1" * 3])
def test_a_number_is_not_cut_where_a_slice_ends(number: str) -> None:
    event = b'{"specversion":"1.0","id":"1","source":"/s","type":"t","data":%b}' % number.encode()
    body = b"[" + b",".join([event] * 20) + b"]"
    assert list(parse_batch(body, max_characters=5000)) == list(parse_batch(body))


def test_events_without_data_and_with_it_share_a_batch() -> None:
    body = b" [ " + structured() + b"," + structured(data={"data": 1}) + b" , " + structured(x=1) + b" ] "
    events = list(parse_batch(body))
    assert [event.get_data() for event in events] == [None, {"data": 1}, None]
    assert list(parse_batch(b"[]")) == list(parse_batch(b" [ ] ")) == []


# ── refused messages ──────────────────────────────────────────────────────────────────────────────────────────────────


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
        structured(data=1).replace(b"{", b"{,", 1),
        b'{,"data":1,"id":"1","source":"/","type":"t","specversion":"1.0"}',
        b"{1:2}",
        structured()[:-1],
        structured().decode().encode("utf-16"),
        b"\xef\xbb\xbf" + structured(),
        structured(subject="x").replace(b'"x"', b'"\xff"'),
    ],
)
def test_invalid_events_are_refused(body: bytes) -> None:
    with pytest.raises(EventError):
        parse_structured(body)
    with pytest.raises(EventError):
        list(parse_batch(b"[" + structured() + b"," + body + b"]"))


@pytest.mark.parametrize(
    "body", [b"{}", b"[", b"[1]", b"[]]", b"[] x", b"", structured(), b"[" + structured() + b" 1]"]
)
def test_invalid_batches_are_refused(body: bytes) -> None:
    with pytest.raises(EventError):
        list(parse_batch(body))


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
def test_the_fast_road_of_plain_headers_has_the_same_result(headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    # A header name in capitals is not plain.
    general_road = outcome([(b"X-NAME", b""), *headers], body)
    assert outcome(headers, body) == general_road


def outcome(headers: list[tuple[bytes, bytes]], body: bytes) -> object:
    try:
        return parse_binary(headers, body).row
    except EventError as error:
        return str(error)


def test_usual_headers_take_the_fast_road() -> None:
    usual = [(b"host", b"x"), (b"ce-specversion", b"1.0"), (b"ce-id", b"1"), (b"ce-source", b"/"), (b"ce-type", b"t")]
    assert binary_mode._plain_row(usual, b"") is not None
    usual += [(b"ce-time", b"2026-01-02T03:04:05.678Z"), (b"content-type", b"text/plain; charset=utf-8")]
    usual += [(b"ce-partitionkey", b"eu"), (b"ce-traceparent", b"00-4bf9-00f0-01")]
    assert binary_mode._plain_row(usual, b"x") is not None


@given(st.binary() | st.text().map(str.encode) | json_text.map(str.encode))
def test_arbitrary_bytes_raise_nothing_but_event_errors(body: bytes) -> None:
    for parse in (
        parse_structured,
        lambda body: list(parse_batch(body)),
        lambda body: list(parse_batch(b"[" + body + b"]")),
    ):
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
        list(parse_batch(b"[" + structured() + b"," + structured(id="9", subject="") + b"]"))
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
def test_headers_that_do_not_decode_to_legal_text_are_refused(octets: bytes) -> None:
    with pytest.raises(EventError, match="custom"):
        binary(custom=octets)


def test_headers_are_percent_coded_as_the_binding_says() -> None:
    event = parse_structured(structured(custom=' "100%" é😀~!', flag=True, number=-5))
    headers = dict(write_binary(event)[0])
    assert headers["ce-custom"] == "%20%22100%25%22%20%C3%A9%F0%9F%98%80~!"
    assert (headers["ce-flag"], headers["ce-number"]) == ("true", "-5")


def test_uncoded_headers_keep_their_text() -> None:
    event = parse_structured(structured(custom='100% "é" 😀'))
    assert dict(write_binary(event, coded=False)[0])["ce-custom"] == '100% "é" 😀'
    with pytest.raises(EventError, match="Use structured mode"):
        write_binary(parse_structured(structured(custom=" é")), coded=False)


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
def test_headers_that_no_event_can_have_are_refused(header: bytes) -> None:
    headers = [(f"ce-{name}".encode(), value.encode()) for name, value in BARE.items()]
    with pytest.raises(EventError):
        parse_binary([*headers, (header, b"x/y")], b"")
    with pytest.raises(EventError):
        parse_binary([*headers, (b"content-type", b"text/plain"), (b"Content-Type", b"text/plain")], b"")


def test_a_message_without_ce_headers_is_not_an_event() -> None:
    with pytest.raises(ContentTypeError):
        parse_binary([(b"content-type", b"application/json")], b"{}")


def test_binary_mode_refuses_content_types_that_change_the_message() -> None:
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


def test_0_3_octets_are_base64_in_data() -> None:
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


member_names = st.sampled_from(
    [
        "specversion",
        "id",
        "source",
        "type",
        "subject",
        "datacontenttype",
        "time",
        "x",
        "data",
        "data_base64",
        'q"',
        "d\\u0061ta",
    ]
)
TEXTS = [
    '"1.0"',
    '"a"',
    '"/s"',
    '""',
    '"text/plain"',
    '"application/json"',
    '"AA=="',
    '"é"',
    '"\\u0061"',
    '"\\""',
    '"\\ud800"',
    '"\x01"',
]
OTHERS = [
    "1",
    "true",
    "null",
    "1.5",
    "-0",
    "01",
    "1e400",
    "99999999999999999999",
    "NaN",
    "[]",
    "{}",
    '{"a":1,"a":2}',
    '{"data":1}',
    "[1,]",
]
TIME = '"2026-01-02T03:04:05Z"'
member_values = st.sampled_from([*TEXTS, *OTHERS, TIME])
white = st.sampled_from(["", "", "", " ", "\n\t", "\u00a0"])


@st.composite
def nearly_usual(draw: st.DrawFn) -> str:
    """An object that is nearly written as most senders write an event."""
    usual = [("specversion", '"1.0"'), ("id", '"1"'), ("source", '"/s"'), ("type", '"t"')]
    members = usual + draw(st.lists(st.tuples(member_names, member_values), max_size=3))
    if draw(st.booleans()):
        members = draw(st.permutations(members))
    if draw(st.booleans()):
        members = [*members, ("data", draw(member_values))]
    written = [f'{draw(white)}"{name}"{draw(white)}:{draw(white)}{value}{draw(white)}' for name, value in members]
    text = "{" + ",".join(written) + "}"
    if draw(st.integers(0, 9)) == 0:
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.sampled_from(["", ",", "}", '"', "{", " ", "\\"])) + text[at + 1 :]
    return draw(white) + text + draw(white)


@given(nearly_usual())
@example('{,"data":1}')
@example('{"specversion":"1.0","id":"1","source":"/","type":"t","data":1,"data":2}')
def test_both_ways_of_reading_an_event_come_to_the_same_result(text: str) -> None:
    def read(parse: Callable[[str], Row]) -> object:
        try:
            row = parse(text)
        except EventError as error:
            return str(error)
        # So what is small enough as JSON is within the limits of events.
        assert event_size(row) <= len(text.encode())
        return row

    assert read(lambda whole: json_format.structured_row(whole.encode())) == read(json_format._any_row)


@given(
    st.lists(nearly_usual(), max_size=4), st.sampled_from([",", ", ", "\n,", ",\n  "]), st.none() | st.integers(40, 200)
)
@example(['{"specversion":"1.0","id":"1","source":"/","type":"t","data":[{"a":1},{"b":2}]}'] * 3, ",", None)
@example(['{"specversion":"1.0","id":"1","source":"/","type":"t","data":1,"subject":""}'] * 3, ",", None)
@example(['{"specversion":"1.0","id":"1","source":"/","type":"t","data":1,"data":[{},{}]}'] * 3, ",", None)
@example(['{"specversion":"1.0","id":"1","source":"","type":"t","data":1}'] * 3, ",", None)
def test_both_ways_of_reading_a_batch_come_to_the_same_result(events: list[str], comma: str, most: int | None) -> None:
    usual = '{"specversion":"1.0","id":"1","source":"/s","type":"t","data":{"a":[{},{}]}}'
    text = "[" + comma.join([usual, *events, usual]) + "]"

    def read() -> object:
        rows: list[object] = []
        try:
            rows.extend(event.row for event in parse_batch(text.encode(), max_characters=most))
        except EventError as error:
            return rows, type(error), str(error)
        return rows

    found = read()
    with patch.object(json_format, "_usual_event", return_value=None):
        assert found == read()


def test_usual_events_of_a_batch_take_the_fast_way() -> None:
    event = '{"specversion":"1.0","id":"1","source":"/s","type":"t","data":{"a":[{},{}]}}'
    for border in (",", ", ", ",\n  "):
        with patch.object(json_format, "_read_event", wraps=json_format._read_event) as slow:
            assert len(list(parse_batch(f"[{border.join([event] * 10)}]".encode()))) == 10
        # The first one shows the border, and nothing follows the last one.
        assert slow.call_count == (1 if border == "," else 2)
