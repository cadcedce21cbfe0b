"""A pause holds a subscription in every process and past every restart, until what may end it does."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from pgbackend import Backend, ConfigError, ConnectionLostError, Event, Pause, Reject, Retry, SubscriptionNotFoundError
from pgbackend.delivery.care import Care
from pgbackend.delivery.delivery import Delivery
from pgbackend.delivery.transactions import Transactions
from pgbackend.embedded.server import EmbeddedServer
from pgbackend.facts import Recorder
from pgbackend.log.notify import Notifier
from pgbackend.subscriptions.pauses import Pauses
from pgbackend.torture.proxy import Proxy
from pgbackend.torture.server import restart_server
from tests.support.backends import dead_letters, failed, produce, running, settled, status_of, worker_of
from tests.support.databases import execute, query_value
from tests.support.dispatchers import Catch, Gate
from tests.support.events import make_event
from tests.support.ledger import Ledger
from tests.support.polling import eventually
from tests.support.worker import Worker

LONG: dict[str, Any] = {"poll_interval": 60.0, "commit_interval": 0.01}
"""Settings with which a process learns something within a second by a round, and at once only by a notification."""


class Gone:
    """A target that wants nothing more, until `back` is set."""

    def __init__(self) -> None:
        self.back = False
        self.asked: list[str] = []
        self.handled: list[str] = []

    async def __call__(self, event: Event) -> None:
        self.asked.append(event.id)
        if not self.back:
            raise Pause("410 Gone")
        self.handled.append(event.id)


async def paused_by(backend: Backend, name: str = "s") -> str | None:
    paused = (await status_of(backend, name)).paused
    return None if paused is None else paused.by


async def is_stored(backend: Backend, by: str | None, name: str = "s") -> None:
    async def as_expected() -> bool:
        return await paused_by(backend, name) == by

    await eventually(f"{name} is paused by {by}", as_expected)


async def pass_by(backend: Backend, witness: Catch, *ids: str) -> None:
    """These events are in the log, and another subscription of the same workers has handled them."""
    await produce(backend, *ids)
    await witness.has(*ids)


# An operator's pause.


async def test_every_worker_obeys_an_operators_pause_and_what_is_at_work_ends(database: str) -> None:
    gate, witness = Gate(), Catch()
    ids = [str(number) for number in range(40)]
    with Recorder() as recorder:
        async with running(database) as first, running(database) as second:
            for backend in (first, second):
                await backend.subscribe("s", gate, shards=4)
            await recorder.wait("lease claimed", subscription="s", count=4)
            await first.subscribe("witness", witness)
            await produce(first, "a", "b")
            await gate.holds(2)

            await first.pause("s", reason="a deploy")
            await recorder.wait("subscription paused", count=2)
            gate.open()
            await pass_by(first, witness, *ids)
            await eventually("those at work end", lambda: len(gate.handled) == 2)
            for backend in (first, second):
                status = await status_of(backend, "s")
                assert status.paused is not None
                assert (status.paused.by, status.paused.reason) == ("operator", "a deploy")
                assert status.state == "paused: a deploy"
            assert sorted(gate.handled) == ["a", "b"]

            await second.resume("s")
            await settled(first, "s")
            await recorder.wait("subscription resumed", count=2)
            assert await paused_by(first) is None
        paused = recorder.all("subscription paused")
        assert [(fact["by"], fact["reason"]) for fact in paused] == [("operator", "a deploy")] * 2

    assert sorted(gate.handled) == sorted(["a", "b", *ids])


async def test_after_its_return_this_process_starts_no_dispatch(database: str) -> None:
    """Whatever a round was told that began before."""
    catch = Catch()
    async with running(database) as backend:
        await backend.subscribe("s", catch)
        for number in range(10):
            producing = asyncio.create_task(produce(backend, *(f"{number} {index}" for index in range(20))))
            await backend.pause("s")
            known = len(catch.attempts)
            await producing
            await asyncio.sleep(0)
            assert len(catch.attempts) == known
            await backend.resume("s")
        await settled(backend)

    assert len(catch.ids) == len(set(catch.ids)) == 200


async def test_a_transaction_that_is_about_to_begin_calls_no_dispatcher_after_the_pause(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, begins, may_begin, got = Transactions._begin, asyncio.Event(), asyncio.Event(), list[str]()

    async def begin_late(transactions: Transactions, *args: Any) -> None:
        begins.set()
        await may_begin.wait()
        await begin(transactions, *args)

    async def handle(event: Event, _connection: object) -> None:
        got.append(event.id)

    monkeypatch.setattr(Transactions, "_begin", begin_late)
    async with running(database) as backend:
        await backend.subscribe("s", handle, transactional=True)
        await produce(backend, "a")
        await begins.wait()
        await backend.pause("s")
        may_begin.set()
        await nothing_at_work(backend)
        assert got == []
        await backend.resume("s")
        await settled(backend)

    assert got == ["a"]


@pytest.mark.parametrize("order", ["none", "key"])
async def test_an_attempt_whose_start_is_being_recorded_does_not_start_after_the_pause(
    database: str, monkeypatch: pytest.MonkeyPatch, order: Any
) -> None:
    record, records, may_record, catch = Care.record_start, asyncio.Event(), asyncio.Event(), Catch()

    async def record_late(care: Care, delivery: Delivery) -> bool:
        records.set()
        await may_record.wait()
        return await record(care, delivery)

    monkeypatch.setattr(Care, "record_start", record_late)
    async with running(database) as backend:
        await backend.subscribe("s", catch, order=order)
        await backend.unsubscribe("s")
        await execute(database, "UPDATE pgbackend.offsets SET crashes = 2")
        await backend.subscribe("s", catch, order=order)
        await produce(backend, "a", key="k")
        await records.wait()
        await backend.pause("s")
        may_record.set()
        await nothing_at_work(backend)
        assert catch.attempts == []
        await backend.resume("s")
        await settled(backend)

    assert catch.ids == ["a"]


async def nothing_at_work(backend: Backend) -> None:
    await eventually("nothing is at work", lambda: not any(pump.gate.active for pump in worker_of(backend).pumps))


@pytest.mark.parametrize("order", ["none", "strict"])
async def test_a_worker_that_starts_while_it_is_paused_dispatches_nothing(database: str, order: Any) -> None:
    catch, witness = Catch(), Catch()
    idle = Backend(database)
    await idle.init()
    await idle.subscribe("s", catch, order=order)
    await produce(idle, "a")
    await idle.pause("s")
    assert (await status_of(idle)).state.startswith("paused: no reason given, by role ")
    await idle.stop()
    for number in range(2):
        with Recorder() as recorder:
            async with running(database) as backend:
                await backend.subscribe("s", catch, order=order)
                await recorder.wait("lease claimed", subscription="s")
                await backend.subscribe("witness", witness)
                await pass_by(backend, witness, f"w{number}")
                if number == 1:
                    assert catch.attempts == []
                    await backend.resume("s")
                    await settled(backend, "s")

    assert catch.ids == ["a", "w0", "w1"]


async def test_a_subscription_that_registers_during_a_round_is_not_dispatched_before_its_pause_is_known(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The round has surveyed before, and claims afterwards."""
    catch, witness = Catch(), Catch()
    async with running(database) as backend:
        await backend.subscribe("s", catch)
        await backend.pause("s")
        await backend.unsubscribe("s")
        await produce(backend, "a")
        leases = worker_of(backend)._leases
        survey, subscribed = leases.survey, asyncio.Event()

        async def slow_survey() -> Any:
            found = await survey()
            if not subscribed.is_set():
                subscribed.set()
                await backend.subscribe("s", catch)
            return found

        with Recorder() as recorder:
            monkeypatch.setattr(leases, "survey", slow_survey)
            await recorder.wait("lease claimed", subscription="s")
        await backend.subscribe("witness", witness)
        await pass_by(backend, witness, "b")
        assert catch.attempts == []
        await backend.resume("s")
        await catch.has("a", "b")


