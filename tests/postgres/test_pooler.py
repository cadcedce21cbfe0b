"""Through a real pgbouncer in transaction mode: it is detected, and nothing is lost or left behind."""

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import asyncpg
import pytest

from pgbackend import Backend, Event, PgBackendError, ProduceUncertainError, Reject, Retry
from pgbackend.errors import ConnectionLostError
from pgbackend.facts import Recorder
from pgbackend.log import requirements
from pgbackend.log.log import Log
from pgbackend.log.retention import Retainer
from pgbackend.log.segments import Segments
from pgbackend.postgres.connections import is_pooled
from pgbackend.postgres.pool import Database
from pgbackend.postgres.sql import fill_in, parse
from pgbackend.subscriptions.leases import Leases
from pgbackend.subscriptions.presence import Presence, Tenure
from pgbackend.torture.proxy import Proxy
from tests.postgres.test_statements import STATEMENTS
from tests.support.claims import claim_free
from tests.support.databases import Sql, query_value
from tests.support.dispatchers import Catch
from tests.support.events import make_event
from tests.support.ledger import Ledger
from tests.support.polling import eventually
from tests.support.pooler import Pooler, needs_pgbouncer
from tests.support.worker import Worker

# These tests run a pooler of their own.
pytestmark = [needs_pgbouncer, pytest.mark.direct, pytest.mark.slow]


@pytest.fixture
def pooler(server: str) -> Iterator[Pooler]:
    """Three connections to the server for all clients, so that state left in a session soon meets another client."""
    with Pooler(server, default_pool_size=3) as running:
        yield running


async def opened(dsn: str, **settings: Any) -> Database:
    database = Database(dsn, **settings)
    await database.open()
    return database


# Detection.


@pytest.mark.parametrize("mode", ["transaction", "session"])
async def test_a_pooler_is_told_from_a_direct_connection(server: str, database: str, mode: str) -> None:
    with Pooler(server, pool_mode=mode) as pooler:
        there = await opened(pooler.dsn(database), listen_dsn=database)
        with Recorder() as recorder:
            connections = [await there.connect(), await there.connect(direct=True), await there.connect()]
        found = [is_pooled(connection) for connection in connections]
        for connection in connections:
            await connection.close()
        await there.close()

    assert found == [True, False, True]
    assert recorder.all("pooler found") == [], "open() had found it already"


async def test_a_direct_connection_is_examined_once_and_keeps_its_statements(database: str) -> None:
    async with Proxy(database) as proxy:
        there = await opened(proxy.dsn, pool_size=1)
        for number in range(50):
            assert await there.fetchval("SELECT $1::int", number) == number
        async with there.acquire() as connection:
            prepared = await connection.fetch("SELECT statement FROM pg_prepared_statements")
            pooled = is_pooled(connection)
        await there.close()

    assert [row["statement"] for row in prepared if "SELECT $1::int" in row["statement"]]
    assert (pooled, proxy.accepted) == (False, 1)


async def test_a_pooler_that_appears_later_is_detected(pooler: Pooler, database: str) -> None:
    """A host name may lead somewhere else after a while."""
    async with Proxy(database) as proxy:
        there = await opened(proxy.dsn)
        proxy._target = pooler.dsn(database)
        proxy.reset()
        with Recorder() as recorder:
            # The connection that was reset may fail a statement, or be missed before.
            with suppress(ConnectionLostError):
                await there.fetchval("SELECT 1")
            assert await there.fetchval("SELECT $1::int", 7) == 7
            async with there.acquire() as connection:
                assert connection._con.__class__ is not asyncpg.Connection  # type: ignore[attr-defined]
        await there.close()

    assert len(recorder.all("pooler found")) == 1


# No state from one statement to the next.


