import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import asyncpg
import pytest
from cloudevents.core.v1.event import CloudEvent
from hypothesis import given
from hypothesis import strategies as st

from pgbackend import Backend
from pgbackend.codec.attributes import COLUMNS, Row
from pgbackend.codec.wire import parse_structured
from pgbackend.errors import (
    ConfigError,
    ConnectionLostError,
    DatabaseError,
    EventError,
    NotRunningError,
    PgBackendError,
    ProduceTimeoutError,
    ProduceUncertainError,
)
from pgbackend.facts import Recorder
from pgbackend.log.appender import Appender, _Call
from pgbackend.log.deduplication import Deduplication
from pgbackend.log.notify import Notifier, Wakeup
from pgbackend.postgres.connections import Dialer
from pgbackend.postgres.pool import Database
from pgbackend.postgres.sql import load
from pgbackend.postgres.sql.statements import LogSql
from pgbackend.torture.proxy import Proxy
from tests.support.codec import attributes, content_type, json_value, put, sdk, structured
from tests.support.databases import connected
from tests.support.polling import eventually


def row(id_: str, *, time: str | None = None, data: bytes | None = None) -> Row:
    return ("1.0", id_, "test", "test", None, time, None, None, None, "{}", data, None)


BAD = "\0"
"""A value that PostgreSQL refuses. `produce()` would refuse it first."""


async def nothing_to_extend() -> None:
    raise AssertionError("the log has segments")


def make_appender(database: Database, *, timeout: float) -> Appender:
    sql = load(LogSql, "log", schema="pgbackend")
    notifier = Notifier(database, sql, channel="test", sender="me", idle=lambda: 0.0)
    return Appender(
        database,
        sql,
        schema="pgbackend",
        produce_timeout=timeout,
        wakeup=Wakeup(),
        notifier=notifier,
        on_full=nothing_to_extend,
        deduplication=Deduplication(database, schema="pgbackend"),
    )


@asynccontextmanager
async def appending(dsn: str, *, timeout: float = 30.0) -> AsyncIterator[Appender]:
    appender = make_appender(Database(dsn), timeout=timeout)
    running = asyncio.create_task(appender.run(), name="append")
    try:
        yield appender
    finally:
        async with asyncio.timeout(timeout + 15):
            await appender.drain()
            running.cancel()
            await asyncio.wait({running})


async def append(appender: Appender, rows: Sequence[Row]) -> None:
    await appender.append(rows, len(rows))


async def is_sent(appender: Appender) -> None:
    """Return once every call has been sent."""
    await asyncio.sleep(0)  # the tasks that make the calls have not begun
    assert appender._unsent

    async def none_wait() -> bool:
        return not appender._unsent

    await eventually("all calls are sent", none_wait)


def pass_deadlines(appender: Appender) -> None:
    """The deadline of every call has passed. A short `produce_timeout` might pass before a call is sent."""
    for call in appender._unanswered:
        call.deadline = 0.0
    appender._expire_calls()


async def stored(dsn: str) -> list[str]:
    connection = await asyncpg.connect(dsn)
    try:
        return [record["id"] for record in await connection.fetch("SELECT id FROM pgbackend.events ORDER BY position")]
    finally:
        await connection.close()


async def terminate_appender(dsn: str) -> None:
    connection = await asyncpg.connect(dsn)
    await connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    await connection.close()


@asynccontextmanager
async def log_locked(dsn: str) -> AsyncIterator[None]:
    """INSERTs wait while it is open."""
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute("BEGIN; LOCK TABLE pgbackend.events IN SHARE MODE")
        yield
    finally:
        await connection.close()


async def test_positions_follow_call_order_and_the_order_of_each_list(database: str) -> None:
    async with appending(database) as appender:
        await asyncio.gather(
            *(append(appender, [row(f"{call}-{part}") for part in range(call % 4 + 1)]) for call in range(200))
        )

    assert await stored(database) == [f"{call}-{part}" for call in range(200) for part in range(call % 4 + 1)]


async def test_calls_that_come_while_one_is_committed_travel_together(database: str) -> None:
    async with appending(database) as appender:
        await asyncio.gather(*(append(appender, [row(str(call))]) for call in range(300)))
    connection = await asyncpg.connect(database)
    transactions = await connection.fetchval("SELECT count(DISTINCT xmin::text) FROM pgbackend.events")
    await connection.close()

    assert transactions <= 3


