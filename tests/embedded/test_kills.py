"""Users, keepers and servers are killed in every order: a user always has a server, and nothing is left without one."""

import asyncio
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import permutations
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from pgbackend.embedded import binaries, home, keeper
from pgbackend.errors import EmbeddedServerError
from pgbackend.facts import Recorder
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

pytestmark = [needs_proc, pytest.mark.slow]


def _orders(*, quick: tuple[str, ...]) -> list[Any]:
    """All orders of one to three kills. One of them is for the quick tests."""
    orders = [order for count in (1, 2, 3) for order in permutations(("user", "keeper", "server"), count)]
    return [pytest.param(order, marks=[] if order == quick else pytest.mark.slow) for order in orders]


async def _write(dsn: str) -> None:
    await execute(dsn, "create table if not exists kept (value int); insert into kept values (1)")


async def _answers(dsn: str) -> None:
    """The server answers. Connect as a pool would that lost its connections."""

    async def answers() -> bool:
        with suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            return bool(await query_value(dsn, "select 1"))
        return False

    await eventually("it answers", answers, 60)


async def _count(dsn: str) -> object:
    await _answers(dsn)
    return await query_value(dsn, "select count(*) from kept")


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):  # it was faster
        os.kill(pid, signal.SIGKILL)


async def _kill_in_order(order: tuple[str, ...], directory: Path, user: EmbeddedUser) -> None:
    """Without a pause: each kill hits what the one before has not let come to rest."""
    victims = {"keeper": active_keeper(directory), "server": postmaster(directory), "user": user.process.pid}
    for victim in order:
        _kill(victims[victim])
    if "user" in order:
        await user.process.wait()
    for victim in {"keeper", "server"} & {*order}:
        await _gone(victims[victim])


async def _gone(pid: int) -> None:
    def is_gone() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    await eventually(f"process {pid} is gone", is_gone)


async def _another(kind: Callable[[Path], int], directory: Path, former: int) -> None:
    await eventually("another one", lambda: kind(directory) not in (0, former), 60)


@pytest.mark.parametrize("order", _orders(quick=("keeper", "server")), ids=" ".join)
async def test_the_only_user_keeps_its_server_or_leaves_nothing(directory: Path, order: tuple[str, ...]) -> None:
    async with EmbeddedUser(directory) as user:
        await _write(user.dsn)
        await _kill_in_order(order, directory, user)
        if "user" not in order:
            assert await _count(user.dsn) == 1
            await user.stop()
            assert not processes(directory)
        await nothing_is_left(directory)
    async with fast_server(directory) as server:
        assert await _count(server.dsn) == 1


@pytest.mark.parametrize("order", _orders(quick=("user", "keeper", "server")), ids=" ".join)
async def test_another_user_keeps_the_server_under_the_same_dsn(directory: Path, order: tuple[str, ...]) -> None:
    async with EmbeddedUser(directory) as user:
        await _write(user.dsn)
        async with fast_server(directory) as server:
            await _kill_in_order(order, directory, user)
            assert await _count(server.dsn) == 1
            assert server.dsn == user.dsn
    await nothing_is_left(directory)


@pytest.mark.slow
async def test_a_killed_user_takes_the_server_from_nobody(directory: Path) -> None:
    async with EmbeddedUser(directory) as killed, fast_server(directory) as server, connected(server.dsn) as connection:
        killed.kill()
        await killed.process.wait()
        await asyncio.to_thread(time.sleep, 0.3)  # nothing must happen: there is nothing to wait for
        assert await connection.fetchval("select 1") == 1


@pytest.mark.slow
async def test_the_next_start_waits_for_a_server_that_is_being_stopped(directory: Path) -> None:
    async with EmbeddedUser(directory) as user:
        await _write(user.dsn)
        user.kill()
        await user.process.wait()
        async with fast_server(directory) as server:
            assert await _count(server.dsn) == 1


@pytest.mark.slow
async def test_a_server_that_is_killed_again_and_again_comes_back(directory: Path) -> None:
    with Recorder() as facts:
        async with fast_server(directory) as server:
            for _ in range(3):
                killed = postmaster(directory)
                _kill(killed)
                await _another(postmaster, directory, killed)
                await _answers(server.dsn)
            await facts.wait("embedded server restarted", 60.0)


