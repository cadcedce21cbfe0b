"""`Backend.skip`: one event becomes a dead letter, whatever its state, and all others go on."""

import asyncio
import random
from collections import Counter
from pathlib import Path

import asyncpg
import pytest

from pgbackend import (
    Backend,
    DeadLetter,
    Event,
    EventNotFoundError,
    EventSettledError,
    Retry,
    SubscriptionBusyError,
    SubscriptionNotFoundError,
)
from pgbackend.log.ranges import RangeSet
from pgbackend.model import Order
from pgbackend.subscriptions.definitions import Definition
from pgbackend.subscriptions.shards import OffsetRow, Stored, StoredShard
from pgbackend.subscriptions.skipping import Standing, skip
from tests.support.backends import dead_letters, failed, produce, running, settled, status_of, worker_of
from tests.support.databases import connected
from tests.support.dispatchers import Catch, Gate
from tests.support.events import make_event
from tests.support.ledger import Ledger
from tests.support.polling import eventually
from tests.support.worker import Worker

ORDERS: tuple[Order, ...] = ("none", "key", "strict")
LATE = Retry(attempts=9, delay=600.0)


def ids(letters: list[DeadLetter]) -> list[str]:
    return [letter.event.id for letter in letters]


@pytest.mark.parametrize("order", ORDERS)
async def test_an_event_that_waits_to_be_tried_again_holds_up_nothing_once_it_is_skipped(
    database: str, order: Order
) -> None:
    catch = Catch(fails=lambda event: event.id == "bad")
    async with running(database) as owner, running(database) as operator:
        await owner.subscribe("s", catch, order=order, retry=LATE)
        await produce(owner, "a", "bad", "c", "d", key="k")
        await failed(owner)

        await operator.skip("s", 2)

        await catch.has("a", "c", "d")
        await settled(owner)
        (letter,) = await dead_letters(owner, 1)
        assert (letter.event.id, letter.failure.attempts) == ("bad", 1)
        assert letter.failure.error.startswith("Skipped by ")
        assert letter.failure.details == {"last_error": "RuntimeError: the target is down"}
        assert Counter(catch.attempts) == {"a": 1, "bad": 1, "c": 1, "d": 1}
        catch.fails = lambda _: False
        await operator.redeliver(letter.id)
        await catch.has("bad")


@pytest.mark.parametrize("order", ORDERS)
async def test_an_unread_event_is_skipped_before_anything_reads_it(database: str, order: Order) -> None:
    catch = Catch()
    async with running(database) as backend:
        await backend.subscribe("s", catch, order=order)
        await backend.unsubscribe("s")
        await produce(backend, *map(str, range(1, 1501)), key="k")
        await backend.skip("s", 1200)
        await backend.skip("s", 3)
        assert ids(await dead_letters(backend, 2)) == ["1200", "3"]

        await backend.subscribe("s", catch, order=order)
        await settled(backend)

    expected = [str(number) for number in range(1, 1501) if number not in (3, 1200)]
    assert (sorted(catch.ids, key=int) if order == "none" else catch.ids) == expected


@pytest.mark.parametrize("order", ["key", "strict"])
async def test_an_event_that_waits_behind_another_one_is_skipped(database: str, order: Order) -> None:
    gate = Gate()
    async with running(database) as backend, running(database) as operator:
        await backend.subscribe("s", gate, order=order)
        await produce(backend, "a", "b", "c", key="k")
        await gate.holds(1)
        skipping = asyncio.create_task(operator.skip("s", 2))
        # The skip waits for the event that is at work.
        await drains(backend)
        gate.open()
        await skipping
        await settled(backend)
        assert ids(await dead_letters(backend, 1)) == ["b"]

    assert gate.handled == ["a", "c"]


async def drains(backend: Backend) -> None:
    """The worker starts no dispatch any more."""
    await eventually("the shard is held", lambda: all(pump.gate.halted for pump in worker_of(backend).pumps))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("handled", [True, False])
