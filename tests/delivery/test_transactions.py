"""Transactional subscriptions: what a dispatcher does in PostgreSQL is committed with the offset, or not at all."""

import asyncio
import json
from functools import partial
from typing import Any

import asyncpg
import pytest

from pgbackend import Backend, ConnectionLostError, Event, Failed, Reject, Retry
from pgbackend.delivery import transactions
from pgbackend.delivery.offsets import Offsets
from pgbackend.facts import Recorder
from pgbackend.model import Order
from pgbackend.postgres.pool import Database
from pgbackend.postgres.reconnect import GrowingDelay
from pgbackend.torture.proxy import Proxy
from tests.support.backends import SOON, dead_letters, produce, running, settled, worker_of
from tests.support.databases import Sql
from tests.support.events import make_event
from tests.support.polling import eventually

NO_WAIT = Retry(attempts=3, delay=0.0)
INSERT = "INSERT INTO effects (id) VALUES ($1)"


@pytest.fixture
async def effects(sql: Sql) -> Sql:
    """A table of the application. Each handled event leaves its id there; a second one of the same id is an error."""
    await sql.execute("CREATE TABLE effects (id text PRIMARY KEY, at bigint GENERATED ALWAYS AS IDENTITY)")
    await sql.execute("GRANT ALL ON effects TO PUBLIC")
    return sql


async def insert(event: Event, connection: Any) -> None:
    await connection.execute(INSERT, event.id)


async def ids(effects: Sql) -> list[str]:
    return [row["id"] for row in await effects.fetch("SELECT id FROM effects ORDER BY at")]


def numbers(count: int) -> list[str]:
    return [str(number) for number in range(count)]


async def test_what_a_dispatcher_does_is_committed_with_the_offset(effects: Sql, database: str) -> None:
    async with running(database) as backend:
        await produce(backend, *numbers(20))
        await backend.subscribe("s", insert, start="earliest", transactional=True)
        await settled(backend)

    assert await ids(effects) == numbers(20)
    assert await effects.fetchval("SELECT position FROM pgbackend.offsets") == 20


async def test_effect_and_offset_become_visible_in_one_moment(effects: Sql, database: str) -> None:
    reached, release = asyncio.Event(), asyncio.Event()

    async def handle(event: Event, connection: Any) -> None:
        await insert(event, connection)
        reached.set()
        await release.wait()

    async with running(database) as backend:
        await backend.subscribe("s", handle, transactional=True)
        await produce(backend, "a")
        await reached.wait()
        assert await ids(effects) == []
        assert await effects.fetchval("SELECT position FROM pgbackend.offsets") == 0
        release.set()
        await settled(backend)
    assert await ids(effects) == ["a"]


async def test_a_failure_rolls_back_and_is_tried_again(effects: Sql, database: str) -> None:
    async def fail_first(event: Event, connection: Any) -> None:
        await insert(event, connection)
        if event.attempt < 3:
            raise ValueError("not yet")

    async with running(database) as backend:
        await produce(backend, "a", "b")
        await backend.subscribe("s", fail_first, start="earliest", transactional=True, retry=NO_WAIT)
        await settled(backend)

    assert sorted(await ids(effects)) == ["a", "b"]
    assert await effects.fetchval("SELECT count(*) FROM pgbackend.redeliveries") == 0


async def test_an_event_that_is_given_up_leaves_nothing_but_a_dead_letter(effects: Sql, database: str) -> None:
    async def reject(event: Event, connection: Any) -> None:
        await insert(event, connection)
        raise Reject("no")

    async with running(database) as backend:
        await produce(backend, "a")
        await backend.subscribe("s", reject, start="earliest", transactional=True)
        (letter,) = await dead_letters(backend, 1)
        assert await ids(effects) == []
        await backend.reconfigure("s", insert, transactional=True)
        assert await backend.redeliver(letter.id) == 1
        await dead_letters(backend, 0)

    assert await ids(effects) == ["a"]


async def test_the_dead_letter_dispatcher_has_a_transaction_too(effects: Sql, database: str) -> None:
    async def reject(event: Event, connection: Any) -> None:
        raise Reject("no")

    async with running(database) as backend:
        await produce(backend, "a")
        await backend.subscribe("s", reject, start="earliest", transactional=True, dead_letter=insert)
        await settled(backend)
        assert await dead_letters(backend, 0) == []

    assert await ids(effects) == ["a"]


