"""Programs for Node.js, with their packages."""

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest


def install(directory: Path) -> None:
    """Return once the packages that `package-lock.json` lists are in the directory. Skip the test without Node.js."""
    missing = [program for program in ("node", "npm") if shutil.which(program) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not found: install them (Debian: apt-get install nodejs npm)")
    lock = (directory / "package-lock.json").read_text()
    installed = directory / "node_modules" / ".installed"
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        # One test process installs, the others wait.
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if not installed.is_file() or installed.read_text() != lock:
            command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier"]
            run = subprocess.run(
                command, cwd=directory, check=False, timeout=150, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True,
            )  # fmt: skip
            assert run.returncode == 0, f"{' '.join(command)} in {directory}: {run.stdout}"
            installed.write_text(lock)
    finally:
        os.close(descriptor)
