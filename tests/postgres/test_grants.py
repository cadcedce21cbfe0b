"""Each kind of role: what it can and cannot do with the privileges that `pgbackend grants` prints.

The log belongs to a role that is no superuser, and each kind connects as a role of its own.
"""

import asyncio
import json
import re
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
import psycopg
import pytest

from pgbackend import Backend, ConfigError, DatabaseError, Retry, outbox
from pgbackend.cli.options import LogAddress
from pgbackend.cli.reading import reading
from pgbackend.codec.attributes import COLUMNS
from pgbackend.console import app
from pgbackend.log.log import Log
from pgbackend.log.segments import Segments
from pgbackend.postgres import schema
from pgbackend.postgres.grants import grants
from pgbackend.postgres.pool import Database
from pgbackend.postgres.sql import quote_ident
from pgbackend.subscriptions.leases import Leases
from tests.support.claims import claim_free
from tests.support.console import served
from tests.support.dispatchers import Catch
from tests.support.events import make_event
from tests.support.polling import eventually
from tests.support.programs import programs

pytestmark = pytest.mark.direct

ROOT = Path(__file__).parents[2]

SETTINGS: dict[str, Any] = {"commit_interval": 0.01, "poll_interval": 0.1}
INSERT = "INSERT INTO pgbackend.events (id, source, type) VALUES ($1, '/plain', 'sql')"


@dataclass(frozen=True)
class Roles:
    """DSNs of one log by the role that connects; "superuser" created the database and owns nothing in it."""

    superuser: str
    suffix: str

    def name(self, kind: str) -> str:
        return f"{kind}_{self.suffix}"

    def dsn(self, kind: str) -> str:
        if kind == "superuser":
            return self.superuser
        parts = urlsplit(self.superuser)
        return parts._replace(netloc=f"{self.name(kind)}:secret@{parts.netloc.rpartition('@')[2]}").geturl()

    @asynccontextmanager
    async def connected(self, kind: str, **settings: str) -> "AsyncIterator[asyncpg.Connection[asyncpg.Record]]":
        connection = await asyncpg.connect(self.dsn(kind), server_settings=settings)
        try:
            yield connection
        finally:
            await connection.close()

    async def execute(self, kind: str, statement: str, *args: object) -> None:
        async with self.connected(kind) as connection:
            await connection.execute(statement, *args)

    async def fetchval(self, kind: str, statement: str, *args: object) -> Any:
        async with self.connected(kind) as connection:
            return await connection.fetchval(statement, *args)

    @asynccontextmanager
    async def backend(self, kind: str, **settings: Any) -> AsyncIterator[Backend]:
        """A backend that is initialized but not started, so it dispatches nothing."""
        backend = Backend(self.dsn(kind), **SETTINGS, **settings)
        await backend.init(migrate=False)
        try:
            yield backend
        finally:
            await backend.stop()


KINDS = ("producer", "consumer", "reader", "operator")


@pytest.fixture
async def unprivileged(empty_database: str) -> AsyncIterator[Roles]:
    """A log, and roles without any privilege on it."""
    roles = Roles(empty_database, urlsplit(empty_database).path[-12:])
    names = [roles.name(kind) for kind in ("owner", *KINDS)]
    async with roles.connected("superuser") as connection:
        for name in names:
            await connection.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'secret'")
        await connection.execute(f"CREATE SCHEMA pgbackend AUTHORIZATION {roles.name('owner')}")
    try:
        await schema.migrate(lambda: asyncpg.connect(roles.dsn("owner")), "pgbackend")
        yield roles
    finally:
        async with roles.connected("superuser") as connection:
            await connection.execute(f"DROP OWNED BY {', '.join(names)} CASCADE")
            await connection.execute(f"DROP ROLE {', '.join(names)}")


@pytest.fixture
async def roles(unprivileged: Roles) -> Roles:
    """A log, and a role of each kind with the printed privileges."""
    sql = grants(
        "pgbackend",
        producers=[unprivileged.name("producer")],
        consumers=[unprivileged.name("consumer")],
        readers=[unprivileged.name("reader")],
        operators=[unprivileged.name("operator")],
    )
    await unprivileged.execute("owner", sql)
    return unprivileged


# Allowed to each kind.


@pytest.mark.parametrize("private", ["sys", "rds_aurora"])
async def test_an_inaccessible_schema_named_like_another_engines_does_no_harm(roles: Roles, private: str) -> None:
    await roles.execute("superuser", f"CREATE SCHEMA {private}")

    async with roles.backend("producer") as backend:
        await backend.produce(make_event("one"))


async def test_an_operator_sets_the_retention_and_a_consumer_carries_it_out(roles: Roles) -> None:
    async with roles.backend("consumer") as backend:
        with pytest.raises(DatabaseError, match=r"this role may not change that.*`pgbackend grants --operator`"):
            await backend.set_retention(keep=timedelta(seconds=2))
    async with roles.backend("operator") as backend:
        await backend.set_retention(keep=timedelta(seconds=1))
        assert (await backend.status()).retention == await backend.retention()
    await roles.execute("producer", INSERT, "old")
    catch = Catch()

    async with Backend(roles.dsn("consumer"), **SETTINGS) as backend:
        await backend.subscribe("s", catch, start="earliest")

        async def is_gone() -> bool:
            segments = "SELECT count(*) FROM pg_inherits WHERE inhparent = 'pgbackend.events'::regclass"
            oldest = "SELECT to_regclass('pgbackend.events_0') IS NULL"
            return bool(await roles.fetchval("owner", segments) < 15 and await roles.fetchval("owner", oldest))

        await eventually("the first segment is gone", is_gone)

    assert catch.ids == ["old"]


