"""A worker process dies as told, and what it noted stays."""

from pathlib import Path

import pytest
from cloudevents.core.v1.event import CloudEvent

from pgbackend import Backend
from tests.support.ledger import Ledger
from tests.support.polling import eventually
from tests.support.worker import Worker


async def _produce(backend: Backend, ledger: Ledger, *ids: str) -> None:
    for id_ in ids:
        await backend.produce(CloudEvent({"id": id_, "type": "t", "source": "/s"}))
        ledger.produced.append(id_)


@pytest.mark.slow
async def test_a_killed_worker_leaves_its_notes_and_a_second_one_goes_on(
    backend: Backend, database: str, tmp_path: Path
) -> None:
    ledger = Ledger(tmp_path / "ledger")

    async def all_handled() -> bool:
        return not ledger.lost()

    async with Worker(database, ledger) as first:
        await _produce(backend, ledger, "a", "b")
        await eventually("the first events handled", all_handled)
        first.kill()
        await first.process.wait()
    await _produce(backend, ledger, "c")
    async with Worker(database, ledger) as second:
        await eventually("the last event handled", all_handled, 30)
        await second.stop()
    assert second.pid in {handling.worker for handling in ledger.handled() if handling.id == "c"}
    assert ledger.unknown() == []
