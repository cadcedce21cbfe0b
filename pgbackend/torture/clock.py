"""Runs a program in a process whose wall clock can be set, as an operator or NTP sets it.

    python -P clock.py pgbackend.torture.worker

It replaces `time.time()`, `datetime.now()` and their kin before the program is imported, so that no module holds the
real ones. They tell the real time until `jump()` is called. The monotonic clock stays as it is, because the kernel
never sets its own. The process ends when its parent does, even if it is stopped.
"""

import ctypes
import datetime as dt
import runpy
import signal
import sys
import time
from datetime import timedelta, tzinfo
from pathlib import Path
from typing import Self

_real_time = time.time
_real_time_ns = time.time_ns
_RealDatetime = dt.datetime
_offset = 0
_PR_SET_PDEATHSIG = 1


class _AnyDatetime(type):
    """Makes each real datetime an instance too: asyncpg makes real ones."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _RealDatetime)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, _RealDatetime)


class _Datetime(_RealDatetime, metaclass=_AnyDatetime):
    """`datetime.datetime` by the clock that jumps."""

    __slots__ = ()

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Self:
        return _RealDatetime.now(tz) + timedelta(seconds=_offset)  # type: ignore[return-value] # as good as one

    @classmethod
    def utcnow(cls) -> Self:
        return cls.now(dt.UTC).replace(tzinfo=None)

    @classmethod
    def today(cls) -> Self:
        return cls.now()


def jump(seconds: int) -> None:
    """Set the wall clock ahead by so many seconds, or back."""
    global _offset  # noqa: PLW0603 - there is one wall clock
    _offset += seconds


def install() -> None:
    """Replace the wall clock of this process."""
    # Import asyncpg first: its compiled parts need the real class.
    import asyncpg  # noqa: F401, PLC0415

    time.time = lambda: _real_time() + _offset
    time.time_ns = lambda: _real_time_ns() + _offset * 10**9
    dt.datetime = _Datetime  # type: ignore[misc]


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends. A stopped process cannot see that its input closed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    die_with_parent()
    install()
    # So that the program imports this very module, with the clock that it sets.
    sys.modules["pgbackend.torture.clock"] = sys.modules["__main__"]
    program = sys.argv[1]
    if program.endswith(".py"):
        sys.argv = [program]
        runpy.run_path(str(Path(program)), run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
