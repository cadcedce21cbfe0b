import logging
import time

import asyncpg
import pytest

from pgbackend.backend import Backend
from pgbackend.database import Backoff
from pgbackend.facts import Recorder
from pgbackend.torture.proxy import Proxy


def test_a_failure_that_goes_on_is_a_warning_when_it_begins_and_each_thirty_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    backoff = Backoff()
    told: list[int] = []
    for _ in range(65):
        if backoff.failed() == logging.WARNING:
            told.append(backoff.failures)
        now += 1.0
    assert told == [1, 31, 61]
    backoff.reset()
    assert (backoff.failed(), backoff.failures) == (logging.WARNING, 1)


async def test_an_outage_of_postgresql_is_a_few_warnings(database: str, caplog: pytest.LogCaptureFixture) -> None:
    """And not some for each second that it lasts."""
    caplog.set_level(logging.INFO, "pgbackend")
    async with Proxy(database) as proxy, Backend(proxy.dsn, poll_interval=0.1) as backend:
        with Recorder() as recorder:
            await backend.subscribe("s", lambda _: None)
            await recorder.wait("lease claimed")
            proxy.cut()
            for name in ("presence lost", "claim failed"):
                await recorder.wait(name, count=5)
            proxy.restore()
        warnings = [record.getMessage().partition(" failures=")[0] for record in caplog.records]
        assert {name: warnings.count(name) for name in ("presence lost", "claim failed")} == {
            "presence lost": 1, "claim failed": 1,
        }  # fmt: skip


async def test_connections_bear_the_name_that_the_dsn_gives_them(database: str) -> None:
    observer = await asyncpg.connect(database)
    for dsn, name in (
        (database, "pgbackend"),
        (f"{database}{'&' if '?' in database else '?'}application_name=shop", "shop"),
    ):
        with Recorder() as recorder:
            async with Backend(dsn) as backend:
                await backend.subscribe("s", lambda _: None)
                await recorder.wait("lease claimed")
                names = await observer.fetch(
                    "SELECT DISTINCT application_name FROM pg_stat_activity WHERE datname = current_database()"
                    " AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
                )
        assert [row[0] for row in names] == [name]
    await observer.close()
