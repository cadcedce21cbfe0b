"""Checks the arguments of Backend's calls before anything is stored or sent. Every refusal is a ConfigError."""

from datetime import datetime, timedelta

from pgbackend.delivery.registration import Handling, is_async, is_generator
from pgbackend.errors import ConfigError, shown
from pgbackend.model import MAX_BATCH, MAX_CONCURRENCY, MAX_NAME_BYTES, MAX_POSITION, MAX_SHARDS, Order, Retention
from pgbackend.retry import Retry
from pgbackend.subscriptions.definitions import Definition, Terms
from pgbackend.subscriptions.places import Place, checked_end, checked_place

_LONGEST_BATCH_WAIT = 3600
"""Seconds."""
_SHORTEST, _LONGEST = timedelta(seconds=1), timedelta(days=36_500)
_LEAST_BYTES = 1 << 20
_LONGEST_TEXT = 1000
"""Characters."""


def checked_definition(name: str, *, order: Order, shards: int, end: int | datetime | None) -> Definition:
    """The definition that `subscribe()` stores."""
    check_stored(name, order=order, shards=shards)
    end_position, end_at = _bounds(checked_end(end, f"end of {name!r}"))
    return Definition(name=name, order=order, shards=shards, end_position=end_position, end_at=end_at)


def checked_terms(name: str, *, order: Order, end: int | datetime | None, start: Place) -> Terms:
    """The terms that `alter_subscription()` stores."""
    check_stored(name, order=order, shards=1)
    start = checked_place(start, f"start of {name!r}")
    end_position, end_at = _bounds(checked_end(end, f"end of {name!r}"))
    return Terms(order=order, end_position=end_position, end_at=end_at, start=start)


def check_stored(name: str, *, order: str, shards: int) -> None:
    """The name, order and number of shards can be stored."""
    if not isinstance(name, str) or not name or "\0" in name or not _is_unicode(name):
        raise ConfigError(f"The subscription's name is {shown(name)}: expected text that is not empty.")
    if len(name.encode()) > MAX_NAME_BYTES:
        raise ConfigError(f"The subscription's name is {shown(name)}: expected at most {MAX_NAME_BYTES} bytes.")
    if order not in ("none", "key", "strict"):
        raise ConfigError(f"order of {name!r} is {order!r}: expected none, key or strict.")
    _check_count(name, "shards", shards, at_most=MAX_SHARDS)
    if order == "strict" and shards != 1:
        raise ConfigError(f"Subscription {name!r} is strict with {shards} shards: log order needs a single one.")


def checked_handling(name: str, handling: Handling) -> Handling:
    """How a process can run the subscription."""
    if not callable(handling.dispatcher):
        raise ConfigError(
            f"The dispatcher of {name!r} is {handling.dispatcher!r}: expected a function that takes an event."
        )
    if handling.dead_letter is not None and not callable(handling.dead_letter):
        raise ConfigError(f"dead_letter is {handling.dead_letter!r}: expected a function that takes an event.")
    for role in ("dispatcher", "dead_letter"):
        _check_dispatcher(name, role, getattr(handling, role), transactional=handling.transactional)
    _check_count(name, "concurrency", handling.concurrency, at_most=MAX_CONCURRENCY)
    if not isinstance(handling.retry, Retry):
        raise ConfigError(f"retry is {handling.retry!r}: expected a Retry.")
    wanted: object = handling.filter
    if wanted is not None and (not callable(wanted) or is_async(wanted) or is_generator(wanted)):
        raise ConfigError(
            f"filter of {name!r} is {shown(wanted)}: expected a plain function of the event, or one of filters."
        )
    _check_batches(name, handling)
    if handling.target is not None:
        check_text(f"target of {name!r}", handling.target)
    return handling


def check_text(label: str, text: object) -> None:
    """PostgreSQL can store the text, and people can read it."""
    if not isinstance(text, str) or not 0 < len(text) <= _LONGEST_TEXT or "\0" in text or not _is_unicode(text):
        raise ConfigError(f"{label} is {shown(text)}: expected text of at most {_LONGEST_TEXT} characters.")


