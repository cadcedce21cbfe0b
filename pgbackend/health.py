"""Whether a subscription's target is down, and when to try it again (I7).

States of a target, as its pumps see it:

    up     ── 10 different events failed in a row ──▶ down
    down   ── any success ──▶ up

While it is up, every event is dispatched as it comes and every failure counts for its event. While it is down,
nothing is dispatched but single probes, each with another event in turn: an hour's outage then uses up the attempts
of few events and floods nothing, and a run of bad events does not keep the good ones behind it for ever. The waits
between probes grow as the subscription's `Retry` says, up to its `max_delay`. Pure: told the time, asks no clock.
"""

from pgbackend.retry import Retry

FAILURES_IN_A_ROW = 10


class TargetHealth:
    """What the last dispatches say of a target."""

    def __init__(self, retry: Retry) -> None:
        self._retry = retry
        self._failed: set[int] = set()
        self._probes = 0
        # Plain attributes: they are read before and after each dispatch.
        self.down = False
        self.failing = False
        """Whether the last dispatch failed: a success would be news."""
        self.next_probe = 0.0
        """Monotonic seconds: no probe before."""

    @property
    def probes(self) -> int:
        """How many probes have failed since it went down."""
        return self._probes

    def succeeded(self) -> bool:
        """An event was handled; whether that brought the target up again."""
        was_down = self.down
        self._failed.clear()
        self._probes = 0
        self.down = self.failing = False
        return was_down

    def failed(self, position: int, *, now: float, probe: bool) -> bool:
        """An event failed; whether that is what took the target down."""
        if probe:
            self._probes += 1
            self.next_probe = now + self._retry.wait(self._probes + 1)
            return False
        self.failing = True
        if self.down:
            return False
        self._failed.add(position)
        if len(self._failed) < FAILURES_IN_A_ROW:
            return False
        self.down = True
        self.next_probe = now + self._retry.wait(1)
        return True
