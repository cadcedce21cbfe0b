import asyncio
import threading
from contextvars import ContextVar
from typing import Any

import pytest

from pgbackend import Backend, ConfigError, Event, Pause, Reject, Retry, SubscriptionNotFoundError, filters
from pgbackend.delivery.deliverers import Deliverers
from pgbackend.delivery.health import FAILURES_IN_A_ROW
from pgbackend.facts import Recorder
from tests.support.backends import failed, produce, running, settled, worker_of
from tests.support.dispatchers import Catch, Gate
from tests.support.events import make_event
from tests.support.polling import eventually

ORDERS = ["none", "key", "strict"]


async def state(backend: Backend) -> str:
    return (await backend.status()).subscriptions[0].state


async def refuse(event: Event) -> None:
    raise RuntimeError("no")


class Gone:
    """A target that wants nothing more from its `after`th event on."""

    def __init__(self, after: int = 1) -> None:
        self.after = after
        self.asked: list[tuple[str, int]] = []

    async def __call__(self, event: Event) -> None:
        self.asked.append((event.id, event.attempt))
        if len(self.asked) >= self.after:
            raise Pause("410 Gone", details={"status": "410"})


# A pause.


@pytest.mark.parametrize("order", ORDERS)
async def test_a_pause_stops_dispatching_and_loses_counts_and_buries_nothing(database: str, order: Any) -> None:
    gone, catch = Gone(after=3), Catch()
    attempts: list[int] = []

    async def counted(event: Event) -> None:
        attempts.append(event.attempt)
        await catch(event)

    ids = [str(number) for number in range(20)]
    with Recorder() as recorder:
        async with running(database) as backend:
            await backend.subscribe("s", gone, order=order, concurrency=1, retry=Retry(attempts=1))
            await produce(backend, *ids, key="k")
            paused = await recorder.wait("subscription paused")
            assert (paused["subscription"], paused["reason"]) == ("s", "410 Gone")
            assert paused["details"] == {"status": "410"}
            assert await state(backend) == "paused: 410 Gone"
            await produce(backend, "more", key="k")
            (status,) = (await backend.status()).subscriptions
            assert (status.redeliveries, status.dead_letters) == (0, 0)
            assert len(gone.asked) == 3
            await backend.reconfigure("s", counted)
            await recorder.wait("subscription resumed")
            assert await state(backend) == "running"
            await catch.has(*ids[2:], "more")
            await settled(backend)

    assert catch.ids == [*ids[2:], "more"]
    assert set(attempts) == {1}


@pytest.mark.parametrize("order", ["none", "key"])
async def test_a_pause_holds_all_shards_and_all_that_is_at_work_may_end(database: str, order: Any) -> None:
    gate = Gate()

    async def dispatch(event: Event) -> None:
        if event.id == "gone":
            raise Pause("gone")
        await gate(event)

    catch = Catch()
    ids = [str(number) for number in range(40)]
    with Recorder() as recorder:
        async with running(database) as backend:
            await backend.subscribe("s", dispatch, order=order, concurrency=4, shards=4)
            await produce(backend, "a", "b")
            await gate.holds(2)
            await produce(backend, "gone")
            await recorder.wait("subscription paused")
            await backend.produce_many([make_event(id_, key=id_) for id_ in ids])
            gate.open()

            async def is_settled_but_for_the_rest() -> bool:
                return len(gate.handled) == 2

            await eventually("those at work end", is_settled_but_for_the_rest)
            await backend.reconfigure("s", catch)
            await catch.has("gone", *ids)
            await settled(backend)
        assert len(recorder.all("subscription paused")) == 1

    assert sorted(gate.handled) == ["a", "b"]
    assert sorted(catch.ids) == sorted(["gone", *ids])


@pytest.mark.parametrize("order", ORDERS)
async def test_an_event_that_was_due_again_when_the_target_had_gone_keeps_its_attempts(
    database: str, order: Any
) -> None:
    attempts: list[int] = []

    async def first_fails_then_gone(event: Event) -> None:
        attempts.append(event.attempt)
        raise RuntimeError("no") if event.attempt == 1 else Pause("gone")

    async def handle(event: Event) -> None:
        attempts.append(event.attempt)

    with Recorder() as recorder:
        async with running(database) as backend:
            await backend.subscribe("s", first_fails_then_gone, order=order, retry=Retry(delay=0.01))
            await produce(backend, "a")
            await recorder.wait("subscription paused")
            await failed(backend)
            await backend.reconfigure("s", handle)
            await settled(backend)

    assert attempts == [1, 2, 2]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("due_again", [False, True])
