"""`pgbackend serve` as a process of its own."""

import asyncio
import os
import re
import signal
import ssl
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp

from tests.serve.support.broker import HEADERS

INFORMED = ("--log-level", "info")

_ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PGBACKEND_")} | {
    "PGBACKEND_LOG_LEVEL": "warning"  # most tests look for problems only
}


class Process:
    """`pgbackend serve` with these arguments."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.said = ""
        self._complaints: list[str] = []

    async def listening(self, timeout: float = 120.0) -> str:
        """The URL of the broker, once it listens and has printed its whole announcement."""
        assert self.process.stdout
        async with asyncio.timeout(timeout):
            while "Try: " not in self.said:
                line = await self.process.stdout.readline()
                assert line, f"ended: {self.said}{await self.complaint()}"
                self.said += line.decode()
        found = re.search(r"Broker takes CloudEvents at (https?://\S+)", self.said)
        assert found
        return found[1]

    async def complaint(self) -> str:
        """The whole standard error, once the process has ended."""
        assert self.process.stderr
        self._complaints += (await self.process.stderr.read()).decode().splitlines(keepends=True)
        return "".join(self._complaints)

    async def complains(self, text: str, *, count: int = 1, timeout: float = 120.0) -> list[str]:
        """The first `count` lines of standard error that contain `text`, once they are there."""
        assert self.process.stderr
        try:
            async with asyncio.timeout(timeout):
                while len(found := [line for line in self._complaints if text in line]) < count:
                    line = await self.process.stderr.readline()
                    assert line, f"ended: {''.join(self._complaints)}"
                    self._complaints.append(line.decode())
        except TimeoutError:
            raise TimeoutError(f"{text!r} was not said {count} times: {''.join(self._complaints)}") from None
        return found[:count]

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def ended(self, timeout: float = 120.0) -> int:
        async with asyncio.timeout(timeout):
            return await self.process.wait()


@asynccontextmanager
async def running(
    *args: str, env: Mapping[str, str] | None = None, preexec_fn: Callable[[], None] | None = None
) -> AsyncIterator[Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "pgbackend",
        "serve",
        *args,
        env=_ENVIRONMENT | dict(env or {}),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        preexec_fn=preexec_fn,
    )
    try:
        yield Process(process)
    finally:
        if process.returncode is None:
            process.kill()
        # Read the rest of the output: an unread pipe leaves a transport behind.
        await process.communicate()


async def post(
    url: str,
    id_: str = "1",
    body: bytes = b"x",
    *,
    token: str | None = None,
    ca: Path | None = None,
    cert: Path | None = None,
) -> int:
    """The status of the answer. For HTTPS, `ca` is the authority to trust and `cert` the client's certificate."""
    headers = HEADERS | {"ce-id": id_} | ({} if token is None else {"authorization": f"Bearer {token}"})
    tls = True if ca is None else ssl.create_default_context(cafile=ca)
    if isinstance(tls, ssl.SSLContext) and cert is not None:
        tls.load_cert_chain(cert)
    async with aiohttp.ClientSession() as client, client.post(url, headers=headers, data=body, ssl=tls) as answer:
        return answer.status


async def refused(url: str, timeout: float = 120.0) -> None:
    """Return once connections to the URL are refused."""
    parts = urlsplit(url)
    async with asyncio.timeout(timeout):
        while True:
            try:
                _, writer = await asyncio.open_connection(parts.hostname, parts.port)
            except ConnectionRefusedError:
                return
            except ConnectionResetError:
                # The listener closed before it accepted this connection.
                continue
            writer.close()
            await asyncio.sleep(0.02)
