"""The retention of a configuration file is stored with the log."""

from datetime import timedelta

import pytest

from pgbackend import Backend, Retention
from pgbackend.facts import Recorder
from pgbackend.serve.config.load import load
from pgbackend.serve.retaining import retain
from tests.support.databases import Sql


async def test_the_log_has_the_retention_of_the_file_and_keeps_it_without_one(backend: Backend) -> None:
    await retain(backend, load("retention: {keep: PT12H, deadLetters: forever}", origin="broker.yaml"))
    assert await backend.retention() == Retention(keep=timedelta(hours=12))

    await retain(backend, load("triggers: {}", origin="broker.yaml"))
    assert await backend.retention() == Retention(keep=timedelta(hours=12))


@pytest.mark.owner
async def test_a_refused_retention_is_reported_and_stops_nothing(backend: Backend, sql: Sql) -> None:
    await sql.execute("ALTER TABLE pgbackend.retention ADD CONSTRAINT refused CHECK (keep_us > 100000000000)")
    with Recorder() as recorder:
        await retain(backend, load("retention: {keep: PT12H}", origin="broker.yaml"))

    (report,) = recorder.all("retention not set")
    assert "refused" in str(report["error"])
