"""Events from lines of text into the log, for `produce` and `import`.

Lines are stored in batches: the lines that have come, up to 1,000 events or 4 MiB. Each batch is one transaction, all
or nothing, and a batch begins when the one before is committed. The promise: when it stops early, the error says up to
which line everything is stored.
"""

import asyncio
import select
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from io import RawIOBase
from typing import BinaryIO

import click

from pgbackend.backend import Backend
from pgbackend.cli.terminal import Progress, counted, ending_on_signals, printable
from pgbackend.codec.event import Event
from pgbackend.errors import EventError, PgBackendError, ProduceUncertainError
from pgbackend.postgres.sockets import in_thread

_BATCH_EVENTS = 1_000
_BATCH_BYTES = 4 << 20
_CHUNK_BYTES = 1 << 20
"""The most that one read of the input returns."""


@dataclass(frozen=True, slots=True)
class _Line:
    number: int
    text: bytes


async def store_lines(backend: Backend, file: BinaryIO, parse: Callable[[bytes], Event], *, progress: Progress) -> int:
    """Every line is stored as an event; `progress` has counted them. Blank lines do not count.

    Returns how many of them the log had already, if it deduplicates: it has not stored those again.

    `parse` raises EventError for a line that is no event. Raises ClickException when it had to stop, also for a signal.
    """
    storing = _Storing(backend, parse, progress)
    with ending_on_signals() as ending:
        async for lines in _batches(file):
            await storing.store(lines)
    if ending.is_told:
        raise click.ClickException(f"Stopped. {storing.stored()}")
    return storing.repeats


class _Storing:
    """Stores batches, and knows what is stored."""

    def __init__(self, backend: Backend, parse: Callable[[bytes], Event], progress: Progress) -> None:
        self._backend = backend
        self._parse = parse
        self._progress = progress
        self._last = 0
        """The last line of the last batch that is stored."""
        self._bytes = 0
        self.repeats = 0
        """Events that the log had already."""

    async def store(self, lines: list[_Line]) -> None:
        """The batch is committed. Raises ClickException otherwise."""
        events = self._events(lines)
        sending = asyncio.ensure_future(self._backend.produce_many(events, on_repeats=self._on_repeats))
        try:
            await asyncio.shield(sending)
        except asyncio.CancelledError:
            # The batch is on its way: wait, so that we can say whether it is stored.
            await self._settle(sending, lines)
            raise
        except PgBackendError as error:
            raise self._failed(error, lines) from error
        self._done(lines)

    def stored(self) -> str:
        """Says how far the lines are stored, for people."""
        if not self._progress.count:
            return "Nothing is stored."
        return (
            f"{counted(self._progress.count, 'event')} from the lines up to {self._last} are stored, and nothing after "
            f"them. Go on with the lines from {self._last + 1} on (tail -n +{self._last + 1})."
        )

    def _events(self, lines: list[_Line]) -> list[Event]:
        events, problems = [], 0
        for line in lines:
            try:
                events.append(self._parse(line.text))
            except EventError as error:
                problems += 1
                click.echo(f"Line {line.number}: {printable(' '.join(str(error).split()))}", err=True)
        if problems:
            raise click.ClickException(f"{counted(problems, 'line')} cannot be stored. {self.stored()}")
        return events

    async def _settle(self, sending: "asyncio.Future[None]", lines: list[_Line]) -> None:
        try:
            await sending
        except PgBackendError as error:
            raise self._failed(error, lines) from error
        self._done(lines)

    def _failed(self, error: PgBackendError, lines: list[_Line]) -> click.ClickException:
        what = " ".join(str(error).split())
        if isinstance(error, ProduceUncertainError):
            first, last = lines[0].number, lines[-1].number
            what += f" All of the lines {first} to {last} may be stored, or none: look with `pgbackend tail`."
        return click.ClickException(f"{what} {self.stored()}")

    def _on_repeats(self, count: int) -> None:
        self.repeats += count

    def _done(self, lines: list[_Line]) -> None:
        self._last = lines[-1].number
        self._bytes += sum(len(line.text) + 1 for line in lines)
        self._progress.add(len(lines), reached=self._bytes)


def outcome(count: int, repeats: int, verb: str) -> str:
    """Says how much was stored, for people.

    >>> outcome(2, 0, "stored"), outcome(2, 1, "stored")
    ('2 events are stored.', '2 events are stored. The log had 1 of them already.')
    """
    had = f" The log had {repeats:,} of them already." if repeats else ""
    return f"{counted(count, 'event')} {'is' if count == 1 else 'are'} {verb}.{had}"


async def _batches(file: BinaryIO) -> AsyncIterator[list[_Line]]:
    """The lines of the file, as they come. It waits for no further line when it has one."""
    # Without its buffer, whose lock a thread that waits for input would hold when the process ends.
    raw: BinaryIO | RawIOBase = getattr(file, "raw", file)
    number = 0
    begun: list[bytes] = []
    waiting: deque[_Line] = deque()
    while True:
        # A thread of its own, which need not end: a terminal may never send anything again.
        chunk = await in_thread(partial(_read, raw), name="read the input")
        *ended, rest = chunk.split(b"\n") if chunk else (b"", b"")
        if ended:
            ended[0] = b"".join([*begun, ended[0]])
            begun = []
        begun.append(rest)
        for text in ended:
            number += 1
            if text.strip():
                waiting.append(_Line(number, text))
        while waiting:
            yield _next_batch(waiting)
        if not chunk:
            return


def _read(raw: BinaryIO | RawIOBase) -> bytes:
    # A program that shares the pipe may have set it not to block: then nothing is not the end.
    while (chunk := raw.read(_CHUNK_BYTES)) is None:
        select.select([raw], [], [])
    return chunk


def _next_batch(waiting: "deque[_Line]") -> list[_Line]:
    batch = [waiting.popleft()]
    size = len(batch[0].text)
    while waiting and len(batch) < _BATCH_EVENTS and size + len(waiting[0].text) <= _BATCH_BYTES:
        batch.append(waiting.popleft())
        size += len(batch[-1].text)
    return batch
