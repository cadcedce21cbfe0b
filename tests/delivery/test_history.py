"""The history of failed events: each attempt and what became of it, in every order and kind of dispatcher."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from pgbackend import Backend, DeadLetter, Event, HistoryEntry, Retry
from pgbackend.delivery.history import Step, joined, to_entry
from pgbackend.model import Order
from tests.support.backends import dead_letters, failed, produce, running, settled
from tests.support.polling import eventually

ORDERS: tuple[Order, ...] = ("none", "key", "strict")
NO_WAIT = Retry(attempts=3, delay=0.0)
LATE = Retry(attempts=9, delay=600.0)
Steps = list[tuple[str, int | None, str | None]]
BURIED = ("buried", None, None)


def steps(history: tuple[HistoryEntry, ...]) -> Steps:
    return [(entry.what, entry.attempt, entry.error) for entry in history]


def tries(count: int) -> Steps:
    return [("failed", attempt, f"RuntimeError: no {attempt}") for attempt in range(1, count + 1)]


async def refuse(event: Event, *_: object) -> None:
    raise RuntimeError(f"no {event.attempt}")


async def waits(backend: Backend, history: Steps) -> None:
    """The only event that waits has this history."""

    async def has_it() -> bool:
        return [steps(event.history) async for event in backend.waiting("s")] == [history]

    await eventually("the event waits with its history", has_it)


async def buried_again(backend: Backend, letter: DeadLetter) -> DeadLetter:
    """The only dead letter, once it has come back, and is at rest."""

    async def is_back() -> DeadLetter | None:
        (found,) = await dead_letters(backend, 1)
        return found if found.due_at is None and len(found.history) > len(letter.history) + 1 else None

    return await eventually("the letter is at rest again", is_back)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("transactional", [False, True])
async def test_a_dead_letter_has_its_attempts_in_their_order(
    database: str, order: Order, *, transactional: bool
) -> None:
    began = datetime.now(UTC)
    async with running(database) as backend:
        await backend.subscribe("s", refuse, order=order, retry=NO_WAIT, transactional=transactional)
        await produce(backend, "a")
        (letter,) = await dead_letters(backend, 1)
        await settled(backend)

    assert steps(letter.history) == [*tries(3), BURIED]
    times = [entry.at for entry in letter.history]
    assert times == sorted(times)
    assert began - timedelta(seconds=1) < times[0]
    assert times[-1] < datetime.now(UTC) + timedelta(seconds=1)


@pytest.mark.parametrize("order", ORDERS)
async def test_what_waits_has_its_history_in_every_process_and_after_a_restart(database: str, order: Order) -> None:
    async with running(database) as operator:
        for attempt in (1, 2):
            async with running(database) as owner:
                await owner.subscribe("s", refuse, order=order, retry=LATE)
                if attempt == 1:
                    await produce(owner, "a")
                else:
                    await owner.retry_now("s")
                await waits(operator, tries(attempt))
        async with running(database) as owner, running(database) as other:
            await owner.subscribe("s", refuse, order=order, retry=Retry(attempts=3, delay=600.0))
            await other.subscribe("s", refuse, order=order, retry=Retry(attempts=3, delay=600.0))
            await operator.retry_now("s")
            (letter,) = await dead_letters(operator, 1)

    assert steps(letter.history) == [*tries(3), BURIED]


@pytest.mark.parametrize("order", ORDERS)
async def test_attempts_of_the_dead_letter_dispatcher_come_after_it_was_given_up(database: str, order: Order) -> None:
    async with running(database) as backend:
        await backend.subscribe("s", refuse, order=order, retry=NO_WAIT, dead_letter=refuse)
        await produce(backend, "a")
        (letter,) = await dead_letters(backend, 1)

    assert steps(letter.history) == [*tries(3), ("given up", None, None), *tries(3), BURIED]


async def test_an_event_that_was_given_up_and_has_no_second_dispatcher_any_more_is_buried_with_its_history(
    database: str,
) -> None:
    late = Retry(attempts=2, delay=0.0)

    async def hang(_: Event) -> None:
        await asyncio.Event().wait()

    async with running(database, drain_timeout=0.1) as backend:
        await backend.subscribe("s", refuse, retry=late, dead_letter=hang)
        await produce(backend, "a")
        await waits(backend, [*tries(2), ("given up", None, None)])
        await backend.unsubscribe("s")
        await backend.subscribe("s", refuse, retry=late)
        (letter,) = await dead_letters(backend, 1)

    assert steps(letter.history) == [*tries(2), ("given up", None, None), BURIED]


async def test_a_letter_that_fails_again_keeps_what_was_before(database: str) -> None:
    async with running(database) as backend:
        await backend.subscribe("s", refuse, retry=Retry(attempts=2, delay=0.0))
        await produce(backend, "a")
        (letter,) = await dead_letters(backend, 1)
        assert await backend.redeliver(letter.id) == 1
        again = await buried_again(backend, letter)

    assert again.history[: len(letter.history)] == letter.history
    assert steps(again.history) == [*tries(2), BURIED, ("redelivered", None, None), *tries(2), BURIED]


async def test_an_event_that_is_buried_again_after_a_seek_adds_to_its_letter(database: str) -> None:
    async with running(database) as backend:
        await backend.subscribe("s", refuse, retry=Retry(attempts=1))
        await produce(backend, "a")
        (letter,) = await dead_letters(backend, 1)
        await backend.seek("s", "earliest")
        again = await buried_again(backend, letter)

    assert steps(again.history) == [*tries(1), BURIED] * 2


@pytest.mark.parametrize("order", ORDERS)
async def test_a_skipped_event_keeps_its_history(database: str, order: Order) -> None:
    async with running(database) as backend:
        await backend.subscribe("s", refuse, order=order, retry=LATE)
        await produce(backend, "a")
        await failed(backend)
        await backend.skip("s", 1)
        (letter,) = await dead_letters(backend, 1)

    assert steps(letter.history) == [*tries(1), ("skipped", None, letter.failure.error)]
    assert letter.failure.error.startswith("Skipped by ")


@pytest.mark.parametrize("order", ORDERS)
async def test_an_event_of_a_batch_has_only_the_attempts_that_it_failed_in_alone(database: str, order: Order) -> None:
    async def handle(batch: list[Event]) -> None:
        if bad := [event for event in batch if event.id in ("2", "5")]:
            raise RuntimeError(f"no {bad[0].attempt}")

    async with running(database) as backend:
        await produce(backend, *map(str, range(8)))
        await backend.subscribe("s", handle, start="earliest", order=order, retry=NO_WAIT, batch=8)
        letters = await dead_letters(backend, 2)
        await settled(backend)

    assert [letter.event.id for letter in letters] == ["2", "5"]
    for letter in letters:
        assert steps(letter.history) == [*tries(3), BURIED]


@pytest.mark.parametrize("order", ["none", "key"])
async def test_the_last_entries_are_kept_with_the_beginning_of_their_errors(database: str, order: Order) -> None:
    async def fail(_: Event) -> None:
        raise RuntimeError("é" * 3000)

    async with running(database) as backend:
        await backend.subscribe("s", fail, order=order, retry=Retry(attempts=25, delay=0.0))
        await produce(backend, "a")
        (letter,) = await dead_letters(backend, 1)

    assert [entry.attempt for entry in letter.history] == [*range(7, 26), None]
    assert {entry.error for entry in letter.history[:-1]} == {f"RuntimeError: {'é' * 486}"}


@pytest.mark.parametrize("order", ORDERS)
async def test_nothing_is_left_of_an_event_that_is_handled_in_the_end(database: str, order: Order) -> None:
    attempts: list[int] = []

    async def fail_once(event: Event) -> None:
        attempts.append(event.attempt)
        if event.attempt == 1:
            raise RuntimeError("no 1")

    async with running(database) as backend:
        await backend.subscribe("s", fail_once, order=order, retry=NO_WAIT)
        await produce(backend, "a")
        await settled(backend)
        assert [event async for event in backend.waiting("s")] == []
        assert await dead_letters(backend) == []

    assert attempts == [1, 2]


def test_an_entry_has_the_servers_time_the_beginning_of_the_error_and_nothing_that_the_step_has_not() -> None:
    step = Step(what="failed", attempt=3, error="x" * 501, at=10.0, id="0a1b2c3d")
    at = "1970-01-01T00:01:40+00:00"
    assert to_entry(step, clock=90.0) == {
        "at": at, "what": "failed", "id": "0a1b2c3d", "attempt": 3, "error": "x" * 500,
    }  # fmt: skip
    assert to_entry(Step(what="buried", at=10.0, id="0a1b2c3d"), clock=90.0) == {
        "at": at, "what": "buried", "id": "0a1b2c3d",
    }  # fmt: skip


def test_steps_that_are_not_committed_yet_do_not_pile_up() -> None:
    some = [Step(what="failed", attempt=attempt) for attempt in range(1, 16)]
    assert joined(some, some) == (*some, *some)[10:]
