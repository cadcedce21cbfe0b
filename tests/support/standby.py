"""A primary and its streaming standby, on two ports and in two directories of their own, to fail over between.

    async with Pair(directory, programs=…) as pair:
        await pair.synchronous()        # or not: then what the primary acknowledges may not be on the standby yet
        …
        pair.kill()                     # kill -9 of all of the primary's processes
        await pair.promote()            # the standby is the primary now
        await pair.rejoin()             # the other one follows it, made anew

`pair.dsn` names both, and stays the same however often they change roles. As root the servers run as `nobody`, who must
be able to reach the directory.
"""

import asyncio
import os
import pwd
import shutil
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import asyncpg

from pgbackend.torture.server import processes_on
from tests.support.polling import eventually

SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "max_prepared_transactions": "10",
    "wal_keep_size": "256MB",
    "wal_retrieve_retry_interval": "100ms",
    "wal_receiver_status_interval": "1s",
    "shared_buffers": "32MB",
    "max_connections": "100",
}


def _nobody() -> pwd.struct_passwd:
    return pwd.getpwnam("nobody")


class Server:
    """One PostgreSQL in a directory: what it is, primary or standby, its files say."""

    def __init__(
        self, directory: Path, *, programs: Path, settings: dict[str, str] | None = None, blank: "Server | None" = None
    ) -> None:
        """`blank`: one that was initialized and never started, to be copied: initdb takes longer than all the rest."""
        self.directory = directory
        self._blank = blank
        self.port = _free_port()
        self.programs = programs
        self._settings = settings or {}
        self._process: asyncio.subprocess.Process | None = None

    @property
    def data(self) -> Path:
        return self.directory / "data"

    @property
    def dsn(self) -> str:
        """For this server alone, over TCP."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    async def __aenter__(self) -> Self:
        """A new, empty cluster, that runs."""
        await self.initialize()
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    async def initialize(self) -> None:
        self._prepare_directory()
        if self._blank is not None:
            await self._run("cp", "-a", self._blank.data, self.data)
            return
        await self._run(
            "initdb", f"--pgdata={self.data}", "--username=postgres", "--auth=trust", "--encoding=UTF8",
            "--locale=C", "--no-sync", "--no-instructions",
        )  # fmt: skip

    async def copy(self, primary: "Server") -> None:
        """A standby of `primary` as it is now, made anew; it does not run yet."""
        self._prepare_directory()
        shutil.rmtree(self.data, ignore_errors=True)
        if primary.runs:
            conninfo = f"host=127.0.0.1 port={primary.port} user=postgres"
            await self._run(
                "pg_basebackup", f"--pgdata={self.data}", f"--dbname={conninfo}", "-X", "stream", "--checkpoint=fast",
                "--no-sync",
            )  # fmt: skip
        else:
            # The files of a server that is stopped: in a fifth of the time.
            await self._run("cp", "-a", primary.data, self.data)
        (self.data / "standby.signal").touch()
        # The last line counts: what the primary was told by ALTER SYSTEM has come along.
        with (self.data / "postgresql.auto.conf").open("a") as conf:
            conf.write(
                f"primary_conninfo = 'host=127.0.0.1 port={primary.port} user=postgres application_name=standby'\n"
                "synchronous_standby_names = ''\n"
            )

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Return once it accepts connections."""
        own = {"port": str(self.port), "unix_socket_directories": str(self.directory)}
        settings = [f"--{name}={value}" for name, value in {**SETTINGS, **self._settings, **own}.items()]
        with (self.directory / "log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                self.programs / "postgres", "-D", self.data, *settings,
                stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, **self._identity(),
            )  # fmt: skip
        await eventually(f"the server in {self.directory} answers", self._answers, 60)

    async def _answers(self) -> bool:
        assert self._process
        assert self._process.returncode is None, (self.directory / "log").read_text()
        with suppress(OSError, asyncpg.PostgresError, TimeoutError):
            async with self.connected():
                return True
        return False

    def kill(self) -> None:
        """kill -9, to every one of its processes at once: nothing is written, nobody is told."""
        self.signal(signal.SIGKILL)

    def signal(self, number: signal.Signals) -> None:
        """To every one of its processes: SIGSTOP makes it hang with all its connections open."""
        for pid in processes_on(self.data):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    async def gone(self) -> None:
        """Return once all of its processes are gone that `kill()` has killed."""
        assert self._process
        await self._process.wait()

        async def no_process() -> bool:
            return not any(_works_in(pid, self.data) for pid in _pids())

        await eventually(f"the server in {self.directory} is gone", no_process)
        (self.data / "postmaster.pid").unlink(missing_ok=True)

    async def stop(self) -> None:
        """Return once it is shut down in order, if it runs; connections are cut."""
        if self._process is None or not self.runs:
            return
        self.signal(signal.SIGCONT)
        self._process.send_signal(signal.SIGINT)
        async with asyncio.timeout(60):
            await self._process.wait()

    @asynccontextmanager
    async def connected(self) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
        connection = await asyncpg.connect(self.dsn, timeout=30)
        try:
            yield connection
        finally:
            await connection.close(timeout=10)

    async def configure(self, name: str, value: str) -> None:
        """ALTER SYSTEM, and it counts."""
        async with self.connected() as connection:
            await connection.execute(f"ALTER SYSTEM SET {name} = '{value}'")
            await connection.execute("SELECT pg_reload_conf()")

    async def value(self, query: str) -> Any:
        async with self.connected() as connection:
            return await connection.fetchval(query)

    def _prepare_directory(self) -> None:
        self.directory.mkdir(exist_ok=True)
        if os.geteuid() == 0:
            os.chown(self.directory, _nobody().pw_uid, _nobody().pw_gid)

    def _identity(self) -> dict[str, Any]:
        if os.geteuid() != 0:
            return {}
        return {"user": _nobody().pw_uid, "group": _nobody().pw_gid, "extra_groups": []}

    async def _run(self, program: str, *arguments: str | Path) -> None:
        process = await asyncio.create_subprocess_exec(
            self.programs / program if (self.programs / program).exists() else program, *arguments,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
            cwd=self.directory, **self._identity(),
        )  # fmt: skip
        output, _ = await process.communicate()
        assert process.returncode == 0, output.decode()


