"""`pgbackend serve` as a person or a supervisor runs it: a process, its output, its signals, its exit code."""

import asyncio
import fcntl
import json
import os
import shlex
import signal
import socket
import termios
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import jsonschema
import pytest
import trustme
from aiohttp import web
from click.testing import CliRunner

from pgbackend.backend import Backend
from pgbackend.cli import main
from pgbackend.cli.serve import serve as serve_command
from pgbackend.errors import PgBackendError
from pgbackend.serve import app
from pgbackend.serve.options import Options
from pgbackend.torture.proxy import Proxy
from tests.serve.support.process import INFORMED, config, post, refused, running
from tests.serve.support.target import Request, Target, raw_server


async def one_line(*args: str, env: Mapping[str, str] | None = None, code: int = 1) -> str:
    async with running(*args, env=env) as serve:
        assert await serve.ended() == code
        said = await serve.complaint()
    assert "Traceback" not in said
    if code == 1:
        assert said.count("\n") == 1
        assert said.startswith("Error: ")
    return said


@pytest.mark.direct
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


@pytest.mark.parametrize("count", [1, 2])
async def test_systemd_is_told_when_it_takes_events_in(count: int, database: str, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.setblocking(False)
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        async with running("--dsn", database, "--port", "0", "--workers", str(count), env=environment) as serve:
            async with asyncio.timeout(60):
                told = await asyncio.get_running_loop().sock_recv(systemd, 100)
            assert told == b"READY=1"
            assert await post(await serve.listening()) == 202
            serve.send(signal.SIGTERM)
            assert await serve.ended() == 0
        with pytest.raises(BlockingIOError):
            systemd.recv(100)


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


@pytest.mark.owner
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


@pytest.mark.parametrize("link", ["tcp://10.0.171.239:8080", "udp://[fd00::1]:53", "sctp://10.0.0.1:9"])
async def test_a_port_that_kubernetes_made_of_a_service_is_ignored_with_a_warning(link: str) -> None:
    environment = {
        "PGBACKEND_PORT": link,
        "PGBACKEND_ADMIN_PORT": link,  # of a Service `pgbackend-admin`
        "PGBACKEND_SERVICE_HOST": "10.0.171.239",
        "PGBACKEND_SERVICE_PORT": "8080",
        "PGBACKEND_PORT_8080_TCP": link,
        "PGBACKEND_PORT_8080_TCP_PROTO": "tcp",
        "PGBACKEND_DSN": "postgresql://nobody@127.0.0.1:1/nothing",
        "PGBACKEND_STARTUP_TIMEOUT": "0",
        "PGBACKEND_LOG_FORMAT": "json",
    }
    async with running(env=environment) as serve:
        assert await serve.ended() == 1  # of the database: the port is the default one
        warnings = [json.loads(line) for line in (await serve.complaint()).splitlines()[:2]]
    assert {warning["variable"] for warning in warnings} == {"PGBACKEND_PORT", "PGBACKEND_ADMIN_PORT"}
    assert all((warning["value"], warning["level"]) == (link, "warning") for warning in warnings)


async def test_a_port_that_is_none_is_still_refused() -> None:
    async with running(env={"PGBACKEND_PORT": "http"}) as serve:
        assert await serve.ended() == 2
        assert "PGBACKEND_PORT" in await serve.complaint()


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
    @pytest.mark.direct
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
            assert await serve.ended(timeout=20.0) == 130  # it drains for 30 s
        released.set()

    async def test_a_signal_while_it_starts_is_obeyed(self) -> None:
        contacted = asyncio.Event()

        async def silent(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
            contacted.set()
            await reader.read()

        async with raw_server(silent) as url, running("--dsn", f"postgresql://{url[7:]}x", "--port", "0") as serve:
            async with asyncio.timeout(60):
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


class TestReload:
    async def test_the_configuration_follows_its_file(self, database: str, target: Target, tmp_path: Path) -> None:
        file = tmp_path / "broker.yaml"
        file.write_text("ingest: {token: old}")
        async with running("--dsn", database, "--port", "0", "--config", str(file), *INFORMED) as serve:
            url = await serve.listening()
            assert await post(url, token="old") == 202
            file.write_text("ingest: {token: new}\n" + config(target))
            await serve.complains("configuration reloaded")
            assert await post(url, token="old") == 401
            assert await post(url, "2", token="new") == 202
            await target.wait(1)
            assert target.ids() == ["2"]

    async def test_a_mistake_changes_nothing_and_is_said(self, database: str, target: Target, tmp_path: Path) -> None:
        file = tmp_path / "broker.yaml"
        file.write_text(config(target))
        async with running("--dsn", database, "--port", "0", "--config", str(file)) as serve:
            url = await serve.listening()
            file.write_text("triggers: 1")
            (said,) = await serve.complains("configuration refused")
            assert f"{file}:1: triggers" in said
            assert await post(url) == 202
            await target.wait(1)

    async def test_sighup_reads_everything_again(self, database: str, tmp_path: Path) -> None:
        secret = tmp_path / "token"
        secret.write_text("old")
        text = f"ingest: {{token: {{file: '{secret}'}}}}"
        async with running("--dsn", database, "--port", "0", "--config-inline", text, *INFORMED) as serve:
            url = await serve.listening()
            secret.write_text("new")
            serve.send(signal.SIGHUP)
            await serve.complains("configuration reloaded")
            assert await post(url, token="old") == 401
            assert await post(url, token="new") == 202

            secret.unlink()
            serve.send(signal.SIGHUP)
            await serve.complains("configuration refused")
            assert await post(url, token="new") == 202

    async def test_sighup_does_not_wait_for_what_a_pipe_has_said_already(self, database: str, tmp_path: Path) -> None:
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        async with running("--dsn", database, "--port", "0", "--config", str(pipe), *INFORMED) as serve:
            await asyncio.to_thread(pipe.write_text, "ingest: {token: secret}")
            url = await serve.listening()
            serve.send(signal.SIGHUP)
            assert await post(url, token="secret") == 202
            serve.send(signal.SIGHUP)
            assert await post(url, token="none") == 401
            serve.send(signal.SIGTERM)
            assert await serve.ended() == 0
            assert "refused" not in await serve.complaint()


class TestTerminal:
    @pytest.mark.direct
    async def test_a_terminal_that_is_closed_takes_its_broker_along(self, database: str) -> None:
        terminal, end = os.openpty()
        try:
            async with running("--dsn", database, "--port", "0", preexec_fn=lambda: _take(end)) as serve:
                await serve.listening()
                os.close(end)
                os.close(terminal)
                assert await serve.ended() == 0
                assert await serve.complaint() == ""
        finally:
            for file in (terminal, end):
                with suppress(OSError):
                    os.close(file)


def _take(terminal: int) -> None:
    """This process, and what it starts, belongs to that terminal."""
    os.setsid()
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)


class TestTls:
    @pytest.fixture
    def files(self, tmp_path: Path) -> "Files":
        return Files(tmp_path)

    @pytest.mark.parametrize("count", [1, 2])
    async def test_certificates_are_served_and_followed(self, count: int, database: str, files: "Files") -> None:
        old = files.renew()
        arguments = ("--tls-cert", str(files.cert), "--tls-key", str(files.key), "--workers", str(count))
        async with running("--dsn", database, "--port", "0", *arguments, *INFORMED) as serve:
            url = await serve.listening()
            assert url.startswith("https://127.0.0.1:")
            assert "Try: curl -i https://" in serve.said
            assert await post(url, ca=old) == 202
            new = files.renew()
            await serve.complains("certificates reloaded", count=count)
            assert await post(url, ca=new) == 202
            with pytest.raises(aiohttp.ClientConnectorCertificateError):
                await post(url, ca=old)

            files.cert.write_text("nonsense")
            await serve.complains("certificates not reloaded", count=count)
            assert await post(url, ca=new) == 202

    async def test_only_clients_that_are_certified_get_in(self, database: str, files: "Files") -> None:
        ca = files.renew()
        arguments = (
            "--tls-cert",
            str(files.cert),
            "--tls-key",
            str(files.key),
            "--tls-client-ca",
            str(files.client_ca),
        )
        async with running("--dsn", database, "--port", "0", *arguments) as serve:
            url = await serve.listening()
            with pytest.raises((aiohttp.ClientConnectionError, ConnectionResetError)):
                await post(url, ca=ca)
            assert await post(url, ca=ca, cert=files.client) == 202

    async def test_files_that_cannot_be_used_are_said_before_anything_is_started(self, tmp_path: Path) -> None:
        said = await one_line("--tls-cert", str(tmp_path / "none.pem"), "--data-dir", str(tmp_path / "data"))
        assert f"TLS: the certificate {tmp_path / 'none.pem'} cannot be read: No such file or directory." in said
        assert not (tmp_path / "data").exists()


class Files:
    """A server's certificate and key, and a client's, by an authority of their own."""

    def __init__(self, directory: Path) -> None:
        self.cert = directory / "cert.pem"
        self.key = directory / "key.pem"
        self.client_ca = directory / "client-ca.pem"
        self.client = directory / "client.pem"
        self._renewed = 0

    def renew(self) -> Path:
        """The file of the new authority."""
        authority = trustme.CA()
        server = authority.issue_cert("127.0.0.1")
        # As tools do that renew: each file at once, but one after the other.
        for file, blob in ((self.key, server.private_key_pem), (self.cert, server.cert_chain_pems[0])):
            blob.write_to_path(str(file.with_suffix(".new")))
            file.with_suffix(".new").replace(file)
        authority.cert_pem.write_to_path(str(self.client_ca))
        authority.issue_cert("client@example.com").private_key_and_cert_chain_pem.write_to_path(str(self.client))
        self._renewed += 1
        ca = self.cert.with_name(f"ca-{self._renewed}.pem")
        authority.cert_pem.write_to_path(str(ca))
        return ca


class TestCheck:
    @staticmethod
    async def check(file: Path, env: Mapping[str, str] | None = None) -> tuple[int, str, str]:
        # Nothing is asked of a database: there is none at this DSN.
        environment = {"PGBACKEND_DSN": "postgresql://127.0.0.1:1/x"} | dict(env or {})
        async with running("--check-config", str(file), env=environment) as serve:
            out, err = await serve.process.communicate()
            assert serve.process.returncode is not None
            return serve.process.returncode, out.decode(), err.decode()

    async def test_a_valid_file_is_said_to_be(self, tmp_path: Path) -> None:
        file = tmp_path / "broker.yaml"
        file.write_text("triggers: {billing: {target: {url: 'http://x/'}}, audit: {}}")
        assert await self.check(file) == (0, f"{file}: valid, 2 triggers: billing, audit\n", "")
        file.write_text("triggers: {billing: {}}")
        assert await self.check(file) == (0, f"{file}: valid, 1 trigger: billing\n", "")
        file.write_text("ingest: {}")
        assert await self.check(file) == (0, f"{file}: valid, no triggers\n", "")

    async def test_each_mistake_is_a_line(self, tmp_path: Path) -> None:
        file = tmp_path / "broker.yaml"
        file.write_text("triggers:\n  a:\n    target: {url: /relative}\n  b:\n    order: any\n    shard: 2\n")
        code, out, err = await self.check(file)
        assert (code, out) == (1, "")
        assert [line.split(": ")[:2] for line in err.splitlines()] == [
            [f"{file}:3", "triggers.a.target.url"],
            [f"{file}:5", "triggers.b.order"],
            [f"{file}:6", "triggers.b.shard"],
        ]

    async def test_secrets_that_are_not_here_are_mistakes(self, tmp_path: Path) -> None:
        file = tmp_path / "broker.yaml"
        file.write_text("ingest: {token: {env: BROKER_TOKEN}}")
        code, _, err = await self.check(file)
        assert code == 1
        assert "BROKER_TOKEN" in err
        assert (await self.check(file, {"BROKER_TOKEN": "x"}))[0] == 0

    async def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        code, out, err = await self.check(tmp_path / "none.yaml")
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert str(tmp_path / "none.yaml") in err

    async def test_the_schema_is_printed(self) -> None:
        async with running("--print-schema") as serve:
            out, err = await serve.process.communicate()
        assert err == b""
        schema = json.loads(out)
        jsonschema.Draft202012Validator.check_schema(schema)
        validator = jsonschema.Draft202012Validator(schema)
        assert validator.is_valid({"triggers": {"a": {"target": {"url": "http://x/"}}}})
        assert not validator.is_valid({"trigger": {}})


def test_every_option_is_in_a_section_and_has_its_environment_variable() -> None:
    help_ = CliRunner().invoke(main, ["serve", "--help"]).output
    assert "Options:" not in help_
    for option in serve_command.params:
        assert option.opts[0] in help_
        name = option.envvar
        if option.name not in ("check_config", "print_schema"):
            assert name == {"config": "PGBACKEND_CONFIG_FILE", "config_inline": "PGBACKEND_CONFIG"}.get(
                option.name or "", f"PGBACKEND_{option.name}".upper()
            )


class TestFailures:
    async def test_a_port_in_use_is_said_before_anything_is_started(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            said = await one_line("--port", str(port), "--data-dir", str(tmp_path / "data"))
        assert f"Cannot listen on port {port} of 127.0.0.1: it is in use." in said
        assert not (tmp_path / "data").exists()

    async def test_a_mistake_in_the_configuration_is_said_before_anything_is_started(self, tmp_path: Path) -> None:
        file = tmp_path / "broker.yaml"
        file.write_text("triggers:\n  a:\n    target: {url: /relative}\n")
        said = await one_line("--config", str(file), "--data-dir", str(tmp_path / "data"))
        assert f"{file}:3: triggers.a.target.url: expected an absolute http or https URL" in said
        assert not (tmp_path / "data").exists()

    async def test_a_database_that_is_not_there_is_said(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
            dsn = f"postgresql://me:hunter2@127.0.0.1:{port}/x"
            said = await one_line("--port", "0", "--dsn", dsn, "--startup-timeout", "0")
        assert "cannot be reached" in said
        assert "hunter2" not in said

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
        await one_line(*args, code=2)

    async def test_when_the_backend_dies_so_does_the_broker_and_says_why(
        self, database: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def die(_: Backend) -> None:
            raise RuntimeError("out of luck")

        monkeypatch.setattr(Backend, "start", die)
        with pytest.raises(PgBackendError, match="The backend failed: RuntimeError: out of luck"):
            await app.serve(Options(dsn=database, port=0), say=lambda _: None)

    async def test_a_backend_that_just_ends_is_a_failure_too(
        self, database: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def end(_: Backend) -> None:
            pass

        monkeypatch.setattr(Backend, "start", end)
        with pytest.raises(PgBackendError, match="stopped without being asked"):
            await app.serve(Options(dsn=database, port=0), say=lambda _: None)
