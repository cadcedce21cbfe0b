"""`pgbackend export`: writes the events of a log to a file, as lines of JSON that `pgbackend import` reads."""

import asyncio
from typing import BinaryIO

import click

from pgbackend.cli.options import LogAddress, log_options, place_option
from pgbackend.cli.reading import reading, selecting_options
from pgbackend.cli.terminal import Progress, counted, json_line, write
from pgbackend.model import EventFilter
from pgbackend.subscriptions.places import Place


@click.command()
# Lazy: a log that cannot be reached must not cost the file of an earlier export.
@click.argument("file", type=click.File("wb", lazy=True))
@log_options
@place_option("--from", "start", default="earliest", text="Begin with the first event after this position or date.")
@place_option(
    "--to", "end", default="latest",
    text="End before this position or date, but where the log ends now at the latest.",
)  # fmt: skip
@selecting_options
@click.option("--quiet", is_flag=True, help="Print neither progress nor the number of events.")
def export(
    file: BinaryIO, *, log: LogAddress, start: Place, end: Place, wanted: EventFilter | None, quiet: bool
) -> None:
    """Write the events of the log to FILE, one JSON object a line, in the order of positions. - is standard output.

    Each line has position, recorded_at, and the event in CloudEvents' JSON format, as the member event. Where that
    format would change something, as line breaks in the data, the member stored has it too, so that `pgbackend import`
    gets every event to the byte.

    A transaction that appends and stays open holds the export up at its place: the log says which one it waits for. To
    go on with an export that was interrupted, begin --from the position of its last whole line.
    """
    if end == "earliest":
        raise click.BadParameter("Nothing comes before the earliest event.", param_hint="--to")
    count, unreadable = asyncio.run(_export(file, log, start, end, wanted=wanted, quiet=quiet))
    if unreadable:
        raise click.ClickException(
            f"{counted(unreadable, 'event')} cannot be read and are missing. The other {count:,} are exported."
        )
    if not quiet:
        click.echo(f"{counted(count, 'event')} {'is' if count == 1 else 'are'} exported.", err=True)


async def _export(
    file: BinaryIO, log: LogAddress, start: Place, end: Place, *, wanted: EventFilter | None, quiet: bool
) -> tuple[int, int]:
    async with reading(log, start, end=end, wanted=wanted, strict=True) as events:
        total = (events.end or 0) - events.first
        with Progress("exported", "event", total=total, is_quiet=quiet or file.isatty()) as progress:
            while not events.is_done:
                found = await events.next()
                await write(file, (json_line(event, is_terminal=file.isatty()) for event in found))
                progress.add(len(found), reached=events.position - events.first)
        return progress.count, events.unreadable
