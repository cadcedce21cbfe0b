"""A PostgreSQL of one's own, used by one process or many, that nobody kills."""

import asyncio
import contextlib
import multiprocessing
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pgbackend.embedded import server as embedded
from pgbackend.embedded.server import EmbeddedServer, default_directory
from pgbackend.errors import EmbeddedServerError, NotRunningError
from tests.support.databases import connected, execute, query_value
from tests.support.embedded_user import (
    EmbeddedUser,
    active_keeper,
    fast_server,
    keepers,
    needs_proc,
    nothing_is_left,
    postmaster,
    processes,
)
from tests.support.polling import eventually


@pytest.mark.slow
async def test_data_survives_a_restart(tmp_path: Path) -> None:
    async with fast_server(tmp_path) as server:
        await execute(server.dsn, "create table kept (value int)")
    async with fast_server(tmp_path) as server:
        assert await query_value(server.dsn, "select count(*) from kept") == 0


@pytest.mark.slow
@needs_proc
async def test_the_server_has_ended_when_stop_returns(directory: Path) -> None:
    async with fast_server(directory):
        assert processes(directory)
        assert keepers(directory)
    assert not processes(directory)
    assert not keepers(directory)


@pytest.mark.slow
async def test_fsync_is_on_and_nothing_listens_on_tcp(directory: Path) -> None:
    async with EmbeddedServer(directory) as server:
        assert await query_value(server.dsn, "show fsync") == "on"
        assert await query_value(server.dsn, "show listen_addresses") == ""
        assert await query_value(server.dsn, "show data_checksums") == "on"


@pytest.mark.slow
async def test_a_server_runs_the_programs_that_it_is_given(tmp_path: Path, pg_programs: Path) -> None:
    async with EmbeddedServer(tmp_path, programs=pg_programs, settings={"fsync": "off"}) as server:
        version = subprocess.run([pg_programs / "postgres", "--version"], capture_output=True, check=True, text=True)
        assert str(await query_value(server.dsn, "show server_version")) in version.stdout


@pytest.mark.slow
async def test_a_database_of_another_major_version_is_left_alone(directory: Path) -> None:
    (directory / "postgresql/data/PG_VERSION").write_text("17\n")
    with pytest.raises(EmbeddedServerError, match="initialized by PostgreSQL version 17"):
        await fast_server(directory).start()


def test_a_dsn_needs_a_started_server(tmp_path: Path) -> None:
    with pytest.raises(NotRunningError, match="start"):
        _ = EmbeddedServer(tmp_path).dsn


async def test_each_start_needs_a_stop(directory: Path) -> None:
    one, other = fast_server(directory), fast_server(directory)
    assert len(set(await asyncio.gather(one.start(), other.start(), one.start()))) == 1
    await one.stop()
    await other.stop()
    await other.stop()  # once too often: it takes nothing from the other
    assert await query_value(one.dsn, "select 1") == 1
    await one.stop()
    await nothing_is_left(directory)


@pytest.mark.slow
@needs_proc
async def test_processes_share_a_server_until_the_last_leaves(directory: Path) -> None:
    async with EmbeddedUser(directory) as first, EmbeddedUser(directory) as second:
        assert second.dsn == first.dsn
        server, keeper = postmaster(directory), active_keeper(directory)
        await first.stop()
        assert await query_value(second.dsn, "select 1") == 1
        # The first user's keeper lives on: it is the server's parent.
        assert (postmaster(directory), active_keeper(directory)) == (server, keeper)
        await second.stop()
        assert not processes(directory)
        assert not keepers(directory)


@pytest.mark.slow
@needs_proc
async def test_a_process_that_ends_without_stop_has_left(directory: Path) -> None:
    program = f"""
import asyncio
from pgbackend.embedded.server import EmbeddedServer
asyncio.run(EmbeddedServer({str(directory)!r}).start())
"""
    ended = await asyncio.create_subprocess_exec(
        sys.executable, "-X", "dev", "-c", program, stdout=-1, stderr=-1, cwd=Path(__file__).parents[2]
    )
    assert await ended.communicate() == (b"", b"")
    assert ended.returncode == 0
    await nothing_is_left(directory)


@pytest.mark.slow
@needs_proc
async def test_interrupting_a_user_leaves_the_server_alone(directory: Path) -> None:
    async with EmbeddedUser(directory) as user, connected(user.dsn) as connection:
        before = postmaster(directory)
        user.interrupt()
        for keeper in keepers(directory):
            os.kill(keeper, signal.SIGTERM)  # as a service manager does that ends everything of a service
        await asyncio.to_thread(time.sleep, 0.3)  # nothing must happen
        assert await connection.fetchval("select 1") == 1
        assert postmaster(directory) == before


@pytest.mark.slow
async def test_a_cancelled_start_leaves_nothing(directory: Path) -> None:
    starting = asyncio.create_task(fast_server(directory).start())
    await eventually("it has begun", lambda: bool(keepers(directory)) or starting.done())
    starting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await starting
        pytest.fail("it was faster")
    await nothing_is_left(directory)
    async with fast_server(directory) as server:
        assert await query_value(server.dsn, "select 1") == 1


@pytest.mark.slow
async def test_a_start_that_fails_says_why_and_uses_nothing(directory: Path) -> None:
    server = EmbeddedServer(directory, settings={"fsync": "off", "shared_buffers": "many"})
    with pytest.raises(EmbeddedServerError, match='invalid value for parameter "shared_buffers"'):
        await server.start()
    (directory / "postgresql/data/global/pg_control").unlink()
    with pytest.raises(EmbeddedServerError, match="pg_control"):
        await fast_server(directory).start()
    await nothing_is_left(directory)


