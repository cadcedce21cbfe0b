"""Handover: how a worker gives shards up.

    running ──hand over──▶ held ──nothing is at work──▶ retired: ended, committed, released
       ▲                    │
       └──drain_timeout─────┘  the shard stays, and is not held again for a while
    running ──stop──▶ draining ──nothing is at work, or drain_timeout──▶ retired: what is at work is cancelled
    running ──lost──▶ dispatches end by themselves ──▶ retired: nothing is committed

Shards that go to another worker are handed over, so no dispatch is cut short for them. Only an unsubscription and the
worker's own end stop them.
"""

import asyncio
import logging
import time
from collections.abc import Coroutine, Iterable, Sequence
from contextlib import suppress
from typing import Any

from pgbackend import facts
from pgbackend.codec.event import Event
from pgbackend.delivery.committer import Committer
from pgbackend.delivery.pump import Pump
from pgbackend.delivery.pumps import Pumps
from pgbackend.delivery.shard import Shard
from pgbackend.errors import DatabaseError
from pgbackend.log.notify import Notifier, Wakeup
from pgbackend.subscriptions.alterations import Alterations
from pgbackend.subscriptions.leases import Leases

CANCEL_TIMEOUT = 1.0
"""Seconds that cancelled dispatchers have to end, before their events go to the next owner."""
_COMMIT_TIMEOUT = 15.0
"""Seconds that the last commit of a shard may take while the worker goes on."""
_LAST_STEPS = 4.0
"""Seconds beyond `drain_timeout` that a stop may take: to cancel, to commit, and to release the shards."""
_REPORT_TIMEOUT = 5.0
"""Seconds in which this process reports the attempts of a given-up shard whose end it could not commit."""
_POLL = 0.02
"""Seconds between looks at whether what is at work has ended."""
_LONGEST_KEPT = 600.0
"""Seconds after which a shard that stayed may be held again, at most."""
_SHORTEST_KEPT = 1.0


class _Slow:
    """The events that were at work for too long when their shard was to be handed over."""

    __slots__ = ("_events", "_until", "pause")

    def __init__(self, events: Sequence[Event], *, pause: float = 0.0, before: "_Slow | None" = None) -> None:
        """`pause`: seconds until the next try, twice as long as after the one `before`."""
        self._events = {id(event): event for event in events}
        self.pause: float = min(pause if before is None else 2 * before.pause, _LONGEST_KEPT)
        self._until = time.monotonic() + self.pause

    def at_work(self, pump: Pump) -> bool:
        """Whether one of them still is."""
        return not self._events.keys().isdisjoint(map(id, pump.gate.at_work()))

    def forbid(self, pump: Pump) -> bool:
        """Whether the shard should not be held now: it would take too long again."""
        return bool(pump.gate.active) and (self.at_work(pump) or time.monotonic() < self._until)


