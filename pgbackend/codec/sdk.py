"""From the events that producers give to rows of the log.

`encode` takes the event that `produce()` was given, from the SDK, from a log or as JSON, and returns a row for the
appender, or raises `EventError`. The promise: the row shares nothing with the event, and an `Event` of the row returns
each value that went in.
"""

from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, cast

from pgbackend.codec.attributes import (
    ATTRIBUTES_BYTES,
    Row,
    attributes_size,
    checked_row,
    event_label,
    event_size,
    is_uri_reference,
    label_from,
)
from pgbackend.codec.data import encode_data, kind_of
from pgbackend.codec.event import Event
from pgbackend.codec.json_format import structured_row
from pgbackend.errors import EventError

if TYPE_CHECKING:
    from cloudevents.core.base import BaseCloudEvent


def encode(event: "BaseCloudEvent | bytes", *, max_event_bytes: int) -> tuple[Row, int]:
    """The event as a row that shares nothing with it, and the most bytes of memory that the row takes.

    Bytes are an event in the JSON format.

    Raises `EventError` when it is not a valid CloudEvent, when JSON would change its data, or when it is too large.
    """
    if isinstance(event, bytes):
        row, size = structured_row(event), len(event)
        if size <= ATTRIBUTES_BYTES and size <= max_event_bytes:
            # Its texts are no longer than they are in JSON, so it is within all limits.
            return row, size * 4
    else:
        row = event.row if isinstance(event, Event) else _encode(event)
    # A character is at most four bytes, in UTF-8 and in memory. Only events near a limit are measured exactly.
    attributes = _characters(row) * 4
    weight = attributes + len(row[10] or b"")
    if attributes > ATTRIBUTES_BYTES and (size := attributes_size(row)) > ATTRIBUTES_BYTES:
        raise EventError(
            f"{event_label(row[1], row[2])} has {size:,} bytes of attributes: expected at most {ATTRIBUTES_BYTES:,}. "
            "Move the long ones into its data."
        )
    if weight > max_event_bytes and (size := event_size(row)) > max_event_bytes:
        raise EventError(
            f"{event_label(row[1], row[2])} has {size:,} bytes: max_event_bytes is {max_event_bytes:,}. "
            "Keep its data elsewhere and send a reference (`dataref`), or raise the limit."
        )
    return row, weight


def encode_many(
    events: "Sequence[BaseCloudEvent | bytes]", *, max_event_bytes: int
) -> "tuple[Sequence[Row] | EncodedLater, int]":
    """The rows of these events, and the most bytes of memory that they take. Raises `EventError` as `encode()` does.

    Events that are all bytes cannot change, so their rows are made later, while PostgreSQL stores those before.
    """
    if all(isinstance(event, bytes) for event in events):
        later = EncodedLater(cast("Sequence[bytes]", events), max_event_bytes=max_event_bytes)
        return later, sum(map(len, later.events))
    encoded = [encode(event, max_event_bytes=max_event_bytes) for event in events]
    return [row for row, _ in encoded], sum(weight for _, weight in encoded)


class EncodedLater:
    """The rows of events in the JSON format, each made when it is iterated over, which raises as `encode()` does."""

    def __init__(self, events: Sequence[bytes], *, max_event_bytes: int) -> None:
        self.events = events
        self._max_event_bytes = max_event_bytes

    def __len__(self) -> int:
        return len(self.events)

    def __iter__(self) -> Iterator[Row]:
        for event in self.events:
            yield encode(event, max_event_bytes=self._max_event_bytes)[0]


def as_event(event: "BaseCloudEvent") -> Event:
    """The event as an `Event` without a position. Raises `EventError` when it is not a valid CloudEvent."""
    return event if isinstance(event, Event) else Event(_encode(event))


def _characters(row: Row) -> int:
    """The number of characters of all attributes."""
    # Written out, because a loop takes twice the time.
    return (
        len(row[1])
        + len(row[2])
        + len(row[3])
        + len(row[4] or "")
        + len(row[5] or "")
        + len(row[6] or "")
        + len(row[7] or "")
        + len(row[8] or "")
        + len(row[9])
        + 3
    )


def _encode(event: "BaseCloudEvent") -> Row:
    try:
        attributes: dict[str, object] = event.get_attributes()
        data: object = event.get_data()
        plain = _plain_texts(attributes)
        if plain is None:
            attributes = dict(attributes)
    except (AttributeError, TypeError, ValueError) as error:
        raise EventError(
            f"Expected a CloudEvent of cloudevents.core (get_attributes, get_data), not {type(event).__name__}: {error}"
        ) from error
    if plain is None:
        for name, value in attributes.items():
            if type(value) is not str and value is not None:
                attributes[name] = _attribute_from_sdk(attributes, name, value)
    try:
        encoded, encoding = encode_data(data, attributes.get("datacontenttype"))
    except EventError as error:
        raise EventError(f"{label_from(attributes)}: data {error}") from error.__cause__
    if plain is not None:
        return (*plain, None, None, "{}", encoded, encoding)
    return checked_row(attributes, encoded, encoding)


def _plain_texts(attributes: dict[str, object]) -> tuple[str, str, str, str, str | None, str | None, str | None] | None:
    """The first seven columns of an event that has no extensions and only plain attributes; None for any other.

    May refuse valid events, but never accepts an invalid one: `checked_row` decides about the others and words the
    errors. Most events are this plain, and take 1.5 µs instead of 5.
    """
    get = attributes.get
    id_, source, type_, subject = get("id"), get("source"), get("type"), get("subject")
    content_type, time = get("datacontenttype"), get("time")
    count = 4 + (subject is not None) + (content_type is not None) + (time is not None)
    if len(attributes) != count or get("specversion") != "1.0":
        return None
    if type(id_) is not str or type(source) is not str or type(type_) is not str or not (id_ and source and type_):
        return None
    texts = id_ + source + type_
    if subject is not None:
        if type(subject) is not str or not subject:
            return None
        texts += subject
    if content_type is not None and (type(content_type) is not str or not kind_of(content_type)):
        return None
    if time is not None:
        if type(time) is not datetime or time.tzinfo is not UTC:
            return None
        time = time.replace(tzinfo=None).isoformat() + "Z"
    if not texts.isprintable() or not is_uri_reference(source):
        return None
    return "1.0", id_, source, type_, subject, time, content_type


def _attribute_from_sdk(attributes: Mapping[str, object], name: object, value: object) -> object:
    """The value in its CloudEvents form: str, int or bool. Others stay as they are: `checked_row` refuses them."""
    if isinstance(value, str):
        return str.__str__(value)  # the value of an enum, not its name
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise EventError(f"{label_from(attributes)}: attribute {name!r} is a datetime without a time zone.")
        if value.tzinfo is UTC:  # nearly always; asking the zone for its offset would double the time
            return value.replace(tzinfo=None).isoformat() + "Z"
        text = value.isoformat()
        return text.removesuffix("+00:00") + "Z" if text.endswith("+00:00") else text
    if isinstance(value, bytes | bytearray | memoryview):
        return b64encode(value).decode()
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    return value
