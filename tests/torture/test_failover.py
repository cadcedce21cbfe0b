"""Real runs in which the primary is killed and its synchronous standby takes over, again and again."""

import tempfile
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from pgbackend.torture.plan import Name, Plan
from pgbackend.torture.proxy import Proxy
from pgbackend.torture.run import run
from pgbackend.torture.server import Mode
from tests.support.figures import report
from tests.support.standby import Pair

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Cluster:
    """A primary and its synchronous standby, behind one address: a server that a run may restart."""

    def __init__(self, pair: Pair, front: Proxy) -> None:
        self._pair = pair
        self._front = front

    @property
    def dsn(self) -> str:
        return self._front.dsn

    @property
    def directory(self) -> Path:
        return self._pair.primary.directory

    async def restart(self, mode: Mode) -> None:
        assert mode == "failover"
        self._pair.kill()
        await self._pair.promote()
        self._front.redirect(self._pair.primary.dsn)

    async def repair(self) -> None:
        await self._pair.rejoin()
        await self._pair.synchronous()


@pytest.fixture
async def cluster(pg_programs: Path) -> AsyncIterator[Cluster]:
    # The servers' user must be able to enter it; pytest's own directories are private.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        Path(directory).chmod(0o755)
        async with Pair(Path(directory), programs=pg_programs, settings={"fsync": "off"}) as pair:
            await pair.synchronous()
            async with Proxy(pair.primary.dsn) as front:
                yield Cluster(pair, front)


@pytest.mark.parametrize("name", ["bank", "orders"])
async def test_failovers_cost_no_transfer_and_no_order(name: Name, cluster: Cluster, long: bool) -> None:
    plan = Plan.make(1, 180.0 if long else 30.0, server=True, name=name)
    steps = [replace(step, kind="server failover") if step.target == "server" else step for step in plan.steps]
    result = await run(replace(plan, steps=tuple(steps)), server=cluster)
    report(result.text())
    assert result.verdict.faults["server failover"] >= 2
    assert result.verdict.outcome == "kept"
