"""Facts: who owned which shard from when to when, by the server's own record. With the rule about commits."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from pgbackend.log.ranges import RangeSet
from pgbackend.torture.audit import Change
from pgbackend.torture.verdict.rulings import NEVER, Ruling


@dataclass(slots=True)
class Lease:
    """A process's right to a shard."""

    subscription: str
    shard: int
    epoch: int
    process: str
    at: int
    """When it was claimed."""
    life: int
    """When the server's life began in which it was claimed."""
    position: int
    pending: RangeSet = field(repr=False)
    """Unsettled positions at or below the position: pending, or waiting for redelivery."""
    released_at: int = NEVER
    successor: "Lease | None" = field(default=None, repr=False)
    """The next lease of the shard."""

    @property
    def ended_at(self) -> int:
        """When the process released it, or another lease took its place."""
        return min(self.released_at, NEVER if self.successor is None else self.successor.at)

    def had_settled(self, position: int) -> bool:
        """Whether the offset row said that the position was settled when the lease was claimed."""
        return position <= self.position and position not in self.pending


class Leases:
    """Every lease of the run, by its epoch."""

    def __init__(self, changes: Iterable[Change], ruling: Ruling) -> None:
        """`ruling`: of the promise that a former owner commits nothing."""
        self._leases: dict[int, Lease] = {}
        self._last: dict[tuple[str, int], Lease] = {}
        self._ruling = ruling
        self.commits = 0
        self.lives: set[int] = set()
        """When each life of the server began, as far as something changed in it."""
        for change in changes:
            ruling.checked += 1
            self.lives.add(change.life)
            if change.epoch != change.epoch_before:
                self._claim(change)
            else:
                self._commit(change)

    def __iter__(self) -> Iterator[Lease]:
        return iter(self._leases.values())

    def get(self, epoch: int) -> Lease | None:
        """The lease of an epoch; None if the server gave out no such lease."""
        return self._leases.get(epoch)

    def _claim(self, change: Change) -> None:
        if change.epoch < change.epoch_before or change.position != change.position_before:
            self._ruling.violated(f"a lease was claimed with an older epoch, or another position: {change}")
        lease = Lease(
            subscription=change.subscription,
            shard=change.shard,
            epoch=change.epoch,
            process=change.made_by,
            at=change.at,
            life=change.life,
            position=change.position,
            pending=RangeSet.parse(change.pending),
        )
        if (former := self._last.get((lease.subscription, lease.shard))) is not None:
            former.successor = lease
        self._leases[lease.epoch] = self._last[lease.subscription, lease.shard] = lease

    def _commit(self, change: Change) -> None:
        lease = self._leases.get(change.epoch)
        if lease is None or lease.process != change.made_by:
            owner = "nobody" if lease is None else lease.process
            self._ruling.violated(f"the lease was {owner}'s, and another process committed: {change}")
        elif lease.released_at != NEVER:
            self._ruling.violated(f"{lease.process} had released the lease, and committed: {change}")
        elif change.position < change.position_before:
            self._ruling.violated(f"an offset went back: {change}")
        elif change.owner is None:
            lease.released_at = change.at
        else:
            self.commits += 1
