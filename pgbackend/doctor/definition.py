"""The log's tables and functions, held against what the migrations make.

The comparison goes by names, by the types of columns, and by the text of functions in PL/pgSQL: PostgreSQL rewrites all
other texts. It is made only at the revision that this version knows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pgbackend.doctor.expected import expected, squeezed
from pgbackend.doctor.finding import Finding
from pgbackend.doctor.lines import ident
from pgbackend.doctor.look import Look, Scene

_REVISION_TABLE = "pgbackend_revision"
_TYPES = {
    "p": "primary key",
    "f": "foreign key",
    "c": "check",
    "u": "unique constraint",
    "i": "index",
    "x": "exclusion",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A row of `list_columns`."""

    relation: str
    name: str
    type: str
    is_required: bool
    has_default: bool


def check_columns(rows: Sequence[Column], scene: Scene) -> Iterator[Finding]:
    """Tables and columns that are missing, of another type, or a stranger's."""
    wanted = expected(scene.schema).columns
    tables = {row.relation for row in rows}
    found = {(row.relation, row.name): row for row in rows}
    for table in sorted({table for table, _ in wanted} - tables):
        yield _drift(
            f"table {table}",
            "It is missing. Restore it from a backup. The line prints how the migrations make it, empty.",
            cure=scene.command("migrate", "--sql"),
        )
    for (table, name), part in wanted.items():
        row = found.get((table, name))
        if row is None and table in tables:
            yield _drift(f"column {name} of {table}", "It is missing, so statements fail.", cure=part.cure)
        elif row is not None and row.type != part.type:
            yield _drift(
                f"column {name} of {table}",
                f"Its type is {row.type}, and must be {part.type}.",
                cure=f"ALTER TABLE {scene.where}.{ident(table)} ALTER COLUMN {ident(name)} TYPE {part.type};",
            )
    for key, row in found.items():
        if key not in wanted and any(table == row.relation for table, _ in wanted):
            is_fatal = row.is_required and not row.has_default
            yield Finding(
                check="schema-drift",
                severity="error" if is_fatal else "note",
                subject=f"column {row.name} of {row.relation}",
                what="A stranger has added it. "
                + (
                    "It needs a value and has no default, so INSERTs fail."
                    if is_fatal
                    else "A migration may stumble on it."
                ),
                cure=f"ALTER TABLE {scene.where}.{ident(row.relation)} DROP COLUMN {ident(row.name)};",
                destroys="what is stored in the column",
            )


COLUMNS = Look(
    title="columns",
    statement=lambda statements: statements.doctor_sql.list_columns,
    fact=Column,
    checks=(check_columns,),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A row of `list_constraints`: a constraint, or an index without one."""

    relation: str
    name: str
    type: str
    is_valid: bool


def check_rules(rows: Sequence[Rule], scene: Scene) -> Iterator[Finding]:
    """Constraints and indexes that are missing, broken, or a stranger's."""
    wanted = expected(scene.schema).rules
    found = {(row.relation, row.name): row for row in rows if row.relation != _REVISION_TABLE}
    tables = {table for table, _ in wanted}
    for (table, name), part in wanted.items():
        if (table, name) not in found:
            yield _drift(
                f"{_TYPES[part.type]} {name} of {table}",
                "It is missing: the log holds what it forbids, or statements get slow. "
                + ("" if part.cure else "The line prints how the migrations make it: look for its name."),
                cure=part.cure or scene.command("migrate", "--sql"),
            )
    for key, row in found.items():
        table = f"{scene.where}.{ident(row.relation)}"
        if key in wanted and not row.is_valid:
            yield _drift(
                f"index {row.name} of {row.relation}",
                "It is invalid, because its CREATE or REINDEX failed: no statement uses it.",
                cure=f"REINDEX INDEX CONCURRENTLY {scene.where}.{ident(row.name)};",
            )
        elif key not in wanted and row.relation in tables and row.type == "i":
            yield Finding(
                check="extra-index",
                severity="note",
                subject=f"index {row.name} of {row.relation}",
                what="A stranger has added it. Each write to the table pays for it.",
                cure=f"DROP INDEX {scene.where}.{ident(row.name)};",
                destroys="the index",
            )
        elif key not in wanted and row.relation in tables:
            yield Finding(
                check="schema-drift",
                severity="warning",
                subject=f"{_TYPES.get(row.type, 'constraint')} {row.name} of {row.relation}",
                what="A stranger has added it. It can fail statements of pgbackend.",
                cure=f"ALTER TABLE {table} DROP CONSTRAINT {ident(row.name)};",
                destroys="the constraint",
            )


RULES = Look(
    title="constraints and indexes",
    statement=lambda statements: statements.doctor_sql.list_constraints,
    fact=Rule,
    checks=(check_rules,),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Routine:
    """A row of `list_routines`: a function or a view."""

    name: str
    signature: str
    owner: str
    log_owner: str | None
    body: str | None
    """The text of a function in PL/pgSQL; None where PostgreSQL keeps no text."""


def check_routines(rows: Sequence[Routine], scene: Scene) -> Iterator[Finding]:
    """Functions and views that are missing, changed, or owned by another role than the log."""
    wanted = expected(scene.schema)
    for name in sorted(wanted.routines - {row.name for row in rows}):
        yield _drift(
            f"function or view {name}",
            "It is missing, so statements fail. The line prints how the migrations make it: look for its name.",
            cure=scene.command("migrate", "--sql"),
        )
    for row in rows:
        bodies = wanted.bodies.get(row.name)
        if row.name in wanted.routines and bodies and row.body is not None and squeezed(row.body) not in bodies:
            yield _drift(
                f"function {row.signature}",
                "A stranger has changed its text. The line prints what the migrations make: look for its name.",
                cure=scene.command("migrate", "--sql"),
            )
        if row.name in wanted.routines and "(" in row.signature and row.owner != row.log_owner and row.log_owner:
            yield Finding(
                check="owner",
                severity="error",
                subject=f"function {row.signature}",
                what=f"It belongs to {row.owner}, and the log to {row.log_owner}: it runs with rights that do not "
                "fit, and may fail.",
                cure=f"ALTER FUNCTION {row.signature} OWNER TO {row.log_owner};",
            )


ROUTINES = Look(
    title="functions and views",
    statement=lambda statements: statements.doctor_sql.list_routines,
    fact=Routine,
    checks=(check_routines,),
)


def _drift(subject: str, what: str, *, cure: str | None) -> Finding:
    return Finding(check="schema-drift", severity="error", subject=subject, what=what.strip(), cure=cure)
