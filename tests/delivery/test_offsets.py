from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from pgbackend import Backend
from pgbackend.delivery.history import Step
from pgbackend.delivery.offsets import Committed, Offsets
from pgbackend.delivery.outcomes import Buried, Finished, Scheduled
from pgbackend.delivery.shard import Shard
from pgbackend.delivery.window import Window
from pgbackend.errors import ConnectionLostError, DatabaseError
from pgbackend.facts import Recorder
from pgbackend.log.incarnation import IncarnationChanged
from pgbackend.log.log import Log
from pgbackend.model import Failure
from pgbackend.postgres.pool import Database
from pgbackend.subscriptions.leases import Leases
from pgbackend.subscriptions.presence import Tenure
from pgbackend.torture.proxy import Proxy
from tests.support.claims import claim_free
from tests.support.events import make_event


class Owner:
    """A worker that runs shards by hand: claims, settles, commits."""

    def __init__(self, log: Log, dsn: str) -> None:
        self.dsn = dsn
        self.log = log
        self.id: UUID = uuid4()
        self.leases = Leases(log, schema="pgbackend", worker=self.id)
        self.offsets = Offsets(log, schema="pgbackend", worker=self.id)
        self.queued: dict[Shard, None] = {}

    async def claim(self, *names: str) -> list[Shard]:
        connection = await asyncpg.connect(self.dsn)
        await connection.execute(
            "INSERT INTO pgbackend.workers (id, name, lease_timeout) VALUES ($1, 'test', '1 hour') "
            "ON CONFLICT DO NOTHING",
            self.id,
        )
        await connection.close()
        return [
            Shard(
                lease=lease,
                window=Window(position=lease.position, pending=lease.pending, max_events=100, max_bytes=10**6),
                tenure=Tenure(),
                on_change=lambda shard: self.queued.__setitem__(shard, None),
            )
            for lease in await claim_free(self.leases, *(names or ("s",)))
        ]

    def settle(self, shard: Shard, *positions: int) -> None:
        for position in positions:
            if position > shard.window.position:
                shard.window.open(position, 1)
            shard.window.settle(position)
        self.queued[shard] = None

    async def commit(self) -> Committed:
        """Commit what was settled; what is not committed is tried again by the next call."""
        shards, self.queued = self.queued, {}
        committed = await self.offsets.commit(shards)
        self.queued.update(dict.fromkeys(committed.kept))
        return committed


@asynccontextmanager
async def owning(dsn: str) -> AsyncIterator[Owner]:
    database = Database(dsn)
    await database.open()
    try:
        log = Log(database, schema="pgbackend", hole_wait=1.0)
        await log.incarnation.enter()
        yield Owner(log, dsn)
    finally:
        await database.close()


Ask = Callable[..., Any]


@pytest.fixture
async def ask(backend: Backend, database: str) -> AsyncIterator[Ask]:
    """One query's rows, as tuples, of a log with ten events and the subscription `s`."""
    await backend.subscribe("s", print)
    await backend.produce_many([make_event(str(number)) for number in range(10)])
    connection = await asyncpg.connect(database)

    async def ask(statement: str, *args: object) -> list[tuple[Any, ...]]:
        return [tuple(row) for row in await connection.fetch(statement, *args)]

    yield ask
    await connection.close()


OFFSET = "SELECT position, pending::text FROM pgbackend.offsets WHERE subscription = 's'"


async def test_a_mark_is_committed_with_what_is_pending_below_it(ask: Ask, database: str) -> None:
    async with owning(database) as owner:
        (shard,) = await owner.claim()
        shard.window.open_run([1, 2, 3, 4], [1] * 4)
        owner.settle(shard, 1, 4)
        await owner.commit()

        assert await ask(OFFSET) == [(4, "{[2,4)}")]


async def test_a_row_with_a_new_ctid_is_found_by_its_key(ask: Ask, database: str) -> None:
    async with owning(database) as owner:
        (shard,) = await owner.claim()
        await ask("UPDATE pgbackend.offsets SET shards = shards")
        owner.settle(shard, 1)
        await owner.commit()
        assert await ask(OFFSET) == [(1, "{}")]
        assert not shard.lost

        # From then on by its ctid again.
        owner.settle(shard, 2)
        await owner.commit()
        assert await ask(OFFSET) == [(2, "{}")]


