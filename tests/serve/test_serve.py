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
from click.testing import CliRunner, Result

from pgbackend.backend import Backend
from pgbackend.cli import main
from pgbackend.cli.serve import serve as serve_command
from pgbackend.errors import ConfigError, PgBackendError
from pgbackend.serve import app
from pgbackend.serve.options import Options
from pgbackend.torture.proxy import Proxy
from tests.serve.support.configs import config
from tests.serve.support.process import INFORMED, Process, post, refused, running
from tests.serve.support.target import Target, holding, raw_server
from tests.support.backends import status_of


def invoke(*args: str, env: Mapping[str, str] | None = None) -> Result:
    """The result of `pgbackend serve` with options that start nothing, in this process."""
    unset = {name: None for name in os.environ if name.startswith("PGBACKEND_")}
    return CliRunner(env={**unset, **(env or {})}).invoke(main, ["serve", *args])


async def try_line(serve: Process) -> int:
    """The status of the answer to the command that the broker suggests."""
    line = next(line for line in serve.said.splitlines() if line.startswith("Try: "))
    words = shlex.split(line)[1:]
    assert words[:2] == ["curl", "-i"]
    headers = dict(words[at + 1].split(": ", 1) for at, word in enumerate(words) if word == "-H")
    data = words[words.index("-d") + 1]
    async with aiohttp.ClientSession() as client, client.post(words[2], headers=headers, data=data) as answer:
        return answer.status


