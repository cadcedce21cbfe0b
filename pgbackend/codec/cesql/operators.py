"""The operators of CloudEvents SQL: each takes the functions of its operands and returns the function of the whole."""

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from pgbackend.codec.cesql.functions import Function, call
from pgbackend.codec.cesql.values import CASTS, OVERFLOW, Error, Evaluate, Failed, Value, to_boolean, to_string


def attribute(find: Callable[[Any], Value | None]) -> Evaluate:
    """The value of an attribute, which `find` looks up."""
    missing = Failed(Error.MISSING_ATTRIBUTE, False)

    def evaluate(event: Any) -> Value | Failed:
        value = find(event)
        return missing if value is None else value

    return evaluate


def logic(first: Evaluate, steps: Sequence[tuple[str, Evaluate]]) -> Evaluate:
    """A run of AND, OR and XOR, from left to right. A step whose left value decides it does not evaluate its right."""
    decided_by = [(_DECIDED_BY[word], operand) for word, operand in steps]

    def evaluate(event: Any) -> Value | Failed:
        left = to_boolean(first(event))
        if isinstance(left, Failed):
            return left
        for decided, operand in decided_by:
            if left is decided:
                continue
            right = to_boolean(operand(event))
            if isinstance(right, Failed):
                return right
            left = right if decided is not None else left is not right
        return left

    return evaluate


_DECIDED_BY = {"AND": False, "OR": True, "XOR": None}
"""The left value that decides the result. Nothing decides XOR."""


def negation(operand: Evaluate) -> Evaluate:
    """NOT."""

    def evaluate(event: Any) -> Value | Failed:
        value = to_boolean(operand(event))
        return value if isinstance(value, Failed) else not value

    return evaluate


def _equal(left: Evaluate, right: Evaluate, *, wanted: bool) -> Evaluate:
    """Whether the operands' equality is as `wanted`. The left operand is cast to the type of the right."""

    def evaluate(event: Any) -> Value | Failed:
        x = left(event)
        if isinstance(x, Failed):
            return Failed(x.error, False)
        y = right(event)
        if isinstance(y, Failed):
            return Failed(y.error, False)
        if type(x) is not type(y):
            x = CASTS[type(y)](x)
            if isinstance(x, Failed):
                return Failed(x.error, False)
        return (x == y) is wanted

    return evaluate


def contained(operand: Evaluate, elements: Sequence[Evaluate]) -> Evaluate:
    """IN: whether the operand is among the elements, which are cast to its type."""

    def evaluate(event: Any) -> Value | Failed:
        x = operand(event)
        if isinstance(x, Failed):
            return Failed(x.error, False)
        cast = CASTS[type(x)]
        found = False
        for element in elements:
            y = cast(element(event))
            if isinstance(y, Failed):
                return Failed(y.error, False)
            found = found or x == y
        return found

    return evaluate


def contained_in_literals(operand: Evaluate, literals: Sequence[Value]) -> Evaluate:
    """IN, when all elements are literals. They are cast to each type beforehand, so that one set lookup is enough."""
    sets: dict[type, frozenset[Value] | Failed] = {}
    for type_ in (str, int, bool):
        values = [CASTS[type_](literal) for literal in literals]
        failed = next((value for value in values if isinstance(value, Failed)), None)
        sets[type_] = frozenset(values) if failed is None else Failed(failed.error, False)

    def evaluate(event: Any) -> Value | Failed:
        x = operand(event)
        if isinstance(x, Failed):
            return Failed(x.error, False)
        members = sets[type(x)]
        return members if isinstance(members, Failed) else x in members

    return evaluate


def like(operand: Evaluate, matches: Callable[[str], bool]) -> Evaluate:
    """LIKE, with the matcher of its pattern."""

    def evaluate(event: Any) -> Value | Failed:
        x = to_string(operand(event))
        return Failed(x.error, False) if isinstance(x, Failed) else matches(x)

    return evaluate


def negative(operand: Evaluate) -> Evaluate:
    """A minus before an operand."""
    return call(_NEGATIVE, [operand])


def _int32(number: int) -> int | Failed:
    return number if -OVERFLOW <= number < OVERFLOW else Failed(Error.MATH, 0)


def _divided(x: int, y: int) -> int | Failed:
    if y == 0:
        return Failed(Error.MATH, 0)
    quotient = abs(x) // abs(y)
    return _int32(quotient if (x < 0) == (y < 0) else -quotient)


def _remainder(x: int, y: int) -> int | Failed:
    if y == 0:
        return Failed(Error.MATH, 0)
    return abs(x) % abs(y) * (-1 if x < 0 else 1)


def _on_integers(zero: Value, apply: Callable[[int, int], Value | Failed]) -> Callable[[Evaluate, Evaluate], Evaluate]:
    function = Function((int, int), zero, apply)
    return lambda left, right: call(function, [left, right])


_NEGATIVE = Function((int,), 0, lambda x: _int32(-x))

BINARY: dict[str, Callable[[Evaluate, Evaluate], Evaluate]] = {
    "=": partial(_equal, wanted=True),
    "!=": partial(_equal, wanted=False),
    "<>": partial(_equal, wanted=False),
    "<": _on_integers(False, operator.lt),
    "<=": _on_integers(False, operator.le),
    ">": _on_integers(False, operator.gt),
    ">=": _on_integers(False, operator.ge),
    "+": _on_integers(0, lambda x, y: _int32(x + y)),
    "-": _on_integers(0, lambda x, y: _int32(x - y)),
    "*": _on_integers(0, lambda x, y: _int32(x * y)),
    "/": _on_integers(0, _divided),
    "%": _on_integers(0, _remainder),
}
"""Comparisons and arithmetic, by their signs."""
