"""Steers a subscription that runs, here or elsewhere: pauses it, and lets it go on.

The call stores what it wants, has this process obey at once, and notifies the others. They obey in their next round.
"""

from contextlib import suppress

from pgbackend.delivery.runner import Runner
from pgbackend.delivery.worker import process_name
from pgbackend.errors import DatabaseError
from pgbackend.log.notify import Notifier
from pgbackend.subscriptions.pauses import Pauses


class Steering:
    """Steers the subscriptions of a log."""

    def __init__(self, pauses: Pauses, notifier: Notifier, runner: Runner) -> None:
        self._pauses = pauses
        self._notifier = notifier
        self._runner = runner

    async def pause(self, name: str, reason: str | None) -> None:
        """An operator has paused the subscription, and this process starts no dispatch of it any more."""
        await self._pauses.pause(name, reason, process=process_name())
        await self._obey()

    async def resume(self, name: str) -> None:
        """The subscription is not paused, and this process dispatches its events."""
        await self._pauses.resume(name)
        await self._obey()

    async def _obey(self) -> None:
        await self._notifier.notify_leases()
        if self._runner.worker is not None:
            # It is stored. If PostgreSQL is away now, the next round obeys.
            with suppress(DatabaseError):
                await self._runner.worker.heed_pauses()
