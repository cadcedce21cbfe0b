"""CloudEvents SQL, version 1: the text of an expression becomes a function of an event.

`filters.CESQL` hands the text over once, with the way to find an attribute, and asks the function for each event; of
events nothing else is known here. The promise: `compiled` returns or raises a `ConfigError` that says where the text
is wrong; what it returns never raises, changes nothing, and takes time proportional to the text times the event's.

Values: String, Integer and Boolean are `str`, `int` and `bool`; since `True == 1`, types are compared before values.

Errors are values, too. An operation that fails returns a `Failure`: the error and what the specification wants returned
beside it. One that meets a `Failure` as an operand returns the zero value of its own type beside the same error, and
looks at nothing else. That is the specification's fail-fast mode, the right one for filters: any error is no match.

What the specification leaves open is decided so:

    a result beyond 32 bits     is a math error, as it is of ABS
    the elements of IN          have no order, being a set: an error in one counts even where another matches
    names in capitals           are the same attributes, as with keywords and functions: `SOURCE` is `source`
    keywords                    are no attribute names
    a backslash in a string     escapes the quote that delimits it, and stands for itself before anything else
    a function that is unknown  is an error of evaluation, and found before: whoever reads a file can refuse it

What it does not leave open, and what surprises: AND, OR and XOR bind equally and go from left to right, and NOT binds
closer than LIKE, IN and comparisons.
"""

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NoReturn

from pgbackend.errors import ConfigError

if TYPE_CHECKING:
    from lark import Lark, Token

# No text and no event keeps a process busy, or exhausts its memory or its stack.
MAX_TEXT = 65_536  # characters of an expression; the longest take half a second to read
MAX_DEPTH = 100  # operations within one another, each of which is a call; AND, OR, XOR beside one another count once
MAX_RUN = 256  # characters of a LIKE pattern where one is `_`: each may be looked at for each character of the text
MAX_CONCAT = 1_048_576  # characters that CONCAT or CONCAT_WS put together

Value = str | int | bool


class Error(StrEnum):
    """What an evaluation may fail of."""

    MATH = "math"
    CAST = "cast"
    MISSING_ATTRIBUTE = "missingAttribute"
    FUNCTION_EVALUATION = "functionEvaluation"
    MISSING_FUNCTION = "missingFunction"


@dataclass(frozen=True, slots=True)
class Failure:
    """An error and the value returned beside it."""

    error: Error
    value: Value


Evaluate = Callable[[Any], Value | Failure]
Lookup = Callable[[str], Callable[[Any], Value | None]]


@dataclass(frozen=True, slots=True)
class Expression:
    """What a text, or a part of it, is read as."""

    evaluate: Evaluate
    mistake: str | None = None
    """What is sure to fail with every event that gets so far: a call of a function that does not exist."""
    depth: int = 0
    """Of its operations."""
    literal: Value | None = None
    """Its value if it is one."""


def compiled(text: str, lookup: Lookup) -> Expression:
    """The expression, whose `evaluate` takes that in which `lookup(name)` finds the attribute `name`, or None.

    >>> length = compiled("LENGTH(color) * 2", lambda name: lambda attributes: attributes.get(name)).evaluate
    >>> length({"color": "red"}), length({})
    (6, Failure(error=<Error.MISSING_ATTRIBUTE: 'missingAttribute'>, value=0))

    Raises `ConfigError` when the text is no expression or is beyond a limit.
    """
    from lark.exceptions import UnexpectedInput  # noqa: PLC0415 - see _parser

    if not isinstance(text, str):
        raise ConfigError(f"CESQL takes the text of an expression, not {text!r:.80}.")
    if len(text) > MAX_TEXT:
        raise ConfigError(f"CESQL: the expression has {len(text):,} characters. Use {MAX_TEXT:,} at most.")
    reading: Any = _parser(lookup).parse_interactive(text)
    try:
        reading.exhaust_lexer()
        expression: Expression = reading.feed_eof()
    except UnexpectedInput as error:
        raise _misread(text, error, reading.accepts()) from None
    return expression


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────────

