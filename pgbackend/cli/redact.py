"""`pgbackend redact`: removes the data of one event for good, and names what it cannot reach."""

import asyncio

import click

from pgbackend.cli.options import LogAddress, connected, log_options
from pgbackend.cli.terminal import counted, printable_line
from pgbackend.model import MAX_POSITION, Redaction


@click.command()
@click.argument("position", type=click.IntRange(1, MAX_POSITION))
@click.option("--yes", is_flag=True, help="Do not ask.")
@log_options
def redact(position: int, *, log: LogAddress, yes: bool) -> None:
    """Remove the data of the event at POSITION from the log and from its dead letters, for good.

    Its position, id, source, type and the date of its storage stay. A subscription that has not handled it skips it, on
    record. The command ends by naming what it cannot reach, such as backups.
    """
    if not yes:
        click.confirm(
            f"This destroys the data of the event at position {position} and all of its attributes but id, source, "
            "type and specversion, and it deletes the dead letters of the event. Subscriptions that have not handled "
            "it will skip it. Redact?",
            abort=True,
        )

    async def remove() -> Redaction:
        async with connected(log) as backend:
            return await backend.redact(position)

    done = asyncio.run(remove())
    click.echo(
        f"The event at position {position} is redacted, by {done.redacted_by} at "
        f"{done.redacted_at.isoformat(sep=' ', timespec='seconds')}. "
        f"{counted(done.dead_letters, 'dead letter')} of it {'is' if done.dead_letters == 1 else 'are'} deleted."
    )
    if done.unsettled:
        click.echo(f"These subscriptions have not handled it and skip it: {printable_line(', '.join(done.unsettled))}.")
    click.echo("It may still be found in:")
    for reach in _out_of_reach(done):
        click.echo(f"- {reach}")


def _out_of_reach(done: Redaction) -> list[str]:
    """The places that the log cannot clean, each with what to do there."""
    return [
        "the files of the tables, as old versions of rows, and the planner's statistics. VACUUM (FULL, ANALYZE) makes "
        "both anew; readers and producers of the table wait meanwhile. As the owner of the tables, once no older "
        "snapshot is open: " + " ".join(f"VACUUM (FULL, ANALYZE) {table};" for table in done.tables),
        "the write-ahead log, its archive, and the files of standbys, which have all of that, too.",
        "backups, dumps and exports of the log.",
        "the memory of workers that have read it before, and so may still dispatch it: restart the workers"
        + (" of these subscriptions." if done.unsettled else "."),
        "what handlers, targets and other consumers have kept of it, and log files that quote an error.",
    ]
