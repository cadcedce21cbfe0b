"""The views of the status: they agree with `status()`, and say of the log what is in it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest

from pgbackend import Backend, Retry
from pgbackend.model import SubscriptionStatus
from tests.support.backends import produce, running
from tests.support.databases import Sql, connected, execute, query_rows, query_value
from tests.support.dispatchers import Catch, Gate
from tests.support.polling import eventually

INSERT = "INSERT INTO pgbackend.events (id, source, type) VALUES ($1, '/s', 't')"
RECORDED = """
    INSERT INTO pgbackend.events (id, source, type, recorded_at)
    SELECT 'old', '/s', 't', $1 FROM generate_series(1, $2)"""
HOLES = "SELECT first_position, last_position, subscriptions, application FROM pgbackend.holes ORDER BY 1, 4"


class TestLag:
    async def test_it_says_what_status_says(self, database: str) -> None:
        """The subscriptions run, stopped, are complete, have shards, failed, and lost events."""
        gate, bad = Gate(), Catch(fails=lambda event: event.id in ("2", "3"))
        async with running(database) as backend:
            await produce(backend, *map(str, range(1, 6)))
            await backend.subscribe("waits", gate, start="earliest", shards=2)
            await backend.subscribe("fails", bad, start="earliest", retry=Retry(attempts=2, delay=600))
            await backend.subscribe("ends", Catch(), start="earliest", end=3)
            await backend.subscribe("stopped", Catch(), start=2)
            await backend.unsubscribe("stopped")
            await execute(
                database, "INSERT INTO pgbackend.skipped (subscription, positions) VALUES ('stopped', '[1,3)')"
            )

            async def are_there() -> bool:
                found = {one.name: one for one in (await backend.status()).subscriptions}
                return bool(found["fails"].redeliveries == 2 and found["ends"].complete and found["fails"].lag == 0)

            await eventually("the subscriptions are where they should be", are_there)
            found = (await backend.status()).subscriptions
            rows = await rows_of(database, "lag")
            gate.open()

        assert [row["subscription"] for row in rows] == [one.name for one in found]
        for row, one in zip(rows, found, strict=True):
            assert facts_of(row) == facts_in(one), one.name
        states = {row["subscription"]: row["state"] for row in rows}
        assert states == {"ends": "complete", "fails": "running", "stopped": "stopped", "waits": "running"}

    async def test_events_handled_out_of_order_leave_others_in_flight(self, database: str) -> None:
        gate = Gate()

        async def handle(event: Any) -> None:
            if event.id == "slow":
                await gate(event)

        async with running(database) as backend:
            await backend.subscribe("s", handle)
            await produce(backend, "slow", "quick")

            async def committed() -> bool:
                (one,) = (await backend.status()).subscriptions
                return (one.shards[0].position, one.in_flight, one.lag) == (2, 1, 1)

            await eventually("the slow one is in flight", committed)
            assert await query_value(database, "SELECT pending FROM pgbackend.shard_lag") == 1
            gate.open()

    async def test_what_a_hard_limit_drops_counts_as_skipped_and_not_as_lag(self, database: str) -> None:
        async with Backend(database) as backend:
            await backend.subscribe("s", Catch(), start="earliest")
            await backend.unsubscribe("s")
            await produce(backend, "1", "2")
        async with connected(database) as connection:
            await connection.execute("UPDATE pgbackend.retention SET keep_us = NULL, max_age_us = 1")
            await connection.fetch("SELECT * FROM pgbackend.cut_segment()")
            await connection.execute(INSERT, "3")
            await connection.fetch("SELECT * FROM pgbackend.empty_segment()")
            row = await connection.fetchrow("SELECT lag_events, skipped FROM pgbackend.lag")
        assert tuple(row or ()) == (1, 2)


class TestHoles:
    async def test_an_open_position_is_shown_with_the_appender_that_holds_it(self, database: str) -> None:
        async with appending(database, "slow load"):
            await execute(database, INSERT, "later")
            assert await query_rows(database, HOLES) == [(1, 1, [], "slow load")]
        assert await query_rows(database, HOLES) == []

    async def test_an_appender_alone_in_an_empty_log_holds_all_positions_up_to_the_head(self, database: str) -> None:
        async with appending(database, "first"):
            assert await query_rows(database, HOLES) == [(1, 1, [], "first")]

    async def test_a_position_of_a_rolled_back_append_is_no_hole(self, database: str) -> None:
        """Also while another appender is open, which began too late to have it."""
        await roll_back(database)
        await execute(database, RECORDED, datetime.now(UTC) - timedelta(minutes=1), 1)
        async with appending(database, "later"):
            await execute(database, INSERT, "last")
            assert await query_rows(database, HOLES) == [(3, 3, [], "later")]

    async def test_a_subscription_that_passed_a_hole_is_named(self, database: str) -> None:
        catch = Catch()
        async with running(database, hole_wait=0.05) as backend:
            await backend.subscribe("s", catch, start="earliest")
            async with appending(database, "slow load"):
                await produce(backend, "after")
                await catch.has("after")

                async def passed() -> list[tuple[Any, ...]]:
                    rows = await query_rows(database, HOLES)
                    return rows if rows[0][2] else []

                assert await eventually("the offset has the hole", passed) == [(1, 1, ["s"], "slow load")]

    async def test_events_that_an_offset_has_not_read_yet_are_no_holes(self, database: str) -> None:
        """Altering a subscription leaves positions behind that were not read, whether or not they have events."""
        async with Backend(database) as backend:
            await backend.subscribe("s", Catch())
            await backend.unsubscribe("s")
            await produce(backend, "1")
            await roll_back(database)
            await produce(backend, "3")
        await execute(database, "UPDATE pgbackend.offsets SET position = 3, pending = '{[1,4)}', holes = '{[1,4)}'")
        assert await query_rows(database, HOLES) == [(2, 2, ["s"], None)]

    async def test_positions_that_no_event_ever_had_are_no_holes(self, database: str) -> None:
        """A cut of a segment leaves them behind."""
        await execute(database, INSERT, "1")
        await execute(database, "UPDATE pgbackend.retention SET keep_us = 1")
        await query_rows(database, "SELECT * FROM pgbackend.cut_segment()")
        async with appending(database, "open"):
            await execute(database, INSERT, "2")
            assert await query_rows(database, HOLES) == [(10_000_000, 10_000_000, [], "open")]

    @pytest.mark.direct
    async def test_a_prepared_transaction_is_named_by_its_gid(self, database: str) -> None:
        gid = f"prepared {uuid4()}"
        async with connected(database) as connection:
            await connection.execute("BEGIN; INSERT INTO pgbackend.events (id, source, type) VALUES ('1', '/s', 't')")
            await connection.execute(f"PREPARE TRANSACTION '{gid}'")
            try:
                holes = "SELECT first_position, pid, gid FROM pgbackend.holes"
                assert await query_rows(database, holes) == [(1, None, gid)]
            finally:
                await connection.execute(f"ROLLBACK PREPARED '{gid}'")


class TestRates:
    async def test_events_count_in_the_minute_in_which_they_were_recorded(self, database: str) -> None:
        async with connected(database) as connection:
            now = await minute(connection)
            for ago, count in ((90, 7), (50, 3), (49, 2), (2, 60), (1, 120)):
                await connection.execute(RECORDED, now - timedelta(minutes=ago) + timedelta(seconds=30), count)
            rows = await connection.fetch("SELECT * FROM pgbackend.rates")
        assert len(rows) == 60
        found = {
            (now - row["minute"]) // timedelta(minutes=1): (row["events"], row["events_per_second"])
            for row in rows
            if row["events"]
        }
        assert found == {50: (3, 0.05), 49: (2, 2 / 60), 2: (60, 1.0), 1: (120, 2.0)}

    async def test_positions_that_no_event_ever_had_do_not_count(self, database: str) -> None:
        """Events that were dropped do not count either."""
        async with connected(database) as connection:
            await connection.execute("UPDATE pgbackend.retention SET keep_us = 1")
            now = await minute(connection)
            for ago in (4, 3, 2):
                await connection.execute(RECORDED, now - timedelta(minutes=ago, seconds=-1), 6)
                await connection.fetch("SELECT * FROM pgbackend.cut_segment()")
            await connection.execute(INSERT, "now")
            await connection.fetch("SELECT * FROM pgbackend.empty_segment()")
            counts = await connection.fetch("SELECT events FROM pgbackend.rates WHERE events > 0 AND minute < $1", now)
            rate = await connection.fetchval("SELECT events_per_second FROM pgbackend.log_status")
        assert [row["events"] for row in counts] == [6, 6]
        assert rate == pytest.approx(1 / 60)

    async def test_a_clock_that_was_set_back_makes_no_negative_rate(self, database: str) -> None:
        async with connected(database) as connection:
            now = await minute(connection)
            for ago in (1, 30, 5, 40, 2):
                await connection.execute(RECORDED, now - timedelta(minutes=ago, seconds=-1), 3)
            rows = await connection.fetch("SELECT events FROM pgbackend.rates")
        assert all(0 <= row["events"] <= 15 for row in rows)

    async def test_the_rate_of_an_empty_log_is_zero(self, database: str) -> None:
        status = "SELECT head, events_per_second, segments > 0, bytes_on_disk > 0 FROM pgbackend.log_status"
        assert await query_rows(database, status) == [(0, 0.0, True, True)]
        assert await query_value(database, "SELECT max(events) FROM pgbackend.rates") == 0


class TestWorkers:
    async def test_a_worker_is_shown_with_its_shards_and_whether_it_lives(self, database: str) -> None:
        workers = "SELECT is_alive, subscriptions, shards FROM pgbackend.worker_status ORDER BY heartbeat_seconds"
        async with running(database) as backend:
            await backend.subscribe("s", Catch(), shards=3)

            async def owns_all() -> bool:
                return await query_rows(database, workers) == [(True, ["s"], 3)]

            await eventually("it owns its shards", owns_all)
            await execute(
                database,
                """
                INSERT INTO pgbackend.workers (id, name, lease_timeout, heartbeat_at)
                VALUES (gen_random_uuid(), 'dead', '1 min', now() - interval '2 min')""",
            )
            assert await query_rows(database, workers) == [(True, ["s"], 3), (False, [], 0)]


@asynccontextmanager
async def appending(dsn: str, application: str) -> AsyncIterator[Sql]:
    """A transaction that has appended an event and is open; rolled back at the end."""
    async with connected(dsn, application_name=application) as connection:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute(INSERT, application)
        yield connection
        await transaction.rollback()


async def roll_back(dsn: str) -> None:
    """A position is used up."""
    async with appending(dsn, "rolled back"):
        pass


async def minute(connection: Sql) -> datetime:
    """The minute that it is, by the server's clock."""
    now: datetime = await connection.fetchval("SELECT date_trunc('minute', clock_timestamp())")
    return now


async def rows_of(dsn: str, view: str) -> list[dict[str, Any]]:
    async with connected(dsn) as connection:
        return [dict(row) for row in await connection.fetch(f"SELECT * FROM pgbackend.{view} ORDER BY subscription")]


def facts_of(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the view, without times, which go on."""
    kept = ("ordering", "shards", "owners", "lag_events", "in_flight", "pending", "redeliveries", "dead_letters")
    return {name: row[name] for name in (*kept, "skipped", "last_error")} | {"is_behind": bool(row["lag_seconds"])}


def facts_in(one: SubscriptionStatus) -> dict[str, Any]:
    """The same of what `status()` returned."""
    return {
        "ordering": one.order,
        "shards": len(one.shards),
        "owners": sorted({shard.owner_name for shard in one.shards if shard.owner_name}),
        "lag_events": one.lag,
        "in_flight": one.in_flight,
        "pending": sum(shard.pending for shard in one.shards),
        "redeliveries": one.redeliveries,
        "dead_letters": one.dead_letters,
        "skipped": one.skipped,
        "last_error": one.last_error,
        "is_behind": bool(one.lag_seconds),
    }
