"""Watches files, and reads them again whenever their contents have changed.

    wake up: something happened in a watched directory, or a second has passed
     │  every file has the contents of the last read ──▶ nothing
     ▼
    read after a moment ◀── the contents have changed meanwhile: somebody is still writing
     │
     ▼
    yield what was read

`changes()` watches directories, not files: files are renamed over, removed and created again, or are links that are
swapped, as Kubernetes does it. The wake-up each second finds changes that no watch reports: on other machines of a
network file system, in a directory that did not exist before, between two watches. The promise: contents that stay for
a moment are read, and contents that change within it never count.
"""

import asyncio
import hashlib
import logging
from collections.abc import AsyncGenerator, Callable, Collection, Iterator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import TypeVar

from watchfiles import awatch

from pgbackend import facts
from pgbackend.serve.config.load import FILE_BYTES

Value = TypeVar("Value")
Digests = dict[Path, bytes | None]

_INTERVAL = 1.0
"""Seconds between wake-ups when no watch reports anything."""
_MOMENT = 0.1
"""Seconds for which contents must stay the same: the first half of a file is often valid by itself."""
_GATHER_MS = 50
"""Events of the file system within this time cause one wake-up."""
_GATHER_MOST_MS = 250
_LINKS = 40
"""The longest chain of links that leads to a file, as on Linux."""


async def changes(
    read: Callable[[], Value], files: Callable[[], Collection[Path]], *, known: Digests | None = None
) -> AsyncGenerator[Value]:
    """Yield `read()` at once, and then whenever the contents of `files()` have changed.

    With `known`, the first read waits until the files differ from these digests. `read` runs in a thread; it may change
    what `files` returns. Never ends by itself: close it with `aclosing()` to free its watch.
    """
    seen: Digests = {} if known is None else known
    async with aclosing(_wake_ups(files)) as wake_ups:
        async for _ in wake_ups:
            found = await asyncio.to_thread(digests, files())
            if found == seen:
                continue
            while found != seen:
                seen = found
                await asyncio.sleep(_MOMENT)
                value = await asyncio.to_thread(read)
                found = await asyncio.to_thread(digests, files())
            yield value


def digests(files: Collection[Path]) -> Digests:
    """A digest of the contents of each file; None for a file that cannot be read."""
    return {file: _digest(file) for file in files}


async def _wake_ups(files: Callable[[], Collection[Path]]) -> AsyncGenerator[None]:
    """Yields whenever there may be a change."""
    complaint = ""
    while True:
        # Look once before each watch begins, for changes while there was none.
        yield
        directories = await asyncio.to_thread(_directories, files())
        watch = awatch(
            *directories,
            watch_filter=None,
            recursive=False,
            step=_GATHER_MS,
            debounce=_GATHER_MOST_MS,
            rust_timeout=int(_INTERVAL * 1000),
            yield_on_timeout=True,
        )
        try:
            async with aclosing(watch):
                async for _ in watch:
                    yield
                    # A watch of a directory that was replaced, or that links no longer lead to, reports nothing.
                    if await asyncio.to_thread(_directories, files()) != directories:
                        break
        except (OSError, RuntimeError) as error:
            # The directory has just been removed, or the system has no watches left.
            if str(error) != complaint:
                complaint = str(error)
                facts.emit("files not watched", level=logging.WARNING, error=error, poll_interval=_INTERVAL)
            await asyncio.sleep(_INTERVAL)


def _directories(files: Collection[Path]) -> dict[Path, tuple[int, int]]:
    """The directories to watch, each with its device and inode: a path may come to lead to another directory."""
    found = {}
    for file in files:
        with suppress(OSError):  # it does not exist, or has just been removed
            for directory in _directories_to(file):
                status = directory.stat()
                found[directory] = (status.st_dev, status.st_ino)
    return found


def _directories_to(path: Path) -> Iterator[Path]:
    """The directories whose entries decide which file is at `path`: its own, and those of all links on the way."""
    path = path.absolute()
    for _ in range(_LINKS):
        yield path.parent
        link = next((step for step in (path, *path.parents) if step.is_symlink()), None)
        if link is None:
            return
        yield link.parent
        path = link.parent / link.readlink() / path.relative_to(link)


def _digest(path: Path) -> bytes | None:
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            # Not more than `load_file()` reads: the file may be a database's dump.
            return hashlib.sha256(file.read(FILE_BYTES + 1)).digest()
    except OSError:
        return None