async def test_attributes_count_toward_the_bytes_of_a_batch(database: str) -> None:
    backend = Backend(database)
    await backend.init()
    event = CloudEvent({"id": "1", "source": "test", "type": "test", "subject": "x" * 60_000})
    await asyncio.gather(*(backend.produce(event) for _ in range(300)))
    await backend.stop()
    connection = await asyncpg.connect(database)
    largest = await connection.fetchval("""
        SELECT max(sum) FROM (SELECT sum(octet_length(subject)) FROM pgbackend.events GROUP BY xmin::text) AS batch""")
    await connection.close()

    assert largest <= 4 << 20


@pytest.mark.parametrize("count", [1, 2, 1000, 3000])
async def test_a_list_of_any_length_is_one_transaction_in_its_order(database: str, count: int) -> None:
    ids = [str(number) for number in range(count)]
    async with appending(database) as appender:
        await append(appender, [row(id_) for id_ in ids])
    connection = await asyncpg.connect(database)
    transactions = await connection.fetchval("SELECT count(DISTINCT xmin::text) FROM pgbackend.events")
    await connection.close()

    assert await stored(database) == ids
    assert transactions == 1


async def test_an_event_alone_and_events_together_are_stored_alike(database: str) -> None:
    """One travels by INSERT, several by COPY."""
    full: Row = (
        "1.0", "ä\t\\N", "/s", "t", "sub\nject", "2026-01-01T00:00:00.123456789Z", "application/json", "urn:x", "key",
        '{"a": 1,  "b":"\\u00e9"}', bytes(range(256)), "json",
    )  # fmt: skip
    sparse = row("\\.", data=b"")
    async with appending(database) as appender:
        for one in (full, sparse):
            await append(appender, [one])
        await append(appender, [full, sparse])
    connection = await asyncpg.connect(database)
    columns = ", ".join("extensions::text" if name == "extensions" else name for name in COLUMNS)
    stored = await connection.fetch(f"SELECT {columns} FROM pgbackend.events ORDER BY position")
    await connection.close()

    assert stored[:2] == stored[2:]
    assert [tuple(record) for record in stored[:2]] == [full, sparse]


async def test_a_call_that_is_left_when_the_appender_is_cancelled_is_answered(database: str) -> None:
    async with appending(database) as appender, log_locked(database):
        sent = asyncio.create_task(append(appender, [row("sent")]))
        await is_sent(appender)
        unsent = asyncio.create_task(append(appender, [row("unsent")]))
        await asyncio.sleep(0)
        next(task for task in asyncio.all_tasks() if task.get_name() == "append").cancel()
        with pytest.raises(ProduceUncertainError):
            await sent
        with pytest.raises(NotRunningError, match="not stored"):
            await unsent
        with pytest.raises(NotRunningError):
            await append(appender, [row("later")])


async def test_an_appender_that_never_ran_drains_at_once_and_answers_its_calls(database: str) -> None:
    appender = make_appender(Database(database), timeout=30.0)
    call = asyncio.create_task(append(appender, [row("a")]))
    await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await appender.drain()
    with pytest.raises(NotRunningError, match="not stored"):
        await call
    await appender.run()


@pytest.mark.parametrize("size", [1, 2, 3])
async def test_a_list_with_one_bad_event_is_refused_as_a_whole(database: str, size: int) -> None:
    async with appending(database) as appender:
        rows = [row(str(number)) for number in range(size - 1)]
        with pytest.raises(EventError):
            await append(appender, [*rows, row("bad", time=BAD)])
        await append(appender, [row("after")])

    assert await stored(database) == ["after"]


@pytest.mark.parametrize("calls", [2, 32])
async def test_one_bad_event_fails_only_its_own_caller_and_the_rest_keep_their_order(database: str, calls: int) -> None:
    async with appending(database) as appender:
        results = await asyncio.gather(
            *(append(appender, [row(str(call), time=BAD if call == 1 else None)]) for call in range(calls)),
            return_exceptions=True,
        )

    assert [type(result).__name__ for result in results] == ["NoneType", "EventError"] + ["NoneType"] * (calls - 2)
    assert await stored(database) == [str(call) for call in range(calls) if call != 1]


