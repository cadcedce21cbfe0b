"""The data of an event: how the log keeps it, and what its content type says that it is.

`encode_data` takes what a producer of Python objects gave, `decode_data` gives it back; `wire.py` keeps what came over
HTTP under the same encodings. The promise: a value that would not come back as it went in is refused.

What stands in a row's `data`, by its `data_encoding`:

    'json'    the text of a JSON value: a structured `data` member as it stood there, or an SDK event's dict, list,
              number, bool, or str under a JSON content type
    'text'    the UTF-8 of a string that is not JSON: structured `data`, or an SDK event's str, under another type
    'base64'  octets: `data_base64`, or an SDK event's bytes
    None      a body of HTTP binary mode, or data from plain SQL: the content type says what it is

White space around a structured `data` member belongs to the envelope, not to the value, and is not kept.

Rejected: orjson, because it cannot hand out the text of a member.
"""

import json
import re
from functools import lru_cache
from typing import Any, NoReturn

from pgbackend.errors import EventError


def encode_data(value: object, content_type: object) -> tuple[bytes | None, str | None]:
    """The value as `data` and `data_encoding`. Raises `EventError`, without a subject, when JSON would change it."""
    if value is None:
        return None, None
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value), "base64"
    try:
        if isinstance(value, str) and isinstance(content_type, str) and kind_of(content_type) != "json":
            return value.encode(), "text"
        _check_json(value)
        return encoder.encode(value).encode(), "json"
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


def decode_data(data: bytes | None, encoding: str | None, content_type: str | None) -> Any:
    """What a producer gave; read from HTTP or SQL: parsed JSON, str of `text/*`, else bytes."""
    if data is None or encoding == "base64":
        return data
    if encoding is None:
        encoding = kind_of(content_type)
    try:
        if encoding == "json":
            return decoder.decode(data.decode())
        return data.decode() if encoding == "text" else data
    except (ValueError, RecursionError):
        return data  # plain SQL, or a body that is not what its content type says


def kind_of(content_type: str | None) -> str:
    """What octets of this content type are: json, text (that is UTF-8), or base64 (anything); "" if it is none.

    >>> kind_of("application/geo+json"), kind_of("text/csv"), kind_of("text/csv; charset=latin1"), kind_of("json")
    ('json', 'text', 'base64', '')
    """
    if content_type is None:
        return "base64"
    # The cache must not keep megabytes that somebody sends as content types.
    return _known_kind(content_type) if len(content_type) <= 1000 else ""


@lru_cache(maxsize=256)
def _known_kind(content_type: str) -> str:
    if not _media_type(content_type):
        return ""
    media_type = content_type.partition(";")[0].rstrip().lower()
    if media_type.endswith(("/json", "+json")):
        return "json"
    charset = _charset(content_type)
    is_utf8 = charset is None or charset[1].lower() in ("utf-8", "utf8", "us-ascii")
    return "text" if media_type.startswith("text/") and is_utf8 else "base64"


_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]++"  # noqa: S105 - HTTP's token
_media_type = re.compile(rf"{_TOKEN}/{_TOKEN}(?: *+;[\x20-\x7e]*+)?").fullmatch
_charset = re.compile(r';\s*charset\s*=\s*"?([^";\s]*)', re.IGNORECASE).search


def refuse_constant(constant: str) -> NoReturn:
    """For a decoder's `parse_constant`: Python reads NaN and Infinity, which are not JSON."""
    raise ValueError(f"{constant} is not JSON.")


decoder = json.JSONDecoder(parse_constant=refuse_constant)
# Without the check for circles, which costs a dict entry a container: the recursion limit finds them as well.
encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":"))
