"""`pgbackend tail`: prints the events of a log, and goes on as they come, without a subscription."""

import asyncio
import sys
from collections.abc import Sequence
from datetime import UTC

import click

from pgbackend.cli.options import LogAddress, log_options, place_option
from pgbackend.cli.reading import reading, selecting_options
from pgbackend.cli.terminal import ending_on_signals, json_line, printable, shortened, write
from pgbackend.codec.event import Event
from pgbackend.model import EventFilter
from pgbackend.subscriptions.places import Place


@click.command()
@log_options
@place_option(
    "--from", "start", default="latest",
    text='Begin with the first event after this place: a position, a date with its time zone, "earliest" or "latest".',
)  # fmt: skip
@selecting_options
@click.option("--count", type=click.IntRange(min=1), metavar="NUMBER", help="End after so many events.")
@click.option("--until-head", is_flag=True, help="End where the log ends now.")
@click.option("--data", is_flag=True, help="Print the data of each event below it.")
@click.option("--json", is_flag=True, help="Print one JSON object a line, as `pgbackend export` does, with the data.")
def tail(
    *,
    log: LogAddress,
    start: Place,
    wanted: EventFilter | None,
    count: int | None,
    until_head: bool,
    data: bool,
    json: bool,
) -> None:
    """Print events as they come: position, time of storage, type, source, id and subject.

    It makes no subscription and stores nothing; a role that may read events suffices. No event is skipped: one that is
    committed late, by a transaction that stayed open, comes when it is committed, after others with higher positions.
    Ctrl-C and SIGTERM end it, with exit code 0.
    """
    asyncio.run(_tail(log, start, _Printer(count, json=json, data=data), wanted=wanted, until_head=until_head))


async def _tail(
    log: LogAddress, place: Place, printer: "_Printer", *, wanted: EventFilter | None, until_head: bool
) -> None:
    with ending_on_signals():
        async with reading(log, place, end="latest" if until_head else None, wanted=wanted) as events:
            while not printer.is_done and not events.is_done:
                await printer.print(await events.next())


class _Printer:
    """Prints events, up to a number of them."""

    def __init__(self, count: int | None, *, json: bool, data: bool) -> None:
        self._left = count
        self._json = json
        self._data = data
        self._out = sys.stdout.buffer
        self._is_terminal = sys.stdout.isatty()

    @property
    def is_done(self) -> bool:
        return self._left == 0

    async def print(self, events: Sequence[Event]) -> None:
        printed = events[: self._left]
        if self._left is not None:
            self._left -= len(printed)
        await write(self._out, map(self._text, printed))

    def _text(self, event: Event) -> bytes:
        if self._json:
            return json_line(event, is_terminal=self._is_terminal)
        return _line(event, with_data=self._data).encode() + b"\n"


def _line(event: Event, *, with_data: bool) -> str:
    at = event.recorded_at
    date = "-" if at is None else at.astimezone(UTC).isoformat(sep=" ", timespec="milliseconds")
    texts = (event.type, event.source, event.id, event.subject)
    shown = [shortened(text, 80) for text in texts if text is not None]
    line = "  ".join((f"{event.position:>9}", date, *shown))
    return f"{line}\n{_data(event.data_bytes)}" if with_data else line


def _data(data: bytes | None) -> str:
    if data is None:
        return "           no data"
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = f"{len(data):,} bytes, binary"
    return "\n".join(f"           {line}" for line in printable(text).splitlines())
