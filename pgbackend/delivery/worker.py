"""A worker: a started backend within one life of the server.

    run() ─▶ registered ─▶ claims (claims.py), pumps (pump.py), commits (committer.py), redelivers (redeliverer.py)
                              │
                              ├──stop is set──▶ drains, commits, releases its shards, leaves
                              └──IncarnationChanged──▶ its memory is void: a new worker starts from the durable rows

This module wires the actors of a worker, starts and stops them in order, and hands each what the others report.
"""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any, TypeVar
from uuid import uuid4

from pgbackend import facts
from pgbackend.delivery.claims import Claims
from pgbackend.delivery.committer import Committer
from pgbackend.delivery.handover import CANCEL_TIMEOUT, Handover
from pgbackend.delivery.offsets import Committed, Offsets
from pgbackend.delivery.pause_sync import PauseSync
from pgbackend.delivery.pump import Pump
from pgbackend.delivery.pumps import Pumps
from pgbackend.delivery.redeliverer import Redeliverer
from pgbackend.delivery.redelivery import Outlived, Redelivery
from pgbackend.delivery.registration import Registration
from pgbackend.delivery.retries import Retries, RetryWatch
from pgbackend.errors import DatabaseError
from pgbackend.log.incarnation import IncarnationChanged
from pgbackend.log.log import Log
from pgbackend.log.maintenance import Maintenance
from pgbackend.log.notify import LEASES, RETRIES, Notifier, Wakeup
from pgbackend.log.retention import Retainer
from pgbackend.log.tail import Tail
from pgbackend.settings import Settings
from pgbackend.subscriptions.alterations import Alterations
from pgbackend.subscriptions.leases import Leases
from pgbackend.subscriptions.overview import Overview
from pgbackend.subscriptions.pauses import Pauses
from pgbackend.subscriptions.presence import Presence, Tenure

_Result = TypeVar("_Result")


def process_name() -> str:
    """How the workers of this process are named where others see them."""
    return f"{socket.gethostname()}:{os.getpid()}"


class Hints:
    """Wakes what a NOTIFY of another process is for."""

    def __init__(self, sender: str, *, readers: Wakeup, rounds: Wakeup, retries: Wakeup) -> None:
        """`sender`: of this process's own NOTIFYs."""
        self._sender = sender
        self._readers = readers
        self._rounds = rounds
        self._retries = retries

    def take(self, payload: str) -> None:
        """A NOTIFY came, or ("") the listener connected and may have missed some."""
        if payload == self._sender:
            return
        if payload in (LEASES, ""):
            self._rounds.wake()
        if payload in (RETRIES, ""):
            self._retries.wake()
        if payload not in (LEASES, RETRIES):
            self._readers.wake()


