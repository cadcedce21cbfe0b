"""Reading an expression: the grammar, what a syntax error says, and the function that each rule builds.

The parser calls the builder as it goes. There is no tree and no recursion, however deeply a text is nested.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn

from pgbackend.codec.cesql import operators
from pgbackend.codec.cesql.functions import call, find_function, quoted
from pgbackend.codec.cesql.like import matcher, runs_of
from pgbackend.codec.cesql.values import Error, Evaluate, Failed, Value, to_integer
from pgbackend.errors import ConfigError

if TYPE_CHECKING:
    from lark import Lark, Token

# Limits, so that no text and no event can keep a process busy or exhaust its memory or its stack.
_MAX_TEXT = 65_536  # characters of an expression; the longest take half a second to read
_MAX_DEPTH = 100  # nested operations, each of which is a call; a run of AND, OR and XOR counts once
_MAX_RUN = 256  # characters between two `%` of a LIKE pattern with `_`: each may be compared with each of the text

Lookup = Callable[[str], Callable[[Any], Value | None]]
"""Takes an attribute's name; returns the function that finds its value in an event, or None."""


@dataclass(frozen=True, slots=True)
class Expression:
    """The meaning of a text, or of a part of it."""

    evaluate: Evaluate
    mistake: str | None = None
    """An error for every event that gets that far: a call of a function that does not exist."""
    depth: int = 0
    """How deeply its operations are nested."""
    literal: Value | None = None
    """Its value if it is a literal."""


def compile_expression(text: str, lookup: Lookup) -> Expression:
    """The expression. Its `evaluate` takes an event in which `lookup(name)` finds the attribute `name`.

    >>> length = compile_expression("LENGTH(color) * 2", lambda name: lambda attributes: attributes.get(name)).evaluate
    >>> length({"color": "red"}), length({})
    (6, Failed(error=<Error.MISSING_ATTRIBUTE: 'missingAttribute'>, value=0))

    Raises `ConfigError` when the text is not an expression or is beyond a limit.
    """
    from lark.exceptions import UnexpectedInput  # noqa: PLC0415 - see _parser

    if not isinstance(text, str):
        raise ConfigError(f"CESQL takes the text of an expression, not {text!r:.80}.")
    if len(text) > _MAX_TEXT:
        raise ConfigError(f"CESQL: the expression has {len(text):,} characters. Use {_MAX_TEXT:,} at most.")
    reading: Any = _parser(lookup).parse_interactive(text)
    try:
        reading.exhaust_lexer()
        expression: Expression = reading.feed_eof()
    except UnexpectedInput as error:
        raise _syntax_error(text, error, reading.accepts()) from None
    return expression


# One rule for each step of precedence. `1 -1` subtracts: the lexer tries only what the parser can take next, so a sign
# belongs to a number only where an operand is expected.
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

    # ASCII, because with /i `[a-z]` would match the Kelvin sign.
    return Lark(_GRAMMAR, parser="lalr", transformer=_Builder(lookup), g_regex_flags=re.ASCII)


def _syntax_error(text: str, error: Any, accepted: set[str]) -> ConfigError:
    wanted = [meaning for terminal, meaning in _ONE_OF.items() if terminal in accepted][:1]
    wanted += [meaning for terminal, meaning in _ANY_OF.items() if terminal in accepted]
    *others, last = wanted
    expected = f"{', '.join(others)} or {last}" if others else last
    line, column, token = error.line, error.column, getattr(error, "token", None)
    if token is None:  # no token begins here
        found = "a string that does not end" if error.char in "'\"" else quoted(error.char)
    elif token.type == "$END":
        read = text.rstrip(" \t\r\n")
        line, column, found = read.count("\n") + 1, len(read) - read.rfind("\n"), "the end"
    else:
        found = quoted(token)
    return ConfigError(f"CESQL, line {line}, column {column}: expected {expected}, found {found}.")


_ONE_OF = {
    "INTEGER": "a value",
    "AND": "an operator",
    "LIKE": "LIKE or IN",
    "STRING": "a string in quotes",
    "NAME": "the name of an attribute",
    "_OPEN": "'('",
}
"""The meaning of each terminal for the next token. The first that fits says all: a value may also be a string."""