async def test_a_value_that_cannot_even_be_sent_fails_only_its_own_caller(database: str) -> None:
    async with appending(database) as appender:
        for calls in (2, 32):
            results = await asyncio.gather(
                *(append(appender, [row("\0" if call == 1 else "ok")]) for call in range(calls)), return_exceptions=True
            )
            assert [isinstance(result, EventError) for result in results].count(True) == 1
            results = await asyncio.gather(
                *(append(appender, [row("\ud800" if call == 1 else "ok")]) for call in range(calls)),
                return_exceptions=True,
            )
            assert [isinstance(result, EventError) for result in results].count(True) == 1, results
    assert set(await stored(database)) == {"ok"}


async def test_a_caller_that_is_cancelled_before_its_call_is_sent_takes_it_back(database: str) -> None:
    async with appending(database) as appender:
        async with log_locked(database):
            first = asyncio.create_task(append(appender, [row("first")]))
            await is_sent(appender)
            second, third = (asyncio.create_task(append(appender, [row(id_)])) for id_ in ("second", "third"))
            await asyncio.sleep(0)
            second.cancel()
            await asyncio.wait({second})
        await first
        await third

    assert await stored(database) == ["first", "third"]


async def test_a_caller_that_is_cancelled_later_only_stops_waiting(database: str) -> None:
    async with appending(database) as appender:
        async with log_locked(database):
            calls = [asyncio.create_task(append(appender, [row(id_)])) for id_ in ("first", "second")]
            await is_sent(appender)
            calls[0].cancel()
            await asyncio.wait({calls[0]})
        await calls[1]

    assert await stored(database) == ["first", "second"]


async def test_nothing_is_sent_when_all_callers_gave_up_before_there_was_a_connection(database: str) -> None:
    async with Proxy(database) as proxy, appending(proxy.dsn) as appender:
        with Recorder() as recorder:
            proxy.stall()
            call = asyncio.create_task(append(appender, [row("never")]))
            await asyncio.sleep(0.01)
            call.cancel()
            await asyncio.wait({call})
            proxy.restore()
            await append(appender, [row("after")])
            assert recorder.all("append is uncertain") == []

    assert await stored(database) == ["after"]


async def test_a_call_that_was_not_sent_in_time_is_not_stored_and_says_so(database: str) -> None:
    async with Proxy(database) as proxy, appending(proxy.dsn, timeout=0.3) as appender:
        proxy.cut()
        began = time.monotonic()
        with pytest.raises(ProduceTimeoutError):
            await append(appender, [row("late")])
        assert time.monotonic() - began < 10
        proxy.restore()

        async def is_taken() -> bool:
            # The next try to connect may come after the call's deadline, and so may a commit on a busy machine.
            with suppress(ProduceTimeoutError, ProduceUncertainError):
                await append(appender, [row("after")])
                return True
            return False

        await eventually("events are taken again", is_taken)

    assert set(await stored(database)) == {"after"}


async def test_a_call_that_was_sent_and_not_confirmed_in_time_is_uncertain(database: str) -> None:
    async with appending(database) as appender:
        await append(appender, [row("before")])
        async with log_locked(database):
            call = asyncio.create_task(append(appender, [row("slow")]))
            await is_sent(appender)
            pass_deadlines(appender)
            with pytest.raises(ProduceUncertainError):
                await call

        async def is_stored() -> bool:
            return await stored(database) == ["before", "slow"]

        await eventually("it was stored in the end", is_stored)


async def test_calls_wait_for_a_server_that_is_away_and_are_stored_once_it_is_back(database: str) -> None:
    async with Proxy(database) as proxy, appending(proxy.dsn) as appender:
        proxy.cut()
        with Recorder() as recorder:
            calls = [asyncio.create_task(append(appender, [row(str(call))])) for call in range(3)]
            await recorder.wait("append cannot connect")
            proxy.restore()
            await asyncio.gather(*calls)

    assert await stored(database) == ["0", "1", "2"]


async def test_a_call_that_was_not_sent_in_time_names_the_reason(database: str) -> None:
    async with Proxy(database) as proxy, appending(proxy.dsn) as appender:
        proxy.cut()
        with Recorder() as recorder:
            call = asyncio.create_task(append(appender, [row("a")]))
            await recorder.wait("append cannot connect")
        appender._unanswered[0].deadline = 0.0
        appender._expire_calls()
        with pytest.raises(
            ProduceTimeoutError, match=r"is not stored\. PostgreSQL at .* (cannot be reached|not available)"
        ):
            await call