class Worker:
    """Runs its share of the shards of its registrations."""

    def __init__(
        self,
        *,
        log: Log,
        maintenance: Maintenance,
        retainer: Retainer,
        settings: Settings,
        registrations: Mapping[str, Registration],
        wakeup: Wakeup,
        notifier: Notifier,
        channel: str,
        sender: str,
        outlived: list[Outlived],
    ) -> None:
        """`outlived`: earlier workers of this process.

        `wakeup`: wakes the readers. `channel`, `sender`: of the NOTIFYs of this log, and of this process.
        """
        self.id = uuid4()
        tenure, schema, rounds, retries = Tenure(), settings.schema, Wakeup(), Wakeup()
        redelivery = Redelivery(log.database, schema=schema)
        alterations = Alterations(log, schema=schema)
        offsets = Offsets(log, schema=schema, worker=self.id)
        committer = Committer(offsets, commit_interval=settings.commit_interval, apply=self._apply)
        tail = Tail(log, wakeup, poll_interval=settings.poll_interval, buffer_bytes=settings.buffer_bytes)
        self._log = log
        self._notifier = notifier
        self._retries = retries
        self._outlived = outlived
        self._leases = Leases(log, schema=schema, worker=self.id)
        self._presence = Presence(
            log.database,
            schema=schema,
            worker=self.id,
            name=process_name(),
            lease_timeout=settings.lease_timeout,
            channel=channel,
            notify=log.sql.notify,
            tenure=tenure,
            on_hint=Hints(sender, readers=wakeup, rounds=rounds, retries=retries).take,
            on_held=self._on_held,
        )
        self.pumps = Pumps(self.id, log, tail, committer, offsets, redelivery, tenure, settings, rounds=rounds)
        self._redeliverer = Redeliverer(redelivery, self.pumps, log.database, poll_interval=settings.poll_interval)
        retry_watch = RetryWatch(
            Retries(log.database, schema=schema), self.pumps, self._redeliverer, retries,
            poll_interval=settings.poll_interval,
        )  # fmt: skip
        self._handover = Handover(
            self.pumps, committer, self._leases, alterations, notifier,
            rounds=rounds, drain_timeout=settings.drain_timeout,
        )  # fmt: skip
        pauses = PauseSync(self.id, Pauses(log, schema=schema), registrations, self.pumps, notifier)
        self._claims = Claims(
            self.id, log, self._leases, alterations, pauses, Overview(log.database, schema=schema),
            registrations, self.pumps, self._handover, notifier,
            rounds=rounds, poll_interval=settings.poll_interval,
        )  # fmt: skip
        self._others: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
            "read the log": tail.run,
            "commit offsets": committer.run,
            "redeliver": self._redeliverer.run,
            "watch for retries now": retry_watch.run,
            "maintain the log": maintenance.run,
            "retain the log": retainer.run,
            "watch the pumps": self.pumps.watch,
            "watch the presence": self._presence.watch,
        }
        """The actors that run until the last shard is released."""
        self._tasks: asyncio.TaskGroup | None = None

    # A worker's life.

    async def run(self, stop: asyncio.Event) -> None:
        """Deliver until `stop` is set, then drain, commit and release every shard.

        Raises IncarnationChanged when the server begins another life.
        """
        await self._log.incarnation.enter()
        # Killed workers leave their rows behind. Delete them so that surveys stay cheap.
        await self._leases.delete_dead_workers()
        await self._presence.start()
        try:
            await self._leases.verify_presence()
            await self._redeliverer.report_outlived(self._outlived)
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                claiming = [
                    tasks.create_task(self._claims.run(), name="claim shards"),
                    tasks.create_task(self._handover.run(), name="hand shards over"),
                ]
                others = [tasks.create_task(run(), name=name) for name, run in self._others.items()]
                facts.emit("worker started", worker=str(self.id))
                try:
                    await stop.wait()
                    for task in claiming:
                        task.cancel()
                    deadline = self._handover.deadline()
                    await self._handover.stop(list(self.pumps), deadline)
                    for task in others:
                        task.cancel()
                    await self._leave(deadline)
                finally:
                    self.pumps.abort()
        except BaseExceptionGroup as group:
            # One cause is enough. A new life of the server explains whatever else came with it.
            changed, other = group.split(IncarnationChanged)
            raise _first(changed or other) from group
        finally:
            self._tasks = None
            try:
                await self.pumps.until_ended(timeout=CANCEL_TIMEOUT)
            finally:
                await self._presence.stop()
                facts.emit("worker stopped", worker=str(self.id))

    async def _leave(self, deadline: float) -> None:
        """Delete this worker's row, and tell the others."""
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                await self._leases.leave()
                await self._notifier.notify_leases()
        except (DatabaseError, TimeoutError) as error:
            facts.emit("leave failed", level=logging.WARNING, error=str(error) or "PostgreSQL did not answer in time.")

    # Calls of the backend.

    @property
    def dispatches(self) -> bool:
        """Whether it has registered, and dispatches what it claims."""
        return self._tasks is not None

    def claim_soon(self) -> None:
        """There are new registrations."""
        self._claims.wake()

    async def heed_pauses(self) -> None:
        """This worker obeys what was stored about pauses before this call. Raises DatabaseError."""
        await self._claims.heed_pauses()
        self._redeliverer.wake()

    def redeliver_soon(self) -> None:
        """An operator sent dead letters again."""
        self._redeliverer.wake()

    def retry_soon(self) -> None:
        """Failed events are to be tried again now."""
        self._retries.wake()

    def reconfigured(self, registration: Registration) -> int:
        """Go on as the registration says now. Returns how many waiting events its filter refuses."""
        self._redeliverer.wake()
        # The next round stores that a pause has ended.
        self._claims.wake()
        return sum(pump.reconfigured() for pump in self.pumps.of(registration.name))

    async def stop_subscription(self, name: str) -> None:
        """Return once nothing of this subscription is at work here, its offsets are committed and its shards free.

        Dispatches that outlast `drain_timeout` are cancelled.
        """
        deadline = self._handover.deadline()
        if pumps := await self._pumps_of(name, deadline):
            await self._finish(self._handover.stop(pumps, deadline), name=f"stop {name}")
        with suppress(TimeoutError):
            async with asyncio.timeout(deadline - time.monotonic()):
                await self._notifier.notify_leases()

    async def release_subscription(self, name: str) -> bool:
        """Give up all shards of this subscription.

        False if something is at work there for longer than `drain_timeout`: nothing is cancelled, and dispatching goes
        on.
        """
        pumps = await self._pumps_of(name, self._handover.deadline())
        if pumps and await self._finish(self._handover.hand_over(pumps), name=f"hand over {name}") is False:
            return False
        await self._notifier.notify_leases()
        return True

    def lose_subscription(self, name: str) -> None:
        """Its shards have new epochs: start nothing under the old ones."""
        for pump in self.pumps.of(name):
            self._handover.lose(pump.shard)

    async def _pumps_of(self, name: str, deadline: float) -> list[Pump]:
        # A round that claimed before this has started its pumps then. One that takes longer, because PostgreSQL does
        # not answer, starts none: the registration is gone or changing.
        with suppress(TimeoutError):
            async with asyncio.timeout(deadline - time.monotonic()), self._claims.between_rounds():
                pass
        return self.pumps.of(name)

    async def _finish(self, call: Coroutine[Any, Any, _Result], *, name: str) -> _Result | None:
        """The result of the call, though its caller may stop waiting; None if the worker ends first and gives up all.

        Otherwise a cancelled caller would leave pumps that neither run nor end.
        """
        try:
            task = self._tasks.create_task(call, name=name) if self._tasks is not None else None
        except RuntimeError:  # the group is ending
            task = None
        if task is None:
            call.close()
            return None
        await asyncio.wait({task})
        return None if task.cancelled() else task.result()

    # Reports of the actors.

    def _apply(self, committed: Committed) -> None:
        """Tell the pumps what is durable now, and end those whose leases are lost."""
        for shard, mark in committed.marks.items():
            pump = self.pumps.get(shard.lease.epoch)
            if pump is not None and mark.outcomes:
                pump.committed(mark)
                self._redeliverer.wake()
            if pump is not None and shard.is_over and not self._handover.is_leaving_at_once(shard.lease.epoch):
                self._claims.wake()
        for shard in committed.lost:
            self._handover.lose(shard)

    def _on_held(self, held: frozenset[int]) -> None:
        """The tenure ran out, and these leases are still this worker's: it lost the others."""
        self.pumps.tenure.lapses += 1
        self._claims.drop_lost(self.pumps.epochs(), held)


def _first(group: BaseExceptionGroup[BaseException] | None) -> BaseException:
    """An exception of the group, out of however many groups."""
    error: BaseException | None = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert error is not None  # noqa: S101 - a group is never empty
    return error