async def test_an_attempt_at_work_may_end_and_if_it_handles_the_event_the_skip_says_so(
    database: str, order: Order, handled: bool
) -> None:
    is_at_work, may_end = asyncio.Event(), asyncio.Event()
    attempts: list[str] = []

    async def handle(event: Event) -> None:
        attempts.append(event.id)
        if event.id == "2":
            is_at_work.set()
            await may_end.wait()
            assert handled, "no"

    async with running(database) as backend, running(database) as operator:
        await backend.subscribe("s", handle, order=order, retry=Retry(attempts=5, delay=0.0))
        await produce(backend, "1", "2", "3")
        await is_at_work.wait()
        skipping = asyncio.create_task(operator.skip("s", 2))
        await drains(backend)
        may_end.set()
        if handled:
            with pytest.raises(EventSettledError, match="has settled the event at position 2"):
                await skipping
        else:
            await skipping
        await settled(backend)
        await dead_letters(backend, 0 if handled else 1)

    assert Counter(attempts) == {"1": 1, "2": 1, "3": 1}


@pytest.mark.parametrize("order", ORDERS)
async def test_an_attempt_that_hangs_loses_its_shard_and_counts_for_nothing(database: str, order: Order) -> None:
    may_end, catch = asyncio.Event(), Catch()

    async def hang(event: Event) -> None:
        if event.id == "2":
            await may_end.wait()
        await catch(event)

    async with running(database, drain_timeout=0.3) as hanging:
        await hanging.subscribe("s", hang, order=order)
        await produce(hanging, "1", "2", "3")
        await catch.has("1")

        await hanging.skip("s", 2)
        async with running(database) as other:
            await other.subscribe("s", catch, order=order)
            await settled(other)
            assert ids(await dead_letters(other, 1)) == ["2"]
            may_end.set()
            await catch.has("2", "3")
            # The late result of the attempt is no reason to delete its dead letter.
            assert ids(await dead_letters(other, 1)) == ["2"]


async def test_a_transaction_that_hangs_is_rolled_back_when_its_event_is_skipped(database: str) -> None:
    is_at_work, may_end = asyncio.Event(), asyncio.Event()
    async with connected(database) as owner:
        await owner.execute("CREATE TABLE effects (id text)")
        await owner.execute("GRANT ALL ON effects TO PUBLIC")

        async def handle(event: Event, connection: "asyncpg.Connection[asyncpg.Record]") -> None:
            await connection.execute("INSERT INTO effects (id) VALUES ($1)", event.id)
            if event.id == "1":
                is_at_work.set()
                await may_end.wait()

        async with running(database, drain_timeout=0.3) as backend:
            await backend.subscribe("s", handle, transactional=True)
            await produce(backend, "1", "2")
            await is_at_work.wait()
            await backend.skip("s", 1)
            may_end.set()
            await settled(backend)
            assert ids(await dead_letters(backend, 1)) == ["1"]
        assert [row["id"] for row in await owner.fetch("SELECT id FROM effects")] == ["2"]


async def test_positions_without_an_event_and_settled_events_are_refused(database: str) -> None:
    catch = Catch(fails=lambda event: event.id == "bad")
    async with running(database) as backend:
        await backend.subscribe("s", catch, retry=Retry(attempts=1))
        async with connected(database) as connection:
            await connection.execute("SELECT nextval('pgbackend.events_position_seq')")
        await produce(backend, "handled", "bad")
        await settled(backend)
        for position, error in (
            (1, EventNotFoundError), (2, EventSettledError), (3, EventSettledError), (4, EventNotFoundError),
        ):  # fmt: skip
            with pytest.raises(error):
                await backend.skip("s", position)
        with pytest.raises(SubscriptionNotFoundError):
            await backend.skip("other", 2)
        assert len(await dead_letters(backend, 1)) == 1


async def test_of_two_operators_one_skips_the_event_and_the_other_hears_that_it_is_settled(database: str) -> None:
    async with running(database) as backend, running(database) as other:
        await backend.subscribe("s", Catch(fails=lambda event: event.id == "bad"), order="strict", retry=LATE)
        await produce(backend, "bad", "next")
        await failed(backend)

        results = await asyncio.gather(backend.skip("s", 1), other.skip("s", 1), return_exceptions=True)

        assert sorted(type(result).__name__ for result in results) == ["EventSettledError", "NoneType"]
        await settled(backend)
        assert ids(await dead_letters(backend, 1)) == ["bad"]


async def test_a_handler_skips_its_own_event_and_what_it_does_then_counts(database: str) -> None:
    async with running(database) as backend:

        async def handle(event: Event) -> None:
            if event.attempt == 1:
                await backend.skip("s", event.position)
                raise RuntimeError("no")

        await backend.subscribe("s", handle, order="strict", retry=LATE)
        await produce(backend, "a", "b")
        assert ids(await dead_letters(backend, 2)) == ["a", "b"]
        await settled(backend)


