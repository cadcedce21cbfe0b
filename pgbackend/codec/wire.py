"""The wire formats of CloudEvents: the JSON format, its batches, and HTTP's binary mode, read and written.

`parse_structured`, `parse_batch` and `parse_binary` make an `Event` of what came over HTTP or raise `EventError`;
`mode_of` says which of them a message is for; the `write_` functions are their inverses. The promise: attribute texts
and data bytes come out as they went in, over any mix of content modes (I8).

Rejected: the SDK's own JSON and HTTP bindings, because they decode and re-encode data, cut times to microseconds,
guess types and invent missing attributes.
"""

import codecs
import json
import re
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import count
from json.encoder import encode_basestring
from typing import Literal
from urllib.parse import quote, unquote_to_bytes

from pgbackend.codec.attributes import (
    COLUMNS,
    COLUMNS_03,
    Row,
    checked_row,
    event_label,
    excerpt,
    extension_text,
    is_name,
    is_time,
    is_uri_reference,
    label_from,
    read_extensions,
    write_extensions,
)
from pgbackend.codec.data import decoder, encoder, kind_of, refuse_constant
from pgbackend.codec.event import Event
from pgbackend.errors import EventError


class ContentTypeError(EventError):
    """The message is not a CloudEvent, or in an event format other than JSON. HTTP's word for it is 415."""


class TooLargeError(EventError):
    """An event of a batch has more characters than the reader takes. HTTP's word for it is 413."""


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


# ── the JSON format, read ─────────────────────────────────────────────────────────────────────────────────────────────


def parse_structured(body: bytes | bytearray) -> Event:
    """The event of a structured message, or `EventError`."""
    text = _utf8_text(body)
    row, end = _read_event(text, _skip(text, 0))
    _end_of(text, end)
    return Event(row)


def parse_batch(body: bytes | bytearray, *, max_characters: int | None = None) -> Iterator[Event]:
    """The events of a batch, one by one, so that the caller can stop.

    Raises `EventError` at the first bad event; the error names its index in the batch. Raises `TooLargeError` for an
    event of more than `max_characters`, without parsing all of it: its objects could take fifty times its memory.
    """
    text = _utf8_text(body)
    pos = _skip(text, 0)
    if not text.startswith("[", pos):
        raise EventError("A batch is a JSON array of events; this is something else.")
    pos = _skip(text, pos + 1)
    if text.startswith("]", pos):
        _end_of(text, pos + 1)
        return
    for index in count():
        try:
            row, pos = _read_event(text, pos, max_characters)
        except EventError as error:
            raise type(error)(f"Batch, index {index}: {error}") from error.__cause__
        yield Event(row)
        pos = _skip(text, pos)
        if text.startswith("]", pos):
            _end_of(text, pos + 1)
            return
        if not text.startswith(",", pos):
            raise EventError(f"Not JSON: expected ',' or ']' at character {pos}, after index {index}.")
        pos = _skip(text, pos + 1)


_SPACE = r"[ \t\n\r]*+"
# One member, in one match when its value is a string without escapes, as nearly all attributes are.
_member = re.compile(rf'{_SPACE}"([^"\\\x00-\x1f]*+)"{_SPACE}:{_SPACE}(?:"([^"\\\x00-\x1f]*+)"{_SPACE}([,}}]))?').match
_colon = re.compile(rf"{_SPACE}:{_SPACE}").match
_stop = re.compile(rf"{_SPACE}([,}}])").match
_space = re.compile(_SPACE).match


def _read_event(text: str, pos: int, most: int | None = None) -> tuple[Row, int]:
    """The event whose JSON object begins at `pos`, and where it ends."""
    if not text.startswith("{", pos):
        raise EventError("An event in JSON is an object; this is something else.")
    limit = None if most is None else pos + most
    members, pos = _read_head(text, pos)
    data, pos = _read_members(text, pos, members, limit)
    try:
        encoded, encoding = _data_of(members, data)
    except EventError as error:
        raise EventError(f"{label_from(members)}: {error}") from None
    return checked_row(members, encoded, encoding), pos


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


_head_decoder = json.JSONDecoder(parse_constant=refuse_constant, object_pairs_hook=_distinct)


def _read_members(text: str, pos: int, members: dict[str, object], limit: int | None) -> tuple[str, int]:
    """The text of `data`, or none, and where the object ends; its other members from `pos` on join `members`.

    Raises TooLargeError when it does not end before `limit`.
    """
    data = ""
    if not members and (end := _skip(text, pos)) and text.startswith("}", end):
        return data, end + 1
    stop = ","
    while stop == ",":
        if limit is not None and pos > limit:
            raise _too_large(members)
        match = _member(text, pos)
        if match is None:
            name, start = _escaped_name(text, pos, members, limit)
            stop = ""
        else:
            name, value, stop = match.groups()
            start = match.end()
        if name in members:
            raise EventError(f"{label_from(members)}: member {excerpt(name)} stands there twice.")
        if match is not None and stop:
            members[name], pos = value, start
            if name == "data":
                data = text[match.start(2) - 1 : match.end(2) + 1]
            continue
        members[name], pos = _value(text, start, members, limit)
        if name == "data":
            data = text[start:pos]
        if (after := _stop(text, pos)) is None:
            raise EventError(f"Not JSON: expected ',' or '}}' at character {pos}, after member {excerpt(name)}.")
        stop, pos = after[1], after.end()
    return data, pos


