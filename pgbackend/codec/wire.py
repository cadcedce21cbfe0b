"""The wire formats of CloudEvents: what a message is, and the functions that read and write it.

`mode_of` says how to read an HTTP message: `parse_structured` and `parse_batch` (json_format.py) or `parse_binary`
(binary_mode.py). They return an `Event` or raise `EventError`; the `write_` functions are their inverses. The promise:
attribute texts and data bytes come out as they went in, over any mix of content modes (I8).

The SDK's own JSON and HTTP bindings are not used: they decode and re-encode data, cut times to microseconds, guess
types and invent missing attributes.
"""

from typing import Literal

from pgbackend.codec.binary_mode import ContentTypeError, parse_binary, write_binary
from pgbackend.codec.json_format import TooLargeError, parse_batch, parse_structured, write_structured

__all__ = [
    "ContentTypeError",
    "TooLargeError",
    "mode_of",
    "parse_batch",
    "parse_binary",
    "parse_structured",
    "write_binary",
    "write_structured",
]


def mode_of(content_type: str | None) -> Literal["binary", "structured", "batch"]:
    """The content mode of a message, by its Content-Type alone. Raises `ContentTypeError` for formats other than JSON.

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
