"""I1 beside retention: segments are cut and dropped all the time, and no event goes that a subscription still owes."""

import asyncio
from contextlib import AsyncExitStack
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any

import pytest

from pgbackend import Backend, ProduceUncertainError
from tests.support.backends import SOON, settled
from tests.support.databases import connected
from tests.support.events import make_event
from tests.support.ledger import Ledger
from tests.support.polling import eventually
from tests.support.worker import Worker

SUBSCRIPTIONS: dict[str, dict[str, Any]] = {
    "sharded": {"shards": 3},
    "ordered": {"order": "key"},
    "strict": {"order": "strict"},
}
AT_WORK = r"""
    SELECT pid, query_start
    FROM pg_stat_activity
    WHERE datname = current_database()
        AND pid <> pg_backend_pid()
        AND query ~ 'pgbackend:(cut|empty|remove)_segment'
        AND state <> 'idle'"""


@pytest.mark.slow
@pytest.mark.direct
async def test_killed_workers_and_killed_passes_lose_no_event_of_a_log_that_keeps_a_second(
    database: str, tmp_path: Path
) -> None:
    ledgers = {name: Ledger(tmp_path / name) for name in SUBSCRIPTIONS}
    random = Random(7)
    over = False
    produced: list[str] = []
    passes = 0

    async def produce(backend: Backend, number: int) -> None:
        count = 0
        while not over:
            ids = [f"{number}/{count}/{index}" for index in range(random.choice((1, 1, 5, 40)))]
            count += 1
            try:
                await backend.produce_many([make_event(id_, key=str(count % 7)) for id_ in ids])
                produced.extend(ids)
            except ProduceUncertainError:
                pass
            await asyncio.sleep(0.005)

    async def end_passes() -> None:
        nonlocal passes
        spared: set[tuple[Any, ...]] = set()
        async with connected(database) as connection:
            while not over:
                for step in map(tuple, await connection.fetch(AT_WORK)):
                    # Most steps come to their end, so that segments are cut and dropped nevertheless.
                    if step not in spared and random.random() < 0.25:
                        passes += await connection.fetchval("SELECT pg_terminate_backend($1)::int", step[0])
                    spared.add(step)
                await asyncio.sleep(0.002)

    async with AsyncExitStack() as stack:

        async def start(name: str) -> Worker:
            return await stack.enter_async_context(
                Worker(database, ledgers[name], subscription=name, settings=dict(SOON), **SUBSCRIPTIONS[name])
            )

        backend = Backend(database, **SOON)
        await backend.init()
        stack.push_async_callback(backend.stop)
        await backend.set_retention(keep=timedelta(seconds=1))
        workers = {name: [await start(name), await start(name)] for name in SUBSCRIPTIONS}
        tasks = [asyncio.create_task(produce(backend, number)) for number in range(3)]
        tasks.append(asyncio.create_task(end_passes()))
        for _ in range(5):
            await asyncio.sleep(random.random() * 1.5)
            name = random.choice(list(SUBSCRIPTIONS))
            workers[name][0].kill()
            workers[name] = [workers[name][1], await start(name)]
        over = True
        await asyncio.gather(*tasks)
        async with connected(database) as connection:

            async def is_empty() -> bool:
                oldest: int | None = await connection.fetchval("SELECT min(position) FROM pgbackend.events")
                head: int = await connection.fetchval("SELECT last_value FROM pgbackend.events_position_seq")
                return oldest is None or oldest > head - 10_000_000

            for name in SUBSCRIPTIONS:
                assert (await settled(backend, name, 60)).skipped == 0
            await eventually("what is settled has gone", is_empty)
            cuts = await connection.fetchval("SELECT last_value / 10000000 FROM pgbackend.events_position_seq")

    for ledger in ledgers.values():
        ledger.produced.extend(produced)
        assert ledger.lost() == []
    assert cuts > 5
    assert passes > 0
    assert ledgers["strict"].reordered() == []
