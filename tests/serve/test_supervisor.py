"""`pgbackend serve --workers N`: several broker processes on one port, started, restarted, stopped and killed."""

import asyncio
import fcntl
import json
import os
import re
import resource
import shutil
import signal
import socket
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

import aiohttp
import asyncpg
import pytest
from aiohttp import web

from tests.serve.support.configs import config
from tests.serve.support.process import Process, post, refused, running
from tests.serve.support.target import Request, Target
from tests.support.polling import eventually

_LOGGED = ("--log-format", "json", "--log-level", "info")


@asynccontextmanager
async def supervised(*args: str, count: int = 2) -> AsyncIterator[Process]:
    """A broker of `count` processes on any free port, which logs its facts."""
    async with running("--port", "0", "--workers", str(count), *_LOGGED, *args) as serve:
        yield serve


async def facts(serve: Process, name: str, count: int = 1) -> list[dict[str, object]]:
    """The first `count` facts of this name, once they are logged."""
    return [json.loads(line) for line in await serve.complains(f'"event": "{name}"', count=count)]


async def pids(serve: Process, count: int = 2) -> list[int]:
    """The pids of the first `count` broker processes that started."""
    found = [fact["pid"] for fact in await facts(serve, "broker process started", count)]
    return [pid for pid in found if isinstance(pid, int)]


async def gone(*processes: int) -> None:
    async def look() -> bool:
        return not any(Path(f"/proc/{pid}").exists() for pid in processes)

    await eventually(f"processes {processes} are gone", look, 120.0)


