"""Commands as a user runs them."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from click.testing import CliRunner, Result

from pgbackend.cli import main

Run = Callable[..., Awaitable[Result]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """`await run("status", "--dsn", dsn)`: the command's exit code and output, its environment otherwise empty."""
    for name in ("PGBACKEND_DSN", "PGBACKEND_LISTEN_DSN", "PGBACKEND_SCHEMA"):
        monkeypatch.delenv(name, raising=False)

    async def run(*args: str, env: dict[str, str] | None = None) -> Result:
        # In a thread, because a command runs an event loop of its own.
        return await asyncio.to_thread(CliRunner().invoke, main, list(args), env=env)

    return run