@pytest.mark.parametrize("with_outcome", [False, True])
async def test_a_former_owner_cannot_commit(ask: Ask, database: str, with_outcome: bool) -> None:
    async with owning(database) as former, owning(database) as owner:
        (stale,) = await former.claim()
        await ask("UPDATE pgbackend.offsets SET owner = NULL")
        (shard,) = await owner.claim()
        owner.settle(shard, 1, 2)
        await owner.commit()
        former.settle(stale, 1, 2, 3)
        if with_outcome:
            stale.record(Buried(position=1, failure=Failure(error="x", attempts=1)))
            stale.record(Scheduled(position=2, attempt=1, delay=0.0, error="x", failure=None))
        committed = await former.commit()

        assert stale.lost
        assert committed.lost == [stale]
        assert not committed.marks
        assert not committed.kept
        assert not shard.lost
        assert await ask(OFFSET) == [(2, "{}")]
        assert await ask("SELECT count(*) FROM pgbackend.dead_letters") == [(0,)]
        assert await ask("SELECT count(*) FROM pgbackend.redeliveries") == [(0,)]


async def test_a_worker_that_claims_its_own_shard_again_cannot_commit_under_the_old_epoch(
    ask: Ask, database: str
) -> None:
    async with owning(database) as owner:
        (stale,) = await owner.claim()
        await ask("UPDATE pgbackend.offsets SET owner = NULL")
        (shard,) = await owner.claim()
        assert shard.lease.epoch > stale.lease.epoch
        owner.settle(stale, 1, 2)
        owner.settle(shard, 1)
        await owner.commit()

        assert (stale.lost, shard.lost) == (True, False)
        assert await ask(OFFSET) == [(1, "{}")]


async def test_a_position_is_never_lowered(ask: Ask, database: str) -> None:
    async with owning(database) as owner:
        (shard,) = await owner.claim()
        await ask("UPDATE pgbackend.offsets SET position = 7")
        owner.settle(shard, 1)
        await owner.commit()

        assert await ask(OFFSET) == [(7, "{}")]


async def test_nothing_is_committed_in_another_incarnation(ask: Ask, database: str) -> None:
    async with owning(database) as owner:
        (shard,) = await owner.claim()
        await ask("UPDATE pgbackend.incarnation SET id = gen_random_uuid()")
        owner.settle(shard, 1)
        with pytest.raises(IncarnationChanged):
            await owner.commit()

        assert await ask(OFFSET) == [(0, "{}")]


async def test_outcomes_are_committed_with_the_offset_that_they_belong_to(ask: Ask, database: str) -> None:
    failure = Failure(error="no such customer", attempts=5, details={"customer": "17", "note": 'quote " and \\ 🦆'})
    async with owning(database) as owner:
        (shard,) = await owner.claim()
        owner.settle(shard, 1, 2, 3)
        shard.record(Scheduled(position=1, attempt=2, delay=60.0, error="busy", failure=None))
        shard.record(Buried(position=2, failure=failure))
        shard.record(Finished(position=3))
        await owner.commit()

        assert await ask(OFFSET) == [(3, "{}")]
        assert await ask(
            "SELECT position, attempt, last_error, due_at > now() + interval '50 s' FROM pgbackend.redeliveries"
        ) == [(1, 2, "busy", True)]
        assert await ask(
            "SELECT position, id, error, attempts, details->>'customer', details->>'note' FROM pgbackend.dead_letters"
        ) == [(2, "1", "no such customer", 5, "17", 'quote " and \\ 🦆')]

        shard.record(Finished(position=1))
        owner.queued[shard] = None
        await owner.commit()
        assert await ask("SELECT count(*) FROM pgbackend.redeliveries") == [(0,)]


@pytest.mark.parametrize("reached", [False, True], ids=["refused", "answer lost"])
async def test_a_commit_that_failed_is_repeated_with_all_its_outcomes(ask: Ask, database: str, reached: bool) -> None:
    async with Proxy(database) as proxy, owning(proxy.dsn) as owner:
        (shard,) = await owner.claim()
        owner.settle(shard, 1, 2)
        failed, buried = Step(what="failed", attempt=1, error="unique-marker"), Step(what="buried")
        shard.record(Scheduled(position=1, attempt=1, delay=0.0, error="", failure=None, steps=(failed,)))
        shard.record(Buried(position=2, failure=Failure(error="", attempts=1), steps=(failed, buried)))
        if reached:
            proxy.lose_reply_to(b"unique-marker")
        else:
            proxy.cut()
        committed = await owner.commit()
        assert isinstance(committed.error, ConnectionLostError)
        assert not committed.marks
        assert committed.kept == [shard]
        proxy.restore()
        owner.settle(shard, 3)
        await owner.commit()

        assert await ask(OFFSET) == [(3, "{}")]
        assert await ask("SELECT position, attempt FROM pgbackend.redeliveries") == [(1, 1)]
        assert not shard.lost
        steps = "SELECT jsonb_path_query_array(history, '$[*].what')::text FROM pgbackend."
        assert await ask(f"{steps}redeliveries") == [('["failed"]',)]
        assert await ask(f"{steps}dead_letters") == [('["failed", "buried"]',)]