async def test_clients_never_run_each_others_statements(pooler: Pooler, database: str) -> None:
    """Parsed in one transaction and run in the next, a statement would be another client's, or gone."""
    clients = [await opened(pooler.dsn(database)) for _ in range(4)]

    async def ask_on(client: Database, number: int) -> None:
        for turn in range(20):
            assert await client.fetchval(f"SELECT {number} + $1::int", turn) == number + turn
            assert await client.fetchval(f"SELECT {number} || $1::text", "x") == f"{number}x"
            assert await client.fetchval("SELECT cardinality($1::bigint[])", [number] * turn) == turn

    await asyncio.gather(*(ask_on(client, number) for client in clients for number in range(5)))
    for client in clients:
        await client.close()


async def test_no_statement_makes_asyncpg_look_up_types(
    pooler: Pooler, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To look up a type, asyncpg changes settings of the session for a moment, and through a pooler of any session."""
    there = Database(pooler.dsn(database))
    connection = await there.connect()

    async def refused(*_: object) -> None:
        raise AssertionError("asyncpg does not know a type yet: add it to connections._TYPES")

    monkeypatch.setattr(asyncpg.Connection, "_introspect_types", refused)
    for file, name in STATEMENTS:
        await connection.prepare(fill_in(parse(file)[name], schema="pgbackend"))
    await connection.close()


async def test_no_state_is_left_in_the_servers_sessions(server: str, empty_database: str) -> None:
    """Two connections to the server serve all clients, so any state would be left in these."""
    question = (
        "SELECT pg_backend_pid(), "
        # asyncpg turns JIT off and on again while it looks types up, in whichever session it meets.
        "(SELECT array_agg(name || '=' || setting ORDER BY name) FROM pg_settings "
        "WHERE source = 'session' AND name <> 'jit'), "
        "(SELECT count(*) FROM pg_prepared_statements WHERE name <> '') "
        "+ (SELECT count(*) FROM pg_cursors WHERE name <> '') "
        "+ (SELECT count(*) FROM pg_listening_channels()) "
        "+ (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid())"
    )
    with Pooler(server, default_pool_size=2) as pooler:
        observers = [await Database(pooler.dsn(empty_database)).connect() for _ in range(2)]

        async def look() -> list[Any]:
            # Both at once, so that each meets another session.
            async with observers[0].transaction(), observers[1].transaction():
                return sorted([tuple(await observer.fetchrow(question) or ()) for observer in observers])

        before = await look()
        catch = Catch(fails=lambda event: event.id == "b" and event.attempt == 1)
        async with Backend(pooler.dsn(empty_database), poll_interval=0.05) as backend:
            await backend.subscribe("s", catch, retry=Retry(delay=0.01))
            await backend.produce(make_event("a"))
            await backend.produce_many([make_event("b"), make_event("c")])
            await backend.produce_many([make_event(f"many {number}") for number in range(100)])
            await catch.has("a", "b", "c", "many 99")
            await backend.probe()
            # Before stop(): a statement that it cancels closes its connection to the server.
            after = await look()
        for observer in observers:
            await observer.close()

    assert after == before
    assert [left for _, _, left in after] == [0, 0]


async def test_a_pooler_with_one_connection_is_refused_and_says_what_to_set(
    server: str, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requirements, "_PATIENCE", 0.0)
    with Pooler(server, default_pool_size=1) as pooler, pytest.raises(ConnectionLostError, match="default_pool_size"):
        await Backend(pooler.dsn(database)).init()


async def test_backends_that_test_the_evidence_at_once_do_not_deadlock(server: str, database: str) -> None:
    """Each needs two of the pooler's three connections, and must wait its turn however slow the machine is."""
    for _ in range(10):
        with Pooler(server, default_pool_size=3, query_wait_timeout=60) as pooler:
            backends = [Backend(pooler.dsn(database)) for _ in range(6)]
            results = await asyncio.gather(*(backend.init() for backend in backends), return_exceptions=True)
            for backend in backends:
                await backend.stop()
            # pgbouncer 1.18 sometimes crashes when a client cancels a statement.
            if not pooler.has_crashed():
                break
    assert results == [None] * 6


# End to end.


@pytest.mark.parametrize("listening", [True, False], ids=["listen_dsn", "polling only"])
async def test_every_call_works_through_a_pooler(pooler: Pooler, empty_database: str, *, listening: bool) -> None:
    dsn = pooler.dsn(empty_database)
    listen_dsn = empty_database if listening else None
    plain, strict = Catch(fails=lambda event: event.id == "fails once" and event.attempt == 1), Catch()

    rejected: set[str] = set()

    async def reject(event: Event) -> None:
        if event.id not in rejected:
            rejected.add(event.id)
            raise Reject("not today")

    with Recorder() as recorder:
        async with Backend(dsn, listen_dsn=listen_dsn, poll_interval=0.1) as backend:
            await backend.subscribe("plain", plain, retry=Retry(delay=0.01), shards=2)
            await backend.subscribe("strict", strict, order="strict", start="earliest")
            await backend.subscribe("rejects", reject)
            await recorder.wait("lease claimed", count=4)
            await backend.produce(make_event("one"))
            await backend.produce(make_event("fails once"))
            await backend.produce(make_event("large", data=b"x" * 100_000))
            await backend.produce_many([make_event(f"few {number}") for number in range(5)])
            ids = [f"many {number}" for number in range(2000)]
            await backend.produce_many([make_event(id_) for id_ in ids])
            await plain.has("one", "fails once", "large", "few 4", *ids)
            await strict.has("one", "fails once", "large", "few 4", *ids)
            await backend.probe()

            async def letters() -> int:
                return len([letter async for letter in backend.dead_letters("rejects")])

            async def all_are_rejected() -> bool:
                return await letters() == len(ids) + 8

            await eventually("every event is a dead letter", all_are_rejected, 30)
            await backend.redeliver(subscription="rejects")

            async def none_is_left() -> bool:
                return await letters() == 0

            await eventually("every dead letter was handled", none_is_left, 30)
            await backend.seek("strict", "earliest")
            await eventually("everything comes again", lambda: _is(lambda: len(strict.ids) == 2 * (len(ids) + 8)), 30)
            await backend.alter_subscription("plain", order="key", end=None, start="latest")
            await backend.delete_subscription("rejects")
            registered = await query_value(empty_database, "SELECT backend_pid IS NOT NULL FROM pgbackend.workers")
            status = await backend.status()

    assert registered == listening
    assert len(recorder.all("not listening")) == (0 if listening else 1)
    assert [subscription.name for subscription in status.subscriptions] == ["plain", "strict"]
    assert len(plain.ids) == len(set(plain.ids))


async def _is(condition: Any) -> bool:
    return bool(condition())


async def test_a_direct_listen_dsn_receives_wake_ups(pooler: Pooler, database: str) -> None:
    """Polling alone would find the event only after a minute."""
    dsn, catch = pooler.dsn(database), Catch()
    async with Backend(dsn, listen_dsn=database, poll_interval=60) as backend:
        with Recorder() as recorder:
            await backend.subscribe("s", catch)
            await recorder.wait("lease claimed")
        producer = Backend(dsn)
        await producer.init()
        await producer.produce(make_event("a"))
        await catch.has("a")
        await producer.stop()


async def test_a_listen_dsn_through_a_pooler_falls_back_to_polling(pooler: Pooler, database: str) -> None:
    dsn, catch = pooler.dsn(database), Catch()
    with Recorder() as recorder:
        async with Backend(dsn, listen_dsn=dsn, poll_interval=0.1) as backend:
            await backend.subscribe("s", catch)
            await backend.produce(make_event("a"))
            await catch.has("a")
            channels = await query_value(dsn, "SELECT count(*) FROM pg_listening_channels()")

    assert len(recorder.all("not listening")) == 1
    assert channels == 0


async def test_segments_are_made_through_a_pooler(pooler: Pooler, database: str) -> None:
    there = await opened(pooler.dsn(database))
    await asyncio.gather(*(Segments(there, schema="pgbackend").extend() for _ in range(3)))
    upto = await Segments(there, schema="pgbackend").extend()
    await there.close()

    assert upto >= 100_000_000


@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
async def test_segments_go_through_a_pooler_whatever_isolation_the_database_sets(
    pooler: Pooler, database: str, sql: Sql, isolation: str
) -> None:
    name = await sql.fetchval("SELECT quote_ident(current_database())")
    await sql.execute(f"ALTER DATABASE {name} SET default_transaction_isolation = '{isolation}'")
    there = await opened(pooler.dsn(database))
    async with Backend(database) as backend:
        await backend.produce(make_event("a"))
    await sql.execute("UPDATE pgbackend.events SET recorded_at = recorded_at - interval '10 days'")
    done = await Retainer(there, Segments(there, schema="pgbackend"), schema="pgbackend").run_once()
    await there.close()

    assert (done.cut, done.emptied, done.removed) == (True, 1, 1)


# Dead and living workers.


async def test_a_worker_does_not_register_a_pooled_backend(pooler: Pooler, database: str) -> None:
    """A pooler may keep that backend when the worker is dead, and close it while the worker lives."""
    there = await opened(pooler.dsn(database))
    tenure = Tenure()
    presence = Presence(
        there, schema="pgbackend", worker=uuid4(), name="w", lease_timeout=15.0, channel="c", notify="SELECT 1",
        tenure=tenure, on_hint=lambda _: None, on_held=lambda _: None,
    )  # fmt: skip
    await presence.start()
    row = await there.fetchrow("SELECT backend_pid, backend_start FROM pgbackend.workers")
    await presence.stop()
    await there.close()

    assert row
    assert (row["backend_pid"], row["backend_start"]) == (None, None)


async def test_a_worker_killed_behind_a_pooler_keeps_its_shards_until_its_lease_ends(
    pooler: Pooler, database: str, tmp_path: Path
) -> None:
    dsn, ledger = pooler.dsn(database), Ledger(tmp_path / "ledger")
    ledger.produced += [str(number) for number in range(300)]
    there = await opened(dsn)
    log = Log(there, schema="pgbackend", hole_wait=1.0)
    await log.incarnation.enter()
    others = Leases(log, schema="pgbackend", worker=uuid4())
    async with Backend(dsn, lease_timeout=60.0) as producer:
        async with Worker(dsn, ledger, delay=0.01, concurrency=4, settings={"lease_timeout": 60.0}) as worker:
            await producer.produce_many([make_event(id_) for id_ in ledger.produced])
            await eventually("some are handled", lambda: _is(lambda: len(ledger.handled()) > 20))
            worker.kill()
            await worker.process.wait()
        too_early = await claim_free(others, "test")
        by_first = {handling.id for handling in ledger.handled()}
        # As if the minute had passed.
        await there.execute("UPDATE pgbackend.workers SET heartbeat_at = heartbeat_at - interval '61 s'")
        await producer.subscribe("test", ledger.handle)
        await eventually("the rest is handled", lambda: _is(lambda: not ledger.lost()), 30)
    await there.close()

    assert too_early == [], "its shard was claimed before its lease ended"
    # Only events in flight, or handled since the last commit of the offset.
    assert set(ledger.doubled()) <= by_first


@pytest.mark.slow
async def test_another_process_takes_over_from_a_worker_killed_behind_a_pooler(
    pooler: Pooler, database: str, tmp_path: Path
) -> None:
    """By the real clock, with two processes."""
    dsn, ledger = pooler.dsn(database), Ledger(tmp_path / "ledger")
    settings: dict[str, object] = {"lease_timeout": 2.0}
    producer = Backend(dsn)
    await producer.init()
    async with (
        Worker(dsn, ledger, delay=0.005, concurrency=4, settings=settings) as first,
        Worker(dsn, ledger, delay=0.005, concurrency=4, settings=settings) as second,
    ):
        for number in range(200):
            await producer.produce(make_event(str(number)))
            ledger.produced.append(str(number))
        await eventually("some are handled", lambda: _is(lambda: len(ledger.handled()) > 5))
        owner = ledger.handled()[-1].worker
        victim, other = (first, second) if owner == first.pid else (second, first)
        victim.kill()
        await eventually("everything is handled", lambda: _is(lambda: not ledger.lost()), 60)
        await other.stop()
    await producer.stop()


# Poolers that stop and start.


class Load:
    """Produces through the pooler until it is left."""

    def __init__(self, backend: Backend, ledger: Ledger) -> None:
        self._backend = backend
        self._ledger = ledger
        self._enough = asyncio.Event()
        self.refused: list[str] = []

    async def __aenter__(self) -> Self:
        self._callers = [asyncio.create_task(self._produce(number)) for number in range(8)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._enough.set()
        await asyncio.gather(*self._callers)

    async def progress(self, events: int = 50) -> None:
        goal = len(self._ledger.produced) + events
        await eventually(
            f"{events} more events are acknowledged", lambda: _is(lambda: len(self._ledger.produced) >= goal), 60
        )

    async def _produce(self, caller: int) -> None:
        turn = 0
        while not self._enough.is_set():
            turn += 1
            id_ = f"{caller}-{turn}"
            try:
                await self._backend.produce(make_event(id_))
            except ProduceUncertainError:
                self._ledger.uncertain.append(id_)
            except PgBackendError:
                self.refused.append(id_)
            else:
                self._ledger.produced.append(id_)
            await asyncio.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize("listening", [True, False], ids=["listen_dsn", "polling only"])
async def test_restarts_of_pgbouncer_under_load_lose_nothing(
    pooler: Pooler, database: str, tmp_path: Path, *, listening: bool
) -> None:
    dsn, ledger = pooler.dsn(database), Ledger(tmp_path / "ledger")
    settings: dict[str, object] = {"listen_dsn": database} if listening else {}
    backend = Backend(dsn)
    await backend.init()
    async with Worker(dsn, ledger, delay=0.002, concurrency=8, settings=settings) as worker:
        async with Load(backend, ledger) as load:
            for _ in range(3):
                await load.progress()
                pooler.kill()
                pooler.start()
            await load.progress()
        await eventually("everything is handled", lambda: _is(lambda: not ledger.lost()), 60)
        await worker.stop()
    await backend.stop()
    stored = await query_value(database, "SELECT array_agg(id) FROM pgbackend.events")

    assert not set(ledger.produced) - set(stored)
    assert not set(load.refused) & set(stored), "events are stored although produce() failed"
    assert len(stored) == len(set(stored)), "an append was repeated"
    assert ledger.unknown() == []
    # The worker lives and keeps its shard, so no event is dispatched twice.
    assert ledger.doubled() == {}


@pytest.mark.slow
async def test_pausing_and_reloading_pgbouncer_under_load_only_delays(
    pooler: Pooler, database: str, tmp_path: Path
) -> None:
    ledger = Ledger(tmp_path / "ledger")
    async with Backend(pooler.dsn(database)) as backend:
        await backend.subscribe("s", ledger.handle)
        async with Load(backend, ledger) as load:
            for size in (1, 5, 3):
                await load.progress()
                pooler.pause()
                pooler.reload(default_pool_size=size)
                pooler.resume()
            await load.progress()
        await eventually("everything is handled", lambda: _is(lambda: not ledger.lost()), 30)

    assert (load.refused, ledger.uncertain) == ([], [])
    assert ledger.doubled() == {}


async def test_an_append_cut_off_by_the_end_of_pgbouncer_is_uncertain_and_not_repeated(
    pooler: Pooler, database: str
) -> None:
    backend = Backend(pooler.dsn(database))
    await backend.init()
    lock = await asyncpg.connect(database)
    await lock.execute("BEGIN; LOCK TABLE pgbackend.events IN SHARE MODE")
    append = asyncio.create_task(backend.produce(make_event("a")))

    async def is_under_way() -> bool:
        return bool(await lock.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted AND relation IS NOT NULL"))

    await eventually("the append waits for the lock", is_under_way)
    pooler.kill()
    with pytest.raises(ProduceUncertainError):
        await append
    await lock.execute("COMMIT")
    pooler.start()
    await backend.produce(make_event("b"))
    await lock.close()
    await backend.stop()
    stored = await query_value(database, "SELECT array_agg(id) FROM pgbackend.events")

    assert stored.count("a") <= 1
    assert stored.count("b") == 1


# Errors of pgbouncer itself.


async def test_a_full_pooler_is_blamed(server: str, database: str) -> None:
    with Pooler(server, max_client_conn=2) as pooler:
        there = Database(pooler.dsn(database))
        # The first two connections to a pooler are one to detect it and one to use.
        held = [await there.connect()]

        async def connect_another() -> None:
            held.append(await there.connect())

        with pytest.raises(ConnectionLostError, match=r"max_client_conn.*pooler") as caught:
            await asyncio.gather(connect_another(), connect_another())
        for connection in held:
            await connection.close()

    assert caught.value.sqlstate == "08P01"


async def test_a_pooler_without_a_free_connection_is_blamed(server: str, database: str) -> None:
    with Pooler(server, default_pool_size=1, query_wait_timeout=1) as pooler:
        there = await opened(pooler.dsn(database))
        hog = await there.connect()
        await hog.execute("BEGIN")
        with pytest.raises(ConnectionLostError, match=r"query_wait_timeout.*pooler"):
            await there.fetchval("SELECT 1")
        await hog.execute("COMMIT")
        assert await there.fetchval("SELECT 1") == 1
        await hog.close()
        await there.close()


async def test_an_append_that_gets_no_connection_from_the_pooler_is_uncertain(server: str, database: str) -> None:
    with Pooler(server, default_pool_size=2, query_wait_timeout=1) as pooler:
        backend = Backend(pooler.dsn(database))
        await backend.init()
        await backend.produce(make_event("a"))
        hogs = [await Database(pooler.dsn(database)).connect() for _ in range(2)]
        for hog in hogs:
            await hog.execute("BEGIN")
        with pytest.raises(ProduceUncertainError, match="query_wait_timeout"):
            await backend.produce(make_event("b"))
        for hog in hogs:
            await hog.execute("COMMIT")
        await backend.produce(make_event("c"))
        for hog in hogs:
            await hog.close()
        await backend.stop()


async def test_a_pooler_without_a_server_is_blamed(tmp_path: Path) -> None:
    nowhere = f"postgresql://postgres@/postgres?host={tmp_path}"
    said = pytest.raises(ConnectionLostError, match=r"client_login_timeout.*pooler")
    with Pooler(nowhere, client_login_timeout=1) as pooler, said:
        await Backend(pooler.dsn(nowhere)).init()


async def test_a_parameter_that_a_pooler_refuses_is_named(pooler: Pooler, database: str) -> None:
    backend = Backend(pooler.dsn(database) + "&work_mem=4MB")
    with pytest.raises(ConnectionLostError, match=r"unsupported startup parameter: work_mem.*pooler"):
        await backend.init()


async def test_a_pooler_in_statement_mode_is_blamed(server: str, database: str) -> None:
    with (
        Pooler(server, pool_mode="statement") as pooler,
        pytest.raises(ConnectionLostError, match=r"statement.*pooler"),
    ):
        await Backend(pooler.dsn(database)).init()
