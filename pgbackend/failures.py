"""What a dispatcher's exception says, as text that PostgreSQL can store: no NUL, no lone surrogate, not endless. Pure.

An exception is a user's: asking it for anything may raise, and must not keep its event from being accounted for.
"""

from collections.abc import Mapping

_CHARACTERS = 2000


def describe(error: BaseException) -> str:
    """Type and message.

    >>> describe(ValueError("no such customer"))
    'ValueError: no such customer'
    """
    message = message_of(error)
    return f"{type(error).__name__}: {message}"[:_CHARACTERS] if message else type(error).__name__


def message_of(error: BaseException) -> str:
    try:
        return _storable(str(error))[:_CHARACTERS]
    except Exception:  # noqa: BLE001 - see above
        return "(its message cannot be had)"


def details_of(error: BaseException) -> dict[str, str]:
    """What it carries in its `details`, if that is a mapping."""
    try:
        details = getattr(error, "details", None)
        if not isinstance(details, Mapping):
            return {}
        return {_storable(str(name)): _storable(str(value)) for name, value in details.items()}
    except Exception:  # noqa: BLE001 - see above
        return {}


def _storable(text: str) -> str:
    return text.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()
