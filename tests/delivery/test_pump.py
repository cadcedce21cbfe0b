import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import MappingProxyType
from typing import Any

import asyncpg
import pytest

from pgbackend import Backend, Event, Reject, Retry, RetryAfter
from pgbackend.delivery.health import FAILURES_IN_A_ROW
from pgbackend.facts import Recorder
from pgbackend.postgres.pool import Database
from tests.support.backends import dead_letters, produce, running, settled, worker_of
from tests.support.dispatchers import Catch, Gate
from tests.support.events import make_event
from tests.support.polling import eventually
from tests.support.producers import INSERT

AT_ONCE = Retry(attempts=3, delay=0.0)


async def due_in(dsn: str, seconds: float) -> None:
    """Retries that wait are due then for the next owner. Delays that are short from the beginning race."""
    connection = await asyncpg.connect(dsn)
    await connection.execute(
        "UPDATE pgbackend.redeliveries SET due_at = now() + make_interval(secs => $1)", float(seconds)
    )
    await connection.close()


# The ends of a dispatch.


@pytest.mark.parametrize("order", ["none", "key", "strict"])
async def test_a_failed_event_is_tried_again_with_its_attempts_counted(database: str, order: Any) -> None:
    attempts: list[int] = []

    async def third_time_lucky(event: Event) -> None:
        attempts.append(event.attempt)
        if event.attempt < 3:
            raise RuntimeError("not yet")

    async with running(database) as backend:
        await backend.subscribe("s", third_time_lucky, order=order, retry=AT_ONCE)
        await produce(backend, "a", key="k")
        await settled(backend)

        assert attempts == [1, 2, 3]
        assert [letter async for letter in backend.dead_letters()] == []


@pytest.mark.parametrize("order", ["none", "key", "strict"])
async def test_an_event_that_used_up_its_attempts_is_kept_with_its_error_and_does_not_stop_the_rest(
    database: str, order: Any
) -> None:
    catch = Catch(fails=lambda event: event.id == "bad")
    async with running(database) as backend:
        await backend.subscribe("s", catch, order=order, retry=AT_ONCE)
        await produce(backend, "bad", "good", key="k")
        await catch.has("good")
        (letter,) = await dead_letters(backend, 1)
        await settled(backend)

    assert catch.attempts.count("bad") == 3
    assert (letter.event.id, letter.subscription, letter.failure.attempts) == ("bad", "s", 3)
    assert letter.failure.error == "RuntimeError: the target is down"


@pytest.mark.parametrize("order", ["none", "key", "strict"])
async def test_a_rejected_event_is_buried_after_its_first_attempt(database: str, order: Any) -> None:
    async def reject(event: Event) -> None:
        raise Reject("no such customer", details={"customer": "17"})

    async with running(database) as backend:
        await backend.subscribe("s", reject, order=order)
        await produce(backend, "a")
        (letter,) = await dead_letters(backend, 1)

    assert letter.failure.attempts == 1
    assert letter.failure.details == {"customer": "17"}


async def test_rejected_events_say_nothing_about_the_target(database: str) -> None:
    async def reject(event: Event) -> None:
        raise Reject("no")

    with Recorder() as recorder:
        async with running(database) as backend:
            await backend.subscribe("s", reject)
            await produce(backend, *map(str, range(3 * FAILURES_IN_A_ROW)))
            await dead_letters(backend, 3 * FAILURES_IN_A_ROW)

    assert recorder.all("target is down") == []


@pytest.mark.parametrize("order", ["none", "key"])
async def test_retry_after_puts_the_next_attempt_off(database: str, order: Any) -> None:
    at: list[float] = []

    async def busy(event: Event) -> None:
        at.append(time.monotonic())
        if event.attempt == 1:
            raise RetryAfter("busy", delay=0.5)

    async with running(database) as backend:
        await backend.subscribe("s", busy, order=order, retry=Retry(delay=0.01))
        await produce(backend, "a")
        await settled(backend)

    assert len(at) == 2
    assert at[1] - at[0] >= 0.5


async def test_a_plain_function_runs_in_a_thread_and_may_block(database: str) -> None:
    threads: list[str] = []
    together = threading.Barrier(3, timeout=10)

    def handle(event: Event) -> None:
        threads.append(threading.current_thread().name)
        together.wait()

    async with running(database) as backend:
        await backend.subscribe("s", handle, concurrency=3)
        await produce(backend, "a", "b", "c")
        await settled(backend)

    assert len(threads) == 3
    assert threading.main_thread().name not in threads


async def test_a_callable_object_and_a_lambda_around_a_coroutine_are_awaited(database: str) -> None:
    catch = Catch()
    async with running(database) as backend:
        await backend.subscribe("object", catch)
        await backend.subscribe("lambda", lambda event: catch(event))  # noqa: PLW0108 - the point
        await produce(backend, "a")
        await settled(backend, "object")
        await settled(backend, "lambda")

    assert catch.ids == ["a", "a"]


class Rude(Exception):  # noqa: N818 - as users name them
    def __str__(self) -> str:
        raise ValueError("no text for you")


class Detailed(Exception):  # noqa: N818 - as users name them
    details: Any = MappingProxyType({"status": 503})


