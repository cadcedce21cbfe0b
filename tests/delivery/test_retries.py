"""`Backend.retry_now` and `Backend.waiting`: failed events do not wait for their time."""

import asyncio
import time
from collections import Counter
from collections.abc import Mapping

import pytest

from pgbackend import Backend, ConfigError, Event, Retry, SubscriptionNotFoundError
from pgbackend.delivery import redeliverer, retries
from pgbackend.log.notify import Notifier
from pgbackend.model import Order, WaitingEvent
from tests.support.backends import failed, produce, running, settled, waiting, worker_of
from tests.support.dispatchers import Catch
from tests.support.polling import eventually

ORDERS: tuple[Order, ...] = ("none", "key", "strict")
LATE = Retry(attempts=9, delay=600.0)


async def listed(backend: Backend) -> list[WaitingEvent]:
    return [event async for event in backend.waiting("s")]


async def has_made(backend: Backend, attempts: int) -> None:
    """So many attempts of the only event that waits are on record."""

    async def are_made() -> bool:
        return [event.attempts for event in await listed(backend)] == [attempts]

    await eventually(f"{attempts} attempts are on record", are_made)


@pytest.mark.direct
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("hinted", [True, False])
async def test_failed_events_are_tried_at_once_wherever_they_run_and_their_attempts_count_on(
    database: str, monkeypatch: pytest.MonkeyPatch, order: Order, hinted: bool
) -> None:
    attempts: list[int] = []

    async def fail_twice(event: Event) -> None:
        attempts.append(event.attempt)
        if event.attempt < 3:
            raise RuntimeError("not yet")

    async def unheard(_: Notifier) -> None: ...

    if hinted:
        for module in (redeliverer, retries):
            monkeypatch.setattr(module, "_LONGEST_WAIT", 600.0)
    else:
        monkeypatch.setattr(Notifier, "notify_retries", unheard)
    poll_interval = 600.0 if hinted else 0.1
    async with running(database, poll_interval=poll_interval) as owner, running(database) as operator:
        await owner.subscribe("s", fail_twice, order=order, retry=LATE)
        await produce(owner, "a")
        for made in (1, 2):
            await has_made(operator, made)
            assert await operator.retry_now("s") == 1
        await settled(operator)

    assert attempts == [1, 2, 3]


async def test_only_the_event_that_is_named_is_tried_again(database: str) -> None:
    catch = Catch(fails=lambda _: True)
    async with running(database) as backend:
        await backend.subscribe("s", catch, retry=LATE)
        await produce(backend, "a", "b", "c")
        await waiting(backend, 3)
        assert [(event.position, event.id, event.attempts, event.given_up) for event in await listed(backend)] == [
            (1, "a", 1, False), (2, "b", 1, False), (3, "c", 1, False),
        ]  # fmt: skip
        catch.fails = lambda _: False
        assert await backend.retry_now("s", position=2) == 1
        await catch.has("b")
        await waiting(backend, 2)
        assert await backend.retry_now("s", position=2) == 0

    assert catch.ids == ["b"]


@pytest.mark.parametrize("order", ["none", "key"])
async def test_a_target_that_is_down_is_probed_at_once(database: str, order: Order) -> None:
    catch = Catch(fails=lambda _: True)
    async with running(database) as backend, running(database) as operator:
        await backend.subscribe("s", catch, order=order, retry=LATE)
        await produce(backend, *map(str, range(15)))

        async def is_down() -> bool:
            return (await backend.status()).subscriptions[0].state == "target down"

        await eventually("the target is down", is_down)
        await failed(backend, 10)
        catch.fails = lambda _: False
        await operator.retry_now("s")
        await settled(backend)

    assert Counter(catch.ids) == {str(number): 1 for number in range(15)}


@pytest.mark.parametrize("order", ORDERS)
async def test_a_worker_that_starts_afterwards_tries_at_once(database: str, order: Order) -> None:
    catch = Catch(fails=lambda _: True)
    async with running(database) as backend:
        await backend.subscribe("s", catch, order=order, retry=LATE)
        await produce(backend, "a")
        await has_made(backend, 1)
        await backend.unsubscribe("s")
        assert await backend.retry_now("s") == 1
        catch.fails = lambda _: False
        await backend.subscribe("s", catch, order=order, retry=LATE)
        await settled(backend)

    assert catch.attempts == ["a", "a"]


async def test_an_event_that_fails_again_while_its_row_is_looked_up_keeps_its_new_time(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    catch = Catch(fails=lambda _: True)
    find_due_among = retries.Retries.find_due_among
    answered = asyncio.Event()
    async with running(database) as backend:

        async def answer_late(self: retries.Retries, name: str, waiting: Mapping[int, int]) -> set[int]:
            due = await find_due_among(self, name, waiting)
            (pump,) = worker_of(backend).pumps
            pump.hasten(due)
            await eventually("it has failed again", lambda: pump.waiting() == {1: 2})
            asyncio.get_running_loop().call_soon(answered.set)
            return due

        monkeypatch.setattr(retries.Retries, "find_due_among", answer_late)
        await backend.subscribe("s", catch, order="key", retry=LATE)
        await produce(backend, "a")
        await has_made(backend, 1)
        await backend.retry_now("s")
        await answered.wait()
        await has_made(backend, 2)
        (pump,) = worker_of(backend).pumps
        next_due = pump._backlog.next_due()

    assert next_due is not None
    assert next_due > time.monotonic() + 100
    assert catch.attempts == ["a", "a"]


async def test_names_and_positions_that_cannot_be_are_refused(backend: Backend) -> None:
    with pytest.raises(SubscriptionNotFoundError):
        await backend.retry_now("s")
    with pytest.raises(SubscriptionNotFoundError):
        await listed(backend)
    for position in (0, True, "1"):
        with pytest.raises(ConfigError, match="is no position"):
            await backend.retry_now("s", position=position)  # type: ignore[arg-type] # what is tested