class Senders:
    """Clients that send each event once, some over a kept connection and some over a new one each time."""

    def __init__(self, url: str, *, keeping: int = 8, opening: int = 4) -> None:
        parts = urlsplit(url)
        assert parts.hostname
        assert parts.port
        self._address = (parts.hostname, parts.port)
        self._counts = (keeping, opening)
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self._sent = 0
        self.accepted: list[str] = []
        self.problems: list[str] = []

    async def __aenter__(self) -> Self:
        keeping, opening = self._counts
        self._tasks = [asyncio.create_task(self._keep_sending(close=False)) for _ in range(keeping)]
        self._tasks += [asyncio.create_task(self._keep_sending(close=True)) for _ in range(opening)]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        self._stopping = True
        await asyncio.gather(*self._tasks)

    async def sent(self, more: int) -> None:
        """Return once `more` further events were accepted."""
        goal = len(self.accepted) + more

        async def look() -> bool:
            return len(self.accepted) >= goal or bool(self.problems)

        await eventually(f"{more} more events", look, 120.0)

    async def _keep_sending(self, *, close: bool) -> None:
        while not self._stopping:
            try:
                reader, writer = await asyncio.open_connection(*self._address)
            except OSError as error:
                self.problems.append(f"connecting: {error!r}")
                await asyncio.sleep(0.05)
                continue
            try:
                while await self._send(reader, writer, close=close) and not self._stopping:
                    pass
            finally:
                writer.close()
                with suppress(OSError):
                    await writer.wait_closed()

    async def _send(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, close: bool) -> bool:
        """Whether the connection can be used again."""
        self._sent += 1
        id_ = str(self._sent)
        writer.write(
            f"POST / HTTP/1.1\r\nhost: localhost\r\n"
            f"ce-specversion: 1.0\r\nce-id: {id_}\r\nce-source: /load\r\nce-type: t\r\n"
            f"content-length: 1\r\nconnection: {'close' if close else 'keep-alive'}\r\n\r\nx".encode()
        )
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = next(int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-length:"))
            body = await reader.readexactly(length)
        except (OSError, asyncio.IncompleteReadError) as error:
            self.problems.append(f"event {id_}: {error!r}")
            return False
        if b" 202 " in head[:20]:
            self.accepted.append(id_)
        else:
            self.problems.append(f"event {id_}: {head!r} {body!r}")
        return b"connection: close" not in head


@pytest.fixture
def arrived(target: Target) -> Counter[str]:
    """How often each event arrived at `target`, by id."""
    counter: Counter[str] = Counter()

    def count(request: Request) -> web.Response:
        counter[request.header("ce-id") or ""] += 1
        return web.Response(status=204)

    target.answer = count
    return counter


async def all_arrived(arrived: Counter[str], senders: Senders) -> None:
    async def look() -> bool:
        return set(senders.accepted) <= arrived.keys()

    await eventually("every accepted event is delivered", look, 120.0)


class TestStart:
    @pytest.mark.direct
    async def test_the_broker_is_announced_once_and_an_empty_database_migrated_once(
        self, empty_database: str, target: Target
    ) -> None:
        async with supervised("--dsn", empty_database, "--config-inline", config(target), count=3) as serve:
            url = await serve.listening()
            assert len(await pids(serve, 3)) == 3
            assert await post(url) == 202
            await target.wait(1)
            serve.send(signal.SIGTERM)
            assert await serve.ended() == 0
            assert serve.process.stdout
            assert await serve.process.stdout.read() == b""
            assert serve.said.count("Broker takes") == 1
            assert '"level": "warning"' not in await serve.complaint()

    async def test_a_failure_of_all_processes_is_reported_in_one_line(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            dsn = f"postgresql://me:hunter2@127.0.0.1:{free.getsockname()[1]}/x"
            args = ("--port", "0", "--workers", "3", "--dsn", dsn, "--startup-timeout", "0")
            async with running(*args) as serve:
                assert await serve.ended() == 1
                said = await serve.complaint()
        assert said.count("\n") == 1
        assert said.startswith("Error: PostgreSQL at 127.0.0.1:")
        assert "hunter2" not in said

    async def test_an_invalid_configuration_starts_no_process(self, tmp_path: Path) -> None:
        arguments = ("--config-inline", "triggers: 1", "--data-dir", str(tmp_path / "data"), "--workers", "2")
        async with running(*arguments) as serve:
            assert await serve.ended() == 1
            assert (await serve.complaint()).startswith("Error: inline configuration:1: triggers")
        assert not (tmp_path / "data").exists()

    async def test_a_configuration_that_can_be_read_only_once_is_refused(self) -> None:
        async with running("--config", "/dev/stdin", "--workers", "2") as serve:
            assert await serve.ended() == 1
            assert "can be read only once" in await serve.complaint()

    @pytest.mark.slow
    async def test_all_processes_share_one_embedded_postgresql(self, target: Target, tmp_path: Path) -> None:
        arguments = ("--data-dir", str(tmp_path / "data"), "--config-inline", config(target))
        async with supervised(*arguments) as serve:
            url = await serve.listening()
            assert serve.said.count("starting an embedded PostgreSQL") == 1
            assert await post(url, "1") == 202
            serve.send(signal.SIGHUP)
            await facts(serve, "broker processes restarted")
            assert await post(url, "2") == 202
            await target.wait(2)
            serve.send(signal.SIGTERM)
            assert await serve.ended() == 0
        assert not (tmp_path / "data/postgresql/data/postmaster.pid").exists()


@pytest.mark.slow
class TestRestart:
    @pytest.mark.direct
    @pytest.mark.slow
    async def test_a_restart_refuses_no_client_and_loses_or_repeats_no_event(
        self, database: str, target: Target, arrived: Counter[str]
    ) -> None:
        async with supervised("--dsn", database, "--config-inline", config(target)) as serve:
            url = await serve.listening()
            before = await pids(serve)
            async with Senders(url) as senders:
                await senders.sent(100)
                for round_ in (1, 2):
                    serve.send(signal.SIGHUP)
                    await facts(serve, "broker processes restarted", round_)
                await senders.sent(100)
            await gone(*before)
            assert senders.problems == []
            await all_arrived(arrived, senders)
            assert set(arrived.values()) == {1}
            serve.send(signal.SIGTERM)
            assert await serve.ended() == 0
            assert '"level": "warning"' not in await serve.complaint()

    async def test_a_restart_applies_a_changed_configuration_and_an_invalid_one_keeps_the_old_processes(
        self, database: str, target: Target, other_target: Target, tmp_path: Path
    ) -> None:
        file = tmp_path / "broker.yaml"
        file.write_text(config(target))
        async with supervised("--dsn", database, "--config", str(file)) as serve:
            url = await serve.listening()
            file.write_text("triggers: 1")
            serve.send(signal.SIGHUP)
            (fact,) = await facts(serve, "restart abandoned")
            assert f"{file}:1: triggers" in str(fact["error"])
            assert await post(url) == 202
            await target.wait(1)

            file.write_text(config(other_target))
            serve.send(signal.SIGHUP)
            await facts(serve, "broker processes restarted")
            assert await post(url) == 202
            await other_target.wait(1)
            assert len(target.requests) == 1
            serve.send(signal.SIGTERM)
            assert await serve.ended() == 0


def left_behind(serve: Process) -> list[Path]:
    """The directories in which the broker processes of `serve` count."""
    return list(Path(tempfile.gettempdir()).glob(f"pgbackend-metrics-{serve.process.pid}-*"))


@pytest.mark.slow
class TestMetrics:
    @pytest.mark.slow
    async def test_any_process_reports_the_counts_of_all_including_ended_ones(self, database: str) -> None:
        async with supervised("--dsn", database) as serve:
            url = await serve.listening()
            for id_ in range(20):
                assert await post(url, str(id_)) == 202
            await pids(serve)
            serve.send(signal.SIGHUP)
            await facts(serve, "broker processes restarted")
            for id_ in range(5):
                assert await post(url, f"later {id_}") == 202

            assert left_behind(serve)

            async def look() -> bool:
                async with aiohttp.ClientSession() as client, client.get(f"{url}metrics") as answer:
                    found = re.search(
                        r"^messaging_client_sent_messages_total{.*} (.*)$", await answer.text(), re.MULTILINE
                    )
                    return found is not None and float(found[1]) == 25.0

            await eventually("all are counted", look)
            serve.send(signal.SIGTERM)
            assert await serve.ended() == 0
            assert not left_behind(serve)

    @pytest.mark.slow
    async def test_a_process_frozen_while_reading_metrics_does_not_block_the_supervisor(self, database: str) -> None:
        async with supervised("--dsn", database) as serve:
            await serve.listening()
            killed, _ = await pids(serve)
            (directory,) = left_behind(serve)
            with (directory / "lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH)
                os.kill(killed, signal.SIGKILL)
                await pids(serve, 3)
                (fact,) = await facts(serve, "metrics of a broker process not merged yet")
                assert fact["pid"] == killed
            assert list(directory.glob("*.db"))

            async def look() -> bool:
                return not list(directory.glob(f"*_{killed}.db"))

            await eventually("its metrics are merged", look)
            with (directory / "lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH)
                serve.send(signal.SIGTERM)
                assert await serve.ended() == 0


@pytest.mark.slow
class TestStop:
    @pytest.mark.slow
    async def test_stopping_delivers_each_accepted_event_once_and_exits_with_0(
        self, database: str, target: Target, arrived: Counter[str]
    ) -> None:
        arguments = ("--dsn", database, "--config-inline", config(target))
        async with supervised(*arguments) as serve:
            async with Senders(await serve.listening()) as senders:
                await senders.sent(100)
                serve.send(signal.SIGTERM)
                assert await serve.ended() == 0
            # A client that was just connecting may be cut off, but no request that arrived is refused.
            assert not any("http/1.1" in problem for problem in senders.problems), senders.problems
        async with supervised(*arguments) as serve:
            await serve.listening()
            await all_arrived(arrived, senders)
            assert set(arrived.values()) == {1}

    async def test_an_interrupt_of_the_whole_terminal_drains(self, database: str, target: Target) -> None:
        released = asyncio.Event()

        async def hold(request: Request) -> web.Response:
            await released.wait()
            return web.Response(status=204)

        target.answer = hold
        async with supervised("--dsn", database, "--config-inline", config(target)) as serve:
            url = await serve.listening()
            assert await post(url) == 202
            await target.wait(1)
            for pid in [serve.process.pid, *await pids(serve)]:
                os.kill(pid, signal.SIGINT)
            await refused(url)
            released.set()
            assert await serve.ended() == 0
            assert "Traceback" not in await serve.complaint()

    @pytest.mark.slow
    async def test_a_second_interrupt_ends_all_processes_at_once(self, database: str, target: Target) -> None:
        released = asyncio.Event()

        async def hang(request: Request) -> web.Response:
            await released.wait()
            return web.Response(status=204)

        target.answer = hang
        async with supervised("--dsn", database, "--config-inline", config(target)) as serve:
            url = await serve.listening()
            assert await post(url) == 202
            await target.wait(1)
            serve.send(signal.SIGINT)
            await refused(url)
            serve.send(signal.SIGINT)
            assert await serve.ended(timeout=20.0) == 130  # it drains for 30 s
            await gone(*await pids(serve))
            assert (await serve.complaint()).count("Stopped at once") == 1
        released.set()

    @pytest.mark.slow
    async def test_the_processes_drain_when_the_supervisor_is_killed(self, database: str, target: Target) -> None:
        released = asyncio.Event()

        async def hold(request: Request) -> web.Response:
            await released.wait()
            return web.Response(status=204)

        target.answer = hold
        async with supervised("--dsn", database, "--config-inline", config(target)) as serve:
            url = await serve.listening()
            started = await pids(serve)
            assert await post(url) == 202
            await target.wait(1)
            serve.send(signal.SIGKILL)
            await facts(serve, "supervisor died", 2)
            await refused(url)
            released.set()
            await gone(*started)
            assert not left_behind(serve)
        connection = await asyncpg.connect(database)
        try:
            assert await connection.fetchval("select position from pgbackend.offsets") == 1, "the event is not settled"
        finally:
            await connection.close()

    @pytest.mark.slow
    async def test_the_next_broker_removes_the_metrics_directory_of_a_killed_one(self, database: str) -> None:
        async with supervised("--dsn", database) as serve:
            await serve.listening()
            started = await pids(serve)
            serve.send(signal.SIGSTOP)  # it must not replace them
            for pid in started:
                os.kill(pid, signal.SIGKILL)
            serve.send(signal.SIGKILL)
            await serve.ended()
            assert left_behind(serve)
            async with supervised("--dsn", database) as successor:
                await successor.listening()
                assert not left_behind(serve)
                assert left_behind(successor)


@pytest.mark.slow
class TestLoss:
    @pytest.mark.direct
    @pytest.mark.slow
    async def test_a_killed_process_is_replaced_and_another_delivers_meanwhile(
        self, database: str, target: Target, arrived: Counter[str]
    ) -> None:
        async with supervised("--dsn", database, "--config-inline", config(target)) as serve:
            url = await serve.listening()
            killed = await owner(database, "billing")
            assert killed in await pids(serve)
            async with Senders(url) as senders:
                await senders.sent(100)
                os.kill(killed, signal.SIGKILL)
                (fact,) = await facts(serve, "broker process died")
                assert (fact["pid"], fact["exitcode"], fact["level"]) == (killed, -signal.SIGKILL, "warning")
                accepted = set(senders.accepted)
                # Sooner than the lease of the killed process ends.
                await eventually("events accepted before the kill arrive", lambda: have(arrived, accepted), 12.0)
                await pids(serve, 3)
                await senders.sent(100)
            await all_arrived(arrived, senders)
            # Only requests in progress at the killed process fail.
            assert len(senders.problems) <= 12, senders.problems
            assert await owner(database, "billing") != killed
            serve.send(signal.SIGTERM)
            assert await serve.ended() == 0

    @pytest.mark.slow
    async def test_a_process_is_replaced_even_if_its_metrics_directory_was_deleted(self, database: str) -> None:
        async with supervised("--dsn", database) as serve:
            await serve.listening()
            killed, _ = await pids(serve)
            for directory in left_behind(serve):
                shutil.rmtree(directory)
            os.kill(killed, signal.SIGKILL)
            await pids(serve, 3)
            assert left_behind(serve)
            serve.send(signal.SIGTERM)
            assert await serve.ended() == 0
            assert not left_behind(serve)

    @pytest.mark.slow
    async def test_the_other_processes_go_on_while_a_new_one_cannot_start(self, database: str) -> None:
        """Running out of files stands for running out of memory or processes."""
        async with supervised("--dsn", database) as serve:
            url = await serve.listening()
            killed, other = await pids(serve)
            supervisor = serve.process.pid
            open_now = len(list(Path(f"/proc/{supervisor}/fd").iterdir()))
            before = resource.prlimit(supervisor, resource.RLIMIT_NOFILE)
            resource.prlimit(supervisor, resource.RLIMIT_NOFILE, (open_now, before[1]))
            os.kill(killed, signal.SIGKILL)
            (fact,) = await facts(serve, "broker process cannot start")
            assert fact["error"] == "Cannot start a broker process: Too many open files."
            serve.send(signal.SIGHUP)
            assert await post(url) == 202
            assert Path(f"/proc/{other}").exists()
            resource.prlimit(supervisor, resource.RLIMIT_NOFILE, before)
            await pids(serve, 3)
            # Repeated, because the first restart may have been abandoned.
            serve.send(signal.SIGHUP)
            await facts(serve, "broker processes restarted")
            serve.send(signal.SIGTERM)
            assert await serve.ended() == 0
            assert "Traceback" not in await serve.complaint()

    @pytest.mark.slow
    async def test_a_frozen_process_delays_no_new_client(
        self, database: str, target: Target, arrived: Counter[str]
    ) -> None:
        async with supervised("--dsn", database, "--config-inline", config(target)) as serve:
            url = await serve.listening()
            delivering = await owner(database, "billing")
            frozen = next(pid for pid in await pids(serve) if pid != delivering)
            os.kill(frozen, signal.SIGSTOP)
            try:
                async with Senders(url, keeping=0, opening=4) as senders:
                    await senders.sent(300)
                await all_arrived(arrived, senders)
                assert senders.problems == []
            finally:
                os.kill(frozen, signal.SIGCONT)
            serve.send(signal.SIGTERM)
            assert await serve.ended() == 0


async def have(arrived: Counter[str], wanted: set[str]) -> bool:
    return wanted <= arrived.keys()


async def owner(database: str, subscription: str) -> int:
    """The pid of the process that owns the only shard of the subscription."""

    async def look() -> int:
        connection = await asyncpg.connect(database)
        try:
            found = await connection.fetchval(
                "select w.name from pgbackend.offsets o join pgbackend.workers w on w.id = o.owner"
                " where o.subscription = $1",
                subscription,
            )
        finally:
            await connection.close()
        return int(found.rpartition(":")[2]) if found else 0

    return await eventually(f"{subscription} has an owner", look)
