"""The event that dispatchers and filters get: one row of the log, with the methods of the SDK's `CloudEvent`.

A reader makes one event of each row, and all subscriptions share it. Its parts are parsed on first use. The promise:
whatever plain SQL has put into the row, reading an attribute returns a value or None and does not raise.
"""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Protocol

from pgbackend.codec.attributes import (
    COLUMNS,
    COLUMNS_03,
    ExtensionValue,
    Row,
    checked_extension,
    event_label,
    extension_text,
    read_extensions,
    write_extensions,
)
from pgbackend.codec.data import decode_data
from pgbackend.errors import EventError

if TYPE_CHECKING:
    from pgbackend.model import Failure

POSITION, RECORDED_AT, KEY_HASH, WEIGHT = range(len(COLUMNS), len(COLUMNS) + 4)
"""Where a row that was read from the log has these, behind `COLUMNS`. The date is as timestamptz_send() has it."""

_TEXT_COLUMNS = {name: index for index, name in enumerate(COLUMNS[:9])}
_DATES_BEGIN = datetime(2000, 1, 1, tzinfo=UTC)


class RecordLike(Protocol):
    """A row of the database driver: `COLUMNS` come first, by index, and the four others follow."""

    def __getitem__(self, index: Any, /) -> Any: ...


class Event:
    """One event of the log. Works wherever the SDK's `CloudEvent` does. Never changes: subscriptions share it.

    It has so many methods because it mirrors the SDK: the `get_` methods are the SDK's, the properties are ours.
    It can be pickled and copied, so a dispatcher may pass it to another process.

    >>> from pgbackend.codec.wire import parse_structured
    >>> event = parse_structured(b'{"specversion":"1.0","id":"1","source":"/shop","type":"order","data":{"n": 1.0}}')
    >>> event.get_data()
    {'n': 1.0}
    >>> event.data_bytes
    b'{"n": 1.0}'
    >>> event.attributes_text
    {'specversion': '1.0', 'id': '1', 'source': '/shop', 'type': 'order'}
    """

    __slots__ = ("_attempt", "_extensions", "_failure", "_row")

    _row: Row
    _extensions: dict[str, ExtensionValue] | None
    """Parsed on first use and kept: the next filter has its answer in 0.2 µs instead of 1."""

    # Only assignments: a reader makes more than 100,000 events a second, and filters skip most of them.
    def __init__(self, row: Row | RecordLike, attempt: int = 1, failure: "Failure | None" = None) -> None:
        """`row`: the values of `COLUMNS`, and of an event that was read from the log the four that follow them."""
        self._row = row  # type: ignore[assignment]  # a driver's record has the same values at the same places
        self._attempt = attempt
        self._failure = failure
        self._extensions = None

    @property
    def position(self) -> int:
        """Its place in the log. 0 before it is stored."""
        row: RecordLike = self._row
        try:
            position: int = row[POSITION]
        except IndexError:
            return 0
        return position

    @property
    def recorded_at(self) -> datetime | None:
        """When the database stored it, by the database's clock. None before, and for a date that Python cannot hold."""
        row: RecordLike = self._row
        try:
            # Decoded when it is asked for: the driver takes 0.8 µs for a datetime, as long as for all other columns.
            return _DATES_BEGIN + timedelta(microseconds=int.from_bytes(row[RECORDED_AT], "big", signed=True))
        except (IndexError, OverflowError):
            return None

    @property
    def attempt(self) -> int:
        """The number of this dispatch. The first is 1."""
        return self._attempt

    @property
    def failure(self) -> "Failure | None":
        """For a `dead_letter` dispatcher, why the event became a dead letter. Otherwise None."""
        return self._failure

    @property
    def specversion(self) -> str:
        """Its version of CloudEvents: `1.0` or `0.3`."""
        return self._row[0]

    @property
    def id(self) -> str:
        """Unique within its source."""
        return self._row[1]

    @property
    def source(self) -> str:
        """Where it happened, a URI-reference."""
        return self._row[2]

    @property
    def type(self) -> str:
        """The kind of occurrence that the event describes."""
        return self._row[3]

    @property
    def subject(self) -> str | None:
        """The object of the occurrence, within its source."""
        return self._row[4]

    @property
    def data_bytes(self) -> bytes | None:
        """Its data as bytes, as they came in. None without data."""
        return self._row[10]

    @property
    def row(self) -> Row:
        """The values of `COLUMNS`."""
        return self._row[:12]

    @property
    def key(self) -> tuple[str, str] | None:
        """Its key under `order="key"`: its partition key, else its source and subject. None when it has neither."""
        row = self._row
        if row[8] is not None:
            return ("partitionkey", row[8])
        return None if row[4] is None else (row[2], row[4])

    @property
    def key_hash(self) -> int:
        """The hash that decides its shard. The database computes it, for subscriptions with several shards only."""
        row: RecordLike = self._row
        return int(row[KEY_HASH])

    @property
    def weight(self) -> int:
        """The most bytes of memory that it takes. Only for events read from the log: the database computes it."""
        row: RecordLike = self._row
        weight: int = row[WEIGHT]
        return weight

    @property
    def attributes_text(self) -> dict[str, str]:
        """Every attribute as the text that came in. Integers and booleans are in CloudEvents' canonical text form."""
        texts = {name: text for name, text in self._core() if text is not None}
        texts.update((name, extension_text(value)) for name, value in self._parsed_extensions().items())
        return texts

    def attribute(self, name: str) -> str | None:
        """The text of one attribute, as in `attributes_text`. None when it is absent."""
        value = self.value(name)
        return value if value is None or isinstance(value, str) else extension_text(value)

    def value(self, name: str) -> ExtensionValue | None:
        """One attribute with its type: an extension may be an int or a bool. An integer beyond 32 bits is text."""
        row = self._row
        index = _TEXT_COLUMNS.get(name)
        if index is not None and (index != 7 or row[0] != "0.3"):
            return row[index]  # type: ignore[return-value]  # the first nine are text
        if name == "schemaurl" and row[0] == "0.3":
            return row[7]
        return self._parsed_extensions().get(name) if row[9] != "{}" else None  # most events have none

    def with_delivery(self, *, attempt: int | None = None, failure: "Failure | None" = None) -> "Event":
        """A copy with this attempt and this failure. An argument that is not given stays as it is."""
        return Event(
            self._row, self._attempt if attempt is None else attempt, self._failure if failure is None else failure
        )

    def with_row(self, row: Row) -> "Event":
        """A copy with these values of `COLUMNS`."""
        return Event((*row, *tuple(self._row)[len(COLUMNS) :]), self._attempt, self._failure)

    def get_id(self) -> str:
        """As in the SDK."""
        return self._row[1]

    def get_source(self) -> str:
        """As in the SDK."""
        return self._row[2]

    def get_type(self) -> str:
        """As in the SDK."""
        return self._row[3]

    def get_specversion(self) -> str:
        """As in the SDK."""
        return self._row[0]

    def get_datacontenttype(self) -> str | None:
        """As in the SDK."""
        return self._row[6]

    def get_dataschema(self) -> str | None:
        """As in the SDK: the `schemaurl` of a 0.3 event."""
        return self._row[7]

    def get_subject(self) -> str | None:
        """As in the SDK."""
        return self._row[4]

    def get_time(self) -> datetime | None:
        """Its time as a datetime: cut to microseconds, a leap second as :59. `attribute("time")` has the full text.

        None without a time, and for a date that does not exist, which only plain SQL can store.
        """
        text = self._row[5]
        return None if text is None else _datetime(text)

    def get_extension(self, extension_name: str) -> Any:
        """Any attribute, as in `get_attributes()`. None when it is absent."""
        return self.get_time() if extension_name == "time" else self.value(extension_name)

    def get_attributes(self) -> dict[str, Any]:
        """All attributes, in a new dict: `time` is a datetime, extensions are str, int or bool."""
        attributes: dict[str, Any] = {name: text for name, text in self._core() if text is not None}
        if (moment := self.get_time()) is not None:
            attributes["time"] = moment
        else:
            attributes.pop("time", None)
        attributes.update(self._parsed_extensions())
        return attributes

    def get_data(self) -> Any:
        """The data that a producer gave. From HTTP or SQL: parsed JSON, str of `text/*`, else bytes. None if empty.

        Parsed at each call, so that one subscription's changes to it stay its own.
        """
        row = self._row
        return decode_data(row[10], row[11], row[6])

    def _core(self) -> Iterator[tuple[str, str | None]]:
        row = self._row
        names = COLUMNS if row[0] != "0.3" else COLUMNS_03
        return zip(names[:9], row[:9], strict=True)

    def _parsed_extensions(self) -> dict[str, ExtensionValue]:
        extensions = self._extensions
        if extensions is None:
            extensions = self._extensions = read_extensions(self._row[9])
        return extensions

    def __reduce__(self) -> tuple[Any, ...]:
        # pickle and copy do not know a driver's record, but a tuple.
        return type(self), (tuple(self._row), self._attempt, self._failure)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Event):
            return NotImplemented
        return self.position == other.position and self.row == other.row

    def __hash__(self) -> int:
        return hash((self._row[1], self._row[2]))

    def __repr__(self) -> str:
        row = self._row
        return f"<Event {self.position} {row[3]!r} id={row[1]!r} source={row[2]!r}>"


