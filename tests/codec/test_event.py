import pickle
from datetime import UTC, datetime, timedelta, timezone
from unittest.mock import patch

import pytest
from cloudevents.core.base import BaseCloudEvent
from cloudevents.core.bindings.http import HTTPMessage, from_http, to_binary, to_structured
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v03.event import CloudEvent as CloudEvent03

from pgbackend.codec.attributes import read_extensions
from pgbackend.codec.event import Event, attributes_with
from pgbackend.codec.sdk import encode
from pgbackend.codec.wire import parse_structured, write_binary, write_structured
from pgbackend.errors import EventError
from tests.support.codec import BARE, again_binary, again_structured, put, sdk, structured


def test_a_time_reads_as_a_datetime_cut_to_microseconds() -> None:
    def read(moment: str) -> datetime | None:
        return parse_structured(structured(time=moment)).get_time()

    assert read("2026-01-02T03:04:05.123456789Z") == datetime(2026, 1, 2, 3, 4, 5, 123456, UTC)
    assert read("2016-12-31T23:59:60.5Z") == datetime(2016, 12, 31, 23, 59, 59, 500000, UTC)
    assert read("1985-04-12t23:20:50.5z") == datetime(1985, 4, 12, 23, 20, 50, 500000, UTC)
    assert read("2026-01-02T03:04:05+01:30") == datetime(2026, 1, 2, 3, 4, 5, 0, timezone(timedelta(minutes=90)))


def test_0_3_events_come_back_as_0_3_events() -> None:
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


def test_the_sdks_bindings_and_formats_take_our_events() -> None:
    event: BaseCloudEvent = put(sdk({"a": [1]}, subject="s", datacontenttype="application/json", n=1, flag=True))
    message = to_structured(event, JSONFormat())
    assert parse_structured(message.body).row == (*encode(event, max_event_bytes=9999)[0][:10], b'{"a": [1]}', "json")
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


def test_a_subscriptions_changes_stay_its_own() -> None:
    event = put(sdk({"a": [1]}, n=1))
    event.get_data()["a"].append(2)
    event.get_attributes()["n"] = 2
    event.attributes_text["n"] = "2"
    assert (event.get_data(), event.get_extension("n"), event.attributes_text["n"]) == ({"a": [1]}, 1, "1")
    for attribute in ("position", "attempt", "id", "row", "new"):
        with pytest.raises(AttributeError):
            setattr(event, attribute, 1)


def test_a_database_record_works_like_a_row() -> None:
    row = parse_structured(structured(n=1)).row
    event = Event((*row, 7, bytes(8), 99, 1000))
    assert event.row == row
    assert event.position == 7
    assert encode(event, max_event_bytes=9999)[0] == row
    assert event.attributes_text == {**BARE, "n": "1"}
    assert parse_structured(write_structured(event)).row == row


def test_a_delivery_is_a_copy() -> None:
    event = Event((*parse_structured(structured()).row, 7, bytes(8), 99, 1000))
    again = event.with_delivery(attempt=3)
    assert (event.attempt, again.attempt, again.with_delivery().attempt) == (1, 3, 3)
    assert again.row == event.row
    assert (again.position, again.recorded_at) == (7, datetime(2000, 1, 1, tzinfo=UTC))
    assert again == event == pickle.loads(pickle.dumps(event))  # noqa: S301 - our own
    assert len({again, event}) == 1
    assert "'t' id='1' source='/s'" in repr(event)


@pytest.mark.parametrize(
    ("microseconds", "date"),
    [
        (0, datetime(2000, 1, 1, tzinfo=UTC)),
        (820_454_400_000_001, datetime(2025, 12, 31, 0, 0, 0, 1, tzinfo=UTC)),
        (-1, datetime(1999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)),
        (2_921_940 * 86_400_000_000 - 1, datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)),
        (2_921_940 * 86_400_000_000, None),
        ((1 << 63) - 1, None),
        (-1 << 63, None),
    ],
)
def test_the_date_of_recording_is_none_where_python_has_none(microseconds: int, date: datetime | None) -> None:
    row = parse_structured(structured()).row
    assert Event((*row, 7, microseconds.to_bytes(8, signed=True), 99, 1000)).recorded_at == date
    assert Event(row).recorded_at is None


def test_the_key_is_the_partition_key_else_the_subject_within_its_source() -> None:
    assert parse_structured(structured(partitionkey="k", subject="s")).key == ("partitionkey", "k")
    assert parse_structured(structured(subject="s")).key == ("/s", "s")
    assert parse_structured(structured()).key is None


def test_plain_sql_may_store_what_no_producer_would() -> None:
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
    row[5] = "9999-99-99T99:99:99Z"
    undated = Event(tuple(row))
    assert undated.get_time() is None
    assert "time" not in undated.get_attributes()
    assert undated.attributes_text["time"] == row[5]


def test_extension_attributes_can_be_added_and_replaced() -> None:
    event = Event((*parse_structured(structured(n=1, kept=True, partitionkey="k", data=[1])).row, 5, bytes(8), 9, 1000))
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
    for bad in ({"id": "x"}, {"data": "x"}, {"Upper": "x"}, {"x": "a\nb"}, {"partitionkey": "\x00"}):
        with pytest.raises(EventError):
            attributes_with(event, bad)


def test_extensions_are_parsed_once_on_first_use() -> None:
    event = Event(parse_structured(structured(n=1, x="y")).row)
    with patch("pgbackend.codec.event.read_extensions", wraps=read_extensions) as parse:
        assert event.id == "1"
        assert parse.call_count == 0
        assert (event.value("n"), event.attribute("x"), event.value("absent")) == (1, "y", None)
        assert event.get_attributes() == {**BARE, "n": 1, "x": "y"}
        assert parse.call_count == 1
