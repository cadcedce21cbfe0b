import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgbackend.codec.attributes import COLUMNS
from pgbackend.codec.event import Event
from pgbackend.errors import ConnectionLostError
from pgbackend.log.incarnation import IncarnationChanged
from pgbackend.log.log import Log
from pgbackend.log.pages import PAGE_BYTES, PAGE_EVENTS, _read_by_halves
from pgbackend.log.ranges import RangeSet
from pgbackend.log.reader import Batch, Reader
from pgbackend.postgres.pool import Database
from tests.support.events import log_row
from tests.support.polling import eventually
from tests.support.producers import INSERT

BULK = "INSERT INTO pgbackend.events (id, source, type) SELECT n::text, 'test', 'test' FROM generate_series(1, $1) AS n"
LARGE = (
    "INSERT INTO pgbackend.events (id, source, type, data) SELECT n, 'test', 'test', $2 FROM unnest($1::text[]) AS n"
)


@pytest.fixture
async def log(database: str) -> AsyncIterator[Log]:
    opened = Database(database)
    await opened.open()
    log = Log(opened, schema="pgbackend", hole_wait=0.0)
    await log.incarnation.enter()
    yield log
    await opened.close()


@asynccontextmanager
async def appender(dsn: str, *ids: str) -> AsyncIterator[Any]:
    """An open transaction that has appended these events."""
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute("BEGIN")
        for id_ in ids:
            await connection.execute(INSERT, id_)
        yield connection
    finally:
        await connection.close()


def ids(batch: Batch) -> list[str]:
    return [event.id for event in batch.events]


class Follower:
    """A reader, and the passed holes that are still open, as a subscription knows them from its batches."""

    def __init__(self, log: Log, *, after: int = 0, holes: RangeSet | None = None, strict: bool = False) -> None:
        self.holes = RangeSet() if holes is None else holes.copy()
        self.reader = Reader(log, after=after, holes=self.holes, strict=strict)

    async def read(self, *, prove: bool = False) -> Batch:
        batch = await self.reader.read(prove=prove)
        for hole in batch.opened:
            self.holes.add(*hole)
        for hole in batch.closed:
            self.holes.remove(*hole)
        for position in batch.positions:
            self.holes.discard(position)
        return batch

    async def until(self, what: str, condition: Callable[[list[str]], object]) -> list[str]:
        """Read until the condition on all ids so far holds. Returns them."""
        seen: list[str] = []

        async def reached() -> bool:
            seen.extend(ids(await self.read(prove=True)))
            return bool(condition(seen))

        await eventually(what, reached, interval=0.001)
        return seen


async def test_the_log_is_read_in_pages_and_each_event_once(log: Log, sql: Any) -> None:
    await sql.execute(BULK, 2 * PAGE_EVENTS + 500)
    reader = Follower(log)
    batches = [await reader.read() for _ in range(4)]

    assert [len(batch.events) for batch in batches] == [PAGE_EVENTS, PAGE_EVENTS, 500, 0]
    assert [id_ for batch in batches for id_ in ids(batch)] == [str(n) for n in range(1, 2 * PAGE_EVENTS + 501)]
    assert [batch.pause for batch in batches] == [0.0, 0.0, None, None]
    for batch in batches:
        assert list(batch.positions) == [event.position for event in batch.events]


async def test_positions_that_were_rolled_back_leave_no_hole(log: Log, sql: Any) -> None:
    await sql.execute(INSERT, "a")
    await sql.execute("BEGIN")
    await sql.execute(BULK, 100_000)
    await sql.execute("ROLLBACK")
    await sql.execute(INSERT, "b")
    reader = Follower(log)

    seen = await reader.until("both are read", lambda seen: len(seen) == 2)

    assert seen == ["a", "b"]
    assert not reader.holes


async def test_a_proof_passes_a_rolled_back_end_of_the_log(log: Log, sql: Any) -> None:
    await sql.execute(INSERT, "a")
    await sql.execute("BEGIN")
    await sql.execute(BULK, 50)
    await sql.execute("ROLLBACK")
    reader = Follower(log)
    assert (await reader.read()).upto == 1
    batch = await reader.read(prove=True)

    assert (batch.upto, list(batch.opened)) == (51, [])


async def test_a_hole_as_large_as_a_bulk_load_is_one_range_and_what_appears_in_it_comes_in_pages(
    log: Log, database: str, sql: Any
) -> None:
    async with appender(database) as bulk:
        await bulk.execute(BULK, 3 * PAGE_EVENTS)
        await sql.execute(INSERT, "after")
        reader = Follower(log)
        assert await reader.until("the hole is passed", lambda seen: seen) == ["after"]
        assert reader.holes == RangeSet([(1, 3 * PAGE_EVENTS + 1)])
        await bulk.execute("COMMIT")
    seen = await reader.until("all have come", lambda seen: len(seen) >= 3 * PAGE_EVENTS)

    assert seen == [str(n) for n in range(1, 3 * PAGE_EVENTS + 1)]
    assert not reader.holes


