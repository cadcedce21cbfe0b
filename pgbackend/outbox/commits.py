"""Learns when transactions of this process end, without any I/O, and wakes readers then.

No driver tells others of a commit, but each knows whether its connection is in a transaction. So a timer looks, soon at
first and then less and less often. A transaction that was rolled back wakes readers, too, which find nothing. Both are
hints (I10): an event whose transaction is not seen to end is found by polling.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from pgbackend.log.notify import Notifier, Wakeup

_FIRST_WAIT, _LONGEST_WAIT = 0.001, 0.05
"""Seconds between two looks. A look takes 5 µs, so a hundred long transactions take 1 % of a processor."""
_GROWTH = 1.5


@dataclass(frozen=True, slots=True)
class Transaction:
    """A transaction of a caller's."""

    of: object
    """The driver's object that stands for it: the same one for all of its events."""
    is_over: Callable[[], bool]
    """Looks, and takes no I/O. An error means that the connection has gone, and the transaction with it."""


class Commits:
    """Watches any number of transactions, each with one timer."""

    def __init__(self, wakeup: Wakeup, notifier: Notifier) -> None:
        """`wakeup` and `notifier` hear of each end."""
        self._wakeup = wakeup
        self._notifier = notifier
        self._watched: dict[int, tuple[Transaction, asyncio.TimerHandle]] = {}
        """By the `id()` of what stands for the transaction. The value keeps that alive."""
        self._is_closed = False

    def watch(self, transaction: Transaction) -> None:
        """Readers are woken soon after the transaction has ended. Again for another of its events does no harm."""
        if self._is_closed:
            return  # the backend was stopped while the event was being inserted
        if (known := self._watched.get(id(transaction.of))) is not None:
            # It may be the connection's next transaction, and the end of the last one went unseen: look soon again.
            # But never put off a look that is due, or a stream of short transactions would put it off for ever.
            if known[1].when() <= asyncio.get_running_loop().time() + _FIRST_WAIT:
                return
            known[1].cancel()
        self._look_after(_FIRST_WAIT, transaction)

    def close(self) -> None:
        """No transaction is watched any more."""
        self._is_closed = True
        for _, timer in self._watched.values():
            timer.cancel()
        self._watched.clear()

    def _look_after(self, wait: float, transaction: Transaction) -> None:
        timer = asyncio.get_running_loop().call_later(wait, self._look, wait, transaction)
        self._watched[id(transaction.of)] = transaction, timer

    def _look(self, waited: float, transaction: Transaction) -> None:
        if not _is_over(transaction):
            self._look_after(min(waited * _GROWTH, _LONGEST_WAIT), transaction)
            return
        del self._watched[id(transaction.of)]
        self._wakeup.wake()
        self._notifier.notify()


def _is_over(transaction: Transaction) -> bool:
    try:
        return transaction.is_over()
    except Exception:  # noqa: BLE001 - each driver has its own error for a connection that was closed or given back
        return True