class TestStart:
    @pytest.mark.direct
    async def test_it_announces_where_it_listens_and_what_it_does(
        self, database: str, target: Target, tmp_path: Path
    ) -> None:
        file = tmp_path / "broker.yaml"
        file.write_text(config(target).replace("http://127.0.0.1", "http://me:hunter2@localhost"))
        dsn = urlsplit(database)
        with_password = dsn._replace(netloc=dsn.netloc.replace("@", ":hunter2@")).geturl()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
            systemd.bind(str(tmp_path / "notify"))
            systemd.settimeout(60)
            environment = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
            arguments = ("--dsn", with_password, "--config", str(file), "--port", "0")
            async with running(*arguments, env=environment) as serve:
                url = await serve.listening()
                assert await asyncio.to_thread(systemd.recv, 100) == b"READY=1"

                assert await post(url) == 202
                await target.wait(1)
                assert f"trigger: billing -> {target.url.replace('127.0.0.1', 'localhost')}" in serve.said
                assert "schema pgbackend" in serve.said
                assert dsn.path.lstrip("/") in serve.said
                assert "hunter2" not in serve.said
                # uvloop looks up names in half of its threads: with its usual 4, two hanging names block all others.
                assert len(list(Path(f"/proc/{serve.process.pid}/task").iterdir())) > 64

                serve.send(signal.SIGTERM)
                assert await serve.ended() == 0
                assert await serve.complaint() == ""

    @pytest.mark.owner
    async def test_every_option_may_come_from_the_environment(self, database: str) -> None:
        environment = {
            "PGBACKEND_DSN": database,
            "PGBACKEND_SCHEMA": "elsewhere",
            "PGBACKEND_CONFIG": "ingest: {}",
            "PGBACKEND_HOST": "localhost",
            "PGBACKEND_PORT": "0",
        }
        async with running(env=environment) as serve:
            await serve.listening()
            assert "schema elsewhere" in serve.said
            assert "trigger: none, the configuration has none" in serve.said
            assert await try_line(serve) == 202

    async def test_the_command_line_overrides_the_environment(self, database: str, target: Target) -> None:
        environment = {"PGBACKEND_CONFIG_FILE": "/not/there", "PGBACKEND_PORT": "1"}
        arguments = ("--dsn", database, "--port", "0", "--config-inline", config(target))
        async with running(*arguments, env=environment) as serve:
            await serve.listening()
            assert "trigger: billing" in serve.said

    @pytest.mark.slow
    async def test_without_a_dsn_it_starts_an_embedded_postgresql_and_finds_its_data_again(
        self, target: Target, tmp_path: Path
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

    async def test_it_waits_for_postgresql(self, database: str) -> None:
        async with Proxy(database) as proxy:
            proxy.cut()
            async with running("--dsn", proxy.dsn, "--port", "0") as serve:
                assert await serve.complains("waiting for postgresql")
                proxy.restore()
                assert await post(await serve.listening()) == 202

    async def test_it_gives_up_after_startup_timeout_in_one_line_without_the_password(self, database: str) -> None:
        async with Proxy(database) as proxy:
            proxy.cut()
            parts = urlsplit(proxy.dsn)
            dsn = parts._replace(netloc=f"me:hunter2@{parts.netloc.rpartition('@')[2]}").geturl()
            async with running("--dsn", dsn, "--port", "0", "--startup-timeout", "0.5") as serve:
                assert await serve.ended() == 1
                said = await serve.complaint()
        *waiting, last = said.splitlines()
        assert all("waiting for postgresql" in line for line in waiting)
        assert last.startswith("Error: PostgreSQL at ")
        assert "hunter2" not in said


class TestSignals:
    @pytest.mark.direct
    async def test_an_interrupt_finishes_what_is_in_progress(self, database: str, target: Target) -> None:
        released = holding(target)
        async with running("--dsn", database, "--port", "0", "--config-inline", config(target)) as serve:
            url = await serve.listening()
            assert await post(url) == 202
            await target.wait(1)
            serve.send(signal.SIGINT)
            await refused(url)
            released.set()
            assert await serve.ended() == 0
            assert await serve.complaint() == ""
        backend = Backend(database)
        await backend.init()
        assert (await status_of(backend)).lag == 0
        await backend.stop()

    async def test_a_second_interrupt_ends_it_at_once(self, database: str, target: Target) -> None:
        released = holding(target)
        async with running("--dsn", database, "--port", "0", "--config-inline", config(target)) as serve:
            url = await serve.listening()
            assert await post(url) == 202
            await target.wait(1)
            serve.send(signal.SIGINT)
            await refused(url)
            serve.send(signal.SIGINT)
            assert await serve.ended(timeout=20.0) == 130  # it drains for 30 s
        released.set()

    async def test_a_signal_during_the_start_ends_it(self) -> None:
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

    async def test_sighup_does_not_read_a_pipe_again(self, database: str, tmp_path: Path) -> None:
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

    @pytest.mark.direct
    async def test_it_ends_when_its_terminal_is_closed(self, database: str) -> None:
        terminal, end = os.openpty()
        try:
            async with running("--dsn", database, "--port", "0", preexec_fn=lambda: _join_terminal(end)) as serve:
                await serve.listening()
                os.close(end)
                os.close(terminal)
                assert await serve.ended() == 0
                assert await serve.complaint() == ""
        finally:
            for file in (terminal, end):
                with suppress(OSError):
                    os.close(file)


def _join_terminal(terminal: int) -> None:
    """This process, and its children, belong to the terminal."""
    os.setsid()
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)


class TestTls:
    async def test_certificates_are_served_and_followed(self, database: str, tmp_path: Path) -> None:
        """In two broker processes, each of which follows the files."""
        files = Files(tmp_path)
        old = files.renew()
        arguments = ["--tls-cert", str(files.cert), "--tls-key", str(files.key)]
        arguments += ["--tls-client-ca", str(files.client_ca), "--workers", "2"]
        async with running("--dsn", database, "--port", "0", *arguments, *INFORMED) as serve:
            url = await serve.listening()
            assert url.startswith("https://127.0.0.1:")
            assert "Try: curl -i https://" in serve.said
            assert await post(url, ca=old, cert=files.client) == 202
            with pytest.raises((aiohttp.ClientConnectionError, ConnectionResetError)):
                await post(url, ca=old)
            new = files.renew()
            await serve.complains("certificates reloaded", count=2)
            assert await post(url, ca=new, cert=files.client) == 202
            with pytest.raises(aiohttp.ClientConnectorCertificateError):
                await post(url, ca=old, cert=files.client)

            files.cert.write_text("nonsense")
            await serve.complains("certificates not reloaded", count=2)
            assert await post(url, ca=new, cert=files.client) == 202


