"""The preview of a seek says what the seek then does."""

import asyncio
from datetime import UTC, datetime

import pytest

from pgbackend import Backend, ConfigError, Event, Retry, SubscriptionNotFoundError
from pgbackend.subscriptions import previews
from tests.support.databases import Sql
from tests.support.events import make_event
from tests.support.polling import eventually


async def _ignore(event: Event) -> None: ...


async def handled(backend: Backend, name: str, count: int, *, shards: int = 1) -> None:
    """The subscription has settled the first `count` events of the log."""
    await backend.subscribe(name, _ignore, start="earliest", shards=shards)

    async def is_there() -> bool:
        (one,) = [one for one in (await backend.status()).subscriptions if one.name == name]
        return all(shard.position >= count and not shard.pending for shard in one.shards)

    running = asyncio.create_task(backend.start())
    await eventually("it has handled them", is_there)
    await backend.unsubscribe(name)
    running.cancel()
    await asyncio.wait({running})


async def numbers(backend: Backend, name: str, place: int | datetime | str) -> tuple[int, int]:
    found = await backend.preview_seek(name, place)  # type: ignore[arg-type] # the test's place is a literal
    return found.again, found.skipped


async def test_a_place_before_the_offset_brings_events_again(backend: Backend) -> None:
    await backend.produce_many([make_event(str(number)) for number in range(10)])
    await handled(backend, "s", 10)
    between = datetime.now(UTC)
    await backend.produce_many([make_event(str(number)) for number in range(5)])
    assert await numbers(backend, "s", "earliest") == (10, 0)
    assert await numbers(backend, "s", 7) == (3, 0)
    assert await numbers(backend, "s", 10) == (0, 0)
    assert await numbers(backend, "s", 12) == (0, 2)
    assert await numbers(backend, "s", "latest") == (0, 5)
    assert await numbers(backend, "s", 4000) == (0, 5)
    assert await numbers(backend, "s", between) == (0, 0)
    assert await numbers(backend, "s", datetime(2020, 1, 1, tzinfo=UTC)) == (10, 0)
    assert await numbers(backend, "s", datetime.now(UTC)) == (0, 5)
    status = await backend.status()
    assert status.subscriptions[0].shards[0].position == 10, "nothing has moved"


async def test_what_is_pending_is_not_dispatched_again_but_may_be_skipped(backend: Backend, sql: Sql) -> None:
    await backend.produce_many([make_event(str(number)) for number in range(10)])
    await handled(backend, "s", 10)
    await sql.execute("UPDATE pgbackend.offsets SET pending = '{[2,4),[8,9)}'")
    assert await numbers(backend, "s", "earliest") == (7, 0)
    assert await numbers(backend, "s", 3) == (6, 2)
    assert await numbers(backend, "s", "latest") == (0, 3)


async def test_shards_count_by_the_keys_of_their_events(
    backend: Backend, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(previews, "_STEP", 7)
    await backend.produce_many([make_event(str(number)) for number in range(50)])
    await handled(backend, "s", 50, shards=2)
    await sql.execute("UPDATE pgbackend.offsets SET position = 20, pending = '{[3,9)}' WHERE shard = 1")
    rows = await sql.fetch(
        "SELECT position, pgbackend.key_hash(partitionkey, subject, source, id) % 2 AS shard FROM pgbackend.events"
    )
    owed = {row["position"] for row in rows if row["shard"] == 1 and (row["position"] > 20 or 3 <= row["position"] < 9)}
    assert owed
    for place in (0, 5, 15, 30, 50):
        expected = (sum(p not in owed for p in range(place + 1, 51)), sum(p <= place for p in owed))
        assert await numbers(backend, "s", place) == expected, place


async def test_old_shards_decide_while_the_number_of_shards_changes(backend: Backend, sql: Sql) -> None:
    await backend.produce_many([make_event(str(number)) for number in range(50)])
    await handled(backend, "s", 50, shards=2)
    await sql.execute("UPDATE pgbackend.offsets SET position = 20 WHERE shard = 1")
    await backend.reshard("s", 3)
    assert await sql.fetchval("SELECT count(*) FROM pgbackend.offsets") == 5, "old and new ones"
    rows = await sql.fetch(
        "SELECT position FROM pgbackend.events "
        "WHERE position > 20 AND pgbackend.key_hash(partitionkey, subject, source, id) % 2 = 1"
    )
    owed = {row["position"] for row in rows}
    for place in (0, 30):
        expected = (sum(p not in owed for p in range(place + 1, 51)), sum(p <= place for p in owed))
        assert await numbers(backend, "s", place) == expected, place


async def test_events_that_wait_to_be_tried_again_are_skipped(backend: Backend) -> None:
    async def fail(event: Event) -> None:
        raise RuntimeError("no")

    await backend.produce_many([make_event(str(number)) for number in range(4)])
    await backend.subscribe("s", fail, start="earliest", retry=Retry(attempts=2, delay=600.0))

    async def all_wait() -> bool:
        return (await backend.status()).subscriptions[0].redeliveries == 4

    running = asyncio.create_task(backend.start())
    await eventually("they wait", all_wait)
    await backend.unsubscribe("s")
    running.cancel()
    await asyncio.wait({running})
    assert await numbers(backend, "s", 3) == (1, 3)
    assert await numbers(backend, "s", datetime.now(UTC)) == (0, 4)


async def test_events_behind_the_end_are_not_owed(backend: Backend) -> None:
    await backend.produce_many([make_event(str(number)) for number in range(10)])
    await backend.subscribe("s", _ignore, start=2, end=6)
    assert await numbers(backend, "s", "latest") == (0, 3)


async def test_positions_without_events_take_no_time(backend: Backend, sql: Sql) -> None:
    """Each cut of a segment leaves up to 10 million positions unused, and removed segments leave all of theirs."""
    await backend.produce_many([make_event(str(number)) for number in range(3)])
    await backend.subscribe("s", _ignore, start=1)
    await sql.execute("SELECT setval('pgbackend.events_position_seq', 999999999999)")
    await backend._lifecycle.opened().retainer.run_once()
    await backend.produce_many([make_event(str(number)) for number in range(4)])
    async with asyncio.timeout(20):
        assert await numbers(backend, "s", "latest") == (0, 6)
        assert await numbers(backend, "s", "earliest") == (1, 0)


async def test_a_seek_that_cannot_be_has_no_preview(backend: Backend) -> None:
    with pytest.raises(SubscriptionNotFoundError):
        await backend.preview_seek("nobody", 0)
    with pytest.raises(ConfigError):
        await backend.preview_seek("nobody", -1)
