"""The sections of a configuration file: what each may contain, and what it means.

`load` validates a file with these models, and `schema` derives the JSON Schema for editors from them, so the docstrings
of the fields are what editors show. The kinds of single values are in `values`.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationInfo, field_validator, model_validator
from yarl import URL

from pgbackend.errors import ConfigError
from pgbackend.filters import CESQL, All, Exact, Not, Prefix, Suffix
from pgbackend.filters import Any as AnyOf
from pgbackend.model import EventFilter, Position
from pgbackend.retry import Retry
from pgbackend.serve.config.values import (
    Attributes,
    BoundEnd,
    BoundStart,
    Bytes,
    Concurrency,
    EndPosition,
    Flag,
    HeaderName,
    HeaderValue,
    OptionalUrl,
    RetentionTime,
    Retries,
    Seconds,
    Secret,
    Shards,
    SomeText,
    StartPosition,
    TriggerName,
    Window,
    described,
    printable,
    refuse,
)


@dataclass(frozen=True, slots=True)
class UnknownKey:
    """Replaces the value of an unknown key, so that pydantic's refusal of the key can carry our message."""

    message: str


class _Section(BaseModel):
    """A mapping with known keys. Keys match in any case, as in TriggerMesh's files; a null value counts as absent."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        arbitrary_types_allowed=True,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
    )
    key_noun: ClassVar[str] = "key"
    replacements: ClassVar[Mapping[str, str]] = {}
    """The replacements for keys of older files, by their lower-case names."""

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
                raise refuse(f"{name} occurs twice in this mapping: expected each key once", key=key)
            if name is None:
                section[key] = UnknownKey(cls._unknown(key.lower(), known))
            elif below is not None:
                section[name] = below
        return section

    @classmethod
    def _unknown(cls, key: str, known: Mapping[str, str]) -> str:
        similar = get_close_matches(key, known, n=1)
        suggestion = cls.replacements.get(key) or (known[similar[0]] if similar else None)
        message = f"unknown {cls.key_noun}: expected {_choice(known.values())}"
        return message if suggestion is None else f"{message}; did you mean {suggestion}?"


def _choice(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


class Filter(_Section):
    """A filter in exactly one dialect, case-sensitive. An attribute that an event lacks never matches."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})
    key_noun: ClassVar[str] = "dialect"

    exact: Attributes | None = Field(default=None, examples=[{"type": "com.example.order.created"}])
    """Each attribute equals its text."""
    prefix: Attributes | None = Field(default=None, examples=[{"source": "/shop/"}])
    """Each attribute begins with its text."""
    suffix: Attributes | None = Field(default=None, examples=[{"subject": ".draft"}])
    """Each attribute ends with its text."""
    all: Annotated[list["Filter"], Field(min_length=1)] | None = None
    """All of these filters match."""
    any: Annotated[list["Filter"], Field(min_length=1)] | None = None
    """At least one of these filters matches."""
    not_: "Filter | None" = Field(default=None, alias="not")
    """This filter does not match."""
    cesql: SomeText | None = Field(default=None, examples=["partitionkey LIKE 'eu-%' AND EXISTS priority"])
    """An expression in CloudEvents SQL. An error in its evaluation means no match."""

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
        """The filter as a predicate on events."""
        if self.exact:
            return Exact(self.exact)
        if self.prefix:
            return Prefix(self.prefix)
        if self.suffix:
            return Suffix(self.suffix)
        if self.all:
            return All([part.predicate() for part in self.all])
        if self.any:
            return AnyOf([part.predicate() for part in self.any])
        if self.cesql:
            return CESQL(self.cesql)
        assert self.not_ is not None  # noqa: S101 - validation left exactly one dialect
        return Not(self.not_.predicate())


class DeliveryOptions(_Section):
    """How the trigger sends its events, and retries them."""

    retry: Retries = 0
    """Retries after the first try. 0 when deliveryOptions has no retry."""
    backoff_policy: Literal["constant", "linear", "exponential"] = Field(default="constant", alias="backoffPolicy")
    """The wait before retry n: the backoffDelay (constant), times n (linear), or times 2 to the n (exponential)."""
    backoff_delay: Seconds = Field(default=1.0, alias="backoffDelay", json_schema_extra={"default": "PT1S"})
    """The wait that backoffPolicy multiplies, as an ISO 8601 duration."""
    backoff_max: Seconds = Field(default=600.0, alias="backoffMax", json_schema_extra={"default": "PT10M"})
    """The longest wait, as an ISO 8601 duration. It limits Retry-After as well."""
    timeout: Seconds = Field(default=30.0, json_schema_extra={"default": "PT30S"})
    """The time for one request, from connecting to the end of the response, as an ISO 8601 duration."""
    dead_letter_url: OptionalUrl = Field(default=None, alias="deadLetterURL", repr=False)
    """Receives the events that used up their tries or were rejected. It gets the same retries."""

    def policy(self) -> Retry:
        """The options as a `Retry`: the wait before retry n is P, P·n or P·2ⁿ, plus up to 10 % of jitter."""
        # `Retry` waits P·2ⁿ⁻¹ before retry n, this file P·2ⁿ.
        delay = self.backoff_delay * 2 if self.backoff_policy == "exponential" else self.backoff_delay
        return Retry(
            attempts=self.retry + 1, delay=delay, backoff=self.backoff_policy, max_delay=self.backoff_max, jitter=0.1
        )


