"""The transactions of a shard: what a dispatcher does in PostgreSQL is committed together with the offset.

    begin ──▶ the dispatcher ──▶ the offset, fenced ──▶ COMMIT ──▶ settled
      │            │ raises          │ another owner       │ no answer
      ▼            ▼                 ▼                     ▼
    PutOff      rolled back       LeaseLost             LeaseLost: the shard starts again from its durable row

They run one after the other, on a connection of their own. The promise: an event's effects are committed exactly when
the offset that settles it is. When nobody knows whether a COMMIT took place, this worker gives the shard up at once;
its next owner, often the same worker, waits for the row and so finds out.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import replace

from pgbackend import facts
from pgbackend.delivery.committer import Committer
from pgbackend.delivery.delivery import Delivery, Origin
from pgbackend.delivery.offsets import Committed, Offsets
from pgbackend.delivery.outcomes import Finished, LetterDelivered, Outcome, outcome_key
from pgbackend.delivery.registration import complete
from pgbackend.delivery.shard import Mark, Shard
from pgbackend.errors import ConnectionLostError, DatabaseError, PgBackendError
from pgbackend.postgres.connections import Connection, Transaction, is_pooled
from pgbackend.postgres.errors import is_conflict, is_definite, translate
from pgbackend.postgres.pool import STATEMENT_TIMEOUT
from pgbackend.postgres.reconnect import GrowingDelay

_STATEMENT_TIMEOUT = "60s"
"""The longest statement of a dispatcher, unless it says otherwise."""
_IDLE_TIMEOUT = "30s"
"""How long a dispatcher may keep the transaction open without a statement, unless it says otherwise. The locks of a
frozen process must not last."""
_ROLLBACK_TIMEOUT = 0.5
"""Seconds after which the connection is closed instead."""
_COMMIT_TIMEOUT = 60.0
"""Seconds after which a connection that is silent counts as lost, such as a pooler's whose server vanished."""
_MOST_PUT_OFF = 10
"""Transactions in a row whose failure counts for no event: deadlocks and the like, because two shards may always meet
in the same rows, and connections that are lost after the dispatcher has returned."""


class PutOff(Exception):  # noqa: N818 - not a failure of the event
    """Nothing has happened, by no fault of the event: no connection, no offset written, or a conflict with others."""


class LeaseLost(Exception):  # noqa: N818 - not a failure of the event
    """The shard is not this worker's any more, or nobody knows whether the transaction was committed."""


