"""Where the workers of a broker count together: a directory among the temporary files, for as long as somebody counts.

Everybody who counts there holds a shared lock of it, the supervisor from the beginning. flock() ends with its process,
whatever that ends of: so the last to leave removes the directory, and where the last was killed, the next broker of the
same user does. systemd-tmpfiles heeds the same lock, and does not take for forgotten what seldom changes.
"""

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pgbackend.errors import ConfigError

_PREFIX = "pgbackend-metrics-"
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


@contextmanager
def new_directory() -> Iterator[Path]:
    """One of one's own, held; those that nobody holds any more are gone. Raises ConfigError where none can be made."""
    try:
        for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
            _remove_unless_held(left)
        directory = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
    except OSError as error:
        raise _no_directory(error) from None
    with held(directory):
        yield directory


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Nobody removes it while this is open; who is the last to hold it does then.

    It is made again where it is gone: who tidies up temporary files must not keep workers from being replaced. Raises
    ConfigError when that cannot be.
    """
    try:
        file = _hold(directory)
    except OSError as error:
        raise _no_directory(error) from None
    try:
        yield
    finally:
        os.close(file)
        _remove_unless_held(directory)


def _hold(directory: Path) -> int:
    while True:
        directory.mkdir(mode=0o700, exist_ok=True)
        # Another broker may remove it, just before it is held.
        with suppress(FileNotFoundError), ExitStack() as opened:
            file = os.open(directory, _DIRECTORY)
            opened.callback(os.close, file)
            if not _is_ours(file):
                raise PermissionError(errno.EPERM, f"{directory} is another user's")
            fcntl.flock(file, fcntl.LOCK_SH)  # waits, for milliseconds, for who removes it
            if os.path.samestat(os.fstat(file), directory.stat()):
                opened.pop_all()
                return file


def _no_directory(error: OSError) -> ConfigError:
    return ConfigError(
        f"Workers count in a temporary directory, and there can be none: {error.strerror}. Set TMPDIR to another place."
    )


def _is_ours(file: int) -> bool:
    """Root may open everybody's, and everybody may make one in a directory for all."""
    return os.fstat(file).st_uid == os.geteuid()


def _remove_unless_held(directory: Path) -> None:
    with suppress(OSError):  # it is held, or gone, or no directory, or another user's
        file = os.open(directory, _DIRECTORY)
        try:
            if _is_ours(file):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory, ignore_errors=True)
        finally:
            os.close(file)
