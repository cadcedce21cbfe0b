"""Facts on file: each process appends what it did, one short write for each fact.

So kill -9 loses one line at most. A line is `nanoseconds kind field … .`, by the monotonic clock, which all processes
of a machine share. The full stop tells a whole line from one that was cut short.

A file belongs to one place (`worker-1`), which has one process at a time. The next process there appends to the same
file. So each file is in the order of time, and any number of files can be read as one, line by line.
"""

import heapq
import os
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

_SUFFIX = ".notes"


class Note(NamedTuple):
    """One fact."""

    at: int
    """Monotonic nanoseconds."""
    place: str
    """The place whose file it is in."""
    kind: str
    fields: list[str]

    def __str__(self) -> str:
        return " ".join((f"{self.at / 1e9:.6f}", self.place, self.kind, *self.fields))


class Notes:
    """A place's file, open for appending."""

    def __init__(self, directory: Path, place: str) -> None:
        self._descriptor = os.open(
            directory / (place + _SUFFIX), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644
        )
        # Facts come from several threads. The lock covers reading the clock, so lines are in the order of time.
        self._lock = threading.Lock()
        if os.fstat(self._descriptor).st_size:
            # A predecessor may have been killed in the middle of a line.
            os.write(self._descriptor, b"\n")

    def note(self, kind: str, *fields: object) -> None:
        """The fact is in the file, whatever happens to this process next. Fields hold no spaces."""
        text = " ".join((kind, *map(str, fields)))
        with self._lock:
            os.write(self._descriptor, f"{time.monotonic_ns()} {text} .\n".encode())

    def close(self) -> None:
        os.close(self._descriptor)


def read(directory: Path, place: str) -> Iterator[Note]:
    """The facts of one place, in the order of time. None if it has no file."""
    path = directory / (place + _SUFFIX)
    if not path.exists():
        return
    with path.open() as file:
        for line in file:
            if line.endswith(" .\n"):
                at, kind, *fields = line.split()[:-1]
                yield Note(int(at), place, kind, fields)


def merge(directory: Path, places: Iterable[str]) -> Iterator[Note]:
    """The facts of several places, in the order of time."""
    return heapq.merge(*(read(directory, place) for place in places))