async def test_an_event_never_comes_behind_one_of_its_own_transaction(log: Log, database: str, sql: Any) -> None:
    async with appender(database, "first") as late:
        await sql.execute(INSERT, "other")
        reader = Follower(log)
        assert await reader.until("the hole is passed", lambda seen: seen) == ["other"]
        await late.execute(INSERT, "second")
        await late.execute("COMMIT")
    await sql.execute(INSERT, "after")

    assert ids(await reader.read()) == ["first", "second", "after"]


async def test_a_strict_reader_waits_for_each_hole_and_keeps_log_order(log: Log, database: str, sql: Any) -> None:
    reader = Follower(log, strict=True)
    async with appender(database, "1") as one, appender(database, "2") as two:
        await sql.execute(INSERT, "3")
        for _ in range(5):
            batch = await reader.read(prove=True)
            assert (ids(batch), batch.upto) == ([], 0)
        assert reader.reader.is_blocked
        await two.execute("COMMIT")
        assert ids(await reader.read()) == []
        await one.execute("COMMIT")

    assert await reader.until("all three", lambda seen: len(seen) == 3) == ["1", "2", "3"]


async def test_a_reader_holds_a_bounded_number_of_events_behind_a_hole(log: Log, database: str, sql: Any) -> None:
    reader = Follower(log, strict=True)
    async with appender(database, "slow") as slow:
        await sql.execute(BULK, 12 * PAGE_EVENTS)
        for _ in range(30):
            await reader.read(prove=True)
        await slow.execute("COMMIT")
    batches: list[Batch] = []
    while sum(len(batch.events) for batch in batches) <= 12 * PAGE_EVENTS:
        batches.append(await reader.read())

    assert max(len(batch.events) for batch in batches) < 7 * PAGE_EVENTS, "all that was held comes at once"
    assert [id_ for batch in batches for id_ in ids(batch)] == ["slow", *(str(n + 1) for n in range(12 * PAGE_EVENTS))]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("end", ["COMMIT PREPARED 'p'", "ROLLBACK PREPARED 'p'"])
async def test_a_prepared_transaction_is_an_appender_like_any_other(
    log: Log, database: str, sql: Any, strict: bool, end: str
) -> None:
    if await sql.fetchval("SHOW max_prepared_transactions") == "0":
        pytest.skip("this server has max_prepared_transactions = 0")
    reader = Follower(log, strict=strict)
    async with appender(database, "prepared") as connection:
        await sql.execute(INSERT, "after")
        before = ids(await reader.read(prove=True))
        await connection.execute("PREPARE TRANSACTION 'p'")
    before += [id_ for _ in range(5) for id_ in ids(await reader.read(prove=True))]
    await sql.execute(end)
    seen = await reader.until("the hole is gone", lambda _: not reader.reader.is_blocked and not reader.holes)
    prepared = ["prepared"] if end.startswith("COMMIT") else []

    if strict:
        assert (before, seen) == ([], [*prepared, "after"])
    else:
        assert (set(before) | set(seen), len(before + seen)) == ({*prepared, "after"}, len(prepared) + 1)


async def test_a_savepoint_that_was_rolled_back_leaves_a_dead_hole(log: Log, database: str, sql: Any) -> None:
    async with appender(database, "1") as connection:
        await connection.execute("SAVEPOINT s")
        await connection.execute(INSERT, "2")
        await connection.execute("ROLLBACK TO s")
        await connection.execute(INSERT, "3")
        await connection.execute("COMMIT")
    reader = Follower(log, strict=True)

    assert await reader.until("both", lambda seen: len(seen) == 2) == ["1", "3"]


async def test_a_successor_goes_on_from_a_place_and_its_open_holes(log: Log, database: str, sql: Any) -> None:
    async with appender(database, "late") as late:
        await sql.execute(INSERT, "1")
        await sql.execute(INSERT, "2")
        first = Follower(log)
        await first.until("the hole is passed", lambda seen: len(seen) == 2)
        successor = Follower(log, after=2, holes=first.holes)
        assert ids(await successor.read()) == ["2"]
        await late.execute("COMMIT")

    assert await successor.until("the late one", lambda seen: seen) == ["late"]


