"""Redaction: one event's data goes from the log and from all of its copies there, and its position stays.

A function of the log does it with its owner's rights, in one transaction, and keeps on record who did it and when.
Afterwards readers take the event for one that was removed: a subscription that has not handled it skips it, on record.
The promise: no copy in the log's tables survives, also none that a worker makes at the same time. The revision that
makes the function says why. A worker that has read the event before may still dispatch it from its memory.
"""

import logging

from pgbackend import facts
from pgbackend.errors import DatabaseError, EventNotFoundError
from pgbackend.model import Position, Redaction
from pgbackend.postgres.errors import LOCK_NOT_AVAILABLE
from pgbackend.postgres.pool import Database
from pgbackend.postgres.sql import load
from pgbackend.postgres.sql.statements import RedactionSql


class Redactions:
    """Redacts events of one log."""

    def __init__(self, database: Database, *, schema: str) -> None:
        self._database = database
        self._sql = load(RedactionSql, "redaction", schema=schema)

    async def redact(self, position: int) -> Redaction:
        """The event is redacted. Again does nothing, and returns who did it first.

        Raises EventNotFoundError when neither the log nor a dead letter has it, and DatabaseError, which says so when
        another transaction holds the dead letters or the event's segment.
        """
        try:
            row = await self._database.fetchrow(self._sql.redact, position)
        except DatabaseError as error:
            if error.sqlstate != LOCK_NOT_AVAILABLE:
                raise
            raise DatabaseError(
                f"The event at position {position} was not redacted: for a second, another transaction kept a lock on "
                "the dead letters or on the event's segment. Try again; pg_stat_activity shows what stays open.",
                sqlstate=error.sqlstate,
            ) from error
        if row is None or row["redacted_at"] is None:
            raise EventNotFoundError(
                f"There is nothing at position {position} to redact: neither an event of the log nor a dead letter."
            )
        facts.emit(
            "event redacted", level=logging.WARNING,
            position=position, dead_letters=row["letters"], by=row["redacted_by"],
        )  # fmt: skip
        return Redaction(
            position=Position(position),
            redacted_at=row["redacted_at"],
            redacted_by=row["redacted_by"],
            dead_letters=row["letters"],
            unsettled=tuple(row["unsettled"]),
            tables=tuple(row["tables"]),
        )
