"""Runs the statements of a revision, with the log's schema filled in, or prints them where a migration is only printed.

Each file in migrations/versions passes its statements to `run()`, with the `Operations` object that it was given.
Nothing here goes through Alembic's own execute(), which reads a colon in a schema's name as a parameter.
"""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from pgbackend.postgres.sql import quote_ident, quote_literal

if TYPE_CHECKING:
    from alembic.operations import Operations
    from alembic.runtime.migration import MigrationContext

_PLACEHOLDER = re.compile(r"\{(\w+)\}")


def run(op: "Operations", statements: Iterable[str], **texts: str) -> None:
    """Run each statement, with its placeholders replaced.

    `{schema}` is the log's schema as a quoted identifier. Each name in `texts` stands for that text as a literal, which
    may contain `{schema}` and the names of earlier texts.
    """
    context = op.get_context()
    words = {"schema": quote_ident(str(context.version_table_schema))}
    for name, text in texts.items():
        words[name] = quote_literal(_fill_in(text, words))
    for statement in statements:
        execute(context, _fill_in(statement, words))


def execute(context: "MigrationContext", statement: str) -> None:
    """Run or print one statement as it is."""
    if context.as_sql:
        context.impl.static_output(f"{statement};")
    else:
        assert context.connection is not None  # noqa: S101 - only a printed migration has none
        # Drivers read percent signs as parameters, unless they are told that there are none.
        context.connection.exec_driver_sql(statement, execution_options={"no_parameters": True})


def _fill_in(text: str, words: dict[str, str]) -> str:
    return _PLACEHOLDER.sub(lambda match: words[match[1]], text)
