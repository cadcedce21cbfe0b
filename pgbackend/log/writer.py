"""Writes to the log on one connection: a batch of rows in one transaction, with or without deduplication.

`Appender` decides what is sent together, and what becomes of an error. With deduplication a key for each event is
claimed in the transaction that stores it (see deduplication.py). The promise: after an error nothing is stored, unless
the connection was lost while PostgreSQL was committing.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from itertools import chain
from typing import Protocol

from pgbackend.codec.attributes import COLUMNS, Row
from pgbackend.codec.copy_format import PIECE, copy_pieces
from pgbackend.errors import EventError
from pgbackend.log.deduplication import key_of
from pgbackend.log.notify import Notifier
from pgbackend.postgres.connections import Connection, end_copy_with, on_unconfirmed
from pgbackend.postgres.errors import is_cut_off, is_lock_refused, is_notify_refused, is_repeat, translate
from pgbackend.postgres.pool import Database
from pgbackend.postgres.sql.statements import LogSql

_NOTIFY_PATIENCE = "10ms"
"""How long an append waits for other commits with a NOTIFY. After that it is sent again without."""
_CAREFUL_BATCHES = 20
"""Batches after one with a repeat in which repeats are looked for before the events are sent."""


class Rows(Protocol):
    """Rows that may be made when they are iterated over. An error that this raises is the answer to their call."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Row]: ...


class Blocked(Exception):  # noqa: N818 - a signal, not an error
    """An open transaction has claimed the key of an event. Nothing was stored."""


class _Repeat(Exception):  # noqa: N818 - as above
    """An event is a repeat. Nothing was stored."""


class OtherWindow(Exception):  # noqa: N818 - as above
    """The log's window is not the one that this process knows. Nothing was stored."""


