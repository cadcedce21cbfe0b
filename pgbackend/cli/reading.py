"""Events of a log for `tail` and `export`: the way to read them, and the options that select them.

Both read with the engine's own reader, so they skip no event that commits late. They store nothing: a role that may
read events suffices.
"""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from datetime import datetime
from functools import wraps
from typing import Any

import click

from pgbackend.cli.options import LogAddress, answering
from pgbackend.codec.event import Event
from pgbackend.errors import ConfigError
from pgbackend.filters import CESQL, All, Prefix
from pgbackend.lifecycle.opening import Server, open_log
from pgbackend.log.follower import Follower
from pgbackend.log.log import Log
from pgbackend.log.notify import channel
from pgbackend.model import EventFilter
from pgbackend.settings import Settings
from pgbackend.subscriptions.locator import Locator
from pgbackend.subscriptions.places import Place, Start

_CLOSE_TIMEOUT = 2.0
"""Seconds in which connections are closed in order."""
_POLL_INTERVAL = 1.0


class Reading:
    """Reads the wanted events between a start and an end."""

    def __init__(
        self, follower: Follower, start: Start, *, end: int | None, end_at: datetime | None, wanted: EventFilter | None
    ) -> None:
        """`end`: the last position to read. `end_at`: the date before which events were recorded."""
        self.first = start.position
        """Reading begins behind it."""
        self.end = end
        self.unreadable = 0
        """Events that were there and could not be read. Each was reported."""
        self._follower = follower
        self._start = start
        self._end_at = end_at
        self._wanted = wanted

    @property
    def position(self) -> int:
        """Everything at or below was read, except for events that appear late."""
        return self._follower.position

    @property
    def is_done(self) -> bool:
        """Whether the end is reached."""
        return self.end is not None and self._follower.position >= self.end

    async def next(self) -> list[Event]:
        """The next events that are wanted, perhaps none. What cannot be read is reported on standard error."""
        batch = await self._follower.next()
        for lower, upper in batch.removed:
            click.echo(f"Positions {lower:,} to {upper - 1:,} were removed from the log, or redacted.", err=True)
        for bad in batch.unreadable:
            if self._is_within(bad.event):
                self.unreadable += 1
                click.echo(f"The event at position {bad.event.position:,} cannot be read: {bad.error}", err=True)
        return [
            event for event in batch.events if self._is_within(event) and (self._wanted is None or self._wanted(event))
        ]

    def _is_within(self, event: Event) -> bool:
        position, at, start, start_at = event.position, None, self._start.start_position, self._start.start_at
        if (start is not None and position <= start) or (self.end is not None and position > self.end):
            return False
        if start_at is not None or self._end_at is not None:
            at = event.recorded_at
        return at is None or ((start_at is None or at > start_at) and (self._end_at is None or at < self._end_at))


@asynccontextmanager
async def reading(
    log: LogAddress, place: Place, *, end: Place | None, wanted: EventFilter | None, strict: bool = False
) -> AsyncIterator[Reading]:
    """Reads the wanted events from the first one behind `place` on. `strict`: see `Follower`.

    `end`: the position or date before which it ends, but where the log ends now at the latest; "latest" is only that,
    and None has no end. Raises as `connected()` does.
    """
    server = Server("postgresql:///postgres" if log.dsn is None else log.dsn, listen_dsn=log.listen_dsn)
    if log.directory is not None:
        server.embed(log.directory)
    async with nullcontext() if log.directory is not None else answering(server.description):
        opened = await open_log(server, Settings(schema=log.schema), migrate=False)
    try:
        locator = Locator(opened.log)
        start = await locator.locate(place)
        follower = Follower(
            opened.log,
            after=start.position,
            holes=start.pending,
            strict=strict,
            channel=channel(log.schema),
            poll_interval=_POLL_INTERVAL,
        )
        try:
            last = None if end is None else await _last_position(opened.log, locator, end)
            yield Reading(follower, start, end=last, end_at=end if isinstance(end, datetime) else None, wanted=wanted)
        finally:
            await follower.close()
    finally:
        try:
            await opened.close(time.monotonic() + _CLOSE_TIMEOUT)
        finally:
            await server.stop()


async def _last_position(log: Log, locator: Locator, end: Place) -> int:
    head = (await log.check()).upto
    if isinstance(end, datetime):
        return min(head, await locator.find_end(end))
    return min(head, end - 1) if isinstance(end, int) else head


def selecting_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command takes `--type`, `--source` and `--filter` as one argument, `wanted`: a filter, or None."""

    @wraps(command)
    def with_filter(*args: Any, **options: Any) -> Any:
        wanted = _filter_of(options.pop("type"), options.pop("source"), options.pop("filter"))
        return command(*args, wanted=wanted, **options)

    decorated: Callable[..., Any] = with_filter
    for option in (
        click.option("--filter", metavar="CESQL", help="Only events for which this CESQL is true."),
        click.option("--source", metavar="TEXT", help="Only events whose source begins so."),
        click.option("--type", metavar="TEXT", help="Only events whose type begins so."),
    ):
        decorated = option(decorated)
    return decorated


def _filter_of(type_prefix: str | None, source_prefix: str | None, expression: str | None) -> EventFilter | None:
    """All of them together. Raises UsageError."""
    prefixes = {name: text for name, text in (("type", type_prefix), ("source", source_prefix)) if text}
    filters: list[EventFilter] = [Prefix(prefixes)] if prefixes else []
    if expression is not None:
        try:
            filters.append(CESQL(expression))
        except ConfigError as error:
            raise click.BadParameter(" ".join(str(error).split()), param_hint="--filter") from None
    return All(filters) if filters else None
