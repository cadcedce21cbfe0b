"""The attributes of an event: the columns that hold them, and what CloudEvents demands of each.

Every event from the SDK (sdk.py) or from HTTP (wire.py) becomes a row in `checked_row`, or in a faster function that
returns the same row. The promise: each attribute keeps its text to the character, and `checked_row` refuses what is not
an attribute of CloudEvents with an `EventError` that names the event.

Producers in plain SQL skip these checks, except for the log's constraints. So `read_extensions` takes every JSON that
PostgreSQL takes.
"""

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from json.encoder import encode_basestring
from math import isinf

from pgbackend.codec.data import encoder, kind_of
from pgbackend.errors import EventError

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
"""The columns of an `events` row that producers write. The first nine are texts, named like their attributes."""

COLUMNS_03 = tuple("schemaurl" if name == "dataschema" else name for name in COLUMNS)
"""`COLUMNS` with the attribute names of CloudEvents 0.3."""

Row = tuple[
    str, str, str, str, str | None, str | None, str | None, str | None, str | None, str, bytes | None, str | None
]
"""The values of `COLUMNS`, in their order."""

ExtensionValue = str | int | bool

ATTRIBUTES_BYTES = 1 << 16
"""The limit for all attributes of one event, as `attributes_size` counts. A CHECK of the log enforces it, too."""


def attributes_size(row: Row) -> int:
    """Bytes of all attribute texts in UTF-8. Extensions count as JSON, names included."""
    return len("".join([text for text in row[:10] if isinstance(text, str)]).encode())


def event_size(row: Row) -> int:
    """Bytes of the event's data and of all its attribute texts."""
    return len(row[10] or b"") + attributes_size(row)


# ── what makes an event valid ─────────────────────────────────────────────────────────────────────────────────────────


def checked_row(attributes: dict[str, object], data: bytes | None, encoding: str | None) -> Row:
    """The row of these attributes, each checked. Empties the dict. None means absent. Raises `EventError`."""
    id_, source = attributes.get("id"), attributes.get("source")
    try:
        return _checked(attributes, data, encoding)
    except EventError as error:
        raise EventError(f"{event_label(id_, source)}: {error}") from None


def _checked(attributes: dict[str, object], data: bytes | None, encoding: str | None) -> Row:
    specversion = attributes.pop("specversion", None)
    if specversion != "1.0":
        if specversion is None:
            raise EventError("attribute 'specversion' is missing.")
        if specversion != "0.3":
            raise EventError(f"attribute 'specversion' is {excerpt(specversion)}: expected '1.0'.")
        if attributes.get("dataschema") is not None:
            raise EventError("attribute 'dataschema' does not exist in CloudEvents 0.3. Use 'schemaurl'.")
        attributes["dataschema"] = attributes.pop("schemaurl", None)
    take = attributes.pop
    id_ = _text("id", take("id", None))
    source = _text("source", take("source", None))
    if not is_uri_reference(source):
        raise EventError(f"attribute 'source' is {excerpt(source)}: expected a URI-reference.")
    type_ = _text("type", take("type", None))
    subject = None if (value := take("subject", None)) is None else _text("subject", value)
    time = None if (value := take("time", None)) is None else _text("time", value)
    if time is not None and not is_time(time):
        raise EventError(f"attribute 'time' is {excerpt(time)}: expected an RFC 3339 timestamp.")
    content_type = None if (value := take("datacontenttype", None)) is None else _text("datacontenttype", value)
    if content_type is not None and not kind_of(content_type):
        raise EventError(f"attribute 'datacontenttype' is {excerpt(content_type)}: expected a media type.")
    schema = None if (value := take("dataschema", None)) is None else _text("dataschema", value)
    if schema is not None and not _schema(schema):
        raise EventError(f"attribute 'dataschema' is {excerpt(schema)}: expected an absolute URI.")
    key = None if (value := take("partitionkey", None)) is None else _text("partitionkey", value)
    extensions = write_extensions(attributes) if attributes else "{}"
    return (specversion, id_, source, type_, subject, time, content_type, schema, key, extensions, data, encoding)


def _text(name: str, value: object) -> str:
    """The value, if it is a text that an attribute may have. It must not be empty."""
    if isinstance(value, str) and value and (value.isprintable() or not _forbidden(value)):
        return value
    if value is None:
        raise EventError(f"attribute {name!r} is missing.")
    if not isinstance(value, str):
        raise EventError(f"attribute {name!r} is {excerpt(value)}: expected a string.")
    if not value:
        raise EventError(f"attribute {name!r} is empty.")
    raise EventError(f"attribute {name!r} has a control character, surrogate or noncharacter: {excerpt(value)}.")


def checked_extension(name: object, value: object) -> ExtensionValue:
    """The value, if an extension attribute of this name may have it. It may be empty. Raises `EventError`."""
    if not isinstance(name, str) or not is_name(name) or name == "data":
        raise EventError(
            f"{excerpt(name)} is not an attribute name: expected lower-case letters and digits, and not 'data'."
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
        f"attribute {name!r} is {excerpt(value)}: expected a string, a 32-bit integer or a boolean. "
        "Send it as a string."
    )


