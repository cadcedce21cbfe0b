"""The words of pgbackend as frozen dataclasses, which modules pass to each other and to the user.

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
"""The highest bigint."""

Epoch = NewType("Epoch", int)
"""The fencing token of a lease. A log never uses one twice."""

Order = Literal["none", "key", "strict"]

MAX_SHARDS = 1024
"""The most shards of a subscription: each worker surveys all shards each second."""

MAX_CONCURRENCY = 10_000
"""The most dispatches of a shard at once: each takes a task, or a thread for a plain function."""

MAX_NAME_BYTES = 1024
"""The limit of a subscription's name: an index of PostgreSQL has no room for much more."""

ConsumerDispatcher = Callable[["Event"], Awaitable[Any] | Any]
"""Handles one event. Returning means handled, raising means failed. A plain function runs in a thread."""

EventFilter = Callable[["Event"], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Info:
    """A description of a backend, known before `init()`."""

    name: str
    version: str
    schema: str
    server: str
    """Host, port and database of the DSN, without credentials."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The last failure of a dead letter. A `dead_letter` dispatcher gets it as `event.failure`."""

    error: str
    """Type and message of the last error."""
    attempts: int
    """The number of attempts, the first included."""
    details: Mapping[str, str] = field(default_factory=dict)
    """The `details` of the dispatcher's exception."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """An event that used up its attempts or was rejected, with its full content and its last error."""

    id: int
    subscription: str
    event: "Event"
    failure: Failure
    buried_at: datetime
    due_at: datetime | None
    """When it is dispatched again, after a `redeliver()`. Otherwise None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockingAppender:
    """An open transaction that has appended or is about to append. The log waits for it."""

    virtual_transaction: str
    pid: int | None
    """None for a prepared transaction, which `gid` names."""
    gid: str | None
    application: str | None
    age: float | None
    """Seconds since the transaction began. None when this role may not see it."""

    def __str__(self) -> str:
        who = f"prepared transaction {self.gid!r}" if self.pid is None else f"pid {self.pid}"
        named = f" ({self.application})" if self.application else ""
        return f"{who}{named}" + (f", open for {self.age:.0f} s" if self.age is not None else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardStatus:
    """One shard of a subscription, from its offset row."""

    shard: int
    shards: int
    position: Position
    pending: int
    """The number of positions at or below `position` that are not settled, as the sum of their ranges."""
    epoch: Epoch
    owner: str | None
    owner_name: str | None
    """Host and process of the worker that runs it. None when no live worker does."""
    until: Position | None = None
    """Where it ends, while the subscription changes to another number of shards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SubscriptionStatus:
    """One subscription: its progress and its backlog."""

    name: str
    order: Order
    shards: tuple[ShardStatus, ...]
    lag: int
    """Positions between the slowest shard's offset and the head of the log, pending ones included.
    Rolled-back positions count until the offset passes them. 0 for a complete subscription."""
    lag_seconds: float | None
    """Age of the oldest event that is not settled, by the server's clock; 0.0 when there is none. It is as old as the
    last offset commit: under load it does not go below `commit_interval`. None for a complete subscription; its events
    that are still to be retried count in `redeliveries`."""
    redeliveries: int
    dead_letters: int
    skipped: int
    """Unsettled positions whose rows are gone from the log, because a segment was removed or rows were deleted. In a
    removed segment every position counts that the subscription had not read, even if it was rolled back. Rows that
    were deleted one by one before the subscription read them do not count: they look like rolled-back ones."""
    last_error: str | None
    complete: bool
    state: str
    """In this process: `running`, `complete`, `target down`, `waiting for …`, `paused: ` with the reason, or
    `worker died: ` with the error. `elsewhere` when another worker runs it, `stopped` when no worker does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """The log and its subscriptions at one moment."""

    head: Position
    """The highest position that was given to an event. 0 for an empty log."""
    segments_until: Position
    """Positions below this one have a segment."""
    subscriptions: tuple[SubscriptionStatus, ...]
    appenders: tuple[BlockingAppender, ...]
    """Transactions that keep positions open at this moment, oldest first."""
