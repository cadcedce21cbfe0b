"""The kinds of values in a configuration file: how each is read from its text, and its JSON Schema for editors.

The input is what `document` produces: text, lists and mappings. A refused value gets a message that says what was
expected, and that shows no secret.
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationInfo, WithJsonSchema
from pydantic_core import PydanticCustomError
from yarl import URL

from pgbackend.errors import ConfigError
from pgbackend.model import MAX_CONCURRENCY, MAX_SHARDS
from pgbackend.settings import check_window

_MAX_POSITION = 2**63 - 1
_MAX_RETRIES = 2**31 - 2
_MAX_NAME = 200
_LONGEST = 36_525 * 86_400.0  # a century, in seconds: both PostgreSQL and the event loop can wait for it
_MEBIBYTE = 1 << 20
_DURATION_CHARACTERS = 100  # the time to match a duration grows with the square of its length
_SECRET_BYTES = 1 << 16  # more than fits into a header: a larger file is the wrong one, or endless
_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The directory that `{file: …}` secrets are relative to, and the set that collects their paths."""

    directory: Path = Path()
    files: set[Path] = field(default_factory=set)


def described(value: object) -> str:
    """The value, as a message shows it after "found"."""
    match value:
        case None:
            return "nothing"
        case str():
            return json.dumps(value if len(value) <= _SHOWN else value[:_SHOWN] + "…", ensure_ascii=False)
        case list():
            return "a list"
        case _:
            return "a mapping"


def refuse(message: str, *, key: str | None = None) -> PydanticCustomError:
    """The error that a validator raises with this message; `key` is the entry of the mapping that it is about."""
    # The message is passed as a value, because pydantic would interpret its braces.
    return PydanticCustomError("expected", "{message}", {"message": message} | ({} if key is None else {"key": key}))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise refuse(f"expected text, found {described(value)}")
    return value


def _some_text(value: object) -> str:
    if not (text := _text(value)):
        raise refuse("expected text that is not empty")
    return text


def _flag(value: object) -> bool:
    text = _text(value)
    if text.lower() not in ("true", "false"):
        raise refuse(f"expected true or false, found {described(text)}")
    return text.lower() == "true"


def _whole(low: int, high: int) -> Callable[[object], int]:
    def check(value: object) -> int:
        text = _text(value)
        if not re.fullmatch(r"[0-9]{1,19}", text):
            raise refuse(f"expected a whole number, found {described(text)}")
        if not low <= int(text) <= high:
            raise refuse(f"expected a whole number from {low} to {high}, found {int(text)}")
        return int(text)

    return check


_redis_id = re.compile(r"([0-9]{10,13})-[0-9]+", re.ASCII).fullmatch


def _position(low: int) -> Callable[[object], int]:
    check = _whole(low, _MAX_POSITION)

    def read(value: object) -> int:
        if isinstance(value, str) and (found := _redis_id(value)):
            # Files for TriggerMesh's Redis broker have such ids: milliseconds, and a serial number within them.
            moment = datetime.fromtimestamp(int(found[1]) / 1000, UTC).isoformat(timespec="milliseconds")
            moment = moment.replace("+00:00", "Z")
            raise refuse(f"expected a position of this log, found a Redis id: use byDate with {moment}")
        return check(value)

    return read


def seconds(text: str) -> float:
    """The seconds of an ISO 8601 duration. Raises ValueError with what was expected.

    A year has 365.2425 days, and a month a twelfth of that. Decimals follow `.` or `,`.

    >>> seconds("PT2S"), seconds("PT0,25S"), seconds("P1DT1H"), seconds("P0")
    (2.0, 0.25, 90000.0, 0.0)
    """
    matched = None
    if len(text) <= _DURATION_CHARACTERS:
        matched = re.fullmatch(r"([+-]?)P([0-9.,YMWD]*)(?:T([0-9.,HMS]+))?", text)
    parts = [] if matched is None else _duration_parts(matched[2], matched[3])
    if matched is None or parts is None or not (parts or matched[2] == "0"):
        raise ValueError(f"expected an ISO 8601 duration such as PT2S, found {described(text)}")
    total = sum((float(number.replace(",", ".")) * unit for number, unit in parts), 0.0)
    if total > _LONGEST:
        raise ValueError(f"expected a duration of at most 100 years, found {described(text)}")
    return -total if matched[1] == "-" else total


