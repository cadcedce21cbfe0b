"""The home and its owner: as root, PostgreSQL runs as another user, and root touches nothing that is not its own."""

import asyncio
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pgbackend.embedded import home
from pgbackend.errors import EmbeddedServerError
from tests.support.databases import execute, query_value
from tests.support.embedded_user import active_keeper, fast_server, nothing_is_left, postmaster, processes
from tests.support.polling import eventually

pytestmark = pytest.mark.slow
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="is about what root does")
not_as_root = pytest.mark.skipif(os.geteuid() == 0, reason="is about what others than root do")

STRANGER = 65533
"""A user id without a name."""


def _account(name: str) -> int:
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        return -1


@pytest.fixture
def owned(directory: Path, tmp_path: Path) -> Path:
    """A directory of a stranger's, with a database."""
    owned = tmp_path / "owned"
    owned.mkdir()
    (directory / "postgresql").rename(owned / "postgresql")
    subprocess.run(["chown", "-R", f"{STRANGER}:{STRANGER}", owned], check=True)
    return owned


@pytest.fixture
def roots(tmp_path: Path) -> Path:
    """A directory of root's."""
    roots = tmp_path / "roots"
    (roots / "sub").mkdir(parents=True)
    for name in ("shadow", "PG_VERSION", "sub/keys"):
        (roots / name).write_text("18\n")
    return roots


def _looks(top: Path) -> dict[Path, tuple[int, int, float]]:
    return {path: (path.lstat().st_uid, path.lstat().st_mode, path.lstat().st_mtime) for path in (top, *top.rglob("*"))}


@as_root
async def test_as_root_it_runs_as_another_in_a_directory_that_stays_closed(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    before = {path: path.stat().st_mode for path in (closed, *closed.parents)}
    accounts = Path("/etc/passwd").read_bytes()
    async with fast_server(closed / "data") as server:
        assert all(Path(f"/proc/{process}").stat().st_uid for process in processes(closed / "data"))
        assert Path(f"/proc/{active_keeper(closed / 'data')}").stat().st_uid
        await execute(server.dsn, "create table kept (value int)")
    assert {path: path.stat().st_mode for path in (closed, *closed.parents)} == before
    assert Path("/etc/passwd").read_bytes() == accounts
    owner = (closed / "data/postgresql/data").stat().st_uid
    assert owner not in {account.pw_uid for account in pwd.getpwall()} - {_account("pgbackend")}
    assert {path.lstat().st_uid for path in (closed / "data/postgresql").rglob("*")} == {owner}


@as_root
@pytest.mark.parametrize("owner", [STRANGER, _account("nobody")], ids=["number", "account"])
async def test_as_root_all_that_lies_in_a_directory_is_its_owners_from_the_beginning(
    tmp_path: Path, owner: int
) -> None:
    owned = tmp_path / "owned"
    owned.mkdir()
    os.chown(owned, owner, 0)
    async with fast_server(owned / "a" / "b"):
        assert Path(f"/proc/{postmaster(owned / 'a/b')}").stat().st_uid == owner
        assert Path(f"/proc/{postmaster(owned / 'a/b')}").stat().st_gid != 0
        made = {*owned.rglob("*")}
        assert {path.lstat().st_uid for path in made} == {owner}
        assert not {path.lstat().st_gid for path in made} & {0}


@as_root
@pytest.mark.parametrize("owner", [STRANGER, _account("nobody")], ids=["number", "account"])
async def test_as_root_a_link_placed_during_initdb_leads_nowhere(tmp_path: Path, roots: Path, owner: int) -> None:
    owned, before = tmp_path / "owned", _looks(roots)
    owned.mkdir()
    os.chown(owned, owner, owner)
    starting = asyncio.create_task(fast_server(owned).start())
    await eventually("initdb works", lambda: any(owned.glob("postgresql/data.new-*/*")) or starting.done())
    [new] = owned.glob("postgresql/data.new-*")
    new.rename(f"{new}.moved")
    new.symlink_to(roots)
    with pytest.raises(EmbeddedServerError):
        await starting
    await nothing_is_left(owned)
    assert _looks(roots) == before


@as_root
async def test_as_root_a_home_that_becomes_a_link_leads_nowhere(owned: Path, roots: Path) -> None:
    before = _looks(roots)
    server = fast_server(owned)
    await server.start()
    (owned / "postgresql").rename(owned / "moved")
    (owned / "postgresql").symlink_to(roots)
    await server.stop()
    with pytest.raises(EmbeddedServerError, match="Not a directory"):
        await fast_server(owned).start()
    assert _looks(roots) == before


@as_root
@pytest.mark.parametrize("name", ["data", "keepers", "server", "postgresql.log", "run"])
async def test_as_root_a_link_in_the_home_leads_nowhere(owned: Path, roots: Path, name: str) -> None:
    link, before = owned / "postgresql" / name, _looks(roots)
    if link.exists():  # the socket may be far from home
        link.rename(owned / "postgresql" / f"{name}.moved")
    link.unlink(missing_ok=True)
    link.symlink_to(roots if link.suffix == "" and name in ("data", "run") else roots / "shadow")
    if name == "run":  # the owner makes another
        async with fast_server(owned) as server:
            assert await query_value(server.dsn, "select 1") == 1
    else:
        with pytest.raises(EmbeddedServerError):
            await fast_server(owned).start()
    assert _looks(roots) == before


@as_root
async def test_as_root_what_initdb_left_as_another_account_is_deleted(owned: Path) -> None:
    (owned / "postgresql/data").rename(owned / "moved")
    left = owned / "postgresql/data.new-killed"
    (left / "base").mkdir(parents=True, mode=0o700)
    subprocess.run(["chown", "-R", str(_account("nobody")), left], check=True)
    async with fast_server(owned):
        assert not left.exists()


@as_root
async def test_as_root_a_home_that_a_stranger_made_is_refused(tmp_path: Path) -> None:
    public = tmp_path / "public"
    public.mkdir()
    public.chmod(0o1777)
    (public / "postgresql").mkdir(mode=0o700)
    os.chown(public / "postgresql", STRANGER, STRANGER)
    with pytest.raises(EmbeddedServerError, match="anybody could have made it"):
        await fast_server(public).start()
    os.chown(public, 65532, 65532)
    with pytest.raises(EmbeddedServerError, match="belongs to user 65533, not to 65532"):
        await fast_server(public).start()


@as_root
async def test_as_root_a_home_of_roots_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "postgresql").mkdir(mode=0o700)
    (tmp_path / "postgresql/precious").touch()
    with pytest.raises(EmbeddedServerError, match="belongs to user 0"):
        await fast_server(tmp_path).start()
    assert (tmp_path / "postgresql/precious").exists()