class Panic(BaseException):
    """As extensions in Rust raise it: pydantic-core, polars, tokenizers."""


class RudeAtAll(RetryAfter):
    """A signal that raises whatever it is asked."""

    def __init__(self) -> None:
        pass

    def __str__(self) -> str:
        raise Panic("no text for you")

    @property  # type: ignore[misc] # the point
    def __class__(self) -> Any:
        raise Panic("no class")

    @property
    def delay(self) -> float:  # type: ignore[override] # the point
        raise Panic("no delay")

    @property
    def details(self) -> Any:  # type: ignore[override] # the point
        raise Panic("no details")


class Unmade(Reject):
    def __init__(self) -> None:
        """Without the fields that `Reject` has."""


def _delay(delay: object) -> RetryAfter:
    error = RetryAfter("busy", delay=0)
    error.delay = delay  # type: ignore[assignment] # the point
    return error


async def _make_retry_after(event: Event) -> None:
    raise RetryAfter("busy", delay=None)  # type: ignore[arg-type] # the point


async def _cancel_itself(event: Event) -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(0)


async def _cancel_itself_later(event: Event) -> None:
    """As a library does that sets a timer and never calls `uncancel()`."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().call_soon(task.cancel)
    await asyncio.sleep(60)


def _panic(event: Event) -> None:
    raise Panic("index out of bounds")


def _generate_later(event: Event) -> Any:
    return (number for number in range(3))


@contextmanager
def _manage(event: Event) -> Iterator[None]:
    yield


@asynccontextmanager
async def _manage_async(event: Event) -> AsyncIterator[None]:
    yield


async def _return_coroutine_twice(event: Event) -> Any:
    async def forgotten() -> Any:
        return forgotten()

    return forgotten()


def _cancel(event: Event) -> None:
    raise asyncio.CancelledError


def _stop_iterating(event: Event) -> None:
    raise StopIteration


def _raise(error: BaseException) -> Callable[[Event], Coroutine[Any, Any, None]]:
    async def dispatcher(event: Event) -> None:
        raise error

    return dispatcher


@pytest.mark.parametrize(
    ("dispatcher", "expected"),
    [
        (_cancel, "CancelledError"),
        (_raise(asyncio.CancelledError()), "CancelledError"),
        (_stop_iterating, ""),
        (_raise(TimeoutError()), "TimeoutError"),
        (_raise(Rude()), "Rude"),
        (_raise(RuntimeError("nul \0 and a lone \ud800")), "RuntimeError: nul \\0 and a lone \\ud800"),
        (_raise(RuntimeError("x" * 100_000)), "RuntimeError: xxx"),
        (_raise(RuntimeError("\0" * 10_000_000)), "RuntimeError: \\0"),
        (_raise(Panic("index out of bounds")), "Panic: index"),
        (_panic, "Panic: index"),
        (_raise(GeneratorExit()), "GeneratorExit"),
        (_raise(RudeAtAll()), "RudeAtAll"),
        (_raise(Unmade()), "Unmade"),
        (_raise(BaseExceptionGroup("several", [Panic("one"), SystemExit(3)])), "BaseExceptionGroup: several"),
        (_raise(ExceptionGroup("several", [Reject("one")])), "ExceptionGroup: several"),
        (_raise(_delay("60")), "RetryAfter: busy"),
        (_raise(_delay(None)), "RetryAfter: busy"),
        (_raise(_delay(float("nan"))), "RetryAfter: busy"),
        (_make_retry_after, "ConfigError: delay is None"),
        (_cancel_itself, "CancelledError: its task was cancelled"),
        (_cancel_itself_later, "CancelledError: its task was cancelled"),
        (_generate_later, "TypeError: the dispatcher returned <generator"),
        (_return_coroutine_twice, "TypeError: the dispatcher returned <coroutine"),
        (_manage, "TypeError: the dispatcher returned <contextlib"),
        (_manage_async, "TypeError: the dispatcher returned <contextlib"),
    ],
    ids=[
        "cancel in a thread", "cancel", "stop iteration in a thread", "timeout", "rude", "unstorable", "endless",
        "nuls", "panic", "panic in a thread", "generator exit", "rude at all", "unmade", "base group", "group",
        "delay is text", "delay is None", "delay is nan", "delay is refused", "cancel itself", "cancel itself later",
        "generator", "coroutine of a coroutine", "context manager", "async context manager",
    ],
)  # fmt: skip
async def test_whatever_a_dispatcher_raises_is_a_failure_of_its_event_and_of_nothing_else(
    database: str, dispatcher: Any, expected: str
) -> None:
    catch = Catch()
    async with asyncio.timeout(60), running(database) as backend:
        await backend.subscribe("s", dispatcher, retry=Retry(attempts=2, delay=0.01, max_delay=0.01), concurrency=1)
        await backend.subscribe("other", catch)
        await produce(backend, "a", "b")
        found = await dead_letters(backend, 2)
        await catch.has("a", "b")
        states = {one.name: one.state for one in (await backend.status()).subscriptions}
        await settled(backend, "s")

    assert all(letter.failure.error.startswith(expected) for letter in found)
    assert states == {"s": "running", "other": "running"}


@pytest.mark.parametrize("order", ["key", "strict"])
@pytest.mark.parametrize("dispatcher", [_cancel_itself, _raise(Panic("index out of bounds")), _raise(_delay("60"))])
async def test_what_is_behind_an_event_goes_on_whatever_its_dispatcher_throws(
    database: str, dispatcher: Any, order: Any
) -> None:
    catch = Catch()

    async def handle(event: Event) -> None:
        await (dispatcher if event.id == "bad" else catch)(event)

    async with running(database) as backend:
        await backend.subscribe("s", handle, order=order, retry=Retry(attempts=2, delay=0.01, max_delay=0.01))
        await produce(backend, "bad", "a", "b", key="k")
        await catch.has("a", "b")
        (letter,) = await dead_letters(backend, 1)

    assert (letter.event.id, letter.failure.attempts, catch.ids) == ("bad", 2, ["a", "b"])


async def test_a_cancellation_that_a_dispatcher_leaves_behind_ends_neither_the_next_event_nor_its_deliverer(
    database: str,
) -> None:
    handled: list[str] = []

    async def handle(event: Event) -> None:
        await asyncio.sleep(0)
        handled.append(event.id)
        task = asyncio.current_task()
        assert task is not None
        if event.id == "now":
            task.cancel()
        elif event.id == "later":
            asyncio.get_running_loop().call_later(0.05, task.cancel)

    async def has_handled(*ids: str) -> None:
        async def has() -> bool:
            return set(ids) <= set(handled)

        await eventually(f"{ids} are handled", has)

    async with running(database) as backend:
        await backend.subscribe("s", handle, concurrency=1, retry=Retry(attempts=1))
        await produce(backend, "now", "a", "later")
        await has_handled("later")
        await asyncio.sleep(0.2)  # the cancellation strikes while nothing is dispatched, which nothing tells
        await produce(backend, "b")
        await has_handled("b")
        await settled(backend)

    assert handled == ["now", "a", "later", "b"]


async def test_details_of_any_mapping_are_kept(database: str) -> None:
    async with running(database) as backend:
        await backend.subscribe("s", _raise(Detailed("no")), retry=Retry(attempts=1))
        await produce(backend, "a")
        (letter,) = await dead_letters(backend, 1)

    assert letter.failure.details == {"status": "503"}


def _filter(thrown: BaseException) -> Callable[[Event], bool]:
    def takes(event: Event) -> bool:
        if event.id == "bad":
            raise thrown
        return event.id != "unwanted"

    return takes


def _undecided(event: Event) -> Any:
    async def takes() -> bool:
        return True

    return takes() if event.id == "bad" else event.id != "unwanted"


@pytest.mark.parametrize("order", ["none", "key", "strict"])
@pytest.mark.parametrize(
    ("filter_", "expected"),
    [
        (_filter(LookupError("no")), "LookupError: no"),
        (_filter(Panic("no")), "Panic: no"),
        (_filter(asyncio.CancelledError()), "CancelledError"),
        (_undecided, "TypeError: the filter returned <coroutine"),
    ],
    ids=["error", "panic", "cancel", "awaitable"],
)
async def test_what_a_filter_throws_is_a_failure_of_its_event_and_of_nothing_else(
    database: str, filter_: Any, expected: str, order: Any
) -> None:
    catch, given_up = Catch(), Catch()
    async with running(database) as backend:
        await backend.subscribe("s", catch, filter=filter_, order=order, retry=AT_ONCE)
        await backend.subscribe("t", catch, filter=filter_, order=order, retry=AT_ONCE, dead_letter=given_up)
        await produce(backend, "a", "bad", "unwanted", "b", key="k")
        (letter,) = await dead_letters(backend, 1)
        await settled(backend, "s")
        await settled(backend, "t")

    assert (letter.event.id, letter.subscription, letter.failure.attempts) == ("bad", "s", 3)
    assert letter.failure.error.startswith(expected)
    assert sorted(catch.ids) == ["a", "a", "b", "b"]
    assert given_up.ids == ["bad"]


async def test_a_filter_that_fails_for_a_time_decides_later(database: str) -> None:
    catch, asked = Catch(), 0

    def takes(event: Event) -> bool:
        nonlocal asked
        asked += 1
        if asked < 4:
            raise LookupError
        return event.id == "a"

    async with running(database) as backend:
        await backend.subscribe("s", catch, filter=takes, concurrency=1, retry=AT_ONCE)
        await produce(backend, "a", "b")
        await settled(backend)

    assert catch.ids == ["a"]


@pytest.mark.parametrize("order", ["none", "key"])
async def test_a_new_filter_that_fails_on_what_waits_here_does_not_let_it_through(database: str, order: Any) -> None:
    gate, catch = Gate(), Catch()
    async with running(database) as backend:
        await backend.subscribe("s", gate, order=order, concurrency=1)
        await produce(backend, "at work", "bad", "unwanted", "b", key="k")
        await gate.holds(1)
        await backend.reconfigure("s", catch, filter=_filter(Panic("no")), concurrency=1, retry=Retry(attempts=1))
        gate.open()
        await catch.has("b")
        (letter,) = await dead_letters(backend, 1)
        await settled(backend)

    assert (letter.event.id, catch.ids) == ("bad", ["b"])


async def test_what_a_filter_refuses_counts_as_handled(database: str) -> None:
    catch = Catch()
    async with running(database) as backend:
        await backend.subscribe("s", catch, filter=lambda event: event.id == "b")
        await produce(backend, "a", "b", "c")
        await settled(backend)

    assert catch.ids == ["b"]


# The dead-letter dispatcher.


@pytest.mark.parametrize("order", ["none", "key", "strict"])
async def test_a_dead_letter_dispatcher_gets_what_was_given_up_and_why(database: str, order: Any) -> None:
    got: list[tuple[str, int, Any]] = []

    async def dead(event: Event) -> None:
        got.append((event.id, event.attempt, event.failure))
        if event.attempt == 1:
            raise RuntimeError("not yet")

    catch = Catch(fails=lambda event: event.id == "bad")
    async with running(database) as backend:
        await backend.subscribe("s", catch, order=order, retry=AT_ONCE, dead_letter=dead)
        await produce(backend, "bad", "good", key="k")
        await settled(backend)
        assert [letter async for letter in backend.dead_letters()] == []

    assert catch.ids == ["good"]
    assert [(id_, attempt) for id_, attempt, _ in got] == [("bad", 1), ("bad", 2)]
    assert {failure.attempts for *_, failure in got} == {3}
    assert {failure.error for *_, failure in got} == {"RuntimeError: the target is down"}


@pytest.mark.parametrize("order", ["none", "key"])
async def test_what_the_dead_letter_dispatcher_gives_up_too_is_kept_with_the_first_failure(
    database: str, order: Any
) -> None:
    async def dead(event: Event) -> None:
        raise OSError("no disk")

    async with running(database) as backend:
        await backend.subscribe("s", _raise(RuntimeError("first")), order=order, retry=AT_ONCE, dead_letter=dead)
        await produce(backend, "a")
        (letter,) = await dead_letters(backend, 1)
        await settled(backend)

    assert letter.failure.error == "RuntimeError: first"
    assert letter.failure.attempts == 3


async def test_a_dead_letter_turn_survives_a_restart(database: str) -> None:
    gate = Gate()
    async with running(database, drain_timeout=0.1) as backend:
        await backend.subscribe("s", _raise(RuntimeError("first")), retry=Retry(attempts=1), dead_letter=gate)
        await produce(backend, "a")
        await gate.holds(1)
    failures: list[Any] = []
    catch = Catch()

    async def dead(event: Event) -> None:
        failures.append(event.failure)
        await catch(event)

    async with running(database) as backend:
        await backend.subscribe("s", Catch(), dead_letter=dead)
        await catch.has("a")
        await settled(backend)

    assert [failure.error for failure in failures] == ["RuntimeError: first"]


# Bounds.


async def test_no_more_events_are_in_flight_than_the_window_holds(database: str) -> None:
    gate = Gate()
    async with running(database, window_events=5) as backend:
        await backend.subscribe("s", gate)
        await produce(backend, *map(str, range(30)))
        await gate.holds(5)
        gate.open()
        await settled(backend)

    assert gate.most == 5
    assert sorted(gate.handled, key=int) == [str(number) for number in range(30)]


async def test_the_window_is_bounded_by_bytes_and_one_event_always_fits(database: str) -> None:
    gate = Gate()
    async with running(database, window_bytes=250_000) as backend:
        await backend.subscribe("s", gate)
        await backend.produce_many([make_event(str(number), b"x" * 100_000) for number in range(6)])
        await backend.produce(make_event("6", b"x" * 900_000))
        await gate.holds(2)
        gate.open()
        await settled(backend)

    assert gate.most == 2
    assert len(gate.handled) == 7


async def test_no_more_events_are_dispatched_at_a_time_than_concurrency_says(database: str) -> None:
    gate = Gate()
    async with running(database) as backend:
        await backend.subscribe("s", gate, concurrency=3)
        await produce(backend, *map(str, range(30)))
        await gate.holds(3)
        gate.open()
        await settled(backend)

    assert gate.most == 3


# Order.


@pytest.mark.parametrize("plain", [False, True])
async def test_concurrency_counts_in_each_shard_for_coroutines_and_threads_alike(database: str, plain: bool) -> None:
    at_work = most = 0
    lock, met = threading.Lock(), threading.Event()

    def begin() -> None:
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
            if at_work == 4:
                met.set()

    def end() -> None:
        nonlocal at_work
        with lock:
            at_work -= 1

    def handle(event: Event) -> None:
        begin()
        assert met.wait(20)
        end()

    async def handle_async(event: Event) -> None:
        begin()
        async with asyncio.timeout(20):
            while not met.is_set():
                await asyncio.sleep(0.01)
        end()

    async with running(database) as backend:
        await backend.subscribe(
            "s", handle if plain else handle_async, shards=2, concurrency=2, retry=Retry(attempts=1)
        )
        await backend.produce_many([make_event(str(number), key=str(number)) for number in range(40)])
        await settled(backend)
        assert [letter async for letter in backend.dead_letters()] == []

    assert most == 4


async def test_events_of_one_key_go_one_after_another_and_do_not_wait_for_other_keys(database: str) -> None:
    running_keys: set[object] = set()
    seen: dict[object, list[str]] = {}

    async def handle(event: Event) -> None:
        assert event.key not in running_keys, "two of one key at a time"
        running_keys.add(event.key)
        await asyncio.sleep(0.001)
        if event.attempt == 1 and int(event.id) % 7 == 0:
            running_keys.discard(event.key)
            raise RuntimeError("once")
        seen.setdefault(event.key, []).append(event.id)
        running_keys.discard(event.key)

    async with running(database) as backend:
        await backend.subscribe("s", handle, order="key", retry=Retry(attempts=3, delay=0.05))
        await backend.produce_many([make_event(str(number), key=f"k{number % 5}") for number in range(100)])
        await settled(backend)
        assert [letter async for letter in backend.dead_letters()] == []

    assert seen == {("partitionkey", f"k{key}"): [str(number) for number in range(key, 100, 5)] for key in range(5)}


async def test_events_without_a_key_wait_for_nobody(database: str) -> None:
    gate = Gate()
    async with running(database) as backend:
        await backend.subscribe("s", gate, order="key")
        await produce(backend, "a", "b", "c")
        await gate.holds(3)
        gate.open()


async def test_a_failing_event_holds_its_key_and_no_other(database: str) -> None:
    fails = True
    catch = Catch(fails=lambda event: fails and event.id == "k1")
    async with running(database) as backend:
        await backend.subscribe("s", catch, order="key", retry=Retry(attempts=100, delay=0.02, backoff="constant"))
        await produce(backend, "k1", "k2", key="k")
        await produce(backend, "j1", key="j")
        await catch.has("j1")
        assert "k2" not in catch.ids
        fails = False
        await catch.has("k1", "k2")

    assert catch.ids == ["j1", "k1", "k2"]


async def test_strict_is_one_at_a_time_in_log_order_whatever_fails(database: str) -> None:
    at_work = 0
    seen: list[str] = []

    async def handle(event: Event) -> None:
        nonlocal at_work
        at_work += 1
        assert at_work == 1
        await asyncio.sleep(0)
        at_work -= 1
        if event.attempt == 1 and int(event.id) % 5 == 0:
            raise RuntimeError("once")
        seen.append(event.id)

    async with running(database) as backend:
        await backend.subscribe("s", handle, order="strict", retry=AT_ONCE)
        await produce(backend, *map(str, range(40)))
        await settled(backend)

    assert seen == [str(number) for number in range(40)]


async def test_a_strict_subscription_goes_on_after_any_number_of_events_it_gave_up(database: str) -> None:
    catch = Catch(fails=lambda event: event.id != "good")
    async with running(database) as backend:
        await backend.subscribe("s", catch, order="strict", retry=Retry(attempts=1))
        await produce(backend, *map(str, range(3 * FAILURES_IN_A_ROW)), "good")
        await catch.has("good")


async def test_the_next_owner_of_an_ordered_shard_goes_on_at_the_attempt_that_is_due(database: str) -> None:
    attempts: list[tuple[str, int]] = []

    async def fail(event: Event) -> None:
        attempts.append((event.id, event.attempt))
        if event.attempt == 2:
            raise RetryAfter("later", delay=600.0)
        raise RuntimeError("once more")

    async with running(database) as backend:
        await backend.subscribe("s", fail, order="key", retry=Retry(attempts=9, delay=0.01))
        await produce(backend, "a", "b", key="k")

        async def has_failed_twice() -> bool:
            return len(attempts) == 2

        await eventually("two failures", has_failed_twice)
    assert attempts == [("a", 1), ("a", 2)]
    attempts.clear()
    await due_in(database, 0.0)

    async def handle(event: Event) -> None:
        attempts.append((event.id, event.attempt))

    async with running(database) as backend:
        await backend.subscribe("s", handle, order="key")
        await settled(backend)

    assert attempts == [("a", 3), ("b", 1)]


async def test_a_late_event_of_a_key_and_one_that_waits_for_its_retry_never_run_at_once(database: str) -> None:
    """`late` fills a hole below `early`, of the same key, which has failed and waits, while the owner changes."""
    producer = await asyncpg.connect(database)
    await producer.execute("BEGIN")
    keyed = "INSERT INTO pgbackend.events (id, source, type, partitionkey) VALUES ($1, 'test', 'test', 'k')"
    await producer.execute(keyed, "late")
    first = Catch(fails=lambda _: True)
    async with running(database, hole_wait=0.05) as backend:
        await backend.subscribe("s", first, start="earliest", order="key", retry=Retry(delay=600.0))
        await produce(backend, "early", key="k")

        async def has_failed() -> bool:
            return first.attempts == ["early"]

        await eventually("early fails", has_failed)
    await producer.execute("COMMIT")
    await due_in(database, 1.0)
    at_work: list[str] = []
    done: list[tuple[str, int]] = []

    async def handle(event: Event) -> None:
        assert not at_work, "two of one key at a time"
        at_work.append(event.id)
        await eventually("early is due", is_due)
        await asyncio.sleep(0.1)
        at_work.clear()
        done.append((event.id, event.attempt))

    async def is_due() -> object:
        return await producer.fetchval("SELECT coalesce(max(due_at), '-infinity') < now() FROM pgbackend.redeliveries")

    async with running(database) as backend:
        await backend.subscribe("s", handle, order="key")
        await settled(backend)
    await producer.close()

    # In this order, unless the machine stood still until early was due.
    assert sorted(done) == [("early", 2), ("late", 1)]


# A target that is down.


async def test_a_target_that_is_down_gets_single_probes_and_all_events_once_it_is_back(database: str) -> None:
    is_down = True
    catch = Catch(fails=lambda _: is_down)
    retry = Retry(attempts=4, delay=0.05, max_delay=0.05)
    ids = [str(number) for number in range(100)]
    with Recorder() as recorder:
        async with running(database) as backend:
            await backend.subscribe("s", catch, retry=retry, concurrency=8)
            await produce(backend, *ids)
            await recorder.wait("target is down")

            async def has_probed() -> bool:
                return len(catch.attempts) > 2 * FAILURES_IN_A_ROW + 10

            await eventually("ten probes", has_probed)
            assert (await backend.status()).subscriptions[0].state == "target down"
            is_down = False
            await recorder.wait("target is up")
            await catch.has(*ids)
            await settled(backend)
            assert [letter async for letter in backend.dead_letters()] == [], "an outage buries nothing"

    assert sorted(catch.ids, key=int) == ids


async def test_a_new_target_does_not_wait_for_a_probe_of_the_old_one_that_hangs(database: str) -> None:
    probes: list[str] = []
    is_down = True
    other = Catch(fails=lambda _: is_down)
    ids = [str(number) for number in range(30)]

    async def handle(event: Event) -> None:
        if recorder.all("target is down"):
            probes.append(event.id)
            await asyncio.Event().wait()
        raise RuntimeError("the target is down")

    with Recorder() as recorder:
        async with running(database, drain_timeout=0.5) as backend:
            retry = Retry(attempts=20, delay=0.01, max_delay=0.05)
            await backend.subscribe("s", handle, retry=retry, concurrency=2)
            await produce(backend, *ids)
            await eventually("a probe hangs", lambda: bool(probes))
            await backend.reconfigure("s", other, concurrency=2, retry=retry)
            await recorder.wait("target is down", count=2)
            is_down = False
            await other.has(*(id_ for id_ in ids if id_ not in probes))

    assert len(probes) <= 2


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_a_target_that_is_down_does_not_hold_up_dead_letters(database: str, concurrency: int) -> None:
    dead = Catch()
    retry = Retry(attempts=1, delay=60.0, backoff="constant")
    count = 2 * FAILURES_IN_A_ROW
    with Recorder() as recorder:
        async with running(database, drain_timeout=1.0) as backend:
            await backend.subscribe(
                "s", Catch(fails=lambda _: True), retry=retry, concurrency=concurrency, dead_letter=dead
            )
            await produce(backend, *map(str, range(count)))
            await recorder.wait("target is down")
            # Those whose failures took it down; the rest waits for its probe, in a minute.
            await dead.has(*map(str, range(FAILURES_IN_A_ROW)))


async def test_an_outage_in_key_order_buries_nothing_and_keeps_the_order(database: str) -> None:
    is_down = True
    catch = Catch(fails=lambda _: is_down)
    ids = [f"{key}-{number}" for number in range(3) for key in range(15)]
    with Recorder() as recorder:
        async with running(database) as backend:
            await backend.subscribe("s", catch, order="key", retry=Retry(attempts=5, delay=0.05, max_delay=0.05))
            await backend.produce_many([make_event(id_, key=id_.split("-")[0]) for id_ in ids])
            await recorder.wait("target is down")
            is_down = False
            await catch.has(*ids)
            assert [letter async for letter in backend.dead_letters()] == []

    for key in range(15):
        assert [id_ for id_ in catch.ids if id_.startswith(f"{key}-")] == [f"{key}-{number}" for number in range(3)]


# Coming to an end.


async def test_stop_waits_for_what_is_in_flight_and_commits_it(database: str) -> None:
    gate = Gate()
    async with running(database) as backend:
        await backend.subscribe("s", gate, concurrency=2)
        await produce(backend, "a", "b", "c")
        await gate.holds(2)
        stopping = asyncio.create_task(backend.stop())
        await asyncio.wait({stopping}, timeout=0.1)
        assert not stopping.done()
        gate.open()
        await stopping
    again = Catch()
    async with running(database) as backend:
        await backend.subscribe("s", again)
        await settled(backend)

    assert sorted(gate.handled) == ["a", "b"]
    assert again.ids == ["c"], "neither again nor never"


async def test_at_the_drain_timeout_dispatchers_are_cancelled_and_their_events_come_again(database: str) -> None:
    gate = Gate()
    with Recorder() as recorder:
        async with running(database, drain_timeout=0.1) as backend:
            await backend.subscribe("s", gate)
            await produce(backend, "a")
            await gate.holds(1)
        assert [fields["events"] for fields in recorder.all("drain timed out")] == [["a"]]
    assert gate.waiting == gate.handled == []
    catch = Catch()
    async with running(database) as backend:
        await backend.subscribe("s", catch)
        await catch.has("a")


async def test_what_was_handled_is_committed_though_there_is_no_time_to_drain(database: str) -> None:
    catch = Catch()
    async with running(database, drain_timeout=0, commit_interval=60) as backend:
        await backend.subscribe("s", catch)
        for id_ in ("a", "b", "c"):
            await produce(backend, id_)
            await catch.has(id_)
    async with running(database) as backend:
        (status,) = (await backend.status()).subscriptions

    assert status.lag == 0


async def test_unsubscribe_returns_once_nothing_is_in_flight_and_the_rest_comes_after_subscribing_again(
    database: str,
) -> None:
    gate = Gate()
    async with running(database) as backend:
        await backend.subscribe("s", gate, concurrency=2)
        await produce(backend, "a", "b", "c")
        await gate.holds(2)
        leaving = asyncio.create_task(backend.unsubscribe("s"))
        await asyncio.wait({leaving}, timeout=0.1)
        assert not leaving.done()
        gate.open()
        await leaving
        assert sorted(gate.handled) == ["a", "b"]
        (status,) = (await backend.status()).subscriptions
        assert status.shards[0].owner is None
        await produce(backend, "d")
        catch = Catch()
        await backend.subscribe("s", catch)
        await catch.has("c", "d")

    assert catch.ids == ["c", "d"]


async def test_nothing_is_dispatched_after_unsubscribe_though_a_claim_was_under_way(database: str) -> None:
    async with running(database) as backend:
        for turn in range(20):
            catch = Catch()
            await backend.subscribe("s", catch, start="earliest", order="key")
            # Without waiting: the worker is about to claim the shard, or has just done so.
            for _ in range(turn % 7):
                await asyncio.sleep(0.001)
            await backend.unsubscribe("s")
            before = len(catch.attempts)
            await produce(backend, "x")
            await asyncio.sleep(0.01)
            assert len(catch.attempts) == before
            await backend.delete_subscription("s")


async def test_a_plain_insert_is_dispatched_like_any_other_event(database: str) -> None:
    catch = Catch()
    producer = await asyncpg.connect(database)
    async with running(database) as backend:
        await backend.subscribe("s", catch)
        await producer.execute(INSERT, "plain")
        await catch.has("plain")
    await producer.close()


@pytest.mark.parametrize("dead_letter", [False, True])
async def test_an_event_found_due_before_its_commit_is_answered_is_dispatched_once(
    database: str, monkeypatch: pytest.MonkeyPatch, dead_letter: bool
) -> None:
    """The row can be seen from its commit on; the worker that scheduled it hears of that later."""
    fetch = Database.fetch

    async def answered_late(self: Database, statement: str, *args: Any, **options: Any) -> Any:
        rows = await fetch(self, statement, *args, **options)
        if "commit_by_key" in statement:
            worker_of(backend).redeliver_soon()
            await asyncio.sleep(0.1)
        return rows

    monkeypatch.setattr(Database, "fetch", answered_late)
    tries: list[int] = []

    async def second(event: Event) -> None:
        tries.append(event.attempt)
        await asyncio.sleep(0.3)

    async def first(event: Event) -> None:
        if dead_letter:
            raise Reject("no")
        if event.attempt == 1:
            raise RuntimeError("not yet")
        await second(event)

    async with running(database) as backend:
        await backend.subscribe("s", first, retry=AT_ONCE, dead_letter=second if dead_letter else None)
        await produce(backend, "a")
        await settled(backend)

    assert tries == [1 if dead_letter else 2]


async def test_unsubscribe_waits_for_a_letter_whose_event_is_at_work_as_well(database: str) -> None:
    """After a seek, an event may be at work from the log and from its dead letter at once."""
    gates = [asyncio.Event(), asyncio.Event()]
    started, ended = 0, 0

    async def dispatch(event: Event) -> None:
        nonlocal started, ended
        started += 1
        if started == 1:
            raise Reject("no")
        await gates[started - 2].wait()
        ended += 1

    async def reached(count: int) -> None:
        async def has_started() -> bool:
            return started >= count

        await eventually(f"{count} dispatches", has_started)

    async with running(database) as backend:
        await backend.subscribe("s", dispatch)
        await produce(backend, "a")
        await dead_letters(backend, 1)
        await backend.seek("s", "earliest")
        await reached(2)
        await backend.redeliver(subscription="s")
        await reached(3)
        gates[0].set()
        await settled(backend)
        unsubscribing = asyncio.create_task(backend.unsubscribe("s"))
        await asyncio.wait({unsubscribing}, timeout=0.3)
        assert not unsubscribing.done()
        gates[1].set()
        await unsubscribing

    assert ended == 2


@pytest.mark.parametrize("how", ["returns", "raises"])
@pytest.mark.parametrize("at_once", [False, True])
async def test_a_dispatcher_that_swallows_its_cancellation_holds_nothing_up_and_gets_nothing_more(
    database: str, how: str, at_once: bool
) -> None:
    begun: list[str] = []

    async def stubborn(event: Event) -> None:
        begun.append(event.id)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if how == "raises":
                raise OSError("interrupted") from None

    backend = Backend(database, drain_timeout=60.0 if at_once else 0.05)
    await backend.init()
    await backend.subscribe("s", stubborn, concurrency=1)
    await produce(backend, "a", "b")
    starting = asyncio.create_task(backend.start())

    async def has_begun() -> bool:
        return bool(begun)

    await eventually("a dispatch", has_begun)
    async with asyncio.timeout(30):
        starting.cancel()
        if at_once:
            await asyncio.sleep(0)
            starting.cancel()
        await asyncio.wait({starting})
        await backend.stop()

    assert begun == ["a"]


async def test_a_target_that_is_down_gets_single_probes_from_all_shards_together(database: str) -> None:
    at_work, most, probes = 0, 0, 0
    is_probed = False

    async def failing(event: Event) -> None:
        nonlocal at_work, most, probes, is_probed
        if is_probed:
            probes += 1
            most = max(most, at_work + 1)
        at_work += 1
        try:
            await asyncio.sleep(0.05)
            raise RuntimeError("the target is down")
        finally:
            at_work -= 1
            is_probed = is_probed or (not at_work and bool(recorder.all("target is down")))

    async def enough() -> bool:
        return probes >= 6

    with Recorder() as recorder:
        async with running(database, drain_timeout=1.0) as backend:
            retry = Retry(attempts=100, delay=0.05, max_delay=0.05)
            await backend.subscribe("s", failing, retry=retry, shards=4)
            await produce(backend, *map(str, range(100)))
            await eventually("some probes", enough)

    assert most == 1


async def test_what_a_later_filter_refuses_is_not_waited_for_any_more(database: str) -> None:
    async with running(database) as backend:
        await backend.subscribe("s", _raise(RuntimeError("no")), order="key", retry=Retry(delay=60.0))
        await produce(backend, "a", key="k")

        async def has_failed() -> bool:
            return bool((await backend.status()).subscriptions[0].redeliveries)

        await eventually("it waits to be tried again", has_failed)
    catch = Catch()
    async with running(database) as backend:
        await backend.subscribe("s", catch, order="key", filter=lambda event: event.id != "a")
        await produce(backend, "b", key="k")
        await settled(backend)

    assert catch.ids == ["b"]


@pytest.mark.parametrize("order", ["none", "key"])
async def test_a_delay_beyond_all_dates_does_not_stop_the_commits(database: str, order: Any) -> None:
    catch = Catch(fails=lambda event: event.id == "bad")
    async with running(database) as backend:
        century = 36_525 * 86_400
        await backend.subscribe("s", catch, order=order, retry=Retry(delay=century, max_delay=century))
        await produce(backend, "bad", "good")
        await catch.has("good")

        async def is_scheduled() -> bool:
            return bool((await backend.status()).subscriptions[0].redeliveries)

        await eventually("the failure is kept", is_scheduled)


@pytest.mark.owner
@pytest.mark.parametrize("sqlstate", ["22021", "23514", "53200", "54000"])
@pytest.mark.parametrize("order", ["none", "key"])
async def test_an_offset_is_committed_though_the_text_of_an_error_is_refused(
    database: str, order: Any, sqlstate: str
) -> None:
    connection = await asyncpg.connect(database)
    await connection.execute(
        f"""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF to_jsonb(new)::text LIKE '%poison%' THEN
                RAISE EXCEPTION 'no such text' USING ERRCODE = '{sqlstate}';
            END IF;
            RETURN new;
        END $$;
        CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON pgbackend.redeliveries
            FOR EACH ROW EXECUTE FUNCTION refuse();
        CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON pgbackend.dead_letters
            FOR EACH ROW EXECUTE FUNCTION refuse();
        """
    )
    await connection.close()
    given_up = Catch(fails=lambda _: True)

    async def handle(event: Event) -> None:
        if event.id == "bad":
            raise Detailed("poison")

    async with running(database) as backend:
        await backend.subscribe("s", handle, order=order, retry=AT_ONCE)
        await backend.subscribe("t", handle, order=order, retry=AT_ONCE, dead_letter=given_up)
        await produce(backend, "bad", "good", key="k")
        found = await dead_letters(backend, 2)
        await settled(backend, "s")
        await settled(backend, "t")
        await backend.redeliver(subscription="s")

        async def has_failed_again() -> bool:
            return any([letter.failure.attempts == 6 async for letter in backend.dead_letters("s")])

        await eventually("the letter failed again", has_failed_again)

    assert [letter.failure.attempts for letter in found] == [3, 3]
    assert all(f"cannot be stored, SQLSTATE {sqlstate}" in letter.failure.error for letter in found)


async def test_details_are_kept_as_far_as_there_is_room(database: str) -> None:
    large = Detailed("no")
    large.details = MappingProxyType({"first": "\0" * 10, "large": "ä" * 50_000_000, "\ud800": "beyond"})
    many = Detailed("no")
    many.details = MappingProxyType({str(n): "x" for n in range(200_000)})

    async def handle(event: Event) -> None:
        raise large if event.id == "large" else many

    async with running(database) as backend:
        await backend.subscribe("s", handle, retry=Retry(attempts=1))
        await produce(backend, "large", "many")
        found = {letter.event.id: letter.failure.details for letter in await dead_letters(backend, 2)}

    assert found["large"]["first"] == "\\0" * 10
    assert 10_000 < len(found["large"]["large"]) < 64 << 10
    assert 100 < len(found["many"]) < 10_000
    assert max(len(str(dict(details)).encode()) for details in found.values()) < 80_000