_DAY = 86_400.0
_DATE_UNITS = {"Y": 365.2425 * _DAY, "M": 365.2425 * _DAY / 12, "W": 7 * _DAY, "D": _DAY}
_TIME_UNITS = {"H": 3600.0, "M": 60.0, "S": 1.0}


def _duration_parts(date: str, time: str | None) -> list[tuple[str, float]] | None:
    """The number and the seconds per unit of each part; None when the duration is malformed."""
    parts: list[tuple[str, float]] = []
    for half, units in ((date, _DATE_UNITS), (time or "", _TIME_UNITS)):
        if half == "0" and half is date and time is None:
            return []
        found = re.findall(r"([0-9]+(?:[.,][0-9]+)?)([A-Z])", half)
        letters = [letter for _, letter in found]
        if "".join(number + letter for number, letter in found) != half or len(set(letters)) != len(letters):
            return None
        parts += [(number, units[letter]) for number, letter in found]
    fractional = [not number.isdigit() for number, _ in parts]
    # The reference implementation refuses fractions in two neighbouring units.
    return None if any(first and second for first, second in pairwise(fractional)) else parts


def _duration(value: object) -> float:
    try:
        duration = seconds(_text(value))
    except ValueError as error:
        raise refuse(str(error)) from None
    if duration <= 0:
        raise refuse(f"expected a duration above zero, found {described(value)}")
    return duration


def _window(value: object) -> timedelta:
    try:
        window = timedelta(seconds=seconds(_text(value)))
        check_window("window", window)
    except ConfigError:
        raise refuse(f"expected a duration from PT0.1S to P366D, or P0D, found {described(value)}") from None
    except ValueError as error:
        raise refuse(str(error)) from None
    return window


def _retention_time(value: object) -> timedelta | None:
    """How long something stays; None for good."""
    if value == "forever":
        return None
    try:
        time = timedelta(seconds=seconds(_text(value)))
    except ValueError as error:
        raise refuse(f'{error}, or "forever"') from None
    if not timedelta(seconds=1) <= time <= timedelta(days=36_500):
        raise refuse(f'expected a duration from a second to 36500 days, or "forever", found {described(value)}')
    return time


