"""What a dispatcher or filter threw, as plain values that PostgreSQL can store: no NUL, no lone surrogate, not endless.

An exception is a user's: asking it for anything may raise, whatever its class. Nothing here raises, so that its event
is accounted for like any other that failed.
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
"""Of all details together, in UTF-8."""
_DETAILS = 1000
_ENTRY_BYTES = 6
"""What an entry of the details weighs beside its texts: quotes, colon, comma."""
_UNREADABLE = "(its message cannot be had)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Thrown:
    """An exception that ended a dispatch."""

    error: str
    """Type and message."""
    reason: str
    """The message alone."""
    details: dict[str, str]
    pauses: bool
    """Whether it was `Pause`."""
    final: bool
    """Whether it was `Reject` or `Pause`, which more attempts do not change."""
    delay: float
    """The least wait in seconds that `RetryAfter` asks for; 0 for all others."""

    @classmethod
    def of(cls, error: BaseException) -> "Thrown":
        # By its type: `isinstance()` would also ask the object, whose answer may raise.
        kind = type(error)
        return cls(
            error=describe(error),
            reason=message_of(error),
            details=details_of(error),
            pauses=issubclass(kind, Pause),
            final=issubclass(kind, Reject | Pause),
            delay=_delay_of(error) if issubclass(kind, RetryAfter) else 0.0,
        )


def describe(error: BaseException) -> str:
    """Type and message.

    >>> describe(ValueError("no such customer"))
    'ValueError: no such customer'
    """
    name, message = _name_of(type(error)), message_of(error)
    return f"{name}: {message}"[:_CHARACTERS] if message else name


def message_of(error: BaseException) -> str:
    try:
        text = storable(str(error), _CHARACTERS)
        return text or ("its task was cancelled" if type(error) is asyncio.CancelledError else "")
    except BaseException:  # noqa: BLE001 - see above
        return _UNREADABLE


def details_of(error: BaseException) -> dict[str, str]:
    """What it carries in its `details`, if that is a mapping: its first entries, as many as there is room for."""
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


def leave_process(error: BaseException, *, subscription: str, position: int) -> None:
    """SystemExit and KeyboardInterrupt end the process with their code: the event loop raises them next.

    Raised where they came from, they would only end a task, and asyncio would raise them again wherever it is awaited.
    """
    if issubclass(type(error), SystemExit | KeyboardInterrupt):
        facts.emit(
            "process ends", level=logging.CRITICAL,
            subscription=subscription, position=position, error=describe(error),
        )  # fmt: skip
        asyncio.get_running_loop().call_soon(_raise, error)


def storable(text: str, characters: int) -> str:
    """The beginning of a text, as PostgreSQL can store it."""
    # Methods of str itself: a subclass may have others. Cut first, so that a huge text is not copied.
    text = str.__getitem__(text, slice(characters))
    return str.replace(text, "\0", "\\0").encode("utf-8", "backslashreplace").decode()[:characters]


def _cut(text: str, most_bytes: int) -> str:
    return storable(text, max(most_bytes, 0)).encode()[: max(most_bytes, 0)].decode(errors="ignore")


def _name_of(kind: type) -> str:
    try:
        return storable(kind.__name__, _CHARACTERS)
    except BaseException:  # noqa: BLE001 - a metaclass may do as it likes
        return "an exception"


def _delay_of(error: BaseException) -> float:
    try:
        return seconds_of(getattr(error, "delay", 0.0))
    except BaseException:  # noqa: BLE001 - see above
        return 0.0


def _raise(error: BaseException) -> NoReturn:
    raise error
