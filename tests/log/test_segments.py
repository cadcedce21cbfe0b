import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import asyncpg
import pytest

from pgbackend.errors import DatabaseError
from pgbackend.facts import Recorder
from pgbackend.log.segments import AHEAD_POSITIONS, AHEAD_SEGMENTS, Reach, Segments
from pgbackend.postgres import schema
from pgbackend.postgres.pool import Database
from tests.support.databases import connected

INSERT = "INSERT INTO pgbackend.events (id, source, type) VALUES ($1, '/plain', 'sql')"
BOUNDS = """
    SELECT relname::text, pg_get_expr(relpartbound, oid)
    FROM pg_class
    JOIN pg_inherits ON inhrelid = oid AND inhparent = 'pgbackend.events'::regclass
    ORDER BY length(relname), relname"""

MAKE = "SELECT lower_bound FROM pgbackend.make_segment()"

WAITING = """
    SELECT count(*)
    FROM pg_locks
    JOIN pg_database ON pg_database.oid = database AND datname = current_database()
    WHERE relation = 'pgbackend.events'::regclass AND NOT granted"""


@pytest.fixture
async def log(empty_database: str) -> str:
    """DSN of a migrated log with one segment, 500 positions wide."""
    await schema.migrate(lambda: asyncpg.connect(empty_database), "pgbackend")
    async with connected(empty_database) as connection:
        for name, _ in await connection.fetch(BOUNDS):
            await connection.execute(f"DROP TABLE pgbackend.{name}")
        await connection.execute(
            "CREATE TABLE pgbackend.events_0 PARTITION OF pgbackend.events FOR VALUES FROM (0) TO (500)"
        )
    return empty_database


@asynccontextmanager
async def segments_of(dsn: str, name: str = "pgbackend") -> AsyncIterator[Segments]:
    database = Database(dsn)
    await database.open()
    try:
        yield Segments(database, schema=name)
    finally:
        await database.close()


def test_enough_is_the_lesser_of_positions_and_segments() -> None:
    wide, narrow = 10_000_000, 500
    assert Reach(0, AHEAD_POSITIONS - wide, AHEAD_POSITIONS).is_enough
    assert not Reach(1, AHEAD_POSITIONS - wide, AHEAD_POSITIONS).is_enough
    assert Reach(0, narrow * (AHEAD_SEGMENTS - 1), narrow * AHEAD_SEGMENTS).is_enough
    assert not Reach(1, narrow * (AHEAD_SEGMENTS - 1), narrow * AHEAD_SEGMENTS).is_enough
    assert not Reach(0, None, None).is_enough


@pytest.mark.parametrize("width", [500, 10_000_000])
async def test_the_function_makes_as_much_as_is_enough_and_no_more(log: str, width: int) -> None:
    async with segments_of(log) as segments, connected(log) as connection:
        await connection.execute("DROP TABLE pgbackend.events_0")
        await connection.execute(
            f"CREATE TABLE pgbackend.events_0 PARTITION OF pgbackend.events FOR VALUES FROM (0) TO ({width})"
        )
        await segments.extend()
        reach = await segments.find_reach()
        assert reach.is_enough
        assert await connection.fetchval(MAKE) is None

        # The last position at which the segments are enough, and the first at which they are not.
        head = (reach.upper or 0) - min(AHEAD_POSITIONS, AHEAD_SEGMENTS * width)
        await connection.execute(f"ALTER TABLE pgbackend.events ALTER COLUMN position RESTART WITH {head}")
        assert (await segments.find_reach()).is_enough
        assert await connection.fetchval(MAKE) is None
        await connection.execute(f"ALTER TABLE pgbackend.events ALTER COLUMN position RESTART WITH {head + 1}")
        assert not (await segments.find_reach()).is_enough
        assert await connection.fetchval(MAKE) == reach.upper


async def test_a_log_without_any_segment_gets_the_one_of_its_head(log: str) -> None:
    async with segments_of(log) as segments, connected(log) as connection:
        await connection.execute("DROP TABLE pgbackend.events_0")
        await connection.execute("ALTER TABLE pgbackend.events ALTER COLUMN position RESTART WITH 123456789")
        await segments.extend()
        rows = await connection.fetch(BOUNDS)

    assert tuple(rows[0]) == ("events_120000000", "FOR VALUES FROM ('120000000') TO ('130000000')")