# One rule a step of precedence. That a sign belongs to a number only where an operand is due (`1 -1` subtracts) needs
# no rule: the lexer tries only what the parser can take next.
_GRAMMAR = r"""
?start: logic
?logic: comparison ((AND | OR | XOR) comparison)*
?comparison: sum | comparison COMPARISON sum -> binary
?sum: product | sum (PLUS | MINUS) product -> binary
?product: match | product TIMES match -> binary
?match: unary
    | match LIKE STRING -> like
    | match NOT LIKE STRING -> not_like
    | match IN _OPEN logic (_COMMA logic)* _CLOSE -> contained
    | match NOT IN _OPEN logic (_COMMA logic)* _CLOSE -> not_contained
?unary: NOT unary -> negation
    | MINUS unary -> minus
    | FUNCTION _OPEN (logic (_COMMA logic)*)? _CLOSE -> call
    | EXISTS NAME -> exists
    | NAME -> attribute
    | STRING -> string
    | INTEGER -> integer
    | TRUE -> true
    | FALSE -> false
    | _OPEN logic _CLOSE

AND.2: /and(?!\w)/i
OR.2: /or(?!\w)/i
XOR.2: /xor(?!\w)/i
NOT.2: /not(?!\w)/i
LIKE.2: /like(?!\w)/i
IN.2: /in(?!\w)/i
EXISTS.2: /exists(?!\w)/i
TRUE.2: /true(?!\w)/i
FALSE.2: /false(?!\w)/i
FUNCTION.1: /(?!(?:and|or|xor|not|like|in|exists|true|false)(?!\w))[a-z][a-z_]*+(?=[ \t\r\n]*+\()/i
NAME: /(?!(?:and|or|xor|not|like|in|exists|true|false)(?!\w))[a-z0-9]++/i
INTEGER.1: /[+-]?[0-9]++(?!\w)/
STRING: /'(?:[^'\\]|\\.)*+'|"(?:[^"\\]|\\.)*+"/s
COMPARISON: "=" | "!=" | "<>" | "<=" | ">=" | "<" | ">"
PLUS: "+"
MINUS: "-"
TIMES: "*" | "/" | "%"
_OPEN: "("
_CLOSE: ")"
_COMMA: ","
%ignore /[ \t\r\n]+/
"""


@lru_cache(maxsize=4)
def _parser(lookup: Lookup) -> "Lark":
    # Imported and built (30 ms) with the first expression: most programs that import pgbackend have none.
    from lark import Lark  # noqa: PLC0415

    # The builder is called as the parser goes: no tree, and no recursion however deeply a text is nested. ASCII: with
    # /i, `[a-z]` would match the Kelvin sign.
    return Lark(_GRAMMAR, parser="lalr", transformer=_Builder(lookup), g_regex_flags=re.ASCII)


def _misread(text: str, error: Any, accepted: set[str]) -> ConfigError:
    wanted = [meaning for terminal, meaning in _ONE_OF.items() if terminal in accepted][:1]
    wanted += [meaning for terminal, meaning in _ANY_OF.items() if terminal in accepted]
    *others, last = wanted
    expected = f"{', '.join(others)} or {last}" if others else last
    line, column, token = error.line, error.column, getattr(error, "token", None)
    if token is None:  # what begins here is no token
        found = "a string that does not end" if error.char in "'\"" else _quoted(error.char)
    elif token.type == "$END":
        read = text.rstrip(" \t\r\n")
        line, column, found = read.count("\n") + 1, len(read) - read.rfind("\n"), "the end"
    else:
        found = _quoted(token)
    return ConfigError(f"CESQL, line {line}, column {column}: expected {expected}, found {found}.")


_ONE_OF = {
    "INTEGER": "a value",
    "AND": "an operator",
    "LIKE": "LIKE or IN",
    "STRING": "a string in quotes",
    "NAME": "the name of an attribute",
    "_OPEN": "'('",
}
"""What can come next, told by one terminal of it. The first that fits is all of it: a value may be a string, too."""

_ANY_OF = {"_COMMA": "','", "_CLOSE": "')'", "$END": "the end"}


