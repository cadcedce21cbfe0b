"""CloudEvents to rows of the log and back, byte for byte, and the event that dispatchers are handed.

Everything that enters the log passes through here once: `encode` takes the SDK's objects, `parse_structured`,
`parse_batch` and `parse_binary` take what came over HTTP; each either returns what one `events` row holds or raises
`EventError`. The promise: attribute texts and data bytes come out as they went in, over any mix of content modes (I8).

How data is kept, by `data_encoding`:

    'json'    the text of a JSON value: a structured `data` member as it stood there, or an SDK event's dict, list,
              number, bool, or str under a JSON content type
    'text'    the UTF-8 of a string that is not JSON: structured `data`, or an SDK event's str, under another type
    'base64'  octets: `data_base64`, or an SDK event's bytes
    None      a body of HTTP binary mode, or data from plain SQL: the content type says what it is

White space around a structured `data` member belongs to the envelope, not to the value, and is not kept.

Rejected: the SDK's own JSON and HTTP bindings, because they decode and re-encode data, cut times to microseconds,
guess types and invent missing attributes. Rejected: orjson, because it cannot hand out the text of a member.
"""

import json
import re
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import lru_cache
from json.encoder import encode_basestring
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Protocol
from urllib.parse import quote, unquote_to_bytes

from pgbackend.errors import EventError

if TYPE_CHECKING:
    from cloudevents.core.base import BaseCloudEvent

    from pgbackend.model import Failure

Row = tuple[
    str, str, str, str, str | None, str | None, str | None, str | None, str | None, str, bytes | None, str | None
]
"""The values of `COLUMNS`, in their order."""

ExtensionValue = str | int | bool

COLUMNS = (
    "specversion",
    "id",
    "source",
    "type",
    "subject",
    "time",
    "datacontenttype",
    "dataschema",
    "partitionkey",
    "extensions",
    "data",
    "data_encoding",
)
"""What producers write of an `events` row."""

_TEXT_COLUMNS = {name: index for index, name in enumerate(COLUMNS[:9])}


class RecordLike(Protocol):
    """A row as the database driver returns it: `COLUMNS` first, by index."""

    def __getitem__(self, index: Any, /) -> Any: ...


class ContentTypeError(EventError):
    """The message is not a CloudEvent, or in an event format other than JSON. HTTP's word for it is 415."""


