"""The health of a subscription's target: up, down, or paused (I7). Pure: it is told the time.

    up   ──10 different events failed in a row──▶ down ──any success──▶ up
    any  ──the subscription is paused──▶ paused ──it goes on──▶ up or down, as before
    any  ──another target takes its place──▶ retired

While a target is up, every failure counts for its event. While it is down, events are dispatched one at a time as
probes, each time another one. So an hour's outage uses up the attempts of few events and floods nothing, and a run of
bad events does not hide the good ones behind it. While a target is paused, nothing is dispatched (`pausing.py` decides
that). A retired target's results change nothing any more.

The waits between probes start at the `delay` of the subscription's `Retry` and grow by half each time, up to its
`max_delay`. By default an hour has 18 probes. They hit at least ten events, which have 40 attempts left together: an
hour's outage buries nothing. Faster growth finds good events behind bad ones later; slower growth buries more.
"""

from pgbackend.retry import Retry

FAILURES_IN_A_ROW = 10
_GROWTH = 1.5
_LEAST_WAIT = 0.05
"""Seconds. A policy without a delay must not flood the target with probes."""


class TargetHealth:
    """The health of a target, by its last dispatches."""

    def __init__(self, retry: Retry) -> None:
        self._retry = retry
        self._failed: set[int] = set()
        self._probes = 0
        # Plain attributes, because each dispatch reads them.
        self.held = False
        """Whether it is down, paused or retired, so that events are not just dispatched as they come."""
        self.down = False
        self.paused: str | None = None
        """Why nothing is dispatched, if so."""
        self.retired = False
        """Whether another target took its place."""
        self.probing = False
        """Whether a probe is at work: one at a time, however many shards run here."""
        self.failing = False
        """Whether the last dispatch failed."""
        self.next_probe = 0.0
        """No probe before, in monotonic seconds."""

    @property
    def probes(self) -> int:
        """How many probes failed since it went down."""
        return self._probes

    def succeeded(self) -> bool:
        """An event was handled. Returns whether that ended an outage."""
        was_down = self.down
        self._failed.clear()
        self._probes = 0
        self.down = self.failing = False
        self.held = self.paused is not None or self.retired
        return was_down

    def pause(self, reason: str | None) -> None:
        """Nothing is dispatched, for this reason; None: dispatching goes on."""
        self.paused = reason
        self.held = self.down or self.retired or reason is not None

    def retire(self) -> None:
        """Another target takes its place."""
        self.retired = self.held = True
        self.down = False
        self.paused = None

    def failed(self, position: int, *, now: float, probe: bool) -> bool:
        """An event failed. Returns whether that took the target down."""
        if self.retired:
            return False
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
        self.down = self.held = True
        self.next_probe = now + self._wait()
        return True

    def probe_now(self) -> None:
        """The next probe, if it is down, waits no longer. The waits go on as before if it fails."""
        self.next_probe = 0.0

    def _wait(self) -> float:
        # 1.5⁶⁴ is beyond any limit and still a float.
        longest = max(self._retry.max_delay, _LEAST_WAIT)
        return min(max(self._retry.delay, _LEAST_WAIT) * _GROWTH ** min(self._probes, 64), longest)
