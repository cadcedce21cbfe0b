"""The broker's configuration file: what may stand in it, and what it means.

`load()` turns a text into a `Configuration` in which everything is checked and resolved: durations are seconds, secrets
are read, filters are predicates. Nothing of a file is used unless all of it is valid; what is wrong is a `ConfigError`
that names, for each mistake, the file, the line, the path and what was expected. No message shows a secret.

The models are also what `json_schema()` is made of; the kinds of values in them are those of `values`.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path as FilePath
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from pgbackend.errors import ConfigError
from pgbackend.filters import CESQL, All, Exact, Not, Prefix, Suffix
from pgbackend.filters import Any as AnyOf
from pgbackend.model import EventFilter, Position
from pgbackend.retry import Retry
from pgbackend.serve.config.document import Document, Path
from pgbackend.serve.config.values import (
    Attributes,
    BoundEnd,
    BoundStart,
    Concurrency,
    EndPosition,
    HeaderName,
    HeaderValue,
    OptionalUrl,
    Retries,
    Seconds,
    Secret,
    Shards,
    SomeText,
    StartPosition,
    Surroundings,
    TriggerName,
    described,
    printable,
    refuse,
)

FILE_BYTES = 8 << 20
"""Of a configuration. Thousands of triggers are one; what is larger is another file, and YAML would take minutes."""


def load(
    text: str, *, origin: str, directory: FilePath | None = None, files: set[FilePath] | None = None
) -> "Configuration":
    """The configuration that `text`, YAML or JSON, describes.

    `origin` names the text in messages; `{file: …}` secrets are relative to `directory`, and their paths are added to
    `files`, whether they can be read or not. Raises ConfigError, whose `problems` are all mistakes in the text.
    """
    surroundings = Surroundings(directory or FilePath(), set() if files is None else files)
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
        with path.open("rb") as file:
            content = file.read(FILE_BYTES + 1)
        if len(content) > FILE_BYTES:
            raise ConfigError(f"{path}: too large: expected at most {FILE_BYTES >> 20} MiB of YAML or JSON.")
        text = content.decode()
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
    value = error["input"]
    match error["type"]:
        case "extra_forbidden" if isinstance(value, _Unknown):
            return value.message
        case "list_type":
            return f"expected a list, found {described(value)}"
        case "dict_type":
            return f"expected a mapping, found {described(value)}"
        case "too_short":
            return f"expected at least one {'filter' if isinstance(value, list) else 'attribute'}"
        case "literal_error":
            return f"expected {error['ctx']['expected']}, found {described(value)}".replace("'", "")
        case _:
            return error["msg"]


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
            raise refuse(f"expected a mapping, found {described(value)}")
        known = {(field.alias or name).lower(): field.alias or name for name, field in cls.model_fields.items()}
        section: dict[str, object] = {}
        for key, below in value.items():
            name = known.get(key.lower())
            if name in section:
                raise refuse(f"{name} stands twice in one mapping: expected each key once", key=key)
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
                raise refuse(f"expected exactly one of {dialects}, found {' and '.join(given) or 'none'}")
        return value

    @field_validator("cesql", mode="after")
    @classmethod
    def _parsed(cls, text: str) -> str:
        try:
            mistake = CESQL(text).mistake
        except ConfigError as error:
            mistake = str(error)
        if mistake is not None:
            raise refuse(mistake.rstrip("."))
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
    header_coding: Literal["percent", "none"] = Field(default="percent", alias="headerCoding")
    """How binary mode writes attributes: none is for targets that do not undo the binding's percent-codes."""
    delivery_options: DeliveryOptions | None = Field(
        default=None, alias="deliveryOptions", json_schema_extra={"deprecated": True}
    )
    """The deprecated place: counts only when the trigger has none itself."""

    @field_validator("headers", mode="after")
    @classmethod
    def _headers_once(cls, headers: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        names = [name.lower() for name in headers]
        if twice := next((name for name in headers if names.count(name.lower()) > 1), None):
            raise refuse(f"{twice} stands twice: expected each header once")
        url = info.data.get("url")
        if url is not None and url.user is not None and "authorization" in names:
            raise refuse("an Authorization header and a user in the URL: expected one of them")
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
        raise refuse("expected an end behind the start")


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
            raise refuse("strict order is that of the whole log: expected a single shard")
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
        text = printable(secret.get_secret_value())
        if info.field_name == "user" and ":" in text:
            raise refuse("expected a name without a colon, which HTTP cannot carry")
        # "" as a literal is how the files of TriggerMesh say that there is none.
        return secret if text else None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.user is None) != (self.password is None):
            missing = "user" if self.user is None else "password"
            raise refuse(f"expected {missing} as well: user and password belong together")
        return self


class Configuration(_Section):
    """What `pgbackend serve` does: who may send events to the log, and where they go."""

    ingest: IngestAuth = IngestAuth()
    triggers: dict[TriggerName, Trigger] = {}
    """By name: that of the subscription whose place in the log the trigger has."""

    @field_validator("triggers", mode="before")
    @classmethod
    def _empty_trigger(cls, value: object) -> object:
        if not isinstance(value, dict):
            raise refuse(f"expected a mapping from names to triggers, found {described(value)}")
        return {name: {} if below is None else below for name, below in value.items()}
