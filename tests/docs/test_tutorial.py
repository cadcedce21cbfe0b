"""The tutorial works: its files are written, its commands run in their terminals, and print what the page says."""

import asyncio
import os
import re
import shutil
import signal
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from tests.support.pages import ROOT, Block, blocks
from tests.support.polling import eventually
from tests.support.ports import unasked_port

PAGE = "docs/tutorial.md"
PATIENCE = 180.0
"""Seconds until an output has to be there."""
INTERRUPTED, KILLED = {-signal.SIGINT, 128 + signal.SIGINT}, {-signal.SIGKILL, 128 + signal.SIGKILL}
"""Statuses of a command that a signal ended, and of a shell whose command it ended."""


class Terminal:
    """Runs one command after the other, and compares what they print with the page. `…` matches any text."""

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory
        self._output = directory.parent / f"{name}.output"
        self._process: asyncio.subprocess.Process | None = None
        self._from = 0

    async def follow(self, block: Block) -> None:
        """Each line has happened: a command, Ctrl-C, or output."""
        parts = re.split(r"^(?=\$ |\^C)", block.text, flags=re.MULTILINE)
        for part in filter(None, parts):
            entered, _, rest = part.partition("\n") if part.startswith(("$ ", "^C")) else ("", "", part)
            expected = rest.splitlines()
            if entered == "^C":
                await self._interrupt()
            elif entered:
                await self._start(entered.removeprefix("$ "))
            if "until" in block.title:
                await self._repeat(entered.removeprefix("$ "), expected)
            else:
                await eventually(f"{block}: {expected}", partial(self._shows, expected), PATIENCE)

    async def close(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            await self._process.wait()

    async def _start(self, command: str) -> None:
        await self._ended()
        self._from = self._output.stat().st_size if self._output.exists() else 0
        with self._output.open("ab") as output:
            self._process = await asyncio.create_subprocess_shell(
                command,
                cwd=self._directory,
                env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_interruptible,
            )

    async def _repeat(self, command: str, expected: list[str]) -> None:
        """Run the command until it prints what is expected."""
        for _ in range(60):
            await self._ended()
            if self._shows(expected):
                return
            await self._start(command)
        raise TimeoutError(f"{command} does not print {expected}")

    async def _interrupt(self) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGINT)
        await self._ended()

    async def _ended(self) -> None:
        """The command has ended: well, or by a signal."""
        if self._process is not None:
            async with asyncio.timeout(PATIENCE):
                status = await self._process.wait()
            assert status in {0, *INTERRUPTED, *KILLED}, self._printed()

    def _printed(self) -> str:
        return self._output.read_bytes()[self._from :].decode()

    def _shows(self, expected: list[str]) -> bool:
        """The command has printed all of these lines, in whatever order; if it has ended, no others."""
        assert self._process is not None
        printed = [line.split() for line in self._printed().splitlines() if line.split()]
        if self._process.returncode in KILLED:
            printed.append(["Killed"])  # what an interactive shell prints
        wanted = [re.escape(" ".join(line.split())).replace("…", ".*") for line in expected]
        lines = [" ".join(words) for words in printed]
        is_there = all(any(re.fullmatch(pattern, line) for line in lines) for pattern in wanted)
        if self._process.returncode == 0 and wanted:
            return is_there and all(any(re.fullmatch(pattern, line) for pattern in wanted) for line in lines)
        return is_there


def _interruptible() -> None:
    """Ctrl-C has an effect, even if the tests run in the background of a shell, which ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("curl") is None, reason="the tutorial uses curl")
async def test_the_first_hour_goes_as_the_page_says(tmp_path: Path) -> None:
    here = tmp_path / "first-hour"
    here.mkdir()
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    ports = {port: str(unasked_port()) for port in ("8080", "8888")}
    terminals = {name: Terminal(here, name) for name in ("Terminal 1", "Terminal 2", "Terminal 3")}
    install, *rest = blocks(PAGE)
    assert "pip install '.[all]'" in install.text
    try:
        for block in rest:
            text = block.text
            for port, free in ports.items():
                text = text.replace(port, free)
            if block.language == "console":
                name = block.title.partition(",")[0] or "Terminal 1"
                await terminals[name].follow(
                    Block(page=block.page, line=block.line, language="", title=block.title, text=text)
                )
            elif block.title.endswith(", changed"):
                _change(here / block.title.partition(",")[0], text)
            else:
                (here / block.title).write_text(text)
    finally:
        for terminal in terminals.values():
            await terminal.close()


def _change(file: Path, lines: str) -> None:
    """Replace the lines of the file that begin as these do."""
    first = lines.splitlines()[0]
    before, found, after = file.read_text().partition(first)
    assert found, first
    file.write_text(before + lines + after.split("\n", len(lines.splitlines()))[-1])
