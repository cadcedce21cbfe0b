"""Deduplication: within its window, the log takes each source and id once, whoever produces it and whatever breaks."""

import asyncio
import random
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import asyncpg
import psycopg
import pytest
from cloudevents.core.v1.event import CloudEvent

from pgbackend import Backend, outbox
from pgbackend.codec.sdk import encode
from pgbackend.embedded.server import EmbeddedServer
from pgbackend.errors import ConfigError, EventError, ProduceTimeoutError, ProduceUncertainError
from pgbackend.facts import Recorder
from pgbackend.log.deduplication import Deduplication, key_of
from pgbackend.postgres.pool import Database
from pgbackend.torture.proxy import Proxy
from pgbackend.torture.server import restart_server
from tests.support.databases import Sql, connected, query_value
from tests.support.events import make_event
from tests.support.polling import eventually

DAY = timedelta(days=1)
PRODUCE = "SELECT pgbackend.produce('test', 'test', id => $1)"


@asynccontextmanager
async def producer(dsn: str, window: timedelta | None = DAY, **settings: Any) -> AsyncIterator[Backend]:
    backend = Backend(dsn, deduplicate=window, **settings)
    await backend.init()
    try:
        yield backend
    finally:
        await backend.stop()


async def stored(dsn: str) -> list[str]:
    async with connected(dsn) as connection:
        return [row["id"] for row in await connection.fetch("SELECT id FROM pgbackend.events ORDER BY position")]


def serialized(id_: str) -> bytes:
    return b'{"specversion":"1.0","id":"%s","source":"test","type":"test","data":{"n":1}}' % id_.encode()


async def test_a_repeat_is_acknowledged_and_not_appended(database: str) -> None:
    repeats: list[int] = []
    answers: list[Exception | None] = []
    async with producer(database) as backend:
        await backend.produce(make_event("a", "first"))
        await backend.produce(make_event("a", "second"))
        await backend.produce_many([make_event("a"), make_event("b"), make_event("b")], on_repeats=repeats.append)
        await backend.produce_many([serialized(id_) for id_ in "abcdd"], on_repeats=repeats.append)
        await backend.produce_many([serialized("e")], on_repeats=repeats.append)
        await backend.produce_many([serialized("e")], on_repeats=repeats.append)
        backend.produce_soon(make_event("e"), answers.append, on_repeats=repeats.append)
        await eventually("it is answered", lambda: bool(answers))

    assert await stored(database) == ["a", "b", "c", "d", "e"]
    assert repeats == [2, 3, 1, 1]
    assert answers == [None]
    assert await query_value(database, "SELECT data FROM pgbackend.events WHERE id = 'a'") == b"first"


async def test_only_source_and_id_count(database: str) -> None:
    def event(source: str, id_: str, type_: str = "t") -> CloudEvent:
        return CloudEvent({"source": source, "id": id_, "type": type_}, None)

    async with producer(database) as backend:
        for one in (
            event("/a", "1"),
            event("/b", "1"),
            event("/a", "2"),
            event("/a1", ""[:0] or "x"),
            event("/a", "1", "u"),
        ):
            await backend.produce(one)
        await backend.produce_many([event("/a", "1"), event("/c", "1"), event("/a", "2", "u")])

    assert await query_value(database, "SELECT count(*) FROM pgbackend.events") == 5


async def test_it_is_off_unless_the_log_has_a_window(database: str) -> None:
    async with producer(database, None) as backend:
        await backend.produce_many([make_event("a"), make_event("a")])
    async with connected(database) as connection:
        assert await connection.fetchval(PRODUCE, "a") == 3
        assert await connection.fetchval("SELECT pgbackend.first_copies('{s,s}', '{a,a}')") == [1, 2]
    assert await query_value(database, "SELECT count(*) FROM pgbackend.recent_events") == 0


