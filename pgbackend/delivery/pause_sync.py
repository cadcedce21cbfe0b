"""Pauses in a worker's rounds: it stores those that were raised here, and obeys those that are stored.

`pausing.py` decides what a process obeys. The promise: a pause that cannot be stored now holds in this process, and is
tried again in each round, without delaying the rest of the round's work.
"""

from collections.abc import Mapping
from uuid import UUID

from pgbackend import facts
from pgbackend.delivery.pumps import Pumps
from pgbackend.delivery.registration import Registration
from pgbackend.errors import DatabaseError, SchemaError
from pgbackend.log.notify import Notifier
from pgbackend.postgres.reconnect import GrowingDelay
from pgbackend.subscriptions.pauses import Pauses, PauseState


class PauseSync:
    """Keeps the registrations of a worker and the log alike."""

    def __init__(
        self, worker: UUID, pauses: Pauses, registrations: Mapping[str, Registration], pumps: Pumps, notifier: Notifier
    ) -> None:
        self._worker = worker
        self._pauses = pauses
        self._registrations = registrations
        self._pumps = pumps
        self._notifier = notifier
        self._failing = GrowingDelay()

    async def store(self) -> None:
        """Everything that dispatchers here and `reconfigure()` have said is stored, as far as PostgreSQL takes it."""
        is_news = False
        for registration in list(self._registrations.values()):
            try:
                is_news |= await self._store_one(registration)
            except SchemaError:
                raise
            except DatabaseError as error:
                facts.emit(
                    "pause not stored", level=self._failing.failed(), subscription=registration.name,
                    failures=self._failing.failures, error=str(error),
                )  # fmt: skip
                break
        else:
            self._failing.reset()
        if is_news:
            await self._notifier.notify_leases()

    async def _store_one(self, registration: Registration) -> bool:
        """Whether there was something to store, and the row may have changed."""
        pausing, is_news = registration.pausing, False
        if (changed := pausing.new_target) is not None:
            await self._pauses.change_target(registration.name, changed.target)
            pausing.stored_target(changed)
            is_news = True
        if (raised := pausing.new_pause) is not None and pausing.new_target is None:
            # The survey that follows tells what became of it.
            is_news |= await self._pauses.pause_for_dispatcher(
                registration.name, raised.reason,
                resumed_at=raised.resumed_at, target=registration.handling.target, worker=self._worker,
            )  # fmt: skip
        return is_news

    def obey(self, states: Mapping[str, PauseState]) -> None:
        """Each subscription is paused here as its row says."""
        for name, registration in self._registrations.items():
            self.obey_one(registration, states.get(name))

    def obey_one(self, registration: Registration, state: PauseState | None) -> None:
        """This subscription is paused as its row says. None: there is no row."""
        if registration.heed(state):
            for pump in self._pumps.of(registration.name):
                pump.heed()
