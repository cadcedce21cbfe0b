"""Executes an append on an asynchronous connection: one small function for each kind.

The promise is that of synchronous.py. Each function returns the transaction, so that readers can be woken when it ends.
"""

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from pgbackend.codec.attributes import Row
from pgbackend.outbox.appends import Append
from pgbackend.outbox.commits import Commits, Transaction
from pgbackend.outbox.connections import Kind, kind_of, naming_missing_log, no_transaction, unfit
from pgbackend.outbox.synchronous import check_psycopg, is_psycopg_unsure, on_sqlalchemy, psycopg_marker


class Outbox:
    """Appends to one log in callers' transactions, and wakes this process's readers once they have ended."""

    def __init__(self, commits: Commits, *, schema: str) -> None:
        self._commits = commits
        self._schema = schema

    async def append(self, connection: object, rows: Iterable[Row], *, notify: bool) -> None:
        """The rows were inserted in the connection's transaction, in their order. `notify`: it has a NOTIFY as well.

        Raises as `synchronous.execute()` does, and EventError when iterating over the rows raises it.
        """
        append = Append.of(rows, schema=self._schema, notify=notify)
        run = _EXECUTORS.get(kind_of(connection))
        if run is None:
            raise unfit(connection)
        with naming_missing_log(append.schema):
            transaction = await run(connection, append)
        if not notify:
            self._commits.watch(transaction)

    def close(self) -> None:
        """No reader is woken any more."""
        self._commits.close()


async def _on_asyncpg(connection: Any, append: Append) -> Transaction:
    # A closed one raises an error of its own below.
    if not connection.is_closed() and not connection.is_in_transaction():
        raise no_transaction("Open one with `async with connection.transaction():` first.")
    for statement, value in append.steps("$1"):
        await connection.execute(statement, value)
    # A lost connection may still believe that it is in a transaction.
    return Transaction(connection, lambda: connection.is_closed() or not connection.is_in_transaction())


async def _on_psycopg(connection: Any, append: Append) -> Transaction:
    if is_psycopg_unsure(connection):
        async with connection.pipeline() as pipeline:
            await pipeline.sync()
    check_psycopg(connection)
    async with connection.cursor() as cursor:
        for statement, value in append.steps(psycopg_marker(cursor)):
            await cursor.execute(statement, (value,))
    return Transaction(connection, lambda: connection.info.transaction_status.name in ("IDLE", "UNKNOWN"))


async def _on_sqlalchemy(connection: Any, append: Append) -> Transaction:
    await connection.run_sync(on_sqlalchemy, append)
    transaction = connection.sync_connection.get_transaction()
    return Transaction(transaction, lambda: not transaction.is_active)


async def _on_session(session: Any, append: Append) -> Transaction:
    return await _on_sqlalchemy(await session.connection(), append)


_EXECUTORS: dict[Kind | None, Callable[[Any, Append], Awaitable[Transaction]]] = {
    Kind.ASYNCPG: _on_asyncpg,
    Kind.PSYCOPG_ASYNC: _on_psycopg,
    Kind.SQLALCHEMY_ASYNC: _on_sqlalchemy,
    Kind.SESSION_ASYNC: _on_session,
}
