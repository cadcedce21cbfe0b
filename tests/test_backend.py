import asyncio
import copy
import logging
import pickle
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest

from pgbackend import (
    Backend,
    ConfigError,
    ConnectionLostError,
    DatabaseError,
    Event,
    EventError,
    NotRunningError,
    PgBackendError,
    ProbeError,
    ProduceTimeoutError,
    ProduceUncertainError,
    Retry,
    SchemaError,
    SubscriptionExistsError,
    SubscriptionNotFoundError,
)
from pgbackend.codec.attributes import ATTRIBUTES_BYTES, COLUMNS, attributes_size
from pgbackend.codec.wire import parse_structured
from pgbackend.errors import shown
from pgbackend.facts import Recorder
from pgbackend.log.log import Log
from pgbackend.log.requirements import Requirements
from pgbackend.log.segments import Segments
from pgbackend.log_check import LogCheck
from pgbackend.postgres import schema
from pgbackend.postgres.pool import Database
from pgbackend.subscriptions.definitions import Subscriptions
from pgbackend.torture.proxy import Proxy
from tests.support.codec import structured
from tests.support.databases import execute, query_value
from tests.support.dispatchers import Catch
from tests.support.events import make_event
from tests.support.polling import eventually

NOWHERE = "postgresql://nobody@127.0.0.1:1/nothing"


# Before init(), and after stop().


async def test_every_verb_needs_init_first_and_says_so(database: str) -> None:
    backend = Backend(database)
    calls = (
        backend.produce(make_event("a")),
        backend.produce_many([make_event("a")]),
        backend.produce_many([]),
        backend.subscribe("s", print),
        backend.unsubscribe("s"),
        backend.delete_subscription("s"),
        backend.seek("s", "latest"),
        backend.start(),
        backend.status(),
        backend.probe(),
        backend.reconfigure("s", print),
        backend.alter_subscription("s", order="none", end=None, start="latest"),
        backend.redeliver(1),
    )
    for call in calls:
        with pytest.raises(NotRunningError, match="init"):
            await call
    with pytest.raises(NotRunningError):
        backend.dead_letters()


async def test_a_stopped_backend_says_that_it_was_stopped(backend: Backend) -> None:
    await backend.stop()

    with pytest.raises(NotRunningError, match="stopped"):
        await backend.produce(make_event("a"))
    with pytest.raises(NotRunningError, match="stopped"):
        await backend.init()
    with pytest.raises(NotRunningError, match="stopped"):
        await backend.start()


async def test_info_is_known_before_init_and_shows_no_password() -> None:
    info = Backend("postgresql://me:secret@db.example:5433/app", schema="other").info()

    assert (info.name, info.schema, info.server) == ("PostgreSQL", "other", "db.example:5433/app")


async def test_init_again_does_nothing(backend: Backend) -> None:
    await backend.init()
    await asyncio.gather(backend.init(), backend.init())
    await backend.produce(make_event("a"))


async def test_init_at_the_same_time_makes_one_backend(database: str) -> None:
    backend = Backend(database)
    await asyncio.gather(*(backend.init() for _ in range(5)))
    await backend.produce(make_event("a"))
    await backend.stop()

    async def all_gone() -> bool:
        count = await query_value(
            database, "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'pgbackend%' "
            "AND datname = current_database()"
        )  # fmt: skip
        return bool(count == 0)

    await eventually("every connection is closed", all_gone)


async def test_many_processes_may_init_an_empty_database_at_once(empty_database: str) -> None:
    backends = [Backend(empty_database) for _ in range(4)]
    await asyncio.gather(*(backend.init() for backend in backends))
    await backends[0].produce(make_event("a"))
    await asyncio.gather(*(backend.stop() for backend in backends))


async def test_stop_is_safe_before_init_and_twice_and_at_once(database: str) -> None:
    await Backend(database).stop()
    backend = Backend(database)
    await backend.init()
    await asyncio.gather(backend.stop(), backend.stop())
    await backend.stop()


