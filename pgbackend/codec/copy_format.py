"""Rows as PostgreSQL's COPY takes them, in its binary format and piece by piece.

While PostgreSQL stores a piece, the next one is made. asyncpg's own encoder makes half a megabyte before it sends the
first byte, so PostgreSQL waits until all rows are ready. The promise: PostgreSQL reads the very values of the rows.
The format: https://www.postgresql.org/docs/current/sql-copy.html, "Binary Format".
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache

from pgbackend.codec.attributes import COLUMNS, Row

PIECE = 1 << 15
"""Bytes of each piece but the last, at least. A smaller piece costs more than the time that it saves."""
_SIGNATURE = b"PGCOPY\n\xff\r\n\x00" + bytes(8)
_END = b"\xff\xff"
_NULL = b"\xff\xff\xff\xff"
_COUNT = len(COLUMNS).to_bytes(2)
_LENGTHS = [length.to_bytes(4) for length in range(4096)]
"""Looking up a length takes half the time of `to_bytes`."""
_SHORT = 200
"""Characters. Longer texts are not cached: a hostile client may send thousands of them."""


def copy_pieces(rows: Iterable[Row]) -> Iterator[bytes]:
    """The rows, in pieces of about 32 KiB. Raises UnicodeEncodeError for a lone surrogate, and what the rows raise."""
    parts = [_SIGNATURE]
    size = 0
    for row in rows:
        part = _row(row)
        parts.append(part)
        size += len(part)
        if size >= PIECE:
            yield b"".join(parts)
            parts, size = [], 0
    yield b"".join((*parts, _END))


def _row(row: Row) -> bytes:
    """One row. Texts that producers repeat come from caches: 0.9 µs a row instead of 3.4 (measured)."""
    version, id_, source, type_, subject, time, content_type, schema, key, extensions, data, encoding = row
    name = id_.encode()
    origin = _origin if len(source) + len(type_) <= _SHORT else _origin.__wrapped__
    is_plain = schema is None and key is None and extensions == "{}"
    return b"".join((
        _COUNT,
        _known(version),
        _length(len(name)),
        name,
        origin(source, type_),
        _text(subject),
        _text(time),
        _plain_rest(content_type) if is_plain else b"".join(map(_text, (content_type, schema, key, extensions))),
        _NULL if data is None else _length(len(data)),
        data or b"",
        _known(encoding),
    ))  # fmt: skip


def _text(text: str | None) -> bytes:
    if text is None:
        return _NULL
    octets = text.encode()
    return _length(len(octets)) + octets


def _length(length: int) -> bytes:
    return _LENGTHS[length] if length < len(_LENGTHS) else length.to_bytes(4)


_known = lru_cache(maxsize=64)(_text)


@lru_cache(maxsize=1024)
def _origin(source: str, type_: str) -> bytes:
    return _text(source) + _text(type_)


@lru_cache(maxsize=256)
def _plain_rest(content_type: str | None) -> bytes:
    return _text(content_type) + _NULL + _NULL + _text("{}")
