"""`Backend.seek`, and places that a failover makes void."""

import asyncio
from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest

from pgbackend import Backend, ConfigError
from pgbackend.subscriptions.locator import Locator
from tests.support.backends import SOON, produce, settled
from tests.support.databases import clock
from tests.support.dispatchers import Catch
from tests.support.events import make_event
from tests.support.polling import eventually


@pytest.mark.parametrize("started", [True, False])
async def test_after_a_seek_the_next_event_is_the_first_behind_the_place(
    log: Backend, database: str, started: bool
) -> None:
    catch = Catch()
    await log.subscribe("s", catch, order="strict")
    if not started:
        await log.unsubscribe("s")
    await log.seek("s", 6)
    if not started:
        await log.subscribe("s", catch, order="strict")
    await produce(log, "10")
    await settled(log)
    assert catch.ids == ["6", "7", "8", "9", "10"]

    catch.ids.clear()
    date = await clock(database)
    await produce(log, "11")
    await log.seek("s", date)
    await catch.has("11")
    await settled(log)
    assert catch.ids[-1:] == ["11"]
    assert "10" not in catch.ids

    await log.seek("s", "earliest")
    await catch.has("0")
    await settled(log)
    await log.seek("s", "latest")
    catch.ids.clear()
    await produce(log, "12")
    await settled(log)
    assert catch.ids == ["12"]


async def test_a_seek_reaches_the_process_that_runs_the_subscription_with_its_date(log: Backend, database: str) -> None:
    catch = Catch()
    async with Backend(database, **SOON) as other:
        date = await clock(database)
        await other.subscribe("s", catch, start=date)
        await produce(log, "10")
        await catch.has("10")
        # Events before the date are wanted now, so the owner must drop the date, too.
        await log.seek("s", 5)
        await catch.has("5", "6", "7", "8", "9")
        now = await clock(database)
        await log.seek("s", now)
        await settled(log)
        catch.ids.clear()
        await log.seek("s", date)
        await catch.has("10")
        await settled(log)

    assert catch.ids == ["10"]


async def test_after_a_seek_nothing_is_dispatched_from_the_old_place(database: str) -> None:
    async with Backend(database, **SOON) as backend:
        await backend.produce_many([make_event(str(number)) for number in range(500)])
        catch = Catch()
        await backend.subscribe("s", catch, start="earliest", order="strict")
        await catch.has("20")
        await backend.seek("s", 490)
        before = len(catch.ids)
        await settled(backend)

    assert catch.ids[before:] == [str(number) for number in range(490, 500)]


async def test_a_seek_drops_the_redeliveries(log: Backend) -> None:
    catch = Catch(fails=lambda event: event.id == "10")
    await log.subscribe("s", catch)
    await produce(log, "10")

    async def has_failed() -> bool:
        return (await log.status()).subscriptions[0].redeliveries == 1

    await eventually("a redelivery is scheduled", has_failed)
    await log.seek("s", "latest")

    assert (await log.status()).subscriptions[0].redeliveries == 0


async def test_a_seek_drops_a_redelivery_that_is_committed_while_it_waits(log: Backend, database: str) -> None:
    """The commit holds the row's lock and schedules redeliveries, so the seek must not rely on an old snapshot."""
    await log.subscribe("s", Catch())
    await log.unsubscribe("s")
    owner, other = await asyncpg.connect(database), await asyncpg.connect(database)
    await owner.execute("BEGIN")
    await owner.execute("UPDATE pgbackend.offsets SET position = 10")
    await owner.execute(
        "INSERT INTO pgbackend.redeliveries (subscription, position, key_hash, attempt, due_at, last_error)"
        " SELECT 's', position, pgbackend.key_hash(partitionkey, subject, source, id),"
        " 1, now(), 'no' FROM pgbackend.events WHERE position IN (1, 9)"
    )
    seeking = asyncio.create_task(log.seek("s", 7))

    async def waits() -> bool:
        return bool(await other.fetch("SELECT FROM pg_locks WHERE NOT granted"))

    await eventually("the seek waits for the row", waits)
    await owner.execute("COMMIT")
    await owner.close()
    await other.close()
    await seeking
    catch = Catch()
    await log.subscribe("s", catch)
    await settled(log)

    assert sorted(catch.ids) == ["7", "8", "9"]


async def test_a_seek_that_is_refused_leaves_the_subscription_running(log: Backend) -> None:
    catch = Catch()
    await log.subscribe("s", catch)
    with pytest.raises(ConfigError):
        await log.seek("s", 1 << 63)
    await produce(log, "10")
    await catch.has("10")


async def test_a_backend_that_is_not_started_subscribes_and_seeks_after_a_crash_too(database: str) -> None:
    backend = Backend(database)
    await backend.init()
    connection = await asyncpg.connect(database)
    await connection.execute("TRUNCATE pgbackend.incarnation")  # what a crash does
    await backend.produce(make_event("a"))
    await backend.subscribe("s", print)
    await backend.seek("s", 0)
    await backend.seek("s", datetime.now(UTC))
    await connection.execute("UPDATE pgbackend.incarnation SET id = gen_random_uuid()")
    await connection.close()
    await backend.seek("s", "latest")
    await backend.stop()


# Failing over in the middle.


@pytest.mark.parametrize("verb", ["subscribe", "seek", "alter"])
async def test_a_place_found_before_a_failover_is_not_stored_after_it(
    backend: Backend, database: str, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """The log may be shorter then, so new events would get positions at or below the offset, and be skipped."""
    await backend.produce_many([make_event(str(number)) for number in range(10)])
    if verb != "subscribe":
        await backend.subscribe("s", print, start="earliest")
    connection = await asyncpg.connect(database)
    locate, found = Locator.locate, []

    async def locate_then_fail_over(self: Locator, place: Any) -> Any:
        offset = await locate(self, place)
        found.append(offset.position)
        if len(found) == 1:
            await connection.execute("DELETE FROM pgbackend.events WHERE position > 4")
            await connection.execute("SELECT setval('pgbackend.events_position_seq', 4)")
            await connection.execute("DELETE FROM pgbackend.incarnation")
        return offset

    monkeypatch.setattr(Locator, "locate", locate_then_fail_over)
    if verb == "subscribe":
        await backend.subscribe("s", print)
    elif verb == "seek":
        await backend.seek("s", "latest")
    else:
        await backend.alter_subscription("s", order="none", end=None, start=9)
    stored = await connection.fetchval("SELECT position FROM pgbackend.offsets")
    await connection.close()

    assert found == [9 if verb == "alter" else 10, 4]
    assert stored == 4
