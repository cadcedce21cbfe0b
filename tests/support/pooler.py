"""A real pgbouncer, configured as docs/pooler.md says, in front of any PostgreSQL."""

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import parse_qsl, unquote, urlsplit

import pytest

PGBOUNCER = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")

needs_pgbouncer = pytest.mark.skipif(PGBOUNCER is None, reason="needs pgbouncer (Debian: apt-get install pgbouncer)")

_DOCS = Path(__file__).parents[2] / "docs" / "pooler.md"


class Pooler:
    """Runs while entered. Every database of the server of `dsn` can be reached through it, as any user."""

    def __init__(self, dsn: str, **settings: object) -> None:
        """`settings` come on top of those of the docs."""
        assert PGBOUNCER, "use needs_pgbouncer"
        self._target = urlsplit(dsn)
        query = dict(parse_qsl(self._target.query))
        host = query.get("host") or self._target.hostname or "localhost"
        port = query.get("port") or self._target.port or 5432
        user, password = self._target.username, self._target.password
        server = {"host": host, "port": port, "user": user, "password": unquote(password) if password else None}
        # As root it does not run, and a socket in a directory of its owner's is for that user alone.
        owner = Path(host).stat().st_uid if host.startswith("/") else 65534
        self._user = (owner or 65534) if os.geteuid() == 0 else None
        self._directory = tempfile.TemporaryDirectory(prefix="pgbackend-pooler-", ignore_cleanup_errors=True)
        self._port = _free_port()
        self._settings = {
            "listen_addr": "127.0.0.1",
            "listen_port": self._port,
            # Each database, the user of `dsn` for everybody, and nobody is asked for a password.
            "auth_type": "any",
            "auth_file": "",
            "unix_socket_dir": "",
            **settings,
        }
        self._server = " ".join(f"{name}={value}" for name, value in server.items() if value is not None)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        Path(self._directory.name).chmod(0o755)
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()
        self._directory.cleanup()

    def dsn(self, dsn: str) -> str:
        """The way to a database of the server that leads through the pooler."""
        parts = urlsplit(dsn)
        credentials, at, _ = parts.netloc.rpartition("@")
        return parts._replace(netloc=f"{credentials}{at}127.0.0.1:{self._port}", query="sslmode=disable").geturl()

    def direct(self, dsn: str) -> str:
        """The way to the same database that leads around the pooler; any other DSN as it is."""
        parts = urlsplit(dsn)
        if not parts.netloc.endswith(f"127.0.0.1:{self._port}"):
            return dsn
        return self._target._replace(path=parts.path).geturl()

    def start(self) -> None:
        """Return once it takes connections."""
        assert PGBOUNCER
        self._configure(self._settings)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [PGBOUNCER, self._config], stdin=subprocess.DEVNULL, stdout=log, stderr=log, user=self._user
            )
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", self._port), timeout=5).close()
                return
            except OSError as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"pgbouncer did not start: {self.log.read_text()}") from error
                time.sleep(0.01)

    def has_crashed(self) -> bool:
        """Whether it has ended by itself."""
        return self._process is not None and self._process.poll() is not None

    def kill(self) -> None:
        """kill -9: its connections are gone in both directions, whatever was under way."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def reload(self, **settings: object) -> None:
        """It has been told to read its configuration, with these settings changed."""
        assert self._process
        self._settings.update(settings)
        self._configure(self._settings)
        self._process.send_signal(signal.SIGHUP)

    def pause(self) -> None:
        """PAUSE: what is under way ends, what comes waits until `resume()`."""
        assert self._process
        self._process.send_signal(signal.SIGUSR1)

    def resume(self) -> None:
        """RESUME."""
        assert self._process
        self._process.send_signal(signal.SIGUSR2)

    @property
    def log(self) -> Path:
        return Path(self._directory.name) / "log"

    @property
    def _config(self) -> Path:
        return Path(self._directory.name) / "pgbouncer.ini"

    def _configure(self, settings: dict[str, object]) -> None:
        documented = re.search(r"```ini\n(.*?)```", _DOCS.read_text(), re.DOTALL)
        assert documented, "docs/pooler.md has the configuration"
        text = re.sub(r"^\* = .*$", f"* = {self._server}", documented[1], count=1, flags=re.MULTILINE)
        for name, value in settings.items():
            text = re.sub(rf"^{name} = .*\n", "", text, flags=re.MULTILINE)
            if value != "" or name == "unix_socket_dir":
                text += f"{name} = {value}\n"
        self._config.write_text(text)
        self._config.chmod(0o644)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
