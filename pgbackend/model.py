"""The words of pgbackend as frozen dataclasses, which modules pass to each other and to the user.

For readers from elsewhere: ack = settle, nack = a dispatcher that raises, cursor = offset, consumer group =
subscription, Redis' PEL = pending, visibility timeout ≈ lease. An offset is the last settled position (Kafka's is the
next one to read).
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
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

MAX_BATCH = 10_000
"""The most events that a dispatcher gets at once."""

MAX_NAME_BYTES = 1024
"""The limit of a subscription's name: an index of PostgreSQL has no room for much more."""

ConsumerDispatcher = Callable[["Event"], Awaitable[Any] | Any]
"""Handles one event. Returning means handled, raising means failed. A plain function runs in a thread."""

BatchDispatcher = Callable[[list["Event"]], Awaitable[Any] | Any]
"""Handles a batch: returning means that all are handled. Raises `Failed` when some are not."""

TransactionalDispatcher = Callable[["Event", Any], Awaitable[Any]]
"""Handles one event in the transaction of an asyncpg connection, in which the offset is committed too."""

TransactionalBatchDispatcher = Callable[[list["Event"], Any], Awaitable[Any]]
"""The same for a batch."""

Dispatcher = ConsumerDispatcher | BatchDispatcher | TransactionalDispatcher | TransactionalBatchDispatcher
"""Any of the four. The options `batch` and `transactional` of a subscription say which one."""

EventFilter = Callable[["Event"], bool]

