"""The broker's configuration file: what may stand in it, and what it means.

`load()` turns a text into a `Configuration` in which everything is checked and resolved: durations are seconds, secrets
are read, filters are predicates. Nothing of a file is used unless all of it is valid; what is wrong is a `ConfigError`
that names the file, the line, the path and what was expected. No message shows a secret.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta
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
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError
from yarl import URL

from pgbackend.errors import ConfigError
from pgbackend.filters import All, Exact, Not, Prefix, Suffix
from pgbackend.filters import Any as AnyOf
from pgbackend.model import EventFilter, Position
from pgbackend.retry import Retry
from pgbackend.serve.document import Document, Path, Value

_MAX_POSITION = 2**63 - 1
_MAX_RETRIES = 2**31 - 2
_MAX_CONCURRENCY = 10_000
_MAX_SHARDS = 1024
_LONGEST = 36_525 * 86_400.0  # a century, in seconds: what PostgreSQL and the event loop can surely wait
_SHOWN = 60


def load(text: str, *, origin: str, directory: FilePath | None = None) -> "Configuration":
    """The configuration that `text`, YAML or JSON, describes.

    `origin` names the text in messages; `{file: …}` secrets are relative to `directory`. Raises ConfigError.
    """
    document = Document(text, origin=origin)
    if document.value is None:
        raise ConfigError(f"{origin}: is empty: expected a mapping with `triggers`.")
    try:
        return Configuration.model_validate(document.value, context=directory or FilePath())
    except ValidationError as error:
        found = sorted(_explained(error), key=lambda one: document.line(one[0]))
        path, expected = found[0]
        more = f" ({len(found) - 1} more after it)" if len(found) > 1 else ""
        raise ConfigError(f"{document.where(path)}: {expected}{more}.") from None


def load_file(path: FilePath) -> "Configuration":
    """The configuration in the file at `path`. Raises ConfigError, also when it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}: expected YAML or JSON text.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}.") from None
    return load(text, origin=str(path), directory=path.parent)


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
        case "expected":
            return error["msg"]
        case "missing":
            return "is missing"
        case "list_type":
            return f"expected a list, found {_found(found)}"
        case "dict_type" | "model_type" | "model_attributes_type":
            return f"expected a mapping, found {_found(found)}"
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
    return PydanticCustomError("expected", message, None if key is None else {"key": key})


# The kinds of values


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise _refuse(f"expected text, found {_found(value)}")
    return value


def _some_text(value: object) -> str:
    if not (text := _text(value)):
        raise _refuse("expected text that is not empty")
    return text


def _whole_number(value: object) -> int:
    text = _text(value)
    if not re.fullmatch(r"[0-9]{1,19}", text):
        raise _refuse(f"expected a whole number, found {_found(text)}")
    return int(text)


def _between(low: int, high: int) -> Callable[[int], int]:
    def check(number: int) -> int:
        if not low <= number <= high:
            raise _refuse(f"expected a whole number from {low} to {high}, found {number}")
        return number

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
    return None if value in (None, "") else _url(value)


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
    directory: FilePath = info.context or FilePath()
    try:
        secret = (directory / name).read_text(encoding="utf-8").removesuffix("\n").removesuffix("\r")
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


Text = Annotated[str, BeforeValidator(_text)]
SomeText = Annotated[str, BeforeValidator(_some_text)]
Seconds = Annotated[float, BeforeValidator(_duration)]
OptionalUrl = Annotated[URL | None, BeforeValidator(_optional_url)]
HeaderValue = Annotated[str, BeforeValidator(_secret), AfterValidator(_header_value)]
StartPosition = Annotated[int, BeforeValidator(_whole_number), AfterValidator(_between(0, _MAX_POSITION))]
EndPosition = Annotated[int, BeforeValidator(_whole_number), AfterValidator(_between(1, _MAX_POSITION))]
BoundStart = Annotated[datetime, BeforeValidator(lambda value: _instant(value, up=False))]
BoundEnd = Annotated[datetime, BeforeValidator(lambda value: _instant(value, up=True))]


