"""Changes of subscriptions: in this process, and as they are stored.

A change of a stored subscription waits until none of its events is at work, here and in other workers. So no event from
before the change is dispatched after it.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext
from typing import TypeVar

from pgbackend import facts
from pgbackend.delivery.handler_calls import HandlerCalls
from pgbackend.delivery.redelivery import Redelivery
from pgbackend.delivery.registration import Handling, Registration
from pgbackend.delivery.retries import Retries
from pgbackend.delivery.runner import Runner
from pgbackend.delivery.worker import process_name
from pgbackend.errors import SubscriptionNotFoundError
from pgbackend.log.incarnation import IncarnationChanged
from pgbackend.log.log import Log
from pgbackend.log.notify import Notifier
from pgbackend.model import SeekPreview, WaitingEvent
from pgbackend.settings import Settings
from pgbackend.subscriptions.alterations import Alterations
from pgbackend.subscriptions.definitions import Definition, Subscriptions, Terms, exists, not_found
from pgbackend.subscriptions.draining import busy
from pgbackend.subscriptions.pauses import Pauses
from pgbackend.subscriptions.places import Place
from pgbackend.subscriptions.previews import Previews
from pgbackend.subscriptions.skipping import Skips

_INCARNATION_POLL = 0.05
"""Seconds between two tries while the worker has not noticed the new incarnation yet."""
_HANDOVER = 5.0
"""Seconds beyond its own bounds that a worker may need to release a shard."""

_Result = TypeVar("_Result")


class Changes:
    """Makes each change once, wherever the subscription runs."""

    def __init__(
        self,
        log: Log,
        *,
        subscriptions: Subscriptions,
        alterations: Alterations,
        pauses: Pauses,
        previews: Previews,
        redelivery: Redelivery,
        retries: Retries,
        skips: Skips,
        notifier: Notifier,
        runner: Runner,
        calls: HandlerCalls,
        settings: Settings,
    ) -> None:
        self._log = log
        self._subscriptions = subscriptions
        self._alterations = alterations
        self._pauses = pauses
        self._previews = previews
        self._redelivery = redelivery
        self._retries = retries
        self._skips = skips
        self._notifier = notifier
        self._runner = runner
        self._calls = calls
        self._settings = settings

    async def subscribe(self, wanted: Definition, start: Place, registration: Registration) -> None:
        """The subscription exists, and this process runs it."""
        registrations = self._runner.registrations
        if wanted.name in registrations:
            raise exists(wanted.name)
        await self._in_one_incarnation(lambda: self._subscriptions.ensure(wanted, start))
        await self._enter_target(wanted.name, registration.handling.target)
        # Again: another call may have subscribed meanwhile.
        if wanted.name in registrations:
            raise exists(wanted.name)
        registrations[wanted.name] = registration
        self._claim_soon()

    async def _enter_target(self, name: str, target: str | None) -> None:
        """The stored target is this one. A dispatcher's pause of another target has ended."""
        if target is None:
            return
        reason = await self._pauses.change_target(name, target)
        if reason is not None:
            facts.emit("subscription resumed", subscription=name, by="dispatcher", reason=reason)
            await self._notifier.notify_leases()

    def reconfigure(self, name: str, handling: Handling) -> None:
        """From now on this process dispatches so."""
        registration = self._runner.registrations.get(name)
        if registration is None:
            raise _not_run(name)
        # Both in one step of the event loop: no event is dispatched half by the old options and half by the new ones.
        registration.reconfigure(handling)
        worker = self._runner.worker
        filtered = worker.reconfigured(registration) if worker is not None else 0
        facts.emit("subscription reconfigured", subscription=name, filtered=filtered)

    async def unsubscribe(self, name: str) -> None:
        """This process does not run it any more, and its offset is committed."""
        registration = self._runner.registrations.pop(name, None)
        if registration is None:
            raise _not_run(name)
        await self._calls.make(self._unsubscribe(registration), registration)

    async def _unsubscribe(self, registration: Registration) -> None:
        if self._runner.worker is not None:
            await self._runner.worker.stop_subscription(registration.name)
        registration.close()

    async def delete(self, name: str) -> None:
        """Nothing is stored of the subscription any more."""
        if name in self._runner.registrations:
            await self.unsubscribe(name)
        await self._subscriptions.delete(name)
        await self._notifier.notify_leases()

    async def seek(self, name: str, place: Place) -> None:
        """The subscription's next event is the first behind `place`."""
        registration = self._runner.registrations.get(name)
        if await self._subscriptions.find(name) is None:
            raise not_found(name)
        if registration is None:
            await self._in_one_incarnation(lambda: self._alterations.seek(name, place))
            await self._notifier.notify_leases()
        else:
            await self._calls.make(self._seek_released(registration, place), registration)

    async def preview_seek(self, name: str, place: Place) -> SeekPreview:
        """The outcome that `seek()` would have."""
        return await self._in_one_incarnation(lambda: self._previews.preview_seek(name, place))

    async def _seek_released(self, registration: Registration, place: Place) -> None:
        name = registration.name
        # Released, so that nothing from the old place is dispatched after the seek.
        async with self._released(registration):
            await self._in_one_incarnation(lambda: self._alterations.seek(name, place))
            if self._runner.worker is not None:
                # Dispatches that outlast `drain_timeout` settle nothing any more.
                self._runner.worker.lose_subscription(name)
        await self._notifier.notify_leases()

    async def alter(self, name: str, terms: Terms) -> None:
        """The subscription is stored with these terms."""
        stored = await self._alterations.compare(name, terms)
        if stored is None:
            return
        registration = self._runner.registrations.get(name) if terms.need_drain(stored) else None
        altering = self._alter(name, terms, registration)
        await (altering if registration is None else self._calls.make(altering, registration))

    async def _alter(self, name: str, terms: Terms, registration: Registration | None) -> None:
        async with self._released(registration) if registration is not None else nullcontext(True) as released:
            if not released:
                raise busy(name, [process_name()])
            altered = await self._in_one_incarnation(
                lambda: self._alterations.alter(name, terms, patience=self._patience, on_drain=self._wake_workers)
            )
        if altered:
            facts.emit(
                "subscription altered", subscription=name,
                order=terms.order, end=terms.end_position or terms.end_at, start=terms.start,
            )  # fmt: skip
            # This process claims the shards now, and nothing is awaited before that. So a `reconfigure()` that follows
            # comes first, and no other worker, which may know only the old options, hears of the shards before.
            if registration is None:
                await self._notifier.notify_leases()

    async def reshard(self, name: str, shards: int) -> None:
        """The subscription has that many shards."""
        resharding = self._reshard(name, shards)
        registration = self._runner.registrations.get(name)
        await (resharding if registration is None else self._calls.make(resharding, registration))

    async def _reshard(self, name: str, shards: int) -> None:
        changed = await self._in_one_incarnation(
            lambda: self._alterations.reshard(name, shards, patience=self._patience, on_drain=self._wake_workers)
        )
        if changed:
            facts.emit("subscription resharded", subscription=name, shards=shards)
            await self._wake_workers()

    async def skip(self, name: str, position: int) -> None:
        """The event is a dead letter of the subscription, whatever its state was."""
        skipping = self._skip(name, position)
        registration = self._runner.registrations.get(name)
        await (skipping if registration is None else self._calls.make(skipping, registration))

    async def _skip(self, name: str, position: int) -> None:
        await self._in_one_incarnation(
            lambda: self._skips.skip(name, position, patience=self._patience, on_drain=self._wake_workers)
        )
        facts.emit("event skipped by an operator", level=logging.WARNING, subscription=name, position=position)
        await self._wake_workers()

    async def retry_now(self, name: str, position: int | None) -> int:
        """Failed events are due now; how many were not."""
        count = await self._retries.retry_now(name, position)
        if count is None:
            raise not_found(name)
        facts.emit("failed events are due now", subscription=name, events=count, position=position)
        if self._runner.worker is not None:
            self._runner.worker.retry_soon()
        await self._notifier.notify_retries()
        return count

    async def list_waiting(self, name: str) -> AsyncIterator[WaitingEvent]:
        """Failed events that wait to be tried again, in log order."""
        await self._check_exists(name)
        async for waiting in self._retries.list_waiting(name):
            yield waiting

    async def redeliver(self, ids: Sequence[int], subscription: str | None, group: str | None) -> int:
        """Dead letters are due for dispatch again; how many."""
        await self._check_exists(subscription)
        count = await self._redelivery.redeliver(list(ids) or None, subscription, group)
        if self._runner.worker is not None:
            self._runner.worker.redeliver_soon()
        return count

    async def purge(self, ids: Sequence[int], subscription: str | None, group: str | None) -> int:
        """Dead letters are deleted; how many."""
        await self._check_exists(subscription)
        count = await self._redelivery.purge(list(ids) or None, subscription, group)
        facts.emit("dead letters purged", letters=count, subscription=subscription, group=group)
        return count

    async def _check_exists(self, subscription: str | None) -> None:
        if subscription is not None and await self._subscriptions.find(subscription) is None:
            raise not_found(subscription)

    async def _in_one_incarnation(self, call: Callable[[], Awaitable[_Result]]) -> _Result:
        """The result of the call, which is made again when a new incarnation interrupts it."""
        while True:
            try:
                return await call()
            except IncarnationChanged:
                if self._runner.worker is None:
                    await self._log.incarnation.enter()
                else:
                    # The worker must notice first, and drop its memory of the old incarnation.
                    await asyncio.sleep(_INCARNATION_POLL)

    @asynccontextmanager
    async def _released(self, registration: Registration) -> AsyncIterator[bool]:
        """Nothing of the subscription is in flight here, and its shards stay free until the body ends.

        Yields False when something is at work for longer than `drain_timeout`: then dispatching goes on.
        """
        registration.changing += 1
        try:
            yield self._runner.worker is None or await self._runner.worker.release_subscription(registration.name)
        finally:
            registration.changing -= 1
            self._claim_soon()

    async def _wake_workers(self) -> None:
        """All workers, here and elsewhere, look for shards to claim or to release."""
        self._claim_soon()
        await self._notifier.notify_leases()

    def _claim_soon(self) -> None:
        if self._runner.worker is not None:
            self._runner.worker.claim_soon()

    @property
    def _patience(self) -> float:
        """Seconds in which other workers release a shard or refuse to. A frozen one has lost its lease by then."""
        return max(self._settings.drain_timeout, self._settings.lease_timeout) + _HANDOVER


def _not_run(name: str) -> SubscriptionNotFoundError:
    return SubscriptionNotFoundError(f"This backend runs no subscription {name!r}. Subscribe to it first.")
