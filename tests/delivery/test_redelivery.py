import asyncio
from collections import Counter
from typing import Any

import asyncpg
import pytest
from cloudevents.core.v1.event import CloudEvent

from pgbackend import Backend, ConfigError, Event, Reject, Retry, SubscriptionNotFoundError
from pgbackend.delivery import redeliverer
from pgbackend.postgres.pool import Database
from tests.support.backends import dead_letters, settled, waiting
from tests.support.dispatchers import Catch
from tests.support.events import make_event
from tests.support.polling import eventually

SETTINGS: dict[str, Any] = {"commit_interval": 0.01, "poll_interval": 0.1}


async def reject(event: Event) -> None:
    raise Reject("no", details={"id": event.id})


def of_60_kb(id_: str, *, attributes: bool) -> CloudEvent:
    text = "x" * 60_000
    given = {"id": id_, "source": "test", "type": "test", "datacontenttype": "text/plain"}
    return CloudEvent(given | {"subject": text}) if attributes else CloudEvent(given, text)


@pytest.mark.parametrize("attributes", [False, True])
@pytest.mark.parametrize("letters_too", [False, True])
async def test_what_is_due_again_stays_within_the_bytes_of_a_window(
    database: str, *, attributes: bool, letters_too: bool
) -> None:
    at_work: set[str] = set()
    most = handled = 0

    async def handle(event: Event) -> None:
        nonlocal most, handled
        at_work.add(event.id)
        most = max(most, len(at_work))
        await asyncio.sleep(0.01)
        at_work.discard(event.id)
        handled += 1

    async def all_handled() -> bool:
        return handled == 60

    async with Backend(database, window_bytes=1_000_000, **SETTINGS) as backend:
        await backend.produce_many([of_60_kb(str(n), attributes=attributes) for n in range(60)])
        await backend.subscribe("s", handle if not letters_too else reject)
        if letters_too:
            await backend.seek("s", "earliest")
            await dead_letters(backend, 60)
            await backend.reconfigure("s", handle)
            await backend.redeliver(subscription="s")
        else:
            connection = await asyncpg.connect(database)
            await connection.execute("""
                INSERT INTO pgbackend.redeliveries (subscription, position, key_hash, attempt, due_at, last_error)
                SELECT 's', position, pgbackend.key_hash(partitionkey, subject, source, id),
                    1, now(), 'failed' FROM pgbackend.events""")
            await connection.close()
        await eventually("all are handled", all_handled)

    assert most <= 1 + 1_000_000 // 60_000


@pytest.mark.parametrize("attributes", [False, True])
async def test_dead_letters_are_listed_in_pages_that_end_by_bytes(
    database: str, monkeypatch: pytest.MonkeyPatch, *, attributes: bool
) -> None:
    async with Backend(database, **SETTINGS) as backend:
        await backend.subscribe("s", reject)
        await backend.produce_many([make_event(str(n)) for n in range(120)])
        await dead_letters(backend, 120)
        connection = await asyncpg.connect(database)
        text = "convert_to(repeat('x', 1000000), 'UTF8')"
        column = f"subject = encode({text}, 'escape')" if attributes else f"data = {text}"
        await connection.execute(f"UPDATE pgbackend.dead_letters SET {column} WHERE letter_id % 2 = 0")
        await connection.close()
        pages: list[int] = []
        fetch = Database.fetch

        async def measured(self: Database, statement: str, *args: Any, **options: Any) -> Any:
            rows = await fetch(self, statement, *args, **options)
            if "list_letters" in statement:
                pages.append(sum(len(row["subject"] or "") + len(row["data"] or b"") for row in rows))
            return rows

        monkeypatch.setattr(Database, "fetch", measured)
        listed = [letter.event.id async for letter in backend.dead_letters("s")]

    assert listed == [str(n) for n in range(120)]
    assert sum(pages) == 60_000_000
    assert max(pages) <= 17_000_000


async def test_an_event_that_waits_to_be_tried_again_is_tried_after_a_restart_and_its_attempts_count_on(
    database: str,
) -> None:
    retry = Retry(attempts=3, delay=0.3, backoff="constant")
    async with Backend(database, **SETTINGS) as backend:
        await backend.subscribe("s", Catch(fails=lambda _: True), retry=retry)
        await backend.produce_many([make_event(str(number), b"x" * number) for number in range(5)])
        await waiting(backend, 5)
        (status,) = (await backend.status()).subscriptions
        assert status.last_error == "RuntimeError: the target is down"
    got: list[tuple[str, int, bytes | None]] = []

    async def keep(event: Event) -> None:
        got.append((event.id, event.attempt, event.data_bytes))

    async with Backend(database, **SETTINGS) as backend:
        await backend.subscribe("s", keep, retry=retry)
        await settled(backend)

    assert sorted(got) == [(str(number), 2, b"x" * number) for number in range(5)]


