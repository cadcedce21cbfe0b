"""Dispatchers that get batches. Those of transactional subscriptions are in test_transactions.py."""

import time
from typing import Any

import pytest

from pgbackend import Backend, ConfigError, Event, Failed, Pause, Reject, Retry
from pgbackend.delivery.shard import Shard
from pgbackend.facts import Recorder
from pgbackend.model import Order
from tests.support.backends import SOON, dead_letters, produce, settled, status_of, worker_of
from tests.support.events import make_event
from tests.support.polling import eventually

NO_WAIT = Retry(attempts=3, delay=0.0)


class Batches:
    """Keeps the ids of each batch. Raises what `fails` returns for it."""

    def __init__(self, fails: Any = lambda batch: None) -> None:
        self.fails = fails
        self.batches: list[list[str]] = []
        self.handled: list[str] = []

    async def __call__(self, batch: list[Event], *_: object) -> None:
        ids = [event.id for event in batch]
        self.batches.append(ids)
        error = self.fails(batch)
        if isinstance(error, Failed):
            self.handled += [event.id for event in batch if event not in error.errors]
        if error is not None:
            raise error
        self.handled += ids


async def subscribed(backend: Backend, batches: Any, *ids: str, **options: Any) -> None:
    """Everything is settled of a subscription that begins with these events in the log."""
    await produce(backend, *ids)
    await backend.subscribe("s", batches, start="earliest", **{"retry": NO_WAIT, **options})
    await settled(backend)


def numbers(count: int) -> list[str]:
    return [str(number) for number in range(count)]


@pytest.mark.parametrize("order", ["none", "key", "strict"])
async def test_a_dispatcher_gets_batches_in_log_order(database: str, order: Order) -> None:
    batches = Batches()
    async with Backend(database, **SOON) as backend:
        await subscribed(backend, batches, *numbers(250), batch=100, concurrency=1, order=order)

    assert batches.handled == numbers(250)
    assert max(map(len, batches.batches)) == 100


async def test_a_batch_of_one_is_a_list(database: str) -> None:
    batches = Batches()
    async with Backend(database, **SOON) as backend:
        await subscribed(backend, batches, "a", "b", batch=1)

    assert sorted(batches.batches) == [["a"], ["b"]]


async def test_a_plain_function_gets_batches_in_a_thread(database: str) -> None:
    got: list[str] = []

    def handle(batch: list[Event]) -> None:
        got.extend(event.id for event in batch)

    async with Backend(database, **SOON) as backend:
        await subscribed(backend, handle, *numbers(20), batch=10, concurrency=1)

    assert got == numbers(20)


async def test_the_events_that_failed_names_are_tried_again_and_the_others_are_not(database: str) -> None:
    def fails(batch: list[Event]) -> Failed | None:
        bad = {event: ValueError("odd") for event in batch if int(event.id) % 2 and event.attempt == 1}
        return Failed(bad) if bad else None

    batches = Batches(fails)
    async with Backend(database, **SOON) as backend:
        await subscribed(backend, batches, *numbers(20), batch=20)

    assert sorted(batches.handled, key=int) == numbers(20)
    assert batches.batches[0] == numbers(20)
    assert sorted(batches.batches[1:], key=str) == sorted([[str(number)] for number in range(1, 20, 2)], key=str)


async def test_an_error_in_failed_counts_as_if_the_event_had_been_alone(database: str) -> None:
    def fails(batch: list[Event]) -> Failed | None:
        return Failed({event: Reject("never", details={"why": "3"}) for event in batch if event.id == "3"})

    batches = Batches(lambda batch: fails(batch) if len(batch) > 1 else None)
    async with Backend(database, **SOON) as backend:
        await subscribed(backend, batches, *numbers(5), batch=5)
        (letter,) = await dead_letters(backend, 1)

    assert (letter.event.id, letter.failure.error, letter.failure.details) == ("3", "Reject: never", {"why": "3"})
    assert letter.failure.attempts == 1
    assert batches.handled == ["0", "1", "2", "4"]


async def test_an_exception_of_a_batch_harms_only_the_event_that_fails_alone(database: str) -> None:
    def fails(batch: list[Event]) -> Exception | None:
        return ValueError("bad event") if any(event.id == "37" for event in batch) else None

    batches = Batches(fails)
    async with Backend(database, **SOON) as backend:
        await subscribed(backend, batches, *numbers(64), batch=64, concurrency=1)
        (letter,) = await dead_letters(backend, 1)

    assert (letter.event.id, letter.failure.attempts) == ("37", 3)
    assert sorted(batches.handled, key=int) == [number for number in numbers(64) if number != "37"]
    # Halves find it in a few calls. Each of the others is handled once.
    assert len(batches.batches) <= 20


