"""Retention: what nobody needs goes, what somebody needs stays, and a hard limit says what it took."""

import asyncio
import os
from collections.abc import AsyncIterator
from datetime import timedelta
from random import Random
from typing import Any

import asyncpg
import pytest

from pgbackend import Backend, ConfigError, Event, Holder, Reject, Retention, Retry
from pgbackend.facts import Recorder
from pgbackend.log.retention import Pass, Retainer
from pgbackend.log.segments import AHEAD_POSITIONS
from pgbackend.model import Order
from tests.support.backends import SOON, complete, dead_letters, produce, running, settled, status_of, waiting
from tests.support.databases import Sql, connected
from tests.support.dispatchers import Catch, Gate
from tests.support.events import make_event
from tests.support.polling import eventually
from tests.support.producers import INSERT

WIDTH = 10_000_000
OFTEN = Retry(attempts=1000, delay=0.05, backoff="constant")
DAY, HOUR = timedelta(days=1), timedelta(hours=1)
ATTACHED = "SELECT lower_bound FROM pgbackend.segments_of('pgbackend.events')"


@pytest.fixture
async def idle(database: str) -> AsyncIterator[Backend]:
    """A backend that no worker runs in: a pass happens when the test makes it."""
    backend = Backend(database, **SOON)
    await backend.init()
    yield backend
    await backend.stop()


def retainer_of(backend: Backend) -> Retainer:
    return backend._lifecycle.opened().retainer


async def make_pass(backend: Backend) -> Pass:
    """A whole pass, also of what does not come with each."""
    retainer = retainer_of(backend)
    retainer._remove_at = retainer._forget_at = 0.0
    return await retainer.run_once()


async def age(sql: Sql, by: timedelta) -> None:
    """So much time has passed for the log."""
    await sql.execute("UPDATE pgbackend.events SET recorded_at = recorded_at - $1::interval", by)
    await sql.execute("UPDATE pgbackend.segments SET dropped_at = dropped_at - $1::interval", by)
    await sql.execute("UPDATE pgbackend.dead_letters SET buried_at = buried_at - $1::interval", by)


async def cut(backend: Backend, sql: Sql) -> None:
    """The first segment is closed and 10 days old."""
    await age(sql, 10 * DAY)
    assert (await make_pass(backend)).cut


async def run_until_settled(database: str, *names: str, **settings: Any) -> None:
    """A worker settles everything that these subscriptions owe. It makes no pass."""
    async with running(database, **settings) as backend:
        for name in names:
            await backend.subscribe(name, Catch())
        for name in names:
            await settled(backend, name)


async def ids(sql: Sql) -> list[str]:
    return [row["id"] for row in await sql.fetch("SELECT id FROM pgbackend.events ORDER BY position")]


# The policy.