class Handover:
    """Gives shards up, in the background or for a caller that waits."""

    def __init__(
        self,
        pumps: Pumps,
        committer: Committer,
        leases: Leases,
        alterations: Alterations,
        notifier: Notifier,
        *,
        rounds: Wakeup,
        drain_timeout: float,
    ) -> None:
        """`rounds`: woken when a shard became free here."""
        self._pumps = pumps
        self._committer = committer
        self._leases = leases
        self._alterations = alterations
        self._notifier = notifier
        self._rounds = rounds
        self._drain_timeout = drain_timeout
        self._leaving: set[tuple[int, bool]] = set()
        """Epochs of shards that are being handed over, and whether at once."""
        self._kept: dict[int, _Slow] = {}
        """Why shards were not handed over, by epoch."""
        self._tasks: asyncio.TaskGroup | None = None

    async def run(self) -> None:
        """Hand shards over until cancelled; then those that are under way stay."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                # An ending task group takes no more tasks.
                self._tasks = None

    def deadline(self) -> float:
        """When a stop that begins now has ended, in monotonic seconds."""
        return time.monotonic() + self._drain_timeout + _LAST_STEPS

    def leaving(self) -> set[int]:
        """Epochs of the shards that are being handed over."""
        return {epoch for epoch, _ in self._leaving}

    def is_leaving_at_once(self, epoch: int) -> bool:
        return (epoch, True) in self._leaving

    def begin(self, epochs: Iterable[int], *, at_once: bool = False) -> None:
        """Hand these shards over in the background, each once nothing is at work there.

        `at_once`: start no dispatch there from now on. Otherwise only once what is at work now has ended, so that one
        slow dispatcher does not stop the others.
        """
        for epoch in epochs:
            pump = self._pumps.get(epoch)
            if pump is not None and (epoch, at_once) not in self._leaving:
                self._leaving.add((epoch, at_once))
                self._start(self._share(pump, at_once=at_once), name=f"hand over {pump.shard.name}")

    async def hand_over(self, pumps: Sequence[Pump]) -> bool:
        """Give these shards up together once nothing is at work there. Returns whether that was so in time.

        If something is at work for longer than `drain_timeout`, all of them stay and go on. They are not held again
        before that has ended and some time has passed, so slow dispatchers do not stop a shard for good.
        """
        pumps = [pump for pump in pumps if pump.shard.lease.epoch in self._pumps]
        self._kept = {epoch: slow for epoch, slow in self._kept.items() if epoch in self._pumps}
        for pump in pumps:
            slow = self._kept.get(pump.shard.lease.epoch)
            if slow is not None and slow.forbid(pump):
                return False
        for pump in pumps:
            pump.gate.hold()
        try:
            if all(await asyncio.gather(*(pump.gate.until_quiet(self._drain_timeout) for pump in pumps))):
                await self._retire(pumps)
                return True
            for pump in pumps:
                if events := pump.gate.at_work():
                    pump.report_slow("shard kept")
                    epoch, pause = pump.shard.lease.epoch, max(self._drain_timeout, _SHORTEST_KEPT)
                    self._kept[epoch] = _Slow(events, pause=pause, before=self._kept.get(epoch))
            return False
        finally:
            for pump in pumps:
                pump.resume()

    async def stop(self, pumps: Sequence[Pump], deadline: float) -> None:
        """Drain these shards together and give them up; cancel what is still at work after `drain_timeout`.

        Returns by the deadline, in monotonic seconds.
        """
        await asyncio.gather(*(pump.drain(self._drain_timeout) for pump in pumps))
        await self._retire(pumps, deadline)

    def lose(self, shard: Shard) -> None:
        """Another worker owns the shard, or it was moved: end its pump once nothing is at work there."""
        pump = self._pumps.get(shard.lease.epoch)
        if pump is None or self._tasks is None or pump.gate.stopped:
            return
        pump.lose()
        facts.emit("lease lost", level=logging.WARNING, subscription=pump.registration.name, shard=shard.lease.shard)
        self._start(self._end_lost(pump), name=f"end {shard.name}")

    def _start(self, work: Coroutine[Any, Any, None], *, name: str) -> None:
        assert self._tasks is not None  # noqa: S101 - shards run while run() does
        self._tasks.create_task(work, name=name)

    async def _share(self, pump: Pump, *, at_once: bool) -> None:
        """Hand a shard over if what is at work there ends in time."""
        lease = pump.shard.lease
        try:
            given_up = (at_once or await self._outlast(pump)) and await self.hand_over([pump])
        finally:
            self._leaving.discard((lease.epoch, at_once))
        if given_up:
            self._rounds.wake()
            await self._notifier.notify_leases()
        elif at_once:
            # Calls that asked for the shard need not wait any longer.
            with suppress(DatabaseError):
                await self._alterations.refuse_drain(pump.registration.name)

    async def _outlast(self, pump: Pump) -> bool:
        """Whether what is at work now ends within `drain_timeout`. Other events are dispatched meanwhile."""
        slow = _Slow(pump.gate.at_work())
        deadline = time.monotonic() + self._drain_timeout
        while slow.at_work(pump) and time.monotonic() < deadline:  # noqa: ASYNC110 - rare, and plain
            await asyncio.sleep(_POLL)
        return not slow.at_work(pump)

    async def _end_lost(self, pump: Pump) -> None:
        """Retire a pump once nothing is at work there, however long that takes: until then it is not claimed here."""
        if not await pump.gate.until_quiet(self._drain_timeout):
            pump.report_slow("lost shard is still at work")
            await pump.gate.until_quiet(None)
        await self._retire([pump])
        self._rounds.wake()

    async def _retire(self, pumps: Sequence[Pump], deadline: float | None = None) -> None:
        """End these pumps, commit, and release their shards, by the deadline in monotonic seconds."""
        # Two reasons to give a shard up may meet: another call may have retired it by now.
        pumps = [pump for pump in pumps if pump.shard.lease.epoch in self._pumps]
        if not pumps:
            return
        # Before the release: the next owner must not dispatch beside those that are cut short.
        await self._pumps.end(pumps, timeout=CANCEL_TIMEOUT)
        try:
            async with asyncio.timeout(_COMMIT_TIMEOUT if deadline is None else deadline - time.monotonic()):
                # The committer has logged the error, which may be another shard's.
                with suppress(DatabaseError):
                    await self._committer.flush()
                await self._leases.release([pump.shard.lease.epoch for pump in pumps if not pump.shard.lost])
        except (DatabaseError, TimeoutError) as error:
            # Others take over when this worker is gone. Events that were not committed are dispatched again.
            text = str(error) or "PostgreSQL did not answer in time."
            facts.emit("release failed", level=logging.WARNING, error=text)
        with suppress(TimeoutError):
            async with asyncio.timeout(_REPORT_TIMEOUT):
                for pump in pumps:
                    await pump.care.report_survival()
        for pump in pumps:
            pump.lose()
            self._pumps.remove(pump)
            facts.emit("lease released", subscription=pump.registration.name, shard=pump.shard.lease.shard)