async def test_a_target_that_handles_most_of_each_batch_is_not_down(database: str) -> None:
    batches = Batches(lambda batch: Failed({event: ValueError("odd") for event in batch if int(event.id) % 2}))
    with Recorder() as recorder:
        async with Backend(database, **SOON) as backend:
            await subscribed(backend, batches, *numbers(60), batch=60, retry=Retry(attempts=1))

    assert not recorder.all("target is down")
    assert batches.handled == [str(number) for number in range(0, 60, 2)]


async def test_failed_names_at_least_one_event() -> None:
    with pytest.raises(ConfigError, match="names no event"):
        Failed({})


async def test_failed_that_names_a_foreign_event_counts_as_an_exception_of_the_batch(database: str) -> None:
    foreign: list[Event] = []

    def fails(batch: list[Event]) -> Failed | None:
        foreign.extend(batch[:1])
        return Failed({foreign[0]: ValueError("not yours")}) if len(foreign) == 2 else None

    batches = Batches(fails)
    async with Backend(database, **SOON) as backend:
        await subscribed(backend, batches, "a", "b", "c", batch=1, concurrency=1)
        assert await dead_letters(backend, 0) == []

    assert sorted(batches.batches) == [["a"], ["b"], ["b"], ["c"]]


async def test_a_target_that_is_down_is_not_flooded_by_batches(database: str) -> None:
    down = True
    batches = Batches(lambda batch: ConnectionError("down") if down else None)
    with Recorder() as recorder:
        async with Backend(database, **SOON) as backend:
            await produce(backend, *numbers(1000))
            await backend.subscribe("s", batches, start="earliest", batch=100, retry=Retry(delay=0.05, attempts=9))
            await recorder.wait("target is down")
            calls = len(batches.batches)
            down = False
            await settled(backend)

    assert calls <= 64 * 20
    assert sorted(batches.handled, key=int) == numbers(1000)


async def test_a_pause_puts_the_whole_batch_back(database: str) -> None:
    batches = Batches(lambda _: Pause("closed"))
    later = Batches()
    async with Backend(database, **SOON) as backend:
        await produce(backend, *numbers(10))
        await backend.subscribe("s", batches, start="earliest", batch=10, concurrency=1)
        await eventually("a call", lambda: bool(batches.batches))
        await eventually("paused", lambda: _is_paused(backend))
        await backend.reconfigure("s", later, batch=10, concurrency=1)
        await settled(backend)

    assert batches.batches == [numbers(10)]
    assert later.handled == numbers(10)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("order", ["none", "key"])
async def test_what_a_batch_leaves_after_a_reconfigure_passes_the_new_filter(
    database: str, order: Order, *, named: bool
) -> None:
    later = Batches()
    async with Backend(database, **SOON) as backend:

        async def reconfigure(batch: list[Event], _: object) -> None:
            await backend.reconfigure("s", later, batch=4, filter=lambda event: event.id in "ad", transactional=True)
            raise Failed({batch[1]: ValueError("no")}) if named else Pause("closed")

        await produce(backend, *"abcd", key="k")
        await backend.subscribe("s", reconfigure, start="earliest", batch=4, order=order, transactional=True)
        await settled(backend)

    assert later.handled == ["a", "d"]


async def _is_paused(backend: Backend) -> bool:
    return (await status_of(backend)).state == "paused: closed"


@pytest.mark.parametrize("whole", [False, True], ids=["named", "found in halves"])
@pytest.mark.parametrize("order", ["key", "strict"])
async def test_in_ordered_modes_a_failed_event_holds_up_those_behind_it_even_in_its_batch(
    database: str, order: Order, *, whole: bool
) -> None:
    tries: dict[str, int] = {}

    def fails(batch: list[Event]) -> Exception | None:
        bad = [event for event in batch if int(event.id) % 7 == 3 and event.attempt < 3]
        if not bad:
            return None
        if whole:
            return ValueError("bad")
        # All from the first bad one on: a dispatcher that handles them in order stops there.
        rest = batch[batch.index(bad[0]) :]
        return Failed({event: ValueError("bad") for event in rest})

    batches = Batches(fails)
    async with Backend(database, **SOON) as backend:
        await backend.produce_many([make_event(number, key=f"k{int(number) % 3}") for number in numbers(60)])
        await backend.subscribe("s", batches, start="earliest", batch=16, order=order, retry=NO_WAIT)
        await settled(backend)
        assert await dead_letters(backend, 0) == []

    for key in range(3) if order == "key" else (None,):
        of_key = [number for number in batches.handled if key is None or int(number) % 3 == key]
        assert of_key == sorted(of_key, key=int), (key, tries)
    assert sorted(batches.handled, key=int) == numbers(60)


