"""A handler can call its own backend: the call does not wait for the handler's event, and that event is settled."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pgbackend import Backend, Event, NotRunningError, Reject
from tests.support.databases import connected
from tests.support.dispatchers import Catch
from tests.support.events import make_event
from tests.support.polling import eventually

SETTINGS: dict[str, Any] = {"commit_interval": 0.01, "poll_interval": 0.1, "drain_timeout": 25.0}
SOON = 15.0
"""Seconds that suffice on a busy machine, and fewer than `drain_timeout`."""

Call = Callable[[Backend], Awaitable[None]]


def stop(backend: Backend) -> Awaitable[None]:
    return backend.stop()


def unsubscribe(backend: Backend) -> Awaitable[None]:
    return backend.unsubscribe("s")


def delete(backend: Backend) -> Awaitable[None]:
    return backend.delete_subscription("s")


def seek(backend: Backend) -> Awaitable[None]:
    return backend.seek("s", "latest")


def alter(backend: Backend) -> Awaitable[None]:
    return backend.alter_subscription("s", order="none", end=1_000_000, start="earliest")


def reshard(backend: Backend) -> Awaitable[None]:
    # A strict one has a single shard, and this is refused at once.
    return backend.reshard("s", 3)


CALLS = [stop, unsubscribe, delete, seek, alter, reshard]


async def row(database: str) -> dict[str, Any] | None:
    async with connected(database) as connection:
        found = await connection.fetchrow(
            "SELECT name, end_position, subscription.shards, min(position) AS position, "
            "count(owner) AS owned, coalesce(bool_or(NOT isempty(pending)), false) AS owes "
            "FROM pgbackend.subscriptions AS subscription JOIN pgbackend.offsets ON subscription = name "
            "GROUP BY name, end_position, subscription.shards"
        )
    return dict(found) if found is not None else None


async def happens(database: str, call: Call, *, position: int) -> None:
    """Return once the call has taken effect, and everything up to the position is settled."""

    async def has_happened() -> bool:
        now = await row(database)
        if call is delete:
            return now is None
        assert now is not None
        done: dict[Any, bool] = {stop: now["owned"] == 0, unsubscribe: now["owned"] == 0, seek: True}
        done |= {alter: now["end_position"] == 1_000_000, reshard: now["shards"] == 3}
        return done[call] and now["position"] >= position and not now["owes"]

    await eventually(f"{call.__name__}() has happened", has_happened)


async def ended(running: "asyncio.Task[None]", backend: Backend) -> None:
    await backend.stop()
    await asyncio.wait({running})
    running.result()


@pytest.mark.parametrize(
    ("caller", "order"),
    [
        ("handler", "none"), ("handler", "key"), ("handler", "strict"), ("task", "none"), ("thread", "none"),
        ("dead letter", "none"), ("dead letter", "key"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("call", CALLS)
async def test_a_call_from_a_handler_does_not_wait_for_its_own_event(
    database: str, call: Call, order: Any, caller: str
) -> None:
    if call is reshard and order == "strict":
        pytest.skip("a strict subscription has a single shard")
    begun: list[tuple[str, int]] = []
    returned: list[float] = []
    loop, backend = asyncio.get_running_loop(), Backend(database, **SETTINGS)

    async def handle(event: Event) -> None:
        begun.append((event.id, event.attempt))
        if caller == "dead letter" and event.failure is None:
            raise Reject("to the other one")
        began = time.monotonic()
        await (asyncio.create_task(as_task()) if caller == "task" else call(backend))
        returned.append(time.monotonic() - began)

    async def as_task() -> None:
        await call(backend)

    def handle_in_thread(event: Event) -> None:
        begun.append((event.id, event.attempt))
        began = time.monotonic()
        asyncio.run_coroutine_threadsafe(as_task(), loop).result(60)
        returned.append(time.monotonic() - began)

    await backend.init()
    running = asyncio.create_task(backend.start())
    dispatcher: Any = handle_in_thread if caller == "thread" else handle
    await backend.subscribe(
        "s", dispatcher, start="earliest", order=order, dead_letter=handle if caller == "dead letter" else None
    )
    await backend.produce(make_event("a", key="k"))
    # First the return: the offset passes an event before the dead-letter handler gets it.
    await eventually("the call returns", lambda: bool(returned))
    await happens(database, call, position=1)
    await ended(running, backend)

    assert len(returned) == 1
    assert returned[0] < SOON
    assert begun == [("a", 1), ("a", 1)][: 2 if caller == "dead letter" else 1]


@pytest.mark.parametrize("call", CALLS)
async def test_calls_wait_for_other_events_but_not_for_each_other(database: str, call: Call) -> None:
    gate = asyncio.Event()
    calling: list[str] = []
    ended_: list[str] = []
    backend = Backend(database, **SETTINGS)
    both = asyncio.Barrier(2)

    async def handle(event: Event) -> None:
        if event.id == "other":
            await gate.wait()
        else:
            await both.wait()
            calling.append(event.id)
            if event.id == "a" or call not in (unsubscribe, delete):
                await call(backend)
            else:
                # Two cannot unsubscribe it.
                await backend.stop()
        ended_.append(event.id)

    await backend.init()
    running = asyncio.create_task(backend.start())
    await backend.subscribe("s", handle, start="earliest")
    await backend.produce_many([make_event(id_) for id_ in ("other", "a", "b")])
    await eventually("both call", lambda: len(calling) == 2)
    await asyncio.wait({running}, timeout=0.3)
    assert ended_ == []
    gate.set()
    await happens(database, call, position=3)
    await ended(running, backend)

    assert Counter(ended_) == {"other": 1, "a": 1, "b": 1}
    assert ended_[0] == "other"


async def test_an_event_whose_handler_stops_the_backend_is_settled(database: str) -> None:
    handled: list[str] = []
    for _ in range(2):
        backend = Backend(database, **SETTINGS)
        async with backend:

            async def handle(event: Event, backend: Backend = backend) -> None:
                handled.append(event.id)
                if event.id == "stop":
                    await backend.stop()

            await backend.subscribe("s", handle, start="earliest", order="strict")
            if not handled:
                await backend.produce(make_event("stop"))
                (background,) = [task for task in asyncio.all_tasks() if task.get_name() == "pgbackend start"]
                await asyncio.wait({background})
            else:
                await backend.produce(make_event("next"))
                await eventually("the next one is handled", lambda: handled[-1] == "next")

    assert handled == ["stop", "next"]


async def test_a_call_from_a_task_that_outlives_its_event_waits_for_the_end(database: str) -> None:
    stopped: list[asyncio.Task[None]] = []
    let_go, catch = asyncio.Event(), Catch()
    async with Backend(database, **SETTINGS) as backend:

        async def later() -> None:
            await let_go.wait()
            await backend.stop()
            with pytest.raises(NotRunningError):
                backend.dead_letters()

        async def handle(_: Event) -> None:
            stopped.append(asyncio.create_task(later()))

        await backend.subscribe("s", handle, start="earliest")
        await backend.produce(make_event("a"))
        await eventually("it was handled", lambda: bool(stopped))
        await backend.subscribe("t", catch, start="earliest")
        await catch.has("a")
        let_go.set()
        await stopped[0]


@pytest.mark.parametrize("shards", [2, 5])
async def test_a_handler_can_reshard_a_subscription_that_two_workers_run(database: str, shards: int) -> None:
    asked = asyncio.Event()
    catch = Catch()
    async with Backend(database, **SETTINGS) as one, Backend(database, **SETTINGS) as two:

        def dispatcher(backend: Backend) -> Callable[[Event], Awaitable[None]]:
            async def handle(event: Event) -> None:
                if event.id == "ask":
                    await backend.reshard("s", shards)
                    asked.set()
                await catch(event)

            return handle

        await one.subscribe("s", dispatcher(one), start="earliest", shards=4)
        await two.subscribe("s", dispatcher(two), shards=4)

        async def is_shared() -> bool:
            return len({shard.owner for shard in (await one.status()).subscriptions[0].shards} - {None}) == 2

        await eventually("each has shards", is_shared)
        await one.produce_many([make_event(str(number), key=str(number)) for number in range(20)])
        await one.produce(make_event("ask", key="ask"))
        async with asyncio.timeout(SOON):
            await asked.wait()
        await catch.has("ask", *(str(number) for number in range(20)))

        async def is_resharded() -> bool:
            return {shard.shards for shard in (await one.status()).subscriptions[0].shards} == {shards}

        await eventually("it has that many shards", is_resharded)

    assert Counter(catch.ids).most_common(1)[0][1] == 1


@pytest.mark.parametrize("call", [unsubscribe, delete])
async def test_a_handler_can_subscribe_again_after_the_call(database: str, call: Call) -> None:
    catch, subscribed = Catch(), asyncio.Event()
    async with Backend(database, **SETTINGS) as backend:

        async def handle(_: Event) -> None:
            await call(backend)
            await backend.subscribe("s", catch, start="latest")
            subscribed.set()

        await backend.subscribe("s", handle, start="earliest")
        await backend.produce(make_event("a"))
        async with asyncio.timeout(30):
            await subscribed.wait()
        await backend.produce(make_event("b"))
        await catch.has("b")

    assert catch.attempts == ["b"]
