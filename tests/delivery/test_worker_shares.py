"""Workers share the shards of what they run: at joins, leaves and deaths, and not otherwise."""

import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from pgbackend import Backend, Event, Retry
from pgbackend.delivery.claims import Claims
from pgbackend.facts import Recorder
from tests.support.backends import worker_of
from tests.support.dispatchers import Catch, Gate
from tests.support.events import make_event
from tests.support.ledger import Ledger
from tests.support.polling import eventually
from tests.support.worker import Worker

SETTINGS: dict[str, Any] = {"commit_interval": 0.01, "poll_interval": 0.2, "lease_timeout": 60.0}


async def counts(observer: "asyncpg.Connection[asyncpg.Record]") -> list[int]:
    """How many shards each of the workers that are alive has, fewest first."""
    rows = await observer.fetch(
        "SELECT count(epoch) AS shards FROM pgbackend.living_workers AS worker "
        "LEFT JOIN pgbackend.offsets ON owner = worker.id GROUP BY worker.id"
    )
    return sorted(row["shards"] for row in rows)


async def shared(observer: "asyncpg.Connection[asyncpg.Record]", *expected: int, timeout: float = 20.0) -> None:
    async def as_expected() -> bool:
        return await counts(observer) == sorted(expected)

    try:
        await eventually(f"the workers have {expected} shards", as_expected, timeout)
    except TimeoutError as error:
        raise TimeoutError(f"{error}; they have {await counts(observer)}") from None


async def test_who_joins_gets_its_share_and_who_leaves_leaves_it_to_the_others(database: str) -> None:
    observer = await asyncpg.connect(database)
    catch = Catch()
    ids = [str(number) for number in range(400)]
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(Backend(database, **SETTINGS))
        await first.subscribe("s", catch, start="earliest", shards=8)
        await shared(observer, 8)

        async def produce() -> None:
            for id_ in ids:
                await first.produce(make_event(id_, key=id_))

        producing = asyncio.create_task(produce())
        others = [Backend(database, **SETTINGS) for _ in range(2)]
        for other in others:
            await other.init()
            await other.subscribe("s", catch, shards=8)
        running = [asyncio.create_task(other.start()) for other in others]
        await shared(observer, 2, 3, 3)
        await others[0].stop()
        await shared(observer, 4, 4)
        await others[1].stop()
        await shared(observer, 8)
        await producing
        await catch.has(*ids)
        await asyncio.gather(*running)
    await observer.close()

    assert Counter(catch.ids).most_common(1)[0][1] == 1, "giving up a shard repeated an event"


async def test_subscriptions_with_a_single_shard_are_shared_out_as_well(database: str) -> None:
    observer = await asyncpg.connect(database)
    async with Backend(database, **SETTINGS) as one, Backend(database, **SETTINGS) as two:
        for name in "abcdef":
            await one.subscribe(name, Catch())
        for name in "abcdef":
            await two.subscribe(name, Catch())
        await shared(observer, 3, 3)
    await observer.close()


async def test_each_gets_what_it_can_run(database: str) -> None:
    observer = await asyncpg.connect(database)
    async with Backend(database, **SETTINGS) as one, Backend(database, **SETTINGS) as two:
        await one.subscribe("s", Catch(), shards=4)
        await two.subscribe("t", Catch(), shards=2)
        await shared(observer, 4, 2)
        await two.subscribe("s", Catch(), shards=4)
        await shared(observer, 3, 3)
        await two.unsubscribe("s")
        await shared(observer, 4, 2)
    await observer.close()