async def test_a_paused_subscription_drains_and_the_next_one_goes_on_with_what_it_owes(
    database: str, order: Any, due_again: bool
) -> None:
    async def gone(event: Event) -> None:
        raise RuntimeError("no") if due_again and event.attempt == 1 else Pause("gone")

    with Recorder() as recorder:
        async with running(database) as backend:
            await backend.subscribe("s", gone, order=order, retry=Retry(delay=0.01))
            await produce(backend, "a", "b", key="k")
            await recorder.wait("subscription paused")
            async with asyncio.timeout(20):
                await backend.unsubscribe("s")
            catch = Catch()
            await backend.subscribe("s", catch, order=order)
            await backend.resume("s")
            await catch.has("a", "b")
            await settled(backend)

    assert sorted(catch.ids) == ["a", "b"]
    assert catch.ids == ["a", "b"] or order == "none"


async def test_a_letter_that_was_sent_again_waits_as_well(database: str) -> None:
    async def dispatch(event: Event) -> None:
        raise Reject("no") if event.attempt == 1 and not resent else Pause("gone")

    resent = False
    with Recorder() as recorder:
        async with running(database) as backend:
            await backend.subscribe("s", dispatch)
            await produce(backend, "a")
            await recorder.wait("event buried")

            async def is_kept() -> bool:
                return bool((await backend.status()).subscriptions[0].dead_letters)

            await eventually("the letter is kept", is_kept)
            resent = True
            await backend.redeliver(subscription="s")
            await recorder.wait("subscription paused")
            catch = Catch()
            await backend.reconfigure("s", catch)
            await catch.has("a")


@pytest.mark.parametrize("order", ORDERS)
async def test_a_dead_letter_target_that_has_gone_refuses_its_event_and_pauses_nothing(
    database: str, order: Any
) -> None:
    catch = Catch(fails=lambda event: event.id == "bad")
    with Recorder() as recorder:
        async with running(database) as backend:
            await backend.subscribe("s", catch, order=order, retry=Retry(attempts=1), dead_letter=Gone())
            await produce(backend, "bad", "good")
            await catch.has("good")
            await recorder.wait("event buried")
            await settled(backend)
        assert not recorder.all("subscription paused")


async def test_a_plain_function_pauses_from_its_thread(database: str) -> None:
    def gone(event: Event) -> None:
        raise Pause("gone")

    with Recorder() as recorder:
        async with running(database) as backend:
            await backend.subscribe("s", gone)
            await produce(backend, "a")
            await recorder.wait("subscription paused")
            catch = Catch()
            await backend.reconfigure("s", catch)
            await catch.has("a")


async def test_a_probe_that_finds_the_target_gone_pauses_and_nothing_is_probed_any_more(database: str) -> None:
    async def dispatch(event: Event) -> None:
        asked.append(event.id)
        raise Pause("gone") if recorder.all("target is down") else RuntimeError("no")

    async def refuse(_event: Event) -> None:
        raise RuntimeError("no")

    asked: list[str] = []
    ids = [str(number) for number in range(2 * FAILURES_IN_A_ROW)]
    with Recorder() as recorder:
        async with running(database) as backend:
            retry = Retry(attempts=1000, delay=0.02, max_delay=0.02)
            await backend.subscribe("s", dispatch, concurrency=2, retry=retry)
            await produce(backend, *ids)
            await recorder.wait("subscription paused")
            before = len(asked)
            # Another one whose target is down, and stays so: that it is probed on and on shows that this one is not.
            await backend.subscribe("down", refuse, start="earliest", concurrency=2, retry=retry)
            await recorder.wait("dispatch failed", subscription="down", count=FAILURES_IN_A_ROW + 10)
            assert len(asked) == before
            await backend.delete_subscription("down")
            catch = Catch()
            await backend.reconfigure("s", catch)
            await catch.has(*ids)
            await settled(backend)


