"""Text for terminals: nothing that senders chose can control them, progress is shown to people only, signals end a run.

The promise: standard output is the same whether a person or a program reads it. Progress goes to standard error, and
only if that is a terminal.
"""

import asyncio
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from io import RawIOBase
from types import TracebackType
from typing import BinaryIO, Self

import click

from pgbackend.codec.event import Event
from pgbackend.codec.log_lines import write_line
from pgbackend.postgres.sockets import in_thread

_REDRAW = 0.2
"""Seconds between two changes of a line of progress."""
_COLUMNS = 80
"""Width of a terminal that does not know its own."""
_PIECE_BYTES = 1 << 18
"""Bytes that one call writes, give or take a line."""


def printable(text: str) -> str:
    r"""The text without what would control a terminal: senders choose it.

    >>> printable("one\x1b[2J\ntwo")
    'one\\x1b[2J\ntwo'
    """
    return "".join(one if one.isprintable() or one in "\n\t" else repr(one)[1:-1] for one in text)


def printable_line(text: str) -> str:
    r"""The same on one line: line breaks and tabs are escaped as well.

    >>> printable_line("two\nlines \u202eback")
    'two\\nlines \\u202eback'
    """
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)


def json_line(event: Event, *, is_terminal: bool) -> bytes:
    """The event as a line of `pgbackend export`. On a terminal, what would control it is escaped: the same JSON."""
    line = write_line(event)
    if is_terminal:
        line = printable_json(line.decode()).encode()
    return line + b"\n"


def printable_json(text: str) -> str:
    r"""The same JSON without what would control a terminal.

    >>> printable_json('{"data": "\u202e"}')
    '{"data": "\\u202e"}'
    """
    return "".join(one if one.isprintable() else json.dumps(one)[1:-1] for one in text)


async def write(file: BinaryIO, lines: Iterable[bytes]) -> None:
    """The lines are written, to the reader or the disk. A caller that is cancelled does not wait for a slow reader.

    Raises BrokenPipeError when the reader is gone, and ClickException when the disk is full.
    """
    # Without its buffer, whose lock a thread that waits for the reader would hold when the process ends.
    raw: BinaryIO | RawIOBase = getattr(file, "raw", file)
    try:
        for piece in _pieces(lines):
            rest = memoryview(piece)
            while rest:
                rest = rest[await in_thread(partial(_write_some, raw, rest), name="write the output") :]
    except BrokenPipeError:
        raise
    except OSError as error:
        raise click.ClickException(f"The output cannot be written: {error.strerror}.") from error


def _write_some(raw: BinaryIO | RawIOBase, piece: memoryview) -> int:
    # A program that shares the pipe may have set it not to block.
    while (count := raw.write(piece)) is None:
        select.select([], [raw], [])
    return count


def _pieces(lines: Iterable[bytes]) -> Iterator[bytes]:
    piece = bytearray()
    for line in lines:
        piece += line
        if len(piece) >= _PIECE_BYTES:
            yield bytes(piece)
            piece.clear()
    yield bytes(piece)


def shortened(text: str, length: int) -> str:
    r"""The text as one printable line, cut.

    >>> shortened("no such customer", 8), shortened("two\nlines", 80)
    ('no such…', 'two lines')
    """
    line = printable(" ".join(text.split()))
    return line if len(line) <= length else line[: length - 1] + "…"


def counted(count: int, noun: str) -> str:
    """The number with its noun.

    >>> counted(1, "event"), counted(2000, "event")
    ('1 event', '2,000 events')
    """
    return f"{count:,} {noun}{'s' * (count != 1)}"


class Progress:
    """A line of progress on standard error, if that is a terminal. Leaving the context deletes it."""

    def __init__(self, verb: str, noun: str, *, total: int | None = None, is_quiet: bool = False) -> None:
        """`total`: what `add()` and `reach()` count toward, in any unit; None if it is not known."""
        self.count = 0
        """How many things are done."""
        self._verb = verb
        self._noun = noun
        self._total = total
        self._reached = 0
        self._is_shown = sys.stderr.isatty() and not is_quiet
        self._began = self._drawn = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_shown:
            click.echo("\r\x1b[K", nl=False, err=True)

    def add(self, count: int, *, reached: int | None = None) -> None:
        """So many more things are done. `reached`: where that is on the way to the total; default: the count."""
        self.count += count
        self._reached = self.count if reached is None else reached
        now = time.monotonic()
        if self._is_shown and now >= self._drawn + _REDRAW:
            self._drawn = now
            # A line that wraps would leave its beginning behind.
            click.echo(f"\r{self._line(now)[: _columns() - 1]}\x1b[K", nl=False, err=True)

    def _line(self, now: float) -> str:
        part = f", {min(100, 100 * self._reached // self._total)} %" if self._total else ""
        rate = self.count / max(now - self._began, _REDRAW)
        return f"{self._verb} {counted(self.count, self._noun)}{part}, {rate:,.0f} a second"


def _columns() -> int:
    """The width of standard error."""
    try:
        # A serial console has none.
        return os.get_terminal_size(sys.stderr.fileno()).columns or _COLUMNS
    except OSError:
        return _COLUMNS


class Ending:
    """Whether a signal has ended something."""

    def __init__(self) -> None:
        self.is_told = False


@contextmanager
def ending_on_signals() -> Iterator[Ending]:
    """SIGINT and SIGTERM cancel the body. Then the context ends without an error, and the `Ending` says so."""
    task, loop, ending = asyncio.current_task(), asyncio.get_running_loop(), Ending()
    assert task is not None  # noqa: S101 - in a coroutine

    def end() -> None:
        if not ending.is_told:
            ending.is_told = True
            task.cancel()

    # Signals come to the main thread only. Elsewhere, as in another program's thread, nothing ends the body.
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    for number in numbers:
        loop.add_signal_handler(number, end)
    try:
        yield ending
    except asyncio.CancelledError:
        if not ending.is_told or task.uncancel() > 0:
            raise
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
