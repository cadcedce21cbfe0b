"""Statements of the hot path use index scans at a large backlog, with custom and with generic plans."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest

from pgbackend.postgres import schema
from pgbackend.postgres.sql import load
from pgbackend.postgres.sql.statements import (
    ConsoleSql,
    FenceSql,
    LogSql,
    OffsetsSql,
    OverviewSql,
    RedeliverySql,
    ShardsSql,
)
from tests.support.databases import connected

BACKLOG = 200_000
SUBSCRIPTIONS = 100
LOG = load(LogSql, "log", schema="pgbackend")
OFFSETS = load(OffsetsSql, "offsets", schema="pgbackend")
FENCE = load(FenceSql, "fence", schema="pgbackend")
REDELIVERY = load(RedeliverySql, "redelivery", schema="pgbackend")
OVERVIEW = load(OverviewSql, "overview", schema="pgbackend")
SHARDS = load(ShardsSql, "shards", schema="pgbackend")
CONSOLE = load(ConsoleSql, "console", schema="pgbackend")


@pytest.fixture(scope="module")
def backlog(server: str) -> Iterator[str]:
    """DSN of a log with a large backlog in three segments, and many subscriptions."""

    async def fill() -> None:
        await remove()
        connection = await asyncpg.connect(server)
        await connection.execute('CREATE DATABASE "pgbackend_plans"')
        await connection.close()
        await schema.migrate(lambda: asyncpg.connect(dsn), "pgbackend")
        connection = await asyncpg.connect(dsn)
        for start in (0, 9_990_000, 19_990_000):
            await connection.execute(f"SELECT setval('pgbackend.events_position_seq', {start + 1})")
            await connection.execute(f"""
                INSERT INTO pgbackend.events (id, source, type, subject, data)
                SELECT n, 'test', 'test', n % 1000, repeat('x', 200)::bytea
                FROM generate_series(1, {BACKLOG // 3}) n""")
        await connection.execute(f"""
            INSERT INTO pgbackend.subscriptions (name, ordering, shards)
            SELECT 'subscription ' || n, 'none', 1 FROM generate_series(1, {SUBSCRIPTIONS}) n""")
        await connection.execute("""
            INSERT INTO pgbackend.offsets (subscription, shard, shards, position, epoch, owner)
            SELECT name, 0, 1, 100, row_number() OVER (), '00000000-0000-0000-0000-000000000001'
            FROM pgbackend.subscriptions""")
        await connection.execute("""
            INSERT INTO pgbackend.redeliveries (subscription, position, key_hash, attempt, due_at, last_error)
            SELECT 'subscription 1', position, pgbackend.key_hash(partitionkey, subject, source, id),
                1, now(), 'failed' FROM pgbackend.events LIMIT 20000""")
        await connection.execute("INSERT INTO pgbackend.incarnation (id) VALUES (gen_random_uuid())")
        await bloat()
        await connection.execute("ANALYZE")
        await connection.close()

    async def bloat() -> None:
        """Commit offsets under a held snapshot, so that no old row version can be removed."""
        holder, committer = await asyncpg.connect(dsn), await asyncpg.connect(dsn)
        await holder.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        await holder.execute("SELECT 1")
        for _ in range(100):
            await committer.execute("UPDATE pgbackend.offsets SET position = position + 1")
        await holder.close()
        await committer.close()

    async def remove() -> None:
        connection = await asyncpg.connect(server)
        await connection.execute('DROP DATABASE IF EXISTS "pgbackend_plans" WITH (FORCE)')
        await connection.close()

    dsn = re.sub(r"/[^/?]*(?=\?|$)", "/pgbackend_plans", server, count=1) if "?" in server else _other(server)
    asyncio.run(fill())
    yield dsn
    asyncio.run(remove())


def _other(server: str) -> str:
    return server.rpartition("/")[0] + "/pgbackend_plans"


@pytest.fixture(params=["force_custom_plan", "force_generic_plan"])
async def connection(request: pytest.FixtureRequest, backlog: str) -> AsyncIterator[Any]:
    connection = await asyncpg.connect(backlog, server_settings={"plan_cache_mode": request.param})
    yield connection
    await connection.close()


@pytest.mark.parametrize("after", [0, 5_000, 9_995_000, 19_999_000, 20_056_000], ids=lambda after: f"after {after}")
async def test_a_page_is_read_in_the_order_of_the_primary_key(connection: Any, after: int) -> None:
    incarnation = await connection.fetchval(LOG.find_incarnation)
    plan = await explain(connection, LOG.read_page, after, incarnation, True)

    # Near the log's end, where less than a page is left, sorting that little is as good.
    assert all(node["Actual Rows"] < 1000 for node in nodes(plan, "Sort", "Incremental Sort"))
    assert scans_of_events(plan) <= {"Index Scan", "Bitmap Heap Scan"}
    assert rows_touched(plan) <= 1000
    # At most a block a row of 200 bytes would be 1000; in order of the key they lie together.
    assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < 300


@pytest.mark.parametrize("after", [0, 19_999_000], ids=lambda after: f"after {after}")
async def test_a_page_with_open_holes_reads_only_the_holes_and_the_page(connection: Any, after: int) -> None:
    incarnation = await connection.fetchval(LOG.find_incarnation)
    holes = "{" + ",".join(f"[{start},{start + 2})" for start in range(1_000_000, 1_002_000, 20)) + "}"
    plan = await explain(connection, LOG.read_page_and_holes, after, incarnation, True, holes, True)

    assert scans_of_events(plan) == {"Index Scan"}
    # Only the events that appeared in holes are sorted.
    assert all(node["Actual Rows"] <= 1000 for node in nodes(plan, "Sort"))
    assert rows_touched(plan) <= 1000


async def test_large_data_is_looked_up_by_position(connection: Any) -> None:
    incarnation = await connection.fetchval(LOG.find_incarnation)
    plan = await explain(connection, LOG.read_large, [2, 9_990_100, 19_990_100], incarnation)

    assert scans_of_events(plan) <= {"Index Scan", "Bitmap Heap Scan"}
    assert rows_touched(plan) == 3


@pytest.mark.parametrize(
    ("before", "after", "type_", "most"),
    [
        (2**63 - 1, 0, None, 501),
        (2**63 - 1, 20_056_000, None, 501),
        (19_999_000, 0, None, 501),
        # Nothing matches.
        (2**63 - 1, 0, "other", 10_000),
        (2**63 - 1, 20_056_000, "other", 10_000),
    ],
)
async def test_the_console_reads_the_newest_events_by_the_primary_key_and_no_more_than_it_shows_or_searches(
    connection: Any, before: int, after: int, type_: str | None, most: int
) -> None:
    async with connection.transaction():
        await connection.execute(CONSOLE.read_in_order)
        plan = await explain(connection, CONSOLE.search_events, before, after, 501, type_, None, None, None, None, None)

    assert scans_of_events(plan) == {"Index Scan"}
    assert not list(nodes(plan, "Sort", "Incremental Sort"))
    assert rows_touched(plan) <= most


async def test_offsets_are_committed_by_ctid(connection: Any) -> None:
    incarnation = await connection.fetchval(LOG.find_incarnation)
    rows = await connection.fetch("SELECT epoch, ctid, owner FROM pgbackend.offsets ORDER BY epoch LIMIT 3")
    count = len(rows)
    plan = await explain(
        connection, OFFSETS.commit_offsets,
        [row["epoch"] for row in rows], [row["ctid"] for row in rows], [200] * count, ["{[150,160)}"] * count,
        ["{}"] * count, [False] * count, rows[0]["owner"], incarnation,
    )  # fmt: skip

    assert {node["Node Type"] for node in on(plan, "offsets")} <= {"Tid Scan", "ModifyTable"}
    assert plan["Actual Rows"] == count


async def test_due_events_are_found_by_subscription_and_time(connection: Any) -> None:
    plan = await explain(
        connection, REDELIVERY.find_due, [1], ["subscription 1"], [0], [1], [200], [1 << 24], [1], [5], [False]
    )

    assert scans_of_events(plan) == {"Index Scan"}
    assert {node["Node Type"] for node in on(plan, "redeliveries")} == {"Index Scan"}
    # One of them is in flight already.
    assert max(node["Actual Rows"] * node["Actual Loops"] for node in on(plan, "redeliveries")) <= 201


async def test_failures_without_events_cost_one_index_lookup_each(connection: Any) -> None:
    plan = await explain(connection, REDELIVERY.find_gone, "subscription 1", 0, 1, [5])

    assert scans_of_events(plan) == {"Index Scan"}
    assert rows_touched(plan) <= 20_000


async def test_the_status_reads_one_event_for_each_thing_that_is_owed(connection: Any) -> None:
    """However large the backlog, and however many empty ranges are pending."""
    holes = ",".join(f"[{start},{start + 2})" for start in range(15_000_000, 15_004_000, 4))
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute(
        "UPDATE pgbackend.offsets SET pending = $1::text::int8multirange WHERE subscription = 'subscription 2'",
        f"{{{holes},[19990500,19990600)}}",
    )
    plan = await explain(connection, OVERVIEW.list_status)
    await transaction.rollback()

    assert scans_of_events(plan) == {"Index Scan"}
    # The next one of each, one that failed, and one that is pending (a thousandth of a row each time it was looked for,
    # which some versions round).
    assert SUBSCRIPTIONS <= rows_touched(plan) <= SUBSCRIPTIONS + 2


@pytest.mark.parametrize(
    ("view", "most"),
    [
        ("appenders", 0),
        ("worker_status", 0),
        # The first, the last, and a step for each time the number of positions can be halved.
        ("log_status", 2 + 26),
        ("rates", 2 + 61 * 26),
        # The next event of each subscription, and one that failed. `lag` asks for more, and reads the same.
        ("shard_lag", SUBSCRIPTIONS + 1),
        ("lag", SUBSCRIPTIONS + 1),
        ("lag WHERE subscription = 'subscription 1'", 2),
        # The last events twice: to find where they begin, and for the gaps among them.
        ("holes", 2 * 10_000 + 100),
    ],
)
async def test_no_view_of_the_status_scans_the_log(connection: Any, backlog: str, view: str, most: int) -> None:
    """Also while an appender is open."""
    async with connected(backlog) as appender:
        transaction = appender.transaction()
        await transaction.start()
        await appender.execute("INSERT INTO pgbackend.events (id, source, type) VALUES ('open', '/s', 't')")
        plan = await explain(connection, f"SELECT * FROM pgbackend.{view}")
        await transaction.rollback()

    assert scans_of_events(plan) <= {"Index Scan", "Index Only Scan"}
    assert rows_touched(plan) <= most


async def test_the_evidence_reads_no_event(connection: Any) -> None:
    plan = await explain(connection, FENCE.take_evidence)

    assert not scans_of_events(plan)


async def test_finding_the_position_of_a_date_reads_one_event(connection: Any) -> None:
    plan = await explain(connection, LOG.find_position, 19_990_500, datetime.now(UTC))

    assert rows_touched(plan) == 1


async def explain(connection: Any, statement: str, *args: object) -> dict[str, Any]:
    """The root of the plan that the statement ran with, as PostgreSQL's JSON. The changes are rolled back."""
    transaction = connection.transaction()
    await transaction.start()
    try:
        # PREPARE, because a prepared EXPLAIN would always plan its statement for the given values.
        types = [kind.name for kind in (await connection.prepare(statement)).get_parameters()]
        types = [kind.removesuffix("[]") + "[]" if kind.endswith("[]") else kind for kind in types]
        signature = f"({', '.join(types)})" if types else ""
        await connection.execute(f"PREPARE planned{signature} AS {statement}")
        literals = ", ".join([await connection.fetchval(f"SELECT quote_nullable($1::{kind}::text) || '::{kind}'", value)
                              for kind, value in zip(types, args, strict=True)])  # fmt: skip
        call = f"EXECUTE planned{f'({literals})' if literals else ''}"
        text = await connection.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {call}")
        return dict(json.loads(text)[0]["Plan"])
    finally:
        await transaction.rollback()
        await connection.execute("DEALLOCATE ALL")


def walk(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", []):
        yield from walk(child)


def nodes(plan: dict[str, Any], *kinds: str) -> list[dict[str, Any]]:
    return [node for node in walk(plan) if node["Node Type"] in kinds]


def on(plan: dict[str, Any], relation: str) -> list[dict[str, Any]]:
    return [node for node in walk(plan) if re.fullmatch(rf"{relation}(_\d+)?", node.get("Relation Name", ""))]


def scans_of_events(plan: dict[str, Any]) -> set[str]:
    """The types of scans of the segments of which at least one block was read."""
    return {
        node["Node Type"] for node in on(plan, "events") if node["Shared Hit Blocks"] + node["Shared Read Blocks"] > 0
    }


def rows_touched(plan: dict[str, Any]) -> int:
    """Rows of segments that were read, including those that a filter removed."""
    return sum(
        int((node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"])
        for node in on(plan, "events")
    )


async def test_a_switch_of_shards_reads_only_events_pending_in_some_shards(connection: Any) -> None:
    """Each range is one event, pending in one of the old shards but not in the other."""
    doubtful = "{" + ",".join(f"[{position},{position + 1})" for position in range(1_000, 1_200, 2)) + "}"
    plan = await explain(connection, SHARDS.find_events, doubtful, 2, 3)

    assert scans_of_events(plan) <= {"Index Scan", "Bitmap Heap Scan"}
    assert rows_touched(plan) <= 100