# The sections


class _Section(BaseModel):
    """A mapping with known keys. They match without case, as they do where these files come from; null is absent."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, hide_input_in_errors=True)
    what: ClassVar[str] = "key"

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, value: object) -> object:
        if not isinstance(value, dict):
            raise _refuse(f"expected a mapping, found {_found(value)}")
        known = {(field.alias or name).lower(): field.alias or name for name, field in cls.model_fields.items()}
        section: dict[str, Value] = {}
        for key, below in value.items():
            if (name := known.get(key.lower())) is None:
                raise _refuse(f"unknown {cls.what}: expected {_choice(known.values())}", key=key)
            if name in section:
                raise _refuse(f"{name} stands twice in one mapping: expected each key once", key=key)
            if below is not None:
                section[name] = below
        return section


def _choice(names: Any) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else str(last)


class Filter(_Section):
    """One filter: exactly one dialect."""

    what: ClassVar[str] = "dialect"

    exact: dict[SomeText, SomeText] | None = None
    prefix: dict[SomeText, SomeText] | None = None
    suffix: dict[SomeText, SomeText] | None = None
    all: list["Filter"] | None = None
    any: list["Filter"] | None = None
    not_: "Filter | None" = Field(default=None, alias="not")
    cesql: Text | None = None

    @model_validator(mode="after")
    def _one_dialect(self) -> Self:
        given = [info.alias or name for name, info in type(self).model_fields.items() if name in self.model_fields_set]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise _refuse(f"expected exactly one of {_choice(_DIALECTS)}, found {found}")
        dialect = given[0]
        if dialect == "cesql":
            raise _refuse(f"is not supported yet: expected {_choice(_DIALECTS[:-1])}", key="cesql")
        if not getattr(self, dialect if dialect != "not" else "not_"):
            wanted = "filter" if dialect in ("all", "any") else "attribute"
            raise _refuse(f"expected at least one {wanted}", key=dialect)
        try:
            self.predicate()
        except ConfigError as error:
            raise _refuse(str(error).rstrip("."), key=dialect) from None
        return self

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
        assert self.not_ is not None  # noqa: S101 - one dialect is set, as validated
        return Not(self.not_.predicate())


_DIALECTS = ("exact", "prefix", "suffix", "all", "any", "not", "cesql")


class DeliveryOptions(_Section):
    """How a trigger's events are sent, and sent again."""

    retry: Annotated[int, BeforeValidator(_whole_number), AfterValidator(_between(0, _MAX_RETRIES))] = 0
    """Tries after the first. 0 where options are given without it, as in the files of TriggerMesh."""
    backoff_policy: Literal["constant", "linear", "exponential"] = Field(default="constant", alias="backoffPolicy")
    backoff_delay: Seconds = Field(default=1.0, alias="backoffDelay")
    backoff_max: Seconds = Field(default=600.0, alias="backoffMax")
    timeout: Seconds = 30.0
    """For one request, from its connection to the end of its response."""
    dead_letter_url: OptionalUrl = Field(default=None, alias="deadLetterURL")

    def policy(self) -> Retry:
        """The same as a `Retry`: the wait before retry n is P, P·n or P·2ⁿ, and up to a tenth more."""
        # `Retry` doubles from its delay on, P·2ⁿ⁻¹; this file's exponential wait begins with 2P.
        delay = self.backoff_delay * 2 if self.backoff_policy == "exponential" else self.backoff_delay
        return Retry(
            attempts=self.retry + 1, delay=delay, backoff=self.backoff_policy, max_delay=self.backoff_max, jitter=0.1
        )


_NO_OPTIONS = DeliveryOptions(retry="5", backoffPolicy="exponential")  # type: ignore[arg-type]

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
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)


def _header_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name):
        raise _refuse(f"expected the name of an HTTP header, found {_found(name)}")
    if name.lower() in _RESERVED_HEADERS or name.lower().startswith("ce-"):
        raise _refuse(f"the header {name} belongs to the event and the connection: expected another one")
    return name