@pytest.mark.parametrize("reached", [False, True], ids=["refused", "answer lost"])
async def test_each_attempt_is_in_the_history_once_though_a_commit_between_them_failed(
    ask: Ask, database: str, reached: bool
) -> None:
    async with Proxy(database) as proxy, owning(proxy.dsn) as owner:
        (shard,) = await owner.claim()
        owner.settle(shard, 1)
        for attempt in (1, 2):
            step = Step(what="failed", attempt=attempt, error="unique-marker")
            shard.record(Scheduled(position=1, attempt=attempt, delay=0.0, error="", failure=None, steps=(step,)))
            if attempt == 1 and reached:
                proxy.lose_reply_to(b"unique-marker")
            elif attempt == 1:
                proxy.cut()
            owner.queued[shard] = None
            await owner.commit()
            proxy.restore()

        attempts = "SELECT attempt, jsonb_path_query_array(history, '$[*].attempt')::text FROM pgbackend.redeliveries"
        assert await ask(attempts) == [(2, "[1, 2]")]


async def test_all_shards_are_committed_together_and_a_lost_one_costs_the_others_nothing(
    backend: Backend, ask: Ask, database: str
) -> None:
    await backend.subscribe("many", print, start="earliest", shards=5)
    async with owning(database) as owner:
        shards = await owner.claim("many")
        await ask("UPDATE pgbackend.offsets SET owner = NULL WHERE subscription = 'many' AND shard = 2")
        with Recorder() as recorder:
            for shard in shards:
                owner.settle(shard, 1)
            committed = await owner.commit()
            assert [fields["shards"] for fields in recorder.all("offsets committed")] == [4]

        assert [shard.lease.shard for shard in committed.lost] == [2]
        assert [shard.lease.shard for shard in committed.marks] == [0, 1, 3, 4]
        assert await ask(
            "SELECT shard, position FROM pgbackend.offsets WHERE subscription = 'many' ORDER BY shard"
        ) == [(0, 1), (1, 1), (2, 0), (3, 1), (4, 1)]


async def test_a_refused_mark_does_not_hold_up_the_other_shards(ask: Ask, backend: Backend, database: str) -> None:
    await backend.subscribe("other", print)
    async with owning(database) as owner:
        shards = {shard.lease.subscription: shard for shard in await owner.claim("s", "other")}
        beyond_int4 = 1 << 40
        shards["s"].record(Scheduled(position=3, attempt=beyond_int4, delay=1.0, error="failed", failure=None))
        shards["other"].record(Finished(position=3))
        for shard in shards.values():
            shard.window.open_run([11, 12], [1] * 2)
            owner.settle(shard, 11, 12)
        with Recorder() as recorder:
            committed = await owner.commit()

        assert await ask("SELECT position FROM pgbackend.offsets WHERE subscription = 'other'") == [(12,)]
        assert await ask("SELECT position FROM pgbackend.offsets WHERE subscription = 's'") == [(0,)]
        assert [fact["shard"] for fact in recorder.all("commit refused")] == ["s/0"]
        assert isinstance(committed.error, DatabaseError)
        assert list(committed.marks) == [shards["other"]]
        assert committed.kept == [shards["s"]]
        assert list(shards["s"].outcomes) == [("event", 3)]


async def test_completion_is_stored_once_and_keeps_its_date(ask: Ask, database: str) -> None:
    async with owning(database) as owner:
        (shard,) = await owner.claim()
        shard.complete = True
        owner.settle(shard, 1)
        await owner.commit()
        first = await ask("SELECT completed_at FROM pgbackend.offsets")
        owner.settle(shard, 2)
        await owner.commit()

        assert first[0][0] is not None
        assert await ask("SELECT completed_at FROM pgbackend.offsets") == first


async def test_a_thousand_pending_ranges_are_committed(ask: Ask, database: str) -> None:
    async with owning(database) as owner:
        (shard,) = await owner.claim()
        shard.window.add_hole((1, 2))
        for number in range(1, 1000):
            shard.window.add_hole((2 * number + 1, 2 * number + 2))
        shard.window.advance(2000)
        owner.queued[shard] = None
        await owner.commit()
        await ask("UPDATE pgbackend.offsets SET owner = NULL")
        (again,) = await owner.claim()

    assert again.lease.position == 2000
    assert again.lease.pending == shard.window.holes
    assert len(again.lease.pending) == 1000
