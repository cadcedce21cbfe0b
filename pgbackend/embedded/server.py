"""An embedded PostgreSQL: a directory becomes a DSN while a process uses it.

`EmbeddedServer` runs the PostgreSQL that `binaries.py` finds, and only a Unix socket leads to it. Many processes may
use one directory: the first starts the server, and the last to leave stops it. The promise holds whatever is killed,
users, servers or keepers: the next start is not blocked, no committed data is lost, and no server stays without a user.
While a user lives, a server that died is started again under the same DSN.

`keeper.py` is the program that does this. This module starts one for each user, waits for its messages, and starts
another when one was killed. It does so in a thread, which outlives `asyncio.run(server.start())` and goes on while the
event loop is blocked.
"""

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from pgbackend import facts
from pgbackend.embedded import binaries, home
from pgbackend.errors import EmbeddedServerError, NotRunningError
from pgbackend.postgres.sockets import in_thread

RETRY_INTERVAL = 10.0
"""Seconds between two attempts to start a server that no longer starts."""
STOP_TIMEOUT = 90.0
"""Seconds that `stop()` waits for the server to end. The keeper takes 80 at most."""

_PROGRAM = "import sys; sys.path.append(sys.argv[1]); from embedded import keeper; keeper.main()"
"""Run the keeper without importing the rest of pgbackend."""


def default_directory() -> Path:
    """The directory of a server that names none: in the user's data directory; root's is /var/lib/pgbackend/default."""
    if os.geteuid() == 0:
        return binaries.ROOT_DIRECTORY / "default"
    try:
        import platformdirs  # noqa: PLC0415 - comes with the extra
    except ImportError:
        raise binaries.not_installed() from None
    with suppress(RuntimeError):  # neither HOME nor a line in the password file
        directory = platformdirs.user_data_path("pgbackend", appauthor=False)
        if directory.is_absolute():
            return directory
    raise EmbeddedServerError("This user has no home directory. Name the directory of the embedded PostgreSQL.")


def has_database(directory: Path) -> bool:
    """Whether an embedded server has kept its data in this directory. True if this user may not look."""
    try:
        return (directory.expanduser() / home.NAME / home.CLUSTER).exists()
    except PermissionError:
        return True