class Target(_Section):
    """Where a trigger sends its events."""

    url: OptionalUrl = None
    headers: dict[Annotated[str, AfterValidator(_header_name)], HeaderValue] = Field(default={}, repr=False)
    mode: Literal["binary", "structured"] = "binary"
    delivery_options: DeliveryOptions | None = Field(default=None, alias="deliveryOptions")
    """The deprecated place: counts only when the trigger has none itself."""

    @model_validator(mode="after")
    def _headers_once(self) -> Self:
        names = [name.lower() for name in self.headers]
        if twice := next((name for name in self.headers if names.count(name.lower()) > 1), None):
            raise _refuse(f"{twice} stands twice: expected each header once", key="headers")
        if self.url is not None and self.url.user is not None and "authorization" in names:
            raise _refuse("an Authorization header and a user in the URL: expected one of them", key="headers")
        return self


class ById(_Section):
    """Positions, exclusive at both ends."""

    start: StartPosition | None = None
    end: EndPosition | None = None


class ByDate(_Section):
    """Times of recording, exclusive at both ends."""

    start: BoundStart | None = None
    end: BoundEnd | None = None


class Bounds(_Section):
    """Which part of the log a trigger gets."""

    by_id: ById = Field(default=ById(), alias="byId")
    by_date: ByDate = Field(default=ByDate(), alias="byDate")

    @model_validator(mode="after")
    def _start_before_end(self) -> Self:
        for key, bound in (("byId", self.by_id), ("byDate", self.by_date)):
            start, end = bound.start, bound.end
            if start is not None and end is not None and not start < end:  # type: ignore[operator]
                raise _refuse("expected a start before the end", key=key)
        return self


class Trigger(_Section):
    """One subscription and where its events go."""

    filters: list[Filter] = []
    target: Target = Target()
    own_delivery_options: DeliveryOptions | None = Field(default=None, alias="deliveryOptions")
    order: Literal["none", "key", "strict"] = "none"
    concurrency: Annotated[int, BeforeValidator(_whole_number), AfterValidator(_between(1, _MAX_CONCURRENCY))] = 64
    shards: Annotated[int, BeforeValidator(_whole_number), AfterValidator(_between(1, _MAX_SHARDS))] = 1
    first: Literal["earliest", "latest"] = Field(default="latest", alias="start")
    bounds: Bounds = Bounds()

    @model_validator(mode="after")
    def _one_shard_in_log_order(self) -> Self:
        if self.order == "strict" and self.shards != 1:
            raise _refuse("strict order is that of the whole log: expected a single shard", key="shards")
        return self

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

    user: SecretStr | None = None
    password: SecretStr | None = None
    token: SecretStr | None = None

    @field_validator("user", "password", "token", mode="before")
    @classmethod
    def _resolved(cls, value: object, info: ValidationInfo) -> str | None:
        # "" as a literal is how the files of TriggerMesh say that there is none.
        return _printable(_secret(value, info)) or None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.user is None) != (self.password is None):
            missing = "user" if self.user is None else "password"
            raise _refuse(f"expected {missing} as well: user and password belong together")
        if self.user is not None and ":" in self.user.get_secret_value():
            raise _refuse("expected a name without a colon, which HTTP cannot carry", key="user")
        return self


class Configuration(_Section):
    """A whole file."""

    ingest: IngestAuth = IngestAuth()
    triggers: Mapping[str, Trigger] = {}

    @field_validator("triggers", mode="before")
    @classmethod
    def _named(cls, value: object) -> object:
        if not isinstance(value, dict):
            raise _refuse(f"expected a mapping from names to triggers, found {_found(value)}")
        for name in value:
            if not name or not name.isprintable() or len(name) > 200:
                raise _refuse("expected a printable name of 1 to 200 characters for the trigger", key=name)
        return {name: {} if below is None else below for name, below in value.items()}
