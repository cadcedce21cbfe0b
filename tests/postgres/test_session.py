"""Session settings of the role, the database, the server or the DSN do not change what the log does."""

from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from urllib.parse import quote

import asyncpg
import pytest

from pgbackend import Backend, Event, Retry
from pgbackend.errors import ConfigError, DatabaseError
from pgbackend.facts import Recorder
from pgbackend.postgres import schema
from pgbackend.postgres.pool import Database
from tests.support.dispatchers import Catch
from tests.support.events import make_event
from tests.support.polling import eventually
from tests.support.pooler import Pooler, needs_pgbouncer

STRANGE = {
    "array_nulls": "off",
    "backslash_quote": "off",
    "bytea_output": "escape",
    "datestyle": "SQL, DMY",
    "default_transaction_deferrable": "on",
    "enable_seqscan": "off",
    "escape_string_warning": "on",
    "extra_float_digits": "-15",
    "intervalstyle": "iso_8601",
    "lc_messages": "C",
    "plan_cache_mode": "force_custom_plan",
    "quote_all_identifiers": "on",
    "search_path": "",
    "standard_conforming_strings": "off",
    "timezone": "Asia/Kathmandu",
    "transform_null_equals": "on",
    "xmlbinary": "hex",
}
HASTY = {
    "idle_in_transaction_session_timeout": "1ms",
    "idle_session_timeout": "300ms",
    "lock_timeout": "1ms",
    "statement_timeout": "300ms",
}
SETTINGS = {
    "repeatable read": {"default_transaction_isolation": "repeatable read"},
    "serializable": {"default_transaction_isolation": "serializable"},
    "strange": STRANGE,
}


@pytest.fixture
def bouncer(server: str) -> Iterator[Pooler]:
    with Pooler(server) as running:
        yield running


async def set_for(dsn: str, settings: dict[str, str]) -> None:
    connection = await asyncpg.connect(dsn)
    name = await connection.fetchval("SELECT quote_ident(current_database())")
    for setting, value in settings.items():
        await connection.execute(f"ALTER DATABASE {name} SET {setting} = '{value}'")
    await connection.close()


async def use_everything(dsn: str) -> None:
    """Make every call, with several workers that change the same rows, and retries."""
    failed: set[str] = set()

    def fails_once(event: Event) -> bool:
        if event.id.endswith("0") and event.id not in failed:
            failed.add(event.id)
            return True
        return False

    catch, again = Catch(fails_once), Catch()
    ids = [str(number) for number in range(100)]
    with Recorder() as recorder:
        async with Backend(dsn, poll_interval=0.2) as one, Backend(dsn, poll_interval=0.2) as other:
            for backend in (one, other):
                await backend.subscribe("s", catch, shards=4, order="key", retry=Retry(delay=0.01))
            await one.produce(make_event("first"))
            await other.produce_many([make_event(id_) for id_ in ids])
            await catch.has("first", *ids)
            await one.reshard("s", 2)
            await one.alter_subscription("s", order="none", end=None, start="earliest")
            await one.subscribe("dated", again, start=datetime(2020, 2, 1, tzinfo=UTC))
            await again.has("first", *ids)
            await one.produce(make_event("last"))
            await catch.has("last")
            await one.seek("dated", "latest")
            await one.probe()
            assert (await other.status()).subscriptions
        lost = [fact for fact in recorder.facts if fact.name in ("presence lost", "lease lost", "claim failed")]
    assert not lost


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
async def test_settings_of_the_database_change_nothing(empty_database: str, settings: dict[str, str]) -> None:
    await set_for(empty_database, settings)
    await use_everything(empty_database)


@pytest.mark.direct
async def test_timeouts_of_the_database_or_the_dsn_change_nothing(empty_database: str) -> None:
    await set_for(empty_database, HASTY)
    options = "".join(f"&{name}={quote(value)}" for name, value in HASTY.items())
    await use_everything(empty_database + ("" if "?" in empty_database else "?") + options)


@pytest.mark.direct
@needs_pgbouncer
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
async def test_behind_a_pooler_settings_of_the_database_change_nothing(
    bouncer: Pooler, empty_database: str, settings: dict[str, str]
) -> None:
    await set_for(empty_database, settings)
    await use_everything(bouncer.dsn(empty_database))


@pytest.mark.direct
async def test_the_connection_of_the_leases_survives_an_idle_timeout(database: str) -> None:
    await set_for(database, {"idle_session_timeout": "500ms"})
    observer = await asyncpg.connect(database, server_settings={"idle_session_timeout": "0"})
    with Recorder() as recorder:
        async with Backend(database, lease_timeout=3.0) as backend:
            await backend.subscribe("s", Catch())
            await recorder.wait("lease claimed")
            first = await observer.fetchval("SELECT heartbeat_at FROM pgbackend.workers")

            async def renewed() -> bool:
                seconds = "SELECT extract(epoch FROM heartbeat_at - $1) FROM pgbackend.workers"
                return bool(await observer.fetchval(seconds, first) > 2)

            await eventually("the lease is renewed several times", renewed)
        assert not recorder.all("presence lost")
    await observer.close()