@pytest.mark.parametrize("order", ORDERS)
async def test_among_random_skips_and_failures_every_event_is_handled_or_a_dead_letter(
    database: str, order: Order
) -> None:
    chance = random.Random(order)
    handled: list[Event] = []

    async def flaky(event: Event) -> None:
        await asyncio.sleep(0.001)
        if int(event.id) % 7 == 0 and event.attempt < 3:
            raise RuntimeError("not yet")
        handled.append(event)

    async with running(database) as one, running(database) as other:
        shards = 1 if order == "strict" else 2
        for backend in (one, other):
            await backend.subscribe("s", flaky, order=order, shards=shards, retry=Retry(attempts=9, delay=0.01))
        await one.produce_many([make_event(str(number), key=str(number % 5)) for number in range(1, 61)])
        skipped = []
        for _ in range(4):
            position = chance.randrange(1, 61)
            try:
                await chance.choice([one, other]).skip("s", position)
            except EventSettledError:
                continue
            skipped.append(str(position))
        await settled(one)
        letters = ids(await dead_letters(one, len(skipped)))

    assert sorted(letters) == sorted(skipped)
    positions = Counter(event.id for event in handled)
    assert positions.keys() | set(skipped) == {str(number) for number in range(1, 61)}
    assert not positions.keys() & set(skipped)
    # Nothing was at work for too long, so no shard was taken from its worker.
    assert set(positions.values()) == {1}
    if order != "none":
        for key in range(5):
            lane = [event.position for event in handled if order == "strict" or int(event.id) % 5 == key]
            assert lane == sorted(lane)


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
async def test_an_event_whose_owner_is_killed_at_work_is_skipped_and_never_comes_again(
    database: str, tmp_path: Path, order: Order
) -> None:
    ledger = Ledger(tmp_path / "ledger")
    async with running(database, lease_timeout=2.0) as operator:
        await produce(operator, "1", "2", "3")
        async with Worker(
            database, ledger, subscription="s", order=order, delay=60.0, settings={"lease_timeout": 2.0}
        ) as worker:

            async def is_owned() -> bool:
                return (await status_of(operator)).shards[0].owner_name is not None

            await eventually("the worker has the shard", is_owned)
            worker.kill()
        await operator.skip("s", 1)
        catch = Catch()
        await operator.subscribe("s", catch, order=order)
        await settled(operator)
        assert ids(await dead_letters(operator, 1)) == ["1"]

    assert sorted(catch.ids) == ["2", "3"]


def stored(*rows: OffsetRow) -> Stored:
    return Stored(
        definition=Definition(name="s", order="key", shards=rows[-1].shards, end_position=None, end_at=None),
        version="1",
        incarnation="1",
        shards=[StoredShard(row=row, epoch=1, version="1", free=True) for row in rows],
    )


def offset(*, position: int, pending: RangeSet | None = None, shards: int = 1, until: int | None = None) -> OffsetRow:
    pending = pending or RangeSet()
    return OffsetRow(shards=shards, shard=0, position=position, pending=pending, holes=pending, until=until)


OWED = Standing(is_redacted=False, key_hash=0, is_waiting=False)
WAITING = Standing(is_redacted=False, key_hash=0, is_waiting=True)


def test_what_lies_unread_below_the_event_stays_owed() -> None:
    _, row = skip(stored(offset(position=5, pending=RangeSet([(2, 4)]))), 9, OWED)

    assert (row.position, list(row.pending), list(row.holes)) == (9, [(2, 4), (6, 9)], [(2, 4), (6, 9)])


def test_while_the_number_of_shards_changes_the_old_shard_owes_the_event_up_to_the_barrier_and_nobody_behind_it() -> (
    None
):
    changing = stored(offset(position=5, until=8), offset(position=8, shards=2))

    shard, row = skip(changing, 7, OWED)
    assert (shard.row.until, row.position, list(row.pending)) == (8, 7, [(6, 7)])
    for standing in (OWED, WAITING):
        with pytest.raises(SubscriptionBusyError, match="belongs to the new shards"):
            skip(changing, 9, standing)
    with pytest.raises(EventSettledError):
        skip(changing, 4, OWED)
    assert skip(changing, 4, WAITING)[1] == changing.old[0].row
