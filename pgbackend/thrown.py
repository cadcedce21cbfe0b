"""The exception of a dispatcher or filter as plain values that PostgreSQL can store: short, without NUL.

Delivery makes a `Thrown` of the exception and decides by it. The promise: nothing here raises, although any access to a
user's exception may raise; so its event is settled or retried like any other event that failed.
"""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import NoReturn

from pgbackend import facts
from pgbackend.errors import Pause, Reject, RetryAfter, seconds_of

_CHARACTERS = 2000
_DETAILS_BYTES = 64 << 10
"""The limit of all details together, in UTF-8."""
_DETAILS = 1000
_ENTRY_BYTES = 6
"""The quotes, colon and comma of one entry."""
_UNREADABLE = "(its message cannot be read)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Thrown:
    """An exception that ended a dispatch."""

    error: str
    """Type and message."""
    reason: str
    """The message alone."""
    details: dict[str, str]
    pauses: bool
    """Whether it is `Pause`."""
    final: bool
    """Whether it is `Reject` or `Pause`: another attempt would change nothing."""
    delay: float
    """The shortest wait in seconds, from `RetryAfter`. 0 for all others."""

    @classmethod
    def of(cls, error: BaseException) -> "Thrown":
        """The plain values of this exception."""
        # By its type: `isinstance()` would also ask the object, and that may raise.
        kind = type(error)
        return cls(
            error=describe(error),
            reason=_message_of(error),
            details=_details_of(error),
            pauses=issubclass(kind, Pause),
            final=issubclass(kind, Reject | Pause),
            delay=_delay_of(error) if issubclass(kind, RetryAfter) else 0.0,
        )


def describe(error: BaseException) -> str:
    """The type and message of an exception, cut to what PostgreSQL can store.

    >>> describe(ValueError("no such customer"))
    'ValueError: no such customer'
    """
    name, message = _name_of(type(error)), _message_of(error)
    return f"{name}: {message}"[:_CHARACTERS] if message else name


def _message_of(error: BaseException) -> str:
    try:
        text = _storable(str(error), _CHARACTERS)
        return text or ("its task was cancelled" if type(error) is asyncio.CancelledError else "")
    except BaseException:  # noqa: BLE001 - see above
        return _UNREADABLE


def _details_of(error: BaseException) -> dict[str, str]:
    """The entries of its `details`, if they are a mapping: the first ones, as many as fit."""
    kept: dict[str, str] = {}
    left = _DETAILS_BYTES
    try:
        details = getattr(error, "details", None)
        if not isinstance(details, Mapping):
            return {}
        for name, value in islice(details.items(), _DETAILS):
            left -= _ENTRY_BYTES
            key = _cut(str(name), left)
            text = _cut(str(value), left - len(key.encode()))
            left -= len(key.encode()) + len(text.encode())
            kept[key] = text
            if left <= _ENTRY_BYTES:
                break
    except BaseException:  # noqa: BLE001 - see above
        return {}
    return kept


def leave_process(error: BaseException, *, subscription: str, position: int) -> bool:
    """Whether it is SystemExit or KeyboardInterrupt: the event loop raises it next, and the process ends with its code.

    Raised in a dispatcher's task, it would end that task only.
    """
    leaves = issubclass(type(error), SystemExit | KeyboardInterrupt)
    if leaves:
        facts.emit(
            "process ends", level=logging.CRITICAL,
            subscription=subscription, position=position, error=describe(error),
        )  # fmt: skip
        asyncio.get_running_loop().call_soon(_raise, error)
    return leaves


def _storable(text: str, characters: int) -> str:
    """The beginning of a text, in a form that PostgreSQL can store."""
    # Methods of str itself, because a subclass may override them. Cut first, so that a huge text is not copied.
    text = str.__getitem__(text, slice(characters))
    return str.replace(text, "\0", "\\0").encode("utf-8", "backslashreplace").decode()[:characters]


def _cut(text: str, most_bytes: int) -> str:
    return _storable(text, max(most_bytes, 0)).encode()[: max(most_bytes, 0)].decode(errors="ignore")


def _name_of(kind: type) -> str:
    try:
        return _storable(kind.__name__, _CHARACTERS)
    except BaseException:  # noqa: BLE001 - a metaclass may raise anything
        return "an exception"


def _delay_of(error: BaseException) -> float:
    try:
        return seconds_of(getattr(error, "delay", 0.0))
    except BaseException:  # noqa: BLE001 - see above
        return 0.0


def _raise(error: BaseException) -> NoReturn:
    raise error
