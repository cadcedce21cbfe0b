"""Rule: an event is repeated only after a fault, and never once it is settled.

A repeat is a dispatch of an attempt that was dispatched before. It needs another lease, and a planned cause for the
loss of the older one. A dispatch of a later attempt is a retry; `attempts.py` checks it.
"""

from pgbackend.torture.verdict.leases import Lease, Leases
from pgbackend.torture.verdict.progress import Dispatch, Progress
from pgbackend.torture.verdict.rulings import Ruling, Tally
from pgbackend.torture.verdict.timeline import Timeline


class Repeats:
    """Checks each dispatch of an event against the one before."""

    def __init__(self, leases: Leases, timeline: Timeline, ruling: Ruling) -> None:
        self._leases = leases
        self._timeline = timeline
        self._ruling = ruling

    def dispatched(self, dispatch: Dispatch, lease: Lease, progress: Progress, tally: Tally) -> None:
        """`progress`: before this dispatch."""
        self._ruling.checked += 1
        position, before = dispatch.position, progress.epoch(dispatch.position)
        if not before:
            return
        if lease.had_settled(position):
            self._ruling.violated(f"settled when the lease was claimed, at {lease.position}: {dispatch}")
        elif dispatch.attempt > progress.attempt(position):
            tally.retries += 1
        elif before == lease.epoch:
            self._ruling.violated(f"twice under one lease: {dispatch}")
        else:
            # A former owner that is late may come second. The loss of the older lease explains both.
            older = self._leases.get(min(before, lease.epoch))
            cause = self._timeline.find_cause_of_loss(older) if older is not None else None
            former = older.process if older is not None else "nobody"
            if self._ruling.is_explained(
                cause, f"no fault of {former}, which had dispatched it under epoch {before}: {dispatch}"
            ):
                assert cause is not None  # noqa: S101 - it explains
                tally.repeats[cause.kind] += 1
