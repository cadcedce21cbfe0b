"""Wake-ups: who appended says so, who reads may sleep. Hints only (I10): polling is always on beneath.

`Wakeup` is the bell inside a process. `Notifier` rings the other processes' bells with a NOTIFY that follows the commit
it speaks of, in a transaction of its own: NOTIFY takes a lock at commit that the whole cluster shares, and inside the
producers' transactions it brought 7,500 durable inserts a second down to 2,400.
"""

import asyncio
import hashlib
import logging

from pgbackend import facts
from pgbackend.errors import DatabaseError
from pgbackend.postgres.pool import Database
from pgbackend.postgres.reconnect import GrowingDelay

_INTERVALS = (0.005, 0.05)
"""Seconds between two NOTIFYs: the first of them after a quiet time, twice as long each time while more is due, up to
the last. At 20 ms throughout, a listening process and its reads took 7 % of a busy producer's rate."""

_MAX_CHANNEL_BYTES = 63

NOTIFY_PATIENCE = "500ms"
"""How long a NOTIFY may wait for its turn."""

_QUEUE_FULL = "54000"  # program_limit_exceeded
_LOOK_FOR_LISTENER = " A session that listens keeps a transaction open: end the oldest one in pg_stat_activity."

LEASES = "leases"
"""The payload of a hint that is about shards, not about events."""


def channel(schema: str) -> str:
    """The log's NOTIFY channel: a name that PostgreSQL takes whole, one for each schema of a database."""
    name = f"pgbackend:{schema}"
    if len(name.encode()) <= _MAX_CHANNEL_BYTES:
        return name
    return "pgbackend:" + hashlib.sha256(schema.encode()).hexdigest()[:32]


class Wakeup:
    """A bell that nobody misses: whoever waits names the last stroke it knows of."""

    def __init__(self) -> None:
        self._count = 0
        self._waiters: set[asyncio.Future[None]] = set()

    @property
    def count(self) -> int:
        """How often it rang. Read it before looking at the log, wait for the next one after."""
        return self._count

    def wake(self) -> None:
        self._count += 1
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def wait(self, *, since: int, timeout: float) -> None:
        """Return once it rang after stroke `since`, or `timeout` seconds have passed."""
        if self._count != since:
            return
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        self._waiters.add(waiter)
        alarm = loop.call_later(timeout, _wake, waiter)
        try:
            await waiter
        finally:
            alarm.cancel()
            self._waiters.discard(waiter)


def _wake(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)


class Notifier:
    """Tells the other processes of this log, in the background and not too often, that there is something new."""

    def __init__(self, database: Database, *, channel: str, statement: str, sender: str) -> None:
        """`sender` is the payload: a process ignores what it said itself."""
        self._database = database
        self._channel = channel
        self._statement = statement
        self._sender = sender
        self._due = asyncio.Event()
        self._backoff = GrowingDelay(database)

    def notify(self) -> None:
        """There is something new. Returns at once."""
        self._due.set()

    async def notify_leases(self) -> None:
        """There are shards to claim, or to give up. Returns when the others were told, or cannot be."""
        await self._send(LEASES)

    async def run(self) -> None:
        shortest, longest = _INTERVALS
        interval = shortest
        while True:
            # Not due by now: it has been quiet.
            interval = min(interval * 2, longest) if self._due.is_set() else shortest
            await self._due.wait()
            self._due.clear()
            if await self._send(self._sender):
                await asyncio.sleep(interval)
            else:
                await self._backoff.wait()

    async def _send(self, payload: str) -> bool:
        """Whether it was sent. Otherwise only a hint is lost: the others poll."""
        try:
            await self._database.execute(self._statement, self._channel, payload, NOTIFY_PATIENCE)
        except DatabaseError as error:
            full = error.sqlstate == _QUEUE_FULL
            facts.emit(
                "notify failed", level=self._backoff.failed(), failures=self._backoff.failures, error=str(error),
                effect="Other processes find events by polling meanwhile." + (_LOOK_FOR_LISTENER if full else ""),
            )  # fmt: skip
            if full:
                await self._make_room()
            return False
        if self._backoff.failures:
            facts.emit("notify works again", failures=self._backoff.failures)
            self._backoff.reset()
        return True

    async def _make_room(self) -> None:
        """Have PostgreSQL free what all listeners have read: asking for the usage does it, a refused NOTIFY not."""
        try:
            await self._database.fetchval("SELECT pg_notification_queue_usage()")
        except DatabaseError as error:
            facts.emit("asking for the NOTIFY queue failed", level=logging.DEBUG, error=str(error))