@pytest.mark.parametrize("size", [16_384, 16_385, 1_000_000])
async def test_data_of_any_size_is_read_whole(log: Log, sql: Any, size: int) -> None:
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    await sql.execute(LARGE, ["a", "b"], data)
    await sql.execute(INSERT, "none")
    batch = await Follower(log).read()

    assert [event.data_bytes for event in batch.events] == [data, data, None]


async def test_a_page_of_large_data_is_bounded_and_nothing_is_left_out(log: Log, database: str, sql: Any) -> None:
    data = b"x" * 1_000_000
    count = 40
    await sql.execute(LARGE, [str(n) for n in range(count)], data)
    reader = Follower(log)
    batches: list[Batch] = []
    while sum(len(batch.events) for batch in batches) < count:
        batches.append(await reader.read())
        assert batches[-1].size <= PAGE_BYTES + 10_000_000
        assert batches[-1].pause == 0.0 or len(batches[-1].events) < 20

    assert len(batches) >= 3
    assert [id_ for batch in batches for id_ in ids(batch)] == [str(n) for n in range(count)]
    assert all(event.data_bytes == data for batch in batches for event in batch.events)


@pytest.mark.parametrize(
    ("column", "count", "size", "more"),
    [
        ("id", 400, 50_000, ""), ("partitionkey", 40, 1_000_000, ""), ("extensions", 40, 1_000_000, "😀"),
        ("subject", 2, 30_000_000, ""),
    ],
)  # fmt: skip
async def test_a_page_of_large_attributes_is_bounded_and_nothing_is_left_out(
    log: Log, sql: Any, column: str, count: int, size: int, more: str
) -> None:
    """Larger ones than the log accepts today, and text of which Python keeps four bytes for each character."""
    await sql.execute("ALTER TABLE pgbackend.events DROP CONSTRAINT events_valid")
    value = f'{{"a": "{"x" * size}{more}"}}' if column == "extensions" else "x" * size + more
    columns = {"id": "a", "source": "/s", "type": "t", "datacontenttype": "text/plain", column: value}
    await sql.execute(
        f"INSERT INTO pgbackend.events ({', '.join(columns)}) "
        f"SELECT {', '.join(f'${n}' for n in range(1, len(columns) + 1))} FROM generate_series(1, {count})",
        *columns.values(),
    )
    reader = Follower(log)
    positions: list[int] = []
    while len(positions) < count:
        batch = await reader.read()
        positions += batch.positions
        taken = sum(sys.getsizeof(part) for event in batch.events for part in event.row)
        assert taken <= batch.size
        assert batch.size <= PAGE_BYTES or len(batch.events) == 1
        assert all(event.row[COLUMNS.index(column)] == value for event in batch.events)

    assert positions == list(range(1, count + 1))


async def test_a_page_is_the_same_with_and_without_a_look_into_holes(log: Log, sql: Any) -> None:
    """Each has a statement of its own."""
    await sql.execute(BULK, 20)
    await sql.execute(LARGE, ["a", "b"], b"x" * 20_000)
    await sql.execute(LARGE, ["c"], b"small")
    alone = await log.pages.read(after=2, holes=RangeSet())
    with_holes = await log.pages.read(after=2, holes=RangeSet([(500, 501)]))

    assert alone == with_holes
    assert [event.recorded_at for event in alone.events] == [event.recorded_at for event in with_holes.events]
    assert len(alone.events) == 21


