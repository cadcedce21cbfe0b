"""A durable event log for CloudEvents, inside the PostgreSQL you already run.

What can be imported from here is public; everything else may change without notice.
"""

from pgbackend import filters
from pgbackend.backend import Backend
from pgbackend.codec.event import Event
from pgbackend.errors import (
    ConfigError,
    ConnectionLostError,
    DatabaseError,
    EmbeddedServerError,
    EventError,
    NotRunningError,
    Pause,
    PgBackendError,
    ProbeError,
    ProduceTimeoutError,
    ProduceUncertainError,
    Reject,
    RetryAfter,
    SchemaError,
    SubscriptionBusyError,
    SubscriptionExistsError,
    SubscriptionMismatchError,
    SubscriptionNotFoundError,
)
from pgbackend.interface import EventProducer, Interface, Subscribable
from pgbackend.model import (
    BlockingAppender,
    ConsumerDispatcher,
    DeadLetter,
    Failure,
    Info,
    ShardStatus,
    Status,
    SubscriptionStatus,
)
from pgbackend.retry import Retry

__all__ = [
    "Backend",
    "BlockingAppender",
    "ConfigError",
    "ConnectionLostError",
    "ConsumerDispatcher",
    "DatabaseError",
    "DeadLetter",
    "EmbeddedServerError",
    "Event",
    "EventError",
    "EventProducer",
    "Failure",
    "Info",
    "Interface",
    "NotRunningError",
    "Pause",
    "PgBackendError",
    "ProbeError",
    "ProduceTimeoutError",
    "ProduceUncertainError",
    "Reject",
    "Retry",
    "RetryAfter",
    "SchemaError",
    "ShardStatus",
    "Status",
    "Subscribable",
    "SubscriptionBusyError",
    "SubscriptionExistsError",
    "SubscriptionMismatchError",
    "SubscriptionNotFoundError",
    "SubscriptionStatus",
    "filters",
]