class Event:
    """One event of the log. Works wherever the SDK's `CloudEvent` does, and is never changed: subscriptions share it.

    >>> event = parse_structured(b'{"specversion":"1.0","id":"1","source":"/shop","type":"order","data":{"n": 1.0}}')
    >>> event.get_data()
    {'n': 1.0}
    >>> event.data_bytes
    b'{"n": 1.0}'
    >>> event.attributes_text
    {'specversion': '1.0', 'id': '1', 'source': '/shop', 'type': 'order'}
    """

    __slots__ = ("_attempt", "_failure", "_position", "_recorded_at", "_row")

    _row: Row

    # Stores and nothing else: a reader makes more than 100,000 of these a second, most of them for a filter's glance.
    def __init__(
        self,
        row: Row | RecordLike,
        position: int = 0,
        recorded_at: datetime | None = None,
        attempt: int = 1,
        failure: "Failure | None" = None,
    ) -> None:
        self._row = row  # type: ignore[assignment]  # a driver's record has the same values at the same places
        self._position = position
        self._recorded_at = recorded_at
        self._attempt = attempt
        self._failure = failure

    @property
    def position(self) -> int:
        """Its place in the log; 0 while it has none."""
        return self._position

    @property
    def recorded_at(self) -> datetime | None:
        """When the database took it in, by the database's clock."""
        return self._recorded_at

    @property
    def attempt(self) -> int:
        """Which dispatch this is, counted from 1."""
        return self._attempt

    @property
    def failure(self) -> "Failure | None":
        """Why it was given up, for a `dead_letter` dispatcher; None otherwise."""
        return self._failure

    @property
    def specversion(self) -> str:
        """The version of CloudEvents that it follows: `1.0` or `0.3`."""
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
        """What kind of thing happened."""
        return self._row[3]

    @property
    def subject(self) -> str | None:
        """What it happened to, within its source."""
        return self._row[4]

    @property
    def data_bytes(self) -> bytes | None:
        """Its data as bytes, as they came in; None when it has none."""
        return self._row[10]

    @property
    def row(self) -> Row:
        """The values of `COLUMNS`."""
        return self._row[:12]

    @property
    def key(self) -> tuple[str, str] | None:
        """What orders it under `order="key"`: its partition key, else its subject within its source; None without."""
        row = self._row
        if row[8] is not None:
            return ("partitionkey", row[8])
        return None if row[4] is None else (row[2], row[4])

    @property
    def key_hash(self) -> int:
        """What shards are cut by. Only for events that were read from the log: the database works it out."""
        row: RecordLike = self._row
        return int(row[14])

    @property
    def attributes_text(self) -> dict[str, str]:
        """Every attribute as the text that came in; integers and booleans in CloudEvents' canonical text form."""
        texts = {name: text for name, text in self._core() if text is not None}
        texts.update((name, _canonical(value)) for name, value in _extensions(self._row))
        return texts

    def attribute(self, name: str) -> str | None:
        """The text of one attribute as in `attributes_text`; None when it is absent. Without reading the others."""
        value = self.value(name)
        return value if value is None or isinstance(value, str) else _canonical(value)

    def value(self, name: str) -> ExtensionValue | None:
        """The same with its type: an extension may be an integer or a boolean. Beyond 32 bits, it is text."""
        row = self._row
        index = _TEXT_COLUMNS.get(name)
        if index is not None and (index != 7 or row[0] != "0.3"):
            return row[index]  # type: ignore[return-value]  # the first nine are text
        if name == "schemaurl" and row[0] == "0.3":
            return row[7]
        value = None if row[9] == "{}" else json.loads(row[9]).get(name)
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, int) and -0x8000_0000 <= value <= 0x7FFF_FFFF:
            return value
        return _canonical(value)  # plain SQL may have stored anything

    def with_delivery(self, *, attempt: int | None = None, failure: "Failure | None" = None) -> "Event":
        """A copy with this attempt and this failure; what is not given stays."""
        return Event(
            self._row,
            self._position,
            self._recorded_at,
            self._attempt if attempt is None else attempt,
            self._failure if failure is None else failure,
        )

    def get_id(self) -> str:
        """As the SDK's."""
        return self._row[1]

    def get_source(self) -> str:
        """As the SDK's."""
        return self._row[2]

    def get_type(self) -> str:
        """As the SDK's."""
        return self._row[3]

    def get_specversion(self) -> str:
        """As the SDK's."""
        return self._row[0]

    def get_datacontenttype(self) -> str | None:
        """As the SDK's."""
        return self._row[6]

    def get_dataschema(self) -> str | None:
        """As the SDK's: `schemaurl` of a 0.3 event."""
        return self._row[7]

    def get_subject(self) -> str | None:
        """As the SDK's."""
        return self._row[4]

    def get_time(self) -> datetime | None:
        """Its time as far as a datetime goes: microseconds, and a leap second as :59. The full text: `attribute`."""
        text = self._row[5]
        return None if text is None else _datetime(text)

    def get_extension(self, extension_name: str) -> Any:
        """Any attribute as in `get_attributes()`; None when it is absent."""
        value = next((value for name, value in _extensions(self._row) if name == extension_name), None)
        return self.get_attributes().get(extension_name) if value is None else value

    def get_attributes(self) -> dict[str, Any]:
        """All attributes, in a dict of the caller's own: `time` a datetime, extensions str, int or bool."""
        attributes: dict[str, Any] = {name: text for name, text in self._core() if text is not None}
        if "time" in attributes:
            attributes["time"] = self.get_time()
        attributes.update(_extensions(self._row))
        return attributes

    def get_data(self) -> Any:
        """What a producer gave as data; read from HTTP or SQL: parsed JSON, str of `text/*`, else bytes. None without.

        Parsed anew at each call: what one subscription does to it, another does not see.
        """
        row = self._row
        data, encoding = row[10], row[11]
        if data is None or encoding == "base64":
            return data
        if encoding is None:
            encoding = _kind(row[6])
        try:
            if encoding == "json":
                return _decoder.decode(data.decode())
            return data.decode() if encoding == "text" else data
        except (ValueError, RecursionError):
            return data  # plain SQL, or a body that is not what its content type says

    def _core(self) -> Iterator[tuple[str, str | None]]:
        row = self._row
        names = COLUMNS if row[0] != "0.3" else _COLUMNS_03
        return zip(names[:9], row[:9], strict=True)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Event):
            return NotImplemented
        return self._position == other._position and self.row == other.row

    def __hash__(self) -> int:
        return hash((self._row[1], self._row[2]))

    def __repr__(self) -> str:
        row = self._row
        return f"<Event {self._position} {row[3]!r} id={row[1]!r} source={row[2]!r}>"


_COLUMNS_03 = tuple("schemaurl" if name == "dataschema" else name for name in COLUMNS)


# ── from an SDK event ─────────────────────────────────────────────────────────────────────────────────────────────────


def encode(event: "BaseCloudEvent", *, max_event_bytes: int) -> Row:
    """The event as a row that shares nothing with it: later changes to the event do not reach the log.

    Raises `EventError` when it is not a valid CloudEvent, when JSON would change its data, or when it is too large.
    """
    row = event.row if isinstance(event, Event) else _encode(event)
    # A character is at most four bytes, so that only events near the limit are measured exactly.
    if _characters(row) * 4 > max_event_bytes and (size := size_of(row)) > max_event_bytes:
        raise EventError(
            f"{_whose(row[1], row[2])} has {size:,} bytes, more than max_event_bytes = {max_event_bytes:,}. "
            "Keep its data elsewhere and send a reference (`dataref`), or raise the limit."
        )
    return row


def size_of(row: Row) -> int:
    """Bytes of the event's data and of all its attribute texts."""
    return len(row[10] or b"") + sum(len(text.encode()) for text in row[:10] if isinstance(text, str))