async def test_an_event_that_is_deleted_while_its_page_is_read_is_not_delivered(
    log: Log, sql: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = Database.fetch

    async def delete_before(self: Database, statement: str, *args: Any, **options: Any) -> Any:
        if "read_large" in statement:
            await sql.execute("DELETE FROM pgbackend.events WHERE id = 'a'")
        return await fetch(self, statement, *args, **options)

    await sql.execute(LARGE, ["a", "b"], b"x" * 20_000)
    monkeypatch.setattr(Database, "fetch", delete_before)
    reader = Follower(log)

    assert await reader.until("the other one", bool) == ["b"]


async def test_late_events_with_large_data_are_read_whole_and_in_order(log: Log, database: str, sql: Any) -> None:
    data = b"x" * 1_000_000
    async with appender(database) as late:
        await late.execute(LARGE, [str(n) for n in range(30)], data)
        await sql.execute(INSERT, "after")
        reader = Follower(log)
        assert await reader.until("the hole is passed", lambda seen: seen) == ["after"]
        await late.execute(INSERT, "30")
        await late.execute("COMMIT")
    seen = await reader.until("all of them", lambda seen: len(seen) >= 31)

    assert seen == [str(n) for n in range(31)]


async def test_an_event_never_gets_its_large_data_from_another_incarnation(
    log: Log, sql: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large data is read in a second step. After a crash in between, another event may have the position."""
    fetch = Database.fetch

    async def crash_between(self: Database, statement: str, *args: Any, **options: Any) -> Any:
        if "read_large" in statement:
            await sql.execute("UPDATE pgbackend.incarnation SET id = gen_random_uuid()")
        return await fetch(self, statement, *args, **options)

    await sql.execute(LARGE, ["a"], b"x" * 20_000)
    monkeypatch.setattr(Database, "fetch", crash_between)

    with pytest.raises(IncarnationChanged):
        await Follower(log).read()


async def test_a_reader_stops_in_another_incarnation(log: Log, sql: Any) -> None:
    await sql.execute(INSERT, "a")
    reader = Follower(log)
    await sql.execute("UPDATE pgbackend.incarnation SET id = gen_random_uuid()")

    with pytest.raises(IncarnationChanged):
        await reader.read()
    with pytest.raises(IncarnationChanged):
        await reader.read(prove=True)
    await sql.execute("TRUNCATE pgbackend.incarnation")
    with pytest.raises(IncarnationChanged):
        await reader.read()


async def test_unrelated_transactions_are_no_appenders(log: Log, sql: Any, database: str) -> None:
    other = await asyncpg.connect(database)
    await other.execute("CREATE TABLE unrelated (n int)")
    await other.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    await other.execute("INSERT INTO unrelated VALUES (1)")
    await other.execute("SELECT count(*) FROM pgbackend.events")
    evidence = await log.check()
    await other.close()

    assert evidence.appenders == frozenset()


async def test_in_another_incarnation_no_appender_is_overdue(log: Log, sql: Any) -> None:
    """The server numbers transactions from the beginning: a new appender may have the name of an overdue one."""
    await log.check()
    log.clock.observe(["3/17"], now=0.0)
    assert log.clock.is_overdue("3/17", now=1.0)
    await sql.execute("DELETE FROM pgbackend.incarnation")
    await log.incarnation.enter()
    await log.check()

    assert not log.clock.is_overdue("3/17", now=1.0)


async def test_rows_that_cannot_be_decoded_are_found_among_the_others() -> None:
    bad = {3, 4, 11}
    reads: list[int] = []

    async def read(positions: Sequence[int]) -> Any:
        reads.append(len(positions))
        if broken := bad & set(positions):
            raise OverflowError(f"no date at {min(broken)}")
        return list(positions)

    rows, errors = await _read_by_halves(read, range(1, 101))

    assert cast("list[int]", rows) == [position for position in range(1, 101) if position not in bad]
    assert errors == {position: f"OverflowError: no date at {position}" for position in bad}
    assert len(reads) < 40


async def test_a_connection_lost_while_segments_are_looked_up_loses_no_event(
    log: Log, database: str, sql: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_segments, failures = Log.find_segments, 0

    async def fail_once(self: Log) -> Any:
        nonlocal failures
        failures += 1
        if failures == 1:
            raise ConnectionLostError("gone")
        return await find_segments(self)

    async with appender(database, "late") as late:
        await sql.execute(INSERT, "a")
        reader = Follower(log)
        assert await reader.until("the hole is passed", lambda seen: seen) == ["a"]
        await late.execute("COMMIT")
    await sql.execute("SELECT setval('pgbackend.events_position_seq', 10000005)")
    await sql.execute(INSERT, "in the next segment")
    monkeypatch.setattr(Log, "find_segments", fail_once)
    seen = await reader.until("both", lambda seen: len(seen) >= 2)

    assert seen == ["late", "in the next segment"]
    assert failures > 1


@given(
    positions=st.sets(st.integers(1, 30)), hashes=st.lists(st.integers(0, 99), min_size=30, max_size=30),
    shards=st.integers(2, 5), upto=st.integers(0, 31),
)  # fmt: skip
def test_a_share_of_a_batch_has_the_events_of_its_shard_and_the_others_are_known(
    positions: set[int], hashes: list[int], shards: int, upto: int
) -> None:
    events = [Event(log_row(position, key_hash=hashes[position - 1])) for position in sorted(positions)]
    batch = Batch(
        events=events, positions=sorted(positions), sizes=[position * 10 for position in sorted(positions)], size=0,
        upto=30, opened=(), closed=(), removed=(), unreadable=(), pause=None,
    )  # fmt: skip
    for shard in range(shards):
        wanted = [one for one in events if one.key_hash % shards == shard]
        share = batch.share(shard=shard, shards=shards)
        assert share.events == wanted
        assert share.positions == [event.position for event in wanted]
        assert share.sizes == [event.position * 10 for event in wanted]
        others = [one.position for one in events if one not in wanted and one.position <= upto]
        assert batch.others(share, upto=upto) == RangeSet.of(others)
