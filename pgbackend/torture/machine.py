"""The machine, watched by a process that takes no part in the run.

It sleeps, writes to disk, and asks the clock how long each took. If one took longer than a worker's heartbeat may take,
the machine stood still, and this process notes from when to when:

    stall processor|disk FROM TO

It has no event loop, no thread and no connection: nothing that is judged can make it late, except by using up the
machine. The parent ends it with SIGTERM.
"""

import json
import os
import sys
import time
from pathlib import Path

from pgbackend.torture.clock import die_with_parent
from pgbackend.torture.plan import LEASE
from pgbackend.torture.records import Notes

PLACE = "machine"
STALL = LEASE / 3
"""Seconds: a heartbeat that takes longer loses its connection."""
_INTERVAL = 0.1


def watch(notes: Notes, disk: Path) -> None:
    """Note each stall, for ever. `disk`: a file to write to, on the disk of PostgreSQL's data if that is known."""
    with disk.open("wb", buffering=0) as file:
        before = time.monotonic_ns()
        while True:
            time.sleep(_INTERVAL)
            woke = time.monotonic_ns()
            _report(notes, "processor", before, woke - round(_INTERVAL * 1e9))
            os.pwrite(file.fileno(), b"x", 0)
            os.fsync(file.fileno())
            before = time.monotonic_ns()
            _report(notes, "disk", woke, before)


def _report(notes: Notes, what: str, since: int, until: int) -> None:
    if until - since > STALL * 1e9:
        notes.note("stall", what, since, until)


def main() -> None:
    """Watch as the first line of standard input says, until killed."""
    die_with_parent()
    job = json.loads(sys.stdin.readline())
    notes = Notes(Path(job["directory"]), PLACE)
    notes.note("start", os.getpid())
    os.write(1, b"ready\n")
    watch(notes, Path(job["disk"]))


if __name__ == "__main__":
    main()
