"""The broker's configuration file: what may stand in it, and what it means.

`load()` turns a text into a `Configuration` in which everything is checked and resolved: durations are seconds, secrets
are read, filters are predicates. Nothing of a file is used unless all of it is valid; what is wrong is a `ConfigError`
that names, for each mistake, the file, the line, the path and what was expected. No message shows a secret.

The models below are also what `json_schema()` is made of: each kind of value stands beside its JSON Schema.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path as FilePath
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError
from yarl import URL

from pgbackend.errors import ConfigError
from pgbackend.filters import CESQL, All, Exact, Not, Prefix, Suffix
from pgbackend.filters import Any as AnyOf
from pgbackend.model import EventFilter, Position
from pgbackend.retry import Retry
from pgbackend.serve.document import Document, Path

_MAX_POSITION = 2**63 - 1
_MAX_RETRIES = 2**31 - 2
_MAX_CONCURRENCY = 10_000
_MAX_SHARDS = 1024
_MAX_NAME = 200
_LONGEST = 36_525 * 86_400.0  # a century, in seconds: what PostgreSQL and the event loop can surely wait
_SHOWN = 60


@dataclass(frozen=True, slots=True)
class _Surroundings:
    """What a text needs besides itself: where its `{file: …}` secrets are. `files` collects their paths."""

    directory: FilePath = FilePath()
    files: set[FilePath] = field(default_factory=set)


def load(
    text: str, *, origin: str, directory: FilePath | None = None, files: set[FilePath] | None = None
) -> "Configuration":
    """The configuration that `text`, YAML or JSON, describes.

    `origin` names the text in messages; `{file: …}` secrets are relative to `directory`, and their paths are added to
    `files`, whether they can be read or not. Raises ConfigError, whose `problems` are all mistakes in the text.
    """
    surroundings = _Surroundings(directory or FilePath(), set() if files is None else files)
    document = Document(text, origin=origin)
    if document.value is None and not document.mistakes:
        raise ConfigError(f"{origin}: is empty: expected a mapping with `triggers`.")
    mistakes = document.mistakes
    try:
        configuration = Configuration.model_validate(document.value, context=surroundings)
    except ValidationError as error:
        for path, expected in _explained(error):
            sentence = expected if expected.endswith("?") else f"{expected}."
            mistakes.append((document.line(path), f"{document.where(path)}: {sentence}"))
    else:
        if not mistakes:
            return configuration
    # Once each: what an alias repeats is one mistake.
    raise ConfigError(*dict.fromkeys(text for _, text in sorted(mistakes, key=lambda one: one[0])))


def load_file(path: FilePath, *, files: set[FilePath] | None = None) -> "Configuration":
    """The configuration in the file at `path`, as `load()`. Raises ConfigError, also when it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}: expected YAML or JSON text.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}.") from None
    return load(text, origin=str(path), directory=path.parent, files=files)


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of the file, for editors.

    It is stricter than `load()` in two things: it wants keys in the case that is documented, and a value for each. And
    it cannot know all that `load()` does: secrets that are not there, an end before the start, what is wrong in CESQL.
    """
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "pgbackend serve"}
    return {**head, **_tidied(Configuration.model_json_schema(by_alias=True))}


def _tidied(node: Any) -> Any:
    """Without what pydantic says for its own models: titles, None as a value, defaults that are whole sections."""
    if isinstance(node, list):
        return [_tidied(one) for one in node]
    if not isinstance(node, dict):
        return node
    options = [one for one in node.get("anyOf", ()) if one != {"type": "null"}]
    if "anyOf" in node and len(options) == 1:
        node = options[0] | {key: below for key, below in node.items() if key != "anyOf"}
    if "patternProperties" in node:
        node = node | {"additionalProperties": False}
    return {
        key: _tidied(below)
        for key, below in node.items()
        if not (key == "title" and isinstance(below, str))
        and not (key == "default" and (below is None or isinstance(below, list | dict)))
    }


def _explained(error: ValidationError) -> Iterator[tuple[Path, str]]:
    """Each error as its path and what was expected there."""
    for one in error.errors(include_url=False):
        # pydantic's way to say that the key itself is meant
        path: Path = one["loc"][:-1] if one["loc"][-1:] == ("[key]",) else one["loc"]
        if (key := one.get("ctx", {}).get("key")) is not None:
            path = (*path, key)
        yield path, _expected(one)


def _expected(error: ErrorDetails) -> str:
    found = error["input"]
    match error["type"]:
        case "extra_forbidden" if isinstance(found, _Unknown):
            return found.message
        case "list_type":
            return f"expected a list, found {_found(found)}"
        case "dict_type":
            return f"expected a mapping, found {_found(found)}"
        case "too_short":
            return f"expected at least one {'filter' if isinstance(found, list) else 'attribute'}"
        case "literal_error":
            return f"expected {error['ctx']['expected']}, found {_found(found)}".replace("'", "")
        case _:
            return error["msg"]


def _found(value: object) -> str:
    match value:
        case None:
            return "nothing"
        case str():
            return json.dumps(value if len(value) <= _SHOWN else value[:_SHOWN] + "…", ensure_ascii=False)
        case list():
            return "a list"
        case _:
            return "a mapping"


def _refuse(message: str, *, key: str | None = None) -> PydanticCustomError:
    """What a validator raises: the message stands as it is, `key` names the entry it is about."""
    # As a value: of a message that had braces itself, pydantic would make something else.
    return PydanticCustomError("expected", "{message}", {"message": message} | ({} if key is None else {"key": key}))


# The kinds of values


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise _refuse(f"expected text, found {_found(value)}")
    return value


def _some_text(value: object) -> str:
    if not (text := _text(value)):
        raise _refuse("expected text that is not empty")
    return text


def _whole(low: int, high: int) -> Callable[[object], int]:
    def check(value: object) -> int:
        text = _text(value)
        if not re.fullmatch(r"[0-9]{1,19}", text):
            raise _refuse(f"expected a whole number, found {_found(text)}")
        if not low <= int(text) <= high:
            raise _refuse(f"expected a whole number from {low} to {high}, found {int(text)}")
        return int(text)

    return check


def seconds(text: str) -> float:
    """The seconds of an ISO 8601 duration. Raises ValueError that says what was expected.

    Years have 365.2425 days, months a twelfth of that; `,` is as good as `.` before decimals.

    >>> seconds("PT2S"), seconds("PT0,25S"), seconds("P1DT1H"), seconds("P0")
    (2.0, 0.25, 90000.0, 0.0)
    """
    matched = re.fullmatch(r"([+-]?)P([0-9.,YMWD]*)(?:T([0-9.,HMS]+))?", text)
    parts = [] if matched is None else _duration_parts(matched[2], matched[3])
    if matched is None or parts is None or not (parts or matched[2] == "0"):
        raise ValueError(f"expected an ISO 8601 duration such as PT2S, found {_found(text)}")
    total = sum((float(number.replace(",", ".")) * unit for number, unit in parts), 0.0)
    if total > _LONGEST:
        raise ValueError(f"expected a duration of at most 100 years, found {_found(text)}")
    return -total if matched[1] == "-" else total


_DAY = 86_400.0
_DATE_UNITS = {"Y": 365.2425 * _DAY, "M": 365.2425 * _DAY / 12, "W": 7 * _DAY, "D": _DAY}
_TIME_UNITS = {"H": 3600.0, "M": 60.0, "S": 1.0}


def _duration_parts(date: str, time: str | None) -> list[tuple[str, float]] | None:
    """Number and seconds per unit of each part; None when they are not well-formed."""
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
    # As the reference implementation has it: what would half a year and a half month be?
    return None if any(one and other for one, other in pairwise(fractional)) else parts


def _duration(value: object) -> float:
    try:
        duration = seconds(_text(value))
    except ValueError as error:
        raise _refuse(str(error)) from None
    if duration <= 0:
        raise _refuse(f"expected a duration above zero, found {_found(value)}")
    return duration


_RFC3339 = re.compile(r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?([Zz]|[+-]\d\d:\d\d)", re.ASCII)


def _instant(value: object, *, up: bool) -> datetime:
    """An aware datetime. PostgreSQL keeps microseconds: what is finer is rounded so that the bound stays exclusive."""
    matched = _RFC3339.fullmatch(_text(value))
    try:
        if matched is None:
            raise ValueError  # noqa: TRY301 - the same message as for 30 February
        date, time, fraction, zone = matched.groups()
        nanoseconds = int((fraction or "").ljust(9, "0"))
        moment = datetime.fromisoformat(f"{date}T{time}{zone.upper().replace('Z', '+00:00')}")
        return moment + timedelta(microseconds=-(-nanoseconds // 1000) if up else nanoseconds // 1000)
    except (ValueError, OverflowError):
        raise _refuse(f"expected a time such as 2026-01-01T00:00:00Z, found {_found(value)}") from None


def _url(value: object) -> URL:
    text = _text(value)
    wanted = "expected an absolute http or https URL"
    if re.search(r"[\s\x00-\x1f\x7f]", text):
        raise _refuse(f"{wanted} without white space")
    try:
        # A URL in ASCII is sent as it is written: some are signed.
        url = URL(text, encoded=text.isascii())
        good = url.scheme in ("http", "https") and url.host and url.port
    except ValueError:
        good = None
    if not good:
        # A URL may carry a password: only its beginning is shown.
        raise _refuse(f"{wanted}, found {_found(text.split('?')[0].split('@')[-1])}")
    return url


def _optional_url(value: object) -> URL | None:
    return None if value == "" else _url(value)


def _secret(value: object, info: ValidationInfo) -> str:
    """A literal, or what `{env: NAME}` or `{file: PATH}` holds now; a file's last line break is not part of it."""
    if isinstance(value, str):
        return value
    if not (isinstance(value, dict) and len(value) == 1 and (source := next(iter(value))) in ("env", "file")):
        raise _refuse("expected text, {env: NAME} or {file: PATH}")
    name = value[source]
    if not isinstance(name, str) or not name:
        raise _refuse("expected " + ("the name of a variable" if source == "env" else "the path of a file"), key=source)
    if source == "env":
        secret = os.environ.get(name, "")
        if not secret:
            raise _refuse(f"the environment variable {name} is not set or empty", key=source)
        return secret
    surroundings: _Surroundings = info.context or _Surroundings()
    path = surroundings.directory / name
    surroundings.files.add(path)
    try:
        secret = path.read_text(encoding="utf-8").removesuffix("\n").removesuffix("\r")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise _refuse(f"the file {name} cannot be read: {reason}", key=source) from None
    if not secret:
        raise _refuse(f"the file {name} is empty", key=source)
    return secret


