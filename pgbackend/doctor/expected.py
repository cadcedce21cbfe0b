"""Everything that the migrations make, as names, types and texts to hold the catalogs of a log against.

It comes from the SQLAlchemy metadata and from the migrations' own SQL, so a new revision needs no change here.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from pgbackend.doctor.lines import ident
from pgbackend.postgres import schema as revisions

if TYPE_CHECKING:
    from sqlalchemy import Table

_SCHEMA = "log"
"""The schema in the SQL that is searched; its name is in no name or text that is compared."""
_CREATED = re.compile(
    r'^\s*CREATE(?: OR REPLACE)? (?:FUNCTION|VIEW) "log"\.(\w+)|^\s*(DROP (?:FUNCTION|VIEW)[^;]*)', re.MULTILINE
)
_NAME = re.compile(r'"log"\.(\w+)')
_BODY = re.compile(
    r'CREATE(?: OR REPLACE)? FUNCTION "log"\.(\w+)(?:(?!\bCREATE\b).)*?\$function\$(.*?)\$function\$', re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Part:
    """A column, a constraint or an index that a table must have."""

    type: str
    """A column's type; otherwise a letter as in pg_constraint.contype, or i for an index."""
    cure: str | None
    """The statement that makes it; None where only the migrations have it."""


@dataclass(frozen=True, slots=True)
class Expected:
    """Everything that a log must have."""

    columns: dict[tuple[str, str], Part]
    """By table and name."""
    rules: dict[tuple[str, str], Part]
    """Constraints and indexes, by table and name."""
    routines: frozenset[str]
    """The names of functions and views."""
    bodies: dict[str, frozenset[str]]
    """The texts that a function in PL/pgSQL has had, squeezed, by its name."""


@lru_cache(maxsize=8)
def expected(schema: str) -> Expected:
    """The log in this schema, at the revision of this version."""
    # SQLAlchemy and Alembic take half a second to import, and nothing else of the doctor needs them.
    from pgbackend.postgres.tables import metadata  # noqa: PLC0415

    columns: dict[tuple[str, str], Part] = {}
    # The metadata has no functions, and so not the check that calls one.
    rules = {("events", "events_valid"): Part("c", None)}
    for table in metadata(schema).tables.values():
        columns.update(_columns(table, f"{ident(schema)}.{ident(table.name)}"))
        rules.update(_rules(table))
    text = revisions.offline_sql(_SCHEMA)
    return Expected(columns, rules, _routines(text), _bodies(text))


def squeezed(text: str) -> str:
    """The text without what differs between two ways of writing it down."""
    return " ".join(text.split())


def _columns(table: "Table", where: str) -> dict[tuple[str, str], Part]:
    from sqlalchemy.dialects.postgresql import dialect  # noqa: PLC0415 - as in `expected()`
    from sqlalchemy.schema import CreateColumn  # noqa: PLC0415

    # Named, because the default style of parameters doubles each % of a name.
    postgresql = dialect(paramstyle="named")  # type: ignore[no-untyped-call] # SQLAlchemy's own annotation lacks it
    return {
        (table.name, column.name): Part(
            str(column.type.compile(dialect=postgresql)).lower(),
            f"ALTER TABLE {where} ADD COLUMN {squeezed(str(CreateColumn(column).compile(dialect=postgresql)))};",
        )
        for column in table.columns
    }


def _rules(table: "Table") -> dict[tuple[str, str], Part]:
    from sqlalchemy.dialects.postgresql import dialect  # noqa: PLC0415 - as in `expected()`
    from sqlalchemy.schema import AddConstraint, CreateIndex  # noqa: PLC0415

    postgresql = dialect(paramstyle="named")  # type: ignore[no-untyped-call] # as above
    letters = {"primary_key_constraint": "p", "foreign_key_constraint": "f"}
    constraints = {
        (table.name, str(one.name)): Part(
            letters.get(one.__visit_name__, "c"), squeezed(str(AddConstraint(one).compile(dialect=postgresql))) + ";"
        )
        for one in table.constraints
    }
    indexes = {
        (table.name, str(one.name)): Part("i", squeezed(str(CreateIndex(one).compile(dialect=postgresql))) + ";")
        for one in table.indexes
    }
    return constraints | indexes


def _routines(text: str) -> frozenset[str]:
    names: set[str] = set()
    for created, dropped in _CREATED.findall(text):
        names = names | {created} if created else names - set(_NAME.findall(dropped))
    return frozenset(names)


def _bodies(text: str) -> dict[str, frozenset[str]]:
    bodies: dict[str, frozenset[str]] = {}
    for name, body in _BODY.findall(text):
        bodies[name] = bodies.get(name, frozenset()) | {squeezed(body)}
    return bodies
