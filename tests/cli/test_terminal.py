"""Output that commands show to people at a terminal only."""

import fcntl
import io
import os
import pty
import struct
import termios
import time

import pytest

from pgbackend.cli.terminal import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_progress_is_one_line_that_is_deleted_at_the_end(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with Progress("exported", "event", total=4_000) as progress:
        for _ in range(2):
            clock[0] += 0.5
            progress.add(1_000)
            progress.add(0)
    shown = terminal.getvalue().split("\r")[1:]
    assert [one.removesuffix("\x1b[K") for one in shown] == [
        "exported 1,000 events, 25 %, 2,000 a second",
        "exported 2,000 events, 50 %, 2,000 a second",
        "",
    ]


def test_progress_does_not_wrap_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    outside, inside = pty.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 30, 0, 0))
    with os.fdopen(inside, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        with Progress("exported", "event", total=4_000) as progress:
            clock[0] += 0.5
            progress.add(1_000)
        shown = os.read(outside, 1_000).decode()
    os.close(outside)
    assert shown == "\rexported 1,000 events, 25 %, \x1b[K\r\x1b[K"


def test_programs_see_no_progress(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    for output, is_quiet in ((io.StringIO(), False), (Terminal(), True)):
        monkeypatch.setattr("sys.stderr", output)
        with Progress("stored", "event", is_quiet=is_quiet) as progress:
            clock[0] += 9
            progress.add(1_000)
        assert output.getvalue() == ""
        assert progress.count == 1_000
