"""Named SQL statements: the `.sql` files beside this module, with the log's schema filled in.

A file begins with comments, followed by statements. Each statement begins with `-- name: commit_offsets` and comment
lines that say what it guarantees, and ends where the next one begins. Eight placeholders are replaced in it:

    {schema}            the schema as a quoted identifier, "pgbackend": FROM {schema}.events
    {schema_literal}    its name as a text literal, 'pgbackend': to_regclass(quote_ident({schema_literal}) || '.events')
    {page_columns}      an event as readers take it; of a large one, whose `weight` is above 16384, without its content.
                        A redacted one counts as large: `read_large` does not find it, so readers know that it is gone
    {weight}            the bytes that an event takes in memory, from its unqualified columns: SELECT {weight} AS weight
    {key_hash}          the hash of its key, from its unqualified columns
    {recorded_at}       its date as bytes: microseconds after 2000, which `Event.recorded_at` decodes
    {readable_date}     its date; null for a date beyond those of datetime
    {failure_group}     the name of a dead letter's failure group: see `model.DeadLetterGroup`

`statements.py` declares the statements of a file as the fields of a frozen dataclass. A mistyped name is therefore a
type error, and a field without a statement (or the reverse) fails when its user is built, not when it is needed:

    sql = load(SegmentsSql, "segments", schema="pgbackend")
    await connection.fetchrow(sql.find_reach)

The name travels as a leading comment, `/* pgbackend:find_reach */`, and so shows in `pg_stat_activity`.
"""

import re
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar

from pgbackend.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    StatementsT = TypeVar("StatementsT", bound=DataclassInstance)
else:
    StatementsT = TypeVar("StatementsT")

_NAME = re.compile(r"^-- name: *(\w+) *$")
_PLACEHOLDER = re.compile(
    r"\{(schema|schema_literal|page_columns|weight|key_hash|recorded_at|readable_date|failure_group)\}"
)
# The objects, the data, and up to four bytes for each character of the attributes. octet_length() fetches no TOAST.
_WEIGHT = """(
    700 + coalesce(octet_length(data), 0) + 4 * (
        octet_length(id)::bigint + octet_length(source) + octet_length(type) + coalesce(octet_length(subject), 0)
        + coalesce(octet_length(time), 0) + coalesce(octet_length(datacontenttype), 0)
        + coalesce(octet_length(dataschema), 0) + coalesce(octet_length(partitionkey), 0)
        + octet_length(extensions::text)
    )
)"""
_RECORDED_AT = "pg_catalog.timestamptz_send(recorded_at)"
_READABLE_DATE = """CASE
    WHEN recorded_at >= '0001-01-01 00:00:00+00' AND recorded_at < '10000-01-01 00:00:00+00' THEN recorded_at
END"""
# Numbers and hexadecimal ids in errors differ from event to event. Numbers from 100 to 599 stay, because they may be
# statuses of HTTP. It takes 26 µs a letter; an exact pattern for UUIDs takes 44.
_FAILURE_GROUP = """pg_catalog.left(pg_catalog.encode(pg_catalog.sha256(pg_catalog.convert_to(
    subscription || chr(10) || regexp_replace(
        error, '[[:<:]](?:[0-9a-fA-F-]{16,}|[0-9]{1,2}|[06-9][0-9]{2}|[0-9]{4,})[[:>:]]', '#', 'g'
    ), 'UTF8'
)), 'hex'), 8)"""
_PAGE_COLUMNS = """
    CASE WHEN weight <= 16384 THEN specversion END AS specversion,
    CASE WHEN weight <= 16384 THEN id END AS id,
    CASE WHEN weight <= 16384 THEN source END AS source,
    CASE WHEN weight <= 16384 THEN type END AS type,
    CASE WHEN weight <= 16384 THEN subject END AS subject,
    CASE WHEN weight <= 16384 THEN time END AS time,
    CASE WHEN weight <= 16384 THEN datacontenttype END AS datacontenttype,
    CASE WHEN weight <= 16384 THEN dataschema END AS dataschema,
    CASE WHEN weight <= 16384 THEN partitionkey END AS partitionkey,
    CASE WHEN weight <= 16384 THEN extensions END AS extensions,
    CASE WHEN weight <= 16384 THEN data END AS data,
    data_encoding, position, {recorded_at} AS recorded_at, key_hash,
    CASE WHEN data_encoding = 'redacted' THEN greatest(weight, 16385) ELSE weight END AS weight"""