@pytest.mark.parametrize("count", [1, 3])
async def test_a_connection_lost_before_the_answer_makes_each_call_of_the_batch_uncertain(
    database: str, count: int
) -> None:
    async with Proxy(database) as proxy, appending(proxy.dsn) as appender:
        await append(appender, [row("before")])
        proxy.lose_reply_to(b"unique-marker")
        results = await asyncio.gather(
            *(append(appender, [row(f"unique-marker-{number}")]) for number in range(count)), return_exceptions=True
        )
        assert {type(result) for result in results} == {ProduceUncertainError}
        assert len({id(result) for result in results}) == count, "each caller has an exception of its own"
        await append(appender, [row("after")])

    # The server may commit the uncertain batch, before or after the last event, or not.
    ids = await stored(database)
    assert {"before", "after"} <= set(ids)
    assert len(ids) == len(set(ids)), "nothing was sent twice"


@pytest.mark.parametrize("how", ["cut off", "terminated"])
async def test_a_connection_that_ends_in_the_middle_of_a_large_batch_fails_that_batch_only(
    database: str, how: str
) -> None:
    async with Proxy(database) as proxy, appending(proxy.dsn) as appender:
        await append(appender, [row("before")])
        connection = appender._writer._connection
        assert connection is not None
        transport: asyncio.WriteTransport = connection._transport  # type: ignore[attr-defined]
        async with log_locked(database):
            large = asyncio.create_task(append(appender, [row(f"large {n}", data=bytes(1 << 20)) for n in range(20)]))
            await eventually("it waits for room to write", lambda: transport.get_write_buffer_size() > 1 << 16)
            if how == "cut off":
                proxy.reset()
            else:
                connection.terminate()
            with pytest.raises(ProduceUncertainError):
                await large
        await append(appender, [row("after")])

    assert await stored(database) == ["before", "after"]


async def test_calls_wait_for_a_certificate_that_is_missing_for_a_moment(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: object) -> None:
        raise ConfigError("sslcert in the DSN is '/gone': there is no such file, or it may not be read.")

    async with appending(database) as appender:
        await append(appender, [row("before")])
        connection = appender._writer._connection
        assert connection is not None
        with monkeypatch.context() as patched, Recorder() as recorder:
            patched.setattr(Dialer, "dial", refuse)
            connection.terminate()
            call = asyncio.create_task(append(appender, [row("meanwhile")]))
            failed = await recorder.wait("append cannot connect")
            assert "sslcert" in str(failed)
        await call

    assert await stored(database) == ["before", "meanwhile"]


@pytest.mark.parametrize("while_sending", [True, False])
async def test_a_backend_that_is_terminated_costs_at_most_the_batch_it_had(database: str, while_sending: bool) -> None:
    async with appending(database) as appender:
        await append(appender, [row("before")])
        if while_sending:
            async with log_locked(database):
                call = asyncio.create_task(append(appender, [row("lost")]))
                await is_sent(appender)
                connection = await asyncpg.connect(database)

                async def is_terminated() -> object:
                    return await connection.fetch(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                        "WHERE datname = current_database() AND wait_event_type = 'Lock'"
                    )

                await eventually("it waits for the lock, and is terminated", is_terminated)
                await connection.close()
                with pytest.raises(ProduceUncertainError):
                    await call
        else:
            await terminate_appender(database)
            # The appender may find out before it sends or while it does. Afterwards it has a new connection.
            with suppress(ProduceUncertainError):
                await append(appender, [row("lost")])
        await append(appender, [row("after")])

    assert [id_ for id_ in await stored(database) if id_ != "lost"] == ["before", "after"]


async def test_a_refusal_that_is_no_events_fault_fails_every_call_and_stores_nothing(database: str) -> None:
    connection = await asyncpg.connect(database)
    await connection.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
        "$$BEGIN RAISE EXCEPTION 'disk full' USING ERRCODE = '53100'; END$$;"
        "CREATE TRIGGER refuse BEFORE INSERT ON pgbackend.events FOR EACH ROW EXECUTE FUNCTION refuse()"
    )
    async with appending(database) as appender:
        results = await asyncio.gather(*(append(appender, [row(str(n))]) for n in range(3)), return_exceptions=True)
        await connection.execute("DROP TRIGGER refuse ON pgbackend.events")
        await append(appender, [row("after")])
    await connection.close()

    assert all(isinstance(result, DatabaseError) and result.sqlstate == "53100" for result in results)
    assert await stored(database) == ["after"]


