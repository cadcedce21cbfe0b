"""When offsets are committed, and what the worker learns of it.

Shards queue themselves when they have something to commit. One loop commits them all together (`offsets.Offsets`), and
hands the result of every pass to the worker. So no result is lost with a caller that is cancelled: `flush()` only asks
the loop for a pass and waits for it. Transactional shards also commit in their own transactions; no pass commits such a
shard meanwhile (`apart()`).
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

from pgbackend import facts
from pgbackend.delivery.offsets import Committed, Offsets
from pgbackend.delivery.shard import Shard
from pgbackend.errors import DatabaseError
from pgbackend.postgres.reconnect import GrowingDelay

_SHARE = 0.1
"""Committing takes at most this share of the time."""


class Committer:
    """Commits what its shards have settled: at once after a quiet time, then at most every `commit_interval`."""

    def __init__(self, offsets: Offsets, *, commit_interval: float, apply: Callable[[Committed], None]) -> None:
        """`apply` gets the result of every pass, before any `flush()` that waited for the pass returns."""
        self.apply = apply
        """Also gets what transactions commit themselves."""
        self._offsets = offsets
        self._interval = commit_interval
        self._queued: dict[Shard, None] = {}
        self._apart: set[Shard] = set()
        self._under_way: dict[Shard, None] = {}
        """The shards of the pass that is running."""
        self._passed = asyncio.Event()
        """Set when that pass ends."""
        self._wake = asyncio.Event()
        self._flush: asyncio.Future[DatabaseError | None] | None = None
        """The outcome of the next pass, for the callers of `flush()` that wait for it."""
        self._pause: asyncio.Timeout | None = None
        self._ended = False

    def queue(self, shard: Shard) -> None:
        """There may be something to commit for this shard."""
        shard.is_queued = True
        self._queued[shard] = None
        self._wake.set()

    async def flush(self) -> None:
        """Return once everything queued before this call is committed.

        Raises DatabaseError when the pass could not commit all of it; the next pass tries again.
        """
        if self._ended:
            raise _not_committed()
        if self._flush is None:
            self._flush = asyncio.get_running_loop().create_future()
            self._wake.set()
            if self._pause is not None:
                self._pause.reschedule(0.0)
        # Shielded: a caller that is cancelled must not take the pass from the others.
        if (error := await asyncio.shield(self._flush)) is not None:
            raise error

    @asynccontextmanager
    async def apart(self, shard: Shard) -> AsyncIterator[None]:
        """No pass commits this shard until the body ends."""
        self._apart.add(shard)
        try:
            while shard in self._under_way:
                await self._passed.wait()
            yield
        finally:
            self._apart.discard(shard)
            if shard in self._queued:
                self._wake.set()

    async def run(self) -> None:
        """Commit until cancelled. Raises IncarnationChanged and SchemaError: the worker cannot go on after them."""
        delay = GrowingDelay(self._offsets.database)
        before = 0.0
        self._ended = False
        try:
            while True:
                await self._wake.wait()
                began = time.monotonic()
                if (error := (await self.run_once()).error) is not None:
                    facts.emit("commit failed", level=delay.failed(), failures=delay.failures, error=str(error))
                    await self._wait(delay.wait())
                    continue
                delay.reset()
                took = time.monotonic() - began
                # One slow commit is a cold connection or a checkpoint, two in a row are a slow server.
                await self._wait(asyncio.sleep(max(self._interval, min(took, before) * (1 / _SHARE - 1))))
                before = took
        finally:
            self._ended = True
            flush, self._flush = self._flush, None
            _answer(flush, _not_committed())

    async def run_once(self) -> Committed:
        """Commit everything that is queued. Marks that were not committed are queued again."""
        self._under_way = {shard: None for shard in self._queued if shard not in self._apart}
        self._queued = {shard: None for shard in self._queued if shard in self._apart}
        flush, self._flush = self._flush, None
        self._wake.clear()
        try:
            committed = await self._offsets.commit(self._under_way)
        except BaseException:
            _answer(flush, _not_committed())
            raise
        finally:
            self._under_way = {}
            self._passed.set()
            self._passed = asyncio.Event()
        for shard in committed.kept:
            self.queue(shard)
        self.apply(committed)
        _answer(flush, committed.error)
        return committed

    async def _wait(self, pause: Awaitable[None]) -> None:
        """Wait, but not beyond the moment in which a flush is asked for."""
        with suppress(TimeoutError):
            try:
                async with asyncio.timeout(None if self._flush is None else 0.0) as self._pause:
                    await pause
            finally:
                self._pause = None


def _answer(flush: "asyncio.Future[DatabaseError | None] | None", error: DatabaseError | None) -> None:
    if flush is not None and not flush.done():
        flush.set_result(error)


def _not_committed() -> DatabaseError:
    return DatabaseError("The worker ended before this could be committed.")