_ANY_OF = {"_COMMA": "','", "_CLOSE": "')'", "$END": "the end"}


def _refuse(token: "Token", problem: str) -> NoReturn:
    raise ConfigError(_at(token, problem))


def _at(token: "Token", problem: str) -> str:
    return f"CESQL, line {token.line}, column {token.column}: {problem}."


class _Builder:
    """One method for each rule of the grammar: it turns the rule's parts into an expression."""

    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup

    def string(self, parts: "list[Token]") -> Expression:
        return _literal(_unquoted(parts[0]))

    def integer(self, parts: "list[Token]") -> Expression:
        value = to_integer(str(parts[0]))
        if isinstance(value, Failed):
            _refuse(parts[0], f"{quoted(parts[0])} is beyond an Integer's 32 bits")
        return _literal(value)

    def true(self, _parts: "list[Token]") -> Expression:
        return _literal(True)

    def false(self, _parts: "list[Token]") -> Expression:
        return _literal(False)

    def attribute(self, parts: "list[Token]") -> Expression:
        return Expression(operators.attribute(self._lookup(parts[0].lower())))

    def exists(self, parts: "list[Token]") -> Expression:
        find = self._lookup(parts[1].lower())
        return Expression(lambda event: find(event) is not None)

    def call(self, parts: "list[Any]") -> Expression:
        name, *arguments = parts
        function = find_function(name, len(arguments))
        if isinstance(function, str):
            missing = Failed(Error.MISSING_FUNCTION, False)
            return Expression(lambda _event: missing, mistake=_at(name, function))
        return _node(name, call(function, [node.evaluate for node in arguments]), arguments)

    def minus(self, parts: "list[Any]") -> Expression:
        sign, operand = parts
        return _node(sign, operators.negative(operand.evaluate), [operand])

    def negation(self, parts: "list[Any]") -> Expression:
        word, operand = parts
        return _node(word, operators.negation(operand.evaluate), [operand])

    def like(self, parts: "list[Any]") -> Expression:
        operand, word, pattern = parts
        runs = runs_of(_unquoted(pattern))
        if any("_" in run and len(run) > _MAX_RUN for run in runs):
            _refuse(pattern, f"more than {_MAX_RUN} characters between two '%', with '_' among them")
        return _node(word, operators.like(operand.evaluate, matcher(runs)), [operand])

    def not_like(self, parts: "list[Any]") -> Expression:
        operand, word, *rest = parts
        return self.negation([word, self.like([operand, *rest])])

    def contained(self, parts: "list[Any]") -> Expression:
        operand, word, *elements = parts
        literals = [node.literal for node in elements if node.literal is not None]
        if len(literals) == len(elements):
            evaluate = operators.contained_in_literals(operand.evaluate, literals)
        else:
            evaluate = operators.contained(operand.evaluate, [node.evaluate for node in elements])
        return _node(word, evaluate, [operand, *elements])

    def not_contained(self, parts: "list[Any]") -> Expression:
        operand, word, *rest = parts
        return self.negation([word, self.contained([operand, *rest])])

    def binary(self, parts: "list[Any]") -> Expression:
        left, sign, right = parts
        return _node(sign, operators.BINARY[sign](left.evaluate, right.evaluate), [left, right])

    def logic(self, parts: "list[Any]") -> Expression:
        operands = parts[::2]
        steps = [(word.upper(), node.evaluate) for word, node in zip(parts[1::2], operands[1:], strict=True)]
        return _node(parts[1], operators.logic(operands[0].evaluate, steps), operands)


def _literal(value: Value) -> Expression:
    return Expression(lambda _event: value, literal=value)


def _node(token: "Token", evaluate: Evaluate, operands: Sequence[Expression]) -> Expression:
    depth = 1 + max((node.depth for node in operands), default=0)
    if depth > _MAX_DEPTH:
        _refuse(token, f"more than {_MAX_DEPTH} operations within one another")
    return Expression(evaluate, next((node.mistake for node in operands if node.mistake), None), depth)


def _unquoted(token: "Token") -> str:
    quote = token[0]
    return re.sub(rf"\\(\\|{quote})", lambda pair: quote if pair[1] == quote else pair[0], token[1:-1])
