"""Every error that pgbackend raises, and the four signals that a dispatcher may raise.

Catch `PgBackendError` for all errors, or one of its kinds. Fields have the facts; messages end with the next step.

    PgBackendError
    ├── ConfigError (ValueError)
    ├── NotRunningError
    ├── EventError (ValueError)
    ├── DatabaseError
    │   ├── ConnectionLostError (ConnectionError)
    │   └── SchemaError
    ├── EmbeddedServerError
    ├── ProduceTimeoutError (TimeoutError)
    ├── ProduceUncertainError
    ├── SubscriptionExistsError
    ├── SubscriptionNotFoundError (LookupError)
    ├── SubscriptionMismatchError
    ├── SubscriptionBusyError
    ├── EventNotFoundError (LookupError)
    ├── EventSettledError
    └── ProbeError

`Reject`, `RetryAfter`, `Pause` and `Failed` are signals, not errors: a dispatcher raises them to say what to do with
its events.
"""

import math
from collections.abc import Mapping, Sequence
from datetime import timedelta
from decimal import Decimal
from numbers import Real
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pgbackend.codec.event import Event

_PRINTED_BITS = 128


def shown(value: object) -> str:
    """A refused value for a message, cut. Python does not print integers of thousands of digits.

    >>> shown("30"), shown(10**5000)
    ("'30'", 'an integer of 16610 bits')
    """
    if isinstance(value, int) and value.bit_length() > _PRINTED_BITS:
        return f"an integer of {value.bit_length()} bits"
    return f"{value!r:.100}"


def seconds_of(delay: object) -> float:
    """A delay as seconds. Raises ConfigError when it is not a finite number, a number as text, or a timedelta.

    >>> seconds_of("60"), seconds_of(timedelta(minutes=1)), seconds_of(Decimal("0.5"))
    (60.0, 60.0, 0.5)
    """
    seconds = math.nan
    try:
        if isinstance(delay, timedelta):
            seconds = delay.total_seconds()
        elif not isinstance(delay, bool) and isinstance(delay, str | Decimal | Real):
            seconds = float(delay)
    except (ValueError, OverflowError):
        pass
    if not math.isfinite(seconds):
        raise ConfigError(
            f"delay is {shown(delay)}: expected a finite number of seconds, also as text, or a timedelta."
        )
    return seconds


def _rebuilt(kind: type[Exception], args: tuple[object, ...], fields: dict[str, object]) -> Exception:
    error = kind.__new__(kind, *args)
    error.__dict__.update(fields)
    return error


def _reduce(error: Exception) -> tuple[object, ...]:
    # Unpickling calls the class with `args` alone, which fails for a class that needs keywords.
    return _rebuilt, (type(error), error.args, error.__dict__)


class PgBackendError(Exception):
    """Base of every error of this package."""

    __reduce__ = _reduce


class ConfigError(PgBackendError, ValueError):
    """A setting, name or option cannot be used. Raised before any I/O.

    `problems` has one text for each mistake, since a file may have several. The message has a line for each.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class NotRunningError(PgBackendError):
    """The call needs a backend that is initialized and not stopped."""


class EventError(PgBackendError, ValueError):
    """An event is not a valid CloudEvent, or is too large. No event of the call was stored."""


class DatabaseError(PgBackendError):
    """PostgreSQL refused a statement. The driver's error is its `__cause__`; `sqlstate` is PostgreSQL's code."""

    def __init__(self, message: str, *, sqlstate: str | None = None) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate


class ConnectionLostError(DatabaseError, ConnectionError):
    """PostgreSQL cannot be reached, or the connection broke before anything changed."""


class SchemaError(DatabaseError):
    """The log's tables are missing, or are older or newer than this version. `found` and `expected` are revisions."""

    def __init__(self, message: str, *, found: str | None = None, expected: str | None = None) -> None:
        super().__init__(message)
        self.found = found
        self.expected = expected


class EmbeddedServerError(PgBackendError):
    """The embedded PostgreSQL cannot be started or reached."""


