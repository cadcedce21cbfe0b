"""Commands as a user runs them."""

import asyncio
import fcntl
import os
import pty
import signal
import struct
import sys
import termios
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Self

import pytest
from click.testing import CliRunner, Result

from pgbackend.cli import main

Run = Callable[..., Coroutine[Any, Any, Result]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """`await run("status", "--dsn", dsn)`: the command's exit code and output.

    Its environment is otherwise empty, and this user has no embedded log.
    """
    for name in ("PGBACKEND_DSN", "PGBACKEND_LISTEN_DSN", "PGBACKEND_SCHEMA", "PGBACKEND_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pgbackend.embedded.server.default_directory", lambda: tmp_path / "default")

    async def run(*args: str, env: dict[str, str] | None = None, input: bytes | None = None) -> Result:  # noqa: A002 - click's word
        # In a thread, because a command runs an event loop of its own.
        return await asyncio.to_thread(CliRunner().invoke, main, list(args), env=env, input=input)

    return run


class Command:
    """`pgbackend` with these arguments as a process of its own."""

    def __init__(self, *args: str, output: int = asyncio.subprocess.PIPE) -> None:
        self._args = args
        self._output = output
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PGBACKEND_")}
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "pgbackend", *self._args,
            env=environment, stdin=pipe, stdout=self._output, stderr=pipe,
        )  # fmt: skip
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.process.kill()
        # An unread pipe leaves a transport behind.
        await self.process.communicate()

    @property
    def process(self) -> asyncio.subprocess.Process:
        assert self._process, "enter the command first"
        return self._process

    async def line(self) -> str:
        """The next line of its output."""
        assert self.process.stdout
        async with asyncio.timeout(60):
            line = await self.process.stdout.readline()
        assert line, await self.complaint()
        return line.decode()

    async def complaint(self) -> str:
        """The whole standard error, once the process has ended."""
        assert self.process.stderr
        async with asyncio.timeout(60):
            return (await self.process.stderr.read()).decode()

    async def write(self, text: bytes) -> None:
        assert self.process.stdin
        self.process.stdin.write(text)
        await self.process.stdin.drain()

    def end_input(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()

    def close_output(self) -> None:
        """Its output is closed, as by a reader that has gone."""
        self.process._transport.get_pipe_transport(1).close()  # type: ignore[attr-defined]

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def ended(self) -> tuple[int, str]:
        """Its exit code and standard error."""
        complaint = await self.complaint()
        async with asyncio.timeout(60):
            return await self.process.wait(), complaint


class Terminal:
    """`pgbackend` with these arguments on a terminal of 80 columns and 24 lines."""

    def __init__(self, *args: str) -> None:
        self._args = args
        self.output = ""
        """Everything that it has written so far."""

    async def __aenter__(self) -> Self:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PGBACKEND_", "NO_"))}
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "pgbackend", *self._args, env=environment | {"TERM": "xterm"},
            stdin=theirs, stdout=theirs, stderr=theirs,
            # Its own session, whose terminal this is, so that Ctrl-C reaches it.
            preexec_fn=_take_terminal,
        )  # fmt: skip
        os.close(theirs)
        asyncio.get_running_loop().add_reader(self._ours, self._read)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()
        asyncio.get_running_loop().remove_reader(self._ours)
        os.close(self._ours)

    def _read(self) -> None:
        try:
            self.output += os.read(self._ours, 65_536).decode(errors="replace")
        except OSError:  # the other side is closed
            asyncio.get_running_loop().remove_reader(self._ours)

    def write(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    async def ended(self) -> int:
        """Its exit code; all that it wrote is in `output`."""
        async with asyncio.timeout(60):
            code = await self._process.wait()
        await asyncio.sleep(0)
        self._read()
        return code


def _take_terminal() -> None:
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
