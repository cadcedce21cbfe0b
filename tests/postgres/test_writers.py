"""The list of the modules that write each table is true: it is compared with the source."""

import ast
import re
from collections import defaultdict
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path

import pgbackend
from pgbackend.postgres import schema
from pgbackend.postgres.sql import parse, statements
from pgbackend.postgres.tables import WRITERS, metadata
from tests.postgres.test_statements import FILES

PACKAGE = Path(pgbackend.__file__).parent
USERS = ("bench", "torture")
"""Packages that use a log like any application, and write events to it in SQL of their own."""
ADVICE = {"doctor.definition", "doctor.subscriptions", "subscriptions.overview"}
"""Modules with SQL that they only print, for people to run."""
WRITE = r"\b(?:INSERT\s+INTO|UPDATE|DELETE\s+FROM|MERGE\s+INTO|TRUNCATE(?:\s+TABLE)?)\s+(?:ONLY\s+)?"
TABLES = {table.name for table in metadata().tables.values()}


def test_each_table_is_written_by_the_modules_that_are_listed_for_it() -> None:
    found = defaultdict(set)
    for module, tree in modules():
        for table in written_by(module, tree):
            found[table].add(module)

    assert {table: sorted(writers) for table, writers in found.items()} == {
        table: sorted(writers) for table, writers in WRITERS.items()
    }, "update WRITERS in pgbackend/postgres/tables.py, or move the statement to a module that writes the table"


def test_each_table_has_a_writer() -> None:
    assert WRITERS.keys() == TABLES


def test_each_statement_is_used() -> None:
    used = {use for module, tree in modules() for use in statements_of(module, tree)}

    assert {(file, name) for file in FILES for name in parse(file)} == used


@cache
def modules() -> list[tuple[str, ast.Module]]:
    """The modules that may have to do with SQL, by name."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name, text = ".".join(path.relative_to(PACKAGE).with_suffix("").parts), path.read_text("utf-8")
        if not name.startswith(USERS) and re.search(rf"sql\b|copy_records_to_table|{WRITE}", text):
            found.append((name, ast.parse(text)))
    return found


def written_by(module: str, tree: ast.Module) -> set[str]:
    """The tables that a module writes by named statements, by COPY, or by SQL in its own text."""
    written = set()
    for file, name in statements_of(module, tree):
        text = parse(file)[name]
        written |= set(re.findall(WRITE + r"\{schema\}\.(\w+)", text))
        for function in re.findall(r"\{schema\}\.(\w+)\(", text):
            written |= FUNCTIONS.get(function, set())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "copy_records_to_table":
            assert isinstance(node.args[0], ast.Constant)
            written.add(node.args[0].value)
        elif isinstance(node, ast.Constant | ast.JoinedStr) and module not in ADVICE:
            written |= set(re.findall(WRITE + r"(?:\S+\.)?(\w+)", text_of(node))) & TABLES
    return written


def text_of(node: ast.Constant | ast.JoinedStr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)


def statements_of(module: str, tree: ast.Module) -> set[tuple[str, str]]:
    """The named statements that a module uses, as (file, name): attributes of something whose name ends in "sql"."""
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for name in node.names}
    used = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or node.attr not in DECLARED:
            continue
        owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
        if owner.endswith("sql"):
            classes = DECLARED[node.attr]
            (known,) = classes if len(classes) == 1 else classes & imported
            used.add((file_of(known), node.attr))
    return used


def file_of(class_name: str) -> str:
    """The file of a class of statements: LogCheckSql is that of log_check.sql."""
    (file,) = (file for file in FILES if f"{file.title().replace('_', '')}Sql" == class_name)
    return file


def declared() -> dict[str, set[str]]:
    """The classes that declare a statement, by its name."""
    found = defaultdict(set)
    for name, cls in vars(statements).items():
        if isinstance(cls, type) and is_dataclass(cls):
            for field in fields(cls):
                found[field.name].add(name)
    return found


def functions() -> dict[str, set[str]]:
    """The tables that each function of the log writes, by itself or by the functions that it calls."""
    created = dict(re.findall(r'CREATE FUNCTION "log"\.(\w+)(.*?);\n\n', schema.offline_sql("log"), re.DOTALL))

    def tables(name: str) -> set[str]:
        called = set(re.findall(r'"log"\.(\w+)\(', created[name])) & created.keys()
        return set(re.findall(WRITE + r'"log"\.(\w+)', created[name])).union(*map(tables, called))

    return {name: tables(name) for name in created}


DECLARED = declared()
FUNCTIONS = functions()
