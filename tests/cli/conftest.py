"""Commands as a user runs them."""

import asyncio
import os
import signal
import sys
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