class Transactions:
    """Runs a shard's transactions."""

    def __init__(self, shard: Shard, offsets: Offsets, committer: Committer) -> None:
        self._shard = shard
        self._offsets = offsets
        self._committer = committer
        self._connection: Connection | None = None
        self._delay = GrowingDelay(offsets.database)
        self._put_off = 0
        """Transactions in a row whose failure counted for no event."""

    async def run(
        self, handle: Callable[[Connection], Awaitable[object]], deliveries: Sequence[Delivery], *, are_fresh: bool
    ) -> None:
        """Return once what `handle` did is committed, together with the offset that settles these deliveries.

        `are_fresh`: whether they are the first attempts of events of the log, and nothing is on record about them.
        Raises what `handle` raises, what PostgreSQL says to the commit, PutOff, and LeaseLost. Whatever it raises,
        everything is rolled back, except after a LeaseLost.
        """
        connection = await self._connect()
        transaction = connection.transaction(isolation="read_committed")
        try:
            await self._begin(connection, transaction)
            if (result := await handle(connection)) is not None:
                await complete(result)
            _check_open(connection)
            await self._commit(connection, transaction, deliveries, are_fresh=are_fresh)
        except Exception as error:
            await _roll_back(connection, transaction)
            if is_conflict(error):
                self._put_off_from(error)
            raise
        except BaseException:
            # Its worker ends. PostgreSQL rolls back what a lost connection leaves.
            connection.terminate()
            raise
        self._put_off = 0
        self._delay.reset()

    async def pause(self, error: PutOff) -> None:
        """Return when it is time to begin again."""
        facts.emit(
            "transaction put off", level=self._delay.failed(), failures=self._delay.failures,
            shard=self._shard.name, error=str(error),
        )  # fmt: skip
        await self._delay.wait()

    async def report_lost(self) -> None:
        """Have the worker end this shard's pump. Raises IncarnationChanged when the server lives anew."""
        try:
            # If PostgreSQL is away, others notice a new incarnation when it is back.
            with suppress(DatabaseError):
                await self._offsets.verify_lost()
        finally:
            self._tell_lost()

    async def close(self) -> None:
        """The connection is closed."""
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                await connection.close(timeout=_ROLLBACK_TIMEOUT)
            except Exception:  # noqa: BLE001 - it is lost, and hears no goodbye
                connection.terminate()

    async def _connect(self) -> Connection:
        if self._connection is not None and not self._connection.is_closed():
            return self._connection
        try:
            connection = await self._offsets.database.connect()
            try:
                if not is_pooled(connection):
                    await self._bound(connection, only_this=False)
            except BaseException:
                connection.terminate()
                raise
        except Exception as error:
            raise PutOff(str(translate(error))) from error
        self._connection = connection
        return connection

    async def _begin(self, connection: Connection, transaction: Transaction) -> None:
        try:
            async with asyncio.timeout(STATEMENT_TIMEOUT):
                await transaction.start()
                if is_pooled(connection):
                    # The next transaction may meet another session.
                    await self._bound(connection, only_this=True)
        except Exception as error:
            raise PutOff(str(translate(error))) from error

    async def _bound(self, connection: Connection, *, only_this: bool) -> None:
        await self._offsets.bound_transactions(
            connection, statement=_STATEMENT_TIMEOUT, idle=_IDLE_TIMEOUT, only_this=only_this
        )

    async def _commit(
        self, connection: Connection, transaction: Transaction, deliveries: Sequence[Delivery], *, are_fresh: bool
    ) -> None:
        shard = self._shard
        if shard.outcomes:
            # Errors of other events, which PostgreSQL may refuse: the committer knows what to do then.
            try:
                await self._committer.flush()
            except DatabaseError as error:
                raise PutOff(str(error)) from error
        async with self._committer.apart(shard):
            if shard.lost:
                raise LeaseLost("another worker has it")
            settling = [one.event.position for one in deliveries if one.origin is Origin.LOG]
            before, mark = self._take_mark(settling, deliveries, are_fresh=are_fresh)
            try:
                async with asyncio.timeout(_COMMIT_TIMEOUT):
                    written = await self._offsets.write_in(connection, shard, mark)
            except BaseException as error:
                self._give_back(before)
                if isinstance(error, Exception) and (connection.is_closed() or isinstance(error, TimeoutError)):
                    self._put_off_from(error)
                raise
            if written is None:
                self._give_back(before)
                raise LeaseLost("its row has another owner")
            try:
                async with asyncio.timeout(_COMMIT_TIMEOUT):
                    await transaction.commit()
            except BaseException as error:
                if isinstance(error, Exception) and is_definite(error):
                    self._give_back(before)
                    raise
                # At once: the next mark must not say that these events are open.
                shard.lose()
                if not isinstance(error, Exception):
                    # If only the dispatcher's own task is cancelled, by itself, nobody else tells the worker.
                    self._tell_lost()
                    raise
                raise LeaseLost(f"no answer to COMMIT: {error}") from error
            for position in settling:
                shard.window.settle(position)
            self._committer.apply(Committed(marks={shard: written}, lost=[], kept=[], error=None))

    def _put_off_from(self, error: Exception) -> None:
        """Raise PutOff, unless too many transactions in a row have come to this."""
        if self._put_off < _MOST_PUT_OFF:
            self._put_off += 1
            raise PutOff(str(error) or type(error).__name__) from error

    def _tell_lost(self) -> None:
        self._committer.apply(Committed(marks={}, lost=[self._shard], kept=[], error=None))

    def _take_mark(
        self, settling: Collection[int], deliveries: Sequence[Delivery], *, are_fresh: bool
    ) -> tuple[Mark, Mark]:
        """The mark to commit, without these deliveries and with them."""
        # The committer tells the shard when crashes are forgotten. A rollback could not take that back.
        before = replace(self._shard.take_mark_with(settling), forget_crashes=False)
        if are_fresh:
            return before, before
        ours = {outcome_key(outcome): outcome for outcome in map(_outcome, deliveries)}
        return before, replace(before, outcomes={**before.outcomes, **ours})

    def _give_back(self, before: Mark) -> None:
        """Nothing was committed."""
        self._shard.restore(before)
        self._shard.changed()


async def _roll_back(connection: Connection, transaction: Transaction) -> None:
    """Nothing of the transaction is left. A connection that does not say so is closed."""
    try:
        async with asyncio.timeout(_ROLLBACK_TIMEOUT):
            await transaction.rollback()
    except Exception:  # noqa: BLE001 - lost, or the transaction has ended
        connection.terminate()


def _outcome(delivery: Delivery) -> Outcome:
    if delivery.letter is not None:
        return LetterDelivered(letter=delivery.letter)
    return Finished(position=delivery.event.position)


def _check_open(connection: Connection) -> None:
    """The dispatcher has left the transaction open."""
    if connection.is_closed():
        raise ConnectionLostError("The connection was lost during the transaction. Everything was rolled back.")
    if not connection.is_in_transaction():
        raise PgBackendError(
            "The dispatcher ended the transaction with COMMIT or ROLLBACK. Its commit stays, and the event "
            "counts as failed. Leave the transaction open; `async with connection.transaction()` makes a savepoint."
        )
