"""Facts on file: each process appends what it did, one short write a fact, so that kill -9 loses one line at most.

A line is `nanoseconds mark field … .` by the monotonic clock, which all processes of a machine share. The full stop
tells a whole line from one that was cut short. A file belongs to one place (`worker-1`), which has one process at a
time; a process that takes over a place goes on in its file. So each file is in the order of time, and any number of
files can be read as one, line by line, however long they are.
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
    """Whose file it stands in."""
    mark: str
    fields: list[str]

    def __str__(self) -> str:
        return " ".join((f"{self.at / 1e9:.6f}", self.place, self.mark, *self.fields))


class Notes:
    """A place's file, to be added to."""

    def __init__(self, directory: Path, place: str) -> None:
        self._descriptor = os.open(
            directory / (place + _SUFFIX), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644
        )
        # Facts come from several threads. The time is taken within, or lines would stand against its order.
        self._one = threading.Lock()
        if os.fstat(self._descriptor).st_size:
            # A predecessor may have been killed in the middle of a line.
            os.write(self._descriptor, b"\n")

    def note(self, mark: str, *fields: object) -> None:
        """The fact is in the file, whatever happens to this process next. Fields hold no spaces."""
        text = " ".join((mark, *map(str, fields)))
        with self._one:
            os.write(self._descriptor, f"{time.monotonic_ns()} {text} .\n".encode())

    def close(self) -> None:
        os.close(self._descriptor)


def read(directory: Path, place: str) -> Iterator[Note]:
    """The facts of one place, in the order of time."""
    with (directory / (place + _SUFFIX)).open() as file:
        for line in file:
            if line.endswith(" .\n"):
                at, mark, *fields = line.split()[:-1]
                yield Note(int(at), place, mark, fields)


def merge(directory: Path, places: Iterable[str]) -> Iterator[Note]:
    """The facts of several places, in the order of time."""
    there = [place for place in places if (directory / (place + _SUFFIX)).exists()]
    return heapq.merge(*(read(directory, place) for place in there))