@pytest.mark.parametrize("lost", [False, True])
async def test_others_obey_at_once_and_within_a_second_if_the_notification_is_lost(
    database: str, lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def say_nothing(_self: Notifier) -> None: ...

    catch = Catch()
    operator = Backend(database)
    await operator.init()
    with Recorder() as recorder:
        async with running(database, **LONG) as backend:
            await backend.subscribe("s", catch)
            await recorder.wait("lease claimed")
            if lost:
                monkeypatch.setattr(Notifier, "notify_leases", say_nothing)
            await operator.pause("s")
            await recorder.wait("subscription paused")
            await operator.resume("s")
            await recorder.wait("subscription resumed")
    await operator.stop()


@pytest.mark.parametrize(
    "options", [{}, {"batch": 5}, {"transactional": True}], ids=["plain", "batch", "transactional"]
)
async def test_retries_dead_letters_and_their_dispatcher_wait_as_well(database: str, options: dict[str, Any]) -> None:
    """Subscriptions of all kinds."""
    failing, got, dead = True, list[str](), list[str]()

    async def handle(work: Any, *_connection: object) -> None:
        for event in work if isinstance(work, list) else [work]:
            got.append(event.id)
            if failing and event.id.startswith("bad"):
                raise Reject("no")
            if failing:
                raise RuntimeError("not yet")

    async def bury(work: Any, *_connection: object) -> None:
        dead.extend(event.id for event in (work if isinstance(work, list) else [work]))
        raise RuntimeError("not there either")

    witness = Catch()
    with Recorder() as recorder:
        async with running(database) as backend:
            await backend.subscribe(
                "s", handle, dead_letter=bury, retry=Retry(delay=0.05, backoff="constant", attempts=2), **options
            )
            await produce(backend, "bad")
            await recorder.wait("event buried")
            await backend.pause("s")
            (letter,) = await dead_letters(backend, 1)
            await backend.redeliver(letter.id)
            await backend.subscribe("witness", witness)
            before = (len(got), len(dead))
            await pass_by(backend, witness, "good")
            await pass_by(backend, witness, *map(str, range(20)))
            assert (len(got), len(dead)) == before
            failing = False
            await backend.resume("s")
            await settled(backend, "s")
            await dead_letters(backend, 0)


async def test_a_failed_event_that_is_due_waits_and_keeps_its_attempts(database: str) -> None:
    attempts, failing, witness = list[int](), True, Catch()

    async def handle(event: Event) -> None:
        attempts.append(event.attempt)
        if failing:
            raise RuntimeError("not yet")

    async with running(database) as backend:
        await backend.subscribe("s", handle, retry=Retry(delay=0.2))
        await produce(backend, "a")
        await failed(backend)
        await backend.pause("s")
        before = list(attempts)
        await backend.subscribe("witness", witness)

        async def is_due() -> bool:
            return bool(await query_value(database, "SELECT due_at < now() FROM pgbackend.redeliveries"))

        await eventually("it is due", is_due)
        await pass_by(backend, witness, "b", "c")
        assert attempts == before
        failing = False
        await backend.resume("s")
        await settled(backend, "s")

    assert attempts[: len(before) + 1] == [*before, len(before) + 1] or attempts[len(before)] == 1
    assert sorted(attempts) == sorted([*before, len(before) + 1, 1, 1])


async def test_what_waits_is_bounded_by_the_window(database: str) -> None:
    catch = Catch()
    async with running(database, window_events=10) as backend:
        await backend.subscribe("s", catch)
        await backend.pause("s")
        await produce(backend, *map(str, range(100)))
        await eventually("it is claimed", lambda: len(worker_of(backend).pumps) == 1)
        (pump,) = worker_of(backend).pumps
        await eventually("the window is full", lambda: pump.shard.window.full)
        assert len(pump.shard.window) == 10
        assert not (await status_of(backend)).complete
        await backend.resume("s")
        await settled(backend)

    assert len(catch.ids) == 100


async def test_a_paused_subscription_does_not_reach_its_end(database: str) -> None:
    catch, witness = Catch(), Catch()
    async with running(database) as backend:
        await backend.subscribe("s", catch, start="earliest", end=3)
        await backend.subscribe("witness", witness)
        await backend.pause("s")
        await pass_by(backend, witness, "a", "b", "c")
        assert not (await status_of(backend, "s")).complete
        await backend.resume("s")

        async def is_complete() -> bool:
            return (await status_of(backend, "s")).complete

        await eventually("it is complete", is_complete)

    assert catch.ids == ["a", "b"]


@pytest.mark.parametrize(
    "change",
    [
        lambda backend: backend.seek("s", 1),
        lambda backend: backend.alter_subscription("s", order="key", end=None, start="latest"),
        lambda backend: backend.reshard("s", 3),
        lambda backend: backend.reconfigure("s", Catch()),
    ],
    ids=["seek", "alter", "reshard", "reconfigure"],
)
async def test_a_paused_subscription_can_be_changed_and_stays_paused(
    database: str, change: Callable[[Backend], Awaitable[None]]
) -> None:
    catch, new, witness = Catch(), Catch(), Catch()
    async with running(database) as backend:
        await backend.subscribe("s", catch, start="earliest")
        await backend.subscribe("witness", witness)
        await backend.pause("s", reason="later")
        await pass_by(backend, witness, "a", "b")
        async with asyncio.timeout(20):
            await change(backend)
        await pass_by(backend, witness, "c")
        assert (catch.attempts, await paused_by(backend)) == ([], "operator")
        await backend.reconfigure("s", new)
        await backend.resume("s")
        await settled(backend, "s")

    assert set(new.ids) in ({"a", "b", "c"}, {"b", "c"})


async def test_a_paused_subscription_can_be_handed_over_given_up_and_deleted(database: str) -> None:
    first, second = Catch(), Catch()
    with Recorder() as recorder:
        async with running(database) as backend:
            await backend.subscribe("s", first, start="earliest", shards=2)
            await recorder.wait("lease claimed", count=2)
            await backend.pause("s")
            await produce(backend, "a")
            async with running(database) as other:
                await other.subscribe("s", second, shards=2)
                await recorder.wait("lease released")
                await recorder.wait("lease claimed", count=3)
                async with asyncio.timeout(20):
                    await backend.unsubscribe("s")
                await recorder.wait("lease claimed", count=4)
                assert (first.attempts, second.attempts) == ([], [])
                await other.delete_subscription("s")
                await other.subscribe("s", second, start="earliest", shards=2)
                await second.has("a")


async def test_a_handler_may_pause_its_own_subscription(database: str) -> None:
    handled: list[str] = []
    async with running(database) as backend:

        async def handle(event: Event) -> None:
            handled.append(event.id)
            if event.id == "a":
                await backend.pause("s", reason="enough")

        await backend.subscribe("s", handle, concurrency=1, order="strict")
        await produce(backend, "a", "b")
        await is_stored(backend, "operator")
        (pump,) = worker_of(backend).pumps
        await eventually("it is settled", lambda: not pump.gate.active)
        assert handled == ["a"]
        await backend.resume("s")
        await settled(backend)

    assert handled == ["a", "b"]


async def test_a_reason_is_text_that_people_can_read_and_names_are_checked(backend: Backend) -> None:
    await backend.subscribe("s", Catch())
    for reason in ("", "a\0b", "x" * 1001, 7):
        with pytest.raises(ConfigError, match="reason is"):
            await backend.pause("s", reason=reason)  # type: ignore[arg-type] # a mistake
    with pytest.raises(ConfigError, match="target of 't'"):
        await backend.subscribe("t", Catch(), target="")
    for call in (backend.pause("other"), backend.resume("other")):
        with pytest.raises(SubscriptionNotFoundError, match="other"):
            await call


# A dispatcher's pause.


async def test_a_dispatchers_pause_holds_all_processes_and_no_restart_ends_it(database: str) -> None:
    gone, elsewhere, witness = Gone(), Catch(), Catch()
    with Recorder() as recorder:
        async with running(database) as first, running(database) as second:
            await first.subscribe("s", gone, shards=2)
            await recorder.wait("lease claimed", count=2)
            await second.subscribe("s", elsewhere, shards=2)
            await recorder.wait("lease claimed", subscription="s", count=3)
            await second.subscribe("witness", witness)
            # Each key has its shard: the first one that meets the target that is gone pauses both.
            keys = map(str, range(20))
            await first.produce_many([make_event(key, key=key) for key in keys])
            await recorder.wait("subscription paused", count=2)
            before = len(elsewhere.attempts)
            await pass_by(first, witness, *(f"w{number}" for number in range(20)))
            assert len(elsewhere.attempts) == before
            for backend in (first, second):
                status = await status_of(backend, "s")
                assert status.paused is not None
                assert (status.paused.by, status.paused.reason) == ("dispatcher", "410 Gone")
                assert status.state == "paused: 410 Gone"
                assert (status.redeliveries, status.dead_letters) == (0, 0)
        asked = len(gone.asked)
        async with running(database) as again:
            await again.subscribe("s", gone, shards=2)
            await again.subscribe("witness", witness)
            await recorder.wait("subscription paused", count=3)
            await pass_by(again, witness, "later")
            assert len(gone.asked) == asked
            gone.back = True
            await again.resume("s")
            await settled(again, "s")

    assert sorted(gone.handled + elsewhere.ids) == sorted(
        [*map(str, range(20)), *(f"w{number}" for number in range(20)), "later"]
    )


async def test_a_pause_is_stored_as_soon_as_postgresql_is_back(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store, away = Pauses.pause_for_dispatcher, True

    async def fails(self: Pauses, *args: Any, **options: Any) -> bool:
        if away:
            raise ConnectionLostError("PostgreSQL is away.")
        return await store(self, *args, **options)

    monkeypatch.setattr(Pauses, "pause_for_dispatcher", fails)
    gone, witness = Gone(), Catch()
    with Recorder() as recorder:
        async with running(database) as backend:
            await backend.subscribe("s", gone, concurrency=1)
            await backend.subscribe("witness", witness)
            await produce(backend, "a")
            await recorder.wait("pause not stored", count=3)
            assert (await status_of(backend, "s")).state == "paused: 410 Gone", "at once"
            await pass_by(backend, witness, "b")
            assert (gone.asked, await paused_by(backend)) == (["a"], None)
            away = False
            await is_stored(backend, "dispatcher")
        assert len(recorder.all("subscription paused")) == 1


class Held:
    """Holds the storing of a dispatcher's pause back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go_on = asyncio.Event(), asyncio.Event()
        store = Pauses.pause_for_dispatcher

        async def held(pauses: Pauses, *args: Any, **options: Any) -> bool:
            self.begun.set()
            await self.go_on.wait()
            return await store(pauses, *args, **options)

        monkeypatch.setattr(Pauses, "pause_for_dispatcher", held)


async def test_a_resume_beats_a_pause_that_is_on_its_way(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gone, held = Gone(), Held(monkeypatch)
    operator = Backend(database)
    await operator.init()
    async with running(database) as backend:
        await backend.subscribe("s", gone)
        await produce(backend, "a")
        await held.begun.wait()
        await operator.resume("s")
        gone.back = True
        held.go_on.set()
        await settled(backend)
        assert await paused_by(backend) is None
    await operator.stop()

    assert gone.asked == ["a", "a"]


async def test_a_reconfiguration_beats_a_pause_that_is_on_its_way(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, catch = Held(monkeypatch), Catch()
    async with running(database) as backend:
        await backend.subscribe("s", Gone())
        await produce(backend, "a")
        await held.begun.wait()
        await backend.reconfigure("s", catch)
        await catch.has("a")
        held.go_on.set()
        # It is stored now, and the next round deletes it.
        await settled(backend)
        await is_stored(backend, None)
        await produce(backend, "b")
        await catch.has("b")


async def test_an_operators_pause_replaces_a_dispatchers_and_stays_past_a_new_dispatcher(database: str) -> None:
    catch, witness = Catch(), Catch()
    async with running(database) as backend:
        await backend.subscribe("s", Gone())
        await backend.subscribe("witness", witness)
        await produce(backend, "a")
        await is_stored(backend, "dispatcher")
        await backend.pause("s", reason="later")
        await backend.reconfigure("s", catch)
        await pass_by(backend, witness, "b")
        assert (catch.attempts, (await status_of(backend, "s")).state) == ([], "paused: later")
        await backend.resume("s")
        await catch.has("a", "b")


async def test_a_former_owner_cannot_pause(database: str) -> None:
    """Its shard has another owner when it raises Pause."""
    gate, catch = Gate(), Catch()

    async def gone_late(event: Event) -> None:
        await gate(event)
        raise Pause("gone")

    with Recorder() as recorder:
        async with running(database) as former:
            await former.subscribe("s", gone_late)
            await produce(former, "a")
            await gate.holds(1)
            connection = await asyncpg.connect(database)
            await connection.execute("UPDATE pgbackend.offsets SET owner = gen_random_uuid(), epoch = epoch + 1000")
            await connection.close()
            await recorder.wait("lease lost")
            del former._lifecycle.opened().runner.registrations["s"]
            async with running(database) as owner:
                await owner.subscribe("s", catch)
                await catch.has("a")
                gate.open()
                await eventually("it has raised Pause", lambda: bool(gate.handled))
                await produce(owner, "b")
                await catch.has("b")
                assert await paused_by(owner) is None


# Crashes.


@pytest.fixture
async def own_server() -> AsyncIterator[EmbeddedServer]:
    """A server of the test's own, which it may kill."""
    with tempfile.TemporaryDirectory(prefix="pgbackend-test-", ignore_cleanup_errors=True) as directory:
        server = EmbeddedServer(directory)
        await server.start()
        yield server
        await server.stop()


@pytest.mark.slow
@pytest.mark.direct
async def test_neither_a_killed_worker_nor_a_killed_postgresql_ends_a_pause(
    own_server: EmbeddedServer, tmp_path: Path
) -> None:
    ledger, witness = Ledger(tmp_path / "ledger"), Catch()
    async with running(own_server.dsn) as operator:
        await operator.subscribe("witness", witness)
        async with Worker(own_server.dsn, ledger, subscription="s") as worker:
            await pass_by(operator, witness, "a")
            await eventually("it is handled", lambda: len(ledger.handled()) == 1)
            await operator.pause("s")
            worker.kill()
        async with Worker(own_server.dsn, ledger, subscription="s"):
            await pass_by(operator, witness, "b", "c")
            await restart_server(own_server, "kill")
            await pass_by(operator, witness, "d")
            assert await paused_by(operator) == "operator"
            assert [handling.id for handling in ledger.handled()] == ["a"]
            await operator.resume("s")
            await settled(operator, "s")

    ledger.produced = ["a", "b", "c", "d"]
    assert (ledger.lost(), ledger.unknown()) == ([], [])


@pytest.mark.slow
@pytest.mark.direct
async def test_a_pause_that_is_raised_while_postgresql_is_dead_is_stored_in_its_next_life(
    own_server: EmbeddedServer,
) -> None:
    gate, asked = Gate(), list[str]()

    async def gone(event: Event) -> None:
        asked.append(event.id)
        await gate(event)
        raise Pause("gone")

    with Recorder() as recorder:
        async with Proxy(own_server.dsn) as proxy, running(proxy.dsn) as backend:
            await backend.subscribe("s", gone)
            await produce(backend, "a")
            await gate.holds(1)
            proxy.cut()
            gate.open()
            await recorder.wait("subscription paused")
            await restart_server(own_server, "kill")
            proxy.restore()
            await recorder.wait("incarnation changed")
            await is_stored(backend, "dispatcher")
            await recorder.wait("lease claimed", count=2)
            assert (await status_of(backend)).state == "paused: gone"
        assert len(recorder.all("subscription paused")) == 1
    assert asked == ["a"]


# The target.


async def test_a_restart_with_another_target_ends_a_dispatchers_pause_and_one_with_the_same_does_not(
    database: str,
) -> None:
    gone, catch, witness = Gone(), Catch(), Catch()
    async with running(database) as backend:
        await backend.subscribe("s", gone, target="v1")
        await produce(backend, "a")
        await is_stored(backend, "dispatcher")
    async with running(database) as backend:
        await backend.subscribe("s", catch, target="v1")
        await backend.subscribe("witness", witness)
        await pass_by(backend, witness, "b")
        assert catch.attempts == []
    with Recorder() as recorder:
        async with running(database) as backend:
            await backend.subscribe("s", catch, target="v2")
            await catch.has("a", "b")
            assert await paused_by(backend) is None
        assert [fact["reason"] for fact in recorder.all("subscription resumed")] == ["410 Gone"]


async def test_a_reconfiguration_with_the_same_target_does_not_end_its_pause(database: str) -> None:
    """So processes that follow one change one after another do not end a pause by the new target."""
    gone, catch, witness = Gone(), Catch(), Catch()
    async with running(database) as backend:
        await backend.subscribe("s", gone, target="v1")
        await backend.subscribe("witness", witness)
        await produce(backend, "a")
        await is_stored(backend, "dispatcher")
        await backend.reconfigure("s", catch, target="v1")
        await pass_by(backend, witness, "b")
        assert (catch.attempts, await paused_by(backend)) == ([], "dispatcher")
        await backend.reconfigure("s", catch, target="v2")
        await catch.has("a", "b")
        await is_stored(backend, None)


async def test_no_target_ends_an_operators_pause(database: str) -> None:
    async with running(database) as backend:
        await backend.subscribe("s", Catch(), target="v1")
        await backend.pause("s")
    async with running(database) as backend:
        await backend.subscribe("s", Catch(), target="v2")
        assert await paused_by(backend) == "operator"


async def test_an_old_process_does_not_pause_the_new_target(database: str) -> None:
    """During a rolling deployment. It stays paused itself, and its shards go on once it has gone."""
    gone, catch = Gone(), Catch()
    async with AsyncExitStack() as stack:
        with Recorder() as recorder:
            new = await stack.enter_async_context(running(database))
            async with running(database) as old:
                await old.subscribe("s", gone, shards=2, target="v1")
                await recorder.wait("lease claimed", count=2)
                await new.subscribe("s", catch, shards=2, target="v2")
                await recorder.wait("lease claimed", count=3)
                await new.produce_many([make_event(key, key=key) for key in map(str, range(20))])
                await recorder.wait("subscription paused")
                await eventually("the new process handles its part", lambda: len(catch.ids) + len(gone.asked) > 2)
                await pass_rounds(old)
                assert (await status_of(old, "s")).state == "paused: 410 Gone"
                assert await paused_by(new) is None
            await settled(new, "s")
            assert len(recorder.all("subscription paused")) == 1

    assert sorted(catch.ids) == sorted(map(str, range(20)))


async def pass_rounds(backend: Backend) -> None:
    """The worker has made two more rounds."""
    claims = worker_of(backend)._claims
    for _ in range(2):
        await claims.heed_pauses()


async def test_an_old_process_stays_paused_when_a_new_one_ends_the_pause_until_somebody_resumes(database: str) -> None:
    gone, catch = Gone(), Catch()
    with Recorder() as recorder:
        async with running(database) as old, running(database) as new:
            await old.subscribe("s", gone, shards=2, target="v1")
            await recorder.wait("lease claimed", count=2)
            await produce(old, "a")
            await is_stored(old, "dispatcher")
            await new.subscribe("s", catch, shards=2, target="v2")
            await recorder.wait("lease claimed", count=3)
            await pass_rounds(old)
            assert (await status_of(old, "s")).state == "paused: 410 Gone"
            assert await paused_by(new) is None
            gone.back = True
            await new.resume("s")
            await settled(new, "s")