@pytest.mark.parametrize(("head", "first"), [(499, 500), (500, 500), (5_120, 5_000)])
async def test_positions_used_up_by_failed_appends_get_no_segments(log: str, head: int, first: int) -> None:
    async with connected(log) as connection:
        await connection.execute(f"ALTER TABLE pgbackend.events ALTER COLUMN position RESTART WITH {head}")
        assert await connection.fetchval(MAKE) is not None
        rows = await connection.fetch(BOUNDS)

    assert rows[1][1] == f"FOR VALUES FROM ('{first}') TO ('{first + 500}')"


async def test_settings_of_the_session_do_not_change_the_segment(log: str) -> None:
    """The function runs with the owner's rights in the caller's session."""
    settings = {
        "search_path": "elsewhere", "standard_conforming_strings": "off", "quote_all_identifiers": "on",
        "lock_timeout": "1ms", "escape_string_warning": "off",
    }  # fmt: skip
    async with connected(log) as owner, connected(log, **settings) as connection:
        await owner.execute("CREATE SCHEMA elsewhere")
        await owner.execute("CREATE TABLE elsewhere.events_500 ()")
        assert await connection.fetchval(MAKE) == 500
        rows = await owner.fetch(BOUNDS)

    assert tuple(rows[1]) == ("events_500", "FOR VALUES FROM ('500') TO ('1000')")


async def test_a_log_whose_schema_was_renamed_gets_its_segments(log: str) -> None:
    async with connected(log) as connection:
        await connection.execute('ALTER SCHEMA pgbackend RENAME TO "Moved \'s"')
        async with segments_of(log, "Moved 's") as segments:
            assert await segments.extend() > 500 * AHEAD_SEGMENTS


async def test_default_privileges_allow_no_writes_into_a_segment(log: str) -> None:
    role = "reporter_" + urlsplit(log).path[-12:]
    writing = "SELECT has_table_privilege($1, 'pgbackend.events_500', 'INSERT, UPDATE, DELETE, TRUNCATE')"
    async with connected(log) as connection:
        await connection.execute(f"CREATE ROLE {role}")
        try:
            for grantee in (role, "PUBLIC"):
                await connection.execute(f"ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO {grantee}")
            assert await connection.fetchval(MAKE) is not None

            assert not await connection.fetchval(writing, role)
            assert await connection.fetchval("SELECT has_table_privilege($1, 'pgbackend.events_500', 'SELECT')", role)
        finally:
            await connection.execute(f"DROP OWNED BY {role}")
            await connection.execute(f"DROP ROLE {role}")


async def test_segments_are_extended_once_and_then_left_alone(log: str) -> None:
    async with segments_of(log) as segments, connected(log) as connection:
        with Recorder() as recorder:
            until = await segments.extend()
            made = len(recorder.all("segment made"))
            assert await segments.extend() == until
        rows = await connection.fetch(BOUNDS)

    assert until == 1 + 500 * AHEAD_SEGMENTS + 499
    assert len(rows) == made + 1 == until // 500
    assert [tuple(row) for row in rows[:3]] == [
        ("events_0", "FOR VALUES FROM ('0') TO ('500')"),
        ("events_500", "FOR VALUES FROM ('500') TO ('1000')"),
        ("events_1000", "FOR VALUES FROM ('1000') TO ('1500')"),
    ]
    assert len(recorder.all("segment made")) == made


async def test_the_segments_of_the_first_migration_are_extended_in_their_width(empty_database: str) -> None:
    name = 'of "many"%s:words {lower}'
    await schema.migrate(lambda: asyncpg.connect(empty_database), name)
    async with segments_of(empty_database, name) as segments:
        assert await segments.extend() == 110_000_000


async def test_many_workers_extend_at_once_and_each_segment_is_made_once(log: str) -> None:
    async with asyncio.TaskGroup() as tasks, segments_of(log) as one, segments_of(log) as other:
        with Recorder() as recorder:
            extending = [tasks.create_task(segments.extend()) for segments in (one, other) for _ in range(4)]
            reached = [await task for task in extending]
        # Some calls found another one at work and returned early. Enough segments are ahead all the same.
        until = await one.extend()

    made = [int(str(fact["lower"])) for fact in recorder.all("segment made")]
    # In any order, because sessions report after their commits.
    assert len(made) == len(set(made))
    assert max(reached) == until


