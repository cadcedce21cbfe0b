"""Sessions and prepared transactions that keep others waiting, or keep dead rows alive."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import asyncpg
import pytest

from tests.doctor.conftest import found, only
from tests.support.databases import Sql, connected, execute, query_value
from tests.support.polling import eventually

INSERT = "INSERT INTO pgbackend.events (id, source, type) VALUES ($1, '/s', 't')"


@asynccontextmanager
async def session(dsn: str, *statements: str, application: str) -> AsyncIterator[Sql]:
    """A session that has run these statements, and may be terminated by others."""
    connection = await asyncpg.connect(dsn, server_settings={"application_name": application})
    try:
        for statement in statements:
            await connection.execute(statement)
        yield connection
    finally:
        connection.terminate()


async def test_an_open_appender_is_named_with_its_query_and_the_line_ends_it(database: str) -> None:
    secret = "INSERT INTO pgbackend.events (id, source, type) VALUES ('hidden', '/s', 't') /* slow */"
    async with session(database, "BEGIN", secret, application="shop") as appender:
        finding = only(await found(database), "open-appender")
        assert finding.subject == f"pid {appender.get_server_pid()} (shop, role postgres)"
        assert finding.severity == "warning"
        assert "idle in transaction; last query: INSERT INTO pgbackend.events" in finding.what
        assert "hidden" not in finding.what, "literals may be secrets"
        assert finding.destroys
        assert "rolled back" in finding.destroys

        await execute(database, str(finding.cure))
        await eventually("the session has ended", appender.is_closed)
        assert await found(database) == []
        assert await query_value(database, "SELECT count(*) FROM pgbackend.events") == 0


async def test_an_appender_that_has_just_begun_is_no_finding(database: str) -> None:
    async with session(database, "BEGIN", INSERT.replace("$1", "'1'"), application="shop"):
        assert await found(database, appender_age=60.0, idle_age=60.0) == []


async def test_a_prepared_appender_is_named_by_its_gid_and_the_line_ends_it(database: str) -> None:
    gid = "it's \x1b[2J\nlost"
    async with session(database, "BEGIN", INSERT.replace("$1", "'1'"), application="shop") as connection:
        await connection.execute(f"PREPARE TRANSACTION '{gid.replace(chr(39), chr(39) * 2)}'")
        findings = await found(database)
    appender, prepared = only(findings, "open-appender"), only(findings, "prepared-transaction")
    assert appender.subject == prepared.subject == f"prepared transaction {gid}"
    assert appender.cure == prepared.cure
    assert str(prepared.cure).isprintable(), "it can be pasted"

    await execute(database, str(prepared.cure))
    assert await found(database) == []


async def test_a_transaction_that_holds_vacuum_back_is_named_with_the_dead_rows(database: str) -> None:
    await execute(
        database,
        "INSERT INTO pgbackend.subscriptions (name, ordering, shards) VALUES ('s', 'none', 1);"
        "INSERT INTO pgbackend.offsets (subscription, shard, shards, position, epoch) VALUES ('s', 0, 1, 0, 1)",
    )
    snapshot = "BEGIN ISOLATION LEVEL REPEATABLE READ", "SELECT 1"
    async with session(database, *snapshot, application="report") as reader:
        async with connected(database) as committer:
            for epoch in range(20):
                await committer.execute("UPDATE pgbackend.offsets SET epoch = $1", epoch)

        async def dead_rows() -> bool:
            return bool(
                await query_value(
                    database,
                    "SELECT n_dead_tup >= 20 FROM pg_stat_all_tables WHERE relid = 'pgbackend.offsets'::regclass",
                )
            )

        await eventually("the statistics know of the dead rows", dead_rows)
        findings = await found(database, dead_rows=20, table_bytes=1)
        holder = only(findings, "old-transaction")
        assert holder.subject.startswith(f"pid {reader.get_server_pid()} (report")
        assert "The log's tables have 2" in holder.what
        assert "does nothing for" in holder.what
        assert only(findings, "dead-rows").cure == 'VACUUM "pgbackend"."offsets";'
        assert {one.subject for one in findings if one.check == "bloat"} >= {"table offsets"}

        await execute(database, str(holder.cure))
        await eventually("the session has ended", reader.is_closed)
    await execute(database, str(only(findings, "dead-rows").cure))
    assert await found(database, dead_rows=20) == []


async def test_a_query_that_is_at_work_for_long_is_named(database: str) -> None:
    async with session(database, application="report") as reader, AsyncExitStack() as stack:
        pid = reader.get_server_pid()
        running = asyncio.create_task(reader.execute("SELECT pg_sleep(60)"))
        stack.callback(running.cancel)

        async def is_found() -> bool:
            return any(one.subject.startswith(f"pid {pid} ") for one in await found(database))

        await eventually("the query is found", is_found)
        holder = only(await found(database), "old-transaction")
        assert "is at work; last query: SELECT pg_sleep(60)" in holder.what
        await execute(database, str(holder.cure))
        with pytest.raises(asyncpg.PostgresError):
            await running


async def test_a_session_that_locks_the_log_is_named_with_those_that_wait(database: str) -> None:
    lock = "BEGIN", "LOCK TABLE pgbackend.offsets IN ACCESS EXCLUSIVE MODE"
    async with session(database, *lock, application="migrator") as blocker, connected(database) as waiting:
        task = asyncio.create_task(waiting.fetch("SELECT * FROM pgbackend.offsets"))

        async def waits() -> bool:
            return bool(await query_value(database, "SELECT true FROM pg_locks WHERE NOT granted LIMIT 1"))

        await eventually("the other session waits", waits)
        findings = await found(database)
        finding = only(findings, "lock-wait")
        assert finding.subject.startswith(f"pid {blocker.get_server_pid()} (migrator")
        assert f"pid {waiting.get_server_pid()}" in finding.what
        assert "offsets that conflicts with AccessShareLock" in finding.what
        blind = {one.subject for one in findings if one.check == "not-examined"}
        assert "subscriptions" in blind, "a look that would wait becomes a note"
        assert "tables" not in blind, "and hides no other look"

        await execute(database, str(finding.cure))
        assert await task == []


async def test_a_queue_of_notifications_that_fills_names_the_oldest_transactions(database: str) -> None:
    async with session(database, "LISTEN c", "BEGIN", "SELECT 1", application="deaf") as listener:
        async with connected(database) as producer:
            await producer.execute("SELECT pg_notify('c', repeat('x', 7000) || n) FROM generate_series(1, 500) AS n")
        finding = only(await found(database, notify_queue=1e-5), "notification-queue")
        assert f"pid {listener.get_server_pid()} (deaf)" in finding.what
        await execute(database, str(finding.cure))
        await eventually("the session has ended", listener.is_closed)

    async def is_free() -> bool:
        # Any listener's next turn empties the queue.
        return not [one for one in await found(database, notify_queue=1e-5) if one.check == "notification-queue"]

    await eventually("the queue is empty", is_free)