class Files:
    """The certificates and keys of a server and a client, signed by their own authority, behind one link."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._versions = 0
        self.cert, self.key, self.client_ca, self.client = (
            directory / "current" / name for name in ("cert.pem", "key.pem", "client-ca.pem", "client.pem")
        )

    def renew(self) -> Path:
        """Replace all files at once; return the authority's certificate."""
        self._versions += 1
        version = self._directory / str(self._versions)
        version.mkdir()
        authority = trustme.CA()
        server = authority.issue_cert("127.0.0.1")
        server.private_key_pem.write_to_path(str(version / "key.pem"))
        server.cert_chain_pems[0].write_to_path(str(version / "cert.pem"))
        authority.cert_pem.write_to_path(str(version / "client-ca.pem"))
        client = authority.issue_cert("client@example.com")
        client.private_key_and_cert_chain_pem.write_to_path(str(version / "client.pem"))
        link = self._directory / "new"
        link.symlink_to(version)
        link.rename(self._directory / "current")
        return version / "client-ca.pem"


class TestCheck:
    """`--check-config` and `--print-schema`, which connect to nothing: there is no database at this DSN."""

    ENVIRONMENT: Mapping[str, str] = {"PGBACKEND_DSN": "postgresql://127.0.0.1:1/x"}

    def check(self, file: Path, **env: str) -> tuple[int, str, str]:
        result = invoke("--check-config", str(file), env={**self.ENVIRONMENT, **env})
        return result.exit_code, result.stdout, result.stderr

    def test_a_valid_file_is_confirmed(self, tmp_path: Path) -> None:
        file = tmp_path / "broker.yaml"
        file.write_text("triggers: {billing: {target: {url: 'http://x/'}}, audit: {}}")
        assert self.check(file) == (0, f"{file}: valid, 2 triggers: billing, audit\n", "")
        file.write_text("triggers: {billing: {}}")
        assert self.check(file) == (0, f"{file}: valid, 1 trigger: billing\n", "")
        file.write_text("ingest: {}")
        assert self.check(file) == (0, f"{file}: valid, no triggers\n", "")

    def test_each_mistake_is_a_line(self, tmp_path: Path) -> None:
        file = tmp_path / "broker.yaml"
        file.write_text("triggers:\n  a:\n    target: {url: /relative}\n  b:\n    order: any\n    shard: 2\n")
        code, out, err = self.check(file)
        assert (code, out) == (1, "")
        assert [line.split(": ")[:2] for line in err.splitlines()] == [
            [f"{file}:3", "triggers.a.target.url"],
            [f"{file}:5", "triggers.b.order"],
            [f"{file}:6", "triggers.b.shard"],
        ]

    def test_a_missing_secret_is_a_mistake(self, tmp_path: Path) -> None:
        file = tmp_path / "broker.yaml"
        file.write_text("ingest: {token: {env: BROKER_TOKEN}}")
        code, _, err = self.check(file)
        assert code == 1
        assert "BROKER_TOKEN" in err
        assert self.check(file, BROKER_TOKEN="x")[0] == 0

    def test_a_missing_file_is_a_mistake(self, tmp_path: Path) -> None:
        code, out, err = self.check(tmp_path / "none.yaml")
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert str(tmp_path / "none.yaml") in err

    def test_the_schema_is_printed(self) -> None:
        result = invoke("--print-schema", env=self.ENVIRONMENT)
        assert result.stderr == ""
        schema = json.loads(result.stdout)
        jsonschema.Draft202012Validator.check_schema(schema)
        validator = jsonschema.Draft202012Validator(schema)
        assert validator.is_valid({"triggers": {"a": {"target": {"url": "http://x/"}}}})
        assert not validator.is_valid({"trigger": {}})