async def test_retention_is_stored_with_the_log_and_every_process_reads_it(database: str, idle: Backend) -> None:
    assert await idle.retention() == Retention(keep=7 * DAY, dead_letters=30 * DAY)

    await idle.set_retention(keep=None, max_age=DAY, max_bytes=1 << 30, dead_letters=None)

    async with running(database) as other:
        assert await other.retention() == Retention(max_age=DAY, max_bytes=1 << 30)
        assert (await other.status()).retention == await other.retention()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"keep": timedelta(milliseconds=999)}, "keep is .*expected a timedelta from 1 s to 36,500 days"),
        ({"keep": 7}, "keep is 7"),
        ({"max_age": timedelta(days=36_501)}, "max_age is"),
        ({"max_bytes": (1 << 20) - 1}, "max_bytes is 1048575: expected a whole number from 1048576"),
        ({"max_bytes": True}, "max_bytes is True"),
        ({"dead_letters": timedelta(0)}, "dead_letters is"),
    ],
)
async def test_a_retention_out_of_its_bounds_is_refused(idle: Backend, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        await idle.set_retention(**wrong)
    assert await idle.retention() == Retention(keep=7 * DAY, dead_letters=30 * DAY)


# Cutting.


async def test_nobody_can_cut_a_segment_before_the_policy_says_so(idle: Backend, sql: Sql) -> None:
    await produce(idle, "a")
    await age(sql, timedelta(hours=16))
    assert not (await make_pass(idle)).cut
    await age(sql, HOUR)
    assert (await make_pass(idle)).cut
    assert not (await make_pass(idle)).cut
    await produce(idle, "b")
    assert not (await make_pass(idle)).cut
    assert await sql.fetchval("SELECT max(position) FROM pgbackend.events") == WIDTH


async def test_a_log_that_keeps_everything_is_never_cut(idle: Backend, sql: Sql) -> None:
    await idle.set_retention(keep=None)
    await produce(idle, "a")
    await age(sql, 1000 * DAY)

    assert await make_pass(idle) == Pass()


async def test_a_large_segment_is_cut_however_young_it_is(idle: Backend) -> None:
    await idle.set_retention(keep=None, max_bytes=10 << 20)
    await idle.produce_many([make_event(str(number), data=b"x" * 1000) for number in range(500)])
    assert not (await make_pass(idle)).cut
    await idle.produce_many([make_event(str(number), data=b"x" * 1000) for number in range(1000)])
    assert (await make_pass(idle)).cut


async def test_a_segment_that_began_while_the_clock_was_far_ahead_is_cut_too(idle: Backend, sql: Sql) -> None:
    await produce(idle, "a")
    await age(sql, -365 * DAY)
    await produce(idle, "b")
    assert (await make_pass(idle)).cut


async def test_a_hundred_million_positions_stand_ready_after_each_cut(idle: Backend, sql: Sql) -> None:
    for number in range(5):
        await produce(idle, str(number))
        await age(sql, DAY)
        assert (await make_pass(idle)).cut
        head, until = (await idle.status()).head, (await idle.status()).segments_until
        assert head == (number + 1) * WIDTH - 1
        assert until - head > AHEAD_POSITIONS


async def test_a_cut_waits_until_enough_segments_are_ahead(idle: Backend, sql: Sql) -> None:
    await produce(idle, "a")
    await age(sql, DAY)
    await sql.execute("DROP TABLE pgbackend.events_100000000, pgbackend.events_90000000")

    assert await sql.fetchval("SELECT lower_bound FROM pgbackend.cut_segment()") is None


@pytest.mark.parametrize("left", [1, 2, 1000, 999_999, 1_000_002])
async def test_a_nearly_full_segment_is_cut_too_and_the_sequence_never_goes_back(
    idle: Backend, sql: Sql, left: int
) -> None:
    await produce(idle, "a")
    await age(sql, DAY)
    head = WIDTH - 1 - left
    await sql.execute("SELECT setval('pgbackend.events_position_seq', $1)", head)
    await idle._lifecycle.opened().segments.extend()

    assert (await make_pass(idle)).cut
    assert (await idle.status()).head == WIDTH - 1
    assert await sql.fetchval("SELECT last_position FROM pgbackend.segments") == head


async def test_producers_that_draw_positions_during_cuts_get_each_position_once(database: str, sql: Sql) -> None:
    """In segments of 2,000 positions, where every cut draws the rest."""
    for lower in (row[0] for row in await sql.fetch(ATTACHED)):
        await sql.execute(f"DROP TABLE pgbackend.events_{lower}")
    await sql.execute("CREATE TABLE pgbackend.events_0 PARTITION OF pgbackend.events FOR VALUES FROM (0) TO (2000)")
    await sql.execute("UPDATE pgbackend.retention SET keep_us = 1")
    backend = Backend(database, **SOON)
    await backend.init()
    over = False
    count = 0

    async def insert() -> None:
        nonlocal count
        async with connected(database) as connection:
            while not over:
                await connection.execute(INSERT, "x")
                count += 1

    tasks = [asyncio.create_task(insert()) for _ in range(4)]
    cuts = 0
    while cuts < 10:
        cuts += await retainer_of(backend)._cut()
    over = True
    await asyncio.gather(*tasks)
    await backend.stop()

    assert await sql.fetchval("SELECT count(*) FROM pgbackend.events") == count


async def test_unused_positions_are_no_lag_for_a_subscription_that_nobody_runs(
    database: str, idle: Backend, sql: Sql
) -> None:
    await idle.subscribe("s", Catch())
    await idle.unsubscribe("s")
    await produce(idle, "a", "b", "c")
    await cut(idle, sql)
    await produce(idle, "d")
    assert (await idle.status()).head == WIDTH

    assert (await status_of(idle)).lag == 4


async def test_unused_positions_of_a_cut_that_was_not_committed_are_no_lag_either(
    database: str, idle: Backend, sql: Sql
) -> None:
    await idle.subscribe("s", Catch())
    await idle.unsubscribe("s")
    await produce(idle, "a")
    await age(sql, 10 * DAY)
    async with connected(database) as open_one, connected(database) as cutting:
        transaction = open_one.transaction()
        await transaction.start()
        await open_one.execute(INSERT, "b")
        interrupted = cutting.transaction()
        await interrupted.start()
        await cutting.execute("SELECT pgbackend.cut_segment()")
        await interrupted.rollback()
        await make_pass(idle)
        await transaction.commit()
    # It waits for the appender, whose event would be taken for an unused position.
    assert (await status_of(idle)).lag > WIDTH / 2
    await make_pass(idle)

    assert (await status_of(idle)).lag == 2
    assert await ids(sql) == ["a", "b"]


# Dropping.


async def test_what_every_subscription_has_settled_goes_when_it_is_old(database: str, idle: Backend, sql: Sql) -> None:
    await idle.subscribe("s", Catch())
    await idle.unsubscribe("s")
    await produce(idle, "old")
    await run_until_settled(database, "s")
    await cut(idle, sql)
    await produce(idle, "new")

    found = await make_pass(idle)

    assert (found.emptied, found.removed) == (0, 0), "the cut emptied and removed the first segment in its pass"
    assert await ids(sql) == ["new"]
    assert (await sql.fetch(ATTACHED))[0][0] == WIDTH
    assert (await status_of(idle)).skipped == 0
    assert (await status_of(idle)).lag == 1


async def test_what_is_younger_than_keep_stays(database: str, idle: Backend, sql: Sql) -> None:
    await produce(idle, "a")
    await age(sql, 6 * DAY)
    assert (await make_pass(idle)).cut
    await produce(idle, "b")

    assert await make_pass(idle) == Pass()
    await age(sql, DAY)
    assert await ids(sql) == ["a", "b"]
    assert (await make_pass(idle)).emptied == 1
    assert await ids(sql) == ["b"]


UNSETTLED = {
    "an offset below it": "position = 0",
    "an offset in it": "position = 2",
    "a pending event": "pending = '{[2,3)}'",
    "a pending hole": "pending = '{[1,2)}', holes = '{[1,2)}'",
}


@pytest.mark.parametrize("state", UNSETTLED)
@pytest.mark.parametrize("shards", [1, 3])
async def test_a_segment_stays_as_long_as_one_shard_has_not_settled_it(
    database: str, idle: Backend, sql: Sql, state: str, shards: int
) -> None:
    for name in ("done", "s"):
        await idle.subscribe(name, Catch(), shards=shards)
        await idle.unsubscribe(name)
    await produce(idle, "a", "b", "c")
    async with running(database) as backend:
        for name in ("done", "s"):
            await backend.subscribe(name, Catch(), shards=shards)
            await settled(backend, name)
    settled_as = await sql.fetch(
        "SELECT position FROM pgbackend.offsets WHERE subscription = 's' AND shard = $1", shards - 1
    )
    await sql.execute(
        f"UPDATE pgbackend.offsets SET {UNSETTLED[state]} WHERE subscription = 's' AND shard = $1", shards - 1
    )
    await cut(idle, sql)
    await produce(idle, "new")
    assert not (await make_pass(idle)).emptied
    assert (await idle.status()).holders == (Holder(subscription="s", is_run=False, is_paused=False),)

    await sql.execute(
        """
        UPDATE pgbackend.offsets SET position = $1, pending = '{}', holes = '{}'
        WHERE subscription = 's' AND shard = $2""",
        settled_as[0][0], shards - 1,
    )  # fmt: skip
    assert (await make_pass(idle)).emptied == 1
    assert await ids(sql) == ["new"]
    assert (await idle.status()).holders == ()


async def test_an_old_shard_that_is_at_its_end_needs_nothing_behind_it(idle: Backend, sql: Sql) -> None:
    await idle.subscribe("s", Catch())
    await idle.unsubscribe("s")
    await produce(idle, "a", "b")
    await sql.execute("UPDATE pgbackend.offsets SET position = 1, until = 1")
    await cut(idle, sql)

    assert await ids(sql) == []


async def test_a_complete_subscription_holds_nothing(database: str, idle: Backend, sql: Sql) -> None:
    await idle.subscribe("s", Catch(), start="earliest", end=2)
    await idle.unsubscribe("s")
    await produce(idle, "a", "b", "c")
    async with running(database) as backend:
        await backend.subscribe("s", Catch(), end=2)
        await complete(backend)
    await cut(idle, sql)

    assert await ids(sql) == []


async def test_an_event_that_waits_to_be_tried_again_keeps_its_segment(database: str, idle: Backend, sql: Sql) -> None:
    await idle.subscribe("s", Catch())
    await idle.unsubscribe("s")
    await produce(idle, "a", "b")
    catch = Catch(fails=lambda event: event.id == "a")
    async with running(database) as backend:
        await backend.subscribe("s", catch, retry=OFTEN)
        await waiting(backend, 1)
    await cut(idle, sql)
    assert await ids(sql) == ["a", "b"]

    catch.fails = lambda _: False
    async with running(database) as backend:
        await backend.subscribe("s", catch, retry=OFTEN)
        await settled(backend)
        await make_pass(backend)

    assert sorted(catch.ids) == ["a", "b"]
    assert await ids(sql) == []


UNSETTLED_EVENTS = """
    SELECT event.id
    FROM pgbackend.events AS event
    WHERE EXISTS (
            SELECT
            FROM pgbackend.offsets AS stored
            WHERE stored.completed_at IS NULL
                AND (event.position > stored.position OR stored.pending @> event.position)
        )
        OR EXISTS (SELECT FROM pgbackend.redeliveries AS waiting WHERE waiting.position = event.position)
        OR event.recorded_at > now() - interval '7 days'"""


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
async def test_whatever_subscriptions_owe_no_pass_takes_it(idle: Backend, sql: Sql, seed: int) -> None:
    """Offsets of four subscriptions go forwards and back, with pending events, shards and redeliveries, at random."""
    random = Random(seed)
    for name, shards in (("a", 1), ("b", 3), ("c", 1), ("d", 2)):
        await idle.subscribe(name, Catch(), shards=shards)
        await idle.unsubscribe(name)
    count = dropped = 0
    for _ in range(45):
        for _ in range(random.randrange(3)):
            await produce(idle, str(count), str(count + 1))
            count += 2
        await age(sql, random.choice([timedelta(minutes=1), HOUR, DAY, 3 * DAY]))
        stored = await sql.fetch("SELECT ctid, subscription, position FROM pgbackend.offsets")
        events = [row[0] for row in await sql.fetch("SELECT position FROM pgbackend.events")]
        for row in random.sample(stored, 5):
            place = max(events, default=0) if random.random() < 0.7 else random.choice([*events, row["position"]])
            behind = [position for position in events if position <= place]
            pending = [f"[{p},{p + 1})" for p in behind if random.random() < 0.05 / (1 + len(behind) / 10)]
            await sql.execute(
                "UPDATE pgbackend.offsets SET position = $2, pending = $3::text::int8multirange WHERE ctid = $1",
                row["ctid"], place, f"{{{','.join(pending)}}}",
            )  # fmt: skip
        if events and random.random() < 0.3:
            await sql.execute(
                """
                INSERT INTO pgbackend.redeliveries (subscription, position, key_hash, attempt, due_at, last_error)
                VALUES ($1, $2, 0, 1, now(), '') ON CONFLICT DO NOTHING""",
                random.choice("abcd"), random.choice(events),
            )  # fmt: skip
        if random.random() < 0.3:
            await sql.execute("DELETE FROM pgbackend.redeliveries")
        owed = {row["id"] for row in await sql.fetch(UNSETTLED_EVENTS)}

        dropped += (await make_pass(idle)).emptied

        assert owed <= set(await ids(sql))
    assert dropped > 2


async def test_a_subscription_that_goes_back_gets_what_is_still_there(database: str, idle: Backend, sql: Sql) -> None:
    await idle.subscribe("s", Catch())
    await idle.unsubscribe("s")
    for id_ in ("a", "b", "c"):
        await produce(idle, id_)
        await run_until_settled(database, "s")
        await age(sql, DAY)
        assert (await make_pass(idle)).cut
    await age(sql, 4 * DAY + 12 * HOUR)
    await make_pass(idle)
    assert await ids(sql) == ["b", "c"]

    await idle.seek("s", "earliest")
    await age(sql, 10 * DAY)
    assert not (await make_pass(idle)).emptied
    catch = Catch()
    async with running(database) as backend:
        await backend.subscribe("s", catch)
        found = await settled(backend)

    assert catch.ids == ["b", "c"]
    assert found.skipped == 0


# Beside others.


async def test_a_stranger_that_read_a_segment_delays_that_one_alone_and_no_producer(
    database: str, idle: Backend, sql: Sql
) -> None:
    for id_ in ("a", "b"):
        await produce(idle, id_)
        await age(sql, DAY)
        assert (await make_pass(idle)).cut
    await produce(idle, "c")
    await age(sql, 6 * DAY + 12 * HOUR)
    async with connected(database) as stranger:
        await stranger.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        await stranger.fetch("SELECT * FROM pgbackend.events_0")

        found = await make_pass(idle)

        assert (found.emptied, found.removed) == (1, 1)
        assert await ids(sql) == ["a", "c"]
        await asyncio.wait_for(produce(idle, "d"), 1)
    assert (await make_pass(idle)).emptied == 1
    assert await ids(sql) == ["c", "d"]


async def test_a_snapshot_alone_delays_nothing(database: str, idle: Backend, sql: Sql) -> None:
    await produce(idle, "a")
    await age(sql, 10 * DAY)
    async with connected(database) as stranger:
        await stranger.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        await stranger.fetch("SELECT 1 FROM pg_class")

        found = await make_pass(idle)

    assert (found.cut, found.emptied, found.removed) == (True, 1, 1)


async def test_an_open_appender_delays_its_own_segment_and_the_removal_but_no_producer(
    database: str, idle: Backend, sql: Sql
) -> None:
    async with connected(database) as appender:
        await appender.execute("BEGIN")
        await appender.execute(INSERT, "late")
        await produce(idle, "a")
        await age(sql, DAY)
        assert (await make_pass(idle)).cut
        await produce(idle, "b")
        await age(sql, DAY)
        assert (await make_pass(idle)).cut
        await produce(idle, "c")
        await age(sql, 6 * DAY + 12 * HOUR)

        found = await make_pass(idle)

        assert (found.emptied, found.removed) == (1, 0)
        assert await ids(sql) == ["a", "c"]
        async with asyncio.timeout(5):
            for number in range(20):
                await asyncio.gather(produce(idle, f"more {number}"), make_pass(idle))
        await appender.execute("COMMIT")
    await age(sql, 10 * DAY)
    found = await make_pass(idle)
    assert (await sql.fetch(ATTACHED))[0][0] >= 2 * WIDTH


async def test_an_event_whose_position_was_drawn_before_the_drop_and_inserted_after_it_is_delivered(
    database: str, idle: Backend, sql: Sql
) -> None:
    catch = Catch()
    await produce(idle, "a")
    async with connected(database) as appender:
        # As an appender that is frozen between the two.
        await appender.execute("BEGIN")
        await appender.execute("LOCK TABLE ONLY pgbackend.events IN ROW EXCLUSIVE MODE")
        position = await appender.fetchval("SELECT nextval('pgbackend.events_position_seq')")
        await cut(idle, sql)
        assert await ids(sql) == []
        async with running(database) as backend:
            await backend.subscribe("s", catch, start="latest")
            await produce(backend, "b")
            await catch.has("b")
            await make_pass(backend)
            await appender.execute(
                """
                INSERT INTO pgbackend.events (position, id, source, type)
                OVERRIDING SYSTEM VALUE
                VALUES ($1, 'x', 'x', 'x')""",
                position,
            )
            await make_pass(backend)
            await appender.execute("COMMIT")
            await make_pass(backend)
            await catch.has("x")
            await settled(backend)

    assert catch.ids == ["b", "x"]


@pytest.mark.parametrize("call", ["empty_segment()", "remove_segments(5)"])
async def test_a_transaction_that_sees_an_old_state_may_not_drop_anything(idle: Backend, sql: Sql, call: str) -> None:
    await produce(idle, "a")
    await age(sql, 10 * DAY)
    async with sql.transaction(isolation="repeatable_read"):
        with pytest.raises(asyncpg.InvalidTransactionStateError, match="use READ COMMITTED"):
            await sql.fetch(f"SELECT * FROM pgbackend.{call}")


async def test_workers_that_make_passes_at_once_do_each_thing_once(database: str, sql: Sql) -> None:
    backends = [Backend(database, **SOON) for _ in range(4)]
    for backend in backends:
        await backend.init()
    for number in range(4):
        await produce(backends[0], str(number))
        await age(sql, DAY)
        found = await asyncio.gather(*map(make_pass, backends))
        assert sum(one.cut for one in found) == 1
    await age(sql, 10 * DAY)
    found = [one for _ in range(4) for one in await asyncio.gather(*map(make_pass, backends))]
    for backend in backends:
        await backend.stop()

    assert sum(one.emptied for one in found) == 4
    assert sum(one.removed for one in found) == 4
    assert await ids(sql) == []


# Hard limits.


async def lose_two_of_three(idle: Backend, sql: Sql, limit: dict[str, Any]) -> None:
    """Subscription s has settled "a". "b" and "c" are gone, "d" is there."""
    await idle.set_retention(keep=DAY, **limit)
    await produce(idle, "b", "c")
    await age(sql, 3 * DAY)
    await make_pass(idle)
    await produce(idle, "d")
    await make_pass(idle)


@pytest.mark.parametrize("limit", [{"max_age": 2 * DAY}, {"max_bytes": 1 << 20}])
async def test_a_hard_limit_counts_what_a_subscription_loses_at_once_and_only_once(
    database: str, idle: Backend, sql: Sql, limit: dict[str, Any]
) -> None:
    await idle.subscribe("s", Catch())
    await idle.unsubscribe("s")
    await idle.subscribe("other", Catch())
    await idle.unsubscribe("other")
    await idle.produce_many([make_event("a", data=os.urandom(1_000_000 if "max_bytes" in limit else 1))])
    await run_until_settled(database, "s")
    with Recorder() as recorder:
        await lose_two_of_three(idle, sql, limit)
    assert await ids(sql) == ["d"]

    lost = {str(one["subscription"]): one for one in recorder.all("events dropped before they were settled")}
    assert {name: (one["events"], one["positions"]) for name, one in lost.items()} == {
        "other": (3, "{[1,4)}"),
        "s": (2, "{[2,4)}"),
    }
    before = {one.name: (one.skipped, one.lag) for one in (await idle.status()).subscriptions}
    assert before == {"other": (3, 1), "s": (2, 1)}

    catch = Catch()
    async with running(database) as backend:
        await backend.subscribe("s", catch)
        await backend.subscribe("other", Catch())
        await settled(backend, "s")
        await settled(backend, "other")
        await make_pass(backend)
        after = {one.name: (one.skipped, one.lag) for one in (await backend.status()).subscriptions}

    assert catch.ids == ["d"]
    assert after == {"other": (3, 0), "s": (2, 0)}
    assert await sql.fetchval("SELECT count(*) FROM pgbackend.segments") == 0


async def test_a_running_subscription_that_is_too_slow_loses_what_it_has_not_read_and_says_so(database: str) -> None:
    gate = Gate()
    async with running(database, window_events=2) as backend:
        await backend.subscribe("s", gate, concurrency=1)
        await backend.produce_many([make_event(str(number)) for number in range(5000)])
        await gate.holds(1)
        with Recorder() as recorder:
            await backend.set_retention(keep=timedelta(seconds=1), max_age=timedelta(seconds=1))
            await recorder.wait("segment dropped")
            await backend.set_retention(keep=None)
            gate.open()
            await produce(backend, "last")
            found = await settled(backend)
            skipped = recorder.all("events skipped")

    assert gate.handled[-1] == "last"
    # It had pages of the log in memory.
    assert found.skipped == sum(int(str(one["positions"])) for one in skipped)
    assert found.skipped > 0
    assert len(gate.handled) + found.skipped == 5001


@pytest.mark.parametrize("order", ["none", "key", "strict"])
async def test_what_waits_to_be_tried_again_outlasts_a_hard_limit(
    database: str, idle: Backend, sql: Sql, order: Order
) -> None:
    await idle.set_retention(keep=HOUR, max_age=DAY)
    await idle.subscribe("s", Catch(), order=order)
    await idle.unsubscribe("s")
    await produce(idle, "a", "b", key="k")
    catch = Catch(fails=lambda event: event.id == "a")
    async with running(database) as backend:
        await backend.subscribe("s", catch, order=order, retry=OFTEN)

        async def has_failed() -> bool:
            return bool(await sql.fetchval("SELECT attempt > 0 FROM pgbackend.redeliveries"))

        await eventually("a has failed", has_failed)
    await cut(idle, sql)
    assert await ids(sql) == []
    assert [row[0] for row in await sql.fetch("SELECT id FROM pgbackend.kept_events")] == ["a"]

    catch.fails = lambda _: False
    async with running(database) as backend:
        await backend.subscribe("s", catch, order=order, retry=OFTEN)
        await produce(backend, "c", key="k")
        await catch.has("a", "c")
        found = await settled(backend)
        await make_pass(backend)

    lost = 0 if order == "none" else 1
    assert found.skipped == lost
    assert sorted(catch.ids) == (["a", "b", "c"] if order == "none" else ["a", "c"])
    assert await sql.fetchval("SELECT count(*) FROM pgbackend.kept_events") == 0


async def test_a_kept_copy_that_is_given_up_becomes_a_dead_letter_with_its_content(
    database: str, idle: Backend, sql: Sql
) -> None:
    await idle.set_retention(keep=HOUR, max_age=DAY)
    await idle.subscribe("s", Catch())
    await idle.unsubscribe("s")
    await idle.produce_many([make_event("a", data=b'{"n": 1}')])
    async with running(database) as backend:
        await backend.subscribe("s", Catch(fails=lambda _: True), retry=OFTEN)
        await waiting(backend, 1)
    await cut(idle, sql)
    assert await ids(sql) == []

    def reject(_: Event) -> None:
        raise Reject("no")

    async with running(database) as backend:
        await backend.subscribe("s", reject)
        (letter,) = await dead_letters(backend, 1)

    assert letter.event.id == "a"
    assert letter.event.data_bytes == b'{"n": 1}'


# By hand.


@pytest.mark.owner
@pytest.mark.parametrize(
    "how",
    [
        "TRUNCATE pgbackend.events_0",
        "DROP TABLE pgbackend.events_0",
        "ALTER TABLE pgbackend.events DETACH PARTITION pgbackend.events_0",
    ],
)
async def test_a_segment_that_an_operator_removes_counts_as_dropped_by_a_hard_limit(
    database: str, idle: Backend, sql: Sql, how: str
) -> None:
    await idle.subscribe("s", Catch())
    await idle.unsubscribe("s")
    await produce(idle, "a", "b", "c")
    await age(sql, DAY)
    assert (await make_pass(idle)).cut
    await sql.execute(how)
    with Recorder() as recorder:
        for _ in range(3):
            await make_pass(idle)
        catch = Catch()
        async with running(database) as backend:
            await backend.subscribe("s", catch)
            await produce(backend, "d")
            await catch.has("d")
            found = await settled(backend)
            for _ in range(3):
                await make_pass(backend)

    assert found.skipped == 3
    assert not recorder.all("retention failed")
    assert await sql.fetchval("SELECT count(*) FROM pgbackend.segments") == 0


@pytest.mark.owner
async def test_segments_that_the_sequence_was_moved_past_go_and_nobody_has_lost_anything(
    database: str, idle: Backend, sql: Sql
) -> None:
    await idle.subscribe("s", Catch())
    await idle.unsubscribe("s")
    await produce(idle, "a")
    await sql.execute("SELECT setval('pgbackend.events_position_seq', 35000000)")
    found = await make_pass(idle)
    assert found.emptied == 2
    catch = Catch()
    async with running(database) as backend:
        await backend.subscribe("s", catch)
        await produce(backend, "b")
        await catch.has("b")
        status = await settled(backend)

    assert catch.ids == ["a", "b"]
    assert status.skipped == 0


# Letters and reports.


async def test_old_dead_letters_go_unless_they_are_on_their_way_again(database: str, idle: Backend, sql: Sql) -> None:
    await idle.subscribe("s", Catch())
    await idle.unsubscribe("s")
    await produce(idle, "a", "b", "c")

    def reject(_: Event) -> None:
        raise Reject("no")

    async with running(database) as backend:
        await backend.subscribe("s", reject)
        letters = await dead_letters(backend, 3)
    await idle.redeliver(letters[1].id)
    await age(sql, 29 * DAY)
    assert (await make_pass(idle)).letters == 0
    await age(sql, DAY)
    assert (await make_pass(idle)).letters == 2

    assert [letter.id for letter in await dead_letters(idle)] == [letters[1].id]


async def test_a_subscription_that_nobody_runs_is_named_as_what_holds_the_log(idle: Backend, sql: Sql) -> None:
    await idle.subscribe("abandoned", Catch())
    await idle.unsubscribe("abandoned")
    await produce(idle, "a")
    with Recorder() as recorder:
        await cut(idle, sql)
        await make_pass(idle)

    (report,) = recorder.all("subscription that nobody runs holds the log")
    assert report["subscription"] == "abandoned"
    assert (await idle.status()).holders == (Holder(subscription="abandoned", is_run=False, is_paused=False),)


async def test_a_paused_subscription_is_named_as_what_holds_the_log(database: str, idle: Backend, sql: Sql) -> None:
    async with running(database) as backend:
        await backend.subscribe("s", Catch())
        await backend.pause("s")
        await produce(idle, "a")
        with Recorder() as recorder:
            await cut(idle, sql)
            await make_pass(idle)
            await recorder.wait("paused subscription holds the log", subscription="s")
        assert await ids(sql) == ["a"]
        (holder,) = (await idle.status()).holders
        assert (holder.subscription, holder.is_paused) == ("s", True)
        await backend.resume("s")
        await settled(backend)
        assert (await make_pass(idle)).emptied == 1


# In the long run.


@pytest.mark.slow
async def test_ten_days_with_one_event_a_minute_leave_the_last_seven(idle: Backend, sql: Sql) -> None:
    await idle.subscribe("s", Catch())
    await idle.unsubscribe("s")
    quarter, kept = 6 * 60, 7 * 24 * 60
    segments, rows = [], []
    for number in range(10 * 4):
        await idle.produce_many([make_event(str(number * quarter + minute)) for minute in range(quarter)])
        await sql.execute("UPDATE pgbackend.offsets SET position = (SELECT max(position) FROM pgbackend.events)")
        await age(sql, 6 * HOUR)
        await make_pass(idle)
        segments.append(await sql.fetchval(f"SELECT count(*) FROM ({ATTACHED}) AS found"))
        rows.append(await sql.fetchval("SELECT count(*) FROM pgbackend.events"))

    left = [int(id_) for id_ in await ids(sql)]
    assert left == list(range(left[0], 40 * quarter))
    # Flat from the eighth day on: a segment has at most a tenth of `keep`, and a pass comes every six hours, at the end
    # of which the newest event is six hours old.
    assert all(kept - quarter <= count <= kept + kept // 10 + quarter for count in rows[32:])
    assert max(segments) <= 11 + 13
    found = await status_of(idle)
    assert (found.lag, found.skipped) == (0, 0)
    # Its offset is not behind the unused positions of the last cut.
    assert await sql.fetchval("SELECT count(*) FROM pgbackend.segments") <= 13


@pytest.mark.slow
async def test_a_subscription_that_is_held_for_a_year_makes_few_segments(idle: Backend, sql: Sql) -> None:
    await idle.set_retention(keep=HOUR)
    await idle.subscribe("s", Catch())
    await idle.unsubscribe("s")
    for number in range(150):
        await produce(idle, str(number))
        await age(sql, 3 * DAY)
        await make_pass(idle)

    assert len(await ids(sql)) == 150
    assert await sql.fetchval(f"SELECT count(*) FROM ({ATTACHED}) AS found") < 100


async def test_a_log_that_keeps_a_second_stays_small_and_delivers_each_event_once(database: str, sql: Sql) -> None:
    """Beside producers in plain SQL of which every fifth rolls back, several subscriptions, and a slow appender."""
    catches = {name: Catch() for name in ("one", "sharded", "ordered")}
    over = False
    produced: list[str] = []
    sizes: list[int] = []

    async def insert(number: int) -> None:
        async with connected(database) as connection:
            count = 0
            while not over:
                count += 1
                ids = [f"{number}/{count}/{index}" for index in range(count % 7 + 1)]
                transaction = connection.transaction()
                await transaction.start()
                await connection.executemany(INSERT, [(id_,) for id_ in ids])
                if number == 0:
                    # A slow appender: its transaction stays open over several passes.
                    await asyncio.sleep(0.4)
                if count % 5:
                    await transaction.commit()
                    produced.extend(ids)
                else:
                    await transaction.rollback()
                await asyncio.sleep(0.003)

    async with running(database) as first, running(database) as second:
        await first.set_retention(keep=timedelta(seconds=1))
        for backend in (first, second):
            await backend.subscribe("one", catches["one"])
            await backend.subscribe("sharded", catches["sharded"], shards=3)
            await backend.subscribe("ordered", catches["ordered"], order="key")
        tasks = [asyncio.create_task(insert(number)) for number in range(4)]

        async def is_far() -> bool:
            sizes.append(await sql.fetchval(f"SELECT count(*) FROM ({ATTACHED}) AS found"))
            return bool(await sql.fetchval("SELECT last_value > 150000000 FROM pgbackend.events_position_seq"))

        await eventually("fifteen cuts", is_far, 60, interval=0.1)
        over = True
        await asyncio.gather(*tasks)
        for name in catches:
            found = await settled(first, name)
            assert found.skipped == 0

        async def is_small() -> bool:
            return len(await ids(sql)) < len(produced) / 2

        await eventually("events older than a second are gone", is_small)

    assert max(sizes) < 11 + 40
    for catch in catches.values():
        assert sorted(catch.ids) == sorted(produced)
