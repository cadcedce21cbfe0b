"""The values of CloudEvents SQL, its errors, and the casts from one type to another.

String, Integer and Boolean are `str`, `int` and `bool`. In Python `True == 1`, so types are compared before values.

Errors are values, too. An operation that fails returns `Failed`: the error, and the value that the specification wants
beside it. An operation with a `Failed` operand returns the same error beside the zero value of its own type, and does
not evaluate its other operands. This is the specification's fail-fast mode. It suits filters: any error means no match.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

Value = str | int | bool


class Error(StrEnum):
    """Why an evaluation failed, in the specification's words."""

    MATH = "math"
    CAST = "cast"
    MISSING_ATTRIBUTE = "missingAttribute"
    FUNCTION_EVALUATION = "functionEvaluation"
    MISSING_FUNCTION = "missingFunction"


@dataclass(frozen=True, slots=True)
class Failed:
    """An error, and the value that is returned beside it."""

    error: Error
    value: Value


Evaluate = Callable[[Any], Value | Failed]
"""Takes an event."""

OVERFLOW = 0x8000_0000
"""The lowest number above an Integer's 32 bits."""


def to_integer(value: Value | Failed) -> int | Failed:
    """The value as an Integer."""
    if isinstance(value, str):
        digits = _digits(value)
        # Python refuses to read thousands of digits, so leading zeros are cut off first.
        number = int(digits[1] + digits[2]) if digits else OVERFLOW
        return number if -OVERFLOW <= number < OVERFLOW else Failed(Error.CAST, 0)
    return int(value) if isinstance(value, bool) else value


def to_boolean(value: Value | Failed) -> bool | Failed:
    """The value as a Boolean."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _BOOLEANS.get(value.lower(), _NOT_BOOLEAN)
    return Failed(value.error, False) if isinstance(value, Failed) else value != 0


def to_string(value: Value | Failed) -> str | Failed:
    """The value as a String."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int) else value


def _unchanged(value: Value | Failed) -> Value | Failed:
    return value


_digits = re.compile(r"([+-]?)0*([0-9]{1,10})").fullmatch
_BOOLEANS = {"true": True, "false": False}
_NOT_BOOLEAN = Failed(Error.CAST, False)
CASTS: dict[type | None, Callable[[Value | Failed], Any]] = {
    str: to_string,
    int: to_integer,
    bool: to_boolean,
    None: _unchanged,
}
"""The cast to each type. None is any type."""
