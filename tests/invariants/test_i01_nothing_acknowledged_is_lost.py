"""I1. Whatever is killed, every acknowledged event is handled; I6: only what was not settled is handled twice."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pgbackend.embedded import EmbeddedServer
from tests.support.crash import await_server, kill_server
from tests.support.figures import report
from tests.support.torture import Torture

SUBSCRIPTIONS: dict[str, dict[str, object]] = {
    "plain": {"order": "none", "concurrency": 16},
    "sharded": {"order": "none", "concurrency": 8, "shards": 3},
    "keyed": {"order": "key", "concurrency": 16},
    "strict": {"order": "strict"},
}


@pytest.fixture
async def durable_server(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[EmbeddedServer]:
    """A server of the test's own that may be killed: with fsync, as users run it."""
    version: int | None = request.config.getoption("--pg-version")
    async with EmbeddedServer(tmp_path / "server", version=version) as server:
        yield server


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_kill_9_of_workers_and_of_the_whole_server_loses_nothing(
    durable_server: EmbeddedServer, tmp_path: Path, long: bool
) -> None:
    worker_kills, server_kills = (20, 10) if long else (3, 2)
    torture = Torture(
        durable_server.dsn,
        tmp_path / "diary",
        SUBSCRIPTIONS,
        # A worker that died is noticed by its missing backend; this is for what the server's death takes along.
        settings={"hole_wait": 0.3, "lease_timeout": 5.0},
    )
    torture.diary.touch()
    kills = ["worker"] * worker_kills + ["server"] * server_kills
    torture.chance.shuffle(kills)
    async with torture:
        for kill in kills:
            await torture.some_progress(torture.chance.randrange(20, 400))
            if kill == "worker":
                await torture.kill_worker()
            else:
                await torture.look()
                await kill_server(durable_server)
                await await_server(durable_server.dsn)
        await torture.some_progress(100)
        await torture.finish(120)
        verdict = await torture.verdict()

    report(
        f"{worker_kills} workers and {server_kills} servers killed: {verdict.events} events stored, "
        f"{len(torture.acknowledged)} acknowledged, {len(torture.uncertain)} uncertain, "
        f"{len(torture.refused)} refused or rolled back; dispatched again: {verdict.doubled}"
    )
    verdict.check()
