"""Events as lines of JSON come back to the byte."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgbackend import EventError
from pgbackend.codec.attributes import read_extensions
from pgbackend.codec.event import Event
from pgbackend.codec.log_lines import read_line, write_line
from pgbackend.codec.wire import parse_binary, parse_structured
from tests.support import codec

REAL = Path(__file__).parent / "real_events.jsonl"
"""Published samples of the CDEvents specification and of Google's CloudEvents types (Apache License 2.0)."""


def facts(event: Event) -> tuple[object, ...]:
    """All that readers of the log can tell of an event."""
    row = event.row
    return (*row[:9], read_extensions(row[9]), row[10], row[11])


def again(event: Event) -> Event:
    line = write_line(event)
    assert b"\n" not in line
    assert b"\r" not in line
    return read_line(line)


@given(codec.attributes, codec.json_text)
def test_structured_events_come_back_to_the_byte(attributes: dict[str, object], data: str) -> None:
    event = parse_structured(f'{json.dumps(attributes)[:-1]},\n"data": {data}}}'.encode())
    assert facts(again(event)) == facts(event)


@given(codec.attributes, st.binary() | codec.json_text.map(str.encode) | codec.text.map(str.encode), codec.content_type)
def test_binary_events_come_back_to_the_byte(attributes: dict[str, str], body: bytes, content_type: str) -> None:
    texts = {name: str(value) for name, value in attributes.items()}
    row = parse_structured(json.dumps({**texts, "datacontenttype": content_type}).encode()).row
    for encoding in (None, "base64"):
        event = Event((*row[:10], body, encoding))
        assert facts(again(event)) == facts(event)


@given(st.binary(), st.sampled_from([None, "base64"]), st.sampled_from(["{}", '{"datacontentencoding":"base64"}']))
def test_events_of_the_version_before_come_back_to_the_byte(data: bytes, encoding: str | None, extensions: str) -> None:
    event = Event(("0.3", "1", "/s", "t", None, None, None, "urn:x", None, extensions, data, encoding))
    assert facts(again(event)) == facts(event)


def test_an_extension_may_be_called_event() -> None:
    event = Event(("0.3", "1", "/s", "t", None, None, None, None, None, '{"a":"1","event":"2"}', b"\xff", "base64"))
    assert b'"stored":{"extensions":{"a":"1","event":"2"}}' in write_line(event)
    assert facts(again(event)) == facts(event)


@pytest.mark.parametrize("line", REAL.read_bytes().splitlines(), ids=lambda line: json.loads(line)["type"])
def test_real_events_come_back_to_the_byte(line: bytes) -> None:
    event = parse_structured(line)
    assert facts(again(event)) == facts(event)
    pretty = json.dumps(json.loads(line)["data"], indent=2).encode()
    headers = [(b"ce-specversion", b"1.0"), (b"ce-id", b"1"), (b"ce-source", b"/s"), (b"ce-type", b"t")]
    event = parse_binary([*headers, (b"content-type", b"application/json")], pretty)
    assert facts(again(event)) == facts(event)


def test_a_line_is_readable_by_json_tools() -> None:
    line = json.loads(write_line(codec.binary(b'{"n": 1}', "application/json")))
    assert line["event"]["data"] == {"n": 1}
    assert line["stored"] == {"data_encoding": None}


def test_extensions_from_plain_sql_come_back_as_readers_of_the_log_get_them() -> None:
    event = Event(("1.0", "1", "/s", "t", None, None, None, None, None, '{"a": 1.5, "b": null, "c": 9}', None, None))
    assert again(event).attributes_text == event.attributes_text == {**codec.BARE, "a": "1.5", "c": "9"}


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"[]",
        codec.structured(),
        b'{"position":1,"event":{}}',
        b'{"position":1,"event":' + codec.structured() + b"}}",
        b'{"position":1,}"event":' + codec.structured() + b"}",
        b'{"position":1,"stored":[],"event":' + codec.structured() + b"}",
        b'{"position":1,"stored":{"data_encoding":"xml"},"event":' + codec.structured() + b"}",
        b'{"position":1,"stored":{"data_encoding":"json"},"event":' + codec.structured() + b"}",
        b'{"position":1,"stored":{"data":7},"event":' + codec.structured() + b"}",
        b'{"position":1,"stored":{"data_base64":"?"},"event":' + codec.structured() + b"}",
        b'{"position":1,"stored":{"extensions":{"A":1}},"event":' + codec.structured() + b"}",
        b'{"position":1,"stored":{"extensions":[]},"event":' + codec.structured() + b"}",
    ],
)
def test_what_is_no_line_is_refused(line: bytes) -> None:
    with pytest.raises(EventError):
        read_line(line)


@given(st.binary())
def test_arbitrary_bytes_raise_nothing_else(line: bytes) -> None:
    for text in (line, b'{"position":1,"stored":' + line + b',"event":' + codec.structured() + b"}"):
        with suppress(EventError):
            read_line(text)