async def test_the_window_is_the_logs(database: str) -> None:
    """Every backend obeys it; zero switches it off."""
    async with producer(database, DAY) as first, producer(database, None) as second:
        await first.produce(make_event("a"))
        await second.produce(make_event("a"))
        await second.produce(make_event("b"))
    async with producer(database, timedelta(0)) as backend:
        await backend.produce(make_event("b"))

    assert await stored(database) == ["a", "b", "b"]
    assert await query_value(database, "SELECT window_us FROM pgbackend.deduplication") == 0


@pytest.mark.parametrize("window", [1.0, timedelta(milliseconds=99), timedelta(days=367), timedelta(seconds=-1)])
def test_a_window_out_of_its_bounds_is_refused(window: Any) -> None:
    with pytest.raises(ConfigError, match=r"deduplicate is .*: expected a timedelta from"):
        Backend("postgresql://localhost/app", deduplicate=window)


async def test_the_window_can_be_changed_while_a_backend_runs(backend: Backend, database: str) -> None:
    for window in (DAY, timedelta(0)):
        await backend.set_deduplication(window)
        await backend.produce_many([make_event("a"), make_event("a")])
    with pytest.raises(ConfigError, match="window is"):
        await backend.set_deduplication(timedelta(days=1000))

    assert await stored(database) == ["a"] * 3


async def test_producers_can_say_that_repeats_are_appended(database: str) -> None:
    """Beside others in the same batch that are deduplicated."""
    async with producer(database) as backend:
        await backend.produce(make_event("a"))
        async with asyncio.TaskGroup() as tasks:
            for _ in range(5):
                tasks.create_task(backend.produce_many([make_event("a")], deduplicate=False))
                tasks.create_task(backend.produce(make_event("a")))

    assert await stored(database) == ["a"] * 6


async def test_python_and_sql_agree_on_the_key(database: str) -> None:
    async with connected(database) as connection:
        for source, id_ in (("/s", "1"), ("/ü", "🐘"), ("/s1", "x")):
            row, _ = encode(CloudEvent({"source": source, "id": id_, "type": "t"}, None), max_event_bytes=1 << 20)
            assert await connection.fetchval("SELECT pgbackend.event_key($1, $2)", source, id_) == key_of(row)


async def test_sql_and_python_refuse_each_others_repeats(database: str) -> None:
    async with producer(database) as backend, connected(database) as connection:
        await backend.produce(make_event("python"))
        assert await connection.fetchval(PRODUCE, "sql") == 2
        assert await connection.fetchval(PRODUCE, "python") is None
        assert await connection.fetchval(PRODUCE, "sql") is None
        await backend.produce(make_event("sql"))
        # A plain INSERT takes no part.
        await connection.execute("INSERT INTO pgbackend.events (id, source, type) VALUES ('sql', 'test', 'test')")

    assert await stored(database) == ["python", "sql", "sql"]


async def test_producing_in_ones_own_transaction_appends_no_repeats(database: str) -> None:
    """Repeats of events that are committed, in the same call or in the same transaction. Others wait for its commit."""
    async with producer(database) as backend, connected(database) as connection:
        await backend.produce(make_event("a"))
        async with connection.transaction():
            await backend.produce_many([make_event(id_) for id_ in "cbacd"], connection=connection)
            await backend.produce(make_event("b"), connection=connection)
            with psycopg.connect(database) as plain:
                outbox.produce_many(plain, [make_event("e"), make_event("e")])
            blocked = asyncio.create_task(backend.produce(make_event("d")))
            appender = backend._lifecycle.opened().appender
            await eventually("it is aside", lambda: bool(appender._aside))
        await blocked
        await connection.execute("BEGIN")
        await backend.produce(make_event("f"), connection=connection)
        await connection.execute("ROLLBACK")
        await backend.produce(make_event("f"))

    assert await stored(database) == ["a", "c", "b", "d", "e", "f"]