@pytest.mark.parametrize("how", ["error", "caught", "commit", "rollback", "closed"])
async def test_whatever_becomes_of_the_transaction_the_event_is_not_lost(effects: Sql, database: str, how: str) -> None:
    async def spoil(event: Event, connection: Any) -> None:
        if event.attempt > 1:
            await insert(event, connection)
            return
        if how in ("error", "caught"):
            try:
                await connection.execute("SELECT 1 / 0")
            except asyncpg.DivisionByZeroError:
                if how == "error":
                    raise
        elif how == "closed":
            await connection.close()
        else:
            await connection.execute(how)

    async with running(database) as backend:
        await produce(backend, "a", "b")
        await backend.subscribe("s", spoil, start="earliest", transactional=True, retry=NO_WAIT)
        await settled(backend)

    assert sorted(await ids(effects)) == ["a", "b"]


async def test_a_savepoint_of_the_dispatcher_is_its_own_affair(effects: Sql, database: str) -> None:
    async def handle(event: Event, connection: Any) -> None:
        await insert(event, connection)
        with pytest.raises(asyncpg.UniqueViolationError):
            async with connection.transaction():
                await insert(event, connection)

    async with running(database) as backend:
        await produce(backend, "a")
        await backend.subscribe("s", handle, start="earliest", transactional=True)
        await settled(backend)

    assert await ids(effects) == ["a"]


async def test_an_error_at_commit_fails_the_event(effects: Sql, database: str) -> None:
    await effects.execute("ALTER TABLE effects ADD CONSTRAINT late UNIQUE (at) DEFERRABLE INITIALLY DEFERRED")
    await effects.execute("INSERT INTO effects (id, at) OVERRIDING SYSTEM VALUE VALUES ('there', 1000)")

    async def collide(event: Event, connection: Any) -> None:
        at = 1000 if event.id == "bad" else int(event.id)
        await connection.execute("INSERT INTO effects (id, at) OVERRIDING SYSTEM VALUE VALUES ($1, $2)", event.id, at)

    async with running(database) as backend:
        await produce(backend, "1", "bad", "2")
        await backend.subscribe("s", collide, start="earliest", transactional=True, retry=NO_WAIT)
        await settled(backend)
        (letter,) = await dead_letters(backend, 1)

    assert (letter.event.id, letter.failure.attempts) == ("bad", 3)
    assert "late" in letter.failure.error
    assert sorted(await ids(effects)) == ["1", "2", "there"]


# Batches.


async def insert_all(batch: list[Event], connection: Any) -> None:
    for event in batch:
        await insert(event, connection)


async def test_a_batch_is_one_transaction(effects: Sql, database: str) -> None:
    async with running(database) as backend:
        await produce(backend, *numbers(300))
        await backend.subscribe("s", insert_all, start="earliest", transactional=True, batch=100)
        await settled(backend)

    assert await ids(effects) == numbers(300)
    assert await effects.fetchval("SELECT count(DISTINCT xmin::text) FROM effects") == 3


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("order", ["none", "key", "strict"])
async def test_of_a_batch_only_the_events_that_fail_are_given_up(
    effects: Sql, database: str, order: Order, *, named: bool
) -> None:
    calls = 0

    async def handle(batch: list[Event], connection: Any) -> None:
        nonlocal calls
        calls += 1
        await insert_all(batch, connection)
        bad = {event: ValueError("bad") for event in batch if event.id in ("17", "40")}
        if bad:
            raise Failed(bad) if named else ValueError("one of them is bad")

    async with running(database) as backend:
        await produce(backend, *numbers(64))
        await backend.subscribe("s", handle, start="earliest", transactional=True, batch=64, order=order, retry=NO_WAIT)
        await settled(backend)
        letters = await dead_letters(backend, 2)

    assert sorted(letter.event.id for letter in letters) == ["17", "40"]
    good = [number for number in numbers(64) if number not in ("17", "40")]
    assert await ids(effects) == good if order != "none" else sorted(await ids(effects), key=int) == good
    assert calls < 50