def _refuse(token: "Token", what: str) -> NoReturn:
    raise ConfigError(_at(token, what))


def _at(token: "Token", what: str) -> str:
    return f"CESQL, line {token.line}, column {token.column}: {what}."


def _quoted(text: str) -> str:
    return repr(str(text) if len(text) <= 40 else text[:40] + "…")


# ── building ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Builder:
    """The grammar's rules by name: each makes of its parts the function that evaluates it."""

    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup

    def string(self, parts: "list[Token]") -> Expression:
        return _literal(_unquoted(parts[0]))

    def integer(self, parts: "list[Token]") -> Expression:
        value = _integer(str(parts[0]))
        if isinstance(value, Failure):
            _refuse(parts[0], f"{_quoted(parts[0])} is beyond an Integer's 32 bits")
        return _literal(value)

    def true(self, _parts: "list[Token]") -> Expression:
        return _literal(True)

    def false(self, _parts: "list[Token]") -> Expression:
        return _literal(False)

    def attribute(self, parts: "list[Token]") -> Expression:
        return Expression(_attribute(self._lookup(parts[0].lower())))

    def exists(self, parts: "list[Token]") -> Expression:
        find = self._lookup(parts[1].lower())
        return Expression(lambda event: find(event) is not None)

    def call(self, parts: "list[Any]") -> Expression:
        name, *arguments = parts
        function = _function(name, len(arguments))
        if isinstance(function, str):
            missing = Failure(Error.MISSING_FUNCTION, False)
            return Expression(lambda _event: missing, mistake=_at(name, function))
        return _node(name, _call(function, [node.evaluate for node in arguments]), arguments)

    def minus(self, parts: "list[Any]") -> Expression:
        sign, operand = parts
        return _node(sign, _call(_NEGATIVE, [operand.evaluate]), [operand])

    def negation(self, parts: "list[Any]") -> Expression:
        word, operand = parts
        return _node(word, _not(operand.evaluate), [operand])

    def like(self, parts: "list[Any]") -> Expression:
        operand, word, pattern = parts
        runs = _runs(_unquoted(pattern))
        if any("_" in run and len(run) > MAX_RUN for run in runs):
            _refuse(pattern, f"more than {MAX_RUN} characters between two '%', with '_' among them")
        return _node(word, _like(operand.evaluate, _pattern(runs)), [operand])

    def not_like(self, parts: "list[Any]") -> Expression:
        operand, word, *rest = parts
        return self.negation([word, self.like([operand, *rest])])

    def contained(self, parts: "list[Any]") -> Expression:
        operand, word, *elements = parts
        return _node(word, _in(operand.evaluate, elements), [operand, *elements])

    def not_contained(self, parts: "list[Any]") -> Expression:
        operand, word, *rest = parts
        return self.negation([word, self.contained([operand, *rest])])

    def binary(self, parts: "list[Any]") -> Expression:
        left, sign, right = parts
        return _node(sign, _BINARY[sign](left.evaluate, right.evaluate), [left, right])

    def logic(self, parts: "list[Any]") -> Expression:
        operands = parts[::2]
        steps = [(_DECIDED[word.upper()], node.evaluate) for word, node in zip(parts[1::2], operands[1:], strict=True)]
        return _node(parts[1], _logic(operands[0].evaluate, steps), operands)


def _literal(value: Value) -> Expression:
    return Expression(lambda _event: value, literal=value)


def _node(token: "Token", evaluate: Evaluate, operands: Sequence[Expression]) -> Expression:
    depth = 1 + max((node.depth for node in operands), default=0)
    if depth > MAX_DEPTH:
        _refuse(token, f"more than {MAX_DEPTH} operations within one another")
    return Expression(evaluate, next((node.mistake for node in operands if node.mistake), None), depth)


def _unquoted(token: "Token") -> str:
    quote = token[0]
    return re.sub(rf"\\(\\|{quote})", lambda pair: quote if pair[1] == quote else pair[0], token[1:-1])


