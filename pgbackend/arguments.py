"""Checks the arguments of Backend's calls before anything is stored or sent. Every refusal is a ConfigError."""

from datetime import datetime

from pgbackend.delivery.registration import is_async, is_generator
from pgbackend.errors import ConfigError, shown
from pgbackend.model import MAX_CONCURRENCY, MAX_NAME_BYTES, MAX_POSITION, MAX_SHARDS, Order
from pgbackend.retry import Retry
from pgbackend.subscriptions.definitions import Definition, Terms
from pgbackend.subscriptions.places import Place, checked_end, checked_place


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


def check_dispatching(
    name: str, dispatcher: object, dead_letter: object, filter_: object, concurrency: object, retry: object
) -> None:
    """A process can run the subscription with these."""
    if not callable(dispatcher):
        raise ConfigError(f"The dispatcher of {name!r} is {dispatcher!r}: expected a function that takes an event.")
    _check_no_generator(name, "dispatcher", dispatcher)
    _check_count(name, "concurrency", concurrency, at_most=MAX_CONCURRENCY)
    if not isinstance(retry, Retry):
        raise ConfigError(f"retry is {retry!r}: expected a Retry.")
    if filter_ is not None and (not callable(filter_) or is_async(filter_) or is_generator(filter_)):
        raise ConfigError(
            f"filter of {name!r} is {shown(filter_)}: expected a plain function of the event, or one of filters."
        )
    if dead_letter is not None and not callable(dead_letter):
        raise ConfigError(f"dead_letter is {dead_letter!r}: expected a function that takes an event.")
    _check_no_generator(name, "dead_letter", dead_letter)


def check_letters(ids: tuple[object, ...], subscription: str | None) -> None:
    """They name dead letters: by ids, or all of one subscription."""
    if not ids and subscription is None:
        raise ConfigError("redeliver() needs the dead letters' ids, or a subscription.")
    for letter in ids:
        if isinstance(letter, bool) or not isinstance(letter, int) or not 1 <= letter <= MAX_POSITION:
            raise ConfigError(f"{shown(letter)} is no dead letter's id. `pgbackend dead-letters list` shows them.")


def _check_no_generator(name: str, role: str, dispatcher: object) -> None:
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
