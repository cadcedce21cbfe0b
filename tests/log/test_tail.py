import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast
from unittest.mock import patch

import pytest

from pgbackend.log import reader as reader_module
from pgbackend.log.log import Log
from pgbackend.log.notify import Wakeup
from pgbackend.log.ranges import RangeSet
from pgbackend.log.tail import Cursor, Tail
from tests.support.simulated_log import HOLE_WAIT, Account, SimulatedLog

PAGE = 3
EVENT_BYTES = 700


@asynccontextmanager
async def tail_of(log: SimulatedLog, *, buffer_events: int = 10, poll_interval: float = 0.001) -> AsyncIterator[Tail]:
    """A tail that runs."""
    tail = Tail(cast("Log", log), Wakeup(), poll_interval=poll_interval, buffer_bytes=buffer_events * EVENT_BYTES)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(tail.run())
        try:
            yield tail
        finally:
            running.cancel()


class Taker:
    """A subscription behind a cursor."""

    def __init__(
        self, tail: Tail, log: SimulatedLog, *, after: int, holes: RangeSet, strict: bool, hashes: bool = False
    ) -> None:
        self.account = Account(log, position=after, strict=strict)
        self.account.holes = holes
        self.cursor: Cursor = tail.cursor(after=after, strict=strict, hashes=hashes)

    async def take(self) -> None:
        batch = await self.cursor.next(self.account.holes)
        if self.cursor.hashes:
            new = [
                one for one in batch.events if one.position > self.cursor.position or one.position in self.account.holes
            ]
            assert all(event.key_hash for event in new)
        self.account.take(batch.positions, batch.opened, batch.closed, batch.upto)
        self.cursor.advance(batch.upto)

    async def has_all(self) -> bool:
        log = self.account.log
        return set(log.visible) <= set(self.account.seen) and not self.account.holes


