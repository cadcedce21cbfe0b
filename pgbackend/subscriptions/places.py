"""Places in the log where a subscription starts, ends, or is moved to. Pure."""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Literal

from pgbackend.errors import ConfigError, shown
from pgbackend.log.ranges import RangeSet
from pgbackend.model import MAX_POSITION

Place = int | datetime | Literal["earliest", "latest"]
FIRST_DATE, LAST_DATE = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Start:
    """A place as offsets express it: what is above `position` or pending is delivered, unless a bound excludes it."""

    position: int
    pending: RangeSet = field(default_factory=RangeSet)
    start_position: int | None = None
    """Events at or below it are not delivered."""
    start_at: datetime | None = None
    """Events recorded at or before it are not delivered."""


def checked_place(place: object, what: str) -> Place:
    """The place with its date in UTC. Raises ConfigError for anything that is no place in a log."""
    if isinstance(place, datetime):
        return in_utc(place, what)
    if isinstance(place, str) and place in ("earliest", "latest"):
        return "earliest" if place == "earliest" else "latest"
    if isinstance(place, int) and not isinstance(place, bool) and 0 <= place <= MAX_POSITION:
        return place
    raise ConfigError(
        f"{what} is {shown(place)}: expected 'earliest', 'latest', a position (0 to {MAX_POSITION}), "
        "or an aware datetime."
    )


def checked_end(end: object, what: str) -> int | datetime | None:
    """The end with its date in UTC. Raises ConfigError for anything that is no end."""
    if isinstance(end, datetime):
        return in_utc(end, what)
    if end is None or (isinstance(end, int) and not isinstance(end, bool) and 1 <= end <= MAX_POSITION):
        return end
    raise ConfigError(f"{what} is {shown(end)}: expected a position (1 to {MAX_POSITION}), an aware datetime, or None.")


def in_utc(date: datetime, what: str) -> datetime:
    """The date in UTC, between the first and the last date that exist, because the driver makes those two infinite.

    Raises ConfigError for a date without a time zone, or before the year 1 or after 9999 in UTC.

    >>> in_utc(LAST_DATE, "end").isoformat()
    '9999-12-31T23:59:59.999998+00:00'
    """
    try:
        aware = date.utcoffset() is not None
        moved = date.astimezone(UTC) if aware else date
    except Exception:  # noqa: BLE001 - a time zone may be anybody's code
        raise ConfigError(f"{what} is {shown(date)}: no date of the years 1 to 9999 in UTC.") from None
    if not aware:
        raise ConfigError(f"{what} is {shown(date)}, without a time zone: expected an aware datetime.")
    moment = timedelta(microseconds=1)
    return min(max(moved, FIRST_DATE + moment), LAST_DATE - moment)


def start_bound(place: Place) -> str | None:
    """The text that is stored of a position or date; None for the log's beginning or end.

    >>> start_bound(17), start_bound("latest")
    ('17', None)
    >>> start_bound(datetime(2026, 1, 1, 2, tzinfo=UTC))
    '2026-01-01T02:00:00.000000+00:00'
    """
    if isinstance(place, datetime):
        return place.astimezone(UTC).isoformat(timespec="microseconds")
    return str(place) if isinstance(place, int) else None