_RFC3339 = re.compile(r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?([Zz]|[+-]\d\d:\d\d)", re.ASCII)


def _instant(value: object, *, up: bool) -> datetime:
    """An aware datetime. PostgreSQL keeps microseconds, so `up` rounds finer times to keep the bound exclusive."""
    matched = _RFC3339.fullmatch(_text(value))
    try:
        if matched is None:
            raise ValueError  # noqa: TRY301 - it gets the message of 30 February
        date, time, fraction, zone = matched.groups()
        nanoseconds = int((fraction or "").ljust(9, "0"))
        moment = datetime.fromisoformat(f"{date}T{time}{zone.upper().replace('Z', '+00:00')}")
        # Convert here, as asyncpg will: near the first and the last year a time may not exist in UTC.
        return moment.astimezone(UTC) + timedelta(microseconds=-(-nanoseconds // 1000) if up else nanoseconds // 1000)
    except (ValueError, OverflowError):
        raise refuse(f"expected a time such as 2026-01-01T00:00:00Z, found {described(value)}") from None


def _url(value: object) -> URL:
    text = _text(value)
    expected = "expected an absolute http or https URL"
    if re.search(r"[\s\x00-\x1f\x7f]", text):
        raise refuse(f"{expected} without white space")
    try:
        # An ASCII URL is sent exactly as it is written: it may be signed.
        url = URL(text, encoded=text.isascii())
        good = url.scheme in ("http", "https") and url.host and url.port
    except ValueError:
        good = None
    if not good:
        # Never echo a malformed URL with an @: it may contain a password.
        found = "a malformed one" if "@" in text else described(text.split("?")[0])
        raise refuse(f"{expected}, found {found}")
    if ":" in (url.user or ""):
        raise refuse("expected a user without a colon: HTTP Basic ends the user there")
    try:
        # The connection encodes the host in the same way. A dot at the end is the root of a name.
        (url.raw_host or "").removesuffix(".").encode("idna")
    except UnicodeError:
        raise refuse(f"{expected} with a host whose labels have 1 to 63 characters") from None
    return url


def _optional_url(value: object) -> URL | None:
    return None if value == "" else _url(value)


def _secret(value: object, info: ValidationInfo) -> str:
    """A literal, or the present value of `{env: NAME}` or `{file: PATH}`, the file's last line break removed."""
    if isinstance(value, str):
        return value
    if not (isinstance(value, dict) and len(value) == 1 and (source := next(iter(value))) in ("env", "file")):
        raise refuse("expected text, {env: NAME} or {file: PATH}")
    name = value[source]
    if not isinstance(name, str) or not name:
        raise refuse("expected " + ("the name of a variable" if source == "env" else "the path of a file"), key=source)
    try:
        return _from_environment(name) if source == "env" else _from_file(name, info.context or Surroundings())
    except ValueError as error:
        raise refuse(str(error), key=source) from None


def _from_environment(name: str) -> str:
    secret = os.environ.get(name, "")
    if not secret:
        raise ValueError(f"the environment variable {described(name)} is unset or empty: set it")
    return secret


def _from_file(name: str, surroundings: Surroundings) -> str:
    path = surroundings.directory / name
    surroundings.files.add(path)
    try:
        with path.open("rb") as file:
            content = file.read(_SECRET_BYTES + 1)
        secret = content.decode().removesuffix("\n").removesuffix("\r")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ValueError(f"the file {described(name)} cannot be read: {reason}") from None
    if len(content) > _SECRET_BYTES:
        raise ValueError(f"the file {described(name)} has more than {_SECRET_BYTES} bytes: expected a secret")
    if not secret:
        raise ValueError(f"the file {described(name)} is empty")
    return secret


def _header_value(secret: str) -> str:
    if not secret:
        raise refuse("expected a value that is not empty")
    return printable(secret)


def printable(secret: str) -> str:
    """The secret, if a header can carry it."""
    if re.search(r"[\x00-\x1f\x7f-\x9f]", secret):
        raise refuse("expected a single line without control characters")
    if re.search(r"[\ud800-\udfff]", secret):
        # Python represents bytes that are not UTF-8 by lone surrogates.
        raise refuse("expected a value in UTF-8")
    return secret


def _attribute(name: str) -> str:
    if not name:
        raise refuse("expected text that is not empty")
    if not re.fullmatch(r"[a-z0-9]+", name) or name == "data":
        raise refuse("expected an attribute name of lower-case letters and digits")
    return name


def _header_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name):
        raise refuse(f"expected an HTTP header name, found {described(name)}")
    if name.lower() in _RESERVED_HEADERS or name.lower().startswith("ce-"):
        raise refuse(f"the broker sets the header {name} itself: remove it")
    return name


# These headers frame the request or describe the event.
_RESERVED_HEADERS = frozenset(
    {
        "connection",
        "content-encoding",
        "content-length",
        "content-type",
        "expect",
        "host",
        "keep-alive",
        "pgbackend-attempt",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)


def _trigger_name(name: str) -> str:
    if not name or not name.isprintable() or len(name) > _MAX_NAME:
        raise refuse(f"expected a printable trigger name of 1 to {_MAX_NAME} characters")
    return name


# The JSON Schema of each kind. An editor sees scalars as YAML types them: numbers, booleans or text.

_SCALAR: dict[str, Any] = {"type": ["string", "number", "boolean"]}
_SOME_SCALAR = _SCALAR | {"minLength": 1}
_KEYS = {"type": "object", "additionalProperties": False}
_SECRET: dict[str, Any] = {
    "anyOf": [
        _SCALAR | {"description": "The secret, literally.", "pattern": r"^[^\x00-\x1f\x7f-\x9f]*$"},
        _KEYS | {"properties": {"env": {"type": "string", "minLength": 1}}, "required": ["env"]}
        | {"description": "The environment variable that holds the secret."},
        _KEYS | {"properties": {"file": {"type": "string", "minLength": 1}}, "required": ["file"]}
        | {"description": "The file that holds the secret, relative to this file. A change takes effect at once."},
    ]
}  # fmt: skip
_DURATION = {
    "type": "string",
    "description": "An ISO 8601 duration above zero.",
    "maxLength": _DURATION_CHARACTERS,
    "pattern": r"^\+?P(?=.*[1-9])([0-9]+([.,][0-9]+)?[YMWD])*(T([0-9]+([.,][0-9]+)?[HMS])+)?$",
    "examples": ["PT0.5S", "PT2S", "PT10M"],
}
_WINDOW = {
    "type": "string",
    "description": "An ISO 8601 duration from PT0.1S to P366D, or P0D.",
    "maxLength": _DURATION_CHARACTERS,
    "pattern": r"^\+?P(?=.)([0-9]+([.,][0-9]+)?[YMWD])*(T([0-9]+([.,][0-9]+)?[HMS])+)?$",
    "examples": ["PT10M", "P1D", "P0D"],
}
_RETENTION_TIME = {
    "anyOf": [
        _DURATION | {"description": "An ISO 8601 duration from a second to 36500 days.", "examples": ["P7D", "PT12H"]},
        {"const": "forever"},
    ]
}
_HTTP_URL = {
    "type": "string",
    "format": "uri",
    "pattern": r"^([Hh][Tt][Tt][Pp][Ss]?://[^\s/?#]+\S*)?$",
    "examples": ["http://localhost:8888/orders"],
}
_TIME = {
    "type": "string",
    "format": "date-time",
    "pattern": r"^\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)$",
    "examples": ["2026-01-01T00:00:00Z"],
}


def _whole_schema(low: int, high: int) -> dict[str, Any]:
    return {"type": ["integer", "string"], "minimum": low, "maximum": high, "pattern": "^[0-9]{1,19}$"}


def _pattern(characters: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "pattern": f"^{characters}+$"})


Flag = Annotated[bool, BeforeValidator(_flag), WithJsonSchema({"enum": [True, False, "true", "false"]})]
SomeText = Annotated[str, BeforeValidator(_some_text), WithJsonSchema(_SOME_SCALAR)]
AttributeName = Annotated[str, AfterValidator(_attribute), _pattern("[a-z0-9]")]
Attributes = Annotated[dict[AttributeName, SomeText], Field(min_length=1)]
Seconds = Annotated[float, BeforeValidator(_duration), WithJsonSchema(_DURATION)]
Window = Annotated[timedelta, BeforeValidator(_window), WithJsonSchema(_WINDOW)]
OptionalUrl = Annotated[URL | None, BeforeValidator(_optional_url), WithJsonSchema(_HTTP_URL)]
Secret = Annotated[SecretStr, BeforeValidator(_secret), WithJsonSchema(_SECRET)]
HeaderName = Annotated[str, AfterValidator(_header_name), _pattern("[A-Za-z0-9!#$%&'*+.^_`|~-]")]
HeaderValue = Annotated[str, BeforeValidator(_secret), AfterValidator(_header_value), WithJsonSchema(_SECRET)]
Retries = Annotated[int, BeforeValidator(_whole(0, _MAX_RETRIES)), WithJsonSchema(_whole_schema(0, _MAX_RETRIES))]
RetentionTime = Annotated[timedelta | None, BeforeValidator(_retention_time), WithJsonSchema(_RETENTION_TIME)]
Bytes = Annotated[
    int, BeforeValidator(_whole(_MEBIBYTE, _MAX_POSITION)), WithJsonSchema(_whole_schema(_MEBIBYTE, _MAX_POSITION))
]
Concurrency = Annotated[
    int, BeforeValidator(_whole(1, MAX_CONCURRENCY)), WithJsonSchema(_whole_schema(1, MAX_CONCURRENCY))
]
Shards = Annotated[int, BeforeValidator(_whole(1, MAX_SHARDS)), WithJsonSchema(_whole_schema(1, MAX_SHARDS))]
StartPosition = Annotated[int, BeforeValidator(_position(0)), WithJsonSchema(_whole_schema(0, _MAX_POSITION))]
EndPosition = Annotated[int, BeforeValidator(_position(1)), WithJsonSchema(_whole_schema(1, _MAX_POSITION))]
BoundStart = Annotated[datetime, BeforeValidator(lambda value: _instant(value, up=False)), WithJsonSchema(_TIME)]
BoundEnd = Annotated[datetime, BeforeValidator(lambda value: _instant(value, up=True)), WithJsonSchema(_TIME)]
TriggerName = Annotated[
    str, AfterValidator(_trigger_name), WithJsonSchema({"type": "string", "minLength": 1, "maxLength": _MAX_NAME})
]
