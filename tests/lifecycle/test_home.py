"""A Backend belongs to one event loop and one process."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pgbackend import Backend, Event, PgBackendError
from tests.support.dispatchers import Catch
from tests.support.events import make_event

SETTINGS: dict[str, Any] = {"produce_timeout": 60.0, "drain_timeout": 1.0, "poll_interval": 0.1}


async def redeliver(backend: Backend) -> None:
    await backend.redeliver(1)


async def dead_letters(backend: Backend) -> None:
    backend.dead_letters()


async def produce_soon(backend: Backend) -> None:
    backend.produce_soon(make_event("a"), lambda _: None)


CALLS: list[Callable[[Backend], Awaitable[Any]]] = [
    lambda backend: backend.init(),
    lambda backend: backend.start(),
    lambda backend: backend.stop(),
    lambda backend: backend.__aenter__(),
    lambda backend: backend.produce(make_event("a")),
    lambda backend: backend.produce_many([make_event("a")]),
    lambda backend: backend.subscribe("t", print),
    lambda backend: backend.reconfigure("s", print),
    lambda backend: backend.unsubscribe("s"),
    lambda backend: backend.delete_subscription("s"),
    lambda backend: backend.seek("s", "latest"),
    lambda backend: backend.alter_subscription("s", order="key", end=None, start="latest"),
    lambda backend: backend.reshard("s", 2),
    lambda backend: backend.status(),
    lambda backend: backend.probe(),
    redeliver,
    dead_letters,
    produce_soon,
]


async def refuses_every_call(backend: Backend, *, match: str) -> None:
    for call in CALLS:
        with pytest.raises(PgBackendError, match=match) as caught:
            async with asyncio.timeout(20):
                await call(backend)
        assert "asyncio.run_coroutine_threadsafe" in str(caught.value)


async def test_another_threads_loop_is_refused_at_once(database: str) -> None:
    async with Backend(database, **SETTINGS) as backend:
        await backend.subscribe("s", print)
        await asyncio.to_thread(lambda: asyncio.run(refuses_every_call(backend, match="another event loop")))
        with pytest.raises(PgBackendError, match="another event loop"):
            await asyncio.to_thread(lambda: backend.produce_soon(make_event("a"), lambda _: None))
        # It still works in its own loop.
        await backend.produce(make_event("a"))


async def test_the_advice_of_that_error_works_in_a_thread(database: str) -> None:
    loop, catch = asyncio.get_running_loop(), Catch()
    async with Backend(database, **SETTINGS) as backend:

        def handle(_: Event) -> None:
            asyncio.run_coroutine_threadsafe(backend.produce(make_event("b")), loop).result(30)

        await backend.subscribe("s", handle, filter=lambda event: event.id == "a")
        await backend.subscribe("t", catch)
        await backend.produce(make_event("a"))
        await catch.has("a", "b")


def test_a_second_run_is_refused_at_once(database: str) -> None:
    backend = Backend(database, **SETTINGS)

    async def init_and_leave() -> None:
        await backend.init()
        await backend.stop()

    asyncio.run(init_and_leave())
    asyncio.run(refuses_every_call(backend, match="event loop that is closed"))


def test_a_failed_init_can_be_repeated_in_another_loop() -> None:
    backend = Backend("postgresql://127.0.0.1:1/none")
    for _ in range(2):
        with pytest.raises(PgBackendError, match="cannot be reached"):
            asyncio.run(backend.init())


def test_another_loop_cannot_wait_for_a_running_init(database: str) -> None:
    backend = Backend(database, **SETTINGS)
    has_started = threading.Event()

    async def home() -> None:
        initializing = asyncio.create_task(backend.init())
        await asyncio.sleep(0)
        has_started.set()
        await asyncio.to_thread(other.join)
        await initializing
        await backend.stop()

    async def stranger() -> None:
        with pytest.raises(PgBackendError, match="another event loop"):
            await backend.init()
        refusals.append(True)

    refusals: list[bool] = []
    other = threading.Thread(target=lambda: (has_started.wait(), asyncio.run(stranger())))
    other.start()
    asyncio.run(home())
    assert refusals


CHILD = """
import asyncio, os, sys, time
from cloudevents.core.v1.event import CloudEvent
from pgbackend import Backend

backend = Backend(sys.argv[1], produce_timeout=60.0)
loop = asyncio.new_event_loop()
loop.run_until_complete(backend.init())
if os.fork() == 0:
    event = CloudEvent({"id": "a", "source": "s", "type": "t"})
    for call in (backend.produce(event), backend.status(), backend.stop()):
        try:
            asyncio.run(call)
        except Exception as error:
            print(type(error).__name__, error, flush=True)
    os._exit(0)
os.wait()
loop.run_until_complete(backend.produce(CloudEvent({"id": "b", "source": "s", "type": "t"})))
loop.run_until_complete(backend.stop())
print("the parent works", flush=True)
"""


def test_a_forked_child_is_refused_and_the_parent_keeps_working(database: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, database], capture_output=True, text=True, timeout=60, check=True
    )
    *refusals, last = done.stdout.splitlines()
    assert last == "the parent works"
    assert len(refusals) == 3
    for refusal in refusals:
        assert refusal.startswith("PgBackendError ")
        assert "forked" in refusal
        assert "run_coroutine_threadsafe" in refusal
