"""A primary dies and its standby takes over: nothing acknowledged is lost that must not be. See docs/failover.md."""

import asyncio
import itertools
import random
import signal
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from pgbackend import Backend, ConnectionLostError, PgBackendError, ProbeError, ProduceUncertainError
from pgbackend.facts import Recorder
from pgbackend.log.ranges import RangeSet
from pgbackend.postgres.pool import Database
from pgbackend.torture.proxy import vanished
from tests.support.dispatchers import Catch
from tests.support.events import make_event
from tests.support.figures import report
from tests.support.ledger import Ledger
from tests.support.polling import eventually
from tests.support.producers import INSERT
from tests.support.standby import Pair, Server
from tests.support.worker import Worker

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SUBSCRIPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"order": "none", "concurrency": 16},
    "keyed": {"order": "key", "concurrency": 16},
    "strict": {"order": "strict"},
}


@pytest.fixture(scope="module")
def blank(pg_programs: Path) -> Iterator[Server]:
    with _directory() as directory:
        server = Server(directory / "blank", programs=pg_programs)
        asyncio.run(server.initialize())
        yield server


@pytest.fixture
async def pair(blank: Server, long: bool) -> AsyncIterator[Pair]:
    # These tests kill processes, not machines, so fsync matters only for the figures.
    settings = {} if long else {"fsync": "off"}
    with _directory() as directory:
        async with Pair(directory, programs=blank.programs, settings=settings, blank=blank) as pair:
            yield pair


@pytest.fixture
async def lone(blank: Server) -> AsyncIterator[Server]:
    """A server without a standby."""
    with _directory() as directory:
        alone = Server(directory / "lone", programs=blank.programs, settings={"fsync": "off"}, blank=blank)
        async with alone as server:
            yield server


@contextmanager
def _directory() -> Iterator[Path]:
    """A directory that the servers' user can enter; pytest's own are private."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


async def produced(backend: Backend, *ids: str) -> list[str]:
    """Produce each event until it is acknowledged or uncertain; return the acknowledged ids."""
    known = []
    for id_ in ids:
        while True:
            try:
                await backend.produce(make_event(id_, key=id_[-1]))
            except ProduceUncertainError:
                break
            except PgBackendError:
                continue
            known.append(id_)
            break
    return known


@dataclass
class Load:
    """Callers of `produce()`, slow transactions one after the other, and the outcome of each event."""

    dsn: str
    acknowledged: set[str] = field(default_factory=set)
    uncertain: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)
    """Not stored: produce() failed, or the transaction was rolled back."""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Produce until the block ends."""
        enough = asyncio.Event()
        async with Backend(self.dsn, produce_timeout=10) as backend, asyncio.TaskGroup() as tasks:
            for number in range(8):
                tasks.create_task(self._call(backend, number, enough), name=f"caller {number}")
            tasks.create_task(self._insert_slowly(enough), name="slow producer")
            try:
                yield
            finally:
                enough.set()

    async def grows(self, by: int) -> None:
        """Return when `by` more events are acknowledged."""
        goal = len(self.acknowledged) + by

        async def has_grown() -> bool:
            return len(self.acknowledged) >= goal

        await eventually(f"{by} more events are acknowledged", has_grown, 60)

    async def _call(self, backend: Backend, number: int, enough: asyncio.Event) -> None:
        chance = random.Random(number)
        for turn in itertools.takewhile(lambda _: not enough.is_set(), itertools.count()):
            id_ = f"{number}-{turn}"
            try:
                await backend.produce(make_event(id_, key=f"key {chance.randrange(20)}"))
            except ProduceUncertainError:
                self.uncertain.add(id_)
            except PgBackendError:
                self.refused.add(id_)
            else:
                self.acknowledged.add(id_)
            await asyncio.sleep(chance.random() * 0.04)

    async def _insert_slowly(self, enough: asyncio.Event) -> None:
        """There is always a hole somewhere, and sometimes nothing comes of it."""
        chance = random.Random(0)
        for turn in itertools.takewhile(lambda _: not enough.is_set(), itertools.count()):
            ids, outcome = [f"slow-{turn}-{part}" for part in range(3)], self.refused
            try:
                connection = await asyncpg.connect(self.dsn)
                try:
                    await connection.execute("BEGIN")
                    for id_ in ids:
                        await connection.execute(INSERT, id_)
                        await asyncio.sleep(chance.random() * 0.3)
                    if chance.random() < 0.3:
                        await connection.execute("ROLLBACK")
                    else:
                        outcome = self.uncertain
                        await connection.execute("COMMIT")
                        outcome = self.acknowledged
                finally:
                    connection.terminate()
            except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError):
                await asyncio.sleep(0.05)
            outcome.update(ids)