# ── evaluating ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _attribute(find: Callable[[Any], Value | None]) -> Evaluate:
    missing = Failure(Error.MISSING_ATTRIBUTE, False)

    def evaluate(event: Any) -> Value | Failure:
        value = find(event)
        return missing if value is None else value

    return evaluate


def _logic(first: Evaluate, steps: Sequence[tuple[bool | None, Evaluate]]) -> Evaluate:
    """A run of AND, OR and XOR, each with the left value that decides it, in which case its right is not evaluated."""

    def evaluate(event: Any) -> Value | Failure:
        left = _boolean(first(event))
        if isinstance(left, Failure):
            return left
        for decided, operand in steps:
            if left is decided:
                continue
            right = _boolean(operand(event))
            if isinstance(right, Failure):
                return right
            left = right if decided is not None else left is not right
        return left

    return evaluate


_DECIDED = {"AND": False, "OR": True, "XOR": None}


def _not(operand: Evaluate) -> Evaluate:
    def evaluate(event: Any) -> Value | Failure:
        value = _boolean(operand(event))
        return value if isinstance(value, Failure) else not value

    return evaluate


def _equal(left: Evaluate, right: Evaluate, *, wanted: bool) -> Evaluate:
    """Whether the operands are equal: the right one's type is the one that the left is cast to."""

    def evaluate(event: Any) -> Value | Failure:
        x = left(event)
        if isinstance(x, Failure):
            return Failure(x.error, False)
        y = right(event)
        if isinstance(y, Failure):
            return Failure(y.error, False)
        if type(x) is not type(y):
            x = _CASTS[type(y)](x)
            if isinstance(x, Failure):
                return Failure(x.error, False)
        return (x == y) is wanted

    return evaluate


def _in(operand: Evaluate, elements: Sequence[Expression]) -> Evaluate:
    """Whether the operand is among the elements, which are cast to its type."""
    literals = [node.literal for node in elements if node.literal is not None]
    if len(literals) == len(elements):
        return _in_literals(operand, literals)
    others = [node.evaluate for node in elements]

    def evaluate(event: Any) -> Value | Failure:
        x = operand(event)
        if isinstance(x, Failure):
            return Failure(x.error, False)
        cast = _CASTS[type(x)]
        found = False
        for other in others:
            y = cast(other(event))
            if isinstance(y, Failure):
                return Failure(y.error, False)
            found = found or x == y
        return found

    return evaluate


def _in_literals(operand: Evaluate, literals: Sequence[Value]) -> Evaluate:
    """The same in the time of one look, however many there are: they are cast to each type beforehand."""
    sets: dict[type, frozenset[Value] | Failure] = {}
    for kind in (str, int, bool):
        values = [_CASTS[kind](literal) for literal in literals]
        failed = next((value for value in values if isinstance(value, Failure)), None)
        sets[kind] = frozenset(values) if failed is None else Failure(failed.error, False)

    def evaluate(event: Any) -> Value | Failure:
        x = operand(event)
        if isinstance(x, Failure):
            return Failure(x.error, False)
        members = sets[type(x)]
        return members if isinstance(members, Failure) else x in members

    return evaluate


def _like(operand: Evaluate, matches: Callable[[str], bool]) -> Evaluate:
    def evaluate(event: Any) -> Value | Failure:
        x = _string(operand(event))
        return Failure(x.error, False) if isinstance(x, Failure) else matches(x)

    return evaluate


def _runs(pattern: str) -> list[list[str]]:
    """What is between the `%` of a pattern: characters, `_` for any, and escaped ones with their backslash."""
    runs: list[list[str]] = [[]]
    for part in re.findall(r"\\[%_]|.", pattern, re.DOTALL):
        if part == "%":
            runs.append([])
        else:
            runs[-1].append(part)
    return runs


