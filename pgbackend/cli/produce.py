"""`pgbackend produce`: stores one event that options describe, or the events on standard input."""

import asyncio
import sys
from typing import BinaryIO
from uuid import uuid4

import click

from pgbackend.cli.options import LogAddress, connected, log_options
from pgbackend.cli.storing import outcome, store_lines
from pgbackend.cli.terminal import Progress, printable
from pgbackend.codec.attributes import checked_row
from pgbackend.codec.data import decoder, kind_of
from pgbackend.codec.event import Event
from pgbackend.codec.sdk import encode
from pgbackend.errors import EventError
from pgbackend.settings import Settings

_MAX_EVENT_BYTES = Settings().max_event_bytes


@click.command()
@log_options
@click.option("--type", metavar="TEXT", help="The event's type, such as order.created.")
@click.option("--source", metavar="URI", help="Where it happened, such as /shop.")
@click.option("--id", metavar="TEXT", help="Unique within the source. Default: a random UUID.")
@click.option("--subject", metavar="TEXT", help="What it is about.")
@click.option("--data", metavar="TEXT", help="The data.")
@click.option("--data-file", type=click.File("rb"), metavar="FILE", help="A file with the data; - is standard input.")
@click.option(
    "--content-type", metavar="TYPE", help="The media type of the data. Default: application/json, which is checked."
)
@click.option(
    "--extension", multiple=True, metavar="NAME=VALUE",
    help="An extension attribute, such as partitionkey=17. Can be given several times.",
)  # fmt: skip
@click.option("--quiet", is_flag=True, help="Print neither progress nor what was stored.")
def produce(
    *,
    log: LogAddress,
    type: str | None,  # noqa: A002 - as the option
    source: str | None,
    id: str | None,  # noqa: A002 - as above
    subject: str | None,
    data: str | None,
    data_file: BinaryIO | None,
    content_type: str | None,
    extension: tuple[str, ...],
    quiet: bool,
) -> None:
    """Store one event that the options describe, or the events on standard input.

    On standard input each line is one event in CloudEvents' JSON format. Lines are stored as they come, in batches of
    up to 1,000. A batch is one transaction: if one of its lines is no event, none of it is stored, standard error names
    each such line, and the command ends. Then its last message says up to which line everything is stored.
    """
    described = (type, source, id, subject, data, data_file, content_type, *extension)
    if all(one is None for one in described):
        if sys.stdin.isatty():
            raise click.UsageError("Give --type and --source, or events as lines of JSON on standard input.")
        count, repeats = asyncio.run(_store_lines(log, sys.stdin.buffer, quiet=quiet))
        if not quiet:
            click.echo(outcome(count, repeats, "stored"))
        return
    if type is None or source is None:
        raise click.UsageError("An event needs --type and --source.")
    attributes = {
        "specversion": "1.0",
        "id": str(uuid4()) if id is None else id,
        "source": source,
        "type": type,
        "subject": subject,
    }
    octets = _data(data, data_file)
    event = _event({**attributes, **_extensions(extension)}, octets, content_type)
    repeats = asyncio.run(_store(log, event))
    if not quiet:
        done = "was stored before" if repeats else "is stored"
        click.echo(f"Event {printable(event.id)} of {printable(event.source)} {done}.")


async def _store_lines(log: LogAddress, file: BinaryIO, *, quiet: bool) -> tuple[int, int]:
    async with connected(log) as backend:
        with Progress("stored", "event", is_quiet=quiet) as progress:
            repeats = await store_lines(backend, file, _parse, progress=progress)
        return progress.count, repeats


async def _store(log: LogAddress, event: Event) -> bool:
    """Returns whether the log had it already."""
    repeats: list[int] = []
    async with connected(log) as backend:
        await backend.produce_many([event], on_repeats=repeats.append)
    return bool(repeats)


def _parse(line: bytes) -> Event:
    return Event(encode(line, max_event_bytes=_MAX_EVENT_BYTES)[0])


def _data(text: str | None, file: BinaryIO | None) -> bytes | None:
    if text is not None and file is not None:
        raise click.UsageError("Give --data or --data-file, not both.")
    # An argument that is not UTF-8 comes with surrogates in place of its octets.
    return file.read() if file is not None else None if text is None else text.encode(errors="surrogateescape")


def _event(attributes: dict[str, object], data: bytes | None, content_type: str | None) -> Event:
    """The event, checked. Data is kept to the byte. Raises UsageError."""
    if data is not None and content_type is None:
        content_type = "application/json"
    if data is not None and kind_of(content_type) == "json":
        try:
            decoder.decode(data.decode())
        except (ValueError, RecursionError) as error:
            raise click.UsageError(
                f"The data is not JSON: {error}. Name its --content-type, such as text/plain."
            ) from None
    try:
        return Event(checked_row({**attributes, "datacontenttype": content_type}, data, None))
    except EventError as error:
        raise click.UsageError(str(error)) from None


def _extensions(given: tuple[str, ...]) -> dict[str, str]:
    extensions: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or name in extensions:
            raise click.BadParameter(f"{text!r}: expected NAME=VALUE, each name once.", param_hint="--extension")
        extensions[name] = value
    return extensions
