"""A revision after the newest one, so that upgrades are tested however few revisions there are."""

import shutil
from pathlib import Path

import pytest
from alembic.script import ScriptDirectory

from pgbackend.postgres import alembic_migrations, schema

LATER = """
from alembic.operations import Operations

from pgbackend.postgres import ddl

revision = "later"
down_revision = "{head}"


def upgrade(*, op: Operations) -> None:
    ddl.run(op, ("ALTER TABLE {{schema}}.events ADD COLUMN later integer",))


def downgrade(*, op: Operations) -> None:
    ddl.run(op, ("ALTER TABLE {{schema}}.events DROP COLUMN later",))
"""


@pytest.fixture
def later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The id of a revision that adds a column to `events`; it is the head during the test."""
    versions = tmp_path / "migrations" / "versions"
    shutil.copytree(schema.directory() / "versions", versions, ignore=shutil.ignore_patterns("__pycache__"))
    (versions / "later.py").write_text(LATER.format(head=schema.head()))
    scripts = ScriptDirectory(versions.parent)
    known = (*schema.revisions(), "later")
    monkeypatch.setattr(alembic_migrations, "scripts", lambda: scripts)
    monkeypatch.setattr(schema, "_revisions", lambda: known)
    return "later"
