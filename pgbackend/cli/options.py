"""Shared by the commands: the options that lead to a log, a backend connected by them, and tables of text.

Without `--dsn`, a command finds the embedded log that `pgbackend serve` made. It shares the PostgreSQL of a broker that
runs there, and otherwise runs that PostgreSQL while the command runs. Only `serve` makes a new database.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

from pgbackend.backend import Backend
from pgbackend.cli.terminal import printable_line
from pgbackend.embedded import server as embedded
from pgbackend.errors import ConnectionLostError, EmbeddedServerError
from pgbackend.model import MAX_POSITION
from pgbackend.postgres.dsn import describe_dsn
from pgbackend.subscriptions.places import Place

Command = TypeVar("Command", bound=Callable[..., Any])

ANSWER_TIMEOUT = 5.0
"""Seconds that PostgreSQL has to answer a person who waits at a terminal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogAddress:
    """Where a log is: on the server of a DSN, or in the directory of an embedded server."""

    dsn: str | None
    listen_dsn: str | None
    schema: str
    directory: Path | None
    """The embedded server's; None with a DSN."""

    @classmethod
    def of(cls, *, dsn: str | None, listen_dsn: str | None, schema: str, data_dir: Path | None) -> "LogAddress":
        """As the options say. Raises UsageError, and ClickException when the embedded log does not exist."""
        check_server(dsn, data_dir)
        directory = None if dsn is not None else _embedded_directory(data_dir)
        return cls(dsn=dsn, listen_dsn=listen_dsn, schema=schema, directory=directory)

    @asynccontextmanager
    async def served(self) -> AsyncIterator[str]:
        """The DSN of the server, which runs until the body ends. Raises EmbeddedServerError."""
        if self.dsn is not None:
            yield self.dsn
            return
        assert self.directory is not None  # noqa: S101 - for the type checker
        async with embedded.EmbeddedServer(self.directory) as server:
            yield server.dsn

    def __str__(self) -> str:
        """The log for people: its schema and server, without credentials. Raises ConfigError."""
        where = f"embedded in {self.directory}" if self.dsn is None else describe_dsn(self.dsn)
        return f"{self.schema} on {where}"

    def backend(self, **settings: Any) -> Backend:
        """A backend on this log. Nothing is connected yet. Raises ConfigError."""
        if self.dsn is None:
            assert self.directory is not None  # noqa: S101 - for the type checker
            return Backend.embedded(self.directory, schema=self.schema, **settings)
        return Backend(self.dsn, listen_dsn=self.listen_dsn, schema=self.schema, **settings)


def check_server(dsn: str | None, data_dir: Path | None) -> None:
    """The two options do not name two servers. Raises UsageError."""
    if dsn is not None and data_dir is not None:
        raise click.UsageError("--data-dir is for the embedded PostgreSQL: give it or --dsn, not both.")


def _embedded_directory(data_dir: Path | None) -> Path:
    """The directory of an embedded log that exists. Raises UsageError or ClickException when there is none."""
    if data_dir is not None:
        if embedded.has_database(data_dir):
            return data_dir
        raise click.ClickException(
            f"There is no embedded log in {data_dir}. `pgbackend serve --data-dir {data_dir}` makes one."
        )
    try:
        directory = embedded.default_directory()
        if embedded.has_database(directory):
            return directory
        missing = f"there is no embedded log in {directory}"
    except EmbeddedServerError:
        missing = "the embedded PostgreSQL is not installed"
    raise click.UsageError(
        f"Missing option '--dsn' (env var: 'PGBACKEND_DSN'): {missing}. "
        "Name the database, or let `pgbackend serve` make an embedded log."
    )


