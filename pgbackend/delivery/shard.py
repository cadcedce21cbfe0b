"""A shard while this worker runs it: its lease, its window, and what to commit for it next. Pure: no I/O.

The pump settles events and records outcomes; the committer takes a `Mark` of that, and reports what became of it:

    settled or recorded ──▶ changed ──take_mark()──▶ under way ──confirm()──▶ committed
                               ▲                        │
                               └───────restore()────────┘
    any ──lose()──▶ lost: nothing is dispatched or committed any more
"""

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from pgbackend.delivery.outcomes import Finished, Outcome, OutcomeKey, following, outcome_key
from pgbackend.delivery.window import Window
from pgbackend.subscriptions.leases import Lease
from pgbackend.subscriptions.presence import Tenure


@dataclass(frozen=True, slots=True)
class Mark:
    """Everything to commit for a shard."""

    position: int
    pending: str
    holes: str
    """The part of `pending` in which nobody has seen an event."""
    complete: bool
    forget_crashes: bool
    """Whether everything is settled that was open when the shard was claimed from a dead worker."""
    outcomes: Mapping[OutcomeKey, Outcome]

    def without(self, lost: Collection[int]) -> "Mark":
        """The mark as it was committed when these positions were gone from the log: nothing is kept of them."""
        if not lost:
            return self
        gone: dict[OutcomeKey, Outcome] = {("event", position): Finished(position=position) for position in lost}
        return replace(self, outcomes={**self.outcomes, **gone})


class Shard:
    """A lease in use. It changes only through the methods here and those of its window."""

    __slots__ = (
        "_changed", "committed", "complete", "crashes", "forgets_crashes", "is_queued", "lease", "lost", "outcomes",
        "place", "tenure", "window",
    )  # fmt: skip

    def __init__(self, *, lease: Lease, window: Window, tenure: Tenure, on_change: Callable[["Shard"], None]) -> None:
        """`on_change`: queues the shard for the committer."""
        self.lease = lease
        self.window = window
        self.tenure = tenure
        self.place = lease.place
        """The offset row's ctid, as the last commit returned it."""
        self.committed = (int(lease.position), str(lease.pending), str(lease.holes))
        """Position, pending and holes, as the row has them."""
        self.crashes = lease.crashes
        """As the row has them."""
        self.forgets_crashes = False
        """Whether the next commit sets them to 0."""
        self.complete = lease.complete
        """Whether the subscription's end is reached."""
        self.lost = False
        """Whether another worker owns it, or may: nothing is dispatched or committed any more."""
        self.outcomes: dict[OutcomeKey, Outcome] = {}
        """Outcomes to commit beside the offset: the last one of each event."""
        self.is_queued = False
        """Whether the committer knows that there may be something to commit. Read after each dispatch."""
        self._changed = on_change

    @property
    def name(self) -> str:
        return f"{self.lease.subscription}/{self.lease.shard}"

    @property
    def is_over(self) -> bool:
        """Whether it has read up to where it ends for good. Events at work or pending do not matter."""
        stop = self.lease.stop
        return self.lease.until is not None and stop is not None and self.window.position >= stop - 1

    def may_dispatch(self) -> bool:
        return not self.lost and time.monotonic() < self.tenure.valid_until

    # Transitions by the pump.

    def changed(self) -> None:
        """There may be something to commit."""
        if not self.lost:
            self._changed(self)

    def record(self, outcome: Outcome) -> Outcome:
        """Commit the outcome with the next offset. Returns it with the steps of those that it replaces."""
        if not self.lost:
            key = outcome_key(outcome)
            outcome = self.outcomes[key] = following(self.outcomes.get(key), outcome)
            self._changed(self)
        return outcome

    def finish(self) -> None:
        """The subscription's end is reached."""
        self.complete = True
        self.changed()

    def seal(self) -> None:
        """No worker reads for this shard again, so the offset names everything that is open."""
        self.window.seal()
        self.changed()

    def forget_crashes(self) -> None:
        """Its former owners' crashes do not count any more."""
        self.forgets_crashes = True
        self.changed()

    def lose(self) -> None:
        """The lease is gone."""
        self.lost = True

    # Transitions by the committer.

    def take_mark(self) -> Mark | None:
        """Take what there is to commit; None when the row says it already."""
        mark = self.take_mark_with(())
        is_new = mark.outcomes or mark.complete or mark.forget_crashes
        return mark if is_new or (mark.position, mark.pending, mark.holes) != self.committed else None

    def take_mark_with(self, settling: Collection[int]) -> Mark:
        """Take what there is to commit, and with it that these events, which are in flight, are settled."""
        self.is_queued = False
        position, pending = self.window.mark(settling)
        text, holes = str(pending), str(self.window.unseen(position))
        outcomes, self.outcomes = self.outcomes, {}
        forget = self.forgets_crashes and self.crashes > 0
        return Mark(position, text, holes, self.complete, forget, outcomes)

    def restore(self, mark: Mark) -> None:
        """The commit did not happen, or nobody knows: the next one repeats it."""
        later = {key: following(mark.outcomes.get(key), outcome) for key, outcome in self.outcomes.items()}
        self.outcomes = {**mark.outcomes, **later}
        self.committed = (-1, "", "")

    def confirm(self, mark: Mark, place: tuple[int, int]) -> None:
        """The row says it now."""
        self.place = place
        self.committed = (mark.position, mark.pending, mark.holes)
        if mark.forget_crashes:
            self.crashes = 0
