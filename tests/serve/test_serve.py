"""`pgbackend serve` as a person or a supervisor runs it: a process, its output, its signals, its exit code."""

import asyncio
import shlex
import signal
import socket
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest
from aiohttp import web

from pgbackend.backend import Backend
from pgbackend.errors import PgBackendError
from pgbackend.serve import app
from tests.serve.process import config, post, refused, running
from tests.serve.target import Request, Target, raw_server
from tests.support.proxy import Proxy


async def test_it_says_where_it_is_and_what_it_does_once_it_listens(
    database: str, target: Target, tmp_path: Path
) -> None:
    file = tmp_path / "broker.yaml"
    file.write_text(config(target).replace("http://", "http://me:hunter2@"))
    dsn = urlsplit(database)
    with_password = dsn._replace(netloc=dsn.netloc.replace("@", ":hunter2@")).geturl()

    async with running("--dsn", with_password, "--config", str(file), "--port", "0") as serve:
        url = await serve.listening()

        assert await post(url) == 202
        await target.wait(1)
        assert f"trigger: billing -> {target.url}" in serve.said
        assert "schema pgbackend" in serve.said
        assert dsn.path.lstrip("/") in serve.said
        assert "hunter2" not in serve.said

        serve.send(signal.SIGTERM)
        assert await serve.ended() == 0
        assert await serve.complaint() == ""


async def test_the_line_to_try_it_with_works(database: str) -> None:
    async with running("--dsn", database, "--port", "0") as serve:
        url = await serve.listening()
        line = next(line for line in serve.said.splitlines() if line.startswith("Try: "))
        words = shlex.split(line)[1:]
        assert words[:3] == ["curl", "-i", url]
        headers = dict(words[at + 1].split(": ", 1) for at, word in enumerate(words) if word == "-H")
        data = words[words.index("-d") + 1]
        async with aiohttp.ClientSession() as client, client.post(url, headers=headers, data=data) as answer:
            assert answer.status == 202
        assert "trigger: none, no --config is given" in serve.said


async def test_every_option_may_come_from_the_environment(database: str, target: Target) -> None:
    environment = {
        "PGBACKEND_DSN": database,
        "PGBACKEND_SCHEMA": "elsewhere",
        "PGBACKEND_CONFIG": config(target),
        "PGBACKEND_HOST": "localhost",
        "PGBACKEND_PORT": "0",
    }
    async with running(env=environment) as serve:
        url = await serve.listening()
        assert "schema elsewhere" in serve.said
        assert await post(url) == 202
        await target.wait(1)


async def test_what_stands_on_the_command_line_beats_the_environment(database: str, target: Target) -> None:
    environment = {"PGBACKEND_CONFIG": "broken: [", "PGBACKEND_PORT": "1"}
    async with running("--dsn", database, "--port", "0", "--config", "/dev/stdin", env=environment) as serve:
        assert await serve.ended() == 1
        assert "/dev/stdin: is empty" in await serve.complaint()
    async with running("--dsn", database, "--port", "0", "--config-inline", config(target), env=environment) as serve:
        assert "trigger: billing" in (await serve.listening() and serve.said)


