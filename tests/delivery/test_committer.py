"""When offsets are committed, and that the worker learns of every result."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from pgbackend.delivery.committer import Committer
from pgbackend.delivery.offsets import Committed, Offsets
from pgbackend.delivery.shard import Shard
from pgbackend.errors import DatabaseError


class _Shard:
    is_queued = False


def make_shard() -> Shard:
    return cast("Shard", _Shard())


class Server:
    """Commits what it is given, when it may."""

    database = None

    def __init__(self) -> None:
        self.passes: list[list[Shard]] = []
        self.times: list[float] = []
        self.errors: list[DatabaseError] = []
        """The errors of the next passes."""
        self.open = asyncio.Event()
        self.open.set()

    async def commit(self, shards: Any) -> Committed:
        given = list(shards)
        self.passes.append(given)
        self.times.append(asyncio.get_running_loop().time())
        await self.open.wait()
        if self.errors:
            return Committed(marks={}, lost=[], kept=given, error=self.errors.pop())
        return Committed(marks=dict.fromkeys(given, cast("Any", None)), lost=[], kept=[], error=None)


@asynccontextmanager
async def committing(server: Server, *, interval: float = 0.01) -> AsyncIterator[tuple[Committer, list[Shard]]]:
    """A committer that runs, and the shards that it has committed."""
    done: list[Shard] = []
    committer = Committer(
        cast("Offsets", server), commit_interval=interval, apply=lambda committed: done.extend(committed.marks)
    )
    running = asyncio.create_task(committer.run())
    try:
        yield committer, done
    finally:
        running.cancel()
        await asyncio.wait({running})


async def test_the_first_commit_after_a_quiet_time_goes_at_once_and_others_wait_for_the_interval() -> None:
    server = Server()
    async with committing(server, interval=0.2) as (committer, _):
        async with asyncio.timeout(5):
            while len(server.times) < 3:
                committer.queue(make_shard())
                await asyncio.sleep(0.005)
    first, second, third = server.times

    assert min(second - first, third - second) >= 0.19


async def test_a_flush_does_not_wait_for_the_interval() -> None:
    server, shard = Server(), make_shard()
    async with committing(server, interval=600.0) as (committer, done):
        await committer.flush()
        committer.queue(shard)
        async with asyncio.timeout(5):
            await committer.flush()
        assert done == [shard]


async def test_a_flush_waits_for_what_was_noted_while_a_pass_was_under_way() -> None:
    server, first, second = Server(), make_shard(), make_shard()
    server.open.clear()
    async with committing(server) as (committer, done):
        committer.queue(first)
        while not server.passes:
            await asyncio.sleep(0)
        committer.queue(second)
        flushes = [asyncio.create_task(committer.flush()) for _ in range(3)]
        await asyncio.sleep(0)
        assert done == []
        server.open.set()
        await asyncio.gather(*flushes)
        assert done == [first, second]
    assert server.passes == [[first], [second]]


async def test_the_result_of_a_flush_whose_caller_is_cancelled_is_applied() -> None:
    server, shard = Server(), make_shard()
    server.open.clear()
    async with committing(server) as (committer, done):
        committer.queue(shard)
        caller, other = (asyncio.create_task(committer.flush()) for _ in range(2))
        while not server.passes:
            await asyncio.sleep(0)
        caller.cancel()
        await asyncio.wait({caller})
        server.open.set()
        await other
        assert done == [shard]


async def test_what_was_refused_is_committed_again_and_the_flush_says_why_it_was_not() -> None:
    server, shard = Server(), make_shard()
    server.errors = [DatabaseError("no")]
    async with committing(server) as (committer, done):
        committer.queue(shard)
        with pytest.raises(DatabaseError, match="no"):
            await committer.flush()
        assert done == []
        # The next one does not wait, either, until the committer would try again by itself.
        await committer.flush()
        assert done == [shard]


async def test_a_flush_that_meets_the_end_of_the_worker_is_refused() -> None:
    server = Server()
    server.open.clear()
    async with committing(server) as (committer, _):
        committer.queue(make_shard())
        waiting = [asyncio.create_task(committer.flush())]
        while not server.passes:
            await asyncio.sleep(0)
        waiting.append(asyncio.create_task(committer.flush()))
        await asyncio.sleep(0)
    for flush in waiting:
        with pytest.raises(DatabaseError, match="ended"):
            await flush
    with pytest.raises(DatabaseError, match="ended"):
        await committer.flush()
