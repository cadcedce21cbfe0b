"""What a target answers with: which responses carry events, and how many times around such events may go.

A reply is read like anything that is sent to the broker: its Content-Type alone says which mode it is in. Its hop
counter, the extension attribute `knativebrokerttl` as Knative's brokers have it, is one less than that of the event it
answers. The promise: of a chain of replies, however it is spread over targets, there is an end.
"""

from collections.abc import Iterator, Mapping
from typing import Literal

from pgbackend import codec
from pgbackend.codec import Event

HOPS = "knativebrokerttl"
EVENT_BYTES = 1 << 20
"""The data of a reply; the same as what is taken in over HTTP."""
_ENVELOPE_BYTES = 1 << 16

Mode = Literal["binary", "structured", "batch"]


def mode_of(headers: Mapping[str, str]) -> Mode | None:
    """The mode of the event or events in a response with these headers; None when it has none.

    Raises EventError for an event format other than JSON.
    """
    mode = codec.mode_of(headers.get("Content-Type"))
    return mode if mode != "binary" or "ce-specversion" in headers else None


def limit_of(mode: Mode) -> int:
    """Bytes that the body of a reply may have."""
    # Base64, escapes and the envelope come on top of an event's data.
    return EVENT_BYTES if mode == "binary" else EVENT_BYTES * 2 + _ENVELOPE_BYTES


def parse(mode: Mode, headers: tuple[tuple[bytes, bytes], ...], body: bytes) -> list[Event]:
    """The events of a reply. Raises EventError."""
    if mode == "batch":
        return codec.parse_batch(body)
    return [codec.parse_binary(headers, body) if mode == "binary" else codec.parse_structured(body)]


def counted(replies: list[Event], *, to: Event, most: int) -> Iterator[Event]:
    """Those of the replies to an event that may go on, each with its hop counter; `most` is where counting begins."""
    left = min(_hops(to, most), most) - 1
    for reply in replies:
        if (hops := min(_hops(reply, left), left)) > 0:
            yield codec.attributes_with(reply, {HOPS: str(hops)})


def _hops(event: Event, default: int) -> int:
    """Its counter; what is not a whole number is none."""
    text = event.attribute(HOPS) or ""
    digits = text.removeprefix("-")
    return int(text) if digits.isascii() and digits.isdigit() and len(digits) <= 10 else default