class TestOptions:
    def test_every_option_is_in_a_section_and_has_its_environment_variable(self) -> None:
        help_ = invoke("--help").output
        assert "Options:" not in help_
        for option in serve_command.params:
            assert option.opts[0] in help_
            name = option.envvar
            if option.name not in ("check_config", "print_schema"):
                assert name == {"config": "PGBACKEND_CONFIG_FILE", "config_inline": "PGBACKEND_CONFIG"}.get(
                    option.name or "", f"PGBACKEND_{option.name}".upper()
                )

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
    def test_wrong_usage_is_exit_code_2(self, args: tuple[str, ...]) -> None:
        assert invoke(*args).exit_code == 2

    def test_a_malformed_port_in_the_environment_is_refused(self) -> None:
        result = invoke(env={"PGBACKEND_PORT": "http"})
        assert result.exit_code == 2
        assert "PGBACKEND_PORT" in result.stderr

    async def test_a_port_that_kubernetes_set_for_a_service_is_ignored_with_a_warning(self) -> None:
        links = {"PGBACKEND_PORT": "tcp://10.0.171.239:8080", "PGBACKEND_ADMIN_PORT": "udp://[fd00::1]:53"}
        environment = {
            **links,
            "PGBACKEND_SERVICE_HOST": "10.0.171.239",
            "PGBACKEND_SERVICE_PORT": "8080",
            "PGBACKEND_PORT_8080_TCP": links["PGBACKEND_PORT"],
            "PGBACKEND_PORT_8080_TCP_PROTO": "tcp",
            "PGBACKEND_DSN": "postgresql://nobody@127.0.0.1:1/nothing",
            "PGBACKEND_STARTUP_TIMEOUT": "0",
            "PGBACKEND_LOG_FORMAT": "json",
        }
        async with running(env=environment) as serve:
            assert await serve.ended() == 1  # there is no database; the port is the default one
            warnings = [json.loads(line) for line in (await serve.complaint()).splitlines()[:2]]
        assert {warning["variable"]: warning["value"] for warning in warnings} == links
        assert all(warning["level"] == "warning" for warning in warnings)


class TestFailures:
    @staticmethod
    async def failure(tmp_path: Path, **options: object) -> str:
        """The error of a broker that must not start its embedded PostgreSQL."""
        data = tmp_path / "data"
        with pytest.raises(ConfigError) as caught:
            await app.serve(Options(**{"port": 0, "data_dir": data, **options}), say=lambda _: None)  # type: ignore[arg-type]
        assert not data.exists()
        return str(caught.value)

    async def test_a_port_in_use_is_reported_before_anything_starts(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            said = await self.failure(tmp_path, port=port)
        assert f"Cannot listen on port {port} of 127.0.0.1: it is in use." in said

    async def test_an_invalid_configuration_is_reported_before_anything_starts(self, tmp_path: Path) -> None:
        file = tmp_path / "broker.yaml"
        file.write_text("triggers:\n  a:\n    target: {url: /relative}\n")
        said = await self.failure(tmp_path, config=file)
        assert f"{file}:3: triggers.a.target.url: expected an absolute http or https URL" in said

    async def test_unusable_certificates_are_reported_before_anything_starts(self, tmp_path: Path) -> None:
        said = await self.failure(tmp_path, tls_cert=tmp_path / "none.pem")
        assert f"TLS: the certificate {tmp_path / 'none.pem'} cannot be read: No such file or directory." in said

    async def test_the_broker_ends_with_its_backend_and_says_why(
        self, database: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def die(_: Backend) -> None:
            raise RuntimeError("out of luck")

        monkeypatch.setattr(Backend, "start", die)
        with pytest.raises(PgBackendError, match="The backend failed: RuntimeError: out of luck"):
            await app.serve(Options(dsn=database, port=0), say=lambda _: None)

    async def test_a_backend_that_ends_by_itself_is_a_failure(
        self, database: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def end(_: Backend) -> None:
            pass

        monkeypatch.setattr(Backend, "start", end)
        with pytest.raises(PgBackendError, match="stopped without being asked"):
            await app.serve(Options(dsn=database, port=0), say=lambda _: None)
