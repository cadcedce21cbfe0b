"""Where workers count together, and what is removed there: what nobody holds, and nothing else."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pgbackend.errors import ConfigError
from pgbackend.serve.operations.counted import held, new_directory


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def left_by_the_dead(temporary: Path, name: str = "pgbackend-metrics-1-dead") -> Path:
    directory = temporary / name
    directory.mkdir()
    (directory / "counter_1.db").write_bytes(b"x")
    return directory


def test_it_is_removed_in_the_end() -> None:
    with new_directory() as directory:
        (directory / "counter_1.db").write_bytes(b"x")
    assert not directory.exists()


def test_the_last_to_leave_removes_it() -> None:
    with new_directory() as directory:
        holding = held(directory)
        holding.__enter__()
    assert directory.is_dir()
    holding.__exit__(None, None, None)
    assert not directory.exists()


def test_one_that_somebody_has_tidied_up_is_made_again() -> None:
    with new_directory() as directory:
        directory.rmdir()
        with held(directory):
            assert directory.stat().st_mode & 0o777 == 0o700
            with new_directory():
                assert directory.is_dir()
    assert not directory.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make something another user's")
def test_another_users_in_its_place_is_not_counted_in(temporary: Path) -> None:
    theirs = left_by_the_dead(temporary)
    os.chown(theirs, 20_551, 20_551)
    with pytest.raises(ConfigError, match="is another user's"), held(theirs):
        pass
    assert (theirs / "counter_1.db").exists()


def test_those_of_the_dead_are_removed_and_those_of_the_living_stay(temporary: Path) -> None:
    dead = left_by_the_dead(temporary)
    with new_directory() as living:
        (living / "counter_1.db").write_bytes(b"x")
        with new_directory() as another:
            assert another != living
            assert not dead.exists()
            assert (living / "counter_1.db").exists()


def test_one_whose_holders_were_killed_is_removed(temporary: Path) -> None:
    code = "import sys, time; from pgbackend.serve.operations.counted import new_directory; import tempfile\n"
    code += f"tempfile.tempdir = {str(temporary)!r}\n"
    code += "with new_directory() as one: print(one, flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        directory = Path(holder.stdout.readline().strip())
        with new_directory():
            assert directory.is_dir()
        holder.kill()
    with new_directory():
        assert not directory.exists()


def test_what_only_looks_like_one_stays(temporary: Path) -> None:
    elsewhere = left_by_the_dead(temporary, "elsewhere")
    (temporary / "pgbackend-metrics-link").symlink_to(elsewhere)
    (temporary / "pgbackend-metrics-file").touch()
    with new_directory():
        pass
    assert (elsewhere / "counter_1.db").exists()
    assert (temporary / "pgbackend-metrics-file").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make something another user's")
def test_another_users_stays(temporary: Path) -> None:
    theirs = left_by_the_dead(temporary)
    os.chown(theirs, 20_551, 20_551)
    with new_directory():
        pass
    assert (theirs / "counter_1.db").exists()


def test_where_none_can_be_made_it_is_one_clear_line(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "not there"))
    with (
        pytest.raises(
            ConfigError, match=r"there can be none: No such file or directory\. Set TMPDIR to another place\.$"
        ),
        new_directory(),
    ):
        pass
