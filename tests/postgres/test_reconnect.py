import logging
import time

import pytest

from pgbackend.backend import Backend
from pgbackend.facts import Recorder
from pgbackend.postgres.reconnect import GrowingDelay
from pgbackend.torture.proxy import Proxy


def test_a_lasting_failure_is_a_warning_at_first_and_every_thirty_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    delay = GrowingDelay()
    warned: list[int] = []
    for _ in range(65):
        if delay.failed() == logging.WARNING:
            warned.append(delay.failures)
        now += 1.0
    assert warned == [1, 31, 61]
    delay.reset()
    assert (delay.failed(), delay.failures) == (logging.WARNING, 1)


async def test_an_outage_of_postgresql_causes_one_warning_of_each_kind(
    database: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pgbackend")
    async with Proxy(database) as proxy, Backend(proxy.dsn, poll_interval=0.1) as backend:
        with Recorder() as recorder:
            await backend.subscribe("s", lambda _: None)
            await recorder.wait("lease claimed")
            proxy.cut()
            for name in ("presence lost", "claim failed"):
                await recorder.wait(name, timeout=25, count=5)
            proxy.restore()
        warnings = [record.getMessage().partition(" failures=")[0] for record in caplog.records]
        assert {name: warnings.count(name) for name in ("presence lost", "claim failed")} == {
            "presence lost": 1, "claim failed": 1,
        }  # fmt: skip
