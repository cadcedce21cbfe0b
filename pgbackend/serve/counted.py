"""Where the workers of a broker count together: a directory among the temporary files, for as long as somebody counts.

Everybody who counts there holds a shared lock of it, the supervisor from the beginning. flock() ends with its process,
whatever that ends of: so the last to leave removes the directory, and where the last was killed, the next broker of the
same user does. systemd-tmpfiles heeds the same lock, and does not take for forgotten what seldom changes.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pgbackend.errors import ConfigError

_PREFIX = "pgbackend-metrics-"


@contextmanager
def new_directory() -> Iterator[Path]:
    """One of one's own, held; those that nobody holds any more are gone. Raises ConfigError where none can be made."""
    with ExitStack() as holding:
        try:
            for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
                _remove_unless_held(left)
            while True:
                directory = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
                # Another broker that looks just now may have found it before it was held.
                with suppress(FileNotFoundError):
                    holding.enter_context(held(directory))
                    break
        except OSError as error:
            said = f"Workers count in a temporary directory, and none can be made: {error.strerror}. Set TMPDIR."
            raise ConfigError(said) from None
        yield directory


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Nobody removes it while this is open; who is the last to hold it does then.

    Raises FileNotFoundError when it is gone.
    """
    file = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(file, fcntl.LOCK_SH)  # waits, for milliseconds, for who removes it
        directory.stat()
        yield
    finally:
        os.close(file)
        _remove_unless_held(directory)


def _remove_unless_held(directory: Path) -> None:
    with suppress(OSError):  # it is held, or gone, or no directory, or another user's
        file = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            if os.fstat(file).st_uid == os.geteuid():  # root may open everybody's
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory, ignore_errors=True)
        finally:
            os.close(file)
