import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgbackend.codec.attributes import Row
from pgbackend.codec.copy_format import PIECE, copy_pieces

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(["x" * 300, "é" * 5000])
rows = st.tuples(
    *[texts] * 4, *[st.none() | texts] * 5, texts | st.just("{}"), st.none() | st.binary(), st.none() | texts
)


def naive(some: list[Row]) -> bytes:
    """The format as its documentation has it, value by value."""
    out = b"PGCOPY\n\xff\r\n\x00" + struct.pack(">ii", 0, 0)
    for row in some:
        out += struct.pack(">h", len(row))
        for value in row:
            octets = value.encode() if isinstance(value, str) else value
            out += struct.pack(">i", -1) if octets is None else struct.pack(">i", len(octets)) + octets
    return out + struct.pack(">h", -1)


@given(st.lists(rows, max_size=12))
def test_rows_are_written_as_the_format_has_them(some: list[Row]) -> None:
    pieces = list(copy_pieces(some))
    assert b"".join(pieces) == naive(some)
    assert all(len(piece) >= PIECE for piece in pieces[:-1])


def test_a_piece_is_made_when_the_one_before_was_taken() -> None:
    row: Row = ("1.0", "i", "/s", "t", None, None, None, None, None, "{}", b"x" * 1000, None)
    read = 0

    def read_rows() -> Iterator[Row]:
        nonlocal read
        for _ in range(100):
            read += 1
            yield row

    pieces = copy_pieces(read_rows())
    next(pieces)
    assert read == 31
    next(pieces)
    assert read == 62


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(UnicodeEncodeError):
        list(copy_pieces([("1.0", "\ud800", "/s", "t", None, None, None, None, None, "{}", None, None)]))