@pytest.mark.parametrize("seed", range(60))
async def test_cursors_that_move_between_streams_lose_repeat_and_misorder_nothing(seed: int) -> None:
    """Appenders, readers and cursors of every pace take turns at random. Cursors fall behind, and join others again."""
    chance = random.Random(seed)
    log = SimulatedLog(page=PAGE, step=lambda: asyncio.sleep(0))

    async def act() -> None:
        for _ in range(400):
            log.act(chance.randrange(10), chance.randrange(10))
            if chance.random() < 0.05:
                log.now += HOLE_WAIT / 2
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(0)
        log.settle_down()

    async def follow(taker: Taker, pace: int) -> None:
        while True:
            await taker.take()
            for _ in range(chance.randrange(pace)):
                await asyncio.sleep(0)

    takers: list[Taker] = []
    with patch.object(reader_module, "_OPEN_HOLE_POLL", 0.001):
        async with tail_of(log) as tail, asyncio.TaskGroup() as tasks:
            following = []
            for number in range(6):
                taker = Taker(tail, log, after=0, holes=RangeSet(), strict=number % 3 == 2, hashes=number % 2 == 1)
                takers.append(taker)
                following.append(tasks.create_task(follow(taker, (1, 10, 60)[number // 2])))
            await act()
            async with asyncio.timeout(30):
                for taker in takers:
                    while not await taker.has_all():
                        await asyncio.sleep(0.001)
            for task in following:
                task.cancel()
            for taker in takers:
                taker.cursor.close()
    for taker in takers:
        assert sorted(taker.account.seen) == sorted(log.visible)


async def test_cursors_at_one_place_share_a_stream_and_its_pages() -> None:
    log = SimulatedLog(step=lambda: asyncio.sleep(0))
    async with tail_of(log) as tail:
        takers = [Taker(tail, log, after=0, holes=RangeSet(), strict=False) for _ in range(5)]
        log.append()
        async with asyncio.timeout(30):
            await asyncio.gather(*(taker.take() for taker in takers))
        assert len(tail._streams) == 1
        for taker in takers:
            taker.cursor.close()
        assert tail._streams == []


async def test_a_cursor_that_needs_hashes_shares_a_stream_without_from_the_next_page_on() -> None:
    log = SimulatedLog(page=PAGE, step=lambda: asyncio.sleep(0))
    for _ in range(5):
        log.append()
    async with tail_of(log) as tail, asyncio.TaskGroup() as tasks, asyncio.timeout(30):
        plain = Taker(tail, log, after=0, holes=RangeSet(), strict=False)
        while not await plain.has_all():
            await plain.take()
        late = Taker(tail, log, after=0, holes=RangeSet(), strict=False, hashes=True)
        while not await late.has_all():
            await late.take()
        waiting = [tasks.create_task(taker.take()) for taker in (plain, late)]
        while len(tail._streams) > 1:
            await asyncio.sleep(0)
        log.append()
        await asyncio.gather(*waiting)
        assert await plain.has_all()
        assert await late.has_all()
        for taker in (plain, late):
            taker.cursor.close()


async def test_a_cursor_that_falls_behind_reads_for_itself_and_rejoins() -> None:
    log = SimulatedLog(page=PAGE, step=lambda: asyncio.sleep(0))
    for _ in range(40):
        log.append()
    async with tail_of(log, buffer_events=6) as tail, asyncio.TaskGroup() as tasks:
        quick, slow = (Taker(tail, log, after=0, holes=RangeSet(), strict=False) for _ in range(2))
        async with asyncio.timeout(30):
            await asyncio.gather(slow.take(), quick.take())
            while not await quick.has_all():
                await quick.take()
            assert len(tail._streams) == 1
            most = 0
            while not await slow.has_all():
                await slow.take()
                most = max(most, len(tail._streams))
            assert most == 2
            waiting = tasks.create_task(slow.take())
            while len(tail._streams) > 1:
                await asyncio.sleep(0)
        waiting.cancel()
        quick.cursor.close()
        slow.cursor.close()


async def test_a_cursor_with_holes_does_not_join_where_the_rest_of_a_transaction_would_come_first() -> None:
    """A transaction has 1 and 4. Its hole was passed, so 1 came late; 4 comes once the hole 3 is passed as well."""
    log = SimulatedLog(step=lambda: asyncio.sleep(0))
    late = log.open_appender()
    log.append()
    async with tail_of(log) as tail, asyncio.TaskGroup() as tasks, asyncio.timeout(30):
        first = Taker(tail, log, after=0, holes=RangeSet(), strict=False)

        async def read_to(position: int) -> None:
            first.cursor._tail.wakeup.wake()
            while tail._streams[0].reader.position < position:
                await asyncio.sleep(0.001)

        taking = tasks.create_task(first.take(), name="take")
        while late.name not in log.clock._first_seen:
            await asyncio.sleep(0)
        log.now += HOLE_WAIT
        await taking
        assert (first.account.seen, first.account.position, str(first.account.holes)) == ([2], 2, "{[1,2)}")
        log.open_appender()
        log.draw(late)
        log.commit_and_unlock(late)
        await first.take()
        assert first.account.seen == [2, 1]
        tail._streams[0].take(first.cursor.number)  # wants the next one
        log.now += HOLE_WAIT
        await read_to(4)

        second = Taker(tail, log, after=2, holes=RangeSet([(1, 2)]), strict=False)
        while not {1, 4} <= set(second.account.seen):
            await second.take()
        assert second.account.seen == [1, 4]
        first.cursor.close()
        second.cursor.close()


async def test_a_strict_cursor_with_holes_waits_for_them_before_later_events() -> None:
    log = SimulatedLog(step=lambda: asyncio.sleep(0))
    late = log.open_appender()
    log.append()
    async with tail_of(log, poll_interval=60.0) as tail, asyncio.TaskGroup() as tasks, asyncio.timeout(30):
        first = Taker(tail, log, after=2, holes=RangeSet(), strict=True)
        second = Taker(tail, log, after=2, holes=RangeSet([(1, 2)]), strict=True)
        taking = [tasks.create_task(first.take(), name="first")]
        for _ in range(20):
            await asyncio.sleep(0)  # its stream has read, and waits at position 2
        taking.append(tasks.create_task(second.take(), name="second"))
        await asyncio.sleep(0)
        log.append()
        tail.wakeup.wake()
        await taking[0]
        assert first.account.seen == [3]
        log.commit_and_unlock(late)
        await taking[1]
        while second.account.seen != [1, 3]:
            await second.take()
        first.cursor.close()
        second.cursor.close()


async def test_a_stream_keeps_no_more_than_its_bytes_for_an_idle_cursor() -> None:
    log = SimulatedLog(page=PAGE, step=lambda: asyncio.sleep(0))
    for _ in range(60):
        log.append()
    async with tail_of(log, buffer_events=6) as tail:
        quick, idle = (Taker(tail, log, after=0, holes=RangeSet(), strict=False) for _ in range(2))
        async with asyncio.timeout(30):
            await asyncio.gather(idle.take(), quick.take())
            while not await quick.has_all():
                await quick.take()
                (stream,) = tail._streams
                assert stream._memory.bytes <= 6 * EVENT_BYTES
        quick.cursor.close()
        idle.cursor.close()


async def test_nothing_is_kept_for_a_cursor_that_has_fallen_behind() -> None:
    """The batch that it needs next is forgotten, so it has no use for the others."""
    log = SimulatedLog(page=PAGE, step=lambda: asyncio.sleep(0))
    for _ in range(60):
        log.append()
    async with tail_of(log, buffer_events=6) as tail:
        quick, idle = (Taker(tail, log, after=0, holes=RangeSet(), strict=False) for _ in range(2))
        async with asyncio.timeout(30):
            await asyncio.gather(idle.take(), quick.take())
            while not await quick.has_all():
                await quick.take()
        (stream,) = tail._streams
        assert stream._memory.end - stream._memory.first <= 1, "only one that was just read may be left"
        quick.cursor.close()
        idle.cursor.close()