@pytest.mark.parametrize("order", ["key", "strict"])
async def test_ordered_modes_keep_their_order_over_failures(effects: Sql, database: str, order: Order) -> None:
    async def handle(batch: list[Event], connection: Any) -> None:
        await insert_all(batch, connection)
        if any(int(event.id) % 5 == 2 and event.attempt < 3 for event in batch):
            raise ValueError("not yet")

    async with running(database) as backend:
        await backend.produce_many([make_event(number, key=f"k{int(number) % 4}") for number in numbers(80)])
        await backend.subscribe(
            "s", handle, start="earliest", transactional=True, batch=16, order=order, retry=NO_WAIT,
            shards=1 if order == "strict" else 2,
        )  # fmt: skip
        await settled(backend)

    found = await ids(effects)
    assert sorted(found, key=int) == numbers(80)
    for key in range(4) if order == "key" else (None,):
        of_key = [int(one) for one in found if key is None or int(one) % 4 == key]
        assert of_key == sorted(of_key)


@pytest.mark.parametrize("order", ["key", "strict"])
async def test_a_named_event_waits_for_those_before_it_that_are_dispatched_again(
    effects: Sql, database: str, order: Order
) -> None:
    async def handle(batch: list[Event], connection: Any) -> None:
        await insert_all(batch, connection)
        if len(batch) > 1:
            raise Failed({batch[-1]: ValueError("the second one first")})
        if batch[0].id == "0" and batch[0].attempt == 1:
            raise ValueError("not yet")

    async with running(database) as backend:
        await produce(backend, "0", "1", key="k")
        await backend.subscribe(
            "s", handle, start="earliest", transactional=True, batch=2, order=order, retry=Retry(attempts=3, delay=0.2)
        )
        await settled(backend)

    assert await ids(effects) == ["0", "1"]


@pytest.mark.parametrize("order", ["none", "key"])
async def test_a_failed_that_names_many_events_of_a_large_batch_takes_no_time(
    effects: Sql, database: str, order: Order
) -> None:
    async def handle(batch: list[Event], connection: Any) -> None:
        await insert_all(batch, connection)
        if len(batch) > 1 and (bad := {event: ValueError("bad") for event in batch if int(event.id) % 10 == 0}):
            raise Failed(bad)

    async with running(database) as backend:
        await produce(backend, *numbers(1000))
        await backend.subscribe("s", handle, start="earliest", transactional=True, batch=1000, order=order)
        await settled(backend, timeout=20)

    assert sorted(await ids(effects), key=int) == numbers(1000)


# Lost connections and lost leases.


@pytest.mark.parametrize("batch", [None, 10])
async def test_when_no_answer_to_commit_comes_each_effect_is_there_once(
    effects: Sql, database: str, batch: int | None
) -> None:
    async def handle(work: Any, connection: Any) -> None:
        for event in work if isinstance(work, list) else [work]:
            await insert(event, connection)
            if event.id == "7":
                proxy.lose_reply_to(b"COMMIT")

    with Recorder() as recorder:
        async with Proxy(database) as proxy, Backend(proxy.dsn, **SOON) as backend:
            await produce(backend, *numbers(20))
            await backend.subscribe(
                "s", handle, start="earliest", transactional=True, batch=batch, retry=Retry(attempts=1)
            )
            await settled(backend)
            assert await dead_letters(backend, 0) == []

    assert await ids(effects) == numbers(20)
    assert recorder.all("transaction without effect")


AT_COMMIT = """
    CREATE FUNCTION at_commit() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        {};
        RETURN NULL;
    END $$;
    CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT ON effects DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW WHEN (NEW.id = '7') EXECUTE FUNCTION at_commit();
    """


async def test_when_the_connection_dies_in_commit_and_nothing_was_committed_the_events_come_again(
    effects: Sql, database: str
) -> None:
    await effects.execute("CREATE SEQUENCE tries; GRANT ALL ON SEQUENCE tries TO PUBLIC")
    # A sequence remembers what a rollback forgets.
    await effects.execute(
        AT_COMMIT.format("IF nextval('tries') = 1 THEN PERFORM pg_terminate_backend(pg_backend_pid()); END IF")
    )
    attempts: list[int] = []

    async def handle(batch: list[Event], connection: Any) -> None:
        attempts.extend(event.attempt for event in batch)
        await insert_all(batch, connection)

    with Recorder() as recorder:
        async with running(database) as backend:
            await produce(backend, *numbers(10))
            await backend.subscribe("s", handle, start="earliest", transactional=True, batch=10)
            await settled(backend)

    assert await ids(effects) == numbers(10)
    assert attempts == [1] * 20
    assert recorder.all("transaction without effect")


