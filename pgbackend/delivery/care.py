"""Events that kill the process that handles them: how they are found without harm to others (I7).

A process that dies says nothing. What is known is that a shard's owner died, and again, and that the next one takes it
over before what was open has been settled: `crashes` counts that. From the second time on the shard is run with care:
its events are dispatched one at a time, alone among all that this process runs with care, and before each the attempt
is committed as one that has begun. If that is the last that is heard of it, the next owner knows who did it. From then
on that event is dispatched alone wherever it comes from, and is given up when its attempts are used up, as any other.

Care ends after so many events that the one which killed must have been among them, or after a minute, and after twice
as long with each further crash: events that take long must not be dispatched one by one for hours, nor wait for another
subscription's dispatcher that hangs. Both care and the count of crashes end when all that was open at the takeover is
settled. A shard whose owners died of something else is slower for a moment, no more.
"""

from time import monotonic

_SUSPICIOUS = 2
"""Crashes in a row. One alone is a deployment, a machine that was switched off, an operator's kill -9."""
_ENOUGH = 10.0
"""Seconds of care after which twice as many events as can be dispatched at a time are enough: what was settled and not
committed, beside what was at work, is less than that where events take their time."""
_LONGEST = 60.0
"""Seconds of care after the second crash. What was handled by then is settled: the next life looks further on."""
_CALM_AFTER = 30.0
"""Seconds in which whatever was due at the takeover has been tried: failed events come within a second or two."""


class ProcessDied(Exception):  # noqa: N818 - what is told of an event, never raised
    """What is said of an attempt that was begun, and of which nothing was heard any more."""

    def __init__(self) -> None:
        super().__init__("the process that was handling it ended without a word")


class Care:
    """Whether a shard is run with care, and for how long."""

    def __init__(self, *, crashes: int, most: int) -> None:
        """`crashes`: of the shard's owners, in a row. `most`: how many events may have been in flight at once."""
        self.taken = crashes >= _SUSPICIOUS
        self._most = most
        self._longest = _LONGEST * 2.0 ** min(max(crashes - _SUSPICIOUS, 0), 10)
        self._handled = 0
        self._began = monotonic()

    def handled(self, *, concurrency: int) -> None:
        """One more event was dispatched alone, and the process lives."""
        self._handled += 1
        enough = self._handled >= 2 * concurrency and monotonic() - self._began > _ENOUGH
        if enough or self._handled >= self._most or self.left() <= 0:
            self.taken = False

    def left(self) -> float:
        """For how many seconds it may still be taken."""
        return self._longest - (monotonic() - self._began)

    def is_past(self) -> bool:
        """Whether it is so long since the shard was claimed that its former owner's work has had its turn."""
        return monotonic() - self._began > _CALM_AFTER
