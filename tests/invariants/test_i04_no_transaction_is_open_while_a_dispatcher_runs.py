"""I4. While a dispatcher runs there is no row lock, snapshot or xid, so a slow target holds nothing back."""

import asyncio

import pytest

from pgbackend import Backend, Event
from pgbackend.model import Order
from tests.support.databases import Sql
from tests.support.dispatchers import Catch
from tests.support.events import make_event
from tests.support.polling import eventually

OLDER = """
    SELECT state, query, xact_start, backend_xid, backend_xmin
    FROM pg_stat_activity
    WHERE datname = current_database()
        AND pid <> pg_backend_pid()
        AND (xact_start < $1 OR state LIKE 'idle in transaction%')
"""


@pytest.mark.parametrize("order", ["none", "key", "strict"])
async def test_no_transaction_is_older_than_a_dispatch_that_runs(database: str, sql: Sql, order: Order) -> None:
    began, may_end, quick = asyncio.Event(), asyncio.Event(), Catch()

    async def slow(event: Event) -> None:
        began.set()
        await may_end.wait()

    async with Backend(database, commit_interval=0.02) as backend:
        await backend.subscribe("slow", slow, order=order)
        await backend.subscribe("quick", quick)
        await backend.produce_many([make_event(str(number)) for number in range(20)])
        await began.wait()
        dispatched_at = await sql.fetchval("SELECT clock_timestamp()")

        async def none_is_older() -> bool:
            return not await sql.fetch(OLDER, dispatched_at)

        # The engine's statements are short: those that ran when the dispatch began end before it does.
        await eventually("every transaction is younger than the dispatch", none_is_older)
        # Other subscriptions deliver and commit meanwhile.
        await backend.produce(make_event("meanwhile"))
        await quick.has("meanwhile")

        async def nothing_is_held() -> bool:
            # PostgreSQL reads the two views one after the other, so a session may become idle in between.
            return not await sql.fetch(
                "SELECT mode, relation::regclass FROM pg_locks JOIN pg_stat_activity USING (pid)"
                " WHERE locktype = 'relation' AND datname = current_database() AND state = 'idle'"
            )

        await eventually("no idle session holds a lock", nothing_is_held)
        # A row lock would make this fail. Only the slow subscription's row: the other's may be written just now.
        await sql.execute("SELECT FROM pgbackend.offsets WHERE subscription = 'slow' FOR UPDATE NOWAIT")
        may_end.set()