async def test_a_batch_of_several_keys_is_in_log_order(database: str) -> None:
    batches = Batches()
    async with Backend(database, **SOON) as backend:
        await backend.produce_many([make_event(number, key=f"k{int(number) % 3}") for number in numbers(30)])
        await backend.subscribe("s", batches, start="earliest", batch=30, order="key")
        await settled(backend)

    assert batches.handled == numbers(30)


async def test_one_key_alone_fills_batches_in_its_order(database: str) -> None:
    batches = Batches()
    async with Backend(database, **SOON) as backend:
        await backend.produce_many([make_event(number, key="k") for number in numbers(100)])
        await backend.subscribe("s", batches, start="earliest", batch=50, order="key")
        await settled(backend)

    assert batches.handled == numbers(100)
    assert len(batches.batches) <= 4


@pytest.mark.parametrize("order", ["none", "key", "strict"])
async def test_a_batch_that_is_handled_at_once_commits_nothing_but_the_offset(
    database: str, order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes: list[object] = []
    monkeypatch.setattr(Shard, "record", lambda _, outcome: outcomes.append(outcome))
    async with Backend(database, **SOON) as backend:
        await subscribed(backend, Batches(), *numbers(100), batch=10, order=order)

    assert outcomes == []


async def test_a_batch_waits_to_be_full_and_not_longer(database: str) -> None:
    batches = Batches()
    async with Backend(database, **SOON) as backend:
        await backend.subscribe("s", batches, batch=10, batch_wait=30.0)
        for number in numbers(10):
            await produce(backend, number)
        await eventually("the full batch", lambda: batches.handled == numbers(10))
        await backend.reconfigure("s", batches, batch=10, batch_wait=0.3)
        began = time.monotonic()
        await produce(backend, "x")
        await eventually("the rest", lambda: "x" in batches.handled)

    assert batches.batches == [numbers(10), ["x"]]
    assert time.monotonic() - began >= 0.3


@pytest.mark.parametrize("options", [{}, {"batch": 2}, {"batch": 10}, {"transactional": True}], ids=str)
async def test_a_subscription_that_is_reconfigured_while_a_batch_fills_loses_no_event(
    database: str, options: dict[str, Any]
) -> None:
    handled: list[str] = []

    async def handle(work: Any, *_: object) -> None:
        batch = work if isinstance(work, list) else [work]
        assert len(batch) <= options.get("batch", 1)
        handled.extend(event.id for event in batch)

    async with Backend(database, **SOON) as backend:
        await backend.subscribe("s", Batches(), batch=10, batch_wait=3600.0)
        await produce(backend, "a", "b", "c")
        await eventually(
            "the batch fills", lambda: [len(pump.shard.window) for pump in worker_of(backend).pumps] == [3]
        )
        await backend.reconfigure("s", handle, concurrency=1, **options)
        await settled(backend)

    assert sorted(handled) == ["a", "b", "c"]


async def test_a_batch_does_not_wait_for_events_that_the_window_has_no_room_for(database: str) -> None:
    batches = Batches()
    async with Backend(database, window_bytes=1 << 20, **SOON) as backend:
        await backend.subscribe("s", batches, batch=100, batch_wait=3600.0)
        for number in numbers(5):
            await backend.produce(make_event(number, data=b"x" * 400_000))
        await eventually("what fits", lambda: batches.handled[:2] == ["0", "1"])


async def test_a_batch_that_waits_does_not_hold_up_a_stop(database: str) -> None:
    batches = Batches()
    async with Backend(database, **SOON) as backend:
        await backend.subscribe("s", batches, batch=10, batch_wait=60.0)
        await produce(backend, "a")
        await eventually("a batch waits", lambda: any(pump._groups._filling for pump in worker_of(backend).pumps))
        began = time.monotonic()
    assert time.monotonic() - began < 5
    assert batches.batches == []


async def test_a_handler_that_stops_its_backend_in_a_batch_is_not_waited_for(database: str) -> None:
    backend = Backend(database, **SOON)
    handled: list[str] = []

    async def stop(batch: list[Event]) -> None:
        await backend.stop()
        handled.extend(event.id for event in batch)

    await backend.init()
    await produce(backend, *numbers(5))
    await backend.subscribe("s", stop, start="earliest", batch=5)
    began = time.monotonic()
    await backend.start()
    await backend.stop()
    assert time.monotonic() - began < 10
    assert handled == numbers(5)


@pytest.mark.parametrize(
    "options",
    [{"batch": 0}, {"batch": 10_001}, {"batch": True}, {"batch_wait": 1.0}, {"batch": 5, "batch_wait": -1},
     {"batch": 5, "batch_wait": float("nan")}, {"transactional": 1}, {"transactional": True}],
    ids=str,
)  # fmt: skip
async def test_options_of_batches_out_of_their_bounds_are_refused(backend: Backend, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        await backend.subscribe("s", print, **options)
