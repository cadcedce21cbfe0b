"""The statements of one append in a caller's transaction, for each way in which drivers mark a parameter.

The promise: a schema's name may have any character, and none of it is taken for a parameter.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Self

from pgbackend.codec.attributes import Row
from pgbackend.codec.row_json import rows_json
from pgbackend.log.notify import channel
from pgbackend.postgres.sql import fill_in, parse
from pgbackend.postgres.sql.statements import OutboxSql

Marker = Literal["$1", "%s", ":value"]
"""The parameter of a statement: asyncpg's, that of psycopg and Django, and that of SQLAlchemy's text()."""

_ESCAPES: dict[Marker, Callable[[str], str]] = {
    "$1": lambda text: text,
    "%s": lambda text: text.replace("%", "%%"),
    ":value": lambda text: text.replace(":", "\\:"),
}


@dataclass(frozen=True, slots=True)
class Append:
    """Events that go into a transaction together."""

    schema: str
    rows: str
    """The events, as `append_rows` takes them."""
    notify: bool
    """Whether the transaction tells other processes."""

    @classmethod
    def of(cls, rows: Iterable[Row], *, schema: str, notify: bool) -> Self:
        """The append of these rows. Raises EventError for rows that are made only now, and are invalid."""
        return cls(schema, rows_json(rows), notify)

    def steps(self, marker: Marker) -> Iterator[tuple[str, str]]:
        """The statements in their order, each with its parameter."""
        sql = statements(self.schema, marker)
        yield sql.append_rows, self.rows
        if self.notify:
            yield sql.notify_at_commit, channel(self.schema)


def notification(schema: str, marker: Marker) -> tuple[str, str]:
    """The statement that tells other processes after a commit, with its parameter."""
    sql = statements(schema, marker)
    return sql.notify_after_commit, channel(schema)


@lru_cache(maxsize=256)
def statements(schema: str, marker: Marker) -> OutboxSql:
    """The statements for a log and a marker. Raises ConfigError for a schema that PostgreSQL cannot have."""
    escape = _ESCAPES[marker]
    return OutboxSql(**{
        name: marker.join(escape(fill_in(part, schema=schema)) for part in text.split("$1"))
        for name, text in parse("outbox").items()
    })  # fmt: skip