class Pair:
    """Two servers, of which one is the primary and the other its standby."""

    def __init__(
        self, directory: Path, *, programs: Path, settings: dict[str, str] | None = None, blank: Server | None = None
    ) -> None:
        self.primary, self.standby = (
            Server(directory / name, programs=programs, settings=settings, blank=blank) for name in ("a", "b")
        )
        self._hosts = f"127.0.0.1:{self.primary.port},127.0.0.1:{self.standby.port}"

    @property
    def dsn(self) -> str:
        """Names both; the primary is found by what they are."""
        return f"postgresql://postgres@{self._hosts}/postgres?target_session_attrs=read-write"

    async def __aenter__(self) -> Self:
        try:
            await self.primary.initialize()
            await self.standby.copy(self.primary)
            await self.primary.start()
            await self._follow()
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for server in (self.primary, self.standby):
            await server.stop()

    async def synchronous(self) -> None:
        """From now on the primary acknowledges nothing that the standby has not on its disk."""
        await self.primary.configure("synchronous_standby_names", "*")

        async def is_synchronous() -> bool:
            return await self.primary.value("SELECT sync_state FROM pg_stat_replication") in ("sync", "quorum")

        await eventually("the standby is synchronous", is_synchronous)

    async def sever(self) -> None:
        """The standby gets nothing any more: it stays as it is, as far behind as the primary goes on."""
        await self.standby.configure("primary_conninfo", "")

        async def is_severed() -> bool:
            return not await self.standby.value("SELECT count(*) FROM pg_stat_wal_receiver")

        await eventually("the standby gets nothing any more", is_severed)

    def kill(self) -> None:
        """kill -9 of the primary."""
        self.primary.kill()

    async def promote(self) -> None:
        """The standby is the primary when this returns; `primary` and `standby` have changed names."""
        async with self.standby.connected() as connection:
            assert await connection.fetchval("SELECT pg_promote(true, 60)")
        self.primary, self.standby = self.standby, self.primary

    async def rejoin(self) -> None:
        """The former primary, which has been killed or runs still, is a standby of the new one."""
        self.standby.kill()
        await self.standby.gone()
        await self.standby.copy(self.primary)
        await self._follow()

    async def _follow(self) -> None:
        await self.standby.start()

        async def is_streaming() -> bool:
            return bool(await self.primary.value("SELECT state = 'streaming' FROM pg_stat_replication"))

        await eventually("the standby is streaming", is_streaming, 30)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _works_in(pid: int, directory: Path) -> bool:
    """Whether the process lives and is one of the server on this directory: all of them work there."""
    try:
        return (Path(f"/proc/{pid}/cwd")).samefile(directory)
    except OSError:
        return False
