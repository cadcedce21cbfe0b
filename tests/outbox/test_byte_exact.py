"""I8 for the outbox: an event comes out exactly as it would after a plain `produce()`."""

import json
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
from cloudevents.core.v1.event import CloudEvent
from hypothesis import given
from hypothesis import strategies as st
from psycopg.rows import tuple_row

from pgbackend import Backend, Event, outbox
from pgbackend.codec.attributes import COLUMNS
from pgbackend.codec.sdk import encode
from pgbackend.codec.wire import parse_structured
from tests.support.codec import attributes, content_type, json_text, json_value, sdk
from tests.support.databases import connected
from tests.support.outbox import KINDS, opened

pytestmark = [pytest.mark.direct, pytest.mark.owner]

SELECT = f"SELECT {', '.join(f'{name}::text' if name == 'extensions' else name for name in COLUMNS)} FROM "


def rows(connection: "psycopg.Connection[Any]") -> list[tuple[Any, ...]]:
    return connection.cursor(row_factory=tuple_row).execute(SELECT + "pgbackend.events ORDER BY position").fetchall()


def structured(attributes: dict[str, object], data: str, kind: str) -> bytes:
    """The JSON format, with the very text of the data."""
    members = json.dumps({**attributes, "datacontenttype": kind}, ensure_ascii=False)
    return f'{members[:-1]}, "data" : {data}}}'.encode()


serialised = st.builds(structured, attributes, json_text, content_type)
with_octets = st.builds(
    lambda attributes, octets: Event(
        (*encode(structured(attributes, "0", "text/x"), max_event_bytes=1 << 20)[0][:10], octets, None)
    ),
    attributes,
    st.binary(),
)
of_the_sdk = st.builds(lambda data, kind: sdk(data, datacontenttype=kind), json_value | st.binary(), content_type)


async def test_any_event_is_stored_as_its_own_row(database: str) -> None:
    with psycopg.connect(database) as connection:

        @given(st.lists(serialised | with_octets | of_the_sdk, max_size=5))
        def check(events: list[Any]) -> None:
            outbox.produce_many(connection, events)
            assert rows(connection) == [encode(event, max_event_bytes=1 << 20)[0] for event in events]
            connection.rollback()

        check()


EVENTS: list[Any] = [
    CloudEvent(
        {"id": "1", "source": "/s", "type": "t", "time": datetime(2026, 1, 2, 3, 4, 5, 678901, UTC)}, {"a": 1.50}
    ),
    CloudEvent({"id": "2", "source": "/s", "type": "t", "datacontenttype": "text/plain"}, "äöü\n\x00 \U0001f600"),
    CloudEvent({"id": "3", "source": "/s", "type": "t"}, bytes(range(256))),
    CloudEvent({"id": "4", "source": "/s", "type": "t", "count": 7, "flag": True, "empty": ""}),
    b'{"specversion":"1.0","id":"5","source":"s","type":"t","time":"2024-02-29T23:59:59.123456789+05:30","data":null}',
    b'{"specversion":"1.0","id":"6","source":"s","type":"t","data": {"b": 1,  "a" :1E400, "b":"\\u0000\\ud83d"}}',
    b'{"specversion":"1.0","id":"7","source":"s","type":"t","data_base64":"AAECAw==","x":" \\u00e9 \\"\\\\ "}',
    parse_structured(b'{"specversion":"1.0","id":"8","source":"s","type":"t","partitionkey":"k","dataschema":"urn:x"}'),
]


@pytest.mark.parametrize("kind", KINDS)
async def test_events_are_those_of_a_plain_produce_on_each_kind_of_connection(
    kind: str, database: str, backend: Backend
) -> None:
    for event in EVENTS:
        await backend.produce(event)

    async with opened(kind, database) as harness:
        await harness.begin()
        await harness.produce(*EVENTS)
        await harness.commit()

    with psycopg.connect(database) as connection:
        stored = rows(connection)
    assert stored[len(EVENTS) :] == stored[: len(EVENTS)]


async def test_codecs_of_the_callers_session_change_nothing(database: str, backend: Backend) -> None:
    async with connected(database) as sql:
        await sql.set_type_codec("json", encoder=json.dumps, decoder=json.loads, schema="pg_catalog")
        await sql.set_type_codec("bytea", encoder=repr, decoder=repr, schema="pg_catalog")
        async with sql.transaction():
            await backend.produce_many(EVENTS, connection=sql)

    with psycopg.connect(database) as connection:
        assert rows(connection) == [encode(event, max_event_bytes=1 << 20)[0] for event in EVENTS]