async def test_nothing_acknowledged_is_lost_with_a_synchronous_standby(pair: Pair, tmp_path: Path, long: bool) -> None:
    """Kill the primary and promote its standby under load, on both servers in turn."""
    rounds = 8 if long else 1
    load = Load(pair.dsn)
    settings: dict[str, object] = {"hole_wait": 0.3, "lease_timeout": 5.0}
    ledgers = {name: Ledger(tmp_path / name) for name in SUBSCRIPTIONS}
    settled: list[tuple[str, int, RangeSet, int]] = []
    await pair.synchronous()
    async with AsyncExitStack() as stack:
        workers = [
            await stack.enter_async_context(
                Worker(pair.dsn, ledger, subscription=name, delay=0.002, settings=settings, **SUBSCRIPTIONS[name])
            )
            for name, ledger in ledgers.items()
        ]
        async with load.running():
            for turn in range(rounds):
                await load.grows(150 + 37 * turn)
                for name, position, pending in await _query(pair.primary, _OFFSETS):
                    # Every dispatch from here on began after this commit.
                    settled.append((name, position, RangeSet.parse(pending), len(ledgers[name].handled())))
                pair.kill()
                await pair.promote()
                await load.grows(100)
                if turn < rounds - 1:
                    await pair.rejoin()
                    await pair.synchronous()
        head = await pair.primary.value("SELECT max(position) FROM pgbackend.events")

        async def is_settled() -> bool:
            offsets = await _query(pair.primary, _OFFSETS)
            return all(position >= head and pending == "{}" for _, position, pending in offsets)

        await eventually("everything is settled", is_settled, 120)
        for worker in workers:
            await worker.stop()

    stored = {id_ for (id_,) in await _query(pair.primary, "SELECT id FROM pgbackend.events")}
    assert not load.acknowledged - stored, "acknowledged events are not in the log"
    assert not load.refused & stored, "events are stored of which an error said that they are not"
    for name, ledger in ledgers.items():
        ledger.produced.extend(stored)
        assert not ledger.lost(), name
    for name, position, pending, count in settled:
        again = [one for one in ledgers[name].handled()[count:] if one.position <= position]
        assert not [one for one in again if one.position not in pending], "settled events were dispatched again"
    assert not ledgers["strict"].reordered()
    assert not ledgers["keyed"].reordered(by_key=True)
    report(
        f"{rounds} failovers to a synchronous standby: {len(stored)} events stored, {len(load.acknowledged)} "
        f"acknowledged, {len(load.uncertain)} uncertain, {len(load.refused)} refused or rolled back; dispatched again: "
        f"{ {name: len(ledger.doubled()) for name, ledger in ledgers.items()} }"
    )


