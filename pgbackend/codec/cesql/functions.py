"""The functions of CloudEvents SQL, and how a function is called: evaluate each operand, cast it, apply."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pgbackend.codec.cesql.values import (
    CASTS,
    OVERFLOW,
    Error,
    Evaluate,
    Failed,
    Value,
    to_boolean,
    to_integer,
    to_string,
)

MAX_CONCAT = 1_048_576
"""Characters that CONCAT or CONCAT_WS may put together."""


@dataclass(frozen=True, slots=True)
class Function:
    """A function, or an operator that works like one: all operands are evaluated and cast to the parameters' types."""

    parameters: tuple[type | None, ...]
    """None takes any type."""
    zero: Value
    """The zero value of the type that it returns."""
    apply: Callable[..., Value | Failed]
    variadic: bool = False
    """Whether any number of Strings may follow."""


def call(function: Function, operands: Sequence[Evaluate]) -> Evaluate:
    """A call of this function with these operands."""
    zero, apply, variadic = function.zero, function.apply, function.variadic
    types = function.parameters + (str,) * (len(operands) - len(function.parameters))
    steps = [(operand, CASTS[type_]) for operand, type_ in zip(operands, types, strict=True)]

    def evaluate(event: Any) -> Value | Failed:
        values: list[Any] = []
        size = 0
        for operand, cast in steps:
            value = cast(operand(event))
            if isinstance(value, Failed):
                return Failed(value.error, zero)
            values.append(value)
            # Checked at each step: a thousand copies of a long attribute would take a thousand times its memory.
            if variadic and (size := size + len(value)) > MAX_CONCAT:
                return Failed(Error.FUNCTION_EVALUATION, zero)
        return apply(*values)

    return evaluate


def find_function(name: str, count: int) -> Function | str:
    """The function of this name that takes `count` arguments. If there is none, a text that says what is wrong."""
    overloads = FUNCTIONS.get(name.upper())
    if overloads is None:
        return f"there is no function {quoted(name)}, only {', '.join(FUNCTIONS)}"
    for function in overloads:
        least = len(function.parameters)
        if count == least or (count > least and function.variadic):
            return function
    takes = " or ".join(f"{len(function.parameters)}{' or more' * function.variadic}" for function in overloads)
    return f"{name.upper()} takes {takes} argument{'s' * (takes != '1')}, found {count}"


def quoted(text: str) -> str:
    """A part of an expression, for a message."""
    return repr(str(text) if len(text) <= 40 else text[:40] + "…")


def _absolute(x: int) -> int | Failed:
    return abs(x) if x > -OVERFLOW else Failed(Error.MATH, OVERFLOW - 1)


def _concat_ws(delimiter: str, *texts: str) -> str | Failed:
    if sum(map(len, texts)) + len(delimiter) * (len(texts) - 1) > MAX_CONCAT:
        return Failed(Error.FUNCTION_EVALUATION, "")
    return delimiter.join(texts)


def _left(x: str, y: int) -> str | Failed:
    return x[:y] if y >= 0 else Failed(Error.FUNCTION_EVALUATION, x)


def _right(x: str, y: int) -> str | Failed:
    return x[max(len(x) - y, 0) :] if y >= 0 else Failed(Error.FUNCTION_EVALUATION, x)


def _substring(x: str, position: int, length: int = OVERFLOW) -> str | Failed:
    if abs(position) > len(x) or length < 0:
        return Failed(Error.FUNCTION_EVALUATION, "")
    if position == 0:
        return ""
    start = position - 1 if position > 0 else len(x) + position
    return x[start : start + length]


# Unicode's White_Space. `str.strip` without an argument removes four control characters as well.
_WHITE_SPACE = "".join(map(chr, (*range(9, 14), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B))))
_WHITE_SPACE += "\u2028\u2029\u202f\u205f\u3000"

FUNCTIONS = {
    "ABS": [Function((int,), 0, _absolute)],
    "BOOL": [Function((None,), False, to_boolean)],
    "CONCAT": [Function((), "", lambda *texts: "".join(texts), variadic=True)],
    "CONCAT_WS": [Function((str,), "", _concat_ws, variadic=True)],
    "INT": [Function((None,), 0, to_integer)],
    "IS_BOOL": [Function((None,), False, lambda x: not isinstance(to_boolean(x), Failed))],
    "IS_INT": [Function((None,), False, lambda x: not isinstance(to_integer(x), Failed))],
    "LEFT": [Function((str, int), "", _left)],
    "LENGTH": [Function((str,), 0, len)],
    "LOWER": [Function((str,), "", str.lower)],
    "RIGHT": [Function((str, int), "", _right)],
    "STRING": [Function((None,), "", to_string)],
    "SUBSTRING": [Function((str, int), "", _substring), Function((str, int, int), "", _substring)],
    "TRIM": [Function((str,), "", lambda x: x.strip(_WHITE_SPACE))],
    "UPPER": [Function((str,), "", str.upper)],
}
"""The overloads of each function, by its name."""