async def test_first_copies_finds_those_to_append_in_one_statement(database: str) -> None:
    async with producer(database) as backend, connected(database) as connection:
        await backend.produce(make_event("a"))
        first = "SELECT pgbackend.first_copies($1, $2)"
        assert await connection.fetchval(first, ["test"] * 5, ["b", "a", "c", "b", "d"]) == [1, 3, 5]
        assert await connection.fetchval(first, ["test"] * 2, ["b", "e"]) == [2]
        assert await connection.fetchval(first, [], []) == []


async def test_two_backends_at_once_append_each_event_once(database: str) -> None:
    """Alone, in batches and in large calls, in different orders."""
    ids = [str(number) for number in range(300)]
    async with producer(database) as one, producer(database) as other:

        async def send(backend: Backend, seed: int) -> None:
            shuffled = random.Random(seed).sample(ids, len(ids))
            for start in range(0, len(ids), 30):
                part = shuffled[start : start + 30]
                await backend.produce(make_event(part[0]))
                await asyncio.gather(*(backend.produce(make_event(id_)) for id_ in part[1:15]))
                await backend.produce_many([serialized(id_) for id_ in part[15:]])

        await asyncio.gather(*(send(backend, seed) for seed, backend in enumerate((one, other, one, other))))

    assert sorted(await stored(database)) == sorted(ids)


async def test_a_repeat_within_the_window_is_found_wherever_the_edges_lie(database: str) -> None:
    """Also while old keys are being forgotten all the time."""
    window = timedelta(seconds=0.2)
    # The server's clock before the first copy claims its key, and after the second one has.
    call = """
        SELECT
            clock_timestamp() AS before,
            pgbackend.produce('t', 's', id => $1) AS position,
            clock_timestamp() AS after
    """
    within = beyond = 0
    async with producer(database, window), connected(database) as connection, connected(database) as other:
        done = asyncio.Event()

        async def forget() -> None:
            while not done.is_set():
                await other.execute("SELECT pgbackend.forget_keys()")

        forgetting = asyncio.create_task(forget())
        for number in range(8):
            first = await connection.fetchrow(call, str(number))
            assert first is not None
            while True:
                repeat = await connection.fetchrow(call, str(number))
                assert repeat is not None
                if repeat["position"] is not None:
                    assert repeat["after"] - first["before"] > window
                    beyond += 1
                    break
                # It has been taken for a repeat for at most three windows.
                assert repeat["before"] - first["after"] <= 3 * window
                within += 1
        done.set()
        await forgetting

    assert beyond == 8
    assert within > 8


async def test_old_keys_are_forgotten_by_the_partition(database: str) -> None:
    """And those that may still be asked for are kept."""
    opened = Database(database)
    await opened.open()
    deduplication = Deduplication(opened, schema="pgbackend")
    try:
        await deduplication.enter(timedelta(seconds=0.2))
        async with connected(database) as connection:
            await connection.fetchval(PRODUCE, "a")
            oldest = await connection.fetchval("SELECT min(bucket) FROM pgbackend.recent_events")

            async def is_forgotten() -> bool:
                await deduplication.run_once()
                left = "SELECT count(*) FROM pgbackend.recent_events WHERE bucket = $1"
                return bool(await connection.fetchval(left, oldest) == 0)

            await eventually("the first bucket is emptied", is_forgotten)
            await deduplication.enter(DAY)
            await deduplication.run_once()
            assert await connection.fetchval(PRODUCE, "b") is not None
            assert await deduplication.run_once() == 0
            assert await connection.fetchval(PRODUCE, "b") is None
            await deduplication.enter(timedelta(0))
            deduplication.window_us = 1  # as before the change
            assert await deduplication.run_once() == 2
            assert await connection.fetchval("SELECT count(*) FROM pgbackend.recent_events") == 0
    finally:
        await opened.close()


