"""Django's `on_commit` tells consumers of events, once for each transaction that commits."""

from collections.abc import AsyncIterator

import pytest

from pgbackend.facts import Recorder
from pgbackend.log.notify import channel
from pgbackend.outbox import synchronous
from tests.support.databases import Sql, connected
from tests.support.events import make_event
from tests.support.outbox import Harness, opened
from tests.support.polling import eventually

pytestmark = [pytest.mark.direct, pytest.mark.owner]


@pytest.fixture
async def heard(database: str) -> AsyncIterator[list[object]]:
    """The payloads of notifications about the log."""
    heard: list[object] = []
    async with connected(database) as listener:
        await listener.add_listener(channel("pgbackend"), lambda *args: heard.append(args[-1]))
        yield heard


@pytest.fixture
async def django(database: str) -> AsyncIterator[Harness]:
    async with opened("django", database) as harness:
        yield harness


async def mark(django: Harness, heard: list[object]) -> None:
    """All notifications that were sent so far have been heard."""
    await django.execute(f"SELECT pg_notify('{channel('pgbackend')}', 'mark')")
    await eventually("the mark is heard", lambda: "mark" in heard)


async def test_a_commit_is_followed_by_one_notify(django: Harness, heard: list[object]) -> None:
    await django.begin()
    await django.produce(make_event("a"))
    await django.produce(make_event("b"), make_event("c"))
    await django.commit()

    await mark(django, heard)
    assert heard == ["outbox", "mark"]


async def test_a_rollback_is_followed_by_none(django: Harness, heard: list[object]) -> None:
    await django.begin()
    await django.produce(make_event("a"))
    await django.rollback()

    await mark(django, heard)
    assert heard == ["mark"]


async def test_an_event_after_a_savepoint_that_was_rolled_back_is_told_of(django: Harness, heard: list[object]) -> None:
    await django.begin()
    await django.savepoint()
    await django.produce(make_event("a"))
    await django.rollback_to_savepoint()
    await django.produce(make_event("b"))
    await django.commit()

    await mark(django, heard)
    assert heard == ["outbox", "mark"]


async def test_a_notify_that_fails_leaves_the_request_alone(
    django: Harness, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synchronous, "notification", lambda *_: ("SELECT 1 / %s", 0))
    with Recorder() as recorder:
        await django.begin()
        await django.produce(make_event("a"))
        await django.commit()

    (fact,) = recorder.all("notify failed")
    assert "division by zero" in str(fact["error"])
    assert await sql.fetchval("SELECT count(*) FROM pgbackend.events") == 1
    await django.begin()
    await django.produce(make_event("b"))
    await django.rollback()
