import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import pytest

from pgbackend.errors import ConfigError
from pgbackend.postgres import schema, sql
from pgbackend.postgres.sql import fill_in, load, parse, quote_ident, quote_literal, statements

SCHEMA = "Of \"many\" 'words': 100%s {schema}"
FILES = sorted(path.stem for path in Path(sql.__file__).parent.glob("*.sql"))
STATEMENTS = [(file, name) for file in FILES for name in parse(file)]


@pytest.fixture(scope="module")
def log(request: pytest.FixtureRequest, server: str) -> Iterator[str]:
    """DSN of the server's own database, with a log in a schema whose name needs quoting."""

    async def remove() -> None:
        connection = await asyncpg.connect(server)
        await connection.execute(f"DROP SCHEMA IF EXISTS {quote_ident(SCHEMA)} CASCADE")
        await connection.close()

    asyncio.run(remove())
    asyncio.run(schema.migrate(lambda: asyncpg.connect(server), SCHEMA))
    yield server
    asyncio.run(remove())


@pytest.mark.parametrize(("file", "name"), STATEMENTS)
async def test_each_statement_is_valid_for_the_tables(log: str, file: str, name: str) -> None:
    connection = await asyncpg.connect(log)
    try:
        await connection.prepare(fill_in(parse(file)[name], schema=SCHEMA))
    finally:
        await connection.close()


@pytest.mark.parametrize("file", FILES)
def test_each_file_has_a_class_that_declares_its_statements(file: str) -> None:
    load(getattr(statements, f"{file.title().replace('_', '')}Sql"), file, schema=SCHEMA)


@pytest.mark.parametrize(("file", "name"), STATEMENTS)
def test_each_statement_carries_its_name_and_has_no_backslash(file: str, name: str) -> None:
    text = parse(file)[name]

    assert text.startswith(f"/* pgbackend:{name} */\n")
    assert len(text.splitlines()) > 1, "it has no text"
    assert ";" not in text, "one statement at a time"
    assert "\\" not in text, "its meaning depends on a setting of the session"


def test_no_revision_has_a_backslash() -> None:
    """The body of a function is parsed in its caller's session, whose settings give a backslash its meaning."""
    assert "\\" not in schema.offline_sql("pgbackend")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sql, "files", lambda _: tmp_path)
    return tmp_path


@dataclass(frozen=True, slots=True)
class LogSql:
    append: str
    read: str


def test_statements_become_fields_with_the_schema_in_them(files: Path) -> None:
    (files / "test_fields.sql").write_text(
        "-- Prose before the first statement.\n\n"
        "-- name: append\n-- Why it is as it is.\nINSERT INTO {schema}.events\nDEFAULT VALUES;\n\n"
        "-- name: read\nSELECT {schema_literal}, '{}' -- trailing\n"
    )

    loaded = load(LogSql, "test_fields", schema="a\"{schema_literal}'")

    assert loaded.append == ('/* pgbackend:append */\nINSERT INTO "a""{schema_literal}\'".events\nDEFAULT VALUES')
    assert loaded.read == "/* pgbackend:read */\nSELECT 'a\"{schema_literal}''', '{}' -- trailing"


def test_a_field_without_a_statement_is_refused_by_name(files: Path) -> None:
    (files / "test_mismatch.sql").write_text("-- name: append\nSELECT 1\n-- name: write\nSELECT 2\n")

    with pytest.raises(TypeError, match=r"LogSql and test_mismatch\.sql differ: .*read.*write"):
        load(LogSql, "test_mismatch", schema="pgbackend")


def test_two_statements_of_one_name_are_refused(files: Path) -> None:
    (files / "test_twice.sql").write_text("-- name: append\nSELECT 1\n-- name: append\nSELECT 2\n")

    with pytest.raises(TypeError, match="two statements named append"):
        parse("test_twice")


def test_text_outside_a_statement_is_refused(files: Path) -> None:
    (files / "test_stray.sql").write_text("SELECT 1\n-- name: append\nSELECT 2\n")

    with pytest.raises(TypeError, match="before its first"):
        parse("test_stray")


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 64, "é" * 32, "\ud800"])
def test_an_impossible_identifier_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="1 to 63 bytes"):
        quote_ident(name)


@pytest.mark.parametrize("text", ["plain", "it's", "back\\slash", "\\'", '"', "äöü", "$1 %s :x"])
@pytest.mark.parametrize("conforming", ["on", "off"])
async def test_quoting_does_not_change_a_text(server: str, text: str, conforming: str) -> None:
    connection = await asyncpg.connect(
        server, server_settings={"standard_conforming_strings": conforming, "escape_string_warning": "off"}
    )
    try:
        row = await connection.fetchrow(f"SELECT {quote_literal(text)} AS {quote_ident(text)}")
    finally:
        await connection.close()

    assert dict(row or {}) == {text: text}