@pytest.mark.parametrize("order", ORDERS)
async def test_a_paused_pump_sleeps(database: str, order: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    idle, waits = Deliverers.idle, 0

    async def counted(self: Deliverers) -> None:
        nonlocal waits
        waits += 1
        await idle(self)

    monkeypatch.setattr(Deliverers, "idle", counted)
    with Recorder() as recorder:
        async with running(database) as backend:
            await backend.subscribe("s", Gone(), order=order, concurrency=8)
            await produce(backend, *map(str, range(100)))
            await recorder.wait("subscription paused")
            before = waits
            # While another one handles events one by one, a worker that spins would come by thousands of times.
            catch = Catch()
            await backend.subscribe("other", catch, order="strict")
            for number in range(50):
                await produce(backend, f"other {number}")
                await catch.has(f"other {number}")
            assert waits - before < 300


async def test_a_pause_outlives_a_seek_and_a_new_owner_here(database: str) -> None:
    with Recorder() as recorder:
        async with running(database) as backend:
            await backend.subscribe("s", Gone(), start="earliest")
            await produce(backend, "a", "b")
            await recorder.wait("subscription paused")
            await backend.seek("s", 1)
            await recorder.wait("lease claimed", count=2)
            assert await state(backend) == "paused: 410 Gone"
            catch = Catch()
            await backend.reconfigure("s", catch)
            await settled(backend)
        assert len(recorder.all("subscription paused")) == 1

    assert catch.ids == ["b"]


# Reconfiguring.


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("plain", [False, True])
async def test_what_is_at_work_ends_as_it_began_and_the_rest_goes_to_the_new_dispatcher(
    database: str, order: Any, plain: bool
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    old: list[str] = []

    def blocking(event: Event) -> None:
        begun.set()
        go_on.wait(10)
        old.append(event.id)

    gate, catch = Gate(), Catch()
    async with running(database) as backend:
        await backend.subscribe("s", blocking if plain else gate, order=order, concurrency=1)
        await produce(backend, "a", "b", "c", key="k")
        if plain:
            await asyncio.to_thread(begun.wait, 10)
        else:
            await gate.holds(1)
        await backend.reconfigure("s", catch, concurrency=1)
        go_on.set()
        gate.open()
        await catch.has("b", "c")
        await settled(backend)

    assert [*old, *gate.handled] == ["a"]
    assert catch.ids == ["b", "c"]


@pytest.mark.parametrize("plain", [False, True])
async def test_concurrency_goes_up_and_down_while_it_runs(database: str, plain: bool) -> None:
    at_work = most = handled = 0
    guard = threading.Lock()
    pace = threading.Semaphore(0)

    def blocking(event: Event) -> None:
        nonlocal at_work, most, handled
        with guard:
            at_work += 1
            most = max(most, at_work)
        pace.acquire()
        with guard:
            at_work -= 1
            handled += 1

    async def waiting(event: Event) -> None:
        nonlocal at_work, most, handled
        at_work += 1
        most = max(most, at_work)
        while not pace.acquire(blocking=False):
            await asyncio.sleep(0.005)
        at_work -= 1
        handled += 1

    dispatcher = blocking if plain else waiting

    async def at_once(count: int) -> None:
        async def are_at_work() -> bool:
            return at_work == count

        await eventually(f"{count} at work", are_at_work)

    async def after(count: int) -> None:
        async def are_handled() -> bool:
            return handled == count

        for _ in range(count - handled):
            pace.release()
        await eventually(f"{count} handled", are_handled)

    async with running(database) as backend:
        await backend.subscribe("s", dispatcher, concurrency=2)
        await produce(backend, *map(str, range(60)))
        await at_once(2)
        await backend.reconfigure("s", dispatcher, concurrency=6)
        await at_once(6)
        await backend.reconfigure("s", dispatcher, concurrency=1)
        await after(12)
        most = 0
        await after(20)
        await at_once(1)
        assert most <= 2, "one ends, the next begins"
        await backend.reconfigure("s", dispatcher, concurrency=5)
        await at_once(5)
        await after(60)
        await settled(backend)


async def test_down_to_one_and_up_again_leaves_as_many_workers_as_are_wanted(database: str) -> None:
    gate, catch = Gate(), Catch()
    async with running(database) as backend:
        await backend.subscribe("s", catch, concurrency=16)
        await produce(backend, *map(str, range(100)))
        await settled(backend)
        for concurrency in (1, 30, 2, 3, 1, 9):
            await backend.reconfigure("s", catch, concurrency=concurrency)
        await backend.reconfigure("s", gate, concurrency=3)
        await produce(backend, *map(str, range(100, 200)))
        await gate.holds(3)
        assert gate.most == 3
        gate.open()
        await settled(backend)

    assert gate.most == 3
    assert len(gate.handled) == 100


@pytest.mark.parametrize("order", ORDERS)
async def test_what_waits_here_and_the_new_filter_refuses_is_filtered(database: str, order: Any) -> None:
    gate, catch = Gate(), Catch()
    with Recorder() as recorder:
        async with running(database) as backend:
            await backend.subscribe("s", gate, order=order, concurrency=1)
            await backend.produce_many([make_event(f"{n % 2}-{n}", key=str(n % 3)) for n in range(12)])
            await gate.holds(1)

            async def are_here() -> bool:
                (pump,) = worker_of(backend).pumps
                return len(pump.shard.window) == 12

            await eventually("all were read", are_here)
            await backend.reconfigure("s", catch, filter=lambda event: event.id.startswith("1"), concurrency=1)
            gate.open()
            await settled(backend)
        assert [fields["filtered"] for fields in recorder.all("subscription reconfigured")] == [5]

    assert gate.handled == ["0-0"]
    assert sorted(catch.ids) == sorted(f"1-{n}" for n in range(1, 12, 2))


@pytest.mark.parametrize("order", ORDERS)
async def test_what_failed_and_the_new_filter_refuses_is_not_tried_again(database: str, order: Any) -> None:
    async with running(database) as backend:
        await backend.subscribe("s", refuse, order=order, retry=Retry(delay=0.3, attempts=100))
        await produce(backend, "a", key="k")
        await failed(backend)
        catch = Catch()
        await backend.reconfigure("s", catch, filter=filters.Exact({"id": "b"}))
        await produce(backend, "b", key="k")
        await settled(backend)

    assert catch.ids == ["b"]


@pytest.mark.parametrize("order", ORDERS)
async def test_what_fails_at_the_old_target_and_the_new_filter_refuses_is_not_tried_again(
    database: str, order: Any
) -> None:
    gate = Gate()

    async def fails_late(event: Event) -> None:
        await gate(event)
        raise RuntimeError("no")

    async with running(database) as backend:
        await backend.subscribe("s", fails_late, order=order, retry=Retry(delay=0.0))
        await produce(backend, "a", key="k")
        await gate.holds(1)
        catch = Catch()
        await backend.reconfigure("s", catch, filter=filters.Exact({"id": "b"}))
        await produce(backend, "b", key="k")
        gate.open()
        await settled(backend)

    assert catch.ids == ["b"]


async def test_an_event_that_waits_for_room_is_held_against_the_new_filter(database: str) -> None:
    gate, catch = Gate(), Catch()
    async with running(database, window_events=2) as backend:
        await backend.subscribe("s", gate)
        await produce(backend, "a", "b", "c", "d")
        await gate.holds(2)
        await backend.reconfigure("s", catch, filter=filters.Exact({"id": "d"}))
        gate.open()
        await settled(backend)

    assert sorted(gate.handled) == ["a", "b"]
    assert catch.ids == ["d"]


async def test_an_old_target_that_says_it_is_gone_does_not_pause_the_new_one(database: str) -> None:
    gate, catch = Gate(), Catch()

    async def gone_late(event: Event) -> None:
        await gate(event)
        raise Pause("gone")

    with Recorder() as recorder:
        async with running(database) as backend:
            await backend.subscribe("s", gone_late)
            await produce(backend, "a")
            await gate.holds(1)
            await backend.reconfigure("s", catch)
            gate.open()
            await catch.has("a")
        assert not recorder.all("subscription paused")


async def test_failures_of_an_old_target_say_nothing_about_the_new_one(database: str) -> None:
    gate, catch = Gate(), Catch()

    async def fails_late(event: Event) -> None:
        await gate(event)
        raise RuntimeError("no")

    ids = [str(number) for number in range(2 * FAILURES_IN_A_ROW)]
    with Recorder() as recorder:
        async with running(database) as backend:
            await backend.subscribe("s", fails_late, retry=Retry(delay=0.0))
            await produce(backend, *ids)
            await gate.holds(len(ids))
            await backend.reconfigure("s", catch)
            gate.open()
            await catch.has(*ids)
        assert not recorder.all("target is down")


async def test_a_target_that_was_down_counts_as_up(database: str) -> None:
    catch = Catch()
    ids = [str(number) for number in range(2 * FAILURES_IN_A_ROW)]
    with Recorder() as recorder:
        async with running(database) as backend:
            await backend.subscribe("s", refuse, retry=Retry(delay=60.0))
            await produce(backend, *ids)
            await recorder.wait("target is down")
            await backend.reconfigure("s", catch)
            assert await state(backend) == "running"
            await catch.has(*ids[FAILURES_IN_A_ROW:])


async def test_a_new_retry_and_dead_letter_dispatcher_count_from_now_on(database: str) -> None:
    dead = Catch()
    async with running(database) as backend:
        await backend.subscribe("s", refuse, retry=Retry(delay=60.0))
        await backend.reconfigure("s", refuse, retry=Retry(attempts=1), dead_letter=dead)
        await produce(backend, "a")
        await dead.has("a")
        await settled(backend)


async def test_only_what_runs_here_can_be_reconfigured_and_only_with_what_can_be(database: str) -> None:
    async with running(database) as backend:
        with pytest.raises(SubscriptionNotFoundError, match="runs no subscription"):
            await backend.reconfigure("s", print)
        await backend.subscribe("s", print)
        wrong: list[dict[str, Any]] = [
            {"concurrency": 0}, {"retry": 3}, {"filter": "type"}, {"dead_letter": "log"}, {"dispatcher": None},
        ]  # fmt: skip
        for options in wrong:
            with pytest.raises(ConfigError):
                await backend.reconfigure("s", **{"dispatcher": print, **options})


async def test_a_backend_that_is_not_started_yet_is_reconfigured(database: str) -> None:
    backend = Backend(database)
    await backend.init()
    await backend.subscribe("s", refuse)
    catch = Catch()
    await backend.reconfigure("s", catch)
    starting = asyncio.create_task(backend.start())
    await produce(backend, "a")
    await catch.has("a")
    await backend.stop()
    await starting


# The context that each event is handled in.

tenant: ContextVar[object] = ContextVar("tenant", default="nobody")


class Incomparable:
    def __eq__(self, other: object) -> bool:
        raise ValueError("ambiguous")

    __hash__ = None  # type: ignore[assignment] # as numpy's arrays have it


@pytest.mark.parametrize("kind", ["async", "plain", "lambda", "retries", "filter", "dead letter", "incomparable"])
@pytest.mark.parametrize("order", ["none", "key"])
async def test_each_event_starts_with_the_context_of_subscribe(database: str, kind: str, order: Any) -> None:
    saw: list[object] = []

    def enter(event: Event) -> None:
        saw.append(tenant.get())
        tenant.set(Incomparable() if kind == "incomparable" else event.id)

    async def handle(event: Event) -> None:
        enter(event)
        await asyncio.sleep(0)
        if kind == "retries" and event.attempt == 1:
            raise RuntimeError("once more")

    async def reject(event: Event) -> None:
        raise Reject("no")

    def takes(event: Event) -> bool:
        enter(event)
        return True

    async with Backend(database, commit_interval=0.01, poll_interval=0.1) as backend:
        tenant.set("whoever subscribes")
        dispatchers: dict[str, Any] = {"plain": enter, "filter": print, "dead letter": reject}
        dispatchers["lambda"] = lambda event: handle(event)  # noqa: PLW0108 - the point
        await backend.subscribe(
            "s",
            dispatchers.get(kind, handle),
            filter=takes if kind == "filter" else None,
            dead_letter=handle if kind == "dead letter" else None,
            order=order,
            concurrency=2,
            retry=Retry(attempts=2, delay=0.01, max_delay=0.01),
        )
        tenant.set("whoever produces")
        count = 6 if kind == "retries" else 3

        async def all_seen() -> bool:
            return len(saw) >= count

        for id_ in ("a", "b", "c"):
            await backend.produce(make_event(id_, key="k"))
        await eventually("all events are handled", all_seen)

        assert saw == ["whoever subscribes"] * count

        tenant.set("whoever reconfigures")
        await backend.reconfigure("s", handle, retry=Retry(attempts=2, delay=0.01, max_delay=0.01))
        saw.clear()
        await backend.produce(make_event("d", key="k"))
        count = 1
        await eventually("one more is handled", all_seen)

        assert saw[0] == "whoever reconfigures"
    assert tenant.get() == "whoever reconfigures"