def _characters(row: Row) -> int:
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
        + len(row[10] or b"")
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
        content_type = attributes.get("datacontenttype")
        encoded, encoding = _data_from_sdk(
            data, is_json=not isinstance(content_type, str) or _kind(content_type) == "json"
        )
    except EventError as error:
        raise EventError(f"{_whose_of(attributes)}: data {error}") from error.__cause__
    if plain is not None:
        return (*plain, None, None, "{}", encoded, encoding)
    return _row_of(attributes, encoded, encoding)


def _plain_texts(attributes: dict[str, object]) -> tuple[str, str, str, str, str | None, str | None, str | None] | None:
    """The first seven columns of an event without extensions whose attributes are beyond doubt; None of any other.

    Says no to much that is valid, and yes to nothing that is not: the way of all others decides, and words the errors.
    Most events come by here, in 1.5 µs instead of 5.
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
    if content_type is not None and (type(content_type) is not str or not _kind(content_type)):
        return None
    if time is not None:
        if type(time) is not datetime or time.tzinfo is not UTC:
            return None
        time = time.replace(tzinfo=None).isoformat() + "Z"
    if not texts.isprintable() or not _is_uri_reference(source):
        return None
    return "1.0", id_, source, type_, subject, time, content_type


def _attribute_from_sdk(attributes: Mapping[str, object], name: object, value: object) -> object:
    """The value in its CloudEvents form: str, int or bool. Others than these the row's checks refuse by name."""
    if isinstance(value, str):
        return str.__str__(value)  # of an enum its value, not its name
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise EventError(f"{_whose_of(attributes)}: attribute {name!r} is a datetime without a time zone.")
        if value.tzinfo is UTC:  # as nearly always; asking the zone costs as much as the rest
            return value.replace(tzinfo=None).isoformat() + "Z"
        text = value.isoformat()
        return text.removesuffix("+00:00") + "Z" if text.endswith("+00:00") else text
    if isinstance(value, bytes | bytearray | memoryview):
        return b64encode(value).decode()
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    return value


def _data_from_sdk(data: object, *, is_json: bool) -> tuple[bytes | None, str | None]:
    if data is None:
        return None, None
    if isinstance(data, bytes | bytearray | memoryview):
        return bytes(data), "base64"
    try:
        if isinstance(data, str) and not is_json:
            return data.encode(), "text"
        _check_json(data)
        return _encoder.encode(data).encode(), "json"
    except UnicodeEncodeError:
        raise EventError("has a lone surrogate, which UTF-8 cannot hold.") from None
    except RecursionError:
        raise EventError("is nested too deeply, or contains itself.") from None
    except EventError:
        raise
    except ValueError as error:  # NaN, or an integer of thousands of digits
        raise EventError(f"cannot be written as JSON: {error}.") from error


_SCALARS = frozenset((str, int, bool, float, type(None)))


