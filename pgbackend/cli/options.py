"""Shared by the commands: the options that lead to a log, a backend connected by them, and tables of text."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import click

from pgbackend.backend import Backend
from pgbackend.errors import ConnectionLostError

Command = TypeVar("Command", bound=Callable[..., Any])

ANSWER_TIMEOUT = 5.0
"""Seconds that PostgreSQL has to answer a person who waits at a terminal."""


def backend_options(*, dsn_required: bool = True) -> Callable[[Command], Command]:
    """The command takes `dsn`, `listen_dsn` and `schema`."""

    def decorate(command: Command) -> Command:
        for option in (
            click.option(
                "--schema", envvar="PGBACKEND_SCHEMA", default="pgbackend", show_default=True, show_envvar=True,
                help="The schema that holds the log.",
            ),
            click.option(
                "--listen-dsn", envvar="PGBACKEND_LISTEN_DSN", metavar="URL", show_envvar=True,
                help="A direct URL of the same database, where --dsn leads through a connection pooler.",
            ),
            click.option(
                "--dsn", envvar="PGBACKEND_DSN", metavar="URL", show_envvar=True, required=dsn_required,
                help="The database: postgresql://user:password@host:port/name. Several hosts: the primary is used.",
            ),
        ):  # fmt: skip
            command = option(command)
        return command

    return decorate


@asynccontextmanager
async def connected(dsn: str, *, listen_dsn: str | None, schema: str) -> AsyncIterator[Backend]:
    """A backend that is initialized, not started. Its log exists and has this version's tables.

    Raises ConnectionLostError when PostgreSQL does not answer within `ANSWER_TIMEOUT`, and SchemaError when
    `pgbackend migrate` has to run first.
    """
    backend = Backend(dsn, listen_dsn=listen_dsn, schema=schema)
    try:
        async with answering(backend):
            await backend.init(migrate=False)
        yield backend
    finally:
        await backend.stop()


@asynccontextmanager
async def answering(backend: Backend) -> AsyncIterator[None]:
    """The body ends within `ANSWER_TIMEOUT`, or ConnectionLostError says which server did not answer."""
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT):
            yield
    except TimeoutError as error:
        raise ConnectionLostError(
            f"PostgreSQL at {backend.info().server} did not answer within {ANSWER_TIMEOUT:g} s. "
            "Check that it runs and can be reached."
        ) from error


def table(headings: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    """Aligned columns: text to the left, numbers to the right."""
    cells = [headings, *([f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows)]
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