async def test_keys_of_a_shorter_window_are_forgotten_too(database: str) -> None:
    async with producer(database, DAY), connected(database) as connection:
        # The numbers of buckets fall when the window grows: these are of half a day.
        await connection.execute(
            "INSERT INTO pgbackend.recent_events (slot, bucket, key) "
            "SELECT bucket % 3, bucket, 'old' FROM generate_series($1::bigint, $1 + 2) AS bucket",
            await connection.fetchval("SELECT floor(extract(epoch FROM clock_timestamp()) / 86400)::bigint"),
        )
        await connection.fetchval("SELECT pgbackend.forget_keys()")
        # Two partitions are in use for the present and the next bucket.
        assert await connection.fetchval("SELECT count(DISTINCT slot) FROM pgbackend.recent_events") == 2


async def test_keys_of_before_the_clock_was_set_back_by_a_window_are_kept(database: str) -> None:
    async with producer(database, DAY), connected(database) as connection:
        await connection.execute(
            "INSERT INTO pgbackend.recent_events (slot, bucket, key) "
            "SELECT bucket % 3, bucket, 'ahead' FROM generate_series($1::bigint, $1 + 2) AS bucket",
            await connection.fetchval("SELECT floor(extract(epoch FROM clock_timestamp()) / 172800)::bigint"),
        )
        assert await connection.fetchval("SELECT pgbackend.forget_keys()") == 0


async def test_an_open_transaction_keeps_old_keys_only_for_now(database: str) -> None:
    opened = Database(database)
    await opened.open()
    deduplication = Deduplication(opened, schema="pgbackend")
    try:
        await deduplication.enter(timedelta(seconds=0.1))
        async with connected(database) as connection, connected(database) as other:
            async with connection.transaction():
                await connection.fetchval(PRODUCE, "a")
                oldest = await connection.fetchval("SELECT min(bucket) FROM pgbackend.recent_events")

                async def has_passed() -> bool:
                    passed = "SELECT extract(epoch FROM clock_timestamp()) * 5 > $1::bigint + 4"
                    return bool(await other.fetchval(passed, oldest))

                await eventually("its windows have passed", has_passed)
                await deduplication.run_once()
                # Producers do not wait for it.
                assert await other.fetchval(PRODUCE, "b") is not None
            await deduplication.run_once()
    finally:
        await opened.close()


@pytest.mark.parametrize("commit", [True, False], ids=["commit", "rollback"])
async def test_an_open_first_copy_delays_only_its_own_call(database: str, commit: bool) -> None:
    repeats: list[int] = []
    async with producer(database) as backend, connected(database) as connection:
        transaction = connection.transaction()
        await transaction.start()
        await connection.fetchval(PRODUCE, "a")
        blocked = asyncio.create_task(
            backend.produce_many([make_event("x"), make_event("a")], on_repeats=repeats.append)
        )
        alone = asyncio.create_task(backend.produce(make_event("a")))
        async with asyncio.timeout(10):
            for number in range(5):
                await backend.produce(make_event(f"lone {number}"))
            await asyncio.gather(*(backend.produce(make_event(f"together {number}")) for number in range(100)))
            await backend.produce_many([serialized(f"large-{number}") for number in range(100)])
        assert not blocked.done()
        assert not alone.done()

        await (transaction.commit() if commit else transaction.rollback())
        async with asyncio.timeout(10):
            await asyncio.gather(blocked, alone)

    found = await stored(database)
    assert len(found) == 207
    assert (found.count("a"), found.count("x")) == (1, 1)
    assert repeats == ([1] if commit else repeats)


