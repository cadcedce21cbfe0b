"""Races between reading the shards of a subscription and writing them back."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import pytest

from pgbackend import Backend, SubscriptionBusyError, SubscriptionNotFoundError
from pgbackend.log.incarnation import IncarnationChanged
from pgbackend.log.log import Log
from pgbackend.model import Order
from pgbackend.postgres.pool import Database
from pgbackend.subscriptions import alterations
from pgbackend.subscriptions.alterations import Alterations
from pgbackend.subscriptions.definitions import Terms
from pgbackend.subscriptions.shards import Change, Shards, Stored
from tests.support.databases import connected, execute, query_rows
from tests.support.dispatchers import Catch
from tests.support.events import make_event
from tests.support.polling import eventually

CLAIM = """
    WITH worker AS (
        INSERT INTO pgbackend.workers (id, name, lease_timeout) VALUES ($1, 'elsewhere', '1 minute')
        ON CONFLICT (id) DO UPDATE SET heartbeat_at = clock_timestamp()
    )
    UPDATE pgbackend.offsets SET owner = $1, epoch = nextval('pgbackend.epochs')"""
RELEASE = "UPDATE pgbackend.offsets SET owner = NULL"
FAIL = """
    WITH moved AS (UPDATE pgbackend.offsets SET position = 5)
    INSERT INTO pgbackend.redeliveries (subscription, position, key_hash, attempt, due_at, last_error)
    SELECT 's', position, pgbackend.key_hash(partitionkey, subject, source, id),
        1, now(), 'no' FROM pgbackend.events WHERE position = 3"""


@dataclass
class Race:
    """Calls that change the subscription `s`, and something that happens between the first one's read and its write."""

    dsn: str
    log: Log
    calls: Alterations
    meanwhile: Callable[[], Awaitable[Any]] | None = None
    patience: float = 20.0
    swaps: list[bool] = field(default_factory=list)
    """Whether each write found what was read."""

    async def alter(self, order: Order = "key", end: int | None = None, start: Any = "latest") -> bool:
        terms = Terms(order=order, end_position=end, end_at=None, start=start)
        return await self.calls.alter("s", terms, patience=self.patience, on_drain=self.release)

    async def reshard(self, shards: int = 2) -> bool:
        return await self.calls.reshard("s", shards, patience=self.patience, on_drain=self.release)

    async def release(self) -> None:
        """As workers do when they are asked to."""
        await execute(self.dsn, RELEASE)

    async def rows(self) -> list[tuple[Any, ...]]:
        return await query_rows(
            self.dsn,
            "SELECT shards, shard, until, position, pending::text FROM pgbackend.offsets ORDER BY shards, shard",
        )

    async def terms(self) -> tuple[Any, ...]:
        (row,) = await query_rows(self.dsn, "SELECT ordering, shards, end_position FROM pgbackend.subscriptions")
        return row

    async def epochs(self) -> list[int]:
        return [row[0] for row in await query_rows(self.dsn, "SELECT epoch FROM pgbackend.offsets ORDER BY 1")]


@pytest.fixture
async def race(backend: Backend, database: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Race]:
    """Ten events, and a subscription of one shard at the log's beginning that no worker runs."""
    await backend.produce_many([make_event(str(number), key=str(number)) for number in range(10)])
    await backend.subscribe("s", Catch(), start="earliest")
    await backend.unsubscribe("s")
    swap = Shards.swap

    async def swap_after_that(self: Shards, stored: Stored, change: Change) -> bool:
        if (meanwhile := found.meanwhile) is not None:
            found.meanwhile = None
            await meanwhile()
        swapped = await swap(self, stored, change)
        found.swaps.append(swapped)
        return swapped

    monkeypatch.setattr(Shards, "swap", swap_after_that)
    opened = Database(database)
    await opened.open()
    log = Log(opened, schema="pgbackend", hole_wait=0.2)
    await log.incarnation.enter()
    found = Race(database, log, Alterations(log, schema="pgbackend"))
    yield found
    await opened.close()