def check_repeats(connection: object | None, *, deduplicate: bool, on_repeats: object | None) -> None:
    """Raise ConfigError for a choice about repeats: a transaction of the caller's has none."""
    if connection is not None and (not deduplicate or on_repeats is not None):
        name = "on_repeats" if deduplicate else "deduplicate=False"
        raise ConfigError(
            f"`{name}` does not go with `connection`: in your own transaction a log that deduplicates stores no repeat "
            "and does not tell how many there were. Leave one of the two out. Nothing was sent."
        )


def check_letters(ids: tuple[object, ...], subscription: str | None, group: str | None) -> None:
    """They name dead letters: by ids, or all of one subscription or failure group."""
    if not ids and subscription is None and group is None:
        raise ConfigError("Name the dead letters: by their ids, a subscription or a group.")
    for letter in ids:
        if isinstance(letter, bool) or not isinstance(letter, int) or not 1 <= letter <= MAX_POSITION:
            raise ConfigError(f"{shown(letter)} is no dead letter's id. `pgbackend dead-letters list` shows them.")


def check_position(position: object) -> None:
    """It is the position of an event, or could be."""
    if isinstance(position, bool) or not isinstance(position, int) or not 1 <= position <= MAX_POSITION:
        raise ConfigError(f"{shown(position)} is no position: expected a whole number from 1.")


def checked_retention(
    *, keep: timedelta | None, max_age: timedelta | None, max_bytes: int | None, dead_letters: timedelta | None
) -> Retention:
    """The retention that `set_retention()` stores."""
    for label, value in (("keep", keep), ("max_age", max_age), ("dead_letters", dead_letters)):
        if value is not None and not (isinstance(value, timedelta) and _SHORTEST <= value <= _LONGEST):
            raise ConfigError(
                f"{label} is {shown(value)}: expected a timedelta from 1 s to 36,500 days, or None for no limit."
            )
    if max_bytes is not None and (
        isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or not _LEAST_BYTES <= max_bytes <= MAX_POSITION
    ):
        raise ConfigError(
            f"max_bytes is {shown(max_bytes)}: expected a whole number from 1048576, or None for no limit."
        )
    return Retention(keep=keep, max_age=max_age, max_bytes=max_bytes, dead_letters=dead_letters)


def _check_batches(name: str, handling: Handling) -> None:
    if not isinstance(handling.transactional, bool):
        raise ConfigError(f"transactional of {name!r} is {shown(handling.transactional)}: expected True or False.")
    if handling.batch is not None:
        _check_count(name, "batch", handling.batch, at_most=MAX_BATCH)
    wait: object = handling.batch_wait
    if isinstance(wait, bool) or not isinstance(wait, int | float) or not 0 <= wait <= _LONGEST_BATCH_WAIT:
        raise ConfigError(
            f"batch_wait of {name!r} is {shown(wait)}: expected a number of seconds from 0 to {_LONGEST_BATCH_WAIT}."
        )
    if wait and handling.batch is None:
        raise ConfigError(f"batch_wait of {name!r} is set without `batch`: say how many events a batch has at most.")


def _check_dispatcher(name: str, role: str, dispatcher: object, *, transactional: bool) -> None:
    if dispatcher is not None and transactional and not is_async(dispatcher):
        raise ConfigError(
            f"{role} of {name!r} is {shown(dispatcher)}: a transactional subscription needs an async function, because "
            "its connection belongs to the event loop."
        )
    if is_generator(dispatcher):
        raise ConfigError(
            f"{role} of {name!r} is {shown(dispatcher)}, a generator function: calling it runs nothing. Use a function "
            "without `yield`."
        )


def _check_count(name: str, label: str, count: object, *, at_most: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= at_most:
        raise ConfigError(f"{label} of {name!r} is {shown(count)}: expected a whole number from 1 to {at_most}.")


def _bounds(end: int | datetime | None) -> tuple[int | None, datetime | None]:
    """An end as it is stored: a position or a date."""
    return (None, end) if isinstance(end, datetime) else (end, None)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
