"""`pgbackend status`: shows the log, its open appenders and its subscriptions, once or again and again.

The promise: standard output that is no terminal gets plain text without control characters, the same for every width.
A terminal is as it was before when the command ends, also by a signal.
"""

import asyncio
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from json import dumps

import click
from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from pgbackend.backend import Backend
from pgbackend.cli.options import LogAddress, answering, connected, log_options
from pgbackend.cli.status_report import Space, report
from pgbackend.cli.terminal import ending_on_signals, printable_line
from pgbackend.errors import PgBackendError
from pgbackend.model import Info, Status

_WATCH_EVERY = 2.0
_UNLIMITED = 100_000
"""Columns of an output that is no terminal."""

Show = Callable[[RenderableType], None]


@click.command()
@click.option("--json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--watch", type=click.FloatRange(0.1, 86_400), is_flag=False, flag_value=_WATCH_EVERY, metavar="[SECONDS]",
    help=f"Show it again after so many seconds, {_WATCH_EVERY:g} by default, until Ctrl-C.",
)  # fmt: skip
@log_options
def status(*, log: LogAddress, json: bool, watch: float | None) -> None:
    """Show the log: its head, rate, size and retention, and the state and lag of each subscription.

    docs/status.md explains each column.
    """
    if json and watch is not None:
        raise click.UsageError("--json prints one object: give it or --watch, not both.")
    console = _console()
    if watch is not None:
        asyncio.run(_watch(log, console, every=watch))
        return
    info, found = asyncio.run(_ask_once(log))
    if json:
        click.echo(dumps(asdict(found), indent=2, default=_jsonable))
    else:
        _print(console, report(info, found, Space(columns=console.width) if console.is_terminal else None))


def _jsonable(value: object) -> float | str:
    """A time in seconds, or a date in ISO 8601. Raises TypeError for anything else."""
    if isinstance(value, datetime):
        return value.isoformat()
    if not isinstance(value, timedelta):
        raise TypeError(value)
    return value.total_seconds()


def _console() -> Console:
    """Standard output. Whether it is a terminal does not depend on the environment, unlike rich's default."""
    is_terminal = sys.stdout.isatty()
    return Console(
        file=sys.stdout,
        force_terminal=is_terminal,
        force_jupyter=False,
        width=None if is_terminal else _UNLIMITED,
        color_system="auto" if is_terminal else None,
        highlight=False,
        legacy_windows=False,
    )


async def _ask_once(log: LogAddress) -> tuple[Info, Status]:
    async with connected(log) as backend:
        return backend.info(), await backend.status()


async def _watch(log: LogAddress, console: Console, *, every: float) -> None:
    """Show the status until a signal comes. While PostgreSQL cannot be asked, show why."""
    with ending_on_signals():
        async with connected(log) as backend:
            with _live(console) if console.is_terminal and not console.is_dumb_terminal else _plain(console) as show:
                while True:
                    show(await _view(backend, console))
                    await asyncio.sleep(every)


async def _view(backend: Backend, console: Console) -> RenderableType:
    info = backend.info()
    try:
        async with answering(info.server):
            found = await backend.status()
    except PgBackendError as error:
        return Text(printable_line(f"{_now()}  {' '.join(str(error).split())}"))
    return report(info, found, Space(columns=console.width, rows=console.height) if console.is_terminal else None)


@contextmanager
def _live(console: Console) -> Iterator[Show]:
    """A screen of its own, which is gone at the end."""
    with Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live:
        yield lambda view: live.update(view, refresh=True)


@contextmanager
def _plain(console: Console) -> Iterator[Show]:
    """One report after the other, each below its time."""

    def show(view: RenderableType) -> None:
        click.echo(_now())
        _print(console, view)
        click.echo()

    yield show


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _print(console: Console, view: RenderableType) -> None:
    with console.capture() as captured:
        console.print(view)
    # rich fills lines up with blanks.
    click.echo("\n".join(line.rstrip() for line in captured.get().splitlines()), color=console.is_terminal)
