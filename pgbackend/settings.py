"""Every setting of a Backend: meaning, default, unit, bounds and trade-off.

`Backend()` takes these fields by keyword and makes one `Settings` of them, which its worker gets too. A `Settings` that
exists is within its bounds. The exception is `schema`: `Backend` checks it, because the rules for names are
PostgreSQL's.
"""

from dataclasses import dataclass
from datetime import timedelta

from pgbackend.errors import ConfigError, shown

_DAY = 86_400
"""The longest time that a setting takes, in seconds."""
_SHORTEST = 0.001
"""The shortest time of a setting that may not be zero, in seconds."""
MAX_EVENT_BYTES = 256 << 20
"""The largest `max_event_bytes`. A message to PostgreSQL ends at 1 GiB, and encoding an event takes copies of it."""
_MAX_BYTES = 1 << 40
_MAX_POOL_SIZE = 1_000
_MAX_WINDOW_EVENTS = 100_000
_SHORTEST_DEDUPLICATION, _LONGEST_DEDUPLICATION = timedelta(seconds=0.1), timedelta(days=366)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a Backend works. Times are in seconds, from 0.001 to a day unless noted; sizes are in bytes.

    Raises ConfigError for a value out of its bounds.
    """

    schema: str = "pgbackend"
    """The PostgreSQL schema that holds the log. One database can hold several logs, each in its own schema."""
    hole_wait: float = 1.0
    """How long an open appender may delay other events, once; from 0. Longer: fewer events are delivered out of log
    order. Shorter: a transaction that stays open delays others less."""
    poll_interval: float = 1.0
    """Time between two reads of the log when no wake-up comes. Longer: an idle process costs less. Shorter: an event
    whose wake-up is lost is dispatched sooner."""
    commit_interval: float = 0.1
    """Least time between two offset commits. Longer: fewer commits, and more events repeated after a crash."""
    lease_timeout: float = 15.0
    """Time without a sign of life after which a worker loses its shards. Shorter: others take over sooner. Longer: a
    worker survives longer pauses of its process or its network."""
    produce_timeout: float = 30.0
    """The longest that a `produce()` takes."""
    drain_timeout: float = 30.0
    """How long running dispatches may take to end before `stop()` cancels them, and before a shard that others ask for
    stays here instead; from 0. Longer: fewer events are repeated. Shorter: deployments and handovers are faster."""
    max_event_bytes: int = 1 << 20
    """The largest event that the log takes, data and attributes together; at most 256 MiB. The attributes of an event
    have 64 KiB together in any case."""
    pool_size: int = 4
    """Connections for short statements, beside one that appends and one that listens; at most 1,000. 1 counts as 2,
    because the check of the fence needs two at once. More: more calls such as `status()` run at a time."""
    window_events: int = 1_000
    """Events that a shard has in flight at most; up to 100,000. More: slow targets get more events at a time, and more
    events are repeated after a crash."""
    window_bytes: int = 16 << 20
    """Bytes that the events in flight of a shard take at most; up to 1 TiB. The trade-off of `window_events`."""
    buffer_bytes: int = 64 << 20
    """Bytes of the log that the process keeps for subscriptions that are a little behind; up to 1 TiB. More: fewer
    pages are read twice. Fewer: less memory."""
    deduplicate: timedelta | None = None
    """The window in which the log takes each event once, by its `source` and `id`: from 0.1 s to 366 days, 0 for no
    deduplication. It is stored with the log, for all of its producers; None leaves what is stored, which is 0 for a new
    log. Longer: copies that come later are recognized, and more keys are kept, 150 bytes an event for up to three
    windows."""

    def __post_init__(self) -> None:
        _check_seconds("hole_wait", self.hole_wait, at_least=0)
        _check_seconds("poll_interval", self.poll_interval)
        _check_seconds("commit_interval", self.commit_interval)
        _check_seconds("lease_timeout", self.lease_timeout)
        _check_seconds("produce_timeout", self.produce_timeout)
        _check_seconds("drain_timeout", self.drain_timeout, at_least=0)
        _check_count("max_event_bytes", self.max_event_bytes, at_most=MAX_EVENT_BYTES)
        _check_count("pool_size", self.pool_size, at_most=_MAX_POOL_SIZE)
        _check_count("window_events", self.window_events, at_most=_MAX_WINDOW_EVENTS)
        _check_count("window_bytes", self.window_bytes, at_most=_MAX_BYTES)
        _check_count("buffer_bytes", self.buffer_bytes, at_most=_MAX_BYTES)
        check_window("deduplicate", self.deduplicate)


def check_window(name: str, value: object) -> None:
    """The value can be the window of a log's deduplication. Raises ConfigError."""
    if value is None or (
        isinstance(value, timedelta) and (not value or _SHORTEST_DEDUPLICATION <= value <= _LONGEST_DEDUPLICATION)
    ):
        return
    raise ConfigError(f"{name} is {shown(value)}: expected a timedelta from 0.1 s to 366 days, or of 0.")


def _check_seconds(name: str, value: object, *, at_least: float = _SHORTEST) -> None:
    # `not a <= b` refuses NaN too.
    if isinstance(value, bool) or not isinstance(value, int | float) or not at_least <= value <= _DAY:
        raise ConfigError(
            f"{name} is {shown(value)}: expected a number of seconds from {at_least:g} to {_DAY} (a day)."
        )


def _check_count(name: str, value: object, *, at_most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= at_most:
        raise ConfigError(f"{name} is {shown(value)}: expected a whole number from 1 to {at_most}.")