def _escaped_name(text: str, pos: int, members: Mapping[str, object], limit: int | None) -> tuple[str, int]:
    name, end = _value(text, _skip(text, pos), members, limit)
    colon = _colon(text, end)
    if not isinstance(name, str) or colon is None:
        raise EventError(f"Not JSON: expected a member name and ':' at character {pos}.")
    return name, colon.end()


def _value(text: str, pos: int, members: Mapping[str, object], limit: int | None) -> tuple[object, int]:
    """The value that begins at `pos`, and where it ends; `members` are those before it, which name the event."""
    if limit is not None and limit < len(text):
        return _bounded_value(text, pos, members, limit)
    try:
        return decoder.raw_decode(text, pos)
    except RecursionError:
        raise EventError("The JSON is nested too deeply.") from None
    except json.JSONDecodeError as error:
        raise EventError(f"Not JSON: {error.msg} at character {error.pos}.") from None
    except ValueError as error:  # NaN, or an integer of thousands of digits
        raise EventError(f"JSON that cannot be kept: {error}") from None


def _bounded_value(text: str, pos: int, members: Mapping[str, object], limit: int) -> tuple[object, int]:
    """The same, of which nothing behind `limit` is looked at."""
    # A small slice first: most values are small, and a batch may have thousands of them.
    for end in (min(pos + _SLICE, limit), limit):
        part = text[pos:end]
        try:
            value, length = decoder.raw_decode(part)
        except RecursionError:
            raise EventError("The JSON is nested too deeply.") from None
        except json.JSONDecodeError as error:
            # At the end of the slice, or of a string: it may be JSON that was cut off there.
            if error.pos < len(part) - _LONGEST_TOKEN and not error.msg.startswith("Unterminated string"):
                raise EventError(f"Not JSON: {error.msg} at character {pos + error.pos}.") from None
        except ValueError as error:
            raise EventError(f"JSON that cannot be kept: {error}") from None
        else:
            if length < len(part):
                return value, pos + length
            # A number may go on behind the slice.
    raise _too_large(members)


_SLICE = 4096
_LONGEST_TOKEN = 16
"""Characters of an escape or a constant, and more."""


def _too_large(members: Mapping[str, object]) -> TooLargeError:
    return TooLargeError(f"{label_from(members)} is too large.")


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
        if isinstance(value, str) and isinstance(content_type, str) and kind_of(content_type) != "json":
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


_BOMS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
"""Of UTF-32 the little-endian one begins like that of UTF-16."""


def _utf8_text(body: bytes | bytearray) -> str:
    if body.startswith(_BOMS):
        # RFC 8259, 8.1. Some parsers skip it; a text without it means the same to all.
        raise EventError("The JSON begins with a byte order mark (BOM): send it as UTF-8 without one.")
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


# ── the JSON format, written ──────────────────────────────────────────────────────────────────────────────────────────


def write_structured(event: Event) -> bytes:
    """The event in the JSON format. JSON data stands there as the very text that came in.

    >>> write_structured(parse_structured(b'{"specversion":"1.0","id":"1","source":"/","type":"t","data": 1.00 }'))
    b'{"specversion":"1.0","id":"1","source":"/","type":"t","data":1.00}'
    """
    row = event.row
    names = COLUMNS if row[0] != "0.3" else COLUMNS_03
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
    return ("{" + ",".join(parts) + "}").encode()


def _octets_of_03(row: Row) -> tuple[bytes | None, str | None, str]:
    """Data, its encoding, and the extensions without `datacontentencoding`, which is written where data need it."""
    data, encoding, extensions = row[10], row[11], read_extensions(row[9])
    if extensions.pop("datacontentencoding", None) == "base64" and data is not None and encoding is None:
        # A binary-mode body: some senders encoded it, others only said so.
        encoding = "base64"
        with suppress(ValueError):
            data = b64decode(data, validate=True)
    return data, encoding, encoder.encode(extensions)[1:-1]


