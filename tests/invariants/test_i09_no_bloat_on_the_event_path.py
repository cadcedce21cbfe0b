"""I9. `events` gets no update and no delete. Work on `offsets` is per batch, and stays cheap under a held snapshot."""

from typing import Any

import asyncpg
import pytest

from pgbackend import Backend, Retry
from tests.support.dispatchers import Catch
from tests.support.events import make_event
from tests.support.figures import report
from tests.support.polling import eventually


async def statistics(database: str) -> dict[str, Any]:
    """Counters of the log's tables, all segments added up. Sessions report theirs when they end."""
    connection = await asyncpg.connect(database)
    rows = await connection.fetch("""
        SELECT CASE WHEN relname LIKE 'events%' THEN 'events' ELSE relname END AS relname,
            sum(n_tup_ins)::bigint AS inserted, sum(n_tup_upd)::bigint AS updated,
            sum(n_tup_hot_upd)::bigint AS hot, sum(n_tup_del)::bigint AS deleted,
            sum(heap_blks_hit + heap_blks_read)::bigint AS blocks,
            sum(coalesce(seq_scan, 0) + coalesce(idx_scan, 0))::bigint AS scans
        FROM pg_stat_user_tables JOIN pg_statio_user_tables USING (relid, schemaname, relname)
        WHERE schemaname = 'pgbackend'
        GROUP BY 1""")
    await connection.close()
    return {row["relname"]: row for row in rows}


@pytest.mark.direct
async def test_events_are_only_inserted_and_offsets_only_updated_in_place(database: str) -> None:
    catch = Catch(fails=lambda event: event.id.startswith("bad"))
    count = 5000
    async with Backend(database) as backend:
        for order in ("none", "key", "strict"):
            await backend.subscribe(order, catch, order=order, retry=Retry(attempts=2, delay=0.01))
        ids = [str(number) for number in range(count)]
        for start in range(0, count, 100):
            await backend.produce_many([make_event(id_, key=id_) for id_ in ids[start : start + 100]])
        await backend.produce_many([make_event("bad 1"), make_event("bad 2")])

        async def all_handled() -> bool:
            return len(catch.ids) == 3 * count

        await eventually("all are handled", all_handled, 60)

        async def are_buried() -> bool:
            return len([letter async for letter in backend.dead_letters()]) == 6

        await eventually("the bad ones are buried", are_buried)
        await backend.seek("none", 10)
        await eventually("it handles all again", lambda: _reaches(catch, 4 * count - 10), 60)

    found = await statistics(database)
    events, offsets = found["events"], found["offsets"]
    assert (events["inserted"], events["updated"], events["deleted"]) == (count + 2, 0, 0)
    # Now and then a change of owner moves a row to another page.
    assert offsets["hot"] >= 0.9 * offsets["updated"]
    assert offsets["updated"] < 4 * count / 20, "offsets are written per event, not per batch"


async def _reaches(catch: Catch, count: int) -> bool:
    return len(catch.ids) >= count


@pytest.mark.slow
async def test_an_offset_commit_does_not_scan_the_old_versions_that_a_snapshot_holds(database: str) -> None:
    """By key, an update visits every old version that the snapshot keeps. By the last version's ctid it visits none."""
    holder, observer = await asyncpg.connect(database), await asyncpg.connect(database)
    catch = Catch()
    # This makes the offset's row, so that its insert is not part of the measurement.
    async with Backend(database) as backend:
        await backend.subscribe("billing", catch, start="earliest")
    await holder.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    await holder.execute("SELECT count(*) FROM pgbackend.offsets")
    await observer.execute("""
        DO $$ BEGIN
            FOR turn IN 1..5000 LOOP
                UPDATE pgbackend.offsets SET completed_at = NULL;
                COMMIT;
            END LOOP;
        END $$""")
    size = await observer.fetchval("SELECT pg_relation_size('pgbackend.offsets') / 8192")
    await observer.close()
    before = (await statistics(database))["offsets"]
    async with Backend(database, commit_interval=0.001) as backend:
        await backend.subscribe("billing", catch)
        for number in range(300):
            await backend.produce(make_event(str(number)))
            await catch.has(str(number))
    after = (await statistics(database))["offsets"]
    await holder.close()

    commits, scans = after["updated"] - before["updated"], after["scans"] - before["scans"]
    report(
        f"offsets of {size} blocks under a held snapshot: {scans} scans for starting, stopping and {commits} commits"
    )
    assert commits > 30
    # Claims, releases and the rounds once a second scan the whole table. No commit does.
    assert scans < max(20, commits / 2)
