"""The directory in which broker processes count: the last holder removes it, and nothing else is removed."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pgbackend.errors import ConfigError
from pgbackend.serve.operations import metrics_directory


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def leftover(temporary: Path, name: str = "pgbackend-metrics-1-dead") -> Path:
    """A directory that no process holds."""
    directory = temporary / name
    directory.mkdir()
    (directory / "counter_1.db").write_bytes(b"x")
    return directory


def test_the_only_holder_removes_the_directory() -> None:
    with metrics_directory.create() as directory:
        (directory / "counter_1.db").write_bytes(b"x")
    assert not directory.exists()


def test_the_last_holder_removes_the_directory() -> None:
    with metrics_directory.create() as directory:
        holding = metrics_directory.hold(directory)
        holding.__enter__()
    assert directory.is_dir()
    holding.__exit__(None, None, None)
    assert not directory.exists()


def test_a_deleted_directory_is_created_again() -> None:
    with metrics_directory.create() as directory:
        directory.rmdir()
        with metrics_directory.hold(directory):
            assert directory.stat().st_mode & 0o777 == 0o700
            with metrics_directory.create():
                assert directory.is_dir()
    assert not directory.exists()


def test_leftovers_are_removed_and_held_directories_stay(temporary: Path) -> None:
    dead = leftover(temporary)
    with metrics_directory.create() as held:
        (held / "counter_1.db").write_bytes(b"x")
        with metrics_directory.create() as another:
            assert another != held
            assert not dead.exists()
            assert (held / "counter_1.db").exists()


def test_the_directory_of_a_killed_process_is_removed(temporary: Path) -> None:
    code = "import tempfile, time; from pgbackend.serve.operations import metrics_directory\n"
    code += f"tempfile.tempdir = {str(temporary)!r}\n"
    code += "with metrics_directory.create() as one: print(one, flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        directory = Path(holder.stdout.readline().strip())
        with metrics_directory.create():
            assert directory.is_dir()
        holder.kill()
    with metrics_directory.create():
        assert not directory.exists()


def test_links_files_and_other_names_stay(temporary: Path) -> None:
    elsewhere = leftover(temporary, "elsewhere")
    (temporary / "pgbackend-metrics-link").symlink_to(elsewhere)
    (temporary / "pgbackend-metrics-file").touch()
    with metrics_directory.create():
        pass
    assert (elsewhere / "counter_1.db").exists()
    assert (temporary / "pgbackend-metrics-file").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory to another user")
def test_the_directory_of_another_user_is_neither_removed_nor_used(temporary: Path) -> None:
    theirs = leftover(temporary)
    os.chown(theirs, 20_551, 20_551)
    with metrics_directory.create():
        pass
    with pytest.raises(ConfigError, match="belongs to another user"), metrics_directory.hold(theirs):
        pass
    assert (theirs / "counter_1.db").exists()


def test_a_directory_that_cannot_be_created_is_one_clear_line(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "missing"))
    with (
        pytest.raises(
            ConfigError, match=r"^Cannot create the .*: No such file or directory\. Set TMPDIR to another place\.$"
        ),
        metrics_directory.create(),
    ):
        pass