class Writer:
    """The connection that appends."""

    def __init__(self, database: Database, sql: LogSql, notifier: Notifier, *, schema: str, timeout: float) -> None:
        """`timeout`: seconds without an answer after which the connection is given up, longer than any call waits."""
        self._database = database
        self._sql = sql
        self._notifier = notifier
        self._schema = schema
        self._timeout = timeout
        self._connection: Connection | None = None
        self._careful = 0
        """In how many batches repeats are looked for first: the last ones had some."""
        self.unconfirmed = False
        """Whether the last commit did not wait for the synchronous standby."""

    @property
    def is_connected(self) -> bool:
        return self._connection is not None and not self._connection.is_closed()

    async def connect(self) -> None:
        """There is a connection. Raises DatabaseError."""
        if not self.is_connected:
            connection = self._connection = await self._database.connect()
            try:
                on_unconfirmed(connection, self._note_unconfirmed)
                end_copy_with(connection)
            except Exception as error:
                # It was lost as soon as it was open.
                self.drop()
                raise translate(error) from error

    async def insert_and_notify(self, rows: Rows) -> bool:
        """The only row is committed. Whether a NOTIFY was part of that. Raises what the driver raises."""
        notifier, began = self._notifier, time.monotonic()
        try:
            with self._sending() as connection:
                row = await connection.fetchrow(
                    self._sql.append_one_and_notify,
                    *next(iter(rows)), notifier.channel, notifier.sender, _NOTIFY_PATIENCE,
                )  # fmt: skip
        except Exception as error:
            if not is_notify_refused(error):
                raise
            await self.insert(rows)
            return False
        if row is not None:
            notifier.joined(time.monotonic() - began)
        return row is not None

    async def insert(self, rows: Rows) -> None:
        """The rows are committed, in their order and in one transaction. Raises what the driver raises."""
        with self._sending() as connection:
            if len(rows) == 1:
                # A plain INSERT of one event takes 20 % less time than COPY of one (1.9 and 2.4 ms, on a busy machine).
                await connection.execute(self._sql.append_one, *next(iter(rows)))
            else:
                await self._copy(connection, rows)

    async def insert_fresh(self, parts: Sequence[tuple[Rows, bool]], known: int) -> tuple[list[int], int]:
        """The rows are committed, in their order and in one transaction, except those that are repeats.

        A part is rows, and whether they are deduplicated. Returns how many of each are repeats, and how many rows were
        appended. `known`: the window in µs. Raises Blocked, OtherWindow and what the driver and the rows raise.
        """
        with self._sending() as connection:
            try:
                if sum(len(rows) for rows, _ in parts) == 1:
                    return await self._insert_one_fresh(connection, parts, known)
                if self._careful == 0:
                    try:
                        return await self._insert_new(connection, _Keyed(parts), known)
                    except _Repeat:
                        self._careful = _CAREFUL_BATCHES
                return await self._insert_carefully(connection, _Keyed(parts), known)
            except Exception as error:
                if is_lock_refused(error):
                    self._careful = _CAREFUL_BATCHES
                    raise Blocked from error
                raise

    async def _insert_one_fresh(
        self, connection: Connection, parts: Sequence[tuple[Rows, bool]], known: int
    ) -> tuple[list[int], int]:
        (row,) = chain.from_iterable(rows for rows, _ in parts)
        refused = _claimed(await connection.fetchval(self._sql.append_one_fresh, *row, key_of(row), known))
        # A part whose call was answered meanwhile is empty.
        return [len(refused) if len(rows) else 0 for rows, _ in parts], 1 - len(refused)

    async def _insert_new(self, connection: Connection, keyed: "_Keyed", known: int) -> tuple[list[int], int]:
        """As `insert_fresh()` for events that are probably new: PostgreSQL stores them while the next ones are parsed.

        Raises _Repeat, and stores nothing, when one is not.
        """
        async with _transaction(connection):
            await self._copy(connection, keyed)
            try:
                is_known = await connection.fetchval(self._sql.claim_new_keys, b"".join(sorted(keyed.places)), known)
            except Exception as error:
                if is_repeat(error):
                    raise _Repeat from error
                raise
            if not is_known:
                raise OtherWindow
        return keyed.repeats, keyed.kept

    async def _insert_carefully(self, connection: Connection, keyed: "_Keyed", known: int) -> tuple[list[int], int]:
        """As `insert_fresh()`, and no repeat is sent."""
        rows = list(keyed)
        async with _transaction(connection):
            refused = _claimed(await connection.fetchval(self._sql.claim_keys, sorted(keyed.places), known))
            self._careful = _CAREFUL_BATCHES if refused else self._careful - 1
            if refused:
                left_out = {keyed.refuse(key) for key in refused}
                rows = [row for place, row in enumerate(rows) if place not in left_out]
            if rows:
                await self._copy(connection, rows)
        return keyed.repeats, len(rows)

    async def _copy(self, connection: Connection, rows: Iterable[Row]) -> None:
        await connection.copy_to_table(
            "events", schema_name=self._schema, columns=COLUMNS, format="binary", source=_pieces(rows)
        )

    async def find_blocked(self, keys: Sequence[bytes]) -> set[bytes]:
        """Those of the keys that an open transaction has claimed. Raises what the driver raises."""
        with self._sending() as connection:
            return set(await connection.fetchval(self._sql.find_blocked, sorted(keys)))

    @contextmanager
    def _sending(self) -> Iterator[Connection]:
        """The connection, which is given up if it does not answer in time."""
        connection = self._connection
        assert connection is not None  # noqa: S101 - `connect()` comes first
        self.unconfirmed = False
        give_up = asyncio.get_running_loop().call_later(self._timeout, connection.terminate)
        try:
            yield connection
        finally:
            give_up.cancel()

    def drop(self) -> None:
        """There is no connection any more."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()

    def _note_unconfirmed(self) -> None:
        self.unconfirmed = True


class _Keyed:
    """The rows of several parts in their order, without those that repeat an earlier one. Iterate over it once."""

    def __init__(self, parts: Sequence[tuple[Rows, bool]]) -> None:
        """A part is rows, and whether they are deduplicated."""
        self._parts = parts
        self.repeats = [0] * len(parts)
        """How many rows of each part are repeats, as far as they were found."""
        self.kept = 0
        self.places: dict[bytes, tuple[int, int]] = {}
        """The place of each key among the rows that were kept, and its part."""

    def __iter__(self) -> Iterator[Row]:
        places = self.places
        for number, (rows, is_deduplicated) in enumerate(self._parts):
            for row in rows:
                if is_deduplicated:
                    if (key := key_of(row)) in places:
                        self.repeats[number] += 1
                        continue
                    places[key] = (self.kept, number)
                self.kept += 1
                yield row

    def refuse(self, key: bytes) -> int:
        """Count a repeat. Returns its place."""
        place, number = self.places[key]
        self.repeats[number] += 1
        return place


@asynccontextmanager
async def _transaction(connection: Connection) -> AsyncIterator[None]:
    """A transaction that is committed, unless the body raises.

    If the body is cancelled, or loses its connection, the transaction ends with the connection. asyncpg's transactions
    would wait for a ROLLBACK.
    """
    await connection.execute("BEGIN")
    try:
        yield
    except Exception as error:
        if is_cut_off(error) and not isinstance(error, EventError | UnicodeEncodeError | OtherWindow | _Repeat):
            connection.terminate()
        else:
            await connection.execute("ROLLBACK")
        raise
    await connection.execute("COMMIT")


def _claimed(refused: list[bytes] | None) -> list[bytes]:
    """The keys that were refused. Raises OtherWindow for None."""
    if refused is None:
        raise OtherWindow
    return refused


async def _pieces(rows: Iterable[Row]) -> AsyncIterator[bytes]:
    for piece in copy_pieces(rows):
        yield piece
        if len(piece) >= PIECE:
            # The event loop sends it before the next one is made.
            await asyncio.sleep(0)