@pytest.mark.parametrize("kind", KINDS)
async def test_no_role_can_drop_what_the_retention_keeps(roles: Roles, kind: str) -> None:
    await roles.execute("producer", INSERT, "a")
    for call in ("cut_segment()", "empty_segment()", "remove_segments(50)", "forget_letters()", "forget_removed()"):
        if kind == "consumer":
            await roles.execute(kind, f"SELECT * FROM pgbackend.{call}")
        else:
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await roles.execute(kind, f"SELECT * FROM pgbackend.{call}")
    assert await roles.fetchval("owner", "SELECT last_value FROM pgbackend.events_position_seq") == 1
    assert await roles.fetchval("owner", "SELECT count(*) FROM pgbackend.events") == 1
    for function in ("cut_segment_of('pgbackend.events', 'pgbackend.events', 'pgbackend.events')", "unsettled(0, 9)"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await roles.execute(kind, f"SELECT pgbackend.{function}")


async def test_a_producer_appends_in_every_way_and_probes(roles: Roles) -> None:
    async with roles.backend("producer") as backend, roles.connected("producer") as plain:
        await backend.produce(make_event("one"))
        await backend.produce_many([make_event(f"unnest {number}") for number in range(3)])
        await backend.produce_many([make_event(f"copy {number}") for number in range(100)])
        async with plain.transaction():
            assert await plain.fetchval(INSERT + " RETURNING position", "plain") == 105
            await plain.execute('NOTIFY "pgbackend:pgbackend"')
        await plain.copy_records_to_table(
            "events", schema_name="pgbackend", columns=["id", "source", "type"], records=[("bulk", "/plain", "sql")]
        )
        await backend.probe()

    assert await roles.fetchval("owner", "SELECT count(*) FROM pgbackend.events") == 106


async def test_a_producer_appends_in_its_own_transaction(roles: Roles) -> None:
    async with (
        roles.backend("producer") as backend,
        roles.connected("producer") as connection,
        connection.transaction(),
    ):
        await backend.produce(make_event("asyncpg"), connection=connection, notify=True)
    with psycopg.connect(roles.dsn("producer")) as plain:
        outbox.produce_many(plain, [make_event("one"), make_event("two")])

    assert await roles.fetchval("owner", "SELECT string_agg(id, ' ' ORDER BY position) FROM pgbackend.events") == (
        "asyncpg one two"
    )


async def test_a_producer_deduplicates_within_the_window_that_an_operator_has_set(roles: Roles) -> None:
    """In every way. It may not change the window, and touches keys in no other way."""
    day = timedelta(days=1)
    with pytest.raises(DatabaseError, match=r"may not change.*--operator") as caught:
        async with roles.backend("producer", deduplicate=day):
            pass
    assert caught.value.sqlstate == "42501"
    async with roles.backend("operator", deduplicate=day):
        pass
    async with roles.backend("producer", deduplicate=day) as backend, roles.connected("producer") as plain:
        for _ in range(2):
            await backend.produce(make_event("one"))
            await backend.produce_many([make_event(f"many {number}") for number in range(3)])
            await plain.execute("SELECT pgbackend.produce('t', '/s', id => 'sql')")
        async with plain.transaction():
            await plain.execute("SELECT pgbackend.produce('t', 'test', id => 'open')")
            blocked = asyncio.create_task(backend.produce(make_event("open")))
            appender = backend._lifecycle.opened().appender
            await eventually("it is aside", lambda: bool(appender._aside))
        await blocked
        assert await backend._lifecycle.opened().deduplication.run_once() == 0
        for statement in ("SELECT FROM pgbackend.recent_events", "DELETE FROM pgbackend.recent_events"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await plain.execute(statement)

    assert await roles.fetchval("owner", "SELECT count(*) FROM pgbackend.events") == 6


@pytest.mark.parametrize("operator", ["=", "~", "~~"])
async def test_a_producer_cannot_replace_the_operators_that_check_its_events(roles: Roles, operator: str) -> None:
    await roles.execute("superuser", f"CREATE SCHEMA lax AUTHORIZATION {roles.name('producer')}")
    async with roles.connected("producer") as plain:
        verdict = "false" if operator == "=" else "true"
        await plain.execute(f"""
            CREATE FUNCTION lax.says(text, text) RETURNS boolean LANGUAGE sql RETURN {verdict};
            CREATE OPERATOR lax.{operator} (FUNCTION = lax.says, LEFTARG = text, RIGHTARG = text);
            SET search_path = lax, pg_catalog""")
        with pytest.raises(asyncpg.CheckViolationError, match='"id" is empty'):
            await plain.execute("INSERT INTO pgbackend.events (id, source, type) VALUES ('', '/s', 't')")
        with pytest.raises(asyncpg.CheckViolationError, match='"time" is no RFC 3339 timestamp'):
            await plain.execute("INSERT INTO pgbackend.events (id, source, type, time) VALUES ('1', '/s', 't', 'now')")


async def test_a_producer_alone_makes_segments_when_none_are_left(roles: Roles) -> None:
    await roles.execute("owner", "ALTER TABLE pgbackend.events ALTER COLUMN position RESTART WITH 95000000")
    async with roles.backend("producer") as backend:
        # Beyond the segments that init() made.
        await roles.execute("owner", "ALTER TABLE pgbackend.events ALTER COLUMN position RESTART WITH 200000001")
        await backend.produce(make_event("beyond"))
        await backend.probe()

    owners = "SELECT DISTINCT relowner::regrole::text FROM pg_class JOIN pg_inherits ON oid = inhrelid"
    assert await roles.fetchval("owner", owners) == roles.name("owner")
    assert await roles.fetchval("owner", "SELECT tableoid::regclass::text FROM pgbackend.events") == (
        "pgbackend.events_200000000"
    )


async def test_a_consumer_runs_subscriptions_from_beginning_to_end(roles: Roles) -> None:
    """Every call, with failures, redelivery, dead letters and their redelivery."""
    catch = Catch(fails=lambda event: event.id == "bad" and not mended)
    mended = False
    async with roles.backend("producer") as producer, roles.backend("consumer") as backend:
        running = asyncio.create_task(backend.start())
        await producer.produce(make_event("old"))
        await backend.subscribe("s", catch, retry=Retry(attempts=2, delay=0.01))
        await producer.produce_many([make_event("good"), make_event("bad")])
        await catch.has("good")

        async def buried() -> list[Any]:
            return [letter async for letter in backend.dead_letters("s")]

        assert await eventually("it is buried", buried)
        mended = True
        assert await backend.redeliver(subscription="s") == 1
        await catch.has("bad")

        for place in ("earliest", datetime.now(UTC) - timedelta(days=1), 0):
            catch.at.clear()
            await backend.seek("s", place)
            await catch.has("old")
        await backend.alter_subscription("s", order="key", end=None, start="latest")
        await backend.seek("s", "latest")
        await backend.reshard("s", 2)
        status = await backend.status()
        assert (status.subscriptions[0].order, status.head) == ("key", 3)

        await backend.unsubscribe("s")
        await backend.delete_subscription("s")
        assert (await backend.status()).subscriptions == ()
        await backend.stop()
        await running


async def test_a_consumer_alone_makes_segments(roles: Roles) -> None:
    await roles.execute("owner", "ALTER TABLE pgbackend.events ALTER COLUMN position RESTART WITH 95000000")
    async with roles.backend("consumer") as backend:
        assert (await backend.status()).segments_until >= 195_000_000


async def test_a_broker_is_a_producer_and_a_consumer(roles: Roles) -> None:
    await roles.execute("owner", grants("pgbackend", producers=[roles.name("consumer")]))
    catch = Catch()
    async with roles.backend("consumer") as backend:
        running = asyncio.create_task(backend.start())
        await backend.subscribe("replies", catch)

        async def reply(_: object) -> None:
            await backend.produce(make_event("reply"))

        await backend.subscribe("requests", reply, filter=lambda event: event.id == "request")
        await backend.produce(make_event("request"))
        await catch.has("request", "reply")
        await backend.stop()
        await running


async def test_a_consumer_sees_all_of_the_console_and_an_operator_no_events(roles: Roles) -> None:
    await roles.execute("superuser", "INSERT INTO pgbackend.events (id, source, type) VALUES ('1', '/s', 't')")
    views = {
        "overview": 200, "history": 200, "history?subscription=billing": 200, "subscriptions/billing": 200,
        "dead-letter-groups": 200, "dead-letters": 200, "events": 403, "events/1": 403, "events/1/data": 403,
    }  # fmt: skip
    async with roles.backend("consumer") as backend, served(app(backend)) as console:
        await backend.subscribe("billing", print)
        assert {(await console.ask("GET", f"api/{path}")).status for path in views} == {200}
        assert await console.act("subscriptions/billing/pause", {})
    async with roles.backend("operator") as backend, served(app(backend)) as console:
        assert {path: (await console.ask("GET", f"api/{path}")).status for path in views} == views
        assert await console.act("subscriptions/billing/resume", {})


async def test_an_operator_reads_the_status_and_repairs(roles: Roles) -> None:
    async def fail(_: object) -> None:
        raise RuntimeError("no")

    async with roles.backend("producer") as producer, roles.backend("consumer") as consumer:
        running = asyncio.create_task(consumer.start())
        await consumer.subscribe("s", fail, retry=Retry(attempts=1))
        await producer.produce(make_event("bad"))

        async with roles.backend("operator") as operator:

            async def buried() -> list[Any]:
                return [letter async for letter in operator.dead_letters()]

            (letter,) = await eventually("it is buried", buried)
            assert letter.event.id == "bad"
            (group,) = await operator.dead_letter_groups()
            assert await operator.redeliver(group=group.name) == 1

            async def purged() -> int:
                return await operator.purge_dead_letters(letter.id)

            assert await eventually("it failed again and is purged", purged) == 1
            (subscription,) = (await operator.status()).subscriptions
            assert subscription.state == "elsewhere"

            await operator.pause("s", reason="later")
            await operator.resume("s")
            await consumer.pause("s")
            await consumer.resume("s")

            await consumer.unsubscribe("s")
            for place in ("earliest", "latest", datetime.now(UTC), 0):
                assert (await operator.preview_seek("s", place)).again <= 1
                await operator.seek("s", place)
            await operator.alter_subscription("s", order="strict", end=5, start=1)
            (subscription,) = (await operator.status()).subscriptions
            assert (subscription.order, subscription.shards[0].position) == ("strict", 1)
            await operator.alter_subscription("s", order="none", end=5, start="latest")
            await operator.reshard("s", 3)
            (subscription,) = (await operator.status()).subscriptions
            assert {shard.shards for shard in subscription.shards} == {3}
            await operator.delete_subscription("s")
            assert (await operator.status()).subscriptions == ()
        await consumer.stop()
        await running


@pytest.mark.parametrize("kind", ["consumer", "operator"])
async def test_failed_events_are_listed_retried_and_skipped_by_either_and_redacted_by_an_operator(
    roles: Roles, kind: str
) -> None:
    catch = Catch(fails=lambda event: event.id in {"bad", "worse"})
    async with roles.backend("producer") as producer, Backend(roles.dsn("consumer"), **SETTINGS) as consumer:
        await consumer.subscribe("s", catch, retry=Retry(attempts=9, delay=600.0))
        await producer.produce_many([make_event("good"), make_event("bad"), make_event("worse")])
        async with roles.backend(kind) as backend:

            async def both_wait() -> bool:
                return [event.id async for event in backend.waiting("s")] == ["bad", "worse"]

            await eventually("both wait", both_wait)
            assert await backend.retry_now("s", position=2) == 1
            await eventually("it is tried again", lambda: catch.attempts.count("bad") == 2)
            await backend.skip("s", 3)
            (letter,) = [letter async for letter in backend.dead_letters()]
            assert (letter.event.id, letter.failure.error) == ("worse", f"Skipped by {roles.name(kind)}")
            if kind == "operator":
                assert (await backend.redact(3)).redacted_by == roles.name("operator")
                assert not [letter async for letter in backend.dead_letters()]
            else:
                with pytest.raises(DatabaseError) as caught:
                    await backend.redact(3)
                assert caught.value.sqlstate == "42501"


async def test_a_reader_follows_the_log_from_any_place(roles: Roles) -> None:
    async with roles.backend("producer") as producer:
        await producer.produce_many([make_event("one"), make_event("two")])
    log = LogAddress(dsn=roles.dsn("reader"), listen_dsn=None, schema="pgbackend", directory=None)
    for place, expected in (("earliest", ["one", "two"]), (1, ["two"]), (datetime(2026, 1, 1, tzinfo=UTC), None)):
        async with reading(log, place, end=None, wanted=None) as events:  # type: ignore[arg-type] # a literal in a tuple is a str
            assert [event.id for event in await events.next()] == (expected or ["one", "two"])
    async with reading(log, "latest", end="latest", wanted=None) as events:
        assert events.is_done


@pytest.mark.parametrize("kind", ["consumer", "operator"])
async def test_an_open_appender_is_shown_and_its_age_if_the_owner_may_see_it(roles: Roles, kind: str) -> None:
    async with (
        roles.backend(kind) as backend,
        evidence(roles, kind) as log,
        roles.connected("producer", application_name="slow") as producer,
        producer.transaction(),
    ):
        await producer.execute(INSERT, "open")
        (appender,) = (await backend.status()).appenders
        assert (appender.pid, appender.application) == (producer.get_server_pid(), "slow")
        assert (appender.age, await log.oldest_appender_start()) == (None, None)

        await roles.execute("superuser", f"GRANT pg_read_all_stats TO {roles.name('owner')}")
        (appender,) = (await backend.status()).appenders
        assert appender.age is not None
        assert await log.oldest_appender_start() is not None


async def test_appender_began_tells_nothing_about_backends_that_do_not_append(roles: Roles) -> None:
    began = "SELECT pgbackend.appender_began($1)"
    await roles.execute("superuser", f"GRANT pg_read_all_stats TO {roles.name('owner')}")
    async with roles.connected("producer") as producer, producer.transaction():
        assert await producer.fetchval("SELECT 1")
        assert await roles.fetchval("operator", began, producer.get_server_pid()) is None
        await producer.execute(INSERT, "open")
        assert await roles.fetchval("operator", began, producer.get_server_pid()) is not None


STATUS_VIEWS = ("log_status", "lag", "shard_lag", "holes", "appenders", "worker_status", "rates")


@pytest.mark.parametrize("kind", ["consumer", "reader", "operator"])
async def test_all_but_producers_read_the_status(roles: Roles, kind: str) -> None:
    async with roles.backend("consumer") as consumer:
        await consumer.subscribe("s", Catch())
    async with roles.connected("producer") as producer, producer.transaction():
        await producer.execute(INSERT, "open")
        await roles.execute("producer", INSERT, "later")
        async with roles.backend(kind) as backend:
            status = await backend.status()
            assert (status.head, status.subscriptions[0].lag) == (2, 2)
            assert status.appenders[0].pid == producer.get_server_pid()
        async with roles.connected(kind) as connection:
            for view in STATUS_VIEWS:
                await connection.fetch(f"SELECT * FROM pgbackend.{view}")
            holes = "SELECT first_position, pid FROM pgbackend.holes"
            assert [tuple(row) for row in await connection.fetch(holes)] == [(1, producer.get_server_pid())]


async def test_a_role_that_watches_reads_the_views_and_nothing_else(unprivileged: Roles) -> None:
    """With the rights that docs/status.md names."""
    [sql] = re.findall(r"```sql\n(GRANT.*?)```", (ROOT / "docs" / "status.md").read_text(), re.DOTALL)
    watcher = unprivileged.name("reader")
    await unprivileged.execute("owner", sql.replace("grafana", watcher))
    async with unprivileged.connected("reader") as connection:
        for view in STATUS_VIEWS:
            await connection.fetch(f"SELECT * FROM pgbackend.{view}")
        for table in ("events", "subscriptions", "offsets", "dead_letters", "workers"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.fetch(f"SELECT * FROM pgbackend.{table}")


# Denied to each kind.

_SEGMENT = "pgbackend.events_0"
FORBIDDEN_TO_ALL = [
    f"SELECT position FROM {_SEGMENT}",
    f"INSERT INTO {_SEGMENT} (id, source, type) VALUES ('1', '/s', 't')",
    f"INSERT INTO {_SEGMENT} (position, id, source, type) OVERRIDING SYSTEM VALUE VALUES (9, '1', '/s', 't')",
    f"DELETE FROM {_SEGMENT}",
    "UPDATE pgbackend.events SET type = 'u'",
    "DELETE FROM pgbackend.events",
    "TRUNCATE pgbackend.events",
    "INSERT INTO pgbackend.events (position, id, source, type) OVERRIDING SYSTEM VALUE VALUES (9, '1', '/s', 't')",
    "COPY pgbackend.events (position, id, source, type) FROM STDIN",
    "INSERT INTO pgbackend.events (recorded_at, id, source, type) VALUES (now(), '1', '/s', 't')",
    "LOCK TABLE pgbackend.events IN SHARE MODE",
    "SELECT nextval('pgbackend.events_position_seq')",
    "SELECT setval('pgbackend.events_position_seq', 1)",
    "SELECT setval('pgbackend.epochs', 1)",
    "ALTER TABLE pgbackend.events ALTER COLUMN position RESTART WITH 1",
    f"ALTER TABLE pgbackend.events DETACH PARTITION {_SEGMENT}",
    "CREATE TABLE pgbackend.events_100000000 ()",
    "SELECT pgbackend.make_segment_of('pgbackend.events')",
    "INSERT INTO pgbackend.incarnation (id) VALUES (gen_random_uuid())",
    "UPDATE pgbackend.incarnation SET id = gen_random_uuid()",
    "DELETE FROM pgbackend.incarnation",
    "INSERT INTO pgbackend.incarnation (single, set_back) VALUES (true, false)",
    "UPDATE pgbackend.pgbackend_revision SET version_num = 'r0001'",
    "UPDATE pgbackend.offsets SET subscription = 'other'",
    "UPDATE pgbackend.subscriptions SET name = 'other'",
    "UPDATE pgbackend.living_workers SET name = 'other'",
    "UPDATE pgbackend.dead_letters SET data = 'forged'",
    "INSERT INTO pgbackend.dead_letters (subscription, position, error) VALUES ('s', 1, '')",
    "COPY pgbackend.dead_letters (subscription, data) FROM STDIN",
    "DROP FUNCTION pgbackend.make_segment()",
]
FORBIDDEN = {
    "producer": [
        "SELECT id FROM pgbackend.events",
        "SELECT data FROM pgbackend.events",
        "SELECT FROM pgbackend.events WHERE type = 't'",
        INSERT.replace("$1", "'1'") + " RETURNING id",
        "SELECT subscription FROM pgbackend.offsets",
        "UPDATE pgbackend.offsets SET position = 1",
        "SELECT 1 FROM pgbackend.subscriptions",
        "DELETE FROM pgbackend.subscriptions",
        "SELECT 1 FROM pgbackend.workers",
        "SELECT 1 FROM pgbackend.living_workers",
        *[f"SELECT 1 FROM pgbackend.{view}" for view in STATUS_VIEWS],
        "SELECT 1 FROM pgbackend.redeliveries",
        "SELECT 1 FROM pgbackend.dead_letters",
        "SELECT nextval('pgbackend.epochs')",
        "SELECT pgbackend.appender_began(1)",
        "SELECT pgbackend.end_life('')",
        "SELECT pgbackend.bury('[]')",
        "SELECT pgbackend.bury_skipped('s', 1)",
        "SELECT pgbackend.redact(1)",
        "SELECT pgbackend.waiting_events('s', 0, 1)",
        "SELECT 1 FROM pgbackend.all_events",
    ],
    "consumer": [
        "SELECT pgbackend.redact(1)",
        "DELETE FROM pgbackend.redactions",
        INSERT.replace("$1", "'1'"),
        "UPDATE pgbackend.subscriptions SET created_at = now()",
        "UPDATE pgbackend.redeliveries SET position = 1",
    ],
    "reader": [
        INSERT.replace("$1", "'1'"),
        "SELECT subscription FROM pgbackend.offsets",
        "UPDATE pgbackend.offsets SET position = 1",
        "SELECT target FROM pgbackend.subscriptions",
        "UPDATE pgbackend.subscriptions SET paused_at = now(), paused_by = 'operator', pause_reason = ''",
        "SELECT 1 FROM pgbackend.workers",
        "SELECT 1 FROM pgbackend.redeliveries",
        "SELECT 1 FROM pgbackend.dead_letters",
        "SELECT nextval('pgbackend.epochs')",
        "SELECT pgbackend.key_hashes('{}')",
        "SELECT pgbackend.end_life('')",
        "SELECT pgbackend.bury('[]')",
        "SELECT pgbackend.bury_skipped('s', 1)",
        "SELECT pgbackend.redact(1)",
    ],
    "operator": [
        "SELECT pgbackend.redact_of('pgbackend.events', 1)",
        "UPDATE pgbackend.redactions SET redacted_by = 'another'",
        "INSERT INTO pgbackend.redactions (position, redacted_by) VALUES (1, 'another')",
        INSERT.replace("$1", "'1'"),
        "SELECT id FROM pgbackend.events",
        "SELECT data FROM pgbackend.events",
        "INSERT INTO pgbackend.subscriptions (name, ordering, shards) VALUES ('s', 'none', 1)",
        "UPDATE pgbackend.subscriptions SET target = 'other'",
        "UPDATE pgbackend.offsets SET crashes = 0",
        "DELETE FROM pgbackend.workers",
        "UPDATE pgbackend.workers SET heartbeat_at = now()",
        "UPDATE pgbackend.redeliveries SET attempt = 1",
        "UPDATE pgbackend.dead_letters SET error = ''",
        "SELECT pgbackend.bury('[]')",
    ],
}


@pytest.mark.parametrize("kind", KINDS)
async def test_a_role_can_do_nothing_else(roles: Roles, kind: str) -> None:
    allowed: list[str] = []
    async with roles.connected(kind) as connection:
        for statement in FORBIDDEN_TO_ALL + FORBIDDEN[kind]:
            try:
                async with connection.transaction():
                    await connection.execute(statement)
            except asyncpg.InsufficientPrivilegeError:
                continue
            except asyncpg.PostgresError as error:
                allowed.append(f"{statement}: {error}")
            else:
                allowed.append(statement)
    assert allowed == []


@pytest.mark.parametrize("kind", KINDS)
async def test_no_role_has_any_privilege_on_a_segment(roles: Roles, kind: str) -> None:
    query = """
        SELECT count(*) FILTER (WHERE has_any_column_privilege($1, inhrelid, 'SELECT, INSERT, UPDATE')), count(*)
        FROM pg_inherits JOIN pg_class ON oid = inhrelid AND relkind = 'r'"""
    await roles.execute("owner", "SELECT pgbackend.make_segment()")
    async with roles.connected("superuser") as connection:
        # Eleven segments, and the three partitions of `recent_events`.
        assert tuple(await connection.fetchrow(query, roles.name(kind)) or ()) == (0, 14)


async def test_a_producer_may_write_exactly_the_columns_of_an_event(roles: Roles) -> None:
    query = """
        SELECT attname::text AS name FROM pg_attribute
        WHERE attrelid = 'pgbackend.events'::regclass AND attnum > 0
            AND has_column_privilege($1, attrelid, attnum, 'INSERT')"""
    async with roles.connected("superuser") as connection:
        rows = await connection.fetch(query, roles.name("producer"))

    assert {row["name"] for row in rows} == set(COLUMNS)


# Several roles.


async def test_the_fence_sees_the_appenders_of_other_roles(roles: Roles) -> None:
    catch = Catch()
    async with (
        roles.backend("consumer", hole_wait=60.0) as backend,
        roles.backend("producer") as producer,
        roles.connected("producer") as slow,
    ):
        running = asyncio.create_task(backend.start())
        await backend.subscribe("s", catch, start="earliest")
        async with slow.transaction():
            await slow.execute(INSERT, "first")
            await producer.produce(make_event("second"))
            for kind in KINDS:
                async with evidence(roles, kind) as log:
                    assert len((await log.check()).appenders) == 1, kind
        await catch.has("first", "second")
        await backend.stop()
        await running

    assert catch.ids == ["first", "second"]


@asynccontextmanager
async def evidence(roles: Roles, kind: str) -> AsyncIterator[Log]:
    database = Database(roles.dsn(kind))
    await database.open()
    try:
        log = Log(database, schema="pgbackend", hole_wait=1.0)
        await log.incarnation.enter()
        yield log
    finally:
        await database.close()


async def test_starting_at_latest_waits_for_an_appender_whose_age_is_hidden(roles: Roles) -> None:
    catch = Catch()
    async with roles.backend("consumer", hole_wait=0.05) as backend, roles.connected("producer") as slow:
        async with slow.transaction():
            await slow.execute(INSERT, "open")
            await roles.execute("producer", INSERT, "old")
            await backend.subscribe("s", catch)
        running = asyncio.create_task(backend.start())
        await roles.execute("producer", INSERT, "new")
        await catch.has("open", "new")
        await backend.stop()
        await running

    assert catch.ids == ["open", "new"]


HELD_BY = """
    WITH worker AS (
        INSERT INTO pgbackend.workers (id, name, backend_pid, backend_start, lease_timeout)
        VALUES ($1, 'other', $2, $3, '1 hour')
    )
    UPDATE pgbackend.offsets SET owner = $1"""


@pytest.mark.parametrize(
    ("claimer", "registered", "is_free"),
    [("consumer", True, False), ("superuser", True, True), ("consumer", False, False), ("superuser", False, False)],
    ids=["hidden", "visible", "not registered, hidden", "not registered"],
)
async def test_a_hidden_start_time_is_no_evidence_of_death(
    roles: Roles, claimer: str, registered: bool, is_free: bool
) -> None:
    """The pid now belongs to another role's backend, or the worker could not see its own start (after SET ROLE)."""
    async with roles.backend("consumer") as backend, roles.connected("producer") as other:
        await backend.subscribe("s", Catch())
        start = datetime.now(UTC) - timedelta(days=1) if registered else None
        await roles.execute("owner", HELD_BY, uuid4(), other.get_server_pid(), start)
        async with evidence(roles, claimer) as log:
            assert bool(await claim_free(Leases(log, schema="pgbackend", worker=uuid4()), "s")) == is_free


async def test_a_worker_takes_over_from_a_dead_one_of_another_role(roles: Roles) -> None:
    await roles.execute("owner", grants("pgbackend", consumers=[roles.name("operator")]))
    first, second = Catch(), Catch()
    settings = {"lease_timeout": 600.0}
    async with roles.backend("consumer", **settings) as one, roles.backend("operator", **settings) as other:
        running = [asyncio.create_task(one.start())]
        await one.subscribe("s", first)
        await roles.execute("producer", INSERT, "a")
        await first.has("a")
        running.append(asyncio.create_task(other.start()))
        await other.subscribe("s", second)
        # Make its row look as if it had died; the worker itself goes on, fenced.
        await roles.execute(
            "owner",
            "UPDATE pgbackend.workers SET backend_pid = 999999999 WHERE id = (SELECT owner FROM pgbackend.offsets)",
        )

        async def has_taken_over() -> Any:
            return await roles.fetchval(
                "owner",
                """
                SELECT backend_pid <> 999999999 FROM pgbackend.workers JOIN pgbackend.offsets ON owner = id""",
            )

        await eventually("the other worker has the shard", has_taken_over)
        await one.stop()
        await roles.execute("producer", INSERT, "b")
        await second.has("b")
        await other.stop()
        await asyncio.gather(*running)


@pytest.mark.parametrize("kind", KINDS)
async def test_any_role_can_begin_the_new_incarnation_after_a_crash(roles: Roles, kind: str) -> None:
    await roles.execute("owner", "TRUNCATE pgbackend.incarnation")
    async with evidence(roles, kind) as log:
        assert log.incarnation.id == await roles.fetchval("owner", "SELECT id FROM pgbackend.life")


@pytest.mark.parametrize("kind", KINDS)
async def test_roles_that_extend_the_log_at_once_make_each_segment_once(roles: Roles, kind: str) -> None:
    await roles.execute("owner", "ALTER TABLE pgbackend.events ALTER COLUMN position RESTART WITH 90000000")

    async def extend(who: str) -> None:
        database = Database(roles.dsn(who))
        await database.open()
        try:
            await Segments(database, schema="pgbackend").extend()
        finally:
            await database.close()

    await asyncio.gather(*(extend(who) for who in (*KINDS, "owner", kind)))
    await extend(kind)

    segments = "SELECT count(*) FROM pg_inherits WHERE inhparent = 'pgbackend.events'::regclass"
    assert await roles.fetchval("owner", segments) == 19


# Missing privileges.


@pytest.mark.parametrize(
    ("kind", "act", "what"),
    [
        ("producer", lambda backend: backend.subscribe("s", Catch()), "subscriptions"),
        ("producer", lambda backend: backend.start(), "workers|offsets"),
        ("producer", lambda backend: backend.status(), "log_status"),
        ("consumer", lambda backend: backend.produce(make_event("1")), "events"),
        ("consumer", lambda backend: backend.produce_many([make_event("1")] * 100), "events"),
        ("operator", lambda backend: backend.subscribe("s", Catch()), "subscriptions|offsets"),
    ],
)
async def test_a_missing_privilege_is_named_with_how_to_get_it(
    roles: Roles, kind: str, act: Callable[[Backend], Awaitable[None]], what: str
) -> None:
    async with roles.backend(kind) as backend:
        with pytest.raises(DatabaseError, match=rf"permission denied for \w+ ({what}) .*`pgbackend grants`") as caught:
            await act(backend)

    assert caught.value.sqlstate == "42501"


async def test_init_refuses_a_role_without_privileges(unprivileged: Roles) -> None:
    backend = Backend(unprivileged.dsn("producer"))
    with pytest.raises(DatabaseError, match=r"permission denied for schema pgbackend .*`pgbackend grants`") as caught:
        await backend.init()
    await backend.stop()

    assert caught.value.sqlstate == "42501"


async def test_a_log_that_has_to_be_migrated_needs_its_owner(roles: Roles, later: str) -> None:
    backend = Backend(roles.dsn("consumer"))
    with pytest.raises(DatabaseError, match=r"must be owner .* Run `pgbackend migrate` as the owner") as caught:
        await backend.init()
    await backend.stop()

    assert caught.value.sqlstate == "42501"


# Roles that try to harm others.


async def test_a_consumer_cannot_make_up_a_dead_letter(roles: Roles) -> None:
    """A letter's content comes from the log, and only for a shard whose epoch and owner the consumer names."""
    async with roles.backend("producer") as producer, roles.backend("consumer") as consumer:
        await producer.produce(make_event("real"))
        await consumer.subscribe("theirs", Catch(), start="earliest")
    forged = {
        "subscription": "theirs", "epoch": 1, "owner": str(uuid4()), "position": 1, "attempts": 1, "error": "",
        "details": {}, "data": "forged", "source": "/forged",
    }  # fmt: skip
    bury = "SELECT pgbackend.bury($1)"
    assert await roles.fetchval("consumer", bury, json.dumps([forged])) == 0

    await roles.execute("owner", "UPDATE pgbackend.offsets SET owner = $1, epoch = 1", forged["owner"])
    assert await roles.fetchval("consumer", bury, json.dumps([{**forged, "position": 2}])) == 0
    assert await roles.fetchval("consumer", bury, json.dumps([forged])) == 1
    copied = "SELECT to_jsonb(letter) ->> $1 FROM pgbackend.dead_letters AS letter WHERE source <> '/forged'"
    for name in COLUMNS:
        there = await roles.fetchval("owner", "SELECT to_jsonb(event) ->> $1 FROM pgbackend.events AS event", name)
        assert await roles.fetchval("owner", copied, name) == there


@pytest.mark.parametrize("held", ["advisory lock", "call"])
async def test_no_role_can_keep_others_from_making_segments(roles: Roles, held: str) -> None:
    """Any role may take an advisory lock, and may keep a transaction open after a call that made nothing."""
    hold = {
        "advisory lock": "SELECT pg_advisory_lock(hashtextextended('pgbackend segments pgbackend', 0))",
        "call": "SELECT pgbackend.make_segment()",
    }
    assert await roles.fetchval("producer", "SELECT lower_bound FROM pgbackend.make_segment()") == 100_000_000
    async with roles.connected("operator") as operator, operator.transaction():
        await operator.execute(hold[held])
        # ALTER TABLE … RESTART would wait for transactions that have read the sequence.
        await roles.execute("owner", "SELECT setval('pgbackend.events_position_seq', 95000000)")
        assert await roles.fetchval("producer", "SELECT lower_bound FROM pgbackend.make_segment()") == 110_000_000


# The printed SQL.


async def test_the_sql_can_be_run_again_and_added_to(roles: Roles) -> None:
    everything = {kind: [roles.name("producer")] for kind in ("producers", "consumers", "readers", "operators")}
    for _ in range(2):
        await roles.execute("owner", grants("pgbackend", **everything))
    async with roles.backend("producer") as backend:
        await backend.subscribe("s", Catch())


@pytest.mark.parametrize(
    "name", ["Of \"many\" 'words'", "$1 %s :x {schema} $$", "two\nlines; DROP", "back\\slash", "select"]
)
async def test_any_name_is_quoted_for_psql(empty_database: str, name: str) -> None:
    """psql gives a meaning to more characters than the server does."""
    role = f"{name} {urlsplit(empty_database).path[-12:]}"
    connection = await asyncpg.connect(empty_database)
    await connection.execute(f"CREATE ROLE {quote_ident(role)}")
    try:
        await schema.migrate(lambda: asyncpg.connect(empty_database), name)
        sql = grants(name, producers=[role], consumers=[role], readers=[role], operators=[role])
        await asyncio.to_thread(psql, empty_database, sql)
        await connection.execute(f"SET ROLE {quote_ident(role)}")
        await connection.execute(f"INSERT INTO {quote_ident(name)}.events (id, source, type) VALUES ('1', '/s', 't')")
        await connection.execute(f"SELECT {quote_ident(name)}.make_segment()")
    finally:
        await connection.execute("RESET ROLE")
        await connection.execute(f"DROP OWNED BY {quote_ident(role)}")
        await connection.execute(f"DROP ROLE {quote_ident(role)}")
        await connection.close()


def psql(dsn: str, sql: str) -> None:
    program = programs() / "psql"
    done = subprocess.run(
        [str(program), "--no-psqlrc", "--set", "ON_ERROR_STOP=1", dsn],
        input=sql, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["public", "none", "", "x" * 64, "a\0b"])
def test_an_impossible_role_is_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        grants("pgbackend", producers=[name])
