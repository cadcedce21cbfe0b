"""The temporary directory in which broker processes count together: it exists for as long as one of them uses it.

Every process holds a shared flock() on the directory, and the supervisor holds one from the beginning. The kernel drops
a lock with its process, however that ends. So the last process to leave removes the directory, and if that one was
killed, the next broker of the same user does. systemd-tmpfiles respects the lock, too, and leaves the directory alone.
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
def create() -> Iterator[Path]:
    """Hold a new directory; remove those that no process holds any more. Raises ConfigError if none can be created."""
    try:
        for leftover in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
            _remove_unless_held(leftover)
        directory = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
    except OSError as error:
        raise _no_directory(error) from None
    with hold(directory):
        yield directory


@contextmanager
def hold(directory: Path) -> Iterator[None]:
    """No process removes the directory while this is open. The last one to hold it removes it.

    If the directory is missing, it is created again: cleaning up temporary files must not stop the supervisor from
    replacing processes. Raises ConfigError if that fails.
    """
    try:
        file = _open_and_lock(directory)
    except OSError as error:
        raise _no_directory(error) from None
    try:
        yield
    finally:
        os.close(file)
        _remove_unless_held(directory)


def _open_and_lock(directory: Path) -> int:
    while True:
        directory.mkdir(mode=0o700, exist_ok=True)
        # Another broker may remove the directory between these steps; then start over.
        with suppress(FileNotFoundError), ExitStack() as opened:
            file = os.open(directory, _DIRECTORY)
            opened.callback(os.close, file)
            if not _is_ours(file):
                raise PermissionError(errno.EPERM, f"{directory} belongs to another user")
            fcntl.flock(file, fcntl.LOCK_SH)  # blocks for milliseconds while another broker removes the directory
            if os.path.samestat(os.fstat(file), directory.stat()):
                opened.pop_all()
                return file


def _no_directory(error: OSError) -> ConfigError:
    return ConfigError(
        f"Cannot create the temporary directory for the metrics of the broker processes: {error.strerror}. "
        "Set TMPDIR to another place."
    )


def _is_ours(file: int) -> bool:
    """Checked because root can open any directory, and any user can create one in /tmp."""
    return os.fstat(file).st_uid == os.geteuid()


def _remove_unless_held(directory: Path) -> None:
    with suppress(OSError):  # held, gone, not a directory, or another user's
        file = os.open(directory, _DIRECTORY)
        try:
            if _is_ours(file):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory, ignore_errors=True)
        finally:
            os.close(file)