def _write_data(row: Row, data: bytes, encoding: str | None) -> str:
    kind = encoding or kind_of(row[6])
    try:
        if kind == "json":
            text = data.decode()
            # A body, or plain SQL, only claims to be JSON: what is not would break the envelope, or forge it.
            decoder.decode(text)
            return f'"data":{text}'
        if kind == "text":
            return f'"data":{encode_basestring(data.decode())}'
    except (ValueError, RecursionError):
        pass  # not what its content type says: octets
    octets = b64encode(data).decode()
    return f'"data_base64":"{octets}"' if row[0] != "0.3" else f'"datacontentencoding":"base64","data":"{octets}"'


# ── HTTP's binary mode, read ──────────────────────────────────────────────────────────────────────────────────────────


def parse_binary(headers: Iterable[tuple[bytes, bytes]], body: bytes | bytearray) -> Event:
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
                raise EventError(f"{label_from(attributes)}: header {excerpt('ce-' + attribute)} stands there twice.")
            attributes[attribute] = _read_header(attribute, octets)
        elif name == b"content-type":
            if content_type is not None:
                raise EventError("Header Content-Type stands there twice.")
            # Beyond ASCII it is refused by its own check, which names the event.
            content_type = octets.decode("latin-1").strip(" \t")
    if not attributes:
        raise ContentTypeError("Not a CloudEvent: neither a cloudevents Content-Type nor ce- headers.")
    if "datacontenttype" in attributes:
        raise EventError(f"{label_from(attributes)}: header ce-datacontenttype is not allowed. Use Content-Type.")
    attributes["datacontenttype"] = content_type or None
    return Event(checked_row(attributes, bytes(body) or None, None))


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


def _plain_row(headers: Iterable[tuple[bytes, bytes]], body: bytes | bytearray) -> Row | None:
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
    if not is_uri_reference(origin) or (moment and not is_time(moment)) or (media_type and not kind_of(media_type)):
        return None
    key, written = None, "{}"
    if extensions:
        texts = {name: octets.decode() for name, octets in extensions.items()}
        key = texts.pop("partitionkey", None)
        try:
            written = write_extensions(texts)
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
        raise EventError(f"Header {excerpt('ce-' + name)} is not UTF-8, or percent-codes something else.") from None


# ── HTTP's binary mode, written ───────────────────────────────────────────────────────────────────────────────────────


def write_binary(event: Event, *, coded: bool = True) -> tuple[list[tuple[str, str]], bytes]:
    """The headers and the body of a binary-mode message. No data is an empty body, and no content type is invented.

    JSON data without a content type is given the one that its absence stands for, since a body has no such default.
    `coded=False` is for receivers that do not undo percent-codes: values stand as they are, in UTF-8.
    Raises `EventError` for values that cannot stand so (white space at their ends), and for content types that HTTP
    would read as another message: line breaks (from plain SQL), and `application/cloudevents…`, which says "structured"
    to whoever reads it. Send those in structured mode.

    >>> event = parse_structured(b'{"specversion":"1.0","id":"1","source":"/shop","type":"100%","data":[1]}')
    >>> write_binary(event)[0][3:]
    [('ce-type', '100%25'), ('content-type', 'application/json')]
    """
    row = event.row
    names = _HEADERS if row[0] != "0.3" else _HEADERS_03
    texts: tuple[str | None, ...] = row[:9]
    headers = [
        (name, text if _plain_header(text) else _write_header(text, coded=coded))
        for name, text in zip(names, texts, strict=True)
        if text is not None and name
    ]
    if row[9] != "{}":
        # Octets that stood as base64 in a 0.3 envelope are the body itself here.
        left_out = "datacontentencoding" if row[0] == "0.3" and row[11] == "base64" else None
        for name, value in read_extensions(row[9]).items():
            if not is_name(name):
                raise EventError(f"{event_label(row[1], row[2])} has an attribute name that no header can have.")
            if name != left_out:
                headers.append((f"ce-{name}", _write_header(extension_text(value), coded=coded)))
    content_type = row[6] or ("application/json" if row[11] == "json" else None)
    if content_type is not None:
        if not kind_of(content_type) or content_type.lower().startswith("application/cloudevents"):
            raise EventError(
                f"{event_label(row[1], row[2])}: binary mode cannot carry the content type {excerpt(content_type)}. "
                "Use structured mode."
            )
        headers.append(("content-type", content_type))
    return headers, row[10] or b""


# Empty for what has a header of HTTP's own.
_HEADERS = tuple("" if name == "datacontenttype" else f"ce-{name}" for name in COLUMNS[:9])
_HEADERS_03 = tuple("ce-schemaurl" if name == "ce-dataschema" else name for name in _HEADERS)
_plain_header = re.compile(r"[!#-$&-~]*+").fullmatch
_PLAIN = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) not in '"%')


def _write_header(text: str, *, coded: bool) -> str:
    if _plain_header(text):
        return text
    if coded:
        return quote(text, safe=_PLAIN)
    if text != text.strip() or not text.isprintable():
        raise EventError(f"A header cannot hold {excerpt(text)} as it is. Use structured mode.")
    return text