async def test_events_at_reused_positions_are_dispatched(pair: Pair, tmp_path: Path) -> None:
    """An asynchronous standby lacks the last events, so they are lost, and later events get their positions.

    The subscriptions run in other processes and in this one, and had settled the lost events.
    """
    ledger = Ledger(tmp_path / "ledger")
    catches = {name: Catch() for name in SUBSCRIPTIONS}
    settings: dict[str, object] = {"lease_timeout": 5.0, "commit_interval": 0.01}
    async with Backend(pair.dsn, lease_timeout=5.0, commit_interval=0.01) as backend:
        for name, catch in catches.items():
            await backend.subscribe(name, catch, **SUBSCRIPTIONS[name])
        async with Worker(pair.dsn, ledger, subscription="elsewhere", settings=settings):
            before = await produced(backend, *(f"before {n}" for n in range(20)))
            await _replayed(pair)
            await pair.sever()
            await backend.subscribe("late", Catch())
            lost = await produced(backend, *(f"lost {n}" for n in range(100)))
            for catch in catches.values():
                await catch.has(*before, *lost)
            await _settled(pair.primary, after=120)
            with Recorder() as recorder:
                pair.kill()
                await pair.promote()
                new = await produced(backend, *(f"new {n}" for n in range(100)))
                for catch in catches.values():
                    await catch.has(*new, timeout=60)
                await recorder.wait("subscription is gone")

            async def all_handled() -> bool:
                return set(new) <= {handling.id for handling in ledger.handled()}

            await eventually("another process handles the new events", all_handled, 60)
        assert [fact["subscription"] for fact in recorder.all("subscription is gone")] == ["late"]
        await backend.probe()

    stored = await _query(pair.primary, "SELECT position, id FROM pgbackend.events ORDER BY position")
    assert not {id_ for _, id_ in stored} & set(lost), "the standby has events that it cannot have received"
    position_of = {id_: position for position, id_ in stored}
    again = [id_ for id_ in new if position_of[id_] in set(catches["plain"].positions[len(before) : -len(new)])]
    assert again, "no position was given out twice: the test shows nothing"
    report(f"asynchronous failover: {len(lost)} events lost, {len(again)} of their positions given out again")
    for name, catch in catches.items():
        assert set(catch.ids) == {*before, *lost, *new}, name
    strict = [id_ for id_ in catches["strict"].ids if id_ in set(new)]
    assert list(dict.fromkeys(strict)) == [id_ for _, id_ in stored if id_ in set(new)]


async def test_appenders_that_are_open_at_a_failover_are_waited_for_or_dead(pair: Pair) -> None:
    """A prepared transaction survives on the new primary. An open one is gone, and nothing waits for it."""
    await pair.synchronous()
    plain, strict = Catch(), Catch()
    async with Backend(pair.dsn, hole_wait=0.2, commit_interval=0.01) as backend:
        await backend.subscribe("plain", plain)
        await backend.subscribe("strict", strict, order="strict")
        await backend.produce(make_event("first"))
        preparing = await asyncpg.connect(pair.primary.dsn)
        await preparing.execute("BEGIN")
        await preparing.execute(INSERT, "prepared")
        await preparing.execute("PREPARE TRANSACTION 'over the switch'")
        open_ = await asyncpg.connect(pair.primary.dsn)
        await open_.execute("BEGIN")
        await open_.execute(INSERT, "open")
        await backend.produce(make_event("second"))
        # The plain subscription passes both holes, which become pending; the strict one waits at them.
        await plain.has("first", "second")

        async def is_pending() -> bool:
            return bool(await pair.primary.value(
                "SELECT pending <> '{}' AND position >= (SELECT max(position) FROM pgbackend.events)"
                " FROM pgbackend.offsets WHERE subscription = 'plain'"
            ))  # fmt: skip

        await eventually("the holes are pending", is_pending)
        pair.kill()
        await pair.promote()
        (third,) = await produced(backend, "third")
        await plain.has(third, timeout=60)
        assert "second" not in strict.ids, "it has overtaken the prepared transaction"
        async with pair.primary.connected() as connection:
            await connection.execute("COMMIT PREPARED 'over the switch'")
        for catch in (plain, strict):
            await catch.has("first", "prepared", "second", "third", timeout=60)

        async def nothing_is_pending() -> bool:
            return not await pair.primary.value("SELECT count(*) FROM pgbackend.offsets WHERE pending <> '{}'")

        await eventually("no hole is pending any more", nothing_is_pending, 60)
    for connection in (preparing, open_):
        connection.terminate()

    assert "open" not in plain.ids + strict.ids
    assert list(dict.fromkeys(strict.ids)) == ["first", "prepared", "second", "third"]