@as_root
async def test_root_and_the_owner_share_a_server(blank: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="pgbackend-test-") as name:
        above = Path(name)
        above.chmod(0o755)
        owned, nobody = above / "owned", _account("nobody")
        owned.mkdir()
        subprocess.run(["cp", "-a", blank / "postgresql", owned], check=True)
        subprocess.run(["chown", "-R", f"{nobody}:{nobody}", owned], check=True)
        program = """
import asyncio, sys
from pathlib import Path
from tests.support.databases import execute
from tests.support.embedded_user import fast_server

async def main():
    async with fast_server(Path(sys.argv[1])) as server:
        await execute(server.dsn, "insert into kept values (2)")

asyncio.run(main())
"""

        def as_nobody(*command: str | Path) -> None:
            subprocess.run(
                [sys.executable, "-c", *command],
                check=True,
                cwd=Path(__file__).parents[2],
                user=nobody,
                group=nobody,
                extra_groups=[],
            )

        try:
            as_nobody("import pgbackend")
        except (subprocess.SubprocessError, OSError) as error:
            pytest.skip(f"this installation is out of others' reach: {error}")
        async with fast_server(owned) as server:
            await execute(server.dsn, "create table kept (value int)")
            before = postmaster(owned)
            await asyncio.to_thread(as_nobody, program, owned)
            assert await query_value(server.dsn, "select count(*) from kept") == 1
            assert postmaster(owned) == before
        await asyncio.to_thread(as_nobody, program, owned)
        async with fast_server(owned) as server:
            assert await query_value(server.dsn, "select count(*) from kept") == 2


@as_root
async def test_as_root_it_works_with_a_python_that_others_cannot_reach(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keeper gives up its rights while it runs on files in root's home: what it still needs was loaded before."""
    library = Path(os.__file__).parent
    if not library.is_relative_to(sys.base_prefix):
        pytest.skip("an unusual Python")
    hidden = directory / "python"
    unneeded = shutil.ignore_patterns("*-packages", "test", "*.pyc", "idlelib", "ensurepip", "config-*", "lib2to3")
    shutil.copytree(library, hidden / "lib" / library.name, ignore=unneeded)
    (hidden / "bin").mkdir()
    shutil.copy(Path(sys.executable).resolve(), hidden / "bin" / "python3")
    monkeypatch.setattr(sys, "executable", str(hidden / "bin" / "python3"))
    async with fast_server(directory):
        killed = postmaster(directory)
        os.kill(killed, 9)
        await eventually("another one", lambda: postmaster(directory) not in (0, killed))


@not_as_root
async def test_a_directory_of_somebody_else_is_refused() -> None:
    with pytest.raises(EmbeddedServerError, match="Name another directory"):
        await fast_server(Path("/pgbackend")).start()


def test_without_proc_a_directory_out_of_reach_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(home, "PROC", tmp_path / "none")
    with pytest.raises(home.Failure, match="cannot reach"):
        home.name_of(tmp_path / "moved", Path(), 0)