HistoryKind = Literal["failed", "given up", "buried", "redelivered", "skipped"]
"""`failed`: an attempt did. `given up`: the dead-letter dispatcher has its turn. `buried`: the event became a dead
letter, or one that was sent again is at rest again. `redelivered`: an operator sent the dead letter again. `skipped`:
an operator skipped the event."""


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
class HistoryEntry:
    """One entry in the history of a failed event."""

    at: datetime
    """By the server's clock."""
    what: HistoryKind
    attempt: int | None
    """The number of the attempt that failed; None for all others. It begins again at 1 after `given up`, for the
    dead-letter dispatcher, and after `redelivered`."""
    error: str | None
    """The type and message of the attempt's error, at most 500 characters. Of a skip: which role did it. Of a burial
    without an attempt: why the event cannot be read."""


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
    group: str
    """The name of its failure group: see `DeadLetterGroup`."""
    history: tuple[HistoryEntry, ...]
    """Its last 20 entries, oldest first. An event that became a dead letter before revision r0008 has none of that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetterGroup:
    """The dead letters of one subscription with the same error. Numbers and hexadecimal ids in errors do not count.

    Numbers from 100 to 599 do, because they may be statuses of HTTP.
    """

    name: str
    """Eight hexadecimal digits, which the subscription and the error decide."""
    subscription: str
    letters: int
    due: int
    """The number of those that are dispatched again, after a `redeliver()`."""
    first_at: datetime
    """When the first of them became a dead letter."""
    last_at: datetime
    error: str
    """The error of one of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingEvent:
    """A failed event that waits to be tried again."""

    position: Position
    id: str | None
    """None, as `source` and `type`, when its row is gone from the log: the subscription will skip it."""
    source: str | None
    type: str | None
    attempts: int
    """The attempts made, by the dead-letter dispatcher if the event was given up."""
    due_at: datetime
    """When it is tried again, by the server's clock. A target that is down delays it."""
    error: str
    """Type and message of the last error."""
    given_up: bool
    """Whether it waits for the dead-letter dispatcher."""
    history: tuple[HistoryEntry, ...]
    """Its last 20 entries, oldest first. They are deleted with the event's row once it is handled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Redaction:
    """A redacted event, and what `redact()` found."""

    position: Position
    redacted_at: datetime
    """When it was redacted first, by the server's clock."""
    redacted_by: str
    """The role that did it."""
    dead_letters: int
    """The number of its dead letters that this call deleted."""
    unsettled: tuple[str, ...]
    """The subscriptions that have not settled it, as far as their offsets say. They skip it, on record."""
    tables: tuple[str, ...]
    """The tables in which this call left old versions of rows, as SQL names. They stay on disk until a VACUUM."""


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
class Paused:
    """The pause of a subscription, as it is stored: no process dispatches its events."""

    at: datetime
    """By the server's clock."""
    by: Literal["operator", "dispatcher"]
    """`operator`: `pause()` was called, and only `resume()` ends it. `dispatcher`: a dispatcher raised `Pause`, and
    another target ends it as well."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SubscriptionStatus:
    """One subscription: its progress and its backlog."""

    name: str
    order: Order
    shards: tuple[ShardStatus, ...]
    lag: int
    """Positions between the slowest shard's offset and the head of the log, pending ones included.
    Rolled-back positions count until the offset passes them; positions that a cut of a segment left unused, and those
    that retention has dropped, do not. 0 for a complete subscription."""
    lag_seconds: float | None
    """Age of the oldest event that is not settled, by the server's clock; 0.0 when there is none. It is as old as the
    last offset commit: under load it does not go below `commit_interval`. None for a complete subscription; its events
    that are still to be retried count in `redeliveries`."""
    in_flight: int
    """Events at or below the offset that a worker has taken on and not settled, as of its last offset commit. Those
    that are at work above the offset are not known to the log, and count in `lag` only."""
    redeliveries: int
    """Failed events that wait to be tried again."""
    dead_letters: int
    """Events that were given up, and are kept."""
    skipped: int
    """Unsettled positions whose rows are gone from the log, because a segment was removed, rows were deleted, or an
    event was redacted. A redacted event counts in each shard that had not read it. In a removed segment every position
    counts that the subscription had not read, even if it was rolled back. Rows that
    were deleted one by one before the subscription read them do not count: they look like rolled-back ones. What a
    hard limit of the retention drops counts at once, also where no worker runs the subscription."""
    last_error: str | None
    """The error of the event that is to be tried again last. None when no event waits for that."""
    complete: bool
    """Whether it has settled everything up to its end."""
    paused: Paused | None
    """The pause that all processes obey; None while there is none. A process learns of a change within a second, and
    `state` says when this one has."""
    state: str
    """In this process: `running`, `complete`, `target down`, `waiting for …`, `paused: ` with the reason, or
    `worker died: ` with the error. When this process runs none of its shards: `paused: ` with the reason, else
    `elsewhere` when another worker runs it, `stopped` when no worker does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeekPreview:
    """The outcome that a seek would have. The subscription's filter is not known to it."""

    position: Position
    """The next event would be the first one above. With a date, it would also be recorded after that."""
    again: int
    """Events that the subscription has settled, and that would come again."""
    skipped: int
    """Events that it has not settled, and that would not come any more. Those that wait to be tried again count too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """How long a log keeps events and dead letters. None: no limit."""

    keep: timedelta | None = None
    """Events that every subscription has settled stay at least this long."""
    max_age: timedelta | None = None
    """Older events go even if a subscription has not settled them."""
    max_bytes: int | None = None
    """While the log takes more bytes on disk, its oldest events go even if a subscription has not settled them."""
    dead_letters: timedelta | None = None
    """Dead letters stay this long."""

    @property
    def drops_segments(self) -> bool:
        """Whether events go at all."""
        return not (self.keep is None and self.max_age is None and self.max_bytes is None)

    def __str__(self) -> str:
        limits = [
            f"keep {time_text(self.keep)}",
            None if self.max_age is None else f"max age {time_text(self.max_age)}",
            None if self.max_bytes is None else f"max bytes {self.max_bytes:,}",
            f"dead letters {time_text(self.dead_letters)}",
        ]
        return ", ".join(filter(None, limits))


def time_text(time: timedelta | None) -> str:
    """As the options of `pgbackend retention` take it, in the largest unit that gives a whole number.

    >>> [time_text(time) for time in (None, timedelta(days=7), timedelta(hours=36), timedelta(seconds=1.5))]
    ['forever', '7d', '36h', '1.5s']
    """
    if time is None:
        return "forever"
    for unit, size in (("d", timedelta(days=1)), ("h", timedelta(hours=1)), ("min", timedelta(minutes=1))):
        if not time % size:
            return f"{time // size}{unit}"
    return f"{time.total_seconds():g}s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A subscription because of which the oldest events are still in the log, though they are older than `keep`."""

    subscription: str
    is_run: bool
    """Whether a live worker runs it."""
    is_paused: bool
    """Whether it is paused. A worker may run it nevertheless: its events wait there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """The log and its subscriptions at one moment."""

    head: Position
    """The highest position that was given to an event. 0 for an empty log."""
    rate: float
    """Events appended a second, over the last minute. Appends that were rolled back count too."""
    bytes_on_disk: int
    """The size of the events with their index, in all segments: what `Retention.max_bytes` limits."""
    segments: int
    """The number of segments, with about ten that are made ahead."""
    segments_until: Position
    """Positions below this one have a segment."""
    subscriptions: tuple[SubscriptionStatus, ...]
    appenders: tuple[BlockingAppender, ...]
    """Transactions that keep positions open at this moment, oldest first."""
    retention: Retention
    """How long the log keeps events."""
    holders: tuple[Holder, ...]
    """The subscriptions that hold events in the log beyond that."""
