"""The pumps of a worker, by the epoch of their lease: started here, watched here, and found by all others."""

import asyncio
from collections.abc import Iterable, Iterator, Mapping
from uuid import UUID

from pgbackend import facts
from pgbackend.codec.event import Event
from pgbackend.delivery.backlog import Carried
from pgbackend.delivery.care import WorkerCare
from pgbackend.delivery.committer import Committer
from pgbackend.delivery.offsets import Offsets
from pgbackend.delivery.pump import Pump
from pgbackend.delivery.redelivery import Redelivery
from pgbackend.delivery.registration import Registration
from pgbackend.delivery.shard import Shard
from pgbackend.delivery.transactions import Transactions
from pgbackend.delivery.window import Window
from pgbackend.log.log import Log
from pgbackend.log.notify import Wakeup
from pgbackend.log.tail import Tail
from pgbackend.settings import Settings
from pgbackend.subscriptions.leases import Lease
from pgbackend.subscriptions.presence import Tenure


class Pumps:
    """The running pumps."""

    def __init__(
        self,
        worker: UUID,
        log: Log,
        tail: Tail,
        committer: Committer,
        offsets: Offsets,
        redelivery: Redelivery,
        tenure: Tenure,
        settings: Settings,
        *,
        rounds: Wakeup,
    ) -> None:
        """`rounds`: woken when a dispatcher has paused its subscription, to store that."""
        self.tenure = tenure
        self._log = log
        self._tail = tail
        self._committer = committer
        self._offsets = offsets
        self._redelivery = redelivery
        self._settings = settings
        self._rounds = rounds
        self._care = WorkerCare(worker, redelivery, committer.flush, settings.lease_timeout)
        self._running: dict[int, tuple[Pump, asyncio.Task[None]]] = {}
        self._broken = asyncio.Event()
        self._cause: BaseException | None = None
        """The error that ended a pump."""

    def __iter__(self) -> Iterator[Pump]:
        return iter([pump for pump, _ in self._running.values()])

    def __len__(self) -> int:
        return len(self._running)

    def __contains__(self, epoch: int) -> bool:
        return epoch in self._running

    @property
    def has_unreported(self) -> bool:
        """Whether attempts may be on record as started here whose end is not."""
        return bool(self._care.unreported)

    def get(self, epoch: int) -> Pump | None:
        """The pump that runs under this epoch."""
        entry = self._running.get(epoch)
        return None if entry is None else entry[0]

    def epochs(self) -> set[int]:
        """The epochs of all leases in use."""
        return set(self._running)

    def of(self, subscription: str) -> list[Pump]:
        """The pumps of one subscription."""
        return [pump for pump in self if pump.registration.name == subscription]

    async def find_carried(self, lease: Lease) -> dict[int, Carried]:
        """By position: the failed events that a former owner of an ordered shard left behind."""
        return await self._redelivery.find_carried(lease) if lease.order != "none" else {}

    def start(self, lease: Lease, registration: Registration, carried: Mapping[int, Carried]) -> None:
        """A pump runs for the lease."""
        shard = Shard(
            lease=lease,
            window=Window(
                position=lease.position,
                pending=lease.pending,
                max_events=self._settings.window_events,
                max_bytes=self._settings.window_bytes,
                seen=lease.pending.difference(lease.holes),
            ),
            tenure=self.tenure,
            on_change=self._committer.queue,
        )
        pump = Pump(
            registration=registration,
            shard=shard,
            cursor=self._tail.cursor(after=lease.position, strict=lease.order == "strict", hashes=lease.shards > 1),
            log=self._log,
            carried=carried,
            care=self._care,
            transactions=Transactions(shard, self._offsets, self._committer),
            rounds=self._rounds,
        )
        # Not in a task group: that would wait for ever for a dispatcher which swallows its cancellation.
        task = asyncio.create_task(pump.run(), name=f"pump {shard.name}")
        task.add_done_callback(self._on_ended)
        self._running[lease.epoch] = (pump, task)
        facts.emit(
            "lease claimed", subscription=lease.subscription, shard=lease.shard, epoch=lease.epoch,
            position=lease.position, pending=lease.pending.count(), crashes=lease.crashes,
        )  # fmt: skip

    async def end(self, pumps: Iterable[Pump], *, timeout: float) -> None:
        """Cancel these pumps and what is at work there. Returns once they have ended, or after `timeout` seconds."""
        tasks = []
        for pump in pumps:
            pump.end()
            _, task = self._running[pump.shard.lease.epoch]
            task.cancel()
            tasks.append(task)
        if tasks:
            await asyncio.wait(tasks, timeout=timeout)

    def remove(self, pump: Pump) -> None:
        """Forget a pump. If it has not ended, its dispatchers run on, and the log names their events."""
        entry = self._running.pop(pump.shard.lease.epoch, None)
        if entry is not None and not entry[1].done():
            pump.report_slow("dispatcher abandoned")

    async def watch(self) -> None:
        """Raise the error that ends a pump."""
        await self._broken.wait()
        assert self._cause is not None  # noqa: S101 - set before the event
        raise self._cause

    def abort(self) -> None:
        """Cancel every pump: nothing that it does from now on is committed."""
        for pump, task in self._running.values():
            pump.lose()
            task.cancel()

    async def until_ended(self, *, timeout: float) -> None:
        """Return once every pump has ended, or after `timeout` seconds."""
        if tasks := [task for _, task in self._running.values()]:
            await asyncio.wait(tasks, timeout=timeout)

    # Questions about what they do.

    def is_at_work(self, event: Event) -> bool:
        """Whether this very event is being dispatched."""
        return any(event is other for pump in self for other in pump.gate.at_work())

    def holding_up(self, registration: Registration | None) -> list[Event]:
        """The events at work that a halted subscription, or all of them, waits for; none if dispatches may start."""
        pumps = [pump for pump in self if registration in (None, pump.registration)]
        if not all(pump.gate.halted for pump in pumps):
            return []
        return [event for pump in pumps for event in pump.gate.at_work()]

    def states(self) -> dict[str, str]:
        """By subscription, what it does here."""
        states = [(pump.registration.name, pump.state()) for pump in self]
        # dict() keeps the last entry, so an abnormal state wins. "complete" needs all shards: it comes first.
        return dict(sorted(states, key=lambda one: (one[1] != "complete", one[1] != "running")))

    def _on_ended(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._cause = self._cause or error
            self._broken.set()