async def test_an_event_is_tried_again_at_its_time_and_not_before(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The time of a due event is known where it was scheduled: no waiting for the next look.
    monkeypatch.setattr(redeliverer, "_LONGEST_WAIT", 600.0)
    at: list[float] = []
    loop = asyncio.get_running_loop()

    async def fail(event: Event) -> None:
        at.append(loop.time())
        raise RuntimeError

    retry = Retry(attempts=3, delay=0.2, backoff="linear")
    async with Backend(database, commit_interval=0.01, poll_interval=600.0) as backend:
        await backend.subscribe("s", fail, retry=retry)
        await backend.produce(make_event("a"))
        await dead_letters(backend, 1)

    assert at[1] - at[0] >= 0.2
    assert at[2] - at[1] >= 0.4


async def test_under_failures_of_every_kind_each_event_is_tried_just_as_often_as_it_needs(database: str) -> None:
    attempts: Counter[str] = Counter()
    doubled: list[tuple[str, int]] = []

    async def flaky(event: Event) -> None:
        attempts[event.id] += 1
        if attempts[event.id] != event.attempt:
            doubled.append((event.id, event.attempt))
        await asyncio.sleep(0.001 * (int(event.id) % 3))
        if event.attempt <= int(event.id) % 4:
            raise RuntimeError("not yet")

    async with Backend(database, **SETTINGS) as backend:
        await backend.subscribe("s", flaky, shards=2, retry=Retry(attempts=10, delay=0.0))
        await backend.produce_many([make_event(str(number)) for number in range(400)])
        await settled(backend)

    assert doubled == []
    assert attempts == {str(number): number % 4 + 1 for number in range(400)}


async def test_more_events_than_fit_at_once_are_all_tried_again(database: str) -> None:
    catch = Catch(fails=lambda _: not ready)
    ready = False
    async with Backend(database, **SETTINGS, window_events=50) as backend:
        # Every other event succeeds, so that the target does not count as down.
        await backend.subscribe(
            "s", lambda event: catch(event) if int(event.id) % 2 else asyncio.sleep(0), retry=Retry(delay=2.0),
            concurrency=1,
        )  # fmt: skip
        await backend.produce_many([make_event(str(number)) for number in range(1000)])
        await waiting(backend, 500)
        ready = True
        await settled(backend)

    assert sorted(catch.ids, key=int) == [str(number) for number in range(1, 1000, 2)]


async def test_a_target_that_is_down_does_not_hold_what_is_for_the_dead_letter_dispatcher(
    database: str, backend: Backend
) -> None:
    observer = await asyncpg.connect(database)
    dead = Catch()
    await backend.produce_many([make_event(str(number)) for number in range(260)])
    await backend.subscribe("s", print, start="earliest")
    await backend.unsubscribe("s")
    await observer.execute("UPDATE pgbackend.offsets SET position = 260")
    # More than are looked for at a time, and behind them one that was given up.
    await observer.execute(
        """
        INSERT INTO pgbackend.redeliveries (subscription, position, key_hash, attempt, due_at, last_error, failure)
        SELECT 's', position, pgbackend.key_hash(partitionkey, subject, source, id),
            1, now() + make_interval(secs => position::float8 / 1000 - 1), 'it failed',
            CASE WHEN id = '259' THEN '{"error": "no", "attempts": 1, "details": {}}' END::jsonb
        FROM pgbackend.events
        """
    )
    await observer.close()

    async def down(event: Event) -> None:
        raise RuntimeError("down")

    async with Backend(database, **SETTINGS) as running:
        await running.subscribe("s", down, dead_letter=dead, retry=Retry(attempts=1000, delay=5.0))
        await dead.has("259")
    assert dead.ids == ["259"]


async def test_dead_letters_carry_their_event_and_are_listed_by_subscription(database: str) -> None:
    async with Backend(database, **SETTINGS) as backend:
        await backend.subscribe("s", reject)
        await backend.subscribe("other", reject)
        await backend.produce_many([make_event(str(number), b"data") for number in range(3)])
        mine = await dead_letters(backend, 3, "s")
        everybodys = await dead_letters(backend, 6)
        assert [letter async for letter in backend.dead_letters("nobody's")] == []

    assert {letter.subscription for letter in everybodys} == {"s", "other"}
    assert [letter.id for letter in everybodys] == sorted(letter.id for letter in everybodys)
    assert sorted(letter.event.id for letter in mine) == ["0", "1", "2"]
    for letter in mine:
        assert letter.event.data_bytes == b"data"
        assert letter.failure.details == {"id": letter.event.id}
        assert letter.event.failure == letter.failure
        assert letter.due_at is None


async def test_more_dead_letters_than_a_page_are_listed_once_each(database: str) -> None:
    async with Backend(database, **SETTINGS) as backend:
        await backend.subscribe("s", reject)
        await backend.produce_many([make_event(str(number)) for number in range(250)])
        found = await dead_letters(backend, 250)

    assert len({letter.id for letter in found}) == 250


async def test_a_dead_letter_that_is_redelivered_and_handled_is_gone(database: str) -> None:
    is_fixed = False
    handled: list[tuple[str, int]] = []

    async def handle(event: Event) -> None:
        if not is_fixed:
            raise Reject("no")
        handled.append((event.id, event.attempt))

    async with Backend(database, **SETTINGS) as backend:
        await backend.subscribe("s", handle)
        await backend.produce_many([make_event(id_) for id_ in "abc"])
        found = await dead_letters(backend, 3)
        is_fixed = True
        (chosen,) = [letter for letter in found if letter.event.id == "b"]
        assert await backend.redeliver(chosen.id) == 1
        await dead_letters(backend, 2)
        assert handled == [("b", 1)]
        assert await backend.redeliver(subscription="s") == 2
        await settled(backend)

        async def none_left() -> bool:
            return not [letter async for letter in backend.dead_letters()]

        await eventually("no dead letters", none_left)

    assert sorted(handled) == [("a", 1), ("b", 1), ("c", 1)]


async def test_a_redelivered_letter_that_fails_again_rests_again_after_all_its_attempts(database: str) -> None:
    catch = Catch(fails=lambda _: True)
    retry = Retry(attempts=2, delay=0.01)
    async with Backend(database, **SETTINGS) as backend:
        await backend.subscribe("s", catch, retry=retry)
        await backend.produce(make_event("a"))
        (letter,) = await dead_letters(backend, 1)
        assert await backend.redeliver(letter.id) == 1

        async def rests_again() -> bool:
            (again,) = [letter async for letter in backend.dead_letters()]
            return again.due_at is None and again.failure.attempts == 4

        await eventually("it failed again", rests_again)

    assert catch.attempts == ["a"] * 4


async def test_a_letter_is_sent_where_its_subscription_runs_also_later(database: str) -> None:
    async with Backend(database, **SETTINGS) as backend:
        await backend.subscribe("s", reject)
        await backend.produce(make_event("a"))
        (letter,) = await dead_letters(backend, 1)
    backend = Backend(database)
    await backend.init()
    assert await backend.redeliver(letter.id) == 1
    assert await backend.redeliver(letter.id) == 0, "it is on its way"
    assert await backend.redeliver(999_999) == 0
    (again,) = [letter async for letter in backend.dead_letters()]
    assert again.due_at is not None
    await backend.stop()
    catch = Catch()
    async with Backend(database, **SETTINGS) as backend:
        await backend.subscribe("s", catch)
        await catch.has("a")

    assert catch.ids == ["a"]


async def test_a_letter_is_delivered_though_its_event_has_left_the_log(database: str) -> None:
    catch = Catch(fails=lambda event: event.attempt == 1 and not is_fixed)
    is_fixed = False
    async with Backend(database, **SETTINGS) as backend:
        await backend.subscribe("s", catch, retry=Retry(attempts=1))
        await backend.produce(make_event("a", b"kept"))
        (letter,) = await dead_letters(backend, 1)
        connection = await asyncpg.connect(database)
        await connection.execute("DELETE FROM pgbackend.events")
        await connection.close()
        is_fixed = True
        await backend.redeliver(letter.id)
        await catch.has("a")


@pytest.mark.parametrize("order", ["key", "strict"])
async def test_letters_of_ordered_subscriptions_are_redelivered_too(database: str, order: Any) -> None:
    is_fixed = False
    catch = Catch()

    async def handle(event: Event) -> None:
        if not is_fixed:
            raise Reject("no")
        await catch(event)

    async with Backend(database, **SETTINGS) as backend:
        await backend.subscribe("s", handle, order=order)
        await backend.produce_many([make_event(id_, key="k") for id_ in "ab"])
        await dead_letters(backend, 2)
        is_fixed = True
        assert await backend.redeliver(subscription="s") == 2
        await catch.has("a", "b")


async def test_redeliver_needs_to_know_what(backend: Backend) -> None:
    with pytest.raises(ConfigError):
        await backend.redeliver()
    with pytest.raises(SubscriptionNotFoundError, match="nobody"):
        await backend.redeliver(subscription="nobody")
