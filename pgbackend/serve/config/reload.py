"""Follows the configuration file: yields what it says whenever that is valid and something new.

    look: whenever something happens in a directory that matters, and each second whatever happens
     │  what the files hold is what they held at the last look ──▶ nothing
     ▼
    read, a moment later ◀── meanwhile they hold something else: still being written
     │
     ├── not valid ──▶ reported once; what is in force stays
     ├── what is in force ──▶ nothing
     └── anything else ──▶ yielded

Directories are watched and not files, which may be renamed over, removed and made again, or be links that are
exchanged, as Kubernetes does it. The look each second finds what no watch tells: what happens on other machines of a
network file system, in a directory that was not there before, between two watches. The promise: what the files hold
for a moment is in force a moment later, and what they hold for less than that, never.
"""

import asyncio
import hashlib
import logging
from collections.abc import AsyncGenerator, Collection, Iterator
from contextlib import aclosing, suppress
from pathlib import Path

from watchfiles import awatch

from pgbackend import facts
from pgbackend.errors import ConfigError
from pgbackend.serve.config.models import FILE_BYTES, Configuration, load_file

_LOOK = 1.0
"""Seconds between looks when nothing is said to have happened."""
_MOMENT = 0.1
"""Seconds for which files must hold still to be believed: half of a file is often valid as well."""
_GATHER_MS = 50
"""What happens within this time is one reason to look."""
_GATHER_MOST_MS = 250
_LINKS = 40
"""How many links lead to a file at most, as on Linux."""


def changes(
    path: Path | None, current: Configuration, *, extra: Collection[Path] = ()
) -> AsyncGenerator[Configuration]:
    """Each valid configuration in the file at `path` that differs from the one before it, `current` being the first.

    One whose secrets have changed differs. When what the files `extra` hold changes, the configuration that is in
    force is yielded once more; without a `path`, or with one that leads to a pipe, only then. Never ends by itself;
    close it, with `aclosing()`, to free what it watches.
    """
    if path is not None and says_once(path):
        path = None
    return _follow(_Following(path, current, frozenset(extra)))


def says_once(path: Path) -> bool:
    """Whether it is a pipe or the like. Who reads on waits for ever, in a thread that nobody can end."""
    return path.exists() and not path.is_file()


async def _follow(following: "_Following") -> AsyncGenerator[Configuration]:
    async with aclosing(_occasions(following)) as occasions:
        async for _ in occasions:
            if await following.look():
                yield following.current


async def _occasions(following: "_Following") -> AsyncGenerator[None]:
    """Yields whenever there may be something to see."""
    complaint = ""
    while True:
        # Before there is a watch, for what happened without one; what happens in the moment between takes a second.
        yield
        directories = await asyncio.to_thread(following.directories)
        watch = awatch(
            *directories,
            watch_filter=None,
            recursive=False,
            step=_GATHER_MS,
            debounce=_GATHER_MOST_MS,
            rust_timeout=int(_LOOK * 1000),
            yield_on_timeout=True,
        )
        try:
            async with aclosing(watch):
                async for _ in watch:
                    yield
                    # Links lead elsewhere now, or a directory was made anew: the old one tells nothing any more.
                    if await asyncio.to_thread(following.directories) != directories:
                        break
        except (OSError, RuntimeError) as error:
            # A directory that went just now; no more watches to be had. Without them it takes a second.
            if str(error) != complaint:
                complaint = str(error)
                facts.emit("configuration not watched", level=logging.WARNING, error=error, interval=_LOOK)
            await asyncio.sleep(_LOOK)


class _Following:
    """What was seen of the files, and which configuration is in force because of it."""

    def __init__(self, path: Path | None, current: Configuration, extra: frozenset[Path]) -> None:
        self.current = current
        self._path = path
        self._file = () if path is None else (path,)
        self._extra = extra
        self._secrets: frozenset[Path] = frozenset()
        # Of the others nothing: whether they are as `current` says, the first look finds out.
        self._seen = {file: _digest(file) for file in extra}
        self._refused: str | None = None

    def directories(self) -> dict[Path, tuple[int, int]]:
        """Those that are to be watched, and which ones they are: another may come to stand in the place of one."""
        found = {}
        for file in (*self._file, *self._secrets, *self._extra):
            with suppress(OSError):  # what is not there, or went while it was followed
                for directory in _ways(file):
                    status = directory.stat()
                    found[directory] = (status.st_dev, status.st_ino)
        return found

    async def look(self) -> bool:
        """Whether there is something to put in force: `current`."""
        before, seen = self._seen, await asyncio.to_thread(self._see)
        if seen == before:
            return False
        while True:
            await asyncio.sleep(_MOMENT)
            # In a thread: it may be a large file, and a slow file system.
            found = await asyncio.to_thread(self._read)
            held, seen = seen, await asyncio.to_thread(self._see)
            if held == seen:
                break
        self._seen = seen
        touched = any(seen[file] != before[file] for file in self._extra)
        return self._accept(found) or touched

    def _see(self) -> dict[Path, bytes | None]:
        """A digest of what each file holds; None where it cannot be read."""
        return {file: _digest(file) for file in (*self._file, *self._secrets, *self._extra)}

    def _read(self) -> Configuration | ConfigError:
        if self._path is None:
            return self.current
        secrets: set[Path] = set()
        try:
            found: Configuration | ConfigError = load_file(self._path, files=secrets)
        except ConfigError as error:
            found = error
            # Where a mistake hides them, the ones that are in force are still good to know.
            secrets |= self._secrets
        self._secrets = frozenset(secrets)
        return found

    def _accept(self, found: Configuration | ConfigError) -> bool:
        if isinstance(found, ConfigError):
            if str(found) != self._refused:
                self._refused = str(found)
                facts.emit("configuration refused", level=logging.ERROR, file=str(self._path), error=str(found))
            return False
        if found != self.current:
            self._refused = None
            self.current = found
            return True
        if self._refused is not None:
            self._refused = None
            # What was in force all the time is in the file again.
            facts.emit("configuration reloaded", file=str(self._path))
        return False


def _ways(path: Path) -> Iterator[Path]:
    """The directories whose entries decide which file is at `path`: its own, and those of the links that lead there."""
    path = path.absolute()
    for _ in range(_LINKS):
        yield path.parent
        link = next((step for step in (path, *path.parents) if step.is_symlink()), None)
        if link is None:
            return
        yield link.parent
        path = link.parent / link.readlink() / path.relative_to(link)


def _digest(path: Path) -> bytes | None:
    """Of as much of a file as is ever read: what stands in the place of a configuration may be a database's dump."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            return hashlib.sha256(file.read(FILE_BYTES + 1)).digest()
    except OSError:
        return None
