import json
from typing import Any

import asyncpg
import pytest
from cloudevents.core.v1.event import CloudEvent

from pgbackend.codec.attributes import COLUMNS, ExtensionValue, extension_text, read_extensions
from pgbackend.codec.event import Event, attributes_with
from pgbackend.codec.sdk import encode
from pgbackend.codec.wire import parse_binary, parse_structured, write_binary, write_structured
from pgbackend.errors import EventError
from pgbackend.filters import CESQL, Exact
from tests.support.codec import BARE, binary, sdk, structured


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


@pytest.mark.parametrize("schema", ["#", "#1.0", "#/definitions/order", "urn:x", "https://example.com/schema#1"])
def test_a_dataschema_may_be_a_fragment_alone_as_azure_event_grid_sends_it(schema: str) -> None:
    members = {"specversion": "1.0", "id": "1", "source": "/s", "type": "t", "dataschema": schema}
    from_json = parse_structured(json.dumps(members).encode())
    from_headers = parse_binary([(f"ce-{name}".encode(), value.encode()) for name, value in members.items()], b"")
    from_sdk = Event(encode(CloudEvent(dict(members)), max_event_bytes=9999)[0])
    for event in (from_json, from_headers, from_sdk):
        assert event.get_dataschema() == schema
        assert parse_structured(write_structured(event)).get_dataschema() == schema


@pytest.mark.parametrize(
    "members",
    [
        {"subject": ""},
        {"subject": 1},
        {"dataschema": ""},
        {"dataschema": "relative/path"},
        {"dataschema": "urn:"},
        {"dataschema": "urn:a b"},
        {"dataschema": "#a b"},
        {"dataschema": "#%2"},
        {"dataschema": "/#"},
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
def test_invalid_attributes_are_refused(members: dict[str, Any]) -> None:
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
def test_invalid_times_are_refused(moment: str) -> None:
    with pytest.raises(EventError, match="time"):
        parse_structured(structured(time=moment))


@pytest.mark.parametrize("day", ["2024-02-29", "2000-02-29", "2026-12-31", "2026-11-30", "2026-01-29", "0001-01-01"])
def test_days_that_exist_are_taken(day: str) -> None:
    assert parse_structured(structured(time=f"{day}T00:00:00Z")).get_time() is not None


MANY_DIGITS = "9" * 5000


@pytest.mark.parametrize(
    ("json_text", "value"),
    [
        ("7", 7),
        ("true", True),
        ("-2147483648", -(2**31)),
        ("2147483648", "2147483648"),
        ("-0", 0),
        ("1.50", "1.5"),
        ("1e400", "1e400"),
        ("-1e400", "-1e400"),
        (MANY_DIGITS, MANY_DIGITS),
        ("-" + MANY_DIGITS, "-" + MANY_DIGITS),
        ('{"a": []}', '{"a":[]}'),
        ("[1, 2147483648]", "[1,2147483648]"),
        ("null", None),
    ],
    ids=lambda value: str(value)[:12],
)
async def test_any_json_of_postgresql_reads_as_an_extension_or_none(
    json_text: str, value: ExtensionValue | None, database: str
) -> None:
    connection = await asyncpg.connect(database)
    try:
        stored = await connection.fetchrow(
            "insert into pgbackend.events (id, source, type, extensions) values ('1', '/s', 't', $1) "
            f"returning {', '.join(COLUMNS)}",
            f'\n{{ "x" : {json_text} }}',
        )
    finally:
        await connection.close()
    assert stored is not None
    event = Event(stored)
    text = None if value is None else extension_text(value)
    assert (event.value("x"), event.attribute("x")) == (value, text)
    assert type(event.value("x")) is type(value)
    assert event.attributes_text == BARE | ({} if text is None else {"x": text})
    assert event.get_attributes() == BARE | ({} if value is None else {"x": value})
    assert Exact({"x": "y"})(event) is False
    assert Exact({"x": text or "y"})(event) is (text is not None)
    assert CESQL("EXISTS x")(event) is (value is not None)
    assert CESQL("x = 7 OR x > 7 OR x LIKE '7'")(event) in (True, False)
    assert attributes_with(event, {"hops": "1"}).value("x") == value
    assert len(write_binary(event)[0]) == 4 + (value is not None)


def test_deeply_nested_extensions_do_not_raise() -> None:
    """How deep Python can read depends on its version. Deeper objects count as absent."""
    for depth in (500, 2_000, 100_000):
        nested = "[" * depth + "]" * depth
        assert read_extensions(f'{{"x": {nested}}}') in ({}, {"x": nested})
