"""Text of findings: SQL that can be pasted whatever a name contains, queries without secrets, and quantities.

The promise: a line of a cure means the same after it went through a terminal, which must get no control characters.
"""

import re
import shlex
from collections.abc import Sequence

from pgbackend.postgres.sql import quote_ident, quote_literal

_LITERAL = re.compile(r"(\$\w*\$)(?:.*?\1|.*\Z)|'(?:[^']|'')*(?:'|\Z)", re.DOTALL)
_QUERY_LENGTH = 120
_UNITS = ((86_400.0, "d"), (3_600.0, "h"), (60.0, "min"))


def ident(name: str) -> str:
    r"""The name as an identifier of SQL, with escapes for what is not printable.

    >>> print(ident("slow shop"), ident("a\x1b"))
    "slow shop" U&"a\001b"
    """
    quoted = quote_ident(name)
    return quoted if name.isprintable() else "U&" + _escaped(quoted.replace("\\", "\\\\"), "\\{:04x}", "\\+{:06x}")


def literal(text: str) -> str:
    r"""The text as a literal of SQL, with escapes for what is not printable.

    >>> print(literal("it's"), literal("a\x1b"))
    'it''s' E'a\u001b'
    """
    if text.isprintable():
        return quote_literal(text).strip()
    return "E" + _escaped("'" + text.replace("\\", "\\\\").replace("'", "''") + "'", "\\u{:04x}", "\\U{:08x}")


def command(*words: str, schema: str, arguments: Sequence[str] = ()) -> str:
    r"""A command of pgbackend, quoted for a shell. It takes its server from where `pgbackend doctor` had it.

    `arguments` are not options, even if they begin like some.

    >>> print(command("subscriptions", "delete", arguments=["a b\x1b"], schema="shop"))
    pgbackend subscriptions delete $'a b\u001b' --schema shop
    >>> print(command("subscriptions", "delete", arguments=["--yes"], schema="shop"))
    pgbackend subscriptions delete --schema shop -- --yes
    """
    options = [] if schema == "pgbackend" else ["--schema", schema]
    is_ambiguous = any(argument.startswith("-") for argument in arguments)
    rest = [*options, "--", *arguments] if is_ambiguous else [*arguments, *options]
    return " ".join(map(_shell_word, ["pgbackend", *words, *rest]))


def shown_query(query: str | None) -> str:
    """A query for people: one line, cut, and without its literals, which may be secrets.

    >>> shown_query("ALTER ROLE me PASSWORD 'it''s'")
    "ALTER ROLE me PASSWORD '…'"
    """
    if not query:
        return "unknown"
    line = " ".join(_LITERAL.sub("'…'", query).split())
    return line if len(line) <= _QUERY_LENGTH else line[: _QUERY_LENGTH - 1] + "…"


def shown_time(seconds: float | None) -> str:
    """Seconds in their largest unit.

    >>> shown_time(7_500), shown_time(3.24), shown_time(None)
    ('2.1 h', '3.2 s', 'an unknown time')
    """
    if seconds is None:
        return "an unknown time"
    for size, unit in _UNITS:
        # A time that rounds to 60.0 min is an hour.
        if abs(seconds) >= size * 0.999:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def shown_bytes(size: int) -> str:
    """Bytes in their largest unit.

    >>> shown_bytes(3 << 29)
    '1.5 GiB'
    """
    amount = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.1f} {unit}" if unit != "B" else f"{size} B"
        amount /= 1024
    return f"{amount:.1f} TiB"


def session(pid: int | None, application: str | None, role: str | None = None) -> str:
    """A session as the subject of a finding."""
    details = ", ".join(filter(None, [application, f"role {role}" if role else None]))
    return f"pid {pid}" + (f" ({details})" if details else "")


def _shell_word(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    return "$" + _escaped("'" + word.replace("\\", "\\\\").replace("'", "\\'") + "'", "\\u{:04x}", "\\U{:08x}")


def _escaped(text: str, short: str, long: str) -> str:
    return "".join(
        one if one.isprintable() else (short if ord(one) < 1 << 16 else long).format(ord(one)) for one in text
    )
