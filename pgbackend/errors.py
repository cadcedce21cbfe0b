"""Every error that pgbackend raises, and the three signals that a dispatcher may raise.

Catch `PgBackendError` for all of them, or the kind. Fields carry the facts; messages end with the next step.

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
    └── ProbeError
"""

import math
from collections.abc import Mapping, Sequence
from datetime import timedelta
from decimal import Decimal
from numbers import Real

_PRINTED_BITS = 128


def shown(value: object) -> str:
    """A value that was refused, for a message: cut, because Python does not print integers of thousands of digits.

    >>> shown("30"), shown(10**5000)
    ("'30'", 'an integer of 16610 bits')
    """
    if isinstance(value, int) and value.bit_length() > _PRINTED_BITS:
        return f"an integer of {value.bit_length()} bits"
    return f"{value!r:.100}"


def seconds_of(delay: object) -> float:
    """A delay in any of its usual forms as seconds. Raises ConfigError for what is no finite number.

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
    # By default, unpickling calls the class with `args` alone, and breaks a pool of processes where it needs keywords.
    return _rebuilt, (type(error), error.args, error.__dict__)


class PgBackendError(Exception):
    """Base of every error of this package."""

    __reduce__ = _reduce


class ConfigError(PgBackendError, ValueError):
    """A setting, name or option is not usable. Raised before any I/O.

    `problems` is each mistake on its own: a file may have several, and the message has a line for each.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class NotRunningError(PgBackendError):
    """The call needs a backend that is initialized and not stopped."""


class EventError(PgBackendError, ValueError):
    """An event is not a valid CloudEvent, or is too large. Nothing of its call was stored."""


class DatabaseError(PgBackendError):
    """PostgreSQL refused a statement. The driver's error is the cause."""

    def __init__(self, message: str, *, sqlstate: str | None = None) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate


class ConnectionLostError(DatabaseError, ConnectionError):
    """PostgreSQL cannot be reached, or the connection broke before anything was changed."""


class SchemaError(DatabaseError):
    """The log's tables are missing, behind or ahead of this version."""

    def __init__(self, message: str, *, found: str | None = None, expected: str | None = None) -> None:
        super().__init__(message)
        self.found = found
        self.expected = expected


class EmbeddedServerError(PgBackendError):
    """The embedded PostgreSQL cannot be started or reached."""


class ProduceTimeoutError(PgBackendError, TimeoutError):
    """`produce_timeout` passed before the event was sent to PostgreSQL: it is not stored."""


class ProduceUncertainError(PgBackendError):
    """The connection died, or the time ran out, while PostgreSQL was committing: the event may or may not be stored.

    It was not sent again. Produce it again when a duplicate is better than a loss: consumers can tell
    a duplicate by its `source` and `id`.
    """


class SubscriptionExistsError(PgBackendError):
    """This backend already runs a subscription of that name."""


class SubscriptionNotFoundError(PgBackendError, LookupError):
    """There is no subscription of that name."""


class SubscriptionMismatchError(PgBackendError):
    """The stored subscription has another order, shard count or end than the call asks for."""


class SubscriptionBusyError(PgBackendError):
    """A worker that runs the subscription does not let go of it in time. `workers` names it, by host and process."""

    def __init__(self, message: str, *, workers: Sequence[str]) -> None:
        super().__init__(message)
        self.workers = tuple(workers)


class ProbeError(PgBackendError):
    """The log cannot be used as it is. `checks` maps each check to "ok" or to what is wrong."""

    def __init__(self, message: str, *, checks: Mapping[str, str]) -> None:
        super().__init__(message)
        self.checks = dict(checks)


class Reject(Exception):  # noqa: N818 - a signal, not an error
    """Raised by a dispatcher: this event can never be handled, do not try it again.

    It goes to the subscription's `dead_letter` dispatcher, or to `dead_letters`, at once. `details` are kept
    with the failure.
    """

    __reduce__ = _reduce

    def __init__(self, reason: str, *, details: Mapping[str, str] | None = None) -> None:
        super().__init__(reason)
        self.details = dict(details or {})


class RetryAfter(Exception):  # noqa: N818 - a signal, not an error
    """Raised by a dispatcher: failed, and not to be tried again within `delay` seconds.

    Counts as an attempt. The wait is the longer of `delay` and what the policy says, up to the policy's `max_delay`.

    `delay` may also be a timedelta, a Decimal, or a number as text, as a Retry-After header has it. It becomes a float.
    Raises ConfigError for anything else.
    """

    __reduce__ = _reduce

    def __init__(
        self, reason: str, *, delay: float | str | Decimal | timedelta, details: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(reason)
        self.delay = seconds_of(delay)
        self.details = dict(details or {})


class Pause(Exception):  # noqa: N818 - a signal, not an error
    """Raised by a dispatcher: dispatch nothing more to this subscription here.

    The event was no attempt: it waits with all others, nothing is lost and nothing buried, until the backend's
    `reconfigure()` or until it subscribes anew. `status()` says so, with the reason. Other processes that run the
    subscription find out by themselves. Raised by a `dead_letter` dispatcher it counts as `Reject`.
    """

    __reduce__ = _reduce

    def __init__(self, reason: str, *, details: Mapping[str, str] | None = None) -> None:
        super().__init__(reason)
        self.details = dict(details or {})
