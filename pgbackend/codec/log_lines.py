"""Events of a log as lines of JSON, for export, import and people's tools.

    {"position":17,"recorded_at":"2026-01-31T12:00:00.000001+00:00","event":{"specversion":"1.0","id":"1",…}}

`event` is the event in CloudEvents' JSON format, and comes last. A format of one line cannot carry everything to the
byte: line breaks in JSON data, data whose encoding only its content type says, attributes of 0.3. So the writer reads
each line back, and adds what would be lost as the member `stored`. The promise: `read_line(write_line(event))` has the
event's attributes, data and encoding, to the byte (I8), if the event is a valid CloudEvent. Position and date are for
readers of the line; no event can be given them again.
"""

from base64 import b64decode, b64encode

import orjson

from pgbackend.codec.attributes import Row, read_extensions, write_extensions
from pgbackend.codec.data import encoder
from pgbackend.codec.event import Event
from pgbackend.codec.json_format import structured_row, write_structured
from pgbackend.errors import EventError

_EVENT = b',"event":'
_ENCODINGS = (None, "json", "text", "base64")


def write_line(event: Event) -> bytes:
    r"""The line of an event, without a line break.

    >>> row = ("1.0", "1", "/s", "t", None, None, None, None, None, "{}", b"[\n1]", "json")
    >>> print(write_line(Event(row)).decode().replace(',"event"', ',\n"event"'))
    {"position":0,"recorded_at":null,"stored":{"data":"[\n1]"},
    "event":{"specversion":"1.0","id":"1","source":"/s","type":"t","data":[ 1]}}
    """
    recorded_at = event.recorded_at
    about: dict[str, object] = {
        "position": event.position,
        "recorded_at": None if recorded_at is None else recorded_at.isoformat(),
    }
    # A raw line break in JSON is only spacing, because strings escape theirs.
    structured = write_structured(event).replace(b"\n", b" ").replace(b"\r", b" ")
    row = event.row
    again: Row | None
    try:
        again = structured_row(structured)
    except EventError:
        # Plain SQL stores extensions of types that CloudEvents does not have. Readers get their texts, so the line too.
        structured, again = _with_texts(row, structured)
    if stored := _lost(row, again):
        about["stored"] = stored
    return encoder.encode(about).encode()[:-1] + _EVENT + structured + b"}"


def read_line(line: bytes) -> Event:
    """The event of a line, without position and date. Raises EventError."""
    about, event = _split(line.strip())
    row = structured_row(event)
    stored = about.get("stored")
    return Event(row if stored is None else _restored(row, stored))


def _split(line: bytes) -> tuple[dict[str, object], bytes]:
    """The members before the event, and the event's own text. Raises EventError."""
    problem = 'No line of an exported log: expected {"position":…,"recorded_at":…,"event":{…}}.'
    place = line.find(_EVENT) if line.endswith(b"}") else -1
    # Inside a string the marker's quotes would be escaped. But an extension in `stored` may be called event: then what
    # is before it is no object by itself, and the event follows.
    for again in (False, True):
        if place < 0:
            break
        try:
            return orjson.loads(line[:place] + b"}"), line[place + len(_EVENT) : -1]
        except orjson.JSONDecodeError as error:
            problem = problem if again else f"Not JSON: {error}."
        place = line.find(_EVENT, place + 1)
    raise EventError(problem)


def _with_texts(row: Row, structured: bytes) -> tuple[bytes, Row | None]:
    """The structured event with its extensions as readers of the log get them; with its row, if it is valid then."""
    try:
        changed = (*row[:9], write_extensions(read_extensions(row[9])), *row[10:])
        structured = write_structured(Event(changed)).replace(b"\n", b" ").replace(b"\r", b" ")
        return structured, structured_row(structured)
    except EventError:
        return structured, None


def _lost(row: Row, again: Row | None) -> dict[str, object]:
    """The members of `stored`: what `again`, which was read from the line, lacks of the row."""
    stored: dict[str, object] = {}
    if again is None:
        return stored
    if again[11] != row[11]:
        stored["data_encoding"] = row[11]
    if again[10] != row[10]:
        try:
            stored["data"] = None if row[10] is None else row[10].decode()
        except UnicodeDecodeError:
            stored["data_base64"] = b64encode(row[10] or b"").decode()
    if (extensions := read_extensions(row[9])) != read_extensions(again[9]):
        stored["extensions"] = extensions
    return stored


def _restored(row: Row, stored: object) -> Row:
    """The row with the values of `stored`, each checked. Raises EventError."""
    if not isinstance(stored, dict):
        raise EventError("The member stored is not a JSON object.")
    data, encoding, extensions = row[10], stored.get("data_encoding", row[11]), row[9]
    try:
        if "data" in stored:
            data = None if stored["data"] is None else stored["data"].encode()
        if "data_base64" in stored:
            data = b64decode(stored["data_base64"], validate=True)
    except (AttributeError, TypeError, ValueError):
        raise EventError("The data in the member stored is neither text nor base64.") from None
    if encoding not in _ENCODINGS or (encoding is not None and data is None):
        raise EventError("The data_encoding in the member stored is not that of any data.")
    if "extensions" in stored:
        if not isinstance(stored["extensions"], dict):
            raise EventError("The extensions in the member stored are not a JSON object.")
        extensions = write_extensions(stored["extensions"])
    return (*row[:9], extensions, data, encoding)
