"""`pgbackend import`: stores the events of a file that `pgbackend export` wrote, as new events."""

import asyncio
import os
import stat
from contextlib import suppress
from io import UnsupportedOperation
from typing import BinaryIO

import click

from pgbackend.cli.options import LogAddress, connected, log_options
from pgbackend.cli.storing import outcome, store_lines
from pgbackend.cli.terminal import Progress
from pgbackend.codec.event import Event
from pgbackend.codec.log_lines import read_line
from pgbackend.codec.sdk import encode
from pgbackend.settings import MAX_EVENT_BYTES


@click.command("import")
@click.argument("file", type=click.File("rb"))
@log_options
@click.option("--quiet", is_flag=True, help="Print neither progress nor the number of events.")
def import_(file: BinaryIO, *, log: LogAddress, quiet: bool) -> None:
    """Store the events of FILE, which `pgbackend export` wrote, in their order. - is standard input.

    They are new events of this log: they get new positions and dates, behind those that are there, and every
    subscription gets them. Attributes and data are the same to the byte.

    Lines are stored in batches of up to 1,000; each batch is one transaction. If the command is interrupted, it says
    from which line on to go on: `tail -n +LINE FILE | pgbackend import -`. If the log deduplicates, just run it again:
    events that are stored are not stored again.
    """
    count, repeats = asyncio.run(_import(log, file, quiet=quiet))
    if not quiet:
        click.echo(outcome(count, repeats, "imported"))


async def _import(log: LogAddress, file: BinaryIO, *, quiet: bool) -> tuple[int, int]:
    # The log that was exported may have had a higher limit than this process.
    async with connected(log, max_event_bytes=MAX_EVENT_BYTES) as backend:
        with Progress("imported", "event", total=_size(file), is_quiet=quiet) as progress:
            repeats = await store_lines(backend, file, _parse, progress=progress)
        return progress.count, repeats


def _parse(line: bytes) -> Event:
    return Event(encode(read_line(line), max_event_bytes=MAX_EVENT_BYTES)[0])


def _size(file: BinaryIO) -> int | None:
    """The bytes of a regular file. A pipe does not tell."""
    with suppress(OSError, UnsupportedOperation):
        found = os.fstat(file.fileno())
        return found.st_size if stat.S_ISREG(found.st_mode) else None
    return None