def is_uri_reference(text: str) -> bool:
    # Producers have few sources: a look into the cache costs a fifth of a check. Long ones are not cached: a hostile
    # client may send thousands of them, of a megabyte each.
    return _is_known_uri_reference(text) if len(text) <= 200 else _uri_reference(text) is not None


@lru_cache(maxsize=4096)
def _is_known_uri_reference(text: str) -> bool:
    return _uri_reference(text) is not None


# The characters that CloudEvents forbids in a String. A text that is printable to Python has none: ask that first.
_forbidden = re.compile(
    "[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef"
    + "".join(chr(plane << 16 | low) for plane in range(17) for low in (0xFFFE, 0xFFFF))
    + "]"
).search
is_name = re.compile(r"[a-z0-9]+").fullmatch
# A cheap part of RFC 3986 that catches mistakes: its excluded characters and broken escapes. IRIs pass.
_URI_PLAIN = r"[^\s\x00-\x20\x7f<>\"\\^`{|}%]*+"
_URI_CHARACTERS = rf"{_URI_PLAIN}(?:%[0-9A-Fa-f]{{2}}{_URI_PLAIN})*+"
_uri_reference = re.compile(_URI_CHARACTERS).fullmatch
# CloudEvents demands an absolute URI. A fragment alone passes, too: Azure Event Grid sends "#" and the data's version.
_schema = re.compile(rf"(?:[A-Za-z][A-Za-z0-9+.-]*+:(?!\Z)|#){_URI_CHARACTERS}").fullmatch
is_time = re.compile(
    r"""(?!0000)                                    # datetime has no year 0, so a dispatcher could not read it
        (?: \d{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|1\d|2[0-8])
          | \d{4}-(?:0[13-9]|1[0-2])-(?:29|30)
          | \d{4}-(?:0[13578]|1[02])-31
          | (?:\d\d(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29
        )
        [Tt](?:[01]\d|2[0-3]):[0-5]\d:(?:[0-5]\d|60)(?:\.\d+)?
        (?:[Zz]|[+-](?:[01]\d|2[0-3]):[0-5]\d)""",
    re.ASCII | re.VERBOSE,
).fullmatch


# ── extensions, in one column ─────────────────────────────────────────────────────────────────────────────────────────


def write_extensions(attributes: Mapping[str, object]) -> str:
    """The extension attributes as a JSON object, each checked. None means absent. Raises `EventError`."""
    # Written by hand, because the encoder needs 3 µs to start. Names need no escapes.
    parts = []
    for name, value in attributes.items():
        if value is not None:
            extension = checked_extension(name, value)
            text = encode_basestring(extension) if isinstance(extension, str) else extension_text(extension)
            parts.append(f'"{name}":{text}')
    return "{" + ",".join(parts) + "}"


def read_extensions(text: str) -> dict[str, ExtensionValue]:
    """The extension attributes of a row, without `partitionkey`, in a new dict.

    Takes every object that PostgreSQL takes as JSON, and does not raise, because filters must not. A value without a
    type in CloudEvents (an integer beyond 32 bits, too) becomes the text of its JSON; null means absent. An object that
    is nested deeper than Python can follow, about a thousand levels, counts as empty.

    >>> read_extensions('{"a": "x", "b": 7, "c": 9876543210, "d": [true], "e": 1e999, "f": null}')
    {'a': 'x', 'b': 7, 'c': '9876543210', 'd': '[true]', 'e': '1e999'}
    """
    if text == "{}":
        return {}
    try:
        values, _ = _extension_decoder.raw_decode(text.lstrip())
        return {
            name: value if type(value) is str else _typed(value) for name, value in values.items() if value is not None
        }
    except RecursionError:
        return {}


def _typed(value: object) -> ExtensionValue:
    if isinstance(value, int) and -0x8000_0000 <= value <= 0x7FFF_FFFF:
        return value
    return encoder.encode(value)


def _integer(digits: str) -> int | str:
    try:
        return int(digits)
    except ValueError:
        return digits  # Python refuses to read thousands of digits (measured: 4,301)


def _float(digits: str) -> float | str:
    number = float(digits)
    return digits if isinf(number) else number  # JSON has no infinity


_extension_decoder = json.JSONDecoder(parse_int=_integer, parse_float=_float)


def extension_text(value: ExtensionValue) -> str:
    """The value in CloudEvents' canonical text form. For integers and booleans this is JSON."""
    if isinstance(value, str):
        return value
    return str(value) if type(value) is int else "true" if value else "false"


# ── for messages ──────────────────────────────────────────────────────────────────────────────────────────────────────


def label_from(attributes: Mapping[str, object]) -> str:
    """The `event_label` of attributes that were not checked."""
    return event_label(attributes.get("id"), attributes.get("source"))


def event_label(id_: object, source: object) -> str:
    """The name of an event in messages."""
    return f"Event {excerpt(id_)} of {excerpt(source)}"


def excerpt(value: object) -> str:
    """A value for a message. Texts are cut, and integers may be too long to print: clients may be hostile."""
    if isinstance(value, str):
        return repr(value if len(value) <= 80 else value[:80] + "…")
    return "missing" if value is None else f"of type {type(value).__name__}"