def _check_json(value: object) -> None:
    """Raise for what `json.dumps` would take and silently change: a tuple, a key that is not text, …."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise EventError(f"has the key {key!r:.80}: JSON would turn it into text. Use str keys.")
            if type(item) not in _SCALARS:
                _check_json(item)
    elif isinstance(value, list):
        for item in value:
            if type(item) not in _SCALARS:
                _check_json(item)
    elif value is not None and not isinstance(value, str | int | float):
        raise EventError(
            f"has a {type(value).__name__}, which does not come back from JSON as it went in. "
            "Use dict, list, str, int, float, bool and None, or encode it to bytes."
        )


# ── from HTTP ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def mode_of(content_type: str | None) -> Literal["binary", "structured", "batch"]:
    """The content mode of a message, by its Content-Type alone. Raises `ContentTypeError` for formats but JSON.

    >>> mode_of("Application/CloudEvents+JSON; charset=utf-8"), mode_of("application/json"), mode_of(None)
    ('structured', 'binary', 'binary')
    """
    media_type = (content_type or "").partition(";")[0].strip().lower()
    if not media_type.startswith("application/cloudevents"):
        return "binary"
    if media_type == "application/cloudevents-batch+json":
        return "batch"
    if media_type in ("application/cloudevents+json", "application/cloudevents"):
        return "structured"
    raise ContentTypeError(
        f"{media_type!r} is an event format that is not supported here. "
        "Send application/cloudevents+json, application/cloudevents-batch+json, or binary mode."
    )


def parse_structured(body: bytes) -> Event:
    """The event of a structured message, or `EventError`."""
    text = _utf8_text(body)
    row, end = _read_event(text, _skip(text, 0))
    _end_of(text, end)
    return Event(row)


def parse_batch(body: bytes) -> list[Event]:
    """All events of a batch, or `EventError` that names the index of the first bad one."""
    text = _utf8_text(body)
    pos = _skip(text, 0)
    if not text.startswith("[", pos):
        raise EventError("A batch is a JSON array of events; this is something else.")
    events: list[Event] = []
    pos = _skip(text, pos + 1)
    if text.startswith("]", pos):
        _end_of(text, pos + 1)
        return events
    while True:
        try:
            row, pos = _read_event(text, pos)
        except EventError as error:
            raise EventError(f"Batch, index {len(events)}: {error}") from error.__cause__
        events.append(Event(row))
        pos = _skip(text, pos)
        if text.startswith("]", pos):
            _end_of(text, pos + 1)
            return events
        if not text.startswith(",", pos):
            raise EventError(f"Not JSON: expected ',' or ']' at character {pos}, after index {len(events) - 1}.")
        pos = _skip(text, pos + 1)


_SPACE = r"[ \t\n\r]*+"
# One member, in one match when its value is a string without escapes, as nearly all attributes are.
_member = re.compile(rf'{_SPACE}"([^"\\\x00-\x1f]*+)"{_SPACE}:{_SPACE}(?:"([^"\\\x00-\x1f]*+)"{_SPACE}([,}}]))?').match
_colon = re.compile(rf"{_SPACE}:{_SPACE}").match
_stop = re.compile(rf"{_SPACE}([,}}])").match
_space = re.compile(_SPACE).match


def _read_event(text: str, pos: int) -> tuple[Row, int]:
    """The event whose JSON object begins at `pos`, and where it ends."""
    if not text.startswith("{", pos):
        raise EventError("An event in JSON is an object; this is something else.")
    members, pos = _read_head(text, pos)
    data, pos = _read_members(text, pos, members)
    try:
        encoded, encoding = _data_of(members, data)
    except EventError as error:
        raise EventError(f"{_whose_of(members)}: {error}") from None
    return _row_of(members, encoded, encoding), pos


def _read_head(text: str, pos: int) -> tuple[dict[str, object], int]:
    """The members before `data`, read in one step (measured: 34 → 14 µs an event), and where the next one begins.

    None of them when this is not how most senders write it. That it is a member `data` that was found, and no string
    of that text, follows from the text before it being an object once it is closed.
    """
    at = text.find('"data"', pos, pos + 4096)
    head = text[pos:at].rstrip(" \t\n\r") if at > 0 else ""
    if head.endswith(","):
        try:
            members, end = _head_decoder.raw_decode(head[:-1] + "}")
        except (ValueError, RecursionError):
            return {}, pos + 1  # reading one by one finds it again, and says what it is
        if end == len(head):
            return members, at
    return {}, pos + 1


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member stands there twice")
    return members


def _read_members(text: str, pos: int, members: dict[str, object]) -> tuple[str, int]:
    """The text of `data`, or none, and where the object ends; its other members from `pos` on join `members`."""
    data = ""
    if not members and (end := _skip(text, pos)) and text.startswith("}", end):
        return data, end + 1
    stop = ","
    while stop == ",":
        match = _member(text, pos)
        if match is None:
            name, start = _escaped_name(text, pos)
            stop = ""
        else:
            name, value, stop = match.groups()
            start = match.end()
        if name in members:
            raise EventError(f"{_whose_of(members)}: member {_short(name)} stands there twice.")
        if match is not None and stop:
            members[name], pos = value, start
            if name == "data":
                data = text[match.start(2) - 1 : match.end(2) + 1]
            continue
        members[name], pos = _value(text, start)
        if name == "data":
            data = text[start:pos]
        if (after := _stop(text, pos)) is None:
            raise EventError(f"Not JSON: expected ',' or '}}' at character {pos}, after member {_short(name)}.")
        stop, pos = after[1], after.end()
    return data, pos


def _escaped_name(text: str, pos: int) -> tuple[str, int]:
    name, end = _value(text, _skip(text, pos))
    colon = _colon(text, end)
    if not isinstance(name, str) or colon is None:
        raise EventError(f"Not JSON: expected a member name and ':' at character {pos}.")
    return name, colon.end()


def _value(text: str, pos: int) -> tuple[object, int]:
    try:
        return _decoder.raw_decode(text, pos)
    except RecursionError:
        raise EventError("The JSON is nested too deeply.") from None
    except json.JSONDecodeError as error:
        raise EventError(f"Not JSON: {error.msg} at character {error.pos}.") from None
    except ValueError as error:  # NaN, or an integer of thousands of digits
        raise EventError(f"JSON that cannot be kept: {error}") from None


def _data_of(members: dict[str, object], text: str) -> tuple[bytes | None, str | None]:
    """Take the data members out; `text` is that of the value of `data`."""
    octets = members.pop("data_base64", None) if members.get("specversion") != "0.3" else None
    if not text:
        return (None, None) if octets is None else (_octets(octets, "data_base64"), "base64")
    value = members.pop("data")
    if octets is not None:
        raise EventError("both data and data_base64 are present: only one may be.")
    if members.get("datacontentencoding") == "base64" and members.get("specversion") == "0.3":
        return _octets(value, "data"), "base64"
    content_type = members.get("datacontenttype")
    try:
        if isinstance(value, str) and isinstance(content_type, str) and _kind(content_type) != "json":
            return value.encode(), "text"
        return text.encode(), "json"
    except UnicodeEncodeError:
        raise EventError("data has a lone surrogate, which UTF-8 cannot hold.") from None


def _octets(text: object, name: str) -> bytes:
    try:
        if isinstance(text, str):
            return b64decode(text, validate=True)
    except ValueError:
        pass
    raise EventError(f"{name} is not base64.")


def parse_binary(headers: Iterable[tuple[bytes, bytes]], body: bytes) -> Event:
    """The event of a binary-mode message, or `EventError`: `ContentTypeError` when no header speaks of CloudEvents.

    >>> headers = [(b"CE-Id", b"1"), (b"ce-source", b"/shop"), (b"ce-type", b"caf%C3%A9"), (b"ce-specversion", b"1.0")]
    >>> parse_binary(headers, b"").attributes_text
    {'specversion': '1.0', 'id': '1', 'source': '/shop', 'type': 'café'}
    """
    row = _plain_row(headers, body)
    if row is not None:
        return Event(row)
    attributes: dict[str, object] = {}
    content_type: str | None = None
    for header, octets in headers:
        name = header.lower()
        if name.startswith(b"ce-"):
            attribute = name[3:].decode("latin-1")
            if attribute in attributes:
                raise EventError(f"{_whose_of(attributes)}: header {_short('ce-' + attribute)} stands there twice.")
            attributes[attribute] = _read_header(attribute, octets)
        elif name == b"content-type":
            if content_type is not None:
                raise EventError("Header Content-Type stands there twice.")
            content_type = _latin_header(octets)
    if not attributes:
        raise ContentTypeError("Not a CloudEvent: neither a cloudevents Content-Type nor ce- headers.")
    if "datacontenttype" in attributes:
        raise EventError(f"{_whose_of(attributes)}: header ce-datacontenttype is not allowed. Use Content-Type.")
    attributes["datacontenttype"] = content_type or None
    return Event(_row_of(attributes, bytes(body) or None, None))


_PLAIN_HEADERS = {
    b"ce-specversion": 0,
    b"ce-id": 1,
    b"ce-source": 2,
    b"ce-type": 3,
    b"ce-subject": 4,
    b"ce-time": 5,
    b"content-type": 6,
}
_NO_EXTENSIONS = ("datacontenttype", "dataschema")
_plain_octets = re.compile(rb"[!#-$&-~]++").fullmatch


def _plain_row(headers: Iterable[tuple[bytes, bytes]], body: bytes) -> Row | None:
    """The row of an event that stands in lower-case headers of plain ASCII; None of any other.

    As `_plain_texts`: says no to much that is valid, and yes to nothing that is not. In 1.9 µs instead of 5.
    """
    values: list[bytes] = [b""] * 7
    extensions: dict[str, bytes] = {}
    for name, octets in headers:
        place = _PLAIN_HEADERS.get(name)
        if place is not None:
            if values[place] or not octets:
                return None
            values[place] = octets
        elif name.startswith(b"ce-"):
            attribute = name[3:].decode("latin-1")
            if attribute in extensions or attribute in _NO_EXTENSIONS or not octets:
                return None
            extensions[attribute] = octets
        elif not name.islower():
            return None
    version, id_, source, type_, subject, time, content_type = values
    if version != b"1.0" or not (id_ and source and type_):
        return None
    octets = id_ + source + type_ + subject + time
    if extensions:
        octets += b"".join(extensions.values())
    if not _plain_octets(octets) or not content_type.isascii() or content_type.endswith((b" ", b"\t")):
        return None
    origin, moment, media_type = source.decode(), time.decode(), content_type.decode()
    if not _is_uri_reference(origin) or (moment and not _time(moment)) or (media_type and not _kind(media_type)):
        return None
    key, written = None, "{}"
    if extensions:
        texts = {name: octets.decode() for name, octets in extensions.items()}
        key = texts.pop("partitionkey", None)
        try:
            written = _write_extensions(texts)
        except EventError:
            return None
    return (
        "1.0",
        id_.decode(),
        origin,
        type_.decode(),
        subject.decode() or None,
        moment or None,
        media_type or None,
        None,
        key,
        written,
        bytes(body) or None,
        None,
    )


def _latin_header(octets: bytes) -> str:
    # A content type beyond ASCII is refused by its own check, which names the event.
    return octets.decode("latin-1").strip(" \t")


_unescape = re.compile(rb"\\(.)", re.DOTALL).sub


def _read_header(name: str, octets: bytes) -> str:
    """Undo quoting, then one round of percent-coding. A `%` that encodes nothing stays: not every sender encodes."""
    octets = octets.strip(b" \t")
    if octets[:1] == b'"' and octets[-1:] == b'"' and len(octets) > 1:
        octets = _unescape(rb"\1", octets[1:-1])
    if b"%" in octets:
        octets = unquote_to_bytes(octets)
    try:
        return octets.decode()
    except UnicodeDecodeError:
        raise EventError(f"Header {_short('ce-' + name)} is not UTF-8, or percent-codes something else.") from None


def _utf8_text(body: bytes) -> str:
    try:
        return str(body, "utf-8")
    except UnicodeDecodeError as error:
        raise EventError(f"Not UTF-8 at byte {error.start}: JSON events are UTF-8.") from None


def _skip(text: str, pos: int) -> int:
    match = _space(text, pos)
    return match.end() if match else pos


def _end_of(text: str, pos: int) -> None:
    if _skip(text, pos) != len(text):
        raise EventError(f"Not JSON: something follows at character {pos}.")


# ── what makes an event valid ─────────────────────────────────────────────────────────────────────────────────────────

# What CloudEvents forbids in a String. Whatever Python calls printable has none of it, which is the fast answer.
_forbidden = re.compile(
    "[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef"
    + "".join(chr(plane << 16 | low) for plane in range(17) for low in (0xFFFE, 0xFFFF))
    + "]"
).search
_name = re.compile(r"[a-z0-9]+").fullmatch
# Of RFC 3986 what costs little and catches mistakes: its excluded characters and broken escapes. IRIs pass.
_URI_PLAIN = r"[^\s\x00-\x20\x7f<>\"\\^`{|}%]*+"
_URI_CHARACTERS = rf"{_URI_PLAIN}(?:%[0-9A-Fa-f]{{2}}{_URI_PLAIN})*+"
_uri_reference = re.compile(_URI_CHARACTERS).fullmatch
_uri = re.compile(rf"[A-Za-z][A-Za-z0-9+.-]*+:(?!\Z){_URI_CHARACTERS}").fullmatch
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]++"  # noqa: S105 - HTTP's token
_media_type = re.compile(rf"{_TOKEN}/{_TOKEN}(?: *+;[\x20-\x7e]*+)?").fullmatch
_time = re.compile(
    r"""(?!0000)                                    # datetime has no year 0, so that a dispatcher could not read it
        (?: \d{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|1\d|2[0-8])
          | \d{4}-(?:0[13-9]|1[0-2])-(?:29|30)
          | \d{4}-(?:0[13578]|1[02])-31
          | (?:\d\d(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29
        )
        [Tt](?:[01]\d|2[0-3]):[0-5]\d:(?:[0-5]\d|60)(?:\.\d+)?
        (?:[Zz]|[+-](?:[01]\d|2[0-3]):[0-5]\d)""",
    re.ASCII | re.VERBOSE,
).fullmatch


def _row_of(attributes: dict[str, object], data: bytes | None, encoding: str | None) -> Row:
    """The row of these attributes, each checked; takes them out of the dict. None is absent."""
    id_, source = attributes.get("id"), attributes.get("source")
    try:
        return _checked_row(attributes, data, encoding)
    except EventError as error:
        raise EventError(f"{_whose(id_, source)}: {error}") from None


def _checked_row(attributes: dict[str, object], data: bytes | None, encoding: str | None) -> Row:
    specversion = attributes.pop("specversion", None)
    if specversion != "1.0":
        if specversion is None:
            raise EventError("attribute 'specversion' is missing.")
        if specversion != "0.3":
            raise EventError(f"attribute 'specversion' is {_short(specversion)}: expected '1.0'.")
        if attributes.get("dataschema") is not None:
            raise EventError("attribute 'dataschema' is not one of CloudEvents 0.3. Use 'schemaurl'.")
        attributes["dataschema"] = attributes.pop("schemaurl", None)
    take = attributes.pop
    id_ = _text("id", take("id", None))
    source = _text("source", take("source", None))
    if not _is_uri_reference(source):
        raise EventError(f"attribute 'source' is {_short(source)}: expected a URI-reference.")
    type_ = _text("type", take("type", None))
    subject = None if (value := take("subject", None)) is None else _text("subject", value)
    time = None if (value := take("time", None)) is None else _text("time", value)
    if time is not None and not _time(time):
        raise EventError(f"attribute 'time' is {_short(time)}: expected an RFC 3339 timestamp.")
    content_type = None if (value := take("datacontenttype", None)) is None else _text("datacontenttype", value)
    if content_type is not None and not _kind(content_type):
        raise EventError(f"attribute 'datacontenttype' is {_short(content_type)}: expected a media type.")
    schema = None if (value := take("dataschema", None)) is None else _text("dataschema", value)
    if schema is not None and not _uri(schema):
        raise EventError(f"attribute 'dataschema' is {_short(schema)}: expected an absolute URI.")
    key = None if (value := take("partitionkey", None)) is None else _text("partitionkey", value)
    extensions = _write_extensions(attributes) if attributes else "{}"
    return (specversion, id_, source, type_, subject, time, content_type, schema, key, extensions, data, encoding)


def _is_uri_reference(text: str) -> bool:
    # A producer has few sources: remembering them costs a fifth of looking again. Long ones are not kept: somebody may
    # send thousands of different ones, of a megabyte each.
    return _is_known_uri_reference(text) if len(text) <= 200 else _uri_reference(text) is not None


@lru_cache(maxsize=4096)
def _is_known_uri_reference(text: str) -> bool:
    return _uri_reference(text) is not None


def _text(name: str, value: object) -> str:
    """The value, if it may be the text of an attribute that is not empty."""
    if isinstance(value, str) and value and (value.isprintable() or not _forbidden(value)):
        return value
    if value is None:
        raise EventError(f"attribute {name!r} is missing.")
    if not isinstance(value, str):
        raise EventError(f"attribute {name!r} is {_short(value)}: expected a string.")
    if not value:
        raise EventError(f"attribute {name!r} is empty.")
    raise EventError(f"attribute {name!r} has a control character, surrogate or noncharacter: {_short(value)}.")


def _write_extensions(attributes: Mapping[str, object]) -> str:
    """The extension attributes as a JSON object, each checked; None is absent."""
    # By hand, because the encoder takes 3 µs to set itself up; names need no escapes.
    parts = [
        f'"{name}":{encode_basestring(text) if isinstance(text := _extension(name, value), str) else _canonical(text)}'
        for name, value in attributes.items()
        if value is not None
    ]
    return "{" + ",".join(parts) + "}"


def _extension(name: object, value: object) -> ExtensionValue:
    if not isinstance(name, str) or not _name(name) or name == "data":
        raise EventError(
            f"{_short(name)} is no attribute name: expected lower-case letters and digits, and not 'data'."
        )
    if isinstance(value, str):
        return _text(name, value) if value else value
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        if not -0x8000_0000 <= value <= 0x7FFF_FFFF:
            raise EventError(f"attribute {name!r} is an integer beyond 32 bits. Send it as a string.")
        return value
    raise EventError(
        f"attribute {name!r} is {_short(value)}: expected a string, a 32-bit integer or a boolean. Send it as a string."
    )


def _datetime(text: str) -> datetime:
    text = text.upper()
    if text[17:19] == "60":
        text = f"{text[:17]}59{text[19:]}"  # datetime has no leap second
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise EventError(f"attribute 'time' is {_short(text)}: expected an RFC 3339 timestamp.") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _whose_of(attributes: Mapping[str, object]) -> str:
    return _whose(attributes.get("id"), attributes.get("source"))


def _whose(id_: object, source: object) -> str:
    return f"Event {_short(id_)} of {_short(source)}"


def _short(value: object) -> str:
    """For a message: what an attacker sends may be long, or an integer too long to print."""
    if isinstance(value, str):
        return repr(value if len(value) <= 80 else value[:80] + "…")
    return "missing" if value is None else f"of type {type(value).__name__}"


# ── JSON and content types ────────────────────────────────────────────────────────────────────────────────────────────


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON.")


_decoder = json.JSONDecoder(parse_constant=_refuse)
_head_decoder = json.JSONDecoder(parse_constant=_refuse, object_pairs_hook=_distinct)
# Without the check for circles, which costs a dict entry a container: the recursion limit finds them as well.
_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":"))


_charset = re.compile(r';\s*charset\s*=\s*"?([^";\s]*)', re.IGNORECASE).search


def _kind(content_type: str | None) -> str:
    """What octets of this content type are: json, text (that is UTF-8), or base64 (anything); "" if it is none."""
    if content_type is None:
        return "base64"
    # The cache must not keep megabytes that somebody sends as content types.
    return _kind_of(content_type) if len(content_type) <= 1000 else ""


@lru_cache(maxsize=256)
def _kind_of(content_type: str) -> str:
    if not _media_type(content_type):
        return ""
    media_type = content_type.partition(";")[0].rstrip().lower()
    if media_type.endswith(("/json", "+json")):
        return "json"
    charset = _charset(content_type)
    is_utf8 = charset is None or charset[1].lower() in ("utf-8", "utf8", "us-ascii")
    return "text" if media_type.startswith("text/") and is_utf8 else "base64"


def _extensions(row: Row) -> Iterable[tuple[str, ExtensionValue]]:
    """The extension attributes but for `partitionkey`, each with its value."""
    text = row[9]
    if text == "{}":
        return ()
    return ((name, value) for name, value in json.loads(text).items() if value is not None)


def _canonical(value: object) -> str:
    """CloudEvents' text form, which for integers and booleans is JSON's. Plain SQL may have stored anything."""
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return str(value) if type(value) is int else "true" if value else "false"
    return _encoder.encode(value)


# ── to HTTP ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_binary(event: Event) -> tuple[list[tuple[str, str]], bytes]:
    """The headers and the body of a binary-mode message. No data is an empty body, and no content type is invented.

    JSON data without a content type is given the one that its absence stands for, since a body has no such default.
    Raises `EventError` for content types that HTTP would read as another message: line breaks (from plain SQL),
    and `application/cloudevents…`, which says "structured" to whoever reads it. Send that one in structured mode.

    >>> event = parse_structured(b'{"specversion":"1.0","id":"1","source":"/shop","type":"100%","data":[1]}')
    >>> write_binary(event)[0][3:]
    [('ce-type', '100%25'), ('content-type', 'application/json')]
    """
    row = event.row
    names = _HEADERS if row[0] != "0.3" else _HEADERS_03
    texts: tuple[str | None, ...] = row[:9]
    headers = [
        (name, text if _plain_header(text) else _write_header(text))
        for name, text in zip(names, texts, strict=True)
        if text is not None and name
    ]
    if row[9] != "{}":
        # Octets that stood as base64 in a 0.3 envelope are the body itself here.
        left_out = "datacontentencoding" if row[0] == "0.3" and row[11] == "base64" else None
        for name, value in _extensions(row):
            if not _name(name):
                raise EventError(f"{_whose(row[1], row[2])} has an attribute name that no header can have.")
            if name != left_out:
                headers.append((f"ce-{name}", _write_header(_canonical(value))))
    content_type = row[6] or ("application/json" if row[11] == "json" else None)
    if content_type is not None:
        if not _kind(content_type) or content_type.lower().startswith("application/cloudevents"):
            raise EventError(
                f"{_whose(row[1], row[2])}: binary mode cannot carry the content type {_short(content_type)}. "
                "Use structured mode."
            )
        headers.append(("content-type", content_type))
    return headers, row[10] or b""


# Empty for what has a header of HTTP's own.
_HEADERS = tuple("" if name == "datacontenttype" else f"ce-{name}" for name in COLUMNS[:9])
_HEADERS_03 = tuple("ce-schemaurl" if name == "ce-dataschema" else name for name in _HEADERS)
_plain_header = re.compile(r"[!#-$&-~]*+").fullmatch
_PLAIN = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) not in '"%')


def _write_header(text: str) -> str:
    return text if _plain_header(text) else quote(text, safe=_PLAIN)


def write_structured(event: Event) -> bytes:
    """The event in the JSON format. JSON data stands there as the very text that came in.

    >>> write_structured(parse_structured(b'{"specversion":"1.0","id":"1","source":"/","type":"t","data": 1.00 }'))
    b'{"specversion":"1.0","id":"1","source":"/","type":"t","data":1.00}'
    """
    return _write_event(event).encode()


def write_batch(events: Iterable[Event]) -> bytes:
    """The events as a batch in the JSON format."""
    return f"[{','.join(_write_event(event) for event in events)}]".encode()


def _write_event(event: Event) -> str:
    row = event.row
    names = COLUMNS if row[0] != "0.3" else _COLUMNS_03
    parts = [
        f'"{name}":{encode_basestring(text)}' for name, text in zip(names[:9], row[:9], strict=True) if text is not None
    ]
    data, encoding, extensions = row[10], row[11], row[9].strip()[1:-1].strip()
    if row[0] == "0.3" and encoding in (None, "base64"):
        data, encoding, extensions = _octets_of_03(row)
    if extensions:
        parts.append(extensions)
    if data is not None:
        parts.append(_write_data(row, data, encoding))
    return "{" + ",".join(parts) + "}"


def _octets_of_03(row: Row) -> tuple[bytes | None, str | None, str]:
    """Data, its encoding, and the extensions without `datacontentencoding`, which is written where data need it."""
    data, encoding, extensions = row[10], row[11], dict(_extensions(row))
    if extensions.pop("datacontentencoding", None) == "base64" and data is not None and encoding is None:
        # A binary-mode body: some senders encoded it, others only said so.
        encoding = "base64"
        with suppress(ValueError):
            data = b64decode(data, validate=True)
    return data, encoding, _encoder.encode(extensions)[1:-1]


def _write_data(row: Row, data: bytes, encoding: str | None) -> str:
    kind = encoding or _kind(row[6])
    try:
        if kind == "json":
            text = data.decode()
            # A body, or plain SQL, only claims to be JSON: what is not would break the envelope, or forge it.
            _decoder.decode(text)
            return f'"data":{text}'
        if kind == "text":
            return f'"data":{encode_basestring(data.decode())}'
    except (ValueError, RecursionError):
        pass  # not what its content type says: octets
    octets = b64encode(data).decode()
    return f'"data_base64":"{octets}"' if row[0] != "0.3" else f'"datacontentencoding":"base64","data":"{octets}"'


def attributes_with(event: Event, extra: Mapping[str, str]) -> Event:
    """The same event with these extension attributes set. Raises `EventError` for what is no extension attribute.

    >>> event = parse_structured(b'{"specversion":"1.0","id":"1","source":"/shop","type":"order"}')
    >>> attributes_with(event, {"hops": "2"}).attribute("hops")
    '2'
    """
    row = event.row
    names = {*COLUMNS[:8], _COLUMNS_03[7] if row[0] == "0.3" else ""}
    extensions = dict(_extensions(row))
    key = row[8]
    for name, value in extra.items():
        if name in names:
            raise EventError(f"{_whose(row[1], row[2])}: {name!r} is not an extension attribute.")
        try:
            extensions[name] = _extension(name, value)
        except EventError as error:
            raise EventError(f"{_whose(row[1], row[2])}: {error}") from None
    if "partitionkey" in extra:
        key = str(extensions.pop("partitionkey")) or None
    changed: Row = (*row[:8], key, _write_extensions(extensions), row[10], row[11])
    return Event(changed, event.position, event.recorded_at, event.attempt, event.failure)