async def test_once_shards_are_shared_nothing_moves(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds: Counter[Claims] = Counter()
    run_round = Claims.run_once

    async def counted(self: Claims) -> None:
        await run_round(self)
        rounds[self] += 1

    monkeypatch.setattr(Claims, "run_once", counted)
    observer = await asyncpg.connect(database)
    async with AsyncExitStack() as stack:
        for _ in range(3):
            backend = await stack.enter_async_context(Backend(database, **SETTINGS))
            await backend.subscribe("s", Catch(), shards=7)
        await shared(observer, 2, 2, 3)

        async def asks() -> list[Any]:
            return [
                *await observer.fetch("SELECT subscription, shard, epoch FROM pgbackend.offsets ORDER BY 1, 2"),
                *await observer.fetch("SELECT id, asked_at FROM pgbackend.workers ORDER BY 1"),
            ]

        async def nobody_asks() -> bool:
            return not await observer.fetchval("SELECT count(asked_at) FROM pgbackend.workers")

        await eventually("nobody asks for more", nobody_asks)
        before, seen = await asks(), dict(rounds)

        async def looked_often() -> bool:
            return all(rounds[worker] >= count + 8 for worker, count in seen.items())

        await eventually("all have looked several times", looked_often)
        assert await asks() == before
    await observer.close()


async def test_a_shard_is_given_up_once_what_is_at_work_there_has_ended(database: str) -> None:
    observer = await asyncpg.connect(database)
    gate, catch = Gate(), Catch()
    async with Backend(database, **SETTINGS) as one, Backend(database, **SETTINGS) as two:
        await one.subscribe("s", gate, start="earliest", shards=2, concurrency=5)
        await one.produce_many([make_event(str(number), key=str(number)) for number in range(40)])
        await gate.holds(10)
        with Recorder() as recorder:
            await two.subscribe("s", catch, shards=2)

            async def is_asked() -> bool:
                return bool(await observer.fetchval("SELECT count(asked_at) FROM pgbackend.workers"))

            await eventually("the second one asks", is_asked)
            # The other shard goes on meanwhile.
            await two.produce(make_event("late", key="late"))
            assert await counts(observer) == [0, 2]
            assert recorder.all("lease released") == []
            gate.open()
            await shared(observer, 1, 1)

            async def all_handled() -> bool:
                return len(gate.handled) + len(catch.ids) == 41

            await eventually("all are handled", all_handled)
    await observer.close()

    assert sorted(gate.handled + catch.ids) == sorted([*(str(number) for number in range(40)), "late"])


async def test_who_lost_a_shard_neither_takes_it_anew_nor_asks_for_it_while_something_is_at_work_there(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    observer = await asyncpg.connect(database)
    gate, rounds, run_round = Gate(), Counter[Claims](), Claims.run_once

    async def counted(self: Claims) -> None:
        await run_round(self)
        rounds[self] += 1

    monkeypatch.setattr(Claims, "run_once", counted)
    async with Backend(database, **SETTINGS) as one, Backend(database) as operator:
        await one.subscribe("s", gate, start="earliest", order="key")
        await operator.produce_many([make_event(str(number), key="k") for number in range(3)])
        await gate.holds(1)
        with Recorder() as recorder:
            await operator.seek("s", "earliest")
            await recorder.wait("lease lost")
            lost_at = rounds.copy()

            async def looked_often() -> bool:
                return rounds[worker_of(one)._claims] >= lost_at[worker_of(one)._claims] + 4

            await eventually("it has looked several times", looked_often)
            assert gate.waiting == ["0"], "two of a key are at work at once"
            assert recorder.all("lease claimed") == []
            assert await observer.fetchval("SELECT count(asked_at) FROM pgbackend.workers") == 0
            gate.open()
            await recorder.wait("lease claimed")
    await observer.close()


async def test_a_shard_that_its_worker_does_not_take_is_not_left_lying(database: str) -> None:
    """Somebody is alive, by its heartbeat, and hangs."""
    observer = await asyncpg.connect(database)
    await observer.execute(
        "INSERT INTO pgbackend.workers (id, name, lease_timeout, subscriptions) VALUES ($1, 'hangs', '1 hour', '{s}')",
        uuid4(),
    )
    async with Backend(database, **SETTINGS) as backend:
        await backend.subscribe("s", Catch(), shards=4)
        await shared(observer, 0, 4)
    await observer.close()


@pytest.mark.slow
async def test_the_shards_of_a_killed_process_are_shared_out_within_two_seconds(database: str, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    observer = await asyncpg.connect(database)
    options: dict[str, Any] = {"shards": 6, "order": "key"}
    async with AsyncExitStack() as stack:
        workers = [
            await stack.enter_async_context(Worker(database, ledger, settings=dict(SETTINGS), **options))
            for _ in range(3)
        ]
        await shared(observer, 2, 2, 2)
        workers[0].kill()
        await workers[0].process.wait()
        await shared(observer, 3, 3)
        producer = await stack.enter_async_context(Backend(database))
        ids = [str(number) for number in range(60)]
        await producer.produce_many([make_event(id_, key=id_) for id_ in ids])
        ledger.produced += ids

        async def all_handled() -> bool:
            return not ledger.lost()

        await eventually("all are handled", all_handled)
        # They commit what they have handled. A kill could come before that, and the next owner would repeat it.
        for worker in workers[1:]:
            await worker.stop()
    await observer.close()

    assert ledger.doubled() == {}
    assert {handling.worker for handling in ledger.handled()} == {worker.pid for worker in workers[1:]}


async def test_failed_events_follow_their_shard(database: str) -> None:
    """The owner of its shard at that time retries an event that waits, and knows its attempts."""
    observer = await asyncpg.connect(database)
    seen: list[tuple[str, int]] = []

    def dispatcher(name: str) -> Any:
        async def handle(event: Event) -> None:
            seen.append((name, event.attempt))
            if event.attempt == 1:
                raise RuntimeError("not yet")

        return handle

    # Fewer than it takes for a target to count as down.
    retry = Retry(delay=0.5, backoff="constant")
    keys = [str(number) for number in range(8)]
    async with Backend(database, **SETTINGS) as one, Backend(database, **SETTINGS) as two:
        await one.subscribe("s", dispatcher("one"), start="earliest", shards=4, order="key", retry=retry)
        await one.produce_many([make_event(key, key=key) for key in keys])

        async def all_failed() -> bool:
            return bool(await observer.fetchval("SELECT count(*) = 8 FROM pgbackend.redeliveries"))

        await eventually("all have failed once", all_failed)
        await two.subscribe("s", dispatcher("two"), shards=4, order="key", retry=retry)

        async def all_settled() -> bool:
            return bool(
                await observer.fetchval("SELECT bool_and(position = 8 AND isempty(pending)) FROM pgbackend.offsets")
            )

        await eventually("all are settled", all_settled)
    await observer.close()

    assert Counter(attempt for _, attempt in seen) == {1: 8, 2: 8}