async def test_a_shard_that_a_worker_claims_meanwhile_is_altered_once_it_is_released(race: Race) -> None:
    worker = uuid4()
    owners: list[Any] = []

    async def claim() -> None:
        await execute(race.dsn, CLAIM, worker)

    async def release() -> None:
        owners.extend(await query_rows(race.dsn, "SELECT owner FROM pgbackend.offsets"))
        await execute(race.dsn, RELEASE)

    race.meanwhile = claim
    race.release = release  # type: ignore[method-assign]
    assert await race.alter()

    assert race.swaps == [False, True]
    assert owners == [(worker,)]


async def test_a_shard_that_a_worker_claims_meanwhile_and_keeps_is_not_resharded(race: Race) -> None:
    worker = uuid4()
    race.meanwhile = lambda: execute(race.dsn, CLAIM, worker)
    race.patience = 0.2
    with pytest.raises(SubscriptionBusyError, match="elsewhere"):
        await race.reshard()

    assert race.swaps == [False]
    assert await query_rows(race.dsn, "SELECT shards, owner FROM pgbackend.offsets") == [(1, worker)]


async def test_a_seek_takes_the_shard_from_a_worker_that_claims_it_meanwhile(race: Race) -> None:
    worker = uuid4()

    async def claim() -> None:
        await execute(race.dsn, CLAIM, worker)

    race.meanwhile = claim
    await race.calls.seek("s", 4)

    assert race.swaps == [False, True]
    assert await query_rows(race.dsn, "SELECT position, owner FROM pgbackend.offsets") == [(4, None)]


async def test_an_alteration_sees_the_failure_that_is_committed_meanwhile(race: Race) -> None:
    race.meanwhile = lambda: execute(race.dsn, FAIL)
    assert await race.alter("key")

    assert race.swaps == [False, True]
    assert await race.rows() == [(1, 0, None, 5, "{[3,4)}")]


async def test_a_barrier_is_not_below_an_offset_that_is_committed_meanwhile(race: Race) -> None:
    race.meanwhile = lambda: execute(race.dsn, "UPDATE pgbackend.offsets SET position = 7")
    assert await race.reshard(2)

    assert race.swaps[:2] == [False, True]
    assert await race.rows() == [(2, 0, None, 7, "{}"), (2, 1, None, 7, "{}")]


async def test_a_seek_does_not_care_where_the_shard_is_moved_to_meanwhile(race: Race) -> None:
    race.meanwhile = lambda: execute(race.dsn, FAIL)
    await race.calls.seek("s", 4)

    assert race.swaps == [True]
    assert await race.rows() == [(1, 0, None, 4, "{}")]
    assert await query_rows(race.dsn, "SELECT FROM pgbackend.redeliveries") == []


async def test_of_two_equal_alterations_one_finds_it_done(race: Race) -> None:
    race.meanwhile = race.alter
    before = await race.epochs()
    assert not await race.alter()

    assert race.swaps == [True, False]
    assert (await race.terms())[0] == "key"
    assert await race.epochs() == [before[0] + 1]


async def test_of_two_different_alterations_the_one_that_finds_other_rows_comes_second(race: Race) -> None:
    race.meanwhile = lambda: race.alter("strict", end=7)
    assert await race.alter("key")

    assert race.swaps == [True, False, True]
    assert await race.terms() == ("key", 1, None)


async def test_two_alterations_at_once_without_a_common_process_are_both_made(race: Race) -> None:
    assert all(await asyncio.gather(race.alter("key", end=7), race.alter("strict", end=8)))

    assert await race.terms() in [("key", 1, 7), ("strict", 1, 8)]