async def test_new_segments_have_the_constraints_of_the_log(log: str) -> None:
    async with connected(log) as connection:
        assert await connection.fetchval(MAKE) is not None
        await connection.execute("ALTER TABLE pgbackend.events ALTER COLUMN position RESTART WITH 600")

        row = await connection.fetchrow(INSERT + " RETURNING tableoid::regclass::text, position, recorded_at", "x")
        with pytest.raises(asyncpg.CheckViolationError, match='attribute "id" is empty'):
            await connection.execute(INSERT, "")

    assert row is not None
    assert tuple(row)[:2] == ("pgbackend.events_500", 600)
    assert row["recorded_at"] is not None


async def test_an_open_appender_and_a_new_segment_make_no_producer_wait(log: str) -> None:
    async with (
        segments_of(log) as segments,
        connected(log) as slow,
        connected(log, lock_timeout="10s") as quick,
        slow.transaction(),
    ):
        await slow.execute(INSERT, "slow")

        extending = asyncio.create_task(segments.extend())
        for number in range(50):
            await quick.execute(INSERT, str(number))
        until = await asyncio.wait_for(extending, 30)
        await quick.execute(INSERT, "last")

    assert until > 500 * AHEAD_SEGMENTS


async def test_producers_in_plain_sql_never_see_the_end_of_the_segments(log: str) -> None:
    """4 producers cross a new segment every few milliseconds, while an appender stays open."""
    deadline = time.monotonic() + 60

    async def produce(name: str) -> None:
        # A producer that waited behind the open appender would wait for ever.
        async with connected(log, lock_timeout="10s") as connection:
            for number in range(100):
                await connection.executemany(INSERT, [(f"{name}-{number}-{n}",) for n in range(20)])

    async with segments_of(log) as segments, connected(log) as slow, connected(log) as reader:
        await segments.extend()
        async with slow.transaction():
            await slow.execute(INSERT, "slow")
            producers = [asyncio.create_task(produce(str(number))) for number in range(4)]
            while not all(producer.done() for producer in producers):
                assert time.monotonic() < deadline
                await segments.extend()
                await asyncio.sleep(0)
            for producer in producers:
                await producer
        rows = await reader.fetchval("SELECT count(*) FROM pgbackend.events")
        crossed = await reader.fetchval("SELECT count(DISTINCT tableoid) FROM pgbackend.events")

    assert rows == 4 * 100 * 20 + 1
    assert crossed >= 16


async def test_extending_gives_way_to_a_lock_on_the_table_and_goes_on_later(log: str) -> None:
    async with segments_of(log) as segments, connected(log) as operator:
        with Recorder() as recorder:
            async with operator.transaction():
                await operator.execute("LOCK TABLE pgbackend.events IN SHARE UPDATE EXCLUSIVE MODE")
                assert await segments.extend() == 500
            assert recorder.all("segment not made yet")

        assert await segments.extend() > 500


async def test_an_append_without_a_segment_waits_for_the_one_that_is_being_made(log: str) -> None:
    lock = "LOCK TABLE ONLY pgbackend.events IN SHARE UPDATE EXCLUSIVE MODE"
    async with segments_of(log) as segments, connected(log) as other, connected(log) as producer:
        await producer.execute("ALTER TABLE pgbackend.events ALTER COLUMN position RESTART WITH 500")
        with pytest.raises(asyncpg.CheckViolationError, match="no partition"):
            await producer.execute(INSERT, "too early")

        async with other.transaction():
            await other.execute(lock)
            extending = asyncio.create_task(segments.extend())
            while not await producer.fetchval(WAITING):
                assert not extending.done()
        await extending

        await producer.execute(INSERT, "in time")


async def test_a_stray_table_in_the_way_is_an_error_that_names_it(log: str) -> None:
    async with segments_of(log) as segments, connected(log) as connection:
        await connection.execute("CREATE TABLE pgbackend.events_500 ()")

        with pytest.raises(DatabaseError, match="events_500"):
            await segments.extend()
