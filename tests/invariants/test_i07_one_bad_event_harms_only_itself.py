"""I7. One bad event harms only itself, and one dead target only its own subscription."""

import asyncio
import time

import pytest

from pgbackend import Backend, Event, Reject, Retry, facts
from pgbackend.model import Order
from tests.support.databases import Sql
from tests.support.dispatchers import Catch
from tests.support.events import make_event
from tests.support.figures import report
from tests.support.polling import eventually


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("order", ["none", pytest.param("key", marks=pytest.mark.long)])
async def test_an_hours_outage_of_a_target_buries_nothing_and_harms_no_other(
    database: str, sql: Sql, long: bool, order: Order
) -> None:
    """The hour and the delays of `Retry()`, 1 s to 600 s, are shortened by the same factor."""
    factor = 60 if long else 720
    hour = 3600 / factor
    retry = Retry(delay=1 / factor, max_delay=600 / factor)
    outage = True
    dead, alive = Catch(fails=lambda _: outage), Catch()
    ids: list[str] = []
    async with Backend(database) as backend:
        await backend.subscribe("dead", dead, retry=retry, order=order)
        await backend.subscribe("alive", alive, retry=retry, order=order)
        with facts.Recorder() as recorder:
            began = time.monotonic()
            while time.monotonic() - began < hour:
                events = [f"{len(ids) + number}" for number in range(10)]
                await backend.produce_many([make_event(id_, key=id_) for id_ in events])
                ids += events
                await asyncio.sleep(hour / 100)
            attempts = len(dead.attempts)
            buried = await sql.fetchval("SELECT count(*) FROM pgbackend.dead_letters")
            outage = False
            restored = time.monotonic()
            await alive.has(*ids)
            await dead.has(*ids, timeout=600 / factor + 20)
        took = time.monotonic() - restored

        async def is_settled() -> bool:
            return not await sql.fetchval("SELECT count(*) FROM pgbackend.redeliveries")

        await eventually("no redelivery is left", is_settled)

    report(
        f"order {order}, {len(ids)} events in an hour's outage compressed by {factor}: {attempts} attempts, {buried} "
        f"buried; all handled {took * factor:.0f} s after its end in uncompressed time ({took:.1f} s)"
    )
    assert buried == 0
    assert not recorder.all("event buried")
    # The first events at once, up to the concurrency, then single probes.
    assert attempts < 64 * 2 + 100
    assert sorted(dead.ids) == sorted(ids)


@pytest.mark.parametrize("order", ["none", pytest.param("key", marks=pytest.mark.long)])
async def test_a_run_of_bad_events_does_not_stop_the_good_ones(database: str, order: Order) -> None:
    catch = Catch(fails=lambda event: event.id.startswith("bad"))
    good = [f"good {number}" for number in range(50)]
    async with Backend(database) as backend:
        await backend.subscribe("billing", catch, order=order, concurrency=8, retry=Retry(attempts=3, delay=0.05))
        await backend.produce_many([make_event(f"bad {number}", key=f"bad {number}") for number in range(300)])
        await backend.produce_many([make_event(id_, key=id_) for id_ in good])
        await catch.has(*good, timeout=60)

    assert sorted(catch.ids) == sorted(good)


@pytest.mark.parametrize("order", ["none", "key", "strict"])
async def test_a_bad_event_among_good_ones_is_buried_after_its_attempts(database: str, order: Order) -> None:
    catch = Catch(fails=lambda event: event.id == "bad")
    good = [str(number) for number in range(40)]
    async with Backend(database) as backend:
        await backend.subscribe("billing", catch, order=order, retry=Retry(attempts=3, delay=0.01))
        await backend.produce_many([make_event(id_, key="one") for id_ in [*good[:20], "bad", *good[20:]]])
        await catch.has(*good)

        async def letters() -> list[tuple[str, int, str]]:
            return [
                (letter.event.id, letter.failure.attempts, letter.failure.error)
                async for letter in backend.dead_letters("billing")
            ]

        buried = await eventually("the bad event is buried", letters)

    assert buried == [("bad", 3, "RuntimeError: the target is down")]
    assert catch.attempts.count("bad") == 3
    assert sorted(catch.ids) == sorted(good)
    if order != "none":
        assert catch.ids == good