async def test_a_standby_is_refused_and_the_primary_is_found_after_it(pair: Pair) -> None:
    standby = pair.standby
    with pytest.raises(ConnectionLostError, match=f"127.0.0.1:{standby.port}/postgres is a standby") as refused:
        await Backend(standby.dsn).init()
    assert refused.value.sqlstate == "25006"

    both = f"postgresql://postgres@127.0.0.1:{standby.port},127.0.0.1:{pair.primary.port}/postgres"
    sockets = f"postgresql://postgres@/postgres?host={standby.directory},{pair.primary.directory}"
    sockets += f"&port={standby.port},{pair.primary.port}"
    for dsn in (both, sockets):
        backend = Backend(dsn)
        await backend.init()
        await backend.probe()
        await backend.stop()

    backend = Backend(both)
    await backend.init()
    pair.kill()

    async def probed() -> dict[str, str]:
        with pytest.raises(ProbeError) as refused:
            await backend.probe()
        return refused.value.checks if "primary" in refused.value.checks else {}

    # The first probe may fail on the connection that the pool still has.
    checks = await eventually("the probe finds a standby", probed)
    assert checks["connection"] == "ok"
    assert "is a standby" in checks["primary"]
    await backend.stop()

    # One host is silent, and the other refuses until it is promoted. Both are asked again and again.
    with vanished() as port:
        database = Database(f"postgresql://postgres@127.0.0.1:{port},127.0.0.1:{standby.port}/postgres")
        connecting = asyncio.create_task(database.connect(timeout=120))
        await asyncio.sleep(0)
        await pair.promote()
        connection = await connecting
        await connection.close()


async def test_a_primary_left_behind_by_a_failover_is_refused(pair: Pair) -> None:
    """As when its machine starts again after the failover."""
    old, new = pair.primary, pair.standby
    database = Database(old.dsn, listen_dsn=new.dsn)
    before = await database.connect()
    with pytest.raises(ConnectionLostError, match="is a standby"):
        await database.connect(direct=True)
    await pair.promote()
    # Both accept writes now. The process cannot tell them apart until it has seen the new one.
    await (await database.connect()).close()
    direct = await database.connect(direct=True)

    async def is_closed() -> bool:
        return before.is_closed()

    await eventually("the connection to the server that was left behind is closed", is_closed)
    with pytest.raises(
        ConnectionLostError, match="was left behind by a failover: it is on timeline 1, and the log continues on 2"
    ):
        await database.connect()
    await direct.close()


@pytest.mark.parametrize("level", ["notice", "error"])
async def test_a_commit_whose_wait_for_the_standby_is_cancelled_is_uncertain(lone: Server, level: str) -> None:
    """Also where the server is configured not to send warnings."""

    async def is_cancelled() -> bool:
        return bool(await lone.value(
            "SELECT count(pg_cancel_backend(pid)) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
            " AND (query ILIKE '%insert%' OR query ILIKE 'copy%')"
        ))  # fmt: skip

    await lone.configure("client_min_messages", level)
    backend = Backend(lone.dsn)
    await backend.init()
    await lone.configure("synchronous_standby_names", "nobody")
    # By INSERT and by COPY.
    for count in (1, 50):
        producing = asyncio.create_task(backend.produce_many([make_event(str(n)) for n in range(count)]))
        await eventually("the wait for a standby is cancelled", is_cancelled)
        with pytest.raises(ProduceUncertainError, match="standby"):
            await producing
    await lone.configure("synchronous_standby_names", "")
    await lone.configure("client_min_messages", "notice")
    await backend.produce(make_event("after"))
    await backend.stop()


@pytest.mark.skipif("not config.getoption('--long')", reason="takes long: give --long")
async def test_a_hanging_primary_is_left_for_the_new_one(pair: Pair) -> None:
    """Its kernel keeps the connections open. The first connection to the new primary closes them."""
    catch = Catch()
    async with Backend(pair.dsn, lease_timeout=6.0) as backend:
        await backend.subscribe("s", catch)
        await backend.produce(make_event("before"))
        await catch.has("before")
        hung = pair.primary
        hung.signal(signal.SIGSTOP)
        try:
            began = time.monotonic()
            await pair.promote()
            id_, acknowledged = await _first_acknowledged(backend, 0)
            await catch.has(id_, timeout=60)
        finally:
            hung.kill()
    report(f"hung: acknowledged after {acknowledged - began:.1f} s, dispatched after {catch.at[id_] - began:.1f} s")
    # Sooner than by the appender's timeout of a minute.
    assert acknowledged - began < 50