async def test_drain_answers_every_call_that_was_made_and_takes_no_more(database: str) -> None:
    async with appending(database) as appender:
        calls = [asyncio.create_task(append(appender, [row(str(call))])) for call in range(50)]
        await asyncio.sleep(0)
        await appender.drain()
        assert all(call.done() for call in calls) or await asyncio.gather(*calls)
        with pytest.raises(NotRunningError):
            await append(appender, [row("late")])
        await asyncio.gather(*calls)

    assert len(await stored(database)) == 50


async def test_drain_gives_up_on_a_server_that_is_away(database: str) -> None:
    async with Proxy(database) as proxy, appending(proxy.dsn) as appender:
        proxy.cut()
        call = asyncio.create_task(append(appender, [row("a")]))
        await asyncio.sleep(0)
        await appender.drain()
        with pytest.raises(ConnectionLostError):
            await call


async def test_drain_does_not_wait_longer_than_callers_do(database: str) -> None:
    async with appending(database, timeout=0.3) as appender, log_locked(database):
        call = asyncio.create_task(append(appender, [row("a")]))
        await asyncio.sleep(0)
        began = time.monotonic()
        await appender.drain()
        assert time.monotonic() - began < 20
        with pytest.raises(PgBackendError):
            await call


async def test_a_log_without_a_segment_for_the_next_position_gets_one_and_no_call_fails(database: str) -> None:
    connection = await asyncpg.connect(database)
    name = await connection.fetchval(
        "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'pgbackend.events'::regclass "
        "ORDER BY length(inhrelid::regclass::text), 1 LIMIT 1"
    )
    bounds = await connection.fetchval(
        f"SELECT pg_get_expr(relpartbound, oid) FROM pg_class WHERE oid = '{name}'::regclass"
    )
    await connection.execute(f"ALTER TABLE pgbackend.events DETACH PARTITION {name}")

    async def attach() -> None:
        await connection.execute(f"ALTER TABLE pgbackend.events ATTACH PARTITION {name} {bounds}")

    async with appending(database) as appender:
        appender._on_full = attach
        await append(appender, [row("a")])
    await connection.close()

    assert await stored(database) == ["a"]


async def test_a_callback_gets_the_commit_and_each_refusal(database: str) -> None:
    answers: dict[str, Exception | None] = {}
    async with appending(database) as appender:
        for id_, time in (("good", None), ("bad", BAD), ("fine", None)):
            appender.append_soon(row(id_, time=time), 1, partial(answers.__setitem__, id_))
        assert answers == {}
        await append(appender, [row("last")])
        assert list(answers) == ["good", "bad", "fine"]
        assert (answers["good"], answers["fine"]) == (None, None)
        assert isinstance(answers["bad"], EventError)
    assert await stored(database) == ["good", "fine", "last"]


async def test_a_callback_gets_the_timeout(database: str) -> None:
    async with appending(database) as appender, log_locked(database):
        answers: list[Exception | None] = []
        appender.append_soon(row("sent"), 1, answers.append)
        await is_sent(appender)
        appender.append_soon(row("waiting"), 1, answers.append)
        pass_deadlines(appender)
        assert [type(error) for error in answers] == [ProduceUncertainError, ProduceTimeoutError]


async def test_a_callback_that_raises_harms_no_other_call(database: str, caplog: pytest.LogCaptureFixture) -> None:
    def buggy(_: Exception | None) -> None:
        raise RuntimeError("a bug")

    async with appending(database) as appender:
        for id_, time in (("good", None), ("bad", BAD)):
            appender.append_soon(row(id_, time=time), 1, buggy)
            await append(appender, [row("next")])
    assert await stored(database) == ["good", "next", "next"]
    assert [record.exc_info is not None for record in caplog.records] == [True, True]