async def test_an_alteration_beside_a_reshard_changes_the_new_shards(race: Race) -> None:
    await execute(race.dsn, FAIL)
    race.meanwhile = lambda: race.reshard(2)
    assert await race.alter("key")

    assert await race.terms() == ("key", 2, None)
    ((shard,),) = await query_rows(
        race.dsn,
        "SELECT pgbackend.key_hash(partitionkey, subject, source, id) % 2 FROM pgbackend.events WHERE position = 3",
    )
    assert await race.rows() == [(2, n, None, 5, "{[3,4)}" if n == shard else "{}") for n in range(2)]


async def lag(race: Race) -> None:
    """Two shards of which one lags behind, and four that wait for them."""
    await race.reshard(2)
    await execute(race.dsn, "UPDATE pgbackend.offsets SET position = 8 WHERE shard = 1")
    await race.reshard(4)
    race.swaps.clear()


async def test_a_switch_sees_what_an_alteration_has_made_pending_meanwhile(race: Race) -> None:
    await lag(race)
    await execute(race.dsn, "UPDATE pgbackend.offsets SET position = 8")
    await execute(race.dsn, FAIL.replace("position = 5", "crashes = 0"))
    race.meanwhile = race.alter
    assert await race.calls.switch("s")

    assert race.swaps == [True, False, True]
    ((shard,),) = await query_rows(
        race.dsn,
        "SELECT pgbackend.key_hash(partitionkey, subject, source, id) % 4 FROM pgbackend.events WHERE position = 3",
    )
    assert await race.rows() == [(4, n, None, 8, "{[3,4)}" if n == shard else "{}") for n in range(4)]


async def test_an_alteration_sees_that_the_shards_were_switched_meanwhile(race: Race) -> None:
    await lag(race)
    await execute(race.dsn, "UPDATE pgbackend.offsets SET position = 8")
    race.meanwhile = lambda: race.calls.switch("s")
    assert await race.alter()

    assert await race.terms() == ("key", 4, None)
    assert await race.rows() == [(4, n, None, 8, "{}") for n in range(4)]


async def test_a_switch_is_given_up_when_the_shards_go_back_to_the_old_number_meanwhile(race: Race) -> None:
    await lag(race)
    await execute(race.dsn, "UPDATE pgbackend.offsets SET position = 8")
    race.meanwhile = lambda: race.reshard(2)
    assert not await race.calls.switch("s")

    assert await race.rows() == [(2, 0, None, 8, "{}"), (2, 1, None, 8, "{}")]


async def test_two_workers_that_switch_at_once_do_it_once(race: Race) -> None:
    await lag(race)
    await execute(race.dsn, "UPDATE pgbackend.offsets SET position = 8")
    assert sorted(await asyncio.gather(*(race.calls.switch("s") for _ in range(3)))) == [False, False, True]


async def test_old_shards_that_run_on_do_not_keep_the_waiting_ones_from_being_replaced(race: Race) -> None:
    """They have an owner, and commit between read and write."""
    await lag(race)
    await execute(race.dsn, CLAIM + " WHERE until IS NOT NULL", uuid4())
    race.meanwhile = lambda: execute(race.dsn, "UPDATE pgbackend.offsets SET position = 3 WHERE until > position")
    assert await race.reshard(3)

    assert race.swaps[0]
    assert await race.rows() == [(2, 0, 8, 3, "{}"), (2, 1, 8, 8, "{}"), *((3, n, None, 8, "{}") for n in range(3))]


@pytest.mark.parametrize("call", [Race.alter, Race.reshard, lambda race: race.calls.seek("s", 4)])
async def test_a_client_that_dies_between_read_and_write_blocks_nobody(race: Race, call: Any) -> None:
    reached = asyncio.Event()

    async def die() -> None:
        reached.set()
        await asyncio.Event().wait()

    race.meanwhile = die
    before = [await race.rows(), await race.epochs()]
    dying = asyncio.create_task(call(race))
    await reached.wait()
    # Whatever it had to say in the end, it cannot say any more.
    assert [await race.rows(), await race.epochs()] == before
    assert await query_rows(race.dsn, "SELECT FROM pg_stat_activity WHERE state = 'idle in transaction'") == []
    async with asyncio.timeout(10):
        assert await race.alter("strict")
    dying.cancel()
    await asyncio.wait({dying})


