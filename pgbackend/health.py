"""Whether a subscription's target is down, and when to try it again (I7).

States of a target, as its pumps see it:

    up     ── 10 different events failed in a row ──▶ down
    down   ── any success ──▶ up

While it is up, every event is dispatched as it comes and every failure counts for its event. While it is down,
nothing is dispatched but single probes, each with another event in turn: an hour's outage then uses up the attempts
of few events and floods nothing, and a run of bad events does not keep the good ones behind it for ever. Pure: told
the time, asks no clock.

The waits between probes begin with the `delay` of the subscription's `Retry` and grow by half each time, up to its
`max_delay`. By default an hour then has 18 probes, and the ten events that it takes at least have 40 attempts left: an
hour's outage buries nothing. Growing faster finds good events behind bad ones later, growing slower buries more.
"""

from pgbackend.retry import Retry

FAILURES_IN_A_ROW = 10
_GROWTH = 1.5
_LEAST_WAIT = 0.05
"""Seconds: a policy without a delay must not make probes a flood."""


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
            self.next_probe = now + self._wait()
            return False
        self.failing = True
        if self.down:
            return False
        self._failed.add(position)
        if len(self._failed) < FAILURES_IN_A_ROW:
            return False
        self.down = True
        self.next_probe = now + self._wait()
        return True

    def _wait(self) -> float:
        # 1.5⁶⁴ is beyond any limit, and not yet beyond a float.
        longest = max(self._retry.max_delay, _LEAST_WAIT)
        return min(max(self._retry.delay, _LEAST_WAIT) * _GROWTH ** min(self._probes, 64), longest)