@pytest.mark.slow
async def test_a_server_is_started_again_although_a_backend_outlives_it(directory: Path) -> None:
    """A backend in a long computation does not see that its postmaster is gone, and keeps its memory in use."""
    async with fast_server(directory) as server:
        busy = await asyncpg.connect(server.dsn)
        backend = busy.get_server_pid()
        computing = asyncio.create_task(busy.fetchval("select count(*) from generate_series(1, 1000000000000)"))
        await eventually("it computes", lambda: b"SELECT" in Path(f"/proc/{backend}/cmdline").read_bytes())
        killed = postmaster(directory)
        _kill(killed)
        with pytest.raises((asyncpg.PostgresError, OSError)):
            await computing
        busy.terminate()
        await _answers(server.dsn)
        assert postmaster(directory) != killed
        assert backend not in processes(directory)


@pytest.mark.slow
async def test_of_many_keepers_one_takes_over(directory: Path) -> None:
    async with EmbeddedUser(directory), EmbeddedUser(directory), fast_server(directory) as server:
        for _ in range(2):
            killed = active_keeper(directory)
            _kill(killed)
            await _another(active_keeper, directory, killed)
            await _answers(server.dsn)
        await eventually("all users have keepers", lambda: len(keepers(directory)) == 3)


@pytest.mark.slow
async def test_a_keeper_that_ends_a_server_spares_the_keepers_of_other_users(directory: Path) -> None:
    async with EmbeddedUser(directory), fast_server(directory) as server:
        await eventually("both users have keepers", lambda: len(keepers(directory)) == 2)
        before, killed = keepers(directory), postmaster(directory)
        # A backend that outlives the server makes the keeper end processes one by one.
        busy = await asyncpg.connect(server.dsn)
        backend = busy.get_server_pid()
        computing = asyncio.create_task(busy.fetchval("select count(*) from generate_series(1, 1000000000000)"))
        await eventually("it computes", lambda: b"SELECT" in Path(f"/proc/{backend}/cmdline").read_bytes())
        _kill(killed)
        with pytest.raises((asyncpg.PostgresError, OSError)):
            await computing
        busy.terminate()
        await _another(postmaster, directory, killed)
        await _answers(server.dsn)
        assert sorted(keepers(directory)) == sorted(before)


@pytest.mark.slow
def test_a_killed_keeper_is_replaced_without_an_event_loop(directory: Path) -> None:
    server = fast_server(directory)
    dsn = asyncio.run(server.start())
    [killed] = keepers(directory)
    _kill(killed)
    deadline = time.monotonic() + 60
    while active_keeper(directory) in (0, killed):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    asyncio.run(_answers(dsn))
    asyncio.run(server.stop())
    assert not processes(directory)


@pytest.mark.slow
async def test_a_reused_process_id_does_not_block_the_next_start(directory: Path) -> None:
    """PostgreSQL takes any process of its own user with the noted number for a postmaster."""
    home = directory / "postgresql"
    stranger = subprocess.Popen(["sleep", "60"], user=home.stat().st_uid if os.geteuid() == 0 else None)
    try:
        note = f"{stranger.pid}\n{home / 'data'}\n1\n5432\n{home}\n\n  1 1\nready   \n"
        (home / "data" / "postmaster.pid").write_text(note)
        async with fast_server(directory) as server:
            assert await query_value(server.dsn, "select 1") == 1
            assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


@pytest.mark.slow
async def test_a_server_that_somebody_else_runs_there_is_left_alone(directory: Path) -> None:
    home = directory / "postgresql"
    owner = home.stat().st_uid if os.geteuid() == 0 else None
    stranger = subprocess.Popen(
        [binaries.programs() / "postgres", "-D", "/proc/self/cwd", "-k", "/proc/self/cwd", "-c", "listen_addresses="],
        cwd=home / "data",
        user=owner,
        group=owner,
        stderr=subprocess.DEVNULL,
    )
    try:
        await eventually("it runs", lambda: postmaster(directory) == stranger.pid)
        with pytest.raises(EmbeddedServerError, match="did not start uses"):
            await fast_server(directory).start()
        assert stranger.poll() is None
    finally:
        stranger.send_signal(signal.SIGINT)
        stranger.wait()
    async with fast_server(directory) as server:
        assert await query_value(server.dsn, "select 1") == 1


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["keeper", "user", "both"])
async def test_an_initialization_that_was_killed_is_begun_anew(tmp_path: Path, victim: str) -> None:
    at = tmp_path / "postgresql"
    first = EmbeddedUser(tmp_path)
    entering = asyncio.create_task(first.__aenter__())
    await eventually("initdb works", lambda: any(at.glob("data.new-*/*")))
    if victim in ("keeper", "both"):
        _kill(keepers(tmp_path)[0])
    if victim in ("user", "both"):
        first.kill()
        with suppress(AssertionError):  # it said nothing
            await entering
    await (entering if victim == "keeper" else first.process.wait())
    async with fast_server(tmp_path) as server:
        await _write(server.dsn)
        assert [file.name for file in at.glob("data*")] == ["data"]
    await first.__aexit__(None, None, None)
    await nothing_is_left(tmp_path)