class EmbeddedServer:
    """PostgreSQL in a directory of its own.

        server = EmbeddedServer("./pgdata")
        dsn = await server.start()
        …
        await server.stop()

    `programs` is the directory of another PostgreSQL's `postgres` and `initdb`; the default is the wheel's. `settings`
    are values for postgresql.conf. They apply if this process starts the server. `start_timeout` is in seconds and must
    be enough for recovery after a crash.

    A process that ends without `stop()` has left too. A forked child is no user until it calls `start()`.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        programs: Path | None = None,
        settings: Mapping[str, str] | None = None,
        start_timeout: float = 120.0,
    ) -> None:
        try:
            self.directory = Path(os.path.realpath(Path(directory).expanduser()))
        except RuntimeError as error:
            raise EmbeddedServerError(
                f"{os.fspath(directory)!r} names no directory: {error} Name another directory."
            ) from error
        self._programs = programs
        self._settings = {name: str(value) for name, value in (settings or {}).items()}
        self._start_timeout = start_timeout
        self._process = os.getpid()
        self._mutex = threading.Lock()
        self._starts = 0
        self._keeper: _Keeper | None = None

    @property
    def dsn(self) -> str:
        """For asyncpg; the role is a superuser. Raises NotRunningError before `start()`."""
        if not self._keeper or self._process != os.getpid():
            raise NotRunningError("The embedded PostgreSQL is not started. Call `await start()` first.")
        return self._keeper.dsn

    async def start(self) -> str:
        """Return the DSN once the server accepts connections. A second call needs a second `stop()`.

        Raises EmbeddedServerError, after which this process does not use the server.
        """
        if self._process != os.getpid():  # after a fork the keeper is the parent's
            self._process, self._mutex, self._starts, self._keeper = os.getpid(), threading.Lock(), 0, None
        abandoned = threading.Event()
        starting = asyncio.create_task(in_thread(lambda: self._enter(abandoned), name="start the embedded server"))
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            # The thread cannot be cancelled, but it checks this event. Wait for it: if it succeeds, this process is a
            # user and must leave.
            abandoned.set()
            await asyncio.wait([starting])
            if not starting.cancelled() and starting.exception() is None:
                await self.stop()
            raise

    async def stop(self) -> None:
        """Return once this process does not use the server. If it was the last user, the server has stopped."""
        if self._process == os.getpid():
            await in_thread(self._leave, name="leave the embedded server")

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    def _enter(self, abandoned: threading.Event) -> str:
        with self._mutex:
            if self._keeper is None:
                keeper = _Keeper(self.directory, self._programs or binaries.programs(), self._settings)
                keeper.start(self._start_timeout, abandoned)
                self._keeper = keeper
            self._starts += 1
            return self._keeper.dsn

    def _leave(self) -> None:
        with self._mutex:
            self._starts = max(self._starts - 1, 0)
            if self._keeper and not self._starts:
                self._keeper.stop()
                self._keeper = None


class _Keeper:
    """The user's end of its keeper. A keeper that is killed is replaced."""

    def __init__(self, directory: Path, programs: Path, settings: Mapping[str, str]) -> None:
        self.dsn = ""
        self._directory = str(directory)
        self._plan = {
            "directory": str(directory),
            "create": True,
            "programs": str(programs),
            "settings": settings,
            "parent": os.getpid(),
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._error: EmbeddedServerError | None = None
        self._started = threading.Event()
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._follow, name=f"keep {directory}", daemon=True)

    def start(self, timeout: float, abandoned: threading.Event) -> None:
        """Return once the server accepts connections. Raises EmbeddedServerError."""
        deadline = time.monotonic() + timeout
        self._thread.start()
        while not self._started.wait(0.02) and self._thread.is_alive():
            if time.monotonic() > deadline or abandoned.is_set():
                self._leave()
                raise EmbeddedServerError(
                    f"Waited {timeout:g} s for PostgreSQL in {self._directory}. See postgresql/postgresql.log there; "
                    "recovery after a crash may need a longer start_timeout."
                )
        if self._error:
            raise self._error

    def stop(self) -> None:
        """Return once this process is no user and, if it was the last, the server has stopped."""
        self._leave()
        self._thread.join(STOP_TIMEOUT)
        if self._thread.is_alive():
            facts.emit("embedded server does not stop", level=logging.ERROR, directory=self._directory)

    def _leave(self) -> None:
        self._leaving.set()
        if self._process:
            self._process.send_signal(signal.SIGUSR1)

    def _follow(self) -> None:
        """In a thread: run keepers, one after the other, until this process leaves."""
        # A new keeper inherits this, and unblocks the signal once it can handle it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        while not self._error:
            try:
                status, said = self._run()
            except OSError as refusal:
                status, said = 1, f"{sys.executable!r} cannot be run to keep it: {refusal}"
            if status == 0 and self._leaving.is_set():
                return
            if status <= 0:  # it was killed. The next one is needed even to leave: it stops a server that was left
                self._leaving.wait(0.1)
                continue
            error = EmbeddedServerError(f"The embedded PostgreSQL in {self._directory} does not run: {said}")
            if not self._started.is_set():
                self._error = error
            else:
                facts.emit("embedded server is down", level=logging.ERROR, directory=self._directory, error=error)
                if self._leaving.wait(RETRY_INTERVAL):
                    return

    def _run(self) -> tuple[int, str]:
        """Run a keeper until it ends or we have left it. Returns its status (0: we have left) and its error."""
        news, level = "embedded server used", logging.INFO
        if self._started.is_set():
            news, level = "embedded keeper replaced", logging.WARNING
        with _no_fork:  # a child forked meanwhile would keep the pipe open after the keeper's end
            process = subprocess.Popen(  # noqa: S603 - our own program
                [sys.executable, "-I", "-S", "-c", _PROGRAM, str(Path(__file__).parents[1]), json.dumps(self._plan)],
                cwd="/",
                env={name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        _all[:] = [process, *(other for other in _all if other.poll() is None)]
        self._process = process
        if self._leaving.is_set():
            self._leave()
        said = b""
        assert process.stdout  # noqa: S101 - for the type checker
        with process.stdout as lines:
            for line in lines:
                if line == b"left\n":
                    return 0, ""
                if line.startswith(b"ready "):
                    self.dsn = line[6:].decode().strip()
                    self._plan["create"] = False  # if the database is missing later, it was deleted
                    facts.emit(news, level=level, directory=self._directory)
                    news, level = "embedded server restarted", logging.WARNING
                    self._started.set()
                else:
                    said += line
        return process.wait(), said.decode(errors="replace").strip()


_all: list[subprocess.Popen[bytes]] = []
"""Our child processes, to be reaped. A keeper may live on for other users after we have left it."""
_no_fork = threading.Lock()
os.register_at_fork(before=_no_fork.acquire, after_in_parent=_no_fork.release, after_in_child=_no_fork.release)
