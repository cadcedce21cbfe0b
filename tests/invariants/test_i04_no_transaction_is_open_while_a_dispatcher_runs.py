"""I4. No row lock, no snapshot, no xid: a slow target never holds back vacuum or another subscription."""

import asyncio

import asyncpg
import pytest

from pgbackend import Backend, Event
from pgbackend.model import Order
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
async def test_while_a_dispatcher_runs_no_transaction_is_older_than_its_dispatch(database: str, order: Order) -> None:
    began, may_end, quick = asyncio.Event(), asyncio.Event(), Catch()

    async def slow(event: Event) -> None:
        began.set()
        await may_end.wait()

    observer = await asyncpg.connect(database)
    async with Backend(database, commit_interval=0.02) as backend:
        await backend.subscribe("slow", slow, order=order)
        await backend.subscribe("quick", quick)
        await backend.produce_many([make_event(str(number)) for number in range(20)])
        await began.wait()
        dispatched_at = await observer.fetchval("SELECT clock_timestamp()")

        async def none_is_older() -> bool:
            return not await observer.fetch(OLDER, dispatched_at)

        # Statements of the engine come and go; none of those that ran when the dispatch began outlives it.
        await eventually("every transaction is younger than the dispatch", none_is_older)
        # Nor does one of those that the engine makes meanwhile: others deliver and commit.
        await backend.produce(make_event("meanwhile"))
        await quick.has("meanwhile")

        async def nothing_is_held() -> bool:
            # Both views are looked at one after the other, so that a lock may be seen of who is idle a moment later.
            return not await observer.fetch(
                "SELECT mode, relation::regclass FROM pg_locks JOIN pg_stat_activity USING (pid)"
                " WHERE locktype = 'relation' AND datname = current_database() AND state = 'idle'"
            )

        await eventually("nothing is locked by who is idle", nothing_is_held)
        # A row lock would make this fail. The other's row may just be written.
        await observer.execute("SELECT FROM pgbackend.offsets WHERE subscription = 'slow' FOR UPDATE NOWAIT")
        may_end.set()
    await observer.close()