async def test_many_blocked_calls_delay_no_others_for_long(database: str) -> None:
    async with producer(database) as backend, connected(database) as connection:
        transaction = connection.transaction()
        await transaction.start()
        await connection.fetchval(
            "SELECT count(pgbackend.produce('t', 'test', id => n::text)) FROM generate_series(0, 199) n"
        )
        blocked = [asyncio.create_task(backend.produce(make_event(str(number)))) for number in range(200)]
        async with asyncio.timeout(10):
            await asyncio.gather(*(backend.produce(make_event(f"free {number}")) for number in range(200)))
        assert not any(task.done() for task in blocked)
        await transaction.commit()
        async with asyncio.timeout(10):
            await asyncio.gather(*blocked)

    assert len(await stored(database)) == 400


async def test_a_call_that_is_blocked_for_too_long_is_not_stored(database: str) -> None:
    async with producer(database, produce_timeout=1.5) as backend, connected(database) as connection:
        async with connection.transaction():
            await connection.fetchval(PRODUCE, "a")
            with pytest.raises(ProduceTimeoutError, match="same source and id"):
                await backend.produce(make_event("a"))
        await backend.produce(make_event("b"))

    assert await stored(database) == ["a", "b"]


async def test_a_blocked_call_that_is_cancelled_is_not_stored(database: str) -> None:
    async with producer(database) as backend, connected(database) as connection:
        transaction = connection.transaction()
        await transaction.start()
        await connection.fetchval(PRODUCE, "a")
        blocked = asyncio.create_task(backend.produce(make_event("a")))
        appender = backend._lifecycle.opened().appender
        await eventually("it is aside", lambda: bool(appender._aside))
        blocked.cancel()
        await asyncio.wait({blocked})
        await transaction.rollback()
        await eventually("nothing is aside", lambda: not appender._aside)

    assert await stored(database) == []


async def test_a_stopped_backend_waits_for_blocked_calls(database: str) -> None:
    async with connected(database) as connection:
        transaction = connection.transaction()
        await transaction.start()
        async with producer(database) as backend:
            await connection.fetchval(PRODUCE, "a")
            blocked = asyncio.create_task(backend.produce(make_event("a")))
            appender = backend._lifecycle.opened().appender
            await eventually("it is aside", lambda: bool(appender._aside))
            stopping = asyncio.create_task(backend.stop())
            await eventually("it takes no more", lambda: appender._refusal is not None)
            await transaction.rollback()
            await stopping
            await blocked

    assert await stored(database) == ["a"]


async def test_a_bad_event_fails_only_its_own_call(database: str) -> None:
    async with producer(database) as backend:
        appender = backend._lifecycle.opened().appender
        bad = list(encode(make_event("bad"), max_event_bytes=1 << 20)[0])
        bad[3] = "\0"
        calls = [
            backend.produce(make_event("a")),
            appender.append([tuple(bad)], 100),  # type: ignore[list-item]
            backend.produce_many([serialized("b"), b"not JSON", serialized("c")]),
            backend.produce(make_event("d")),
            backend.produce(make_event("a")),
        ]
        answers = await asyncio.gather(*calls, return_exceptions=True)

    assert [type(answer) for answer in answers] == [type(None), EventError, EventError, type(None), type(None)]
    assert await stored(database) == ["a", "d"]


@pytest.mark.direct
@pytest.mark.parametrize(("ids", "marker"), [("a", b"test"), ("abc", b"COMMIT")], ids=["lone", "batch"])
async def test_an_uncertain_commit_is_sent_again_and_stored_once(database: str, ids: str, marker: bytes) -> None:
    """The commit has happened, and its answer is lost. The caller hears of nothing."""
    repeats: list[int] = []
    with Recorder() as facts:
        async with Proxy(database) as proxy, producer(proxy.dsn) as backend:
            await backend.produce(make_event("warm"))
            proxy.lose_reply_to(marker)
            async with asyncio.timeout(20):
                await backend.produce_many([make_event(id_) for id_ in ids], on_repeats=repeats.append)
            await proxy.struck()
            await backend.produce(make_event("next"))

    assert facts.all("append is uncertain")
    assert sorted(await stored(database)) == sorted(["warm", *ids, "next"])
    assert repeats == []