async def test_a_stop_in_the_middle_of_commit_repeats_nothing(effects: Sql, database: str) -> None:
    await effects.execute(AT_COMMIT.format("PERFORM pg_advisory_xact_lock(7)"))
    await effects.execute("SELECT pg_advisory_lock(7)")

    async def is_waiting() -> bool:
        return bool(await effects.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"))

    async with running(database, drain_timeout=0.1) as backend:
        await produce(backend, *numbers(10))
        await backend.subscribe("s", insert_all, start="earliest", transactional=True, batch=10)
        await eventually("COMMIT waits", is_waiting)
        unlocking = asyncio.create_task(_unlock_later(effects))
    await unlocking
    async with running(database) as backend:
        await backend.subscribe("s", insert_all, transactional=True, batch=10)
        await settled(backend)
    assert await ids(effects) == numbers(10)


async def test_a_dispatcher_that_cancels_its_own_task_in_commit_does_not_end_its_shard(
    effects: Sql, database: str
) -> None:
    await effects.execute(AT_COMMIT.format("PERFORM pg_sleep(0.3)"))

    async def cancel_soon(event: Event, connection: Any) -> None:
        await insert(event, connection)
        task = asyncio.current_task()
        if event.id == "7" and not cancelled:
            assert task is not None
            cancelled.append(event.id)
            asyncio.get_running_loop().call_later(0.1, task.cancel)

    cancelled: list[str] = []
    async with running(database) as backend:
        await produce(backend, *numbers(10))
        await backend.subscribe("s", cancel_soon, start="earliest", transactional=True, retry=Retry(attempts=1))
        await settled(backend)
        assert await dead_letters(backend, 0) == []

    assert sorted(await ids(effects)) == numbers(10)


@pytest.mark.parametrize("order", ["none", "key"])
async def test_a_subscription_is_not_complete_while_its_last_commit_may_fail(
    effects: Sql, database: str, order: Order
) -> None:
    await effects.execute(AT_COMMIT.format("PERFORM pg_sleep(0.3); RAISE 'no'"))
    once: dict[str, Any] = {"order": order, "transactional": True, "retry": Retry(attempts=3, delay=1.0)}

    with Recorder() as recorder:
        async with running(database) as backend:
            await produce(backend, "5", "6", "7", key="k")
            await backend.subscribe("s", insert, start="earliest", end=4, **once)
            await recorder.wait("dispatch failed")
    await effects.execute("DROP TRIGGER at_commit ON effects")
    async with running(database) as backend:
        await backend.subscribe("s", insert, end=4, **once)
        await settled(backend)

    assert await ids(effects) == ["5", "6", "7"]


async def _unlock_later(effects: Sql) -> None:
    async def is_leaving() -> bool:
        return bool(
            await effects.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'transactionid' AND NOT granted")
        )

    await eventually("the worker, which leaves, waits for the row that COMMIT holds", is_leaving)
    await effects.execute("SELECT pg_advisory_unlock(7)")


IDLE_LONG = """
    SELECT clock_timestamp() - state_change > interval '400 ms'
    FROM pg_stat_activity
    WHERE pid = $1
        AND state = 'idle in transaction'"""


@pytest.mark.parametrize("how", ["idle", "statement"])
async def test_a_dispatcher_cannot_keep_its_transaction_open_for_long(
    effects: Sql, database: str, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(transactions, f"_{how.upper()}_TIMEOUT", "200ms")

    async def dawdle(event: Event, connection: Any) -> None:
        await insert(event, connection)
        if event.id == "slow":
            if how == "idle":
                await eventually("the server has ended the connection", connection.is_closed)
            else:
                await connection.execute("SELECT pg_sleep(60)")
        if event.id == "patient":
            await connection.execute("SET LOCAL statement_timeout = 0")
            await connection.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
            if how == "idle":
                await eventually(
                    "the transaction has been idle beyond the timeout",
                    partial(effects.fetchval, IDLE_LONG, connection.get_server_pid()),
                )
            else:
                await connection.execute("SELECT pg_sleep(0.5)")

    async with running(database) as backend:
        await produce(backend, "slow", "patient", "quick")
        await backend.subscribe("s", dawdle, start="earliest", transactional=True, retry=Retry(attempts=1))
        await settled(backend)
        (letter,) = await dead_letters(backend, 1)

    assert letter.event.id == "slow"
    assert ("connection" if how == "idle" else "statement timeout") in letter.failure.error
    assert sorted(await ids(effects)) == ["patient", "quick"]


async def test_a_connection_that_is_terminated_in_a_dispatch_costs_one_attempt(effects: Sql, database: str) -> None:
    terminated = 0

    async def handle(event: Event, connection: Any) -> None:
        nonlocal terminated
        await insert(event, connection)
        if event.attempt == 1:
            terminated += 1
            await effects.execute("SELECT pg_terminate_backend($1)", connection.get_server_pid())
        await connection.execute("SELECT 1")

    async with running(database) as backend:
        await produce(backend, "a", "b")
        await backend.subscribe("s", handle, start="earliest", transactional=True, retry=NO_WAIT)
        await settled(backend)

    assert terminated == 2
    assert sorted(await ids(effects)) == ["a", "b"]


async def test_a_worker_that_lost_its_lease_in_a_dispatch_commits_nothing(effects: Sql, database: str) -> None:
    reached, release = asyncio.Event(), asyncio.Event()

    async def slow(event: Event, connection: Any) -> None:
        await connection.execute("INSERT INTO effects (id) VALUES ($1)", f"{event.id} of the former owner")
        reached.set()
        await release.wait()

    async with running(database, drain_timeout=1.0) as former:
        await produce(former, "a")
        await former.subscribe("s", slow, start="earliest", transactional=True)
        await reached.wait()
        (pump,) = worker_of(former).pumps
        await effects.execute("UPDATE pgbackend.offsets SET owner = NULL, epoch = nextval('pgbackend.epochs')")
        async with running(database) as owner:
            await owner.subscribe("s", insert, transactional=True)
            await eventually("the owner's effect", lambda: _has(effects, "a"))
            release.set()
            await eventually("the former owner has given up", lambda: pump.shard.lost)
    assert await ids(effects) == ["a"]


async def _has(effects: Sql, id_: str) -> bool:
    return id_ in await ids(effects)


async def test_a_cancelled_dispatch_is_rolled_back(effects: Sql, database: str) -> None:
    reached = asyncio.Event()

    async def hang(event: Event, connection: Any) -> None:
        await insert(event, connection)
        reached.set()
        await asyncio.Event().wait()

    async with running(database, drain_timeout=0.1) as backend:
        await produce(backend, "a")
        await backend.subscribe("s", hang, start="earliest", transactional=True)
        await reached.wait()
    assert await ids(effects) == []
    async with running(database) as backend:
        await backend.subscribe("s", insert, transactional=True)
        await settled(backend)
    assert await ids(effects) == ["a"]


async def test_a_transaction_that_cannot_begin_is_no_attempt(
    effects: Sql, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect, refused = Database.connect, 0
    attempts: list[int] = []

    async def refuse(self: Database, **options: Any) -> Any:
        nonlocal refused
        if refused < 3:
            refused += 1
            raise ConnectionLostError("not now")
        return await connect(self, **options)

    async def handle(event: Event, connection: Any) -> None:
        attempts.append(event.attempt)
        await insert(event, connection)

    async with running(database) as backend:
        await produce(backend, *numbers(5))
        await settled_once(backend)
        monkeypatch.setattr(Database, "connect", refuse)
        await backend.subscribe(
            "s", handle, start="earliest", transactional=True, order="strict", retry=Retry(attempts=1)
        )
        await settled(backend, "s")

    assert refused == 3
    assert attempts == [1] * 5
    assert await ids(effects) == numbers(5)


async def test_a_deadlock_counts_for_no_event(effects: Sql, database: str) -> None:
    """Two shards lock the same two rows, each in its own order, and wait for each other."""
    await effects.execute("INSERT INTO effects (id) VALUES ('left'), ('right')")
    together = asyncio.Barrier(2)
    met: list[str] = []

    async def lock_both(event: Event, connection: Any) -> None:
        rows = ["left", "right"] if event.id == "a" else ["right", "left"]
        await connection.execute("SELECT FROM effects WHERE id = $1 FOR UPDATE", rows[0])
        if event.id not in met:
            met.append(event.id)
            await together.wait()
        await connection.execute("SELECT FROM effects WHERE id = $1 FOR UPDATE", rows[1])
        await insert(event, connection)

    with Recorder() as recorder:
        async with running(database) as backend:
            keys = [
                await effects.fetchval(
                    "SELECT min(key) FROM (VALUES ('k'), ('l'), ('m'), ('n'), ('o'), ('p'), ('q')) AS given (key)"
                    " WHERE pgbackend.key_hash(key, NULL, '', '') % 2 = $1",
                    shard,
                )
                for shard in range(2)
            ]
            await backend.produce_many([make_event("a", key=keys[0]), make_event("b", key=keys[1])])
            await backend.subscribe(
                "s", lock_both, start="earliest", transactional=True, shards=2, order="key", retry=Retry(attempts=1)
            )
            await settled(backend)
            assert await dead_letters(backend, 0) == []

    assert sorted(await ids(effects)) == ["a", "b", "left", "right"]
    assert recorder.all("transaction put off")


@pytest.mark.parametrize(("times", "attempts"), [(1, 1), (transactions._MOST_PUT_OFF + 1, 2)])
async def test_a_connection_that_is_lost_after_the_dispatcher_counts_for_no_event_unless_it_always_is(
    effects: Sql, database: str, monkeypatch: pytest.MonkeyPatch, times: int, attempts: int
) -> None:
    write_in, lost, seen = Offsets.write_in, 0, []

    async def lose(self: Offsets, connection: Any, *args: Any) -> Any:
        nonlocal lost
        if lost < times:
            lost += 1
            await effects.execute("SELECT pg_terminate_backend($1)", connection.get_server_pid())
        return await write_in(self, connection, *args)

    async def handle(event: Event, connection: Any) -> None:
        seen.append(event.attempt)
        await insert(event, connection)

    monkeypatch.setattr(Offsets, "write_in", lose)
    monkeypatch.setattr(transactions, "GrowingDelay", lambda database: GrowingDelay(database, cap=0.01))
    async with running(database) as backend:
        await produce(backend, "a")
        await backend.subscribe("s", handle, start="earliest", transactional=True, retry=NO_WAIT)
        await settled(backend)

    assert await ids(effects) == ["a"]
    assert (len(seen), seen[-1]) == (times + 1, attempts)


async def settled_once(backend: Backend) -> None:
    """A subscription has run, so every other connection is open."""
    await backend.subscribe("before", lambda _: None, start="earliest")
    await settled(backend, "before")


# Together with the rest.


async def test_shards_run_transactions_side_by_side_and_a_reshard_repeats_nothing(effects: Sql, database: str) -> None:
    async with running(database) as backend:
        await backend.produce_many([make_event(number, key=f"k{int(number) % 10}") for number in numbers(300)])
        await backend.subscribe("s", insert, start="earliest", transactional=True, shards=4)
        await eventually("some", lambda: _has(effects, "50"))
        await backend.reshard("s", 2)
        await produce(backend, "last")
        await settled(backend)

    assert sorted(await ids(effects)) == sorted([*numbers(300), "last"])


async def test_bounds_filters_and_seeks_work_as_everywhere(effects: Sql, database: str) -> None:
    async with running(database) as backend:
        await produce(backend, *numbers(30))
        await backend.subscribe(
            "s", insert, start=5, end=25, transactional=True, filter=lambda event: int(event.id) % 2 == 0
        )
        await settled(backend)
        assert await ids(effects) == [str(number) for number in range(6, 24, 2)]
        await effects.execute("DELETE FROM effects")
        await backend.seek("s", 20)
        await eventually("again", lambda: _has(effects, "22"))

    assert await ids(effects) == ["20", "22"]


async def test_a_dispatcher_may_set_codecs_on_its_connection(effects: Sql, database: str) -> None:
    async def handle(event: Event, connection: Any) -> None:
        await connection.set_type_codec("jsonb", encoder=json.dumps, decoder=json.loads, schema="pg_catalog")
        await insert(event, connection)
        if event.attempt == 1:
            raise ValueError("an outcome is to be recorded then")

    async with running(database) as backend:
        await produce(backend, "a", "b")
        await backend.subscribe("s", handle, start="earliest", transactional=True, retry=NO_WAIT)
        await settled(backend)

    assert sorted(await ids(effects)) == ["a", "b"]


async def test_plain_sql_in_the_transaction_is_checked_as_everywhere(effects: Sql, database: str) -> None:
    async def append(event: Event, connection: Any) -> None:
        await connection.execute("INSERT INTO pgbackend.events (id, source, type) VALUES ('', 's', 't')")

    async with running(database) as backend:
        await produce(backend, "a")
        await backend.subscribe("s", append, start="earliest", transactional=True, retry=Retry(attempts=1))
        (letter,) = await dead_letters(backend, 1)

    assert 'attribute "id" is empty' in letter.failure.error