class ProduceTimeoutError(PgBackendError, TimeoutError):
    """`produce_timeout` passed before the event was sent to PostgreSQL: it is not stored."""


class ProduceUncertainError(PgBackendError):
    """The connection broke, or the time ran out, while PostgreSQL was committing: the event may or may not be stored.

    It was not sent again, unless the log deduplicates. Produce it again if a duplicate is better than a loss: consumers
    recognize a duplicate by its `source` and `id`.
    """


class SubscriptionExistsError(PgBackendError):
    """This backend already runs a subscription of that name."""


class SubscriptionNotFoundError(PgBackendError, LookupError):
    """There is no subscription of that name."""


class SubscriptionMismatchError(PgBackendError):
    """The stored subscription has a different order, shard count or end from those in the call."""


class SubscriptionBusyError(PgBackendError):
    """A worker does not release the subscription in time. `workers` names those that run it, by host and process."""

    def __init__(self, message: str, *, workers: Sequence[str]) -> None:
        super().__init__(message)
        self.workers = tuple(workers)


class EventNotFoundError(PgBackendError, LookupError):
    """The log has no event at that position, or a redacted one."""


class EventSettledError(PgBackendError):
    """The subscription owes nothing of that event any more."""


class ProbeError(PgBackendError):
    """The log cannot be used. `checks` maps the name of each check to "ok" or to the problem."""

    def __init__(self, message: str, *, checks: Mapping[str, str]) -> None:
        super().__init__(message)
        self.checks = dict(checks)


class Reject(Exception):  # noqa: N818 - a signal, not an error
    """Raised by a dispatcher: this event can never be handled. Do not retry it.

    The event goes to the subscription's `dead_letter` dispatcher, or to `dead_letters`, at once. `details` are kept
    with the failure.
    """

    __reduce__ = _reduce

    def __init__(self, reason: str, *, details: Mapping[str, str] | None = None) -> None:
        super().__init__(reason)
        self.details = dict(details or {})


class RetryAfter(Exception):  # noqa: N818 - a signal, not an error
    """Raised by a dispatcher: the event failed. Do not retry it within `delay` seconds.

    It counts as an attempt. The wait is the longer of `delay` and the policy's wait, up to the policy's `max_delay`.

    `delay` may also be a timedelta, a Decimal, or a number as text, as in a Retry-After header. It becomes a float.
    Raises ConfigError for anything else.
    """

    __reduce__ = _reduce

    def __init__(
        self, reason: str, *, delay: float | str | Decimal | timedelta, details: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(reason)
        self.delay = seconds_of(delay)
        self.details = dict(details or {})


class Failed(Exception):  # noqa: N818 - a signal, not an error
    """Raised by a dispatcher that got a batch: these events failed, and the others are handled.

    `errors` maps each event that failed to its error, which counts as if the event had been dispatched alone: it may be
    `Reject` or `RetryAfter`. In a transactional subscription the transaction is rolled back, and the others are
    dispatched again without the events that failed.

    Raises ConfigError for an empty mapping.
    """

    __reduce__ = _reduce

    def __init__(self, errors: Mapping["Event", BaseException]) -> None:
        if not errors:
            raise ConfigError("Failed names no event. Raise it only when some failed, and name each of them.")
        super().__init__(f"{len(errors)} of the events failed")
        self.errors = dict(errors)


class Pause(Exception):  # noqa: N818 - a signal, not an error
    """Raised by a dispatcher: dispatch no more events of this subscription, in any process.

    The dispatch does not count as an attempt. The event and all later ones wait, until `resume()`, `reconfigure()`, or
    a `subscribe()` with another `target`; no event is lost or becomes a dead letter. It is stored, so no restart ends
    it, and `status()` shows it, with the reason. While PostgreSQL is away, this process is paused already, and the
    others follow once it is stored. From a `dead_letter` dispatcher, it counts as `Reject`.
    """

    __reduce__ = _reduce

    def __init__(self, reason: str, *, details: Mapping[str, str] | None = None) -> None:
        super().__init__(reason)
        self.details = dict(details or {})