async def test_stop_while_init_is_under_way_leaves_nothing_open(database: str) -> None:
    backend = Backend(database)
    starting = asyncio.create_task(backend.init())
    await asyncio.sleep(0)
    await backend.stop()
    with pytest.raises(NotRunningError, match="while it was being initialized"):
        await starting
    with pytest.raises(NotRunningError, match="stopped"):
        backend.dead_letters()


# init() on a database that is not as it should be.


async def test_a_server_that_does_not_answer_is_an_error_that_says_where() -> None:
    backend = Backend(NOWHERE)

    with pytest.raises(ConnectionLostError, match=r"127\.0\.0\.1"):
        await backend.init()
    await backend.stop()


@pytest.mark.owner
@pytest.mark.direct
@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
async def test_a_database_that_is_not_utf8_is_refused(server: str, encoding: str) -> None:
    name = f"pgbackend_test_{uuid.uuid4().hex[:12]}"
    await execute(server, f"CREATE DATABASE {name} ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0")
    backend = Backend(urlsplit(server)._replace(path=f"/{name}").geturl())
    try:
        with pytest.raises(SchemaError, match=f"{encoding}.*UTF8"):
            await backend.init()
    finally:
        await backend.stop()
        await execute(server, f"DROP DATABASE {name} WITH (FORCE)")


async def test_a_failed_init_may_be_tried_again(database: str) -> None:
    async with Proxy(database) as proxy:
        proxy.cut()
        backend = Backend(proxy.dsn)
        with pytest.raises(ConnectionLostError):
            await backend.init()
        proxy.restore()
        await backend.init()
        await backend.produce(make_event("a"))
        await backend.stop()


async def test_without_migrating_a_missing_log_is_an_error_and_stays_missing(empty_database: str) -> None:
    backend = Backend(empty_database)

    with pytest.raises(SchemaError, match="pgbackend migrate"):
        await backend.init(migrate=False)
    await backend.init()
    await backend.stop()


@pytest.mark.parametrize("migrate", [True, False])
@pytest.mark.parametrize("revision", ["r9999", "0001", "0010"])
async def test_a_log_of_a_newer_or_an_unreleased_version_is_refused_and_left_alone(
    database: str, migrate: bool, revision: str
) -> None:
    await execute(database, "UPDATE pgbackend.pgbackend_revision SET version_num = $1", revision)

    with pytest.raises(SchemaError) as caught:
        await Backend(database).init(migrate=migrate)
    assert (caught.value.found, caught.value.expected) == (revision, schema.head())
    assert await query_value(database, "SELECT version_num FROM pgbackend.pgbackend_revision") == revision


async def test_a_sequence_behind_its_events_is_refused(backend: Backend, database: str) -> None:
    await backend.produce_many([make_event(str(number)) for number in range(5)])
    await execute(database, "SELECT setval('pgbackend.events_position_seq', 2)")

    with pytest.raises(ProbeError, match="twice") as caught:
        await backend.probe()
    assert caught.value.checks["connection"] == caught.value.checks["schema"] == "ok"
    with pytest.raises(SchemaError, match="twice"):
        await Backend(database).init()


async def test_a_sequence_behind_its_events_is_refused_also_in_another_life_of_the_server(
    backend: Backend, database: str
) -> None:
    """As when a backup was restored wrongly under a process that runs: it would skip what comes next."""
    await backend.produce_many([make_event(str(number)) for number in range(3)])
    running = asyncio.create_task(backend.start())
    with Recorder() as recorder:
        await recorder.wait("worker started")
        await execute(database, "SELECT setval('pgbackend.events_position_seq', 1)")
        await execute(database, "DELETE FROM pgbackend.incarnation")
        with pytest.raises(SchemaError, match="behind its events"):
            await running


@pytest.mark.owner
async def test_logs_in_other_schemas_of_one_database_know_nothing_of_each_other(database: str) -> None:
    here, there = Catch(), Catch()
    async with Backend(database) as one, Backend(database, schema='Öther "log"') as other:
        await one.subscribe("s", here)
        await other.subscribe("s", there)
        await one.produce(make_event("one"))
        await other.produce(make_event("other"))
        await here.has("one")
        await there.has("other")

    assert (here.ids, there.ids) == (["one"], ["other"])