_NO_OPTIONS = DeliveryOptions(retry="5", backoffPolicy="exponential")  # type: ignore[arg-type]


class Target(_Section):
    """The HTTP target of the trigger."""

    url: OptionalUrl = Field(default=None, repr=False)
    """An absolute http or https URL. Without it, events go to deadLetterURL at once."""
    headers: dict[HeaderName, HeaderValue] = Field(default={}, repr=False)
    """Headers for each request to the target. Requests to deadLetterURL do not get them."""
    mode: Literal["binary", "structured"] = "binary"
    """The content mode of the CloudEvents HTTP binding."""
    header_coding: Literal["percent", "none"] = Field(default="percent", alias="headerCoding")
    """How binary mode writes attributes. Use none for targets that do not decode percent-encoded headers."""
    delivery_options: DeliveryOptions | None = Field(
        default=None, alias="deliveryOptions", json_schema_extra={"deprecated": True}
    )
    """Deprecated. Read only when the trigger itself has no deliveryOptions."""

    @field_validator("headers", mode="after")
    @classmethod
    def _headers_once(cls, headers: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        names = [name.lower() for name in headers]
        if twice := next((name for name in headers if names.count(name.lower()) > 1), None):
            raise refuse(f"{twice} occurs twice: expected each header once")
        url = info.data.get("url")
        if url is not None and url.user is not None and "authorization" in names:
            raise refuse("found an Authorization header and a user in the URL: expected one of them")
        return headers


class ById(_Section):
    """Positions in the log, both exclusive. They override byDate."""

    start: StartPosition | None = None
    """The trigger begins after this position. A change moves the trigger there."""
    end: EndPosition | None = None
    """The trigger is complete once it reaches this position."""

    @field_validator("end", mode="after")
    @classmethod
    def _behind_start(cls, end: int, info: ValidationInfo) -> int:
        _check_order(info.data.get("start"), end)
        return end


class ByDate(_Section):
    """Times at which the log recorded the events, both exclusive."""

    start: BoundStart | None = None
    """The trigger begins after this time. A change moves the trigger there."""
    end: BoundEnd | None = None
    """The trigger is complete once it reaches this time."""

    @field_validator("end", mode="after")
    @classmethod
    def _behind_start(cls, end: datetime, info: ValidationInfo) -> datetime:
        _check_order(info.data.get("start"), end)
        return end


def _check_order(start: Any, end: Any) -> None:
    if start is not None and not start < end:
        raise refuse("expected an end after the start")


class Bounds(_Section):
    """The part of the log that the trigger gets."""

    replacements: ClassVar[Mapping[str, str]] = {"startid": "byId: {start: …}", "endid": "byId: {end: …}"}

    by_id: ById = Field(default=ById(), alias="byId")
    by_date: ByDate = Field(default=ByDate(), alias="byDate")


class Trigger(_Section):
    """A subscription, and the target of its events."""

    filters: list[Filter] = []
    """All filters must match. Without filters, every event passes."""
    target: Target = Target()
    own_delivery_options: DeliveryOptions | None = Field(default=None, alias="deliveryOptions")
    """How the trigger sends its events, and retries them. Default: 5 retries, exponential, PT1S."""
    order: Literal["none", "key", "strict"] = "none"
    """key: one event at a time for each partitionkey, in log order. strict: one event at a time, in log order."""
    concurrency: Concurrency = 64
    """Requests open at a time, in each shard."""
    shards: Shards = 1
    """The number of parts into which the processes divide the trigger's work."""
    first: Literal["earliest", "latest"] = Field(default="latest", alias="start")
    """Where a new trigger begins."""
    bounds: Bounds = Bounds()

    @field_validator("shards", mode="after")
    @classmethod
    def _one_shard_in_log_order(cls, shards: int, info: ValidationInfo) -> int:
        if info.data.get("order") == "strict" and shards != 1:
            raise refuse("expected a single shard: strict order is the order of the whole log")
        return shards

    def digest(self) -> str:
        """Differs when the trigger's part of the file does. A pause (410) ends then, also over a restart.

        Users, passwords and the values of headers do not count: the log stores it, and short secrets could be guessed.
        """
        target, options = self.target, self.delivery_options
        plain = self.model_copy(
            update={
                "target": target.model_copy(
                    update={
                        "url": _without_user(target.url),
                        "headers": dict.fromkeys(target.headers, ""),
                        "delivery_options": None,
                    }
                ),
                "own_delivery_options": options.model_copy(
                    update={"dead_letter_url": _without_user(options.dead_letter_url)}
                ),
            }
        )
        text = json.dumps(plain.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"

    @property
    def delivery_options(self) -> DeliveryOptions:
        """The options that apply."""
        return self.own_delivery_options or self.target.delivery_options or _NO_OPTIONS

    @property
    def predicate(self) -> EventFilter | None:
        """The filters as one predicate; None when every event passes."""
        predicates = [part.predicate() for part in self.filters]
        return None if not predicates else predicates[0] if len(predicates) == 1 else All(predicates)

    @property
    def start(self) -> Position | datetime | Literal["earliest", "latest"]:
        """Where a new trigger begins. A position overrides a date, and a date overrides `start`."""
        if self.bounds.by_id.start is not None:
            return Position(self.bounds.by_id.start)
        return self.bounds.by_date.start or self.first

    @property
    def end(self) -> Position | datetime | None:
        """Where the trigger is complete. A position overrides a date."""
        if self.bounds.by_id.end is not None:
            return Position(self.bounds.by_id.end)
        return self.bounds.by_date.end


def _without_user(url: URL | None) -> URL | None:
    return None if url is None else url.with_user(None)


class _Credentials(_Section):
    """The user and the password of Basic authentication."""

    user: Secret | None = None
    """The user of Basic authentication. Needs password."""
    password: Secret | None = None
    """The password of Basic authentication. Needs user."""

    @field_validator("user", "password", "token", mode="after", check_fields=False)
    @classmethod
    def _usable(cls, secret: SecretStr, info: ValidationInfo) -> SecretStr | None:
        text = printable(secret.get_secret_value())
        if info.field_name == "user" and ":" in text:
            raise refuse("expected a user without a colon: HTTP Basic ends the user there")
        # TriggerMesh's files write "" for no credentials.
        return secret if text else None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.user is None) != (self.password is None):
            missing = "user" if self.user is None else "password"
            raise refuse(f"expected {missing} as well: user and password need each other")
        return self


class IngestAuth(_Credentials):
    """The credentials of senders. Without any, everyone may send."""

    token: Secret | None = None
    """The token of Bearer authentication."""


class ConsoleSection(_Credentials):
    """The web console at /console. Without credentials it is open to this machine, if the broker is on loopback."""

    enabled: Flag = True
    """Whether there is a console."""
    actions: Flag = True
    """Whether it can pause, resume, seek, retry, skip, redeliver and purge; otherwise it only shows."""


class RetentionSection(_Section):
    """How long the log keeps events and dead letters. It is stored with the log, for all its processes."""

    keep: RetentionTime = timedelta(days=7)
    """Events that every trigger has settled stay this long."""
    max_age: Annotated[RetentionTime, Field(alias="maxAge")] = None
    """Older events go even if a trigger has not handled them."""
    max_bytes: Annotated[Bytes | None, Field(alias="maxBytes")] = None
    """While the log takes more bytes on disk, its oldest events go even if a trigger has not handled them."""
    dead_letters: Annotated[RetentionTime, Field(alias="deadLetters")] = timedelta(days=30)
    """Dead letters stay this long."""


class Configuration(_Section):
    """The configuration of `pgbackend serve`: the credentials of senders, the console, the retention, and triggers."""

    ingest: IngestAuth = IngestAuth()
    console: ConsoleSection = ConsoleSection()
    deduplicate: Window | None = None
    """The log takes each source and id once within this time, as an ISO 8601 duration; P0D switches that off. It is
    stored with the log. Without it, what is stored applies: at first none. Replies are never left out."""
    retention: RetentionSection | None = None
    """How long the log keeps events. Without it, the log's retention stays as it is."""
    triggers: dict[TriggerName, Trigger] = {}
    """The triggers by name. The name is that of the subscription, which keeps the trigger's place in the log."""

    @field_validator("triggers", mode="before")
    @classmethod
    def _empty_trigger(cls, value: object) -> object:
        if not isinstance(value, dict):
            raise refuse(f"expected a mapping from names to triggers, found {described(value)}")
        return {name: {} if below is None else below for name, below in value.items()}