def _header_value(secret: str) -> str:
    if not secret:
        raise _refuse("expected a value that is not empty")
    return _printable(secret)


def _printable(secret: str) -> str:
    if re.search(r"[\x00-\x1f\x7f-\x9f]", secret):
        raise _refuse("expected a value of one line, without control characters")
    return secret


def _attribute(name: str) -> str:
    if not name:
        raise _refuse("expected text that is not empty")
    if not re.fullmatch(r"[a-z0-9]+", name) or name == "data":
        raise _refuse("expected the name of an attribute, in lower-case letters and digits")
    return name


def _header_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name):
        raise _refuse(f"expected the name of an HTTP header, found {_found(name)}")
    if name.lower() in _RESERVED_HEADERS or name.lower().startswith("ce-"):
        raise _refuse(f"the header {name} belongs to the event and the connection: expected another one")
    return name


# What frames a request or says what the event is: ours to write, not the file's.
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


# The same for editors. Scalars are text here and what YAML makes of them there.

_SCALAR: dict[str, Any] = {"type": ["string", "number", "boolean"]}
_SOME_SCALAR = _SCALAR | {"minLength": 1}
_KEYS = {"type": "object", "additionalProperties": False}
_SECRET: dict[str, Any] = {
    "anyOf": [
        _SCALAR | {"description": "The secret itself.", "pattern": r"^[^\x00-\x1f\x7f-\x9f]*$"},
        _KEYS | {"properties": {"env": {"type": "string", "minLength": 1}}, "required": ["env"]}
        | {"description": "The environment variable that has it."},
        _KEYS | {"properties": {"file": {"type": "string", "minLength": 1}}, "required": ["file"]}
        | {"description": "The file that has it, relative to this one. A change of the file is a change of this one."},
    ]
}  # fmt: skip
_DURATION = {
    "type": "string",
    "description": "An ISO 8601 duration above zero.",
    "pattern": r"^\+?P(?=.*[1-9])([0-9]+([.,][0-9]+)?[YMWD])*(T([0-9]+([.,][0-9]+)?[HMS])+)?$",
    "examples": ["PT0.5S", "PT2S", "PT10M"],
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


SomeText = Annotated[str, BeforeValidator(_some_text), WithJsonSchema(_SOME_SCALAR)]
AttributeName = Annotated[str, AfterValidator(_attribute), _pattern("[a-z0-9]")]
Attributes = Annotated[dict[AttributeName, SomeText], Field(min_length=1)]
Seconds = Annotated[float, BeforeValidator(_duration), WithJsonSchema(_DURATION)]
OptionalUrl = Annotated[URL | None, BeforeValidator(_optional_url), WithJsonSchema(_HTTP_URL)]
Secret = Annotated[SecretStr, BeforeValidator(_secret), WithJsonSchema(_SECRET)]
HeaderName = Annotated[str, AfterValidator(_header_name), _pattern("[A-Za-z0-9!#$%&'*+.^_`|~-]")]
HeaderValue = Annotated[str, BeforeValidator(_secret), AfterValidator(_header_value), WithJsonSchema(_SECRET)]
Retries = Annotated[int, BeforeValidator(_whole(0, _MAX_RETRIES)), WithJsonSchema(_whole_schema(0, _MAX_RETRIES))]
Concurrency = Annotated[
    int, BeforeValidator(_whole(1, _MAX_CONCURRENCY)), WithJsonSchema(_whole_schema(1, _MAX_CONCURRENCY))
]
Shards = Annotated[int, BeforeValidator(_whole(1, _MAX_SHARDS)), WithJsonSchema(_whole_schema(1, _MAX_SHARDS))]
StartPosition = Annotated[
    int, BeforeValidator(_whole(0, _MAX_POSITION)), WithJsonSchema(_whole_schema(0, _MAX_POSITION))
]
EndPosition = Annotated[int, BeforeValidator(_whole(1, _MAX_POSITION)), WithJsonSchema(_whole_schema(1, _MAX_POSITION))]
BoundStart = Annotated[datetime, BeforeValidator(lambda value: _instant(value, up=False)), WithJsonSchema(_TIME)]
BoundEnd = Annotated[datetime, BeforeValidator(lambda value: _instant(value, up=True)), WithJsonSchema(_TIME)]


# The sections


@dataclass(frozen=True, slots=True)
class _Unknown:
    """Stands in the place of a value whose key is not known, and says so when pydantic refuses it."""

    message: str


class _Section(BaseModel):
    """A mapping with known keys. They match without case, as they do where these files come from; null is absent."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        arbitrary_types_allowed=True,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
    )
    what: ClassVar[str] = "key"
    elsewhere: ClassVar[Mapping[str, str]] = {}
    """What to write instead of a key that other versions of these files had, by its lower-case name."""

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, value: object) -> object:
        if not isinstance(value, dict):
            raise _refuse(f"expected a mapping, found {_found(value)}")
        known = {(field.alias or name).lower(): field.alias or name for name, field in cls.model_fields.items()}
        section: dict[str, object] = {}
        for key, below in value.items():
            name = known.get(key.lower())
            if name in section:
                raise _refuse(f"{name} stands twice in one mapping: expected each key once", key=key)
            if name is None:
                section[key] = _Unknown(cls._unknown(key.lower(), known))
            elif below is not None:
                section[name] = below
        return section

    @classmethod
    def _unknown(cls, key: str, known: Mapping[str, str]) -> str:
        near = get_close_matches(key, known, n=1)
        instead = cls.elsewhere.get(key) or (known[near[0]] if near else None)
        said = f"unknown {cls.what}: expected {_choice(known.values())}"
        return said if instead is None else f"{said}; did you mean {instead}?"


def _choice(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


class Filter(_Section):
    """One filter: exactly one dialect. An attribute that an event lacks does not match; case counts."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})
    what: ClassVar[str] = "dialect"

    exact: Attributes | None = Field(default=None, examples=[{"type": "com.example.order.created"}])
    """Each of these attributes is exactly this text."""
    prefix: Attributes | None = Field(default=None, examples=[{"source": "/shop/"}])
    """Each of these attributes begins with this text."""
    suffix: Attributes | None = Field(default=None, examples=[{"subject": ".draft"}])
    """Each of these attributes ends with this text."""
    all: Annotated[list["Filter"], Field(min_length=1)] | None = None
    """Every one of these filters matches."""
    any: Annotated[list["Filter"], Field(min_length=1)] | None = None
    """At least one of these filters matches."""
    not_: "Filter | None" = Field(default=None, alias="not")
    """This filter does not match."""
    cesql: SomeText | None = Field(default=None, examples=["partitionkey LIKE 'eu-%' AND EXISTS priority"])
    """An expression in CloudEvents SQL. One that fails on an event does not match it."""

    @model_validator(mode="before")
    @classmethod
    def _one_dialect(cls, value: object) -> object:
        if isinstance(value, dict):
            given = [key for key, below in value.items() if below is not None]
            if len(given) != 1:
                dialects = _choice(field.alias or name for name, field in cls.model_fields.items())
                raise _refuse(f"expected exactly one of {dialects}, found {' and '.join(given) or 'none'}")
        return value

    @field_validator("cesql", mode="after")
    @classmethod
    def _parsed(cls, text: str) -> str:
        try:
            mistake = CESQL(text).mistake
        except ConfigError as error:
            mistake = str(error)
        if mistake is not None:
            raise _refuse(mistake.rstrip("."))
        return text

    def predicate(self) -> EventFilter:
        """The same as a predicate on events."""
        if self.exact:
            return Exact(self.exact)
        if self.prefix:
            return Prefix(self.prefix)
        if self.suffix:
            return Suffix(self.suffix)
        if self.all:
            return All([one.predicate() for one in self.all])
        if self.any:
            return AnyOf([one.predicate() for one in self.any])
        if self.cesql:
            return CESQL(self.cesql)
        assert self.not_ is not None  # noqa: S101 - one dialect is set, as validated
        return Not(self.not_.predicate())


class DeliveryOptions(_Section):
    """How a trigger's events are sent, and sent again."""

    retry: Retries = 0
    """How often an event is tried again after the first time. 0 where options are given without it."""
    backoff_policy: Literal["constant", "linear", "exponential"] = Field(default="constant", alias="backoffPolicy")
    """The wait before retry n: backoffDelay (constant), that times n (linear), or times 2 to the n (exponential)."""
    backoff_delay: Seconds = Field(default=1.0, alias="backoffDelay", json_schema_extra={"default": "PT1S"})
    """The wait that backoffPolicy multiplies: an ISO 8601 duration."""
    backoff_max: Seconds = Field(default=600.0, alias="backoffMax", json_schema_extra={"default": "PT10M"})
    """The longest wait, also of what a target asks for by Retry-After: an ISO 8601 duration."""
    timeout: Seconds = Field(default=30.0, json_schema_extra={"default": "PT30S"})
    """For one request, from its connection to the end of its response: an ISO 8601 duration."""
    dead_letter_url: OptionalUrl = Field(default=None, alias="deadLetterURL", repr=False)
    """Where events go that the target did not take in all tries, with the same retries."""

    def policy(self) -> Retry:
        """The same as a `Retry`: the wait before retry n is P, P·n or P·2ⁿ, and up to a tenth more."""
        # `Retry` doubles from its delay on, P·2ⁿ⁻¹; this file's exponential wait begins with 2P.
        delay = self.backoff_delay * 2 if self.backoff_policy == "exponential" else self.backoff_delay
        return Retry(
            attempts=self.retry + 1, delay=delay, backoff=self.backoff_policy, max_delay=self.backoff_max, jitter=0.1
        )


_NO_OPTIONS = DeliveryOptions(retry="5", backoffPolicy="exponential")  # type: ignore[arg-type]


class Target(_Section):
    """Where a trigger sends its events."""

    url: OptionalUrl = Field(default=None, repr=False)
    """Absolute, http or https. Without one, events go to deadLetterURL at once."""
    headers: dict[HeaderName, HeaderValue] = Field(default={}, repr=False)
    """Added to each request to the target, not to deadLetterURL."""
    mode: Literal["binary", "structured"] = "binary"
    """The content mode of the CloudEvents HTTP binding."""
    delivery_options: DeliveryOptions | None = Field(
        default=None, alias="deliveryOptions", json_schema_extra={"deprecated": True}
    )
    """The deprecated place: counts only when the trigger has none itself."""

    @field_validator("headers", mode="after")
    @classmethod
    def _headers_once(cls, headers: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        names = [name.lower() for name in headers]
        if twice := next((name for name in headers if names.count(name.lower()) > 1), None):
            raise _refuse(f"{twice} stands twice: expected each header once")
        url = info.data.get("url")
        if url is not None and url.user is not None and "authorization" in names:
            raise _refuse("an Authorization header and a user in the URL: expected one of them")
        return headers


class ById(_Section):
    """Positions in the log, exclusive at both ends. They beat dates."""

    start: StartPosition | None = None
    """The position behind which the trigger begins. Another one than before is a seek."""
    end: EndPosition | None = None
    """The position before which the trigger is complete."""

    @field_validator("end", mode="after")
    @classmethod
    def _behind_start(cls, end: int, info: ValidationInfo) -> int:
        _check_order(info.data.get("start"), end)
        return end


class ByDate(_Section):
    """Times at which events were recorded, exclusive at both ends."""

    start: BoundStart | None = None
    """The time after which the trigger begins. Another one than before is a seek."""
    end: BoundEnd | None = None
    """The time before which the trigger is complete."""

    @field_validator("end", mode="after")
    @classmethod
    def _behind_start(cls, end: datetime, info: ValidationInfo) -> datetime:
        _check_order(info.data.get("start"), end)
        return end


def _check_order(start: Any, end: Any) -> None:
    if start is not None and not start < end:
        raise _refuse("expected an end behind the start")


class Bounds(_Section):
    """Which part of the log a trigger gets."""

    elsewhere: ClassVar[Mapping[str, str]] = {"startid": "byId: {start: …}", "endid": "byId: {end: …}"}

    by_id: ById = Field(default=ById(), alias="byId")
    by_date: ByDate = Field(default=ByDate(), alias="byDate")


class Trigger(_Section):
    """One subscription and where its events go."""

    filters: list[Filter] = []
    """All of them must match. Without any, everything passes."""
    target: Target = Target()
    own_delivery_options: DeliveryOptions | None = Field(default=None, alias="deliveryOptions")
    """How events are sent, and sent again. Without any: 5 retries, exponential, PT1S."""
    order: Literal["none", "key", "strict"] = "none"
    """key: events with one partitionkey arrive one after another. strict: one at a time, in log order."""
    concurrency: Concurrency = 64
    """How many requests are open at a time, in each shard."""
    shards: Shards = 1
    """Into how many parts the work is divided among processes. Fixed when the trigger is new."""
    first: Literal["earliest", "latest"] = Field(default="latest", alias="start")
    """Where it begins when it is new."""
    bounds: Bounds = Bounds()

    @field_validator("shards", mode="after")
    @classmethod
    def _one_shard_in_log_order(cls, shards: int, info: ValidationInfo) -> int:
        if info.data.get("order") == "strict" and shards != 1:
            raise _refuse("strict order is that of the whole log: expected a single shard")
        return shards

    @property
    def delivery_options(self) -> DeliveryOptions:
        """The options that count."""
        return self.own_delivery_options or self.target.delivery_options or _NO_OPTIONS

    @property
    def predicate(self) -> EventFilter | None:
        """The filters as one; None when everything passes."""
        predicates = [one.predicate() for one in self.filters]
        return None if not predicates else predicates[0] if len(predicates) == 1 else All(predicates)

    @property
    def start(self) -> Position | datetime | Literal["earliest", "latest"]:
        """Where it begins when it is new: a position beats a date, and a date beats `start`."""
        if self.bounds.by_id.start is not None:
            return Position(self.bounds.by_id.start)
        return self.bounds.by_date.start or self.first

    @property
    def end(self) -> Position | datetime | None:
        """Where it is complete: a position beats a date."""
        if self.bounds.by_id.end is not None:
            return Position(self.bounds.by_id.end)
        return self.bounds.by_date.end


class IngestAuth(_Section):
    """Who may send events. Nobody is asked when all of it is empty."""

    user: Secret | None = None
    """For Basic, with password."""
    password: Secret | None = None
    """For Basic, with user."""
    token: Secret | None = None
    """For Bearer."""

    @field_validator("user", "password", "token", mode="after")
    @classmethod
    def _usable(cls, secret: SecretStr, info: ValidationInfo) -> SecretStr | None:
        text = _printable(secret.get_secret_value())
        if info.field_name == "user" and ":" in text:
            raise _refuse("expected a name without a colon, which HTTP cannot carry")
        # "" as a literal is how the files of TriggerMesh say that there is none.
        return secret if text else None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.user is None) != (self.password is None):
            missing = "user" if self.user is None else "password"
            raise _refuse(f"expected {missing} as well: user and password belong together")
        return self


def _trigger_name(name: str) -> str:
    if not name or not name.isprintable() or len(name) > _MAX_NAME:
        raise _refuse(f"expected a printable name of 1 to {_MAX_NAME} characters for the trigger")
    return name


TriggerName = Annotated[
    str, AfterValidator(_trigger_name), WithJsonSchema({"type": "string", "minLength": 1, "maxLength": _MAX_NAME})
]


class Configuration(_Section):
    """What `pgbackend serve` does: who may send events to the log, and where they go."""

    ingest: IngestAuth = IngestAuth()
    triggers: dict[TriggerName, Trigger] = {}
    """By name: that of the subscription whose place in the log the trigger has."""

    @field_validator("triggers", mode="before")
    @classmethod
    def _empty_trigger(cls, value: object) -> object:
        if not isinstance(value, dict):
            raise _refuse(f"expected a mapping from names to triggers, found {_found(value)}")
        return {name: {} if below is None else below for name, below in value.items()}
