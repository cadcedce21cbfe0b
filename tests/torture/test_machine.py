"""The process that watches the machine: it notes a stall when it was not run, and nothing otherwise."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pgbackend.torture import machine
from pgbackend.torture.machine import PLACE, STALL
from pgbackend.torture.records import Note, read
from tests.support.polling import eventually


def stalls(directory: Path) -> list[Note]:
    return [note for note in read(directory, PLACE) if note.kind == "stall"]


@pytest.mark.slow
async def test_it_notes_from_when_to_when_it_did_not_run(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    job = json.dumps({"directory": str(tmp_path), "disk": str(disk)})
    with subprocess.Popen(
        [sys.executable, "-P", "-m", machine.__name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(job + "\n")
        process.stdin.flush()
        assert process.stdout.readline() == "ready\n"
        await eventually("it watches", lambda: disk.exists() and disk.stat().st_size > 0)
        process.send_signal(signal.SIGSTOP)
        frozen_until = time.monotonic() + 2 * STALL
        await eventually("it has been frozen for long enough", lambda: time.monotonic() > frozen_until)
        assert not stalls(tmp_path)
        process.send_signal(signal.SIGCONT)
        await eventually("the stall is noted", lambda: bool(stalls(tmp_path)))
        process.send_signal(signal.SIGTERM)
    what, since, until = stalls(tmp_path)[0].fields
    assert what in ("processor", "disk")
    assert int(until) - int(since) > STALL * 1e9
