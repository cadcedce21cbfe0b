"""Whether a subscription's target is down, and when to try it again (I7); or whether it is not to be tried at all.

States of a target, as its pumps see it:

    up     ── 10 different events failed in a row ──▶ down
    down   ── any success ──▶ up
    any    ── it wants nothing more ──▶ paused ── until somebody steps in
    any    ── another one takes its place ──▶ retired

While it is up, every event is dispatched as it comes and every failure counts for its event. While it is down,
nothing is dispatched but single probes, each with another event in turn: an hour's outage then uses up the attempts
of few events and floods nothing, and a run of bad events does not keep the good ones behind it for ever. While it is
paused nothing is dispatched at all; what a retired one still has to say concerns nobody. Pure: told the time, asks no
clock.

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
        self.held = False
        """Whether events must not just be dispatched as they come: it is down, paused, or retired."""
        self.down = False
        self.paused: str | None = None
        """Why nothing is dispatched any more, if so."""
        self.retired = False
        """Whether another target has taken its place: who still holds this one looks again."""
        self.probing = False
        """Whether a probe is under way: one at a time, however many shards are here."""
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
        self.held = self.paused is not None or self.retired
        return was_down

    def pause(self, reason: str) -> bool:
        """It wants nothing more; whether that is news."""
        if self.retired or self.paused is not None:
            return False
        self.paused = reason
        self.held = True
        return True

    def retire(self) -> None:
        """Another target has taken its place."""
        self.retired = self.held = True
        self.down = False
        self.paused = None

    def failed(self, position: int, *, now: float, probe: bool) -> bool:
        """An event failed; whether that is what took the target down."""
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

    def _wait(self) -> float:
        # 1.5⁶⁴ is beyond any limit, and not yet beyond a float.
        longest = max(self._retry.max_delay, _LEAST_WAIT)
        return min(max(self._retry.delay, _LEAST_WAIT) * _GROWTH ** min(self._probes, 64), longest)