@pytest.mark.slow
async def test_without_a_dsn_it_starts_a_postgresql_of_its_own_and_finds_its_data_again(
    target: Target, tmp_path: Path
) -> None:
    arguments = ("--port", "0", "--data-dir", str(tmp_path / "data"), "--config-inline", config(target))
    for id_ in ("first", "second"):
        async with running(*arguments) as serve:
            url = await serve.listening()
            assert f"embedded PostgreSQL in {tmp_path / 'data'}" in serve.said
            assert await post(url, id_) == 202
            await target.wait(1 if id_ == "first" else 2)
            serve.send(signal.SIGTERM)
            assert await serve.ended() == 0
    assert target.ids() == ["first", "second"]


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    async def test_what_is_in_progress_is_finished(self, number: signal.Signals, database: str, target: Target) -> None:
        released = asyncio.Event()

        async def hold(request: Request) -> web.Response:
            await released.wait()
            return web.Response(status=204)

        target.answer = hold
        async with running("--dsn", database, "--port", "0", "--config-inline", config(target)) as serve:
            url = await serve.listening()
            assert await post(url) == 202
            await target.wait(1)
            serve.send(number)
            await refused(url)
            released.set()
            assert await serve.ended() == 0
            assert await serve.complaint() == ""

        # It was settled: nothing is delivered again.
        async with running("--dsn", database, "--port", "0", "--config-inline", config(target)) as serve:
            assert await post(await serve.listening(), "2") == 202
            await target.wait(2)
        assert target.ids() == ["1", "2"]

    async def test_a_second_interrupt_ends_it_at_once(self, database: str, target: Target) -> None:
        released = asyncio.Event()

        async def hang(request: Request) -> web.Response:
            await released.wait()
            return web.Response(status=204)

        target.answer = hang
        async with running("--dsn", database, "--port", "0", "--config-inline", config(target)) as serve:
            url = await serve.listening()
            assert await post(url) == 202
            await target.wait(1)
            serve.send(signal.SIGINT)
            await refused(url)
            serve.send(signal.SIGINT)
            assert await serve.ended(timeout=5.0) == 130
        released.set()

    async def test_a_signal_while_it_starts_is_obeyed(self) -> None:
        contacted = asyncio.Event()

        async def silent(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
            contacted.set()
            await reader.read()

        async with raw_server(silent) as url, running("--dsn", f"postgresql://{url[7:]}x", "--port", "0") as serve:
            async with asyncio.timeout(20):
                await contacted.wait()
            serve.send(signal.SIGTERM)
            assert await serve.ended() == 0
            assert await serve.complaint() == ""


class TestStart:
    async def test_a_postgresql_that_comes_later_is_waited_for(self, database: str) -> None:
        async with Proxy(database) as proxy:
            proxy.cut()
            async with running("--dsn", proxy.dsn, "--port", "0") as serve:
                assert await serve.complains("waiting for postgresql")
                proxy.restore()
                assert await post(await serve.listening()) == 202

    async def test_one_that_does_not_come_is_said_after_a_while(self, database: str) -> None:
        async with Proxy(database) as proxy:
            proxy.cut()
            async with running("--dsn", proxy.dsn, "--port", "0", "--startup-timeout", "0.5") as serve:
                assert await serve.ended() == 1
                *waiting, last = (await serve.complaint()).splitlines()
                assert all("waiting for postgresql" in line for line in waiting)
                assert last.startswith("Error: PostgreSQL at ")


class TestFailures:
    @staticmethod
    async def one_line(*args: str, env: Mapping[str, str] | None = None, code: int = 1) -> str:
        async with running(*args, env=env) as serve:
            assert await serve.ended() == code
            said = await serve.complaint()
        assert "Traceback" not in said
        if code == 1:
            assert said.count("\n") == 1
            assert said.startswith("Error: ")
        return said

    async def test_a_port_in_use_is_said_before_anything_is_started(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            said = await self.one_line("--port", str(port), "--data-dir", str(tmp_path / "data"))
        assert f"Cannot listen on port {port} of 127.0.0.1: it is in use." in said
        assert not (tmp_path / "data").exists()

    async def test_a_mistake_in_the_configuration_is_said_before_anything_is_started(self, tmp_path: Path) -> None:
        file = tmp_path / "broker.yaml"
        file.write_text("triggers:\n  a:\n    target: {url: /relative}\n")
        said = await self.one_line("--config", str(file), "--data-dir", str(tmp_path / "data"))
        assert f"{file}:3: triggers.a.target.url: expected an absolute http or https URL" in said
        assert not (tmp_path / "data").exists()

    async def test_a_database_that_is_not_there_is_said(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
            dsn = f"postgresql://me:hunter2@127.0.0.1:{port}/x"
            said = await self.one_line("--port", "0", "--dsn", dsn, "--startup-timeout", "0")
        assert "cannot be reached" in said
        assert "hunter2" not in said

    async def test_a_trigger_that_does_not_fit_the_log_is_said(self, database: str, target: Target) -> None:
        async with running("--dsn", database, "--port", "0", "--config-inline", config(target)) as serve:
            await serve.listening()
        said = await self.one_line(
            "--dsn", database, "--port", "0", "--config-inline", config(target, options=", order: key")
        )
        assert "triggers.billing: " in said

    @pytest.mark.parametrize(
        "args",
        [
            ("--port", "x"),
            ("--port", "65536"),
            ("--config", "a", "--config-inline", "b"),
            ("--dsn", "postgresql:///x", "--data-dir", "/tmp/x"),
            ("--no-such-option",),
        ],
    )
    async def test_wrong_usage_is_exit_code_2(self, args: tuple[str, ...]) -> None:
        await self.one_line(*args, code=2)

    async def test_when_the_backend_dies_so_does_the_broker_and_says_why(
        self, database: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def die(_: Backend) -> None:
            raise RuntimeError("out of luck")

        monkeypatch.setattr(Backend, "start", die)
        with pytest.raises(PgBackendError, match="The backend failed: RuntimeError: out of luck"):
            await app.serve(app.Settings(dsn=database, port=0), say=lambda _: None)

    async def test_a_backend_that_just_ends_is_a_failure_too(
        self, database: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def end(_: Backend) -> None:
            pass

        monkeypatch.setattr(Backend, "start", end)
        with pytest.raises(PgBackendError, match="stopped without being asked"):
            await app.serve(app.Settings(dsn=database, port=0), say=lambda _: None)
