"""`stop()` ends everything once and in time, whatever is under way."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from pgbackend import Backend, Event, NotRunningError, PgBackendError, ProduceUncertainError
from pgbackend.delivery.runner import Runner
from pgbackend.facts import Recorder
from pgbackend.lifecycle.lifecycle import Lifecycle
from pgbackend.torture.proxy import Proxy
from tests.support.databases import connected
from tests.support.dispatchers import Catch, Gate
from tests.support.events import make_event
from tests.support.polling import eventually

LATE = 5.0 + 3.0
"""Seconds beyond `drain_timeout`: the documented ones, and some more for a busy machine."""


@asynccontextmanager
async def nothing_left(database: str) -> AsyncIterator[None]:
    """At the end no connection of a backend is open, and no task that the body started runs."""
    before = asyncio.all_tasks()
    async with connected(database, application_name="observer") as observer:
        yield

        async def is_over() -> bool:
            open_ = await observer.fetchval(
                "SELECT count(*) FROM pg_stat_activity "
                "WHERE datname = current_database() AND application_name = 'pgbackend'"
            )
            return not open_ and not {task for task in asyncio.all_tasks() - before if not task.done()}

        await eventually("no connection and no task is left", is_over)


def in_time(began: float, drain_timeout: float) -> bool:
    return time.monotonic() - began < drain_timeout + LATE


# Second, cancelled and concurrent calls of stop().


async def test_a_second_stop_waits_for_the_first(database: str) -> None:
    gate = Gate()
    async with nothing_left(database):
        backend = Backend(database)
        async with backend:
            await backend.subscribe("s", gate, start="earliest")
            await backend.produce(make_event("a"))
            await gate.holds(1)
            stops = [asyncio.create_task(backend.stop()) for _ in range(3)]
            await asyncio.wait(stops, timeout=0.2)
            assert not any(stop.done() for stop in stops)
            gate.open()
            await stops[2]
            with pytest.raises(NotRunningError):
                backend.dead_letters()
            await asyncio.gather(*stops)

    assert gate.handled == ["a"]


async def test_a_cancelled_stop_goes_on_to_its_end(database: str) -> None:
    gate = Gate()
    async with nothing_left(database):
        backend = Backend(database)
        await backend.init()
        running = asyncio.create_task(backend.start())
        await backend.subscribe("s", gate, start="earliest")
        await backend.produce(make_event("a"))
        await gate.holds(1)
        for _ in range(2):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await backend.stop()
        gate.open()
        await running

    assert gate.handled == ["a"]


async def test_stop_cancels_init_and_its_caller_gets_an_error(database: str) -> None:
    async with nothing_left(database), Proxy(database) as proxy:
        proxy.stall()
        backend = Backend(proxy.dsn)
        initializing = [asyncio.create_task(backend.init()) for _ in range(2)]
        await asyncio.wait(initializing, timeout=0.1)
        began = time.monotonic()
        await backend.stop()
        assert in_time(began, 0)
        for each in initializing:
            with pytest.raises(NotRunningError, match="was stopped"):
                await each


@pytest.mark.parametrize("moments", [0, 1, 2, 3, 5, 8, 13, 100])
async def test_stop_ends_a_start_that_has_just_begun(database: str, moments: int) -> None:
    async with nothing_left(database):
        backend = Backend(database)
        await backend.init()
        running = asyncio.create_task(backend.start())
        for _ in range(moments):
            await asyncio.sleep(0)
        await backend.stop()
        await running


async def test_stop_ends_a_start_that_waits_for_the_server(database: str) -> None:
    async with nothing_left(database), Proxy(database) as proxy:
        backend = Backend(proxy.dsn, drain_timeout=60.0)
        await backend.init()
        proxy.stall()
        running = asyncio.create_task(backend.start())
        await asyncio.wait({running}, timeout=0.2)
        began = time.monotonic()
        await backend.stop()
        assert in_time(began, 0)
        await running


# One deadline.


async def test_a_full_default_executor_does_not_delay_stop(database: str) -> None:
    release, begun = threading.Event(), asyncio.Event()

    async def fill(_: Event) -> None:
        begun.set()
        await asyncio.gather(*(asyncio.get_running_loop().run_in_executor(None, release.wait) for _ in range(40)))

    async with nothing_left(database):
        backend = Backend(database, drain_timeout=0.2)
        await backend.init()
        running = asyncio.create_task(backend.start())
        await backend.subscribe("s", fill, start="earliest")
        await backend.produce(make_event("a"))
        await begun.wait()
        began = time.monotonic()
        await backend.stop()
        assert in_time(began, 0.2)
        release.set()
        await running


@pytest.mark.slow
async def test_a_full_default_executor_does_not_delay_the_end_of_an_embedded_server(tmp_path: Path) -> None:
    release, loop = threading.Event(), asyncio.get_running_loop()
    async with asyncio.timeout(120):
        async with Backend.embedded(tmp_path) as backend:
            await backend.produce(make_event("a"))
            full = [loop.run_in_executor(None, release.wait) for _ in range(40)]
    release.set()
    await asyncio.gather(*full)


@pytest.mark.parametrize("how", ["stop", "cancel", "unsubscribe", "leave"])
async def test_a_handler_that_swallows_its_cancellation_commits_nothing(database: str, how: str) -> None:
    release, begun = asyncio.Event(), asyncio.Event()

    async def stubborn(_: Event) -> None:
        begun.set()
        while not release.is_set():
            with suppress(asyncio.CancelledError):
                await release.wait()

    async with nothing_left(database):
        with Recorder() as recorder:
            backend = Backend(database, drain_timeout=0.2)
            await backend.init()
            await backend.subscribe("s", stubborn, start="earliest")
            await backend.produce(make_event("a"))
            running = asyncio.create_task(backend.start())
            await begun.wait()
            began = time.monotonic()
            if how == "unsubscribe":
                await backend.unsubscribe("s")
            elif how == "cancel":
                running.cancel()
                await asyncio.wait({running})
            elif how == "leave":
                await backend.__aexit__(None, None, None)
            else:
                await backend.stop()
            assert in_time(began, 0.2)
            assert [fields["events"] for fields in recorder.all("dispatcher abandoned")] == [["a"]]
            # Its later return settles nothing.
            release.set()
            await backend.stop()
            await asyncio.wait({running})
    catch = Catch()
    async with Backend(database) as again:
        await again.subscribe("s", catch)
        await catch.has("a")


@pytest.mark.parametrize(
    ("how", "at_work"),
    [
        ("stop", True),
        *(pytest.param(how, False, marks=pytest.mark.slow) for how in ("stop", "cancel", "unsubscribe")),
        *(pytest.param(how, True, marks=pytest.mark.slow) for how in ("cancel", "unsubscribe")),
    ],
)
async def test_a_frozen_server_does_not_delay_the_end(database: str, how: str, at_work: bool) -> None:
    gate = Gate()
    async with nothing_left(database), Proxy(database) as proxy:
        backend = Backend(proxy.dsn, drain_timeout=0.5, commit_interval=0.01)
        await backend.init()
        running = asyncio.create_task(backend.start())
        await backend.subscribe("s", gate, start="earliest")
        await backend.produce(make_event("a"))
        await gate.holds(1)
        proxy.stall()
        if not at_work:
            gate.open()
        began = time.monotonic()
        if how == "unsubscribe":
            await backend.unsubscribe("s")
        elif how == "cancel":
            running.cancel()
            await asyncio.wait({running})
        else:
            await backend.stop()
        assert in_time(began, 0.5)
        began = time.monotonic()
        await backend.stop()
        assert in_time(began, 0.5)
        await asyncio.wait({running})
        proxy.restore()


async def test_a_produce_that_cannot_end_in_time_gets_an_error(database: str) -> None:
    async with nothing_left(database):
        lock = await asyncpg.connect(database, server_settings={"application_name": "lock"})
        backend = Backend(database, drain_timeout=0.2, produce_timeout=60.0)
        await backend.init()
        async with lock.transaction():
            await lock.execute("LOCK TABLE pgbackend.events IN SHARE MODE")
            sent = asyncio.create_task(backend.produce(make_event("a")))
            await asyncio.wait({sent}, timeout=0.1)
            gathered = asyncio.create_task(backend.produce(make_event("b")))
            await asyncio.wait({gathered}, timeout=0.1)
            began = time.monotonic()
            await backend.stop()
            assert in_time(began, 0.2)
            with pytest.raises(ProduceUncertainError):
                await sent
            with pytest.raises(NotRunningError, match="it is not stored"):
                await gathered
        await lock.close()


# Cancelled anywhere.


class Cut:
    """Awaits a call, and cancels the awaiting task when the call is suspended for the `at`th time."""

    def __init__(self, call: Awaitable[Any], at: int) -> None:
        self._call = call
        self._at = at
        self.was_cut = False

    def __await__(self) -> Generator[Any, Any, Any]:
        inner: Any = self._call.__await__()
        count = 0
        error: BaseException | None = None
        while True:
            try:
                waits_for = inner.send(None) if error is None else inner.throw(error)
            except StopIteration as end:
                return end.value
            count += 1
            if count == self._at:
                self.was_cut = True
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
            try:
                yield waits_for
            except BaseException as thrown:  # noqa: BLE001 - passed on
                error = thrown
            else:
                error = None


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        pytest.param(Lifecycle, "_init", id="init"),
        pytest.param(Runner, "run", id="start"),
        pytest.param(Lifecycle, "_end", id="stop"),
    ],
)
async def test_a_cancellation_at_any_await_leaves_nothing_open(
    database: str, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    """`asyncio.run()` cancels all tasks at its end, wherever they wait."""
    original: Callable[..., Awaitable[Any]] = getattr(owner, name)
    cuts: list[Cut] = []
    at = 0

    async def cut(*args: Any, **options: Any) -> Any:
        cuts.append(Cut(original(*args, **options), at if not cuts else 0))
        return await cuts[-1]

    monkeypatch.setattr(owner, name, cut)
    while True:
        at += 1
        cuts.clear()
        catch = Catch()
        async with nothing_left(database):
            backend = Backend(database, drain_timeout=1.0)

            async def live(backend: Backend = backend, catch: Catch = catch) -> None:
                await backend.init()
                running = asyncio.create_task(backend.start())
                # Retrieve its error: it may say that its worker was cancelled from outside.
                running.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
                await backend.subscribe("s", catch)
                await backend.produce(make_event("a"))
                await asyncio.wait({asyncio.create_task(catch.has("a")), running}, return_when="FIRST_COMPLETED")

            living = asyncio.create_task(live())
            await asyncio.wait({living})
            for _ in range(2):
                with suppress(asyncio.CancelledError):
                    await backend.stop()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                if task.get_name().startswith("Task-"):
                    task.cancel()
            with suppress(asyncio.CancelledError, PgBackendError):
                await living
        if not cuts[0].was_cut:
            break

    assert at > 1


async def test_a_cancellation_just_when_it_is_open_leaves_nothing_open(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Lifecycle._init

    async def init_and_cancel(self: Lifecycle, *, migrate: bool) -> None:
        await original(self, migrate=migrate)
        entering.cancel()

    async def enter() -> None:
        async with Backend(database):
            pytest.fail("the body runs")

    monkeypatch.setattr(Lifecycle, "_init", init_and_cancel)
    async with nothing_left(database):
        entering = asyncio.create_task(enter())
        await asyncio.wait({entering})
    assert entering.cancelled()