async def test_a_call_cancelled_while_its_commit_comes_back_is_only_cancelled(database: str) -> None:
    """A cancelled future is cancelled at once, its coroutine a turn later. The appender may answer in between."""
    async with appending(database) as appender:
        calls = [asyncio.create_task(append(appender, [row(str(number))])) for number in range(200)]

        def cancel_all(_: Exception | None) -> None:
            for call in calls[:-1]:
                call.cancel()

        appender.append_soon(row("before"), 1, cancel_all)
        calls += [asyncio.create_task(append(appender, [row("after")]))]
        await asyncio.wait(calls)
        assert all(call.cancelled() for call in calls[:-1])
        assert calls[-1].exception() is None


async def test_a_call_that_timed_out_is_not_sent_again_when_its_batch_is_refused(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: dict[str, Exception | None] = {}
    sent: list[int] = []
    async with appending(database) as appender:
        insert = appender._writer.insert

        async def counting(rows: Sequence[Row]) -> None:
            sent.append(len(rows))
            await insert(rows)

        monkeypatch.setattr(appender._writer, "insert", counting)
        monkeypatch.setattr(appender._notifier, "may_join", lambda: False)
        async with log_locked(database):
            for id_, time in (("expired", None), ("bad", BAD), ("good", None)):
                appender.append_soon(row(id_, time=time), 1, partial(answers.__setitem__, id_))
            first = appender._unsent[0]
            await is_sent(appender)
            appender._expire(first)
        await append(appender, [row("last")])
        assert sent == [3, 1, 1, 1]
        assert [type(answers[id_]) for id_ in ("expired", "bad", "good")] == [
            ProduceUncertainError, EventError, type(None),
        ]  # fmt: skip
    assert await stored(database) == ["good", "last"]


async def test_after_a_bug_in_the_appender_every_call_fails_and_so_do_later_ones(
    database: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    going_on = asyncio.Event()

    async def buggy(batch: list[_Call]) -> None:
        for call in batch:
            call.sent = True
        await going_on.wait()
        raise RuntimeError("a bug")

    async with appending(database) as appender:
        await append(appender, [row("before")])
        monkeypatch.setattr(appender, "_send", buggy)
        first = asyncio.create_task(append(appender, [row("sent")]))
        await is_sent(appender)
        second = asyncio.create_task(append(appender, [row("waiting")]))
        await asyncio.sleep(0)
        going_on.set()
        async with asyncio.timeout(10):
            with pytest.raises(ProduceUncertainError, match="RuntimeError: a bug"):
                await first
            with pytest.raises(PgBackendError, match="Restart it"):
                await second
        with pytest.raises(PgBackendError, match="died of a bug"):
            await append(appender, [row("later")])
    (record,) = (record for record in caplog.records if record.levelname == "ERROR")
    assert record.exc_info is not None
    assert await stored(database) == ["before"]


async def test_the_log_needs_to_check_no_event_that_the_codec_has_checked(database: str) -> None:
    """So the check is skipped in sessions that append."""
    rows: list[Row] = []

    @given(attributes, json_value, st.none() | content_type)
    def collect(values: dict[str, Any], data: Any, kind: str | None) -> None:
        members = values | ({"datacontenttype": kind} if kind else {})
        rows.append(parse_structured(structured(**members, data=data)).row)
        rows.append(parse_structured(structured(**members, data_base64="AA==")).row)
        members.pop("time", None)
        rows.append(put(sdk(data, **members)).row)

    collect()
    checked = ", ".join(f"${n}" for n in range(1, len(COLUMNS) + 1))
    async with connected(database) as connection:
        await connection.executemany(f"SELECT pgbackend.check_event(now(), {checked})", rows)
        with pytest.raises(asyncpg.CheckViolationError):
            await connection.execute("INSERT INTO pgbackend.events (id, source, type) VALUES ('', '/s', 't')")
    assert len(rows) > 25


async def test_a_connection_that_is_lost_as_soon_as_it_is_open_is_opened_again(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = Database.connect
    lost: list[bool] = []

    async def connect_and_lose(self: Database, **options: Any) -> Any:
        connection = await connect(self, **options)
        if not lost:
            lost.append(True)
            connection.terminate()
        return connection

    monkeypatch.setattr(Database, "connect", connect_and_lose)
    async with appending(database) as appender:
        await append(appender, [row("a")])

    assert await stored(database) == ["a"]
    assert lost