def server_options(command: Command) -> Command:
    """The command takes `dsn`, `listen_dsn`, `schema` and `data_dir`, as they are."""
    for option in (
        click.option(
            "--data-dir", type=click.Path(file_okay=False, path_type=Path), metavar="DIRECTORY",
            envvar="PGBACKEND_DATA_DIR", show_envvar=True,
            help="Where the embedded PostgreSQL, used without --dsn, keeps its data. Default: the user's data "
            "directory.",
        ),
        click.option(
            "--schema", envvar="PGBACKEND_SCHEMA", default="pgbackend", show_default=True, show_envvar=True,
            help="The schema that holds the log.",
        ),
        click.option(
            "--listen-dsn", envvar="PGBACKEND_LISTEN_DSN", metavar="URL", show_envvar=True,
            help="A direct URL of the same database, where --dsn leads through a connection pooler.",
        ),
        click.option(
            "--dsn", envvar="PGBACKEND_DSN", metavar="URL", show_envvar=True,
            help="The database: postgresql://user:password@host:port/name. Several hosts: the primary is used. "
            "Without it, the embedded log that `pgbackend serve` made.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


def log_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command takes the same options as one argument, `log`, a `LogAddress` that was checked."""

    @wraps(command)
    def with_log(
        *args: Any, dsn: str | None, listen_dsn: str | None, schema: str, data_dir: Path | None, **options: Any
    ) -> Any:
        place = LogAddress.of(dsn=dsn, listen_dsn=listen_dsn, schema=schema, data_dir=data_dir)
        return command(*args, log=place, **options)

    return server_options(with_log)


@asynccontextmanager
async def connected(log: LogAddress, **settings: Any) -> AsyncIterator[Backend]:
    """A backend that is initialized, not started. Its log exists and has this version's tables.

    Raises ConnectionLostError when PostgreSQL does not answer within `ANSWER_TIMEOUT`, EmbeddedServerError when the
    embedded server does not start, and SchemaError when `pgbackend migrate` has to run first.
    """
    backend = log.backend(**settings)
    try:
        # An embedded server may have to recover first, and has a limit of its own.
        async with nullcontext() if log.directory is not None else answering(backend.info().server):
            await backend.init(migrate=False)
        yield backend
    finally:
        await backend.stop()


@asynccontextmanager
async def answering(server: str) -> AsyncIterator[None]:
    """The body ends within `ANSWER_TIMEOUT`, or ConnectionLostError says which server did not answer."""
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT):
            yield
    except TimeoutError as error:
        raise ConnectionLostError(
            f"PostgreSQL at {server} did not answer within {ANSWER_TIMEOUT:g} s. Check that it runs and can be reached."
        ) from error


def place_option(option: str, argument: str, *, default: str, text: str) -> Callable[[Callable[..., Any]], Any]:
    """The command takes a place by this option, as this argument. `text` is its help."""
    name = option.removeprefix("--")

    def decorate(command: Callable[..., Any]) -> Any:
        @wraps(command)
        def with_place(*args: Any, **options: Any) -> Any:
            place = parsed_place(options.pop(name), option=option)
            return command(*args, **options, **{argument: place})

        return click.option(option, name, metavar="PLACE", default=default, show_default=True, help=text)(with_place)

    return decorate


def parsed_place(text: str, *, option: str) -> Place:
    """The place that the text names. Raises BadParameter.

    >>> parsed_place("17", option="PLACE"), parsed_place("latest", option="PLACE")
    (17, 'latest')
    >>> parsed_place("2026-01-31T12:00:00Z", option="PLACE").isoformat()
    '2026-01-31T12:00:00+00:00'
    """
    if text in ("earliest", "latest"):
        return "earliest" if text == "earliest" else "latest"
    if text.isdecimal() and int(text) <= MAX_POSITION:
        return int(text)
    try:
        date = datetime.fromisoformat(text)
    except ValueError:
        date = None
    if date is None or date.tzinfo is None:
        raise click.BadParameter(
            f'{text!r} is no place: expected a position, a date with its time zone, "earliest" or "latest".',
            param_hint=option,
        )
    return date


def table(headings: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    """Aligned columns: text to the left, numbers to the right. No text can leave its line or control a terminal."""
    cells = [
        headings,
        *([f"{cell:,}" if isinstance(cell, int) else printable_line(str(cell)) for cell in row] for row in rows),
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headings))]
    numeric = [all(isinstance(row[i], int) for row in rows) and bool(rows) for i in range(len(headings))]
    lines = (
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in cells
    )
    return "\n".join(lines)