def _pattern(runs: Sequence[Sequence[str]]) -> Callable[[str], bool]:
    """Whether a text begins with the first run, ends with the last, and has the others between, in their order.

    The first place where a run is found is as good as any later one, so that nothing is tried twice. As one regular
    expression, each `%` would multiply the time by the length of the text.
    """
    first, first_size = _finder(runs[0]), len(runs[0])
    if len(runs) == 1:
        return lambda text: len(text) == first_size and first(text, 0, first_size) == 0
    last, last_size = _finder(runs[-1]), len(runs[-1])
    between = [(_finder(run), len(run)) for run in runs[1:-1] if run]

    def matches(text: str) -> bool:
        at, end = first_size, len(text) - last_size
        if end < at or first(text, 0, at) != 0 or last(text, end, len(text)) != end:
            return False
        for find, size in between:
            at = find(text, at, end)
            if at < 0:
                return False
            at += size
        return True

    return matches


def _finder(run: Sequence[str]) -> Callable[[str, int, int], int]:
    """`str.find` for a run of a pattern, in which `_` is any character."""
    if "_" not in run:
        plain = "".join(part[-1] for part in run)
        return lambda text, start, end: text.find(plain, start, end)
    search = re.compile("".join("." if part == "_" else re.escape(part[-1]) for part in run), re.DOTALL).search
    return lambda text, start, end: found.start() if (found := search(text, start, end)) else -1


@dataclass(frozen=True, slots=True)
class _Function:
    """A function, or an operator that is one: evaluates all of its operands, cast to its parameters' types."""

    parameters: tuple[type | None, ...]
    """None takes any type."""
    zero: Value
    """Of the type that it returns."""
    apply: Callable[..., Value | Failure]
    more: bool = False
    """Whether any number of Strings may follow."""


def _call(function: _Function, operands: Sequence[Evaluate]) -> Evaluate:
    zero, apply, more = function.zero, function.apply, function.more
    kinds = function.parameters + (str,) * (len(operands) - len(function.parameters))
    steps = [(operand, _CASTS[kind]) for operand, kind in zip(operands, kinds, strict=True)]

    def evaluate(event: Any) -> Value | Failure:
        values: list[Any] = []
        size = 0
        for operand, cast in steps:
            value = cast(operand(event))
            if isinstance(value, Failure):
                return Failure(value.error, zero)
            values.append(value)
            # Before they are all there: a thousand copies of a long attribute are a thousand times its size.
            if more and (size := size + len(value)) > MAX_CONCAT:
                return Failure(Error.FUNCTION_EVALUATION, zero)
        return apply(*values)

    return evaluate


# ── types ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _integer(value: Value | Failure) -> int | Failure:
    if isinstance(value, str):
        digits = _digits(value)
        # Not the text as it is: Python refuses to read thousands of digits, leading zeros included.
        number = int(digits[1] + digits[2]) if digits else _OVERFLOW
        return number if -_OVERFLOW <= number < _OVERFLOW else Failure(Error.CAST, 0)
    return int(value) if isinstance(value, bool) else value


def _boolean(value: Value | Failure) -> bool | Failure:
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _BOOLEANS.get(value.lower(), _NO_BOOLEAN)
    return Failure(value.error, False) if isinstance(value, Failure) else value != 0


def _string(value: Value | Failure) -> str | Failure:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int) else value


def _any(value: Value | Failure) -> Value | Failure:
    return value


_OVERFLOW = 0x8000_0000
_digits = re.compile(r"([+-]?)0*([0-9]{1,10})").fullmatch
_BOOLEANS = {"true": True, "false": False}
_NO_BOOLEAN = Failure(Error.CAST, False)
_CASTS: dict[type | None, Callable[[Value | Failure], Any]] = {str: _string, int: _integer, bool: _boolean, None: _any}


# ── functions and operators ───────────────────────────────────────────────────────────────────────────────────────────


def _int32(number: int) -> int | Failure:
    return number if -_OVERFLOW <= number < _OVERFLOW else Failure(Error.MATH, 0)


def _divided(x: int, y: int) -> int | Failure:
    if y == 0:
        return Failure(Error.MATH, 0)
    quotient = abs(x) // abs(y)
    return _int32(quotient if (x < 0) == (y < 0) else -quotient)


def _remainder(x: int, y: int) -> int | Failure:
    if y == 0:
        return Failure(Error.MATH, 0)
    return abs(x) % abs(y) * (-1 if x < 0 else 1)


