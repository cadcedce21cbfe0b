"""Wake-ups: a process that appends tells readers, which may sleep meanwhile. They are hints (I10): readers also poll.

A `Wakeup` wakes the tasks of one process. A `Notifier` wakes other processes. NOTIFY takes a lock at commit that the
whole cluster shares: inside all transactions of busy producers it slowed them from 7,500 to 2,400 durable inserts a
second. So it follows the commit, in a transaction of its own, or is part of it while a budget of time allows that.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable

from pgbackend import facts
from pgbackend.errors import DatabaseError
from pgbackend.postgres.pool import Database
from pgbackend.postgres.reconnect import GrowingDelay
from pgbackend.postgres.sql.statements import LogSql

LEASES = "leases"
"""The payload of a notification about shards, not about events."""
RETRIES = "retries"
"""The payload of a notification that failed events are to be tried again now."""
_NOTIFY_PATIENCE = "500ms"
"""How long a NOTIFY may wait for its turn."""
_SHARE = 0.05
"""The share of a busy producer's time that NOTIFYs may take."""
_SPARE = 0.4
"""The share of time without appends that a busy producer has too: it encodes, and handles answers."""
_MOST_CREDIT = 0.005
"""Seconds of NOTIFYs that a quiet time saves up."""
_MOST_COST = 0.002
"""Seconds that one NOTIFY counts at most: a slow network delays it, and costs nobody anything."""
_ADDED = 0.25
"""The part of an append's time that a NOTIFY in its transaction adds, and costs other producers."""
_MAX_CHANNEL_BYTES = 63
_QUEUE_FULL = "54000"  # program_limit_exceeded
_END_LISTENER = " A session that listens keeps a transaction open: end the oldest one in pg_stat_activity."


def channel(schema: str) -> str:
    """The name of the log's NOTIFY channel: another one for each schema, and short enough for PostgreSQL."""
    name = f"pgbackend:{schema}"
    if len(name.encode()) <= _MAX_CHANNEL_BYTES:
        return name
    return "pgbackend:" + hashlib.sha256(schema.encode()).hexdigest()[:32]


class Wakeup:
    """Wakes all tasks that wait. None misses a wake-up, because each names the last one that it knows of.

    >>> wakeup = Wakeup()
    >>> known = wakeup.count  # then look at the log, and wait for what comes after this moment
    >>> wakeup.wake()
    >>> asyncio.run(wakeup.wait(since=known, timeout=60.0))  # returns at once
    """

    def __init__(self) -> None:
        self.count = 0
        """How many wake-ups there were."""
        self._waiters: set[asyncio.Future[None]] = set()

    def wake(self) -> None:
        """Wake every task that waits."""
        self.count += 1
        for waiter in self._waiters:
            _wake(waiter)

    async def wait(self, *, since: int, timeout: float) -> None:
        """Return once `count` is no longer `since`, or `timeout` seconds have passed."""
        if self.count != since:
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


class Budget:
    """The time that NOTIFYs may take: a small share of a busy producer's, and what the producer does not need. Pure."""

    def __init__(self) -> None:
        self._credit = _MOST_CREDIT
        self._now = self._idle = 0.0

    def spend(self, seconds: float) -> None:
        """A NOTIFY took so long."""
        self._credit -= min(seconds, _MOST_COST)

    def pause(self, now: float, idle: float) -> float:
        """Seconds until the next NOTIFY may be sent. `idle`: seconds without appends since the process began."""
        passed, without = now - self._now, idle - self._idle
        self._now, self._idle = now, idle
        earned = _SHARE * passed + max(0.0, without - _SPARE * passed)
        self._credit = min(_MOST_CREDIT, self._credit + earned)
        return max(0.0, -self._credit / _SHARE)


class Notifier:
    """Notifies the other processes of this log, in the background and within a budget of time."""

    def __init__(
        self, database: Database, sql: LogSql, *, channel: str, sender: str, idle: Callable[[], float]
    ) -> None:
        """`sender` is the payload of notifications about events: a process ignores its own.

        `idle()` are the seconds so far in which this process had nothing to append.
        """
        self.channel = channel
        self.sender = sender
        self._database = database
        self._sql = sql
        self._budget = Budget()
        self._idle = idle
        self._due = asyncio.Event()
        self._delay = GrowingDelay(database)

    async def run(self) -> None:
        """Send the notifications that `notify()` asks for, until cancelled."""
        clock = time.monotonic
        while True:
            await self._due.wait()
            if (pause := self._budget.pause(clock(), self._idle())) > 0:
                await asyncio.sleep(pause)
            if not self._due.is_set():
                continue  # one was part of an append meanwhile
            self._due.clear()
            began = clock()
            if await self._send(self.sender):
                self._budget.spend(clock() - began)
            else:
                await self._delay.wait()

    def notify(self) -> None:
        """Have other processes read the log soon. Returns at once."""
        self._due.set()

    def may_join(self) -> bool:
        """Whether an append may have a NOTIFY in its transaction now."""
        return self._budget.pause(time.monotonic(), self._idle()) == 0

    def joined(self, seconds: float) -> None:
        """An append had one, and took so long."""
        self._budget.spend(seconds * _ADDED)
        self._due.clear()
        self._succeeded()

    async def notify_leases(self) -> None:
        """Have other workers look at the shards now. Returns once the notification was sent, or has failed."""
        await self._send(LEASES)

    async def notify_retries(self) -> None:
        """Have workers look for failed events that are due now. Returns once it was sent, or has failed."""
        await self._send(RETRIES)

    async def _send(self, payload: str) -> bool:
        """Whether it was sent. A failure costs only a hint, because the others poll."""
        try:
            await self._database.execute(self._sql.notify, self.channel, payload, _NOTIFY_PATIENCE)
        except DatabaseError as error:
            is_full = error.sqlstate == _QUEUE_FULL
            facts.emit(
                "notify failed", level=self._delay.failed(), failures=self._delay.failures, error=str(error),
                effect="Other processes find events by polling meanwhile." + (_END_LISTENER if is_full else ""),
            )  # fmt: skip
            if is_full:
                await self._free_queue()
            return False
        self._succeeded()
        return True

    def _succeeded(self) -> None:
        if self._delay.failures:
            facts.emit("notify works again", failures=self._delay.failures)
            self._delay.reset()

    async def _free_queue(self) -> None:
        """Have PostgreSQL free the notifications that all listeners have read. A refused NOTIFY does not do that."""
        try:
            await self._database.fetchval(self._sql.free_notifications)
        except DatabaseError as error:
            facts.emit("notification queue not freed", level=logging.DEBUG, error=str(error))