@pytest.mark.slow
async def test_a_start_that_takes_too_long_is_given_up(directory: Path) -> None:
    with pytest.raises(EmbeddedServerError, match="start_timeout"):
        await fast_server(directory, start_timeout=0.01).start()
    await nothing_is_left(directory)


async def test_what_is_not_a_database_is_not_touched(directory: Path) -> None:
    (directory / "postgresql/data/PG_VERSION").unlink()
    with pytest.raises(EmbeddedServerError, match="holds no database"):
        await fast_server(directory).start()


@pytest.mark.slow
async def test_a_child_of_a_fork_is_no_user(directory: Path) -> None:
    server = fast_server(directory)
    await server.start()
    forked = multiprocessing.get_context("fork")
    release = forked.Event()
    child = forked.Process(target=release.wait)
    child.start()
    try:
        await server.stop()
        assert not processes(directory)
    finally:
        release.set()
        await asyncio.to_thread(child.join)


@pytest.mark.slow
@needs_proc
async def test_a_killed_keeper_is_noticed_though_children_were_forked_at_any_moment(directory: Path) -> None:
    """A child of a fork would hold the pipe to the keeper open, if it was made at the wrong moment."""
    children: list[int] = []
    held, release = os.pipe()
    over = threading.Event()

    def fork() -> None:
        while not over.is_set():
            child = os.fork()
            if child == 0:
                os.close(release)
                os.read(held, 1)
                os._exit(0)
            children.append(child)
            time.sleep(0.002)

    forking = threading.Thread(target=fork)
    server = fast_server(directory)
    forking.start()
    try:
        await server.start()
        over.set()
        forking.join()
        [killed] = keepers(directory)
        os.kill(killed, signal.SIGKILL)
        await eventually("another keeper", lambda: active_keeper(directory) not in (0, killed))
        await server.stop()
        assert not processes(directory)
    finally:
        over.set()
        os.close(release)
        os.close(held)
        for child in children:
            await asyncio.to_thread(os.waitpid, child, 0)


@pytest.mark.slow
async def test_by_tcp_nobody_comes_in_without_a_password(directory: Path) -> None:
    address = f"127.{random.randrange(1, 255)}.{random.randrange(1, 255)}.1"
    async with EmbeddedServer(directory, settings={"fsync": "off", "listen_addresses": address}):
        startup = b"\0\3\0\0user\0postgres\0database\0postgres\0\0"
        with socket.create_connection((address, 5432), source_address=("127.0.0.1", 0)) as connection:
            connection.sendall((len(startup) + 4).to_bytes(4, "big") + startup)
            answer = connection.recv(9)
        assert answer[:1] == b"R"
        assert int.from_bytes(answer[5:9], "big") == 10  # a password is asked for


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x" * 100, "a, b größer quote'd\" 50%", "-k"], ids=["long", "special", "option"])
async def test_any_path_will_do(blank: Path, tmp_path: Path, name: str) -> None:
    directory = tmp_path / name
    directory.mkdir()
    subprocess.run(["cp", "-a", blank / "postgresql", directory], check=True)
    async with fast_server(directory) as server:
        assert await query_value(server.dsn, "select 1") == 1
        sockets = Path(server.dsn.partition("host=")[2].partition("&")[0])
        assert list(sockets.glob(".s*"))
    assert not list(sockets.glob(".s*"))
    assert (directory / "postgresql/run").is_dir() or not sockets.exists()


@pytest.mark.slow
async def test_the_log_does_not_grow_without_bound(directory: Path) -> None:
    log = directory / "postgresql" / "postgresql.log"
    async with fast_server(directory) as server:
        with log.open("ab") as file:
            file.write(b"x" * (9 << 20))
        await eventually("it is cut", lambda: log.stat().st_size < 1 << 20)
        assert (directory / "postgresql" / "postgresql.log.1").stat().st_size > 9 << 20
        await execute(server.dsn, "do $$ begin raise warning 'still heard'; end $$")
        await eventually("it goes on", lambda: "still heard" in log.read_text())


@pytest.mark.slow
async def test_nobody_else_reaches_data_or_socket(directory: Path) -> None:
    async with fast_server(directory) as server:
        home = directory / "postgresql"
        sockets = Path(server.dsn.partition("host=")[2].partition("&")[0])
        for path in (home, home / "data", sockets):
            assert stat.S_IMODE(path.stat().st_mode) == 0o700
            assert path.stat().st_uid == home.stat().st_uid
    home.chmod(0o755)
    with pytest.raises(EmbeddedServerError, match="open to others"):
        await fast_server(directory).start()


def test_the_default_directory_is_where_this_users_data_belongs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_directory() == Path("/var/lib/pgbackend/default")
    monkeypatch.setattr(os, "geteuid", lambda: 1)
    monkeypatch.setenv("XDG_DATA_HOME", "/somewhere")
    assert default_directory() == Path("/somewhere/pgbackend") or sys.platform != "linux"


def test_a_user_without_a_home_is_told_to_name_a_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under any number: no HOME, no line in the password file."""

    def unknown(_: object) -> None:
        raise KeyError

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 1)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    for attempt in (default_directory, lambda: EmbeddedServer("~/data"), lambda: EmbeddedServer("~nobody-here/x")):
        with pytest.raises(EmbeddedServerError, match="directory"):
            attempt()


def test_the_keeper_needs_nothing_but_the_standard_library() -> None:
    """Not even on the way to it, whatever the package's modules are called."""
    program = "import sys; sys.path.append(sys.argv[1]); import embedded.keeper; print(*sys.modules)"
    package = Path(embedded.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, package], capture_output=True, text=True, check=True
    )
    others = {*sys.stdlib_module_names, "__main__"}
    ours = {name for name in done.stdout.split() if name.partition(".")[0] not in others}
    assert ours == {"embedded", "embedded.keeper", "embedded.home"}
