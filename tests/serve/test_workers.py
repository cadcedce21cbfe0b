"""`pgbackend serve --workers N`: one port, several processes, and what happens when some of them go."""

import json
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.serve.process import Process, config, post, running
from tests.serve.target import Target
from tests.support.polling import eventually

_LOGGED = ("--log-format", "json", "--log-level", "info")


@asynccontextmanager
async def workers(*args: str, count: int = 2) -> AsyncIterator[Process]:
    """A broker of that many workers on any port, whose log can be asked for `facts`."""
    async with running("--port", "0", "--workers", str(count), *_LOGGED, *args) as serve:
        yield serve


async def facts(serve: Process, name: str, count: int = 1) -> list[dict[str, object]]:
    """The first `count` facts of that name, once they are logged."""
    return [json.loads(line) for line in await serve.complains(f'"event": "{name}"', count=count)]


async def pids(serve: Process, count: int = 2) -> list[int]:
    """Of the first `count` workers that were started."""
    found = [fact["pid"] for fact in await facts(serve, "worker process started", count)]
    return [pid for pid in found if isinstance(pid, int)]


async def gone(*processes: int) -> None:
    async def look() -> bool:
        return not any(Path(f"/proc/{pid}").exists() for pid in processes)

    await eventually(f"processes {processes} are gone", look, 60.0)


class TestStart:
    async def test_it_is_announced_once_when_all_listen(self, database: str, target: Target) -> None:
        async with workers("--dsn", database, "--config-inline", config(target), count=3) as serve:
            url = await serve.listening()
            assert len(await pids(serve, 3)) == 3
            assert await post(url) == 202
            await target.wait(1)
            serve.send(signal.SIGTERM)
            assert await serve.ended() == 0
            assert serve.process.stdout
            assert await serve.process.stdout.read() == b""
            assert serve.said.count("Broker takes") == 1

    async def test_what_keeps_all_from_starting_is_one_line(self) -> None:
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

    async def test_a_mistake_in_the_configuration_starts_nothing(self, tmp_path: Path) -> None:
        arguments = ("--config-inline", "triggers: 1", "--data-dir", str(tmp_path / "data"), "--workers", "2")
        async with running(*arguments) as serve:
            assert await serve.ended() == 1
            assert (await serve.complaint()).startswith("Error: inline configuration:1: triggers")
        assert not (tmp_path / "data").exists()

    async def test_a_configuration_that_only_one_process_can_read_is_refused(self) -> None:
        async with running("--config", "/dev/stdin", "--workers", "2") as serve:
            assert await serve.ended() == 1
            assert "can be read only once" in await serve.complaint()

    async def test_an_empty_database_is_migrated_once(self, empty_database: str) -> None:
        async with workers("--dsn", empty_database, count=4) as serve:
            assert await post(await serve.listening()) == 202
            serve.send(signal.SIGTERM)
            assert await serve.ended() == 0
            assert '"level": "warning"' not in await serve.complaint()

    @pytest.mark.slow
    async def test_they_share_an_embedded_postgresql(self, target: Target, tmp_path: Path) -> None:
        arguments = ("--data-dir", str(tmp_path / "data"), "--config-inline", config(target))
        async with workers(*arguments) as serve:
            url = await serve.listening()
            assert serve.said.count("starting an embedded PostgreSQL") == 1
            assert await post(url, "1") == 202
            serve.send(signal.SIGHUP)
            await facts(serve, "workers restarted")
            assert await post(url, "2") == 202
            await target.wait(2)
            serve.send(signal.SIGTERM)
            assert await serve.ended() == 0
        assert not (tmp_path / "data/postgresql/data/postmaster.pid").exists()