def _datetime(text: str) -> datetime | None:
    text = text.upper()
    if text[17:19] == "60":
        text = f"{text[:17]}59{text[19:]}"  # datetime has no leap second
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def attributes_with(event: Event, extra: Mapping[str, str]) -> Event:
    """A copy of the event with these extension attributes set. Raises `EventError` for other attributes.

    >>> from pgbackend.codec.wire import parse_structured
    >>> event = parse_structured(b'{"specversion":"1.0","id":"1","source":"/shop","type":"order"}')
    >>> attributes_with(event, {"hops": "2"}).attribute("hops")
    '2'
    """
    row = event.row
    core = COLUMNS[:8] if row[0] != "0.3" else (*COLUMNS[:8], "schemaurl")
    extensions = read_extensions(row[9])
    for name, value in extra.items():
        if name in core:
            raise EventError(f"{event_label(row[1], row[2])}: {name!r} is not an extension attribute.")
        try:
            extensions[name] = checked_extension(name, value)
        except EventError as error:
            raise EventError(f"{event_label(row[1], row[2])}: {error}") from None
    key = row[8]
    if "partitionkey" in extra:
        key = str(extensions.pop("partitionkey")) or None
    return event.with_row((*row[:8], key, write_extensions(extensions), row[10], row[11]))