@pytest.mark.skipif("not config.getoption('--long')", reason="takes long: give --long")
async def test_a_standby_has_no_offset_or_event_without_those_before_it(pair: Pair) -> None:
    """At any moment no offset and no event is ahead of the sequence, and no offset is ahead of the events.

    WAL is one order: a commit is replayed after all that it was made on.
    """
    for turn in range(6):
        catch = Catch()
        enough = asyncio.Event()

        async def produce(backend: Backend, number: int, turn: int, enough: asyncio.Event) -> None:
            count = 0
            while not enough.is_set():
                count += 1
                with suppress(PgBackendError):
                    await backend.produce(make_event(f"{turn}-{number}-{count}"))

        async with Backend(pair.dsn, commit_interval=0.001) as backend:
            await backend.subscribe("s", catch, start="earliest")
            producers = [asyncio.create_task(produce(backend, number, turn, enough)) for number in range(8)]
            await _grown(backend, by=500 + 137 * turn)
            await pair.sever()
            await _grown(backend, by=500)
            seen = await _query(pair.standby, "SELECT position FROM pgbackend.offsets")
            pair.kill()
            enough.set()
            await pair.promote()
            await asyncio.gather(*producers)
            offset, event, head = (await _query(pair.primary, _PLACES))[0]
            await backend.probe()
        assert seen
        assert offset <= event, "an offset without its events"
        assert event <= head
        report(f"cut off: offset {offset}, last event {event}, sequence {head}")
        await pair.rejoin()


@pytest.mark.skipif("not config.getoption('--long')", reason="takes long: give --long")
@pytest.mark.parametrize("late", [0.0, 5.0], ids=["promoted at once", "promoted 5 s later"])
async def test_how_long_a_failover_takes(pair: Pair, late: float) -> None:
    """Seconds from the kill, and from the end of the promotion, to the next acknowledgement and dispatch."""
    gaps: dict[str, list[float]] = {
        "promoted": [],
        "acknowledged": [],
        "dispatched": [],
        "ours": [],
        "ours, dispatched": [],
    }
    await pair.synchronous()
    catch = Catch()
    async with Backend(pair.dsn) as backend:
        await backend.subscribe("s", catch)
        await backend.produce(make_event("before"))
        await catch.has("before")
        for turn in range(12):
            began = time.monotonic()
            pair.kill()
            producing = asyncio.create_task(_first_acknowledged(backend, turn))
            await asyncio.sleep(late)
            await pair.promote()
            promoted = time.monotonic()
            id_, acknowledged = await producing
            await catch.has(id_, timeout=60)
            gaps["promoted"].append(promoted - began - late)
            gaps["acknowledged"].append(acknowledged - began)
            gaps["dispatched"].append(catch.at[id_] - began)
            gaps["ours"].append(acknowledged - promoted)
            gaps["ours, dispatched"].append(catch.at[id_] - promoted)
            await pair.rejoin()
            await pair.synchronous()
    report(f"failover, {late:g} s before the promotion begins, median and worst of 12, in seconds:")
    for name, values in gaps.items():
        report(f"  {name}: {statistics.median(values):.2f}, {max(values):.2f}")


_OFFSETS = "SELECT subscription, position, pending::text FROM pgbackend.offsets"
_PLACES = (
    "SELECT (SELECT max(position) FROM pgbackend.offsets), (SELECT max(position) FROM pgbackend.events),"
    " (SELECT last_value FROM pgbackend.events_position_seq)"
)


async def _first_acknowledged(backend: Backend, turn: int) -> tuple[str, float]:
    number = 0
    while True:
        number += 1
        if await produced(backend, id_ := f"{turn}-{number}"):
            return id_, time.monotonic()


async def _query(server: Server, statement: str) -> list[tuple[Any, ...]]:
    async with server.connected() as connection:
        return [tuple(row) for row in await connection.fetch(statement)]


async def _replayed(pair: Pair) -> None:
    """Return when the standby has replayed everything that the primary has now."""
    place = await pair.primary.value("SELECT pg_current_wal_lsn()::text")

    async def has_replayed() -> bool:
        return bool(await pair.standby.value(f"SELECT pg_last_wal_replay_lsn() >= '{place}'::pg_lsn"))

    await eventually("the standby has all", has_replayed, 30)


async def _settled(server: Server, *, after: int) -> None:
    async def are_settled() -> bool:
        return bool(await server.value(
            f"SELECT min(position) >= {after} FROM pgbackend.offsets WHERE subscription <> 'late'"
        ))  # fmt: skip

    await eventually("all is settled", are_settled, 30)


async def _grown(backend: Backend, *, by: int) -> None:
    goal = (await backend.status()).head + by

    async def has_grown() -> bool:
        return (await backend.status()).head >= goal

    await eventually("the log grows", has_grown, 60)