# Settings.


@pytest.mark.parametrize(
    "setting",
    [
        {"hole_wait": -1}, {"poll_interval": 0}, {"commit_interval": float("nan")}, {"lease_timeout": float("inf")},
        {"produce_timeout": "30"}, {"drain_timeout": True}, {"pool_size": 0}, {"max_event_bytes": 1.5},
        {"window_events": -1}, {"window_bytes": True}, {"buffer_bytes": 0}, {"schema": ""}, {"schema": "a\0b"},
        {"dsn": "mysql://db"}, {"dsn": "not a dsn"}, {"listen_dsn": "nonsense"},
        {"lease_timeout": 1e12}, {"lease_timeout": 86_401}, {"poll_interval": 1e300}, {"commit_interval": 10**400},
        {"produce_timeout": 1e10}, {"drain_timeout": 1e10}, {"hole_wait": 1e10}, {"pool_size": 1001},
        {"max_event_bytes": (256 << 20) + 1}, {"window_events": 100_001}, {"window_bytes": 1 << 41},
        {"buffer_bytes": 10**5000},
    ],
    ids=lambda setting: next(iter(setting)),
)  # fmt: skip
def test_a_setting_that_cannot_be_is_refused_before_any_connection(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Backend(**{"dsn": NOWHERE, **setting})


def test_a_refused_setting_is_named_with_its_range() -> None:
    with pytest.raises(ConfigError, match=r"lease_timeout is 1000000000000\.0: .* from 0\.001 to 86400"):
        Backend(NOWHERE, lease_timeout=1e12)
    with pytest.raises(ConfigError, match=r"buffer_bytes is an integer of 16610 bits: .* from 1 to 1099511627776"):
        Backend(NOWHERE, buffer_bytes=10**5000)


@pytest.mark.parametrize(
    "option",
    [
        {"name": ""}, {"name": "a\0b"}, {"name": 7}, {"dispatcher": None}, {"order": "fifo"}, {"concurrency": 0},
        {"concurrency": 10_001}, {"concurrency": 10**5000},
        {"shards": 0}, {"shards": 2.0}, {"shards": 1025}, {"order": "strict", "shards": 2},
        {"start": "now"}, {"start": True},
        {"start": datetime(2026, 1, 1)},  # noqa: DTZ001 - the point
        {"end": datetime(2026, 1, 1)},  # noqa: DTZ001 - the point
        {"end": 0}, {"end": "latest"}, {"retry": 5}, {"dead_letter": "nobody"}, {"start": -1},
        {"name": "lone \ud800"}, {"name": "ä" * 513}, {"filter": "type = 'a'"}, {"filter": asyncio.sleep},
    ],
    # Without addresses: every test process must call it the same.
    ids=lambda option: ascii({name: getattr(value, "__name__", shown(value)) for name, value in option.items()}),
)  # fmt: skip
async def test_an_option_that_cannot_be_is_refused_and_nothing_is_stored(
    backend: Backend, option: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError):
        await backend.subscribe(**{"name": "s", "dispatcher": print, **option})
    assert (await backend.status()).subscriptions == ()


# What a dispatcher is handed.


async def test_an_event_can_be_pickled_and_copied_by_its_dispatcher(database: str) -> None:
    handed: asyncio.Queue[Event] = asyncio.Queue()
    async with Backend(database) as backend:
        await backend.subscribe("s", handed.put)
        await backend.produce(make_event("a", "text", key="k"))
        async with asyncio.timeout(30):
            event = await handed.get()

    for again in (pickle.loads(pickle.dumps(event)), copy.copy(event), copy.deepcopy(event)):  # noqa: S301 - our own
        assert again == event
        assert (again.recorded_at, again.attempt, again.key_hash) == (event.recorded_at, 1, event.key_hash)
        assert again.attributes_text == event.attributes_text
        assert again.get_data() == "text"


def generates(event: Event) -> Iterator[None]:
    yield


async def agenerates(event: Event) -> AsyncIterator[None]:
    yield


class Generates:
    def __call__(self, _event: Event) -> Iterator[None]:
        yield

    async def agenerates(self, _event: Event) -> AsyncIterator[None]:
        yield


@pytest.mark.parametrize(
    ("option", "function"),
    [
        ("dispatcher", generates), ("dispatcher", agenerates), ("dispatcher", partial(partial(generates))),
        ("dispatcher", Generates()), ("dispatcher", partial(Generates())), ("dispatcher", Generates().agenerates),
        ("dead_letter", generates), ("dead_letter", Generates().agenerates),
        ("filter", Catch()), ("filter", partial(partial(asyncio.sleep), 1)), ("filter", Catch().__call__),
        ("filter", generates), ("filter", agenerates),
    ],
    ids=[*"abcdefghijklm"],
)  # fmt: skip
async def test_a_function_whose_call_runs_nothing_is_refused(backend: Backend, option: str, function: Any) -> None:
    options = {"dispatcher": print, option: function}
    with pytest.raises(ConfigError, match=f"{option} of 's'"):
        await backend.subscribe("s", **options)
    assert (await backend.status()).subscriptions == ()

    await backend.subscribe("s", print)
    with pytest.raises(ConfigError, match=f"{option} of 's'"):
        await backend.reconfigure("s", **options)


# Names.


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


async def test_names_may_be_any_text(database: str) -> None:
    catch = Catch()
    name = 'order\'s "new" {0} %s \\ 🦆 ' + "x" * 200
    async with Backend(database) as backend:
        await backend.subscribe(name, catch)
        await backend.produce(make_event("a"))
        await catch.has("a")
        assert [s.name for s in (await backend.status()).subscriptions] == [name]
        await backend.delete_subscription(name)


# Running.


async def test_start_twice_is_an_error_and_the_first_goes_on(backend: Backend) -> None:
    catch = Catch()
    running = asyncio.create_task(backend.start())
    await asyncio.sleep(0)
    with pytest.raises(PgBackendError, match="already"):
        await backend.start()
    await backend.subscribe("s", catch)
    await backend.produce(make_event("a"))
    await catch.has("a")
    await backend.stop()
    await running


async def test_cancelling_start_drains_and_commits_and_it_may_be_started_again(backend: Backend) -> None:
    begun = asyncio.Event()
    handled: list[str] = []

    async def slow(event: Event) -> None:
        begun.set()
        await asyncio.sleep(0.1)
        handled.append(event.id)

    await backend.subscribe("s", slow)
    running = asyncio.create_task(backend.start())
    await backend.produce(make_event("a"))
    await begun.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert handled == ["a"]
    (status,) = (await backend.status()).subscriptions
    assert (status.lag, status.shards[0].owner) == (0, None)

    again = asyncio.create_task(backend.start())
    await backend.produce(make_event("b"))

    async def both() -> bool:
        return handled == ["a", "b"]

    await eventually("it runs again", both)
    await backend.stop()
    await again


async def test_a_second_cancellation_does_not_wait_for_dispatchers(backend: Backend) -> None:
    begun = asyncio.Event()

    async def endless(event: Event) -> None:
        begun.set()
        await asyncio.sleep(60)

    await backend.subscribe("s", endless)
    running = asyncio.create_task(backend.start())
    await backend.produce(make_event("a"))
    await begun.wait()
    running.cancel()
    await asyncio.wait({running}, timeout=0.1)
    assert not running.done()
    running.cancel()
    await asyncio.wait({running}, timeout=30)
    assert running.cancelled()


async def test_a_backend_may_be_stopped_from_within_a_dispatcher_task(database: str) -> None:
    stopping: list[asyncio.Task[None]] = []
    async with Backend(database) as backend:

        async def last(event: Event) -> None:
            stopping.append(asyncio.create_task(backend.stop()))

        await backend.subscribe("s", last)
        await backend.produce(make_event("a"))

        async def is_stopped() -> bool:
            return bool(stopping) and stopping[0].done()

        await eventually("it stopped", is_stopped)


async def test_a_dispatcher_may_produce_and_subscribe_and_unsubscribe(database: str) -> None:
    second = Catch()
    async with Backend(database) as backend:

        async def first(event: Event) -> None:
            if event.id == "a":
                await backend.subscribe("second", second)
                await backend.produce(make_event("b"))

        await backend.subscribe("first", first)
        await backend.produce(make_event("a"))
        await second.has("b")


async def test_the_context_manager_raises_what_its_body_raised(database: str) -> None:
    with pytest.raises(KeyError, match="mine"):  # noqa: PT012 - the body is what raises
        async with Backend(database) as backend:
            await backend.subscribe("s", print)
            raise KeyError("mine")


async def test_a_worker_that_dies_cancels_the_body_of_the_context_manager(database: str) -> None:
    went_on = False
    with pytest.raises(SchemaError, match="offsets"):  # noqa: PT012 - the body is what waits
        async with asyncio.timeout(60), Backend(database, poll_interval=0.1) as backend:
            await backend.subscribe("s", print)
            await execute(database, "ALTER TABLE pgbackend.offsets RENAME TO taken_away")
            await asyncio.Event().wait()
            went_on = True

    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    assert not went_on


async def test_the_death_of_a_worker_hides_neither_a_cancellation_nor_what_the_body_raises(database: str) -> None:
    async def run(*, also_cancelled: bool) -> None:
        async with Backend(database, poll_interval=0.1) as backend:
            await backend.subscribe("s", print)
            await execute(database, "ALTER TABLE pgbackend.offsets RENAME TO taken_away")
            try:
                await asyncio.Event().wait()
            finally:
                await execute(database, "ALTER TABLE pgbackend.taken_away RENAME TO offsets")
                if not also_cancelled:
                    raise KeyError("mine")
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
                await asyncio.sleep(0)

    with pytest.raises(KeyError, match="mine"):
        await asyncio.wait_for(run(also_cancelled=False), 60)
    cancelled = asyncio.create_task(run(also_cancelled=True))
    await asyncio.wait({cancelled}, timeout=60)
    assert cancelled.cancelled()


async def test_a_worker_that_died_fails_the_probe_and_shows_in_status(database: str) -> None:
    catch = Catch()
    backend = Backend(database, poll_interval=0.1)
    await backend.init()
    await backend.subscribe("s", catch)
    running = asyncio.create_task(backend.start())
    await execute(database, "ALTER TABLE pgbackend.offsets RENAME TO taken_away")
    await asyncio.wait({running}, timeout=60)
    await execute(database, "ALTER TABLE pgbackend.taken_away RENAME TO offsets")
    assert isinstance(running.exception(), SchemaError)

    (status,) = (await backend.status()).subscriptions
    assert status.state.startswith("worker died: SchemaError")
    with pytest.raises(ProbeError, match="worker died: SchemaError") as caught:
        await backend.probe()
    assert set(caught.value.checks) > {"worker", "write"}

    again = asyncio.create_task(backend.start())
    await backend.produce(make_event("a"))
    await catch.has("a")
    await backend.probe()
    await backend.stop()
    await again


async def test_a_worker_that_is_cancelled_from_outside_counts_as_dead(database: str) -> None:
    """A handler may cancel all tasks that it finds."""
    with pytest.raises(PgBackendError, match="cancelled by something outside"):  # noqa: PT012 - the body is what waits
        async with asyncio.timeout(60), Backend(database) as backend:
            await backend.subscribe("s", print)
            (worker,) = [task for task in asyncio.all_tasks() if task.get_name() == "pgbackend worker"]
            worker.cancel()
            await asyncio.Event().wait()


class Panic(BaseException):
    """As extensions in Rust raise it."""


@pytest.mark.direct
@pytest.mark.parametrize("when", ["at the start", "later"])
async def test_a_worker_whose_sign_of_life_dies_is_replaced(
    database: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    catch = Catch()
    panics = 1 if when == "at the start" else 0
    connect = Database.connect

    async def panic(self: Database, *, direct: bool = False, **options: Any) -> Any:
        nonlocal panics
        if direct and panics:
            panics -= 1
            raise Panic
        return await connect(self, direct=direct, **options)

    monkeypatch.setattr(Database, "connect", panic)
    with Recorder() as recorder:
        async with Backend(database) as backend:
            await backend.subscribe("s", catch)
            if when == "later":
                await recorder.wait("worker started")
                panics = 1
                ended = "SELECT count(pg_terminate_backend(backend_pid)) FROM pgbackend.workers"
                assert await query_value(database, ended)
            await recorder.wait("presence died")
            await backend.produce(make_event("a"))
            await catch.has("a")


async def test_a_logging_filter_that_raises_harms_nobody(
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


async def test_unsubscribing_that_was_given_up_ends_in_the_background(database: str) -> None:
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


# Events.


async def test_an_event_that_is_no_cloudevent_or_too_large_is_refused_by_name_and_nothing_of_its_call_is_stored(
    database: str,
) -> None:
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


@pytest.mark.parametrize("name", ["id", "source", "subject", "dataschema", "partitionkey", "n", "n" * 30_000])
async def test_the_attributes_of_an_event_have_64_kib_together_by_any_way_into_the_log(
    database: str, name: str
) -> None:
    def event(size: int) -> Event:
        text = "u:" + "é" * 15_000
        return parse_structured(structured(**{name: text + "x" * size, "other": "y"}, data="z" * 100_000))

    fits = event(ATTRIBUTES_BYTES - attributes_size(event(0).row))
    large = event(ATTRIBUTES_BYTES - attributes_size(event(0).row) + 1)
    insert = f"INSERT INTO pgbackend.events ({', '.join(COLUMNS)}) VALUES ({', '.join(f'${n}' for n in range(1, 13))})"
    backend = Backend(database)
    await backend.init()
    connection = await asyncpg.connect(database)
    await backend.produce(fits)
    await connection.execute(insert, *fits.row)
    with pytest.raises(EventError, match="65,537 bytes of attributes"):
        await backend.produce(large)
    with pytest.raises(EventError, match="65,537 bytes of attributes"):
        await backend.produce_many([fits, large])
    with pytest.raises(asyncpg.CheckViolationError, match="events_attributes_size"):
        await connection.execute(insert, *large.row)
    await connection.close()
    await backend.stop()

    assert await query_value(database, "SELECT count(*) FROM pgbackend.events") == 2


async def test_data_may_hold_any_octets(database: str) -> None:
    data = bytes(range(256)) * 3
    got: list[bytes | None] = []

    async def keep(event: Event) -> None:
        got.append(event.data_bytes)

    async with Backend(database) as backend:
        await backend.subscribe("s", keep)
        await backend.produce(make_event("a", data))

        async def has_it() -> bool:
            return bool(got)

        await eventually("it came", has_it)

    assert got == [data]


# Looking.


async def test_status_says_where_everybody_stands(database: str) -> None:
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
    connection = await asyncpg.connect(database, server_settings={"application_name": "nightly load"})
    await connection.execute("BEGIN")
    await connection.execute("INSERT INTO pgbackend.events (id, source, type) VALUES ('a', 'b', 'c')")
    (appender,) = (await backend.status()).appenders
    pid = connection.get_server_pid()
    await connection.close()

    assert (appender.pid, appender.application, appender.gid) == (pid, "nightly load", None)
    assert appender.age is not None
    assert appender.age >= 0


async def test_probe_returns_when_all_is_well_and_says_what_is_not(database: str) -> None:
    async with Proxy(database) as proxy:
        backend = Backend(proxy.dsn)
        await backend.init()
        await backend.probe()
        proxy.cut()
        with pytest.raises(ProbeError) as caught:
            await backend.probe()
        assert caught.value.checks.keys() == {"connection"}
        proxy.restore()
        await backend.probe()
        await execute(database, "UPDATE pgbackend.pgbackend_revision SET version_num = '9999'")
        with pytest.raises(ProbeError, match="9999") as caught:
            await backend.probe()
        assert caught.value.checks["connection"] == "ok"
        assert "9999" in caught.value.checks["schema"]
        await backend.stop()


@pytest.fixture
async def plain_role(backend: Backend, database: str) -> AsyncIterator[tuple[str, str]]:
    """A role that may use the log that somebody else has made, and make nothing in it; and the DSN as that role."""
    role = f"plain_{uuid.uuid4().hex[:12]}"
    await execute(database, f"CREATE ROLE {role} LOGIN PASSWORD 'plain'")
    await execute(database, f"GRANT USAGE ON SCHEMA pgbackend TO {role}")
    await execute(database, f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA pgbackend TO {role}")
    await execute(database, f"GRANT USAGE, SELECT ON ALL SEQUENCES IN SCHEMA pgbackend TO {role}")
    for function in ("open_appender()", "find_distributed(regclass)", "appenders_in_flight(regclass, regclass)"):
        await execute(database, f"GRANT EXECUTE ON FUNCTION pgbackend.{function} TO {role}")
    parts = urlsplit(database)
    yield role, parts._replace(netloc=f"{role}:plain@{parts.netloc.rpartition('@')[2]}").geturl()
    await execute(database, f"DROP OWNED BY {role}")
    await execute(database, f"DROP ROLE {role}")


async def test_a_probe_as_a_plain_role_commits_and_leaves_nothing_behind(
    database: str, plain_role: tuple[str, str]
) -> None:
    backend = Backend(plain_role[1])
    await backend.init(migrate=False)
    await backend.produce(make_event("a"))
    position = "SELECT last_value FROM pgbackend.events_position_seq"
    flushed = "SELECT pg_current_wal_flush_lsn() - '0/0'::pg_lsn"
    size = "SELECT sum(pg_relation_size(oid)) FROM pg_class WHERE relnamespace = 'pgbackend'::regnamespace"
    before = [await query_value(database, query) for query in (position, size, "SELECT count(*) FROM pgbackend.events")]
    wal = await query_value(database, flushed)
    for _ in range(3):
        await backend.probe()
    after = [await query_value(database, query) for query in (position, size, "SELECT count(*) FROM pgbackend.events")]
    await backend.stop()

    assert after == before
    assert await query_value(database, flushed) > wal, "nothing was made durable"


@pytest.mark.direct
async def test_a_probe_says_that_this_role_may_not_append(database: str, plain_role: tuple[str, str]) -> None:
    role, dsn = plain_role
    backend = Backend(dsn)
    await backend.init(migrate=False)
    await execute(database, f"REVOKE INSERT ON pgbackend.events FROM {role}")
    with pytest.raises(ProbeError, match="pgbackend grants --producer") as caught:
        await backend.probe()
    await execute(database, f"GRANT INSERT ON pgbackend.events TO {role}")
    await backend.probe()
    await backend.stop()

    assert {name for name, text in caught.value.checks.items() if text != "ok"} == {"privilege"}
    assert "write" not in caught.value.checks


@pytest.mark.direct
async def test_a_probe_says_that_transactions_are_read_only(database: str, plain_role: tuple[str, str]) -> None:
    role, dsn = plain_role
    await execute(database, f"ALTER ROLE {role} SET default_transaction_read_only = on")
    reader = Probing(dsn)
    checks = await reader.checks()

    assert {name for name, text in checks.items() if text != "ok"} == {"writable"}


@pytest.mark.direct
async def test_a_probe_of_a_log_that_is_out_of_segments_says_why_none_is_made(
    backend: Backend, database: str, plain_role: tuple[str, str]
) -> None:
    segments_until = (await backend.status()).segments_until
    await execute(database, f"SELECT setval('pgbackend.events_position_seq', {segments_until})")
    checks = await Probing(plain_role[1]).checks()
    assert {name for name, text in checks.items() if text != "ok"} == {"segments"}
    # Whoever may make them does so.
    await backend.probe()


@pytest.mark.parametrize("events", [1, 3, 50])
async def test_a_log_that_is_out_of_segments_for_a_moment_refuses_no_event_for_good(
    backend: Backend, database: str, events: int
) -> None:
    """Each way of an INSERT: alone, unnest, COPY."""
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


async def test_a_position_that_is_given_out_twice_is_not_the_fault_of_the_event(
    backend: Backend, database: str
) -> None:
    await backend.produce(make_event("there"))
    await execute(database, "SELECT setval('pgbackend.events_position_seq', 1, false)")

    with pytest.raises(DatabaseError, match="set back"):
        await backend.produce(make_event("new"))


class Probing:
    """A probe by itself, without what `init()` writes."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn

    async def checks(self) -> dict[str, str]:
        database = Database(self._dsn)
        await database.open()
        log = Log(database, schema="pgbackend", hole_wait=1.0)
        subscriptions = Subscriptions(log, schema="pgbackend")
        try:
            requirements, segments = Requirements(log, schema="pgbackend"), Segments(database, schema="pgbackend")
            return await LogCheck(database, subscriptions, requirements, segments, schema="pgbackend").run_once(
                timeout=20.0
            )
        finally:
            await database.close()


# How far behind.


async def lag_seconds(backend: Backend) -> float | None:
    return (await backend.status()).subscriptions[0].lag_seconds


async def test_a_subscription_is_behind_by_the_age_of_its_oldest_event_that_is_not_settled(
    backend: Backend, database: str
) -> None:
    async def recorded_before(seconds: float) -> None:
        # No producer can: the log's own time.
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
    # A hole in which nothing is to be seen is nobody's lag yet; an event that is pending is.
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


# Outages.


async def test_start_waits_for_a_server_that_is_away_and_goes_on_when_it_is_back(database: str) -> None:
    catch = Catch()
    async with Proxy(database) as proxy:
        backend = Backend(proxy.dsn, poll_interval=0.2)
        await backend.init()
        await backend.subscribe("s", catch)
        proxy.cut()
        with Recorder() as recorder:
            running = asyncio.create_task(backend.start())
            await recorder.wait("worker cannot start")
            proxy.restore()
            async with Backend(database) as producer:
                await producer.produce(make_event("a"))
            await catch.has("a")
        await backend.stop()
        await running


async def test_stop_ends_while_the_server_is_away(database: str) -> None:
    async with Proxy(database) as proxy:
        backend = Backend(proxy.dsn, drain_timeout=0.2, produce_timeout=0.5)
        await backend.init()
        await backend.subscribe("s", print)
        with Recorder() as recorder:
            running = asyncio.create_task(backend.start())
            await recorder.wait("lease claimed")
            proxy.cut()
            await recorder.wait("presence lost")
            began = time.monotonic()
            await backend.stop()
        await running

    assert time.monotonic() - began < 25


async def test_a_silent_network_holds_up_neither_callers_nor_stop_for_long(database: str) -> None:
    async with Proxy(database) as proxy:
        backend = Backend(proxy.dsn, drain_timeout=0.2, produce_timeout=0.5)
        await backend.init()

        async def is_connected() -> bool:
            with suppress(ProduceTimeoutError, ProduceUncertainError):
                await backend.produce(make_event("a"))
                return True
            return False

        await eventually("an event is stored, however slow the machine", is_connected)
        proxy.stall()
        began = time.monotonic()
        with pytest.raises(PgBackendError):
            await backend.produce(make_event("b"))
        await backend.stop()
        assert time.monotonic() - began < 25
        proxy.cut()
        proxy.restore()


async def test_a_bare_retry_is_the_policy_of_the_documentation() -> None:
    assert Retry() == Retry(attempts=5, delay=1.0, backoff="exponential", max_delay=600.0)


async def test_dates_in_status_and_events_are_aware(database: str) -> None:
    at: list[datetime | None] = []

    async def keep(event: Event) -> None:
        at.append(event.recorded_at)

    async with Backend(database) as backend:
        await backend.subscribe("s", keep)
        await backend.produce(make_event("a"))

        async def has_it() -> bool:
            return bool(at)

        await eventually("it came", has_it)

    assert at[0] is not None
    assert abs((datetime.now(UTC) - at[0]).total_seconds()) < 60
