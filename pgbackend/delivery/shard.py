"""One shard while this worker runs it: its lease, its window, and what is to be committed for it next.

The pump fills it, the committer empties it. Pure: no I/O.

An **outcome** is what became of an event that was not simply handled. It is committed in the same statement as the
offset that it belongs to, so that a crash finds an event either in the log's path or in redelivery, never in both,
and never in neither. Of several outcomes for one event only the last is kept.
"""

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from pgbackend.delivery.outcomes import Finished, Outcome, OutcomeKey, outcome_key
from pgbackend.delivery.window import Window
from pgbackend.model import Failure
from pgbackend.subscriptions.leases import Lease
from pgbackend.subscriptions.presence import Tenure


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """What a failed event of an ordered shard has behind it: a new owner goes on from there."""

    attempt: int
    """Attempts made."""
    due_at: float
    """When the next one is due, in monotonic seconds."""
    failure: Failure | None
    """Why it was given up, if it was."""
    begun: bool
    """Whether the last attempt killed the process that made it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DueRequest:
    """What a shard would take of its failed events whose time has come."""

    lease: Lease
    events: bool
    """Whether also from `redeliveries`: in ordered modes they wait in the window, and come by the pump's own clock."""
    given_up: bool
    """Whether only what is for the dead-letter dispatcher."""
    room: int
    room_bytes: int
    positions: list[int]
    """At work already."""
    letters: list[int]
    """Dead letters at work already."""


@dataclass(frozen=True, slots=True)
class Mark:
    """What is to be committed for a shard."""

    position: int
    pending: str
    holes: str
    """The part of `pending` in which nobody has seen an event."""
    complete: bool
    calm: bool
    """Whether what was open when the shard was claimed from a dead worker is settled."""
    outcomes: Mapping[OutcomeKey, Outcome]

    def without(self, lost: Collection[int]) -> "Mark":
        """The mark as it was committed when these positions were gone from the log: nothing is due or kept of them."""
        if not lost:
            return self
        gone: dict[OutcomeKey, Outcome] = {("event", position): Finished(position=position) for position in lost}
        return replace(self, outcomes={**self.outcomes, **gone})


@dataclass(slots=True, eq=False)
class Shard:
    """A lease being used."""

    lease: Lease
    window: Window
    tenure: Tenure
    place: tuple[int, int]
    """The offset row's ctid as the last commit returned it."""
    lost: bool = False
    """Whether another worker has it, or may have: nothing is dispatched or committed any more."""
    complete: bool = False
    crashes: int = 0
    """As its row has it."""
    calm: bool = False
    """Whether its row may forget them."""
    noted: bool = False
    """Whether the committer knows that there may be something to commit."""
    outcomes: dict[OutcomeKey, Outcome] = field(default_factory=dict)
    committed: tuple[int, str, str] = (0, "{}", "{}")
    """Position, pending and holes, as its row has them."""

    @property
    def name(self) -> str:
        return f"{self.lease.subscription}/{self.lease.shard}"

    @property
    def is_over(self) -> bool:
        """Whether it has read up to where it ends for good. What is at work, or pending, is not in the way."""
        stop = self.lease.stop
        return self.lease.until is not None and stop is not None and self.window.position >= stop - 1

    def may_dispatch(self) -> bool:
        return not self.lost and time.monotonic() < self.tenure.valid_until

    def note(self, outcome: Outcome) -> None:
        self.outcomes[outcome_key(outcome)] = outcome

    def collect(self) -> Mark | None:
        """Take what there is to commit; None when the row says it already."""
        self.noted = False
        position, pending = self.window.mark()
        text, holes = str(pending), str(self.window.unseen(position))
        outcomes, self.outcomes = self.outcomes, {}
        calm = self.calm and self.crashes > 0
        if not (outcomes or self.complete or calm) and (position, text, holes) == self.committed:
            return None
        return Mark(position, text, holes, self.complete, calm, outcomes)

    def give_back(self, mark: Mark) -> None:
        """The commit did not happen, or nobody knows: commit it again with the next."""
        self.outcomes = {**mark.outcomes, **self.outcomes}
        self.committed = (-1, "", "")

    def confirm(self, mark: Mark, place: tuple[int, int]) -> None:
        """The row says it now."""
        self.place = place
        self.committed = (mark.position, mark.pending, mark.holes)
        if mark.calm:
            self.crashes = 0