async def test_events_that_are_appended_meanwhile_are_delivered_from_the_place_that_was_found(
    race: Race, backend: Backend
) -> None:
    race.meanwhile = lambda: backend.produce(make_event("new"))
    await race.calls.seek("s", "latest")

    assert race.swaps == [True]
    assert await race.rows() == [(1, 0, None, 10, "{}")]


@pytest.mark.parametrize("call", [Race.alter, Race.reshard, lambda race: race.calls.seek("s", 4)])
async def test_nothing_is_written_in_another_incarnation(race: Race, call: Any) -> None:
    race.meanwhile = lambda: execute(race.dsn, "UPDATE pgbackend.incarnation SET id = gen_random_uuid()")
    before = [await race.rows(), await race.epochs()]
    with pytest.raises(IncarnationChanged):
        await call(race)

    assert [await race.rows(), await race.epochs()] == before


@pytest.mark.parametrize("call", [Race.alter, Race.reshard, lambda race: race.calls.seek("s", 4)])
async def test_a_subscription_that_is_deleted_meanwhile_is_not_found(race: Race, call: Any) -> None:
    race.meanwhile = lambda: execute(race.dsn, "DELETE FROM pgbackend.subscriptions")
    with pytest.raises(SubscriptionNotFoundError):
        await call(race)


async def test_a_subscription_that_is_created_anew_meanwhile_is_altered_as_it_is_now(
    race: Race, backend: Backend
) -> None:
    async def create_anew() -> None:
        await backend.delete_subscription("s")
        await backend.subscribe("s", Catch(), start=6, shards=2)

    race.meanwhile = create_anew
    assert await race.alter()

    assert await race.terms() == ("key", 2, None)
    assert await race.rows() == [(2, n, None, 6, "{}") for n in range(2)]


async def test_a_dead_owner_that_comes_back_meanwhile_has_lost_the_shard(race: Race) -> None:
    worker = uuid4()
    await execute(race.dsn, CLAIM, worker)
    await execute(race.dsn, "UPDATE pgbackend.workers SET heartbeat_at = now() - interval '1 hour'")
    before = await race.epochs()
    race.meanwhile = lambda: execute(race.dsn, "UPDATE pgbackend.workers SET heartbeat_at = now()")
    assert await race.alter()

    assert race.swaps == [True]
    assert await query_rows(race.dsn, "SELECT owner FROM pgbackend.offsets") == [(None,)]
    assert await race.epochs() > before


async def test_a_commit_under_way_when_the_write_begins_comes_first(race: Race, database: str) -> None:
    """It holds the lock of the row, and schedules a failure: the write must not go by the rows from before it."""
    async with connected(database) as owner:
        await owner.execute("BEGIN")
        await owner.execute(FAIL)
        altering = asyncio.create_task(race.alter("key"))
        await eventually("it waits", lambda: query_rows(database, "SELECT FROM pg_locks WHERE NOT granted"))
        await owner.execute("COMMIT")
        await altering

    assert race.swaps == [False, True]
    assert await race.rows() == [(1, 0, None, 5, "{[3,4)}")]


async def test_a_seek_that_always_comes_too_late_gives_up(race: Race, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alterations, "_SEEK_PATIENCE", 0.1)

    async def claim() -> None:
        await execute(race.dsn, CLAIM, uuid4())
        race.meanwhile = claim

    race.meanwhile = claim
    with pytest.raises(SubscriptionBusyError, match="kept changing") as caught:
        await race.calls.seek("s", 4)
    assert caught.value.workers == ("elsewhere",)