@pytest.mark.direct
async def test_an_uncertain_commit_is_not_sent_again_beyond_the_window(database: str) -> None:
    async with Proxy(database) as proxy, producer(proxy.dsn, timedelta(seconds=1), produce_timeout=1.5) as backend:
        await backend.produce(make_event("warm"))
        proxy.lose_reply_to(b"test")
        with pytest.raises(ProduceUncertainError):
            await backend.produce(make_event("a"))

    assert await stored(database) == ["warm", "a"]


@pytest.mark.direct
async def test_an_uncertain_commit_stays_uncertain_while_there_is_no_connection(database: str) -> None:
    async with Proxy(database) as proxy, producer(proxy.dsn, produce_timeout=2.0) as backend:
        await backend.produce(make_event("warm"))
        proxy.lose_reply_to(b"test")
        uncertain = asyncio.create_task(backend.produce(make_event("a")))
        await proxy.struck()
        proxy.cut()
        with pytest.raises(ProduceUncertainError):
            await uncertain
        proxy.restore()

    assert await stored(database) == ["warm", "a"]


async def test_a_process_that_knows_another_window_appends_no_repeat(database: str) -> None:
    async with producer(database) as backend, producer(database, timedelta(hours=1)) as other:
        assert backend._lifecycle.opened().deduplication.window_us == DAY // timedelta(microseconds=1)
        await other.produce(make_event("a"))
        await backend.produce(make_event("a"))
        await backend.produce_many([make_event("a"), make_event("b")])
        assert backend._lifecycle.opened().deduplication.window_us == 3600 * 1_000_000

    assert await stored(database) == ["a", "b"]


async def test_a_process_finds_out_that_it_was_switched_on_and_off(database: str) -> None:
    async with producer(database, None) as backend:
        deduplication = backend._lifecycle.opened().deduplication
        async with producer(database, DAY):
            await deduplication.run_once()
            await backend.produce_many([make_event("a"), make_event("a")])
        async with producer(database, timedelta(0)):
            await backend.produce_many([make_event("b"), make_event("b")])

    assert await stored(database) == ["a", "b", "b"]


@pytest.mark.direct
async def test_a_repeat_is_as_durable_as_its_first_copy(database: str) -> None:
    """Its commit writes WAL, which it flushes and a synchronous standby confirms: the first copy's commit is before."""

    async def wal(connection: Sql) -> Any:
        return await connection.fetchval("SELECT pg_current_wal_insert_lsn()")

    async with producer(database) as backend, connected(database) as connection:
        await backend.produce_many([make_event("a"), make_event("b")])
        for produce in (
            lambda: backend.produce(make_event("a")),
            lambda: backend.produce_many([make_event("a"), make_event("b")]),
            lambda: connection.fetchval(PRODUCE, "a"),
        ):
            before = await connection.fetchval("SELECT pg_current_xact_id()::text::bigint")
            await produce()
            after = await connection.fetchval("SELECT pg_current_xact_id()::text::bigint")
            # Nothing else runs here but the first of these two transactions.
            assert after - before >= 2


async def test_keys_survive_a_crash(database: str) -> None:
    """As the events themselves do: none of their tables is unlogged."""
    assert await query_value(database, """
        SELECT bool_and(relpersistence = 'p')
        FROM pg_class
        WHERE relname LIKE 'recent_events%' OR relname LIKE 'deduplication%'""")  # fmt: skip


async def test_a_rolled_back_first_copy_leaves_no_key(database: str) -> None:
    async with producer(database) as backend, connected(database) as connection:
        transaction = connection.transaction()
        await transaction.start()
        await connection.fetchval(PRODUCE, "a")
        await transaction.rollback()
        await backend.produce(make_event("a"))
        assert await connection.fetchval(PRODUCE, "a") is None

    assert await stored(database) == ["a"]


