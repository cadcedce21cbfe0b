"""The verbs of `Backend` as its users see them. The modules behind the verbs have tests of their own."""

import ast
import asyncio
import copy
import json
import logging
import pickle
import re
from datetime import UTC, datetime
from pathlib import Path

import asyncpg
import pytest

from pgbackend import (
    Backend,
    DatabaseError,
    Event,
    EventError,
    Retry,
    SubscriptionExistsError,
    SubscriptionNotFoundError,
)
from pgbackend import backend as face
from pgbackend.codec.attributes import ATTRIBUTES_BYTES, COLUMNS, attributes_size
from pgbackend.codec.wire import parse_structured
from tests.support.codec import structured
from tests.support.databases import connected, execute, query_rows, query_value
from tests.support.dispatchers import Catch
from tests.support.events import make_event
from tests.support.polling import eventually


def test_the_table_of_steps_names_functions_and_statements_that_exist() -> None:
    root = Path(face.__file__).parent
    table = [line for line in (face.__doc__ or "").splitlines() if line.startswith("|")]
    methods = {
        f"{kind.name}.{function.name}"
        for file in root.rglob("*.py")
        for kind in ast.walk(ast.parse(file.read_text()))
        if isinstance(kind, ast.ClassDef)
        for function in kind.body
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    statements = {
        name for file in root.rglob("*.sql") for name in re.findall(r"^-- name: (\w+)", file.read_text(), re.MULTILINE)
    }

    assert len(table) == 11
    assert set(re.findall(r"`(\w+\.\w+)`", "".join(table))) <= methods
    assert {name for line in table for name in re.findall(r"`(\w+)`", line.split("|")[3])} <= statements


async def test_info_is_known_before_init_and_shows_no_password() -> None:
    info = Backend("postgresql://me:secret@db.example:5433/app", schema="other").info()

    assert (info.name, info.schema, info.server) == ("PostgreSQL", "other", "db.example:5433/app")


@pytest.mark.owner
async def test_logs_in_two_schemas_are_independent(database: str) -> None:
    here, there = Catch(), Catch()
    async with Backend(database) as one, Backend(database, schema='Öther "log"') as other:
        await one.subscribe("s", here)
        await other.subscribe("s", there)
        await one.produce(make_event("one"))
        await other.produce(make_event("other"))
        await here.has("one")
        await there.has("other")

    assert (here.ids, there.ids) == (["one"], ["other"])


async def test_an_invalid_or_large_event_is_refused_with_its_whole_call(database: str) -> None:
    backend = Backend(database, max_event_bytes=1000)
    await backend.init()
    for bad in (make_event("large", b"x" * 1001), make_event("n\0l"), make_event("lone \ud800"), object()):
        with pytest.raises(EventError):
            await backend.produce(bad)  # type: ignore[arg-type] # the point
        with pytest.raises(EventError):
            await backend.produce_many([make_event("good"), bad])  # type: ignore[list-item] # the point
    await backend.produce(make_event("fits", b"x" * 100))
    await backend.stop()

    assert await query_value(database, "SELECT array_agg(id) FROM pgbackend.events") == ["fits"]


async def test_events_in_the_json_format_are_produced_as_they_are(database: str) -> None:
    catch = Catch()
    one, two = (
        b'{"specversion":"1.0","id":"%b","source":"/shop","type":"order.created","data": {"price": 1.10}}' % id_
        for id_ in (b"a", b"b")
    )
    got: list[Event] = []

    async def dispatch(event: Event) -> None:
        got.append(event)
        await catch(event)

    async with Backend(database, max_event_bytes=1000) as backend:
        await backend.subscribe("s", dispatch)
        await backend.produce(one)
        await backend.produce_many([two, make_event("c")])
        for bad in (b"{}", one[:-1], b"[" + one + b"]", one.replace(b"1.10", b'"' + b"x" * 1000 + b'"')):
            with pytest.raises(EventError):
                await backend.produce(bad)
        await catch.has("a", "b", "c")

    assert [event.id for event in got] == ["a", "b", "c"]
    assert got[0].data_bytes == b'{"price": 1.10}'
    assert got[0].get_data() == {"price": 1.1}


async def test_a_list_of_serialised_events_is_stored_whole_or_not_at_all(backend: Backend, database: str) -> None:
    def serialised(name: str) -> bytes:
        return json.dumps({"specversion": "1.0", "id": name, "source": "/s", "type": "t", "data": "é" * 500}).encode()

    good = [serialised(str(number)) for number in range(300)]
    for bad, fault in (
        (b'{"specversion":"1.0","id":"bad"}', "'bad'.*'source' is missing"),
        (b"[", "not a JSON object"),
    ):
        for place in (0, 150, 299):
            with pytest.raises(EventError, match=fault):
                await backend.produce_many([*good[:place], bad, *good[place:]])
        with pytest.raises(EventError, match=fault):
            await backend.produce_many([bad])
    assert await query_value(database, "SELECT count(*) FROM pgbackend.events") == 0

    # One connection appends them all, and a call that is refused takes no other call with it.
    first = asyncio.create_task(backend.produce_many(good[:1]))
    others = [asyncio.create_task(backend.produce_many(some)) for some in (good[1:100], [*good, b"["], good[100:])]
    await first
    assert [str(error) for error in await asyncio.gather(*others, return_exceptions=True) if error] != []
    stored = await query_rows(database, "SELECT id FROM pgbackend.events ORDER BY position")
    assert [name for (name,) in stored] == [str(number) for number in range(300)]


async def test_attributes_over_64_kib_are_refused_on_every_way_into_the_log(backend: Backend, database: str) -> None:
    def event(name: str, size: int) -> Event:
        text = "u:" + "é" * 15_000
        return parse_structured(structured(**{name: text + "x" * size, "other": "y"}, data="z" * 100_000))

    insert = f"INSERT INTO pgbackend.events ({', '.join(COLUMNS)}) VALUES ({', '.join(f'${n}' for n in range(1, 13))})"
    names = ("id", "source", "subject", "dataschema", "partitionkey", "n", "n" * 30_000)
    async with connected(database) as connection:
        for name in names:
            room = ATTRIBUTES_BYTES - attributes_size(event(name, 0).row)
            fits, large = event(name, room), event(name, room + 1)
            await backend.produce(fits)
            await connection.execute(insert, *fits.row)
            with pytest.raises(EventError, match="65,537 bytes of attributes"):
                await backend.produce(large)
            with pytest.raises(EventError, match="65,537 bytes of attributes"):
                await backend.produce_many([fits, large])
            with pytest.raises(asyncpg.CheckViolationError, match="more than 65536 bytes"):
                await connection.execute(insert, *large.row)

    assert await query_value(database, "SELECT count(*) FROM pgbackend.events") == 2 * len(names)


@pytest.mark.parametrize("events", [1, 3, 50])
async def test_a_batch_refused_for_a_missing_segment_can_be_produced_again(
    backend: Backend, database: str, events: int
) -> None:
    """By each way to insert: a single row, unnest, COPY."""
    batch = [make_event(str(number)) for number in range(events)]
    operator = await asyncpg.connect(database)
    segments_until = (await backend.status()).segments_until
    await operator.execute("SELECT setval('pgbackend.events_position_seq', $1::bigint)", segments_until)
    async with operator.transaction():
        await operator.execute("LOCK TABLE pgbackend.events IN SHARE UPDATE EXCLUSIVE MODE")
        with pytest.raises(DatabaseError, match="no segment") as caught:
            await backend.produce_many(batch)
    await backend.produce_many(batch)
    stored = await operator.fetchval("SELECT count(*) FROM pgbackend.events")
    await operator.close()

    assert caught.value.sqlstate is None, "class 23 would say that the event is at fault"
    assert stored == events


async def test_a_duplicate_position_does_not_blame_the_event(backend: Backend, database: str) -> None:
    await backend.produce(make_event("there"))
    await execute(database, "SELECT setval('pgbackend.events_position_seq', 1, false)")

    with pytest.raises(DatabaseError, match="set back"):
        await backend.produce(make_event("new"))


async def test_a_dispatcher_can_pickle_and_copy_its_event(database: str) -> None:
    handed: asyncio.Queue[Event] = asyncio.Queue()
    async with Backend(database) as backend:
        await backend.subscribe("s", handed.put)
        await backend.produce(make_event("a", "text", key="k"))
        async with asyncio.timeout(30):
            event = await handed.get()

    assert event.recorded_at is not None
    assert abs((datetime.now(UTC) - event.recorded_at).total_seconds()) < 60
    for again in (pickle.loads(pickle.dumps(event)), copy.copy(event), copy.deepcopy(event)):  # noqa: S301 - our own
        assert again == event
        assert (again.recorded_at, again.attempt) == (event.recorded_at, 1)
        assert again.attributes_text == event.attributes_text
        assert again.get_data() == "text"


async def test_a_dispatcher_can_produce_and_subscribe(database: str) -> None:
    second = Catch()
    async with Backend(database) as backend:

        async def first(event: Event) -> None:
            if event.id == "a":
                await backend.subscribe("second", second)
                await backend.produce(make_event("b"))

        await backend.subscribe("first", first)
        await backend.produce(make_event("a"))
        await second.has("b")


async def test_the_same_name_twice_in_one_backend_is_an_error(backend: Backend) -> None:
    await backend.subscribe("s", print)

    with pytest.raises(SubscriptionExistsError, match="'s'"):
        await backend.subscribe("s", print)
    results = await asyncio.gather(backend.subscribe("t", print), backend.subscribe("t", print), return_exceptions=True)
    assert sorted(type(result).__name__ for result in results) == ["NoneType", "SubscriptionExistsError"]


async def test_unknown_names_are_errors(backend: Backend) -> None:
    for call in (backend.unsubscribe("x"), backend.delete_subscription("x"), backend.seek("x", "earliest")):
        with pytest.raises(SubscriptionNotFoundError, match="x"):
            await call


async def test_a_name_can_be_any_text(database: str) -> None:
    catch = Catch()
    name = 'order\'s "new" {0} %s \\ 🦆 ' + "x" * 200
    async with Backend(database) as backend:
        await backend.subscribe(name, catch)
        await backend.produce(make_event("a"))
        await catch.has("a")
        assert [s.name for s in (await backend.status()).subscriptions] == [name]
        await backend.delete_subscription(name)


async def test_a_cancelled_unsubscribe_ends_in_the_background(database: str) -> None:
    release = asyncio.Event()
    begun = asyncio.Event()

    async def hold(event: Event) -> None:
        begun.set()
        await release.wait()

    async with Backend(database) as backend:
        await backend.subscribe("s", hold)
        await backend.produce(make_event("a"))
        await begun.wait()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await backend.unsubscribe("s")
        release.set()
        catch = Catch()
        await backend.subscribe("s", catch)
        await backend.produce(make_event("b"))
        await catch.has("b")

    assert catch.ids == ["b"]


async def test_a_logging_filter_that_raises_stops_nothing(
    database: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "pgbackend")
    catch = Catch(fails=lambda event: event.attempt == 1)

    def refuse(record: logging.LogRecord) -> bool:
        raise LookupError("no tenant")

    logging.getLogger("pgbackend").addFilter(refuse)
    try:
        async with Backend(database) as backend:
            await backend.subscribe("s", catch, retry=Retry(delay=0.01))
            await backend.produce(make_event("a"))
            await catch.has("a")
    finally:
        logging.getLogger("pgbackend").removeFilter(refuse)
    assert "no tenant" in capsys.readouterr().err


async def test_status_shows_each_subscription(database: str) -> None:
    gate = asyncio.Event()

    async def wait(event: Event) -> None:
        await gate.wait()

    async with Backend(database, commit_interval=0.01) as backend, Backend(database) as other:
        await backend.subscribe("busy", wait, order="key")
        await backend.produce_many([make_event(str(number)) for number in range(5)])
        await other.subscribe("nobody's", print)

        async def is_running() -> bool:
            return any(s.state == "running" for s in (await backend.status()).subscriptions)

        await eventually("it runs", is_running)
        here, there = await backend.status(), await other.status()
        gate.set()

    assert here.head == there.head == 5
    assert here.segments_until > 5
    busy, idle = here.subscriptions
    assert (busy.name, busy.order, busy.lag, busy.state, busy.complete) == ("busy", "key", 5, "running", False)
    assert there.subscriptions[0].state == "elsewhere"
    assert idle.name == "nobody's"
    assert here.appenders == ()


async def test_status_names_open_appenders(backend: Backend, database: str) -> None:
    async with connected(database, application_name="nightly load") as connection:
        await connection.execute("BEGIN")
        await connection.execute("INSERT INTO pgbackend.events (id, source, type) VALUES ('a', 'b', 'c')")
        (appender,) = (await backend.status()).appenders
        pid = connection.get_server_pid()

    assert (appender.pid, appender.application, appender.gid) == (pid, "nightly load", None)
    assert appender.age is not None
    assert appender.age >= 0


async def lag_seconds(backend: Backend) -> float | None:
    return (await backend.status()).subscriptions[0].lag_seconds


async def test_lag_seconds_is_the_age_of_the_oldest_unsettled_event(backend: Backend, database: str) -> None:
    async def recorded_before(seconds: float) -> None:
        # Straight to the database, because the log itself records the time.
        await execute(
            database,
            f"""
            UPDATE pgbackend.events SET recorded_at = recorded_at - make_interval(secs => {seconds})
            WHERE position = (SELECT max(position) FROM pgbackend.events)""",
        )

    await backend.subscribe("s", print)
    assert await lag_seconds(backend) == 0.0
    await backend.produce(make_event("1"))
    await recorded_before(300)
    await backend.produce(make_event("2"))
    assert 300 <= (await lag_seconds(backend) or 0) < 330
    await execute(database, "UPDATE pgbackend.offsets SET position = 1")
    assert 0 < (await lag_seconds(backend) or 0) < 30
    await execute(database, "UPDATE pgbackend.offsets SET position = 2")
    assert await lag_seconds(backend) == 0.0
    # An invisible position counts as no lag yet; a pending event does.
    await execute(database, "UPDATE pgbackend.offsets SET position = 10, pending = '{[5,8)}'")
    assert await lag_seconds(backend) == 0.0
    await execute(database, "UPDATE pgbackend.offsets SET pending = '{[1,2),[5,8)}'")
    assert 300 <= (await lag_seconds(backend) or 0) < 330
    await execute(database, "UPDATE pgbackend.offsets SET pending = '{}'")
    await execute(
        database,
        "INSERT INTO pgbackend.redeliveries (subscription, position, key_hash, attempt, due_at, last_error)"
        " VALUES ('s', 1, 0, 1, now(), 'no')",
    )
    assert 300 <= (await lag_seconds(backend) or 0) < 330
    await execute(database, "UPDATE pgbackend.offsets SET completed_at = now()")
    assert await lag_seconds(backend) is None
    assert (await backend.status()).subscriptions[0].lag == 0