async def test_a_rejected_event_is_buried_at_once_and_can_be_sent_again(database: str) -> None:
    mended = False
    handled = asyncio.Event()

    async def dispatch(event: Event) -> None:
        if not mended:
            raise Reject("not a bill", details={"field": "amount"})
        handled.set()

    async with Backend(database) as backend:
        await backend.subscribe("billing", dispatch)
        await backend.produce(make_event("bad"))

        async def letters() -> list[tuple[int, dict[str, str]]]:
            return [
                (letter.failure.attempts, dict(letter.failure.details))
                async for letter in backend.dead_letters("billing")
            ]

        assert await eventually("it is buried", letters) == [(1, {"field": "amount"})]
        mended = True
        assert await backend.redeliver(subscription="billing") == 1
        await asyncio.wait_for(handled.wait(), 10)

        async def none_left() -> bool:
            return not await letters()

        await eventually("the dead letter is gone", none_left)


@pytest.mark.parametrize("order", ["none", "key"])
async def test_the_next_owner_retries_failed_events(database: str, sql: Sql, order: Order) -> None:
    """It goes on counting attempts where the former owner stopped."""
    first = Catch(fails=lambda _: True)
    ids = [str(number) for number in range(5)]
    retry = Retry(attempts=3, delay=60.0, backoff="constant")
    attempts: list[int] = []

    async def second(event: Event) -> None:
        attempts.append(event.attempt)
        await catch(event)

    catch = Catch()
    async with Backend(database) as backend:
        await backend.subscribe("billing", first, order=order, retry=retry)
        await backend.produce_many([make_event(id_, key=id_) for id_ in ids])

        async def all_failed() -> bool:
            return len(first.attempts) >= len(ids)

        await eventually("each has failed once", all_failed)
    await sql.execute("UPDATE pgbackend.redeliveries SET due_at = now()")
    async with Backend(database) as backend:
        await backend.subscribe("billing", second, order=order, retry=retry)
        await catch.has(*ids)

    assert attempts == [2] * len(ids)
    assert len(first.attempts) == len(ids)


@pytest.mark.parametrize("order", ["none", "key"])
async def test_a_dead_target_does_not_hold_back_the_dead_letter_dispatcher(database: str, order: Order) -> None:
    dead, letters = Catch(fails=lambda _: True), Catch()
    ids = [str(number) for number in range(12)]
    async with Backend(database) as backend:
        await backend.subscribe(
            "billing", dead, order=order, concurrency=2, retry=Retry(attempts=1, delay=60.0), dead_letter=letters
        )
        await backend.produce_many([make_event(id_, key=id_) for id_ in [*ids, "behind", "them"]])
        # Ten failures in a row make the target down: nothing is dispatched to it for a minute.
        await letters.has(*ids[:10])
        state = {found.name: found.state for found in (await backend.status()).subscriptions}

    assert state == {"billing": "target down"}
    assert "them" not in dead.attempts


async def test_a_window_that_is_full_behind_a_failing_key_is_reported_and_goes_on(database: str) -> None:
    failing = True
    catch = Catch(fails=lambda event: failing and event.id == "hot 0")
    retry = Retry(attempts=1000, delay=0.1, backoff="constant")
    async with Backend(database, window_events=10, commit_interval=0.01) as backend:
        await backend.subscribe("s", catch, order="key", retry=retry)
        await backend.produce_many([make_event(f"hot {number}", key="hot") for number in range(10)])
        await backend.produce(make_event("other", key="other"))

        async def is_reported() -> bool:
            (found,) = (await backend.status()).subscriptions
            return found.state == "waiting for failed events: the window is full behind them"

        await eventually("its state tells why it waits", is_reported)
        assert catch.ids == []
        failing = False
        await catch.has("other", *(f"hot {number}" for number in range(10)))

    assert [id_ for id_ in catch.ids if id_ != "other"] == [f"hot {number}" for number in range(10)]