async def test_repeatable_read_sees_a_repeat_or_a_serialization_failure(database: str) -> None:
    """Never a second copy: a repeat that the snapshot does not show cannot be told from a conflict."""
    async with producer(database) as backend, connected(database) as connection:
        await connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        await connection.fetchval("SELECT 1 FROM pgbackend.events")
        await backend.produce(make_event("a"))
        with pytest.raises(asyncpg.SerializationError):
            await connection.fetchval(PRODUCE, "a")
        await connection.execute("ROLLBACK")

    assert await stored(database) == ["a"]


# With faults.

PROGRAM = """
import asyncio, random, sys
from datetime import timedelta
from pgbackend import Backend, ConnectionLostError

async def main(dsn, seed):
    chance = random.Random(seed)
    backend = Backend(dsn, deduplicate=timedelta(days=1))
    while True:
        try:
            await backend.init(migrate=False)
            break
        except ConnectionLostError:
            await asyncio.sleep(0.05)
    ids = [f"{n}" for n in range(1500)] * 2
    chance.shuffle(ids)
    event = '{"specversion":"1.0","id":"%s","source":"test","type":"test","data":1}'
    for start in range(0, len(ids), 50):
        events = [(event % id_).encode() for id_ in ids[start : start + 50]]
        await backend.produce(events[0])
        await asyncio.gather(*(backend.produce(one) for one in events[1:15]))
        await backend.produce_many(events[15:])
        print(start, flush=True)
    await backend.stop()

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


@pytest.mark.slow
@pytest.mark.direct
async def test_two_processes_that_send_everything_twice_over_reconnects_store_each_event_once(database: str) -> None:
    async with producer(database):
        pass
    async with asyncio.timeout(120), asyncio.TaskGroup() as tasks:
        sending = [tasks.create_task(_send_over_reconnects(database, seed)) for seed in range(2)]
    found = await stored(database)
    assert len(found) == len(set(found)) == 1500
    assert [task.result() for task in sending] == [0, 0]


async def _send_over_reconnects(database: str, seed: int) -> int | None:
    """Run the program, and break its connections in each of its rounds. The program's exit status."""
    chance = random.Random(seed)
    async with Proxy(database) as proxy:
        program = await asyncio.create_subprocess_exec(
            sys.executable, "-c", PROGRAM, proxy.dsn, str(seed), stdout=asyncio.subprocess.PIPE
        )
        assert program.stdout is not None
        rounds = 0
        async for _ in program.stdout:
            # Not waiting for anything: a moment in the round that has begun.
            await asyncio.sleep(chance.uniform(0.0, 0.05))
            proxy.reset()
            rounds += 1
        assert rounds == 60
        return await program.wait()


@pytest.mark.slow
async def test_repeats_are_found_after_postgresql_was_killed() -> None:
    """While two backends send the same: what was acknowledged before, and what was on its way."""
    with tempfile.TemporaryDirectory(prefix="pgbackend-test-", ignore_cleanup_errors=True) as directory:
        server = EmbeddedServer(directory)
        dsn = await server.start()
        try:
            async with producer(dsn) as one, producer(dsn) as other:
                ids = [str(number) for number in range(400)]
                sending = [
                    asyncio.create_task(_send_slowly(backend, random.Random(seed).sample(ids, len(ids))))
                    for seed, backend in enumerate((one, other))
                ]
                for _ in range(2):
                    before = len(await stored(dsn))

                    async def is_further(before: int = before) -> bool:
                        return len(await stored(dsn)) >= before + 40

                    await eventually("more is stored", is_further)
                    await restart_server(server, "kill")
                await asyncio.gather(*sending)
            assert sorted(await stored(dsn)) == sorted(ids)
        finally:
            await server.stop()


async def _send_slowly(backend: Backend, ids: list[str]) -> None:
    for start in range(0, len(ids), 4):
        await asyncio.gather(*(backend.produce(make_event(id_)) for id_ in ids[start : start + 4]))
