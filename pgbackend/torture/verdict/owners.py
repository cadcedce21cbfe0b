"""Rule: a shard has one owner. A process dispatches nothing under a lease that is no longer its own.

Three overlaps are allowed if a planned fault explains that the lease was lost, because no lease can rule them out. What
had started before the takeover may end. One event that the process was just about to dispatch may start when it wakes
from a stop, or hears that its connection is gone. And until it hears that, it may start more, for a second. None of
this can be committed.
"""

from dataclasses import dataclass

from pgbackend.torture.verdict.leases import Lease, Leases
from pgbackend.torture.verdict.progress import Dispatch
from pgbackend.torture.verdict.rulings import NEVER, OWNER, SECOND, Verdict
from pgbackend.torture.verdict.timeline import TOLERANCE, Timeline

_MOMENT = SECOND
"""A process that is told that its connection is gone may need so long to notice, and as long to wake from a stop."""


@dataclass(slots=True)
class _Process:
    dispatched_at: int = -1
    """When its last dispatch started."""
    heard_at: int = -1
    """When it last noticed that its connection, or its server, was gone."""


class Owners:
    """Checks each dispatch against the leases."""

    def __init__(self, leases: Leases, timeline: Timeline, verdict: Verdict) -> None:
        self._leases = leases
        self._timeline = timeline
        self._ruling = verdict.rulings[OWNER]
        self._overlaps = verdict.overlaps
        self._processes: dict[str, _Process] = {}

    def heard(self, process: str, at: int) -> None:
        """A process noticed that its connection, or its server, was gone."""
        self._process(process).heard_at = at

    def dispatched(self, dispatch: Dispatch) -> Lease | None:
        """Check a dispatch when it starts. Returns its lease; None if the process never had it."""
        self._ruling.checked += 1
        lease = self._leases.get(dispatch.epoch)
        if lease is None or (lease.subscription, lease.shard, lease.process) != (
            dispatch.subscription, dispatch.shard, dispatch.process,
        ):  # fmt: skip
            self._ruling.violated(f"without a lease: {dispatch}")
            lease = None
        elif dispatch.at > lease.ended_at + TOLERANCE:
            self._check_start(dispatch, lease)
        self._process(dispatch.process).dispatched_at = dispatch.at
        return lease

    def ended(self, dispatch: Dispatch, at: int) -> None:
        """Check a dispatch when it ends."""
        lease = self._leases.get(dispatch.epoch)
        if lease is None or not dispatch.at <= lease.ended_at + TOLERANCE < at:
            return
        if lease.released_at != NEVER:
            self._ruling.violated(f"still at work after its process had released the shard: {dispatch}")
        elif self._ruling.is_explained(
            self._timeline.find_cause_of_loss(lease), f"still at work {_after(lease, at)}: {dispatch}"
        ):
            self._overlaps.finished += 1

    def _check_start(self, dispatch: Dispatch, lease: Lease) -> None:
        """Check a dispatch that starts after its lease has ended."""
        at, process = dispatch.at, self._process(dispatch.process)
        if lease.released_at != NEVER:
            self._ruling.violated(f"started after its process had released the shard: {dispatch}")
            return
        text = f"started {_after(lease, at)}: {dispatch}"
        if not self._ruling.is_explained(self._timeline.find_cause_of_loss(lease), text):
            return
        woke_at, broken_at = (find(dispatch.process, at) for find in (self._timeline.woke_at, self._timeline.broken_at))
        if (process.dispatched_at < woke_at and at - woke_at < _MOMENT) or (
            process.dispatched_at < process.heard_at and lease.at < process.heard_at and at - process.heard_at < _MOMENT
        ):
            self._overlaps.about_to_start += 1
        elif process.heard_at < broken_at and at - max(broken_at, lease.ended_at) < _MOMENT:
            self._overlaps.unaware += 1
        else:
            self._ruling.violated(text)

    def _process(self, name: str) -> _Process:
        return self._processes.setdefault(name, _Process())


def _after(lease: Lease, at: int) -> str:
    assert lease.successor is not None  # noqa: S101 - it was not released
    successor = lease.successor
    return (
        f"{(at - lease.ended_at) / SECOND:.3f} s after {successor.process} claimed the shard "
        f"with epoch {successor.epoch}"
    )
