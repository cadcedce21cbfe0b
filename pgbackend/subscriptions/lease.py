"""A lease: the right to run a shard, and until when its worker may use it. Pure."""

from dataclasses import dataclass
from datetime import datetime

from pgbackend.log.ranges import RangeSet
from pgbackend.model import Epoch, Order, Position
from pgbackend.subscriptions.sharing import ShardKey


class Tenure:
    """Until when this worker may begin dispatches, by its own monotonic clock. Set by the heartbeat's thread."""

    __slots__ = ("valid_until",)

    def __init__(self) -> None:
        self.valid_until = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """What `claim` returned: the right to run a shard, where it stands, and what the subscription is.

    What is stored of a subscription may be changed by any process, and always under a new epoch: so its terms come with
    the lease, and nobody runs a shard by others than those its epoch was given out with.
    """

    subscription: str
    shard: int
    shards: int
    epoch: Epoch
    until: int | None
    """Where it ends for good, and shards of another number take over: the last position that is its own."""
    position: Position
    pending: RangeSet
    holes: RangeSet
    """The part of `pending` in which nobody has seen an event: it may have been rolled back."""
    place: tuple[int, int]
    """The offset row's ctid."""
    complete: bool
    crashes: int
    """How many owners in a row have died with it before they had settled what was open when they took it."""
    head: int
    """The highest position given out when it was claimed: what a former owner had at work is at or below it."""
    order: Order
    start_position: int | None
    """Events at or below it are not for this subscription: its start was ahead of the log."""
    start_at: datetime | None
    """Events recorded at or before it are not for this subscription."""
    end_position: int | None
    """Events at or behind it are not for this subscription."""
    end_at: datetime | None
    """Events recorded at or after it are not for this subscription."""

    @property
    def key(self) -> ShardKey:
        return self.subscription, self.shards, self.shard

    @property
    def stop(self) -> int | None:
        """The first position that is not this lease's; None while there is no such place."""
        bounds = [self.end_position, None if self.until is None else self.until + 1]
        return min((bound for bound in bounds if bound is not None), default=None)

    @property
    def last_open(self) -> int:
        """The highest position that a former owner may have had at work."""
        return self.head if self.stop is None else min(self.head, self.stop - 1)
