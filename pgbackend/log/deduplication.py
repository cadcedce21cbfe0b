"""Deduplication: within a window, the log takes each event once, by its `source` and `id`.

The window is stored with the log, so that it is the same for all producers. A process looks it up again every few
seconds. `Appender` and the SQL function `produce` claim a key for each event in the transaction that appends it;
`claim_keys` in the migrations has the proof. This module knows the window and has old keys forgotten. The promise: a
process obeys a window that was set `_INTERVAL` ago, and keys of windows that have passed go by TRUNCATE.
"""

import asyncio
import logging
from datetime import timedelta
from hashlib import sha256

from pgbackend import facts
from pgbackend.codec.attributes import Row
from pgbackend.errors import DatabaseError
from pgbackend.postgres.errors import INSUFFICIENT_PRIVILEGE
from pgbackend.postgres.pool import Database
from pgbackend.postgres.sql import load
from pgbackend.postgres.sql.statements import DeduplicationSql

_INTERVAL = 5.0
"""Seconds between two looks at the window."""
# Another session holds a lock: a producer's transaction that is older than a window, or another process that empties.
_TRY_LATER = frozenset({"55P03", "40P01"})
_MICROSECOND = timedelta(microseconds=1)


def key_of(row: Row) -> bytes:
    """The key of an event: 16 bytes that no other source and id have. `event_key` in the log's schema agrees."""
    # For security or not, the digest is the same; without, OpenSSL takes a fifth less time.
    return sha256(f"{row[2]}\0{row[1]}".encode(), usedforsecurity=False).digest()[:16]


class Deduplication:
    """Knows the window of one log."""

    def __init__(self, database: Database, *, schema: str) -> None:
        self._database = database
        self._sql = load(DeduplicationSql, "deduplication", schema=schema)
        self.window_us = 0
        """The window in microseconds, as this process knows it. 0: repeats are appended like other events."""

    async def enter(self, window: timedelta | None) -> None:
        """The window of the log is known, and is `window` unless that is None.

        Raises DatabaseError, which says so when this role may not change the window.
        """
        await self.look()
        if window is None or (wanted := window // _MICROSECOND) == self.window_us:
            return
        try:
            await self._database.execute(self._sql.store_window, wanted)
        except DatabaseError as error:
            if error.sqlstate != INSUFFICIENT_PRIVILEGE:
                raise
            raise DatabaseError(
                f"The log deduplicates within {timedelta(microseconds=self.window_us)}, and this role may not change "
                f"that to {window}. Let a role do it that has what `pgbackend grants --operator` prints, or leave "
                "`deduplicate` out to use the log's window.",
                sqlstate=error.sqlstate,
            ) from error
        facts.emit(
            "deduplication window changed", before=timedelta(microseconds=self.window_us), window=window,
            effect="Other processes obey it within 5 s. Copies of events from before are not recognized.",
        )  # fmt: skip
        self.window_us = wanted

    async def run(self) -> None:
        """Follow the window, and have old keys forgotten, until cancelled."""
        failures = 0
        while True:
            try:
                await self.run_once()
                failures = 0
            except DatabaseError as error:
                failures += 1
                level = logging.WARNING if failures == 1 else logging.DEBUG
                facts.emit("deduplication window not read", level=level, failures=failures, error=str(error))
            await asyncio.sleep(_INTERVAL)

    async def run_once(self) -> int:
        """The window is known, and keys of windows that have passed are forgotten. How many partitions were emptied.

        Keys stay a while longer when another session holds a lock. Raises DatabaseError.
        """
        was_on = self.window_us > 0
        await self.look()
        if not was_on and not self.window_us:
            return 0
        try:
            emptied: int = await self._database.fetchval(self._sql.forget_keys)
        except DatabaseError as error:
            if error.sqlstate not in _TRY_LATER:
                raise
            facts.emit("old keys not forgotten yet", level=logging.DEBUG, error=str(error))
            return 0
        return emptied

    async def look(self) -> None:
        """The window is known as it is stored now. Raises DatabaseError."""
        self.window_us = await self._database.fetchval(self._sql.find_window) or 0