@pytest.mark.slow
async def test_users_that_start_at_once_share_a_new_database(tmp_path: Path) -> None:
    users = [EmbeddedUser(tmp_path) for _ in range(3)]
    try:
        async with asyncio.TaskGroup() as group:
            for user in users:
                group.create_task(user.__aenter__())
        await _write(users[0].dsn)
        assert [await _count(user.dsn) for user in users] == [1, 1, 1]
        assert [file.name for file in (tmp_path / "postgresql").glob("data*")] == ["data"]
    finally:
        for user in users:
            await user.__aexit__(None, None, None)
    await nothing_is_left(tmp_path)


@pytest.mark.slow
async def test_a_directory_that_is_deleted_takes_its_server_along(directory: Path) -> None:
    with Recorder() as facts:
        server = fast_server(directory)
        await server.start()
        while directory.exists():  # the server deletes its files, too
            shutil.rmtree(directory, ignore_errors=True)
        await facts.wait("embedded server is down", 60.0)
        await nothing_is_left(directory)
        assert not directory.exists()
        await server.stop()
    async with fast_server(directory) as server:
        assert await query_value(server.dsn, "select 1") == 1


@pytest.mark.slow
async def test_a_server_that_cannot_start_for_a_while_comes_back(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a full disk."""
    monkeypatch.setattr("pgbackend.embedded.server.RETRY_INTERVAL", 0.1)
    control = directory / "postgresql/data/global/pg_control"
    with Recorder() as facts:
        async with fast_server(directory) as server:
            await _write(server.dsn)
            control.rename(f"{control}.moved")
            _kill(postmaster(directory))
            await facts.wait("embedded server is down", 60.0)
            Path(f"{control}.moved").rename(control)
            assert await _count(server.dsn) == 1
    await nothing_is_left(directory)


@pytest.mark.slow
@pytest.mark.parametrize("proc", [True, False], ids=["proc", "lsof"])
def test_processes_are_found_by_a_file_that_they_have_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, proc: bool
) -> None:
    """On macOS by `lsof`: there is no /proc."""
    if not proc:
        if shutil.which("lsof") is None:
            pytest.skip("there is no lsof")
        monkeypatch.setattr(home, "PROC", tmp_path / "none")
    with (tmp_path / "lock").open("wb") as file:
        holder = subprocess.Popen(["sleep", "60"], cwd=tmp_path, pass_fds=(file.fileno(),))
    try:
        assert keeper._processes_at(tmp_path / "lock") == [holder.pid]
        assert keeper._processes_at(tmp_path, of="sleep") == [holder.pid]
        assert keeper._processes_at(tmp_path, of="postgres") == []
    finally:
        holder.kill()
        holder.wait()


@pytest.mark.slow
@pytest.mark.skipif(not home.PROC.exists(), reason="there is no /proc")
def test_processes_are_found_while_others_end(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("wb") as file:
        holder = subprocess.Popen(["sleep", "1000"], pass_fds=(file.fileno(),))
    crowds = [subprocess.Popen(["sh", "-c", "while :; do true & true & true & true & wait; done"]) for _ in range(2)]
    try:
        for _ in range(100):
            assert keeper._processes_at(tmp_path / "lock") == [holder.pid]
    finally:
        for process in (*crowds, holder):
            process.kill()
            process.wait()


@pytest.mark.slow
async def test_users_that_come_go_and_die_at_any_moment_always_get_a_server(directory: Path) -> None:
    async def come_and_go(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(3):
            async with EmbeddedUser(directory) as user:
                await query_value(user.dsn, "insert into kept values (1)")
                await asyncio.sleep(chance.uniform(0, 0.3))
                if chance.random() < 0.3:
                    for keeper in keepers(directory):
                        _kill(keeper)
                    await _answers(user.dsn)
                elif chance.random() < 0.5:
                    user.kill()
                else:
                    await user.stop()

    async with fast_server(directory) as server:
        await execute(server.dsn, "create table kept (value int)")
    async with asyncio.TaskGroup() as group:
        for seed in range(4):
            group.create_task(come_and_go(seed))
    await nothing_is_left(directory)
    async with fast_server(directory) as server:
        assert await _count(server.dsn) == 12