def _absolute(x: int) -> int | Failure:
    return abs(x) if x > -_OVERFLOW else Failure(Error.MATH, _OVERFLOW - 1)


def _concat_ws(delimiter: str, *texts: str) -> str | Failure:
    if sum(map(len, texts)) + len(delimiter) * (len(texts) - 1) > MAX_CONCAT:
        return Failure(Error.FUNCTION_EVALUATION, "")
    return delimiter.join(texts)


def _left(x: str, y: int) -> str | Failure:
    return x[:y] if y >= 0 else Failure(Error.FUNCTION_EVALUATION, x)


def _right(x: str, y: int) -> str | Failure:
    return x[max(len(x) - y, 0) :] if y >= 0 else Failure(Error.FUNCTION_EVALUATION, x)


def _substring(x: str, position: int, length: int = _OVERFLOW) -> str | Failure:
    if abs(position) > len(x) or length < 0:
        return Failure(Error.FUNCTION_EVALUATION, "")
    if position == 0:
        return ""
    start = position - 1 if position > 0 else len(x) + position
    return x[start : start + length]


# Unicode's White_Space; `str.strip` alone takes four control characters for some, too.
_WHITE_SPACE = "".join(map(chr, (*range(9, 14), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B))))
_WHITE_SPACE += "\u2028\u2029\u202f\u205f\u3000"

_FUNCTIONS = {
    "ABS": [_Function((int,), 0, _absolute)],
    "BOOL": [_Function((None,), False, _boolean)],
    "CONCAT": [_Function((), "", lambda *texts: "".join(texts), more=True)],
    "CONCAT_WS": [_Function((str,), "", _concat_ws, more=True)],
    "INT": [_Function((None,), 0, _integer)],
    "IS_BOOL": [_Function((None,), False, lambda x: not isinstance(_boolean(x), Failure))],
    "IS_INT": [_Function((None,), False, lambda x: not isinstance(_integer(x), Failure))],
    "LEFT": [_Function((str, int), "", _left)],
    "LENGTH": [_Function((str,), 0, len)],
    "LOWER": [_Function((str,), "", str.lower)],
    "RIGHT": [_Function((str, int), "", _right)],
    "STRING": [_Function((None,), "", _string)],
    "SUBSTRING": [_Function((str, int), "", _substring), _Function((str, int, int), "", _substring)],
    "TRIM": [_Function((str,), "", lambda x: x.strip(_WHITE_SPACE))],
    "UPPER": [_Function((str,), "", str.upper)],
}


def _function(name: "Token", count: int) -> _Function | str:
    """The function; where none has that name and takes so many arguments, what is wrong."""
    overloads = _FUNCTIONS.get(name.upper())
    if overloads is None:
        return f"there is no function {_quoted(name)}, only {', '.join(_FUNCTIONS)}"
    for function in overloads:
        least = len(function.parameters)
        if count == least or (count > least and function.more):
            return function
    takes = " or ".join(f"{len(function.parameters)}{' or more' * function.more}" for function in overloads)
    return f"{name.upper()} takes {takes} argument{'s' * (takes != '1')}, found {count}"


_NEGATIVE = _Function((int,), 0, lambda x: _int32(-x))


def _binary(zero: Value, apply: Callable[[int, int], Value | Failure]) -> Callable[[Evaluate, Evaluate], Evaluate]:
    function = _Function((int, int), zero, apply)
    return lambda left, right: _call(function, [left, right])


_BINARY: dict[str, Callable[[Evaluate, Evaluate], Evaluate]] = {
    "=": partial(_equal, wanted=True),
    "!=": partial(_equal, wanted=False),
    "<>": partial(_equal, wanted=False),
    "<": _binary(False, operator.lt),
    "<=": _binary(False, operator.le),
    ">": _binary(False, operator.gt),
    ">=": _binary(False, operator.ge),
    "+": _binary(0, lambda x, y: _int32(x + y)),
    "-": _binary(0, lambda x, y: _int32(x - y)),
    "*": _binary(0, lambda x, y: _int32(x * y)),
    "/": _binary(0, _divided),
    "%": _binary(0, _remainder),
}
