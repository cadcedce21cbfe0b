"""A follower misses nothing, without a subscription."""

import asyncio
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import asyncpg
import pytest

from pgbackend import Backend, DatabaseError
from pgbackend.log.follower import Follower
from pgbackend.log.log import Log
from pgbackend.log.notify import channel
from pgbackend.log.ranges import RangeSet
from pgbackend.postgres.grants import grants
from pgbackend.postgres.pool import Database
from tests.support.databases import Sql
from tests.support.events import make_event

INSERT = "INSERT INTO pgbackend.events (id, source, type) VALUES ($1, '/plain', 'sql')"


@pytest.fixture
async def log(database: str) -> AsyncIterator[Log]:
    opened = Database(database)
    await opened.open()
    log = Log(opened, schema="pgbackend", hole_wait=0.1)
    await log.incarnation.enter()
    yield log
    await opened.close()


def follow(log: Log, *, strict: bool = False, poll_interval: float = 0.1) -> Follower:
    return Follower(
        log, after=0, holes=RangeSet(), strict=strict, channel=channel("pgbackend"), poll_interval=poll_interval
    )


async def take(follower: Follower, count: int) -> list[str]:
    ids: list[str] = []
    async with asyncio.timeout(30):
        while len(ids) < count:
            ids += [event.id for event in (await follower.next()).events]
    return ids


async def test_it_goes_on_in_the_next_life_of_the_server(log: Log, backend: Backend, sql: Sql) -> None:
    follower = follow(log)
    await backend.produce(make_event("before"))
    assert await take(follower, 1) == ["before"]
    await sql.execute("DELETE FROM pgbackend.incarnation")
    await backend.produce(make_event("after"))
    assert await take(follower, 1) == ["after"]
    await follower.close()


@pytest.mark.direct
async def test_it_waits_out_lost_connections(log: Log, backend: Backend, sql: Sql) -> None:
    follower = follow(log)
    await backend.produce(make_event("before"))
    assert await take(follower, 1) == ["before"]
    taking = asyncio.create_task(take(follower, 2))
    for id_ in ("one", "two"):
        await sql.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )
        await sql.execute(INSERT, id_)
    assert await taking == ["one", "two"]
    await follower.close()


async def test_a_role_that_may_not_read_events_is_not_kept_waiting(log: Log, database: str, sql: Sql) -> None:
    role = f"blind_{urlsplit(database).path[-12:]}"
    await sql.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'secret'; " + grants("pgbackend", operators=[role]))
    try:
        opened = Database(
            urlsplit(database)._replace(netloc=f"{role}:secret@{urlsplit(database).netloc.rpartition('@')[2]}").geturl()
        )
        await opened.open()
        blind = Log(opened, schema="pgbackend", hole_wait=0.1)
        await blind.incarnation.enter()
        with pytest.raises(DatabaseError, match="--reader to follow"):
            await take(follow(blind), 1)
        await opened.close()
    finally:
        await sql.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


@pytest.mark.direct
async def test_it_is_woken_by_a_notification(log: Log, backend: Backend) -> None:
    follower = follow(log, poll_interval=600.0)
    taking = asyncio.create_task(take(follower, 2))
    await backend.produce(make_event("one"))
    await asyncio.wait({taking}, timeout=0.1)
    await backend.produce(make_event("two"))
    assert await taking == ["one", "two"]
    await follower.close()


async def test_a_late_event_is_expected_in_a_hole_until_it_comes(log: Log, database: str, sql: Sql) -> None:
    follower = follow(log)
    connection = await asyncpg.connect(database)
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute(INSERT, "late")
    await sql.execute(INSERT, "early")
    assert await take(follower, 1) == ["early"]
    assert list(follower.holes) == [(1, 2)]
    await transaction.commit()
    await connection.close()
    assert await take(follower, 1) == ["late"]
    assert not follower.holes
    await follower.close()


async def test_a_strict_one_keeps_the_order_of_positions(log: Log, database: str, sql: Sql) -> None:
    follower = follow(log, strict=True)
    connection = await asyncpg.connect(database)
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute(INSERT, "first")
    await sql.execute(INSERT, "second")
    taking = asyncio.create_task(take(follower, 2))
    await asyncio.wait({taking}, timeout=0.5)
    assert not taking.done()
    await transaction.commit()
    await connection.close()
    assert await taking == ["first", "second"]
    await follower.close()