@pytest.mark.parametrize("name", ["synchronous_commit", "search_path", "TimeZone", "default_transaction_read_only"])
@pytest.mark.direct
async def test_settings_that_are_the_users_stay(empty_database: str, name: str) -> None:
    mine = {"synchronous_commit": "local", "search_path": "mine", "TimeZone": "Asia/Kathmandu"}.get(name, "on")
    await set_for(empty_database, {name: mine})
    connection = await Database(empty_database).connect()
    assert await connection.fetchval("SELECT current_setting($1)", name) == mine
    await connection.close()


@pytest.mark.direct
@needs_pgbouncer
async def test_a_pooler_that_hides_warnings_is_refused(bouncer: Pooler, database: str) -> None:
    await set_for(database, {"client_min_messages": "error"})
    with pytest.raises(ConfigError, match="client_min_messages"):
        await Backend(bouncer.dsn(database)).init()


# Transactions that PostgreSQL rolls back to resolve a conflict.

CONFLICTS = """
    CREATE SEQUENCE public.conflicts;
    CREATE FUNCTION public.conflict() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF nextval('public.conflicts') % 20 IN (1, 2) THEN
            RAISE 'made up' USING ERRCODE = TG_ARGV[0];
        END IF;
        RETURN NULL;
    END $$;"""


@pytest.fixture
async def owner(database: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    connection = await asyncpg.connect(database)
    await connection.execute(CONFLICTS)
    yield connection
    await connection.close()


@pytest.mark.owner
@pytest.mark.parametrize("sqlstate", ["40001", "40P01"])
@pytest.mark.parametrize("table", ["events", "subscriptions", "offsets", "workers", "redeliveries", "dead_letters"])
async def test_a_transaction_that_was_rolled_back_for_a_conflict_is_repeated(
    database: str, owner: "asyncpg.Connection[asyncpg.Record]", table: str, sqlstate: str
) -> None:
    await owner.execute(
        f"CREATE TRIGGER conflict AFTER INSERT OR UPDATE OR DELETE ON pgbackend.{table} "
        f"FOR EACH STATEMENT EXECUTE FUNCTION public.conflict('{sqlstate}')"
    )
    catch = Catch(lambda event: event.id == "bad")
    with Recorder() as recorder:
        async with Backend(database) as backend:
            await backend.subscribe("s", catch, retry=Retry(attempts=2, delay=0.0))
            await backend.produce(make_event("bad"))
            await backend.produce_many([make_event(str(number)) for number in range(5)])
            await backend.produce_many([make_event(str(number)) for number in range(5, 50)])
            await catch.has(*map(str, range(50)))
            await recorder.wait("event buried")
            await backend.seek("s", "latest")
            await backend.delete_subscription("s")

    assert await owner.fetchval("SELECT count(*) FROM pgbackend.events") == 51
    assert sorted(catch.ids) == sorted(map(str, range(50)))
    assert recorder.all("repeated after a conflict")
    assert not [fact for fact in recorder.facts if fact.name in ("presence lost", "claim failed", "commit failed")]


@pytest.mark.owner
async def test_a_migration_that_was_rolled_back_for_a_conflict_is_repeated(empty_database: str) -> None:
    connection = await asyncpg.connect(empty_database)
    await connection.execute(CONFLICTS.replace("RETURNS trigger", "RETURNS event_trigger").replace(
        "TG_ARGV[0]", "'40P01'").replace("RETURN NULL;", ""))  # fmt: skip
    await connection.execute("CREATE EVENT TRIGGER conflict ON ddl_command_end WHEN TAG IN ('CREATE SCHEMA') "
                             "EXECUTE FUNCTION public.conflict()")  # fmt: skip
    await schema.migrate(lambda: asyncpg.connect(empty_database), "pgbackend")
    assert await schema.find_revision(connection.fetch, "pgbackend") == schema.head()
    assert await connection.fetchval("SELECT last_value FROM public.conflicts") == 3
    await connection.close()


async def test_an_endless_conflict_is_an_error_after_the_timeout(database: str) -> None:
    there = Database(database)
    await there.open()
    with pytest.raises(DatabaseError, match="made up") as caught:
        await there.fetchval("DO $$ BEGIN RAISE 'made up' USING ERRCODE = '40001'; END $$", timeout=0.2)
    await there.close()
    assert caught.value.sqlstate == "40001"