# PostgreSQL truncates longer names silently: two logs would become one.
_MAX_IDENTIFIER_BYTES = 63


def load(cls: type[StatementsT], file: str, *, schema: str) -> StatementsT:
    """An instance of `cls` with the statements of `file`.sql for `schema`; each field is the statement of its name.

    Raises TypeError when the fields and the statements do not have the same names.
    """
    statements = parse(file)
    declared = {field.name for field in fields(cls)}
    if declared != statements.keys():
        missing, unknown = sorted(declared - statements.keys()), sorted(statements.keys() - declared)
        raise TypeError(
            f"{cls.__name__} and {file}.sql differ: only in the class {missing}, only in the file {unknown}."
        )
    return cls(**{name: fill_in(text, schema=schema) for name, text in statements.items()})


@cache
def parse(file: str) -> Mapping[str, str]:
    """The statements of `file`.sql by name, each with its leading comment and with its placeholders.

    Raises TypeError for text outside a statement, or two statements of one name.
    """
    statements: dict[str, list[str]] = {}
    lines: list[str] | None = None
    for line in files(__name__).joinpath(f"{file}.sql").read_text("utf-8").splitlines():
        if match := _NAME.match(line):
            if match[1] in statements:
                raise TypeError(f"{file}.sql has two statements named {match[1]}.")
            lines = statements[match[1]] = [f"/* pgbackend:{match[1]} */"]
        elif line.strip() and not line.lstrip().startswith("--"):
            if lines is None:
                raise TypeError(f"{file}.sql has text before its first `-- name:` line.")
            lines.append(line)
    return MappingProxyType({name: "\n".join(text).rstrip("; ") for name, text in statements.items()})


def fill_in(text: str, *, schema: str) -> str:
    """`text` with its placeholders replaced, in one pass: a schema named "{schema}" is a name like any other."""
    words = {
        "schema": quote_ident(schema),
        "schema_literal": quote_literal(schema),
        "page_columns": _PAGE_COLUMNS.format(recorded_at=_RECORDED_AT),
        "weight": _WEIGHT,
        "key_hash": f"{quote_ident(schema)}.key_hash(partitionkey, subject, source, id)",
        "recorded_at": _RECORDED_AT,
        "readable_date": _READABLE_DATE,
        "failure_group": _FAILURE_GROUP,
    }
    return _PLACEHOLDER.sub(lambda match: words[match[1]], text)


def quote_ident(name: str) -> str:
    """`name` as a quoted identifier. Raises ConfigError for a name that PostgreSQL cannot store.

    >>> quote_ident('Events of "Acme"s')
    '"Events of ""Acme""s"'
    """
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        size = 0  # UTF-8 has no lone surrogates
    if not 0 < size <= _MAX_IDENTIFIER_BYTES or "\0" in name:
        raise ConfigError(
            f"{name!r} is not a name in PostgreSQL: expected 1 to {_MAX_IDENTIFIER_BYTES} bytes of UTF-8, none zero."
        )
    return '"' + name.replace('"', '""') + '"'


def quote_literal(text: str) -> str:
    r"""`text` as a literal with the same meaning under both values of `standard_conforming_strings`.

    >>> quote_literal("it's")
    "'it''s'"
    """
    quoted = "'" + text.replace("'", "''") + "'"
    return f" E{quoted}".replace("\\", "\\\\") if "\\" in text else quoted
