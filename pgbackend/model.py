"""The words of pgbackend as frozen facts: what the other modules pass to each other and to the user.

For readers from elsewhere: ack = settle, nack = a dispatcher that raises, cursor = offset, consumer group =
subscription, Redis' PEL = pending, visibility timeout ≈ lease. An offset is the last settled position (Kafka's is the
next one to read).
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, NewType

if TYPE_CHECKING:
    from pgbackend.codec.event import Event

Position = NewType("Position", int)
"""An event's place in the log: a positive bigint, the log's total order."""

MAX_POSITION = 2**63 - 1
"""The highest that a bigint holds."""

Epoch = NewType("Epoch", int)
"""The fencing token of a lease. Unique in a log for ever."""

Order = Literal["none", "key", "strict"]

MAX_SHARDS = 1024
"""Of a subscription: each worker looks at every shard there is each second."""

MAX_CONCURRENCY = 10_000
"""Of a shard: it keeps a task for each event at work, or a thread for a plain function."""

MAX_NAME_BYTES = 1024
"""Of a subscription's name: an index of PostgreSQL has no room for much more."""

ConsumerDispatcher = Callable[["Event"], Awaitable[Any] | Any]
"""Handles one event. Returning means handled, raising means failed. A plain function runs in a thread."""

EventFilter = Callable[["Event"], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Info:
    """What a backend is, known before `init()`."""

    name: str
    version: str
    schema: str
    server: str
    """Host, port and database of the DSN, without credentials."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why an event was given up: handed to a `dead_letter` dispatcher as `event.failure`, kept with a dead letter."""

    error: str
    """Type and message of the last error."""
    attempts: int
    """Attempts that were made, the first included."""
    details: Mapping[str, str] = field(default_factory=dict)
    """What the dispatcher's exception carried in its `details`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """An event that used up its attempts, with its full content and its last error."""

    id: int
    subscription: str
    event: "Event"
    failure: Failure
    buried_at: datetime
    due_at: datetime | None
    """When it is dispatched again after a `redeliver()`; None while it rests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockingAppender:
    """An open transaction that has appended, or is about to append, and that the log waits for."""

    virtual_transaction: str
    pid: int | None
    """None for a prepared transaction; `gid` names that one."""
    gid: str | None
    application: str | None
    age: float | None
    """Seconds since its transaction began; None when this role may not see it."""

    def __str__(self) -> str:
        who = f"prepared transaction {self.gid!r}" if self.pid is None else f"pid {self.pid}"
        named = f" ({self.application})" if self.application else ""
        return f"{who}{named}" + (f", open for {self.age:.0f} s" if self.age is not None else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardStatus:
    """One shard of a subscription, as its offset row says."""

    shard: int
    shards: int
    position: Position
    pending: int
    """Positions at or below `position` that are not settled, counted over their ranges."""
    epoch: Epoch
    owner: str | None
    owner_name: str | None
    """Host and process of the worker that has it; None when nobody who is alive does."""
    until: Position | None = None
    """Where it ends, while the subscription is on its way to another number of shards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SubscriptionStatus:
    """One subscription: where it stands and what it owes."""

    name: str
    order: Order
    shards: tuple[ShardStatus, ...]
    lag: int
    """Positions between the slowest shard's offset and the head of the log, pending ones included.
    Rolled-back positions count until they are passed. 0 for a complete subscription: it wants nothing more."""
    lag_seconds: float | None
    """Age of the oldest event that is not settled, by the server's clock; 0.0 when there is none. As of the last offset
    commit: under load it does not go below `commit_interval`. None for a complete subscription: what it has to try
    again all the same is among `redeliveries`."""
    redeliveries: int
    dead_letters: int
    skipped: int
    """Positions that were still to be handled when their rows were gone from the log: removed with a segment, or
    deleted. Of a removed segment all count that the subscription had not read; some may have been rolled back. Rows
    that were deleted one by one before it read them cannot be told from rolled-back ones, and do not count."""
    last_error: str | None
    complete: bool
    state: str
    """In this process `running`, `complete`, `target down`, `waiting for …`, or `paused: ` and why, or `worker died: `
    and of what; `elsewhere` when another worker runs it, `stopped` when nobody does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """The log and its subscriptions at one moment."""

    head: Position
    """The highest position given out; 0 for an empty log."""
    segments_until: Position
    """Positions below this one have a segment."""
    subscriptions: tuple[SubscriptionStatus, ...]
    appenders: tuple[BlockingAppender, ...]
    """Transactions that hold positions open at this moment, oldest first."""
