"""A process whose wall clock can be set while it runs. A program that starts another one, never imported before it.

    python -P clock.py pgbackend.torture.worker

`time.time()`, `datetime.now()` and their kin are exchanged before anything of ours is imported, so that nobody holds
the true ones. They are right until somebody calls `jump()`, as when an operator or NTP sets the clock. The monotonic
clock is left alone, as the kernel leaves its own. The process goes when its parent does, whatever state it is in.
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


class _Kind(type):
    """Whatever is a datetime is one of these, too: asyncpg makes true ones."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _RealDatetime)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, _RealDatetime)


class _Datetime(_RealDatetime, metaclass=_Kind):
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
    """From now on the wall clock is so much ahead of where it was."""
    global _offset  # noqa: PLW0603 - there is one wall clock
    _offset += seconds


def install() -> None:
    """The wall clock is ours."""
    # Its compiled parts want the true class, and have no use for the time of day.
    import asyncpg  # noqa: F401, PLC0415

    time.time = lambda: _real_time() + _offset
    time.time_ns = lambda: _real_time_ns() + _offset * 10**9
    dt.datetime = _Datetime  # type: ignore[misc]


def die_with_parent() -> None:
    """Whoever is stopped when its parent goes would be there for ever: it cannot see that its input has closed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    die_with_parent()
    install()
    # The program finds this very module, whose clock is the one that counts.
    sys.modules["pgbackend.torture.clock"] = sys.modules["__main__"]
    program = sys.argv[1]
    if program.endswith(".py"):
        sys.argv = [program]
        runpy.run_path(str(Path(program)), run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
