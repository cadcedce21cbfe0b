"""I8. Data bytes and attribute texts come out as they went in, through the database and any mix of content modes."""

import json

import asyncpg
import pytest

from pgbackend import Backend, Event
from pgbackend.codec.wire import parse_batch, parse_binary, parse_structured, write_binary, write_structured
from tests.support.codec import again_batch
from tests.support.polling import eventually

ATTRIBUTES = {
    "specversion": "1.0",
    "id": "ä–\U0001f600",
    "source": "/a?b=c%20d#e",
    "type": "com.example.thing",
    "subject": "some/thing with spaces ",
    "time": "2024-02-29T23:59:59.123456789+05:30",
    "dataschema": "https://example.com/schema#1",
    "partitionkey": "key",
    "myext": " leading and trailing ",
}
JSON_DATA = [
    "null",
    "true",
    "0",
    "-0.0",
    "1E400",
    "123456789012345678901234567890.10",
    '""',
    '"\\u0000\\ud83d\\ude00 \\/ é"',
    '{"b": 1,  "a" :2, "b":3}',
    "[ 1,\t2 ,\n 3 ]",
    '{"nested": {"x": [null, {}, []]}}',
]
OCTETS = [b"", b"\0", b"text", bytes(range(256)), "é".encode(), b"\xff\xfe", b"null", b'{"not": "json type"}', b" " * 3]


async def through_the_log(database: str, events: list[Event]) -> list[Event]:
    """The same events as a dispatcher gets them, in order."""
    got: list[Event] = []
    async with Backend(database) as backend:
        await backend.subscribe("billing", got.append, order="strict", start="earliest")
        await backend.produce_many(events[::2])
        for event in events[1::2]:
            await backend.produce(event)

        async def has_all() -> bool:
            return len(got) == len(events)

        await eventually("all are dispatched", has_all)
    return [by_position(got, events, event) for event in events]


def by_position(got: list[Event], events: list[Event], event: Event) -> Event:
    index = events.index(event)
    return got[index // 2] if index % 2 == 0 else got[(len(events) + 1) // 2 + index // 2]


@pytest.mark.parametrize("mode", ["structured", "batch"])
async def test_json_data_keeps_its_text(database: str, mode: str) -> None:
    envelope = json.dumps(ATTRIBUTES, ensure_ascii=False)[:-1]
    bodies = [f'{envelope}, "datacontenttype": "application/json", "data": {data}}}' for data in JSON_DATA]
    if mode == "batch":
        events = list(parse_batch(f"[{' , '.join(bodies)}]".encode()))
    else:
        events = [parse_structured(body.encode()) for body in bodies]

    for data, event in zip(JSON_DATA, await through_the_log(database, events), strict=True):
        assert event.data_bytes == data.encode()
        assert event.attributes_text.items() >= ATTRIBUTES.items()
        headers, body = write_binary(event)
        assert body == data.encode()
        again = parse_structured(write_structured(event))
        assert again.data_bytes == data.encode()
        assert again_batch(event).row == again.row
        back = parse_binary([(name.encode(), value.encode()) for name, value in headers], body)
        assert back.attributes_text == event.attributes_text
        assert back.data_bytes == event.data_bytes


async def test_binary_data_keeps_its_bytes_in_every_mode(database: str) -> None:
    events = []
    for kind in ("application/octet-stream", "text/plain; charset=latin-1", "application/json", "image/png"):
        for octets in OCTETS:
            sent_headers = [(b"ce-" + name.encode(), _percent(value)) for name, value in ATTRIBUTES.items()]
            events.append(parse_binary([*sent_headers, (b"content-type", kind.encode())], octets))

    for event, sent in zip(await through_the_log(database, events), events, strict=True):
        assert event.row == sent.row
        assert event.data_bytes == sent.data_bytes
        assert event.attributes_text == sent.attributes_text
        assert event.attributes_text.items() >= ATTRIBUTES.items()
        structured = parse_structured(write_structured(event))
        assert (structured.data_bytes or b"") == (event.data_bytes or b"")
        headers, body = write_binary(structured)
        back = parse_binary([(name.encode(), value.encode()) for name, value in headers], body)
        assert (back.data_bytes or b"") == (event.data_bytes or b"")
        assert back.attributes_text == event.attributes_text


async def test_null_data_and_absent_data_stay_distinct(database: str) -> None:
    envelope = '{"specversion": "1.0", "id": "1", "source": "s", "type": "t"'
    events = [
        parse_structured(f"{envelope}}}".encode()),
        parse_structured(f'{envelope}, "data": null}}'.encode()),
        parse_structured(f'{envelope}, "data": ""}}'.encode()),
        parse_structured(f'{envelope}, "data_base64": ""}}'.encode()),
    ]

    bodies = [json.loads(write_structured(event)) for event in await through_the_log(database, events)]

    sent = [json.loads(write_structured(event)) for event in events]
    assert bodies == sent
    assert "data" not in bodies[0]
    assert bodies[2]["data"] == ""
    assert bodies[3]["data_base64"] == ""


@pytest.mark.parametrize(
    "time",
    [
        "2024-01-01T00:00:00Z",
        "2024-01-01t00:00:00z",
        "2024-01-01T00:00:00.000000000Z",
        "2024-06-30T23:59:60Z",
        "0001-01-01T00:00:00.1+00:00",
        "9999-12-31T23:59:59.999999999-23:59",
        "2024-01-01T00:00:00-00:00",
    ],
)
async def test_times_keep_their_text(database: str, time: str) -> None:
    event = parse_structured(
        json.dumps({"specversion": "1.0", "id": "1", "source": "s", "type": "t", "time": time}).encode()
    )

    (got,) = await through_the_log(database, [event])

    assert got.attributes_text["time"] == time


async def test_extensions_keep_their_types(database: str) -> None:
    body = (
        '{"specversion": "1.0", "id": "1", "source": "s", "type": "t",'
        ' "text": "7", "number": 7, "least": -2147483648, "yes": true, "no": false}'
    )
    (got,) = await through_the_log(database, [parse_structured(body.encode())])

    assert json.loads(write_structured(got)) == json.loads(body)
    assert got.attributes_text.items() >= {"text": "7", "number": "7", "yes": "true", "no": "false"}.items()


async def test_an_event_from_plain_sql_keeps_its_bytes(database: str) -> None:
    got: list[Event] = []
    connection = await asyncpg.connect(database)
    async with Backend(database) as backend:
        await backend.subscribe("billing", got.append, start="earliest")
        await connection.execute(
            "INSERT INTO pgbackend.events (id, source, type, datacontenttype, extensions, data) VALUES"
            " ('1', 's', 't', 'application/json', '{\"a\" : \"b\"}', $1)",
            b'{"x":  1}',
        )

        async def arrived() -> bool:
            return bool(got)

        await eventually("it is dispatched", arrived)
    await connection.close()

    assert got[0].data_bytes == b'{"x":  1}'
    assert got[0].get_data() == {"x": 1}
    assert got[0].get_extension("a") == "b"


def _percent(value: str) -> bytes:
    """As an HTTP header: everything but printable ASCII is percent-encoded, as are the quote and the percent sign."""
    return "".join(
        char if "!" <= char <= "~" and char not in '%"' else "".join(f"%{byte:02X}" for byte in char.encode())
        for char in value
    ).encode()
