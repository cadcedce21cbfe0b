import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from pgbackend import Backend, ConfigError, SubscriptionMismatchError, SubscriptionNotFoundError
from pgbackend.facts import Recorder
from pgbackend.postgres.pool import Database
from tests.support.backends import SOON, complete, produce, settled, worker_of
from tests.support.databases import clock
from tests.support.dispatchers import Catch, Gate
from tests.support.events import make_event
from tests.support.polling import eventually
from tests.support.producers import INSERT

# Starting.


@pytest.mark.parametrize(
    ("start", "expected"), [("earliest", range(11)), ("latest", [10]), (0, range(11)), (7, range(7, 11)), (10, [10])]
)
async def test_a_subscription_starts_at_the_given_place(log: Backend, start: Any, expected: Any) -> None:
    catch = Catch()
    await log.subscribe("s", catch, start=start, order="strict")
    await produce(log, "10")
    await settled(log)

    assert catch.ids == [str(number) for number in expected]


async def test_a_subscription_starts_behind_a_date(log: Backend, database: str) -> None:
    date = await clock(database)
    await produce(log, "10", "11")
    catch = Catch()
    await log.subscribe("s", catch, start=date, order="strict")
    await produce(log, "12")
    await settled(log)

    assert catch.ids == ["10", "11", "12"]


async def test_a_date_before_the_log_means_its_beginning_and_a_future_one_is_waited_for(
    log: Backend, database: str
) -> None:
    early, late = Catch(), Catch()
    await log.subscribe("early", early, start=datetime(2000, 1, 1, tzinfo=UTC), order="strict")
    soon = await clock(database) + timedelta(seconds=2.5)
    await log.subscribe("late", late, start=soon)
    await produce(log, "before")

    async def has_come() -> bool:
        return await clock(database) > soon

    await eventually("the date has come", has_come)
    await produce(log, "after")
    await late.has("after")
    await settled(log, "late")
    await settled(log, "early")

    assert early.ids == [*map(str, range(10)), "before", "after"]
    assert late.ids == ["after"]


@pytest.mark.parametrize("shards", [1, 3])
async def test_a_start_position_ahead_of_the_log_is_waited_for(log: Backend, shards: int) -> None:
    catch = Catch()
    await log.subscribe("s", catch, start=12, end=15, shards=shards)
    await produce(log, "10", "11", "12", "13", "14")
    await complete(log)
    await log.probe()

    assert sorted(catch.ids) == ["12", "13"]


async def test_a_seek_ahead_of_the_log_counts_until_the_next_seek(log: Backend) -> None:
    catch = Catch()
    await log.subscribe("s", catch, order="strict")
    await log.seek("s", 11)
    await produce(log, "10", "11")
    await catch.has("11")
    await log.seek("s", 9)
    await settled(log)

    assert catch.ids == ["11", "9", "10", "11"]


async def test_a_position_beyond_a_bigint_is_refused(log: Backend) -> None:
    with pytest.raises(ConfigError, match=r"expected .*, a position"):
        await log.subscribe("s", print, start=1 << 63)
    assert (await log.status()).subscriptions == ()


async def test_the_start_of_an_existing_subscription_is_ignored(log: Backend) -> None:
    first, second = Catch(), Catch()
    await log.subscribe("s", first, start="earliest")
    await settled(log)
    await log.unsubscribe("s")
    await produce(log, "10")
    await log.subscribe("s", second, start="latest")
    await second.has("10")

    assert second.ids == ["10"]


@pytest.mark.parametrize("commits", [True, False])
async def test_latest_beside_an_open_appender_delivers_its_event_and_nothing_older(
    log: Backend, database: str, commits: bool
) -> None:
    producer = await asyncpg.connect(database)
    transaction = producer.transaction()
    await transaction.start()
    await producer.execute(INSERT, "open")
    await produce(log, "older")
    catch = Catch()
    await log.subscribe("s", catch, start="latest")
    await (transaction.commit() if commits else transaction.rollback())
    await produce(log, "newer")
    await settled(log)
    await producer.close()

    assert sorted(catch.ids) == (["newer", "open"] if commits else ["newer"])


async def test_latest_waits_for_an_appender_that_commits_soon(log: Backend, database: str) -> None:
    """The event is acknowledged before `subscribe()` returns, so it is older than the subscription."""
    backend = Backend(database, hole_wait=30.0)
    await backend.init()
    producer = await asyncpg.connect(database)
    await producer.execute("BEGIN")
    await producer.execute(INSERT, "open")
    subscribing = asyncio.create_task(backend.subscribe("s", print))
    await asyncio.wait({subscribing}, timeout=0.2)
    assert not subscribing.done()
    await producer.execute("COMMIT")
    await producer.close()
    await subscribing
    (status,) = (await backend.status()).subscriptions
    await backend.stop()

    assert status.lag == 0


async def test_latest_delivers_the_event_of_an_appender_that_is_prepared_meanwhile(log: Backend, database: str) -> None:
    producer = await asyncpg.connect(database)
    if await producer.fetchval("SHOW max_prepared_transactions") == "0":
        await producer.close()
        pytest.skip("this server has max_prepared_transactions = 0")
    await producer.execute("BEGIN")
    await producer.execute(INSERT, "prepared")
    catch = Catch()
    subscribing = asyncio.create_task(log.subscribe("s", catch))
    await producer.execute("PREPARE TRANSACTION 'p'")
    await subscribing
    await producer.execute("COMMIT PREPARED 'p'")
    await catch.has("prepared")
    await producer.close()


# Ending.


async def test_an_end_position_is_exclusive_and_completes_the_subscription(log: Backend) -> None:
    catch = Catch()
    await log.subscribe("s", catch, start="earliest", end=6, order="strict")
    await complete(log)
    await produce(log, "10")
    (status,) = (await log.status()).subscriptions

    assert catch.ids == ["0", "1", "2", "3", "4"]
    assert status.state == "complete"
    assert status.shards[0].position == 5


async def test_a_subscription_past_its_end_position_reads_nothing_more(log: Backend) -> None:
    await log.subscribe("s", Catch(), start="earliest", end=6)
    await complete(log)

    async def reads_no_more() -> bool:
        tail = worker_of(log).pumps._tail
        return tail is not None and not tail._streams

    await eventually("no stream is open", reads_no_more)


@pytest.mark.parametrize("key", ["h", "k"])
async def test_a_subscription_with_one_complete_shard_is_not_complete(database: str, key: str) -> None:
    """Whichever of the two shards it is."""
    gate = Gate()
    async with Backend(database, commit_interval=0.01, poll_interval=0.1) as backend:
        await backend.subscribe("s", gate, shards=2, end=2)
        await backend.produce_many([make_event("a", key=key), make_event("behind")])

        async def one_is_complete() -> bool:
            return any(pump.shard.complete for pump in worker_of(backend).pumps)

        await eventually("one shard is complete", one_is_complete)
        (status,) = (await backend.status()).subscriptions
        gate.open()
        await complete(backend)

    assert (status.complete, status.state) == (False, "running")


async def test_an_end_position_ahead_of_the_log_is_waited_for(log: Backend) -> None:
    catch = Catch()
    await log.subscribe("s", catch, end=13, order="strict")
    await produce(log, "10")
    await catch.has("10")
    assert not (await log.status()).subscriptions[0].complete
    await produce(log, "11", "12", "13")
    await complete(log)

    assert catch.ids == ["10", "11"]


async def test_an_end_date_is_reached_by_the_clock_on_a_quiet_log(log: Backend, database: str) -> None:
    catch = Catch()
    end = await clock(database) + timedelta(seconds=2.5)
    await log.subscribe("s", catch, start="earliest", end=end)
    await catch.has("9")
    assert not (await log.status()).subscriptions[0].complete
    await complete(log)
    assert await clock(database) >= end
    await produce(log, "10")
    other = Catch()
    await log.subscribe("other", other, start=10)
    await other.has("10")

    assert sorted(catch.ids, key=int) == [str(number) for number in range(10)]


async def test_a_distant_end_date_is_compared_with_the_clock_once(
    log: Backend, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetchval, asked = Database.fetchval, 0

    async def counted(self: Database, statement: str, *args: Any, **options: Any) -> Any:
        nonlocal asked
        asked += end in args
        return await fetchval(self, statement, *args, **options)

    monkeypatch.setattr(Database, "fetchval", counted)
    catch = Catch()
    end = datetime.now(UTC) + timedelta(days=30)
    await log.subscribe("s", catch, start="earliest", end=end)
    asked = 0
    await catch.has("9")
    for number in range(10, 20):
        await produce(log, str(number))
        await catch.has(str(number))
        await asyncio.sleep(0.05)

    assert asked == 1


async def test_completion_waits_for_an_open_appender_below_the_end(log: Backend, database: str) -> None:
    producer = await asyncpg.connect(database)
    await producer.execute("BEGIN")
    await producer.execute(INSERT, "open")
    await produce(log, "12", "13")
    catch = Catch()
    await log.subscribe("s", catch, start=10, end=13)
    await catch.has("12")
    assert not (await log.status()).subscriptions[0].complete
    await producer.execute("COMMIT")
    await producer.close()
    await complete(log)

    assert catch.ids == ["12", "open"]


async def test_a_complete_subscription_stays_complete_until_a_seek(log: Backend) -> None:
    first, second = Catch(), Catch()
    await log.subscribe("s", first, start="earliest", end=4)
    await complete(log)
    await log.unsubscribe("s")
    await log.subscribe("s", second, end=4)
    await produce(log, "10")
    assert (await log.status()).subscriptions[0].complete
    await log.seek("s", 1)
    await second.has("1", "2")
    await complete(log)

    assert sorted(second.ids) == ["1", "2"]


# Stored options.


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"order": "key"}, "order"), ({"shards": 2}, "shard"), ({"end": 99}, "end position"),
        ({"end": datetime(2100, 1, 1, tzinfo=UTC)}, "end date"),
    ],
)  # fmt: skip
async def test_subscribing_with_another_order_shard_count_or_end_is_refused(
    log: Backend, options: dict[str, Any], word: str
) -> None:
    await log.subscribe("s", print)
    await log.unsubscribe("s")

    with pytest.raises(SubscriptionMismatchError, match=word):
        await log.subscribe("s", print, **options)
    await log.subscribe("s", print)


async def test_many_backends_that_subscribe_at_once_create_one_subscription(log: Backend, database: str) -> None:
    backends = [Backend(database) for _ in range(4)]
    await asyncio.gather(*(backend.init() for backend in backends))
    await asyncio.gather(*(backend.subscribe("s", print, start=index) for index, backend in enumerate(backends)))
    assert len((await log.status()).subscriptions) == 1
    await asyncio.gather(*(backend.stop() for backend in backends))


async def test_shards_divide_the_events_and_keys_stay_together(log: Backend) -> None:
    catch = Catch()
    shards: dict[str, set[object]] = {}
    await log.subscribe("s", catch, shards=3, order="key")
    await log.produce_many([make_event(f"{n}-{n % 7}", key=f"k{n % 7}") for n in range(70)])
    await settled(log)
    for id_ in catch.ids:
        shards.setdefault(id_.split("-")[1], set()).add(id_)

    assert len(catch.ids) == len(set(catch.ids)) == 70
    for key in range(7):
        mine = [id_ for id_ in catch.ids if id_.endswith(f"-{key}")]
        assert mine == sorted(mine, key=lambda id_: int(id_.split("-")[0]))


async def test_deleting_removes_everything_and_frees_the_name(log: Backend, database: str) -> None:
    failing = Catch(fails=lambda _: True)
    await log.subscribe("s", failing, start=8)

    async def has_failed() -> bool:
        return bool((await log.status()).subscriptions[0].redeliveries)

    await eventually("a redelivery is scheduled", has_failed)
    await log.delete_subscription("s")
    assert (await log.status()).subscriptions == ()
    catch = Catch()
    await log.subscribe("s", catch)
    await produce(log, "10")
    await settled(log)

    assert catch.ids == ["10"]


async def test_deleting_waits_for_a_commit_of_another_process_without_a_deadlock(
    backend: Backend, database: str
) -> None:
    """A commit locks the offset first and refers to the subscription afterwards, by its redeliveries."""
    await backend.subscribe("s", Catch())
    await backend.produce(make_event("a"))
    commit, other = await asyncpg.connect(database), await asyncpg.connect(database)

    async def a_lock_is_awaited() -> bool:
        return bool(await other.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))

    async with commit.transaction():
        await commit.execute("UPDATE pgbackend.offsets SET position = 1")
        deleting = asyncio.create_task(backend.delete_subscription("s"))
        await eventually("the deletion waits for the commit", a_lock_is_awaited)
        await commit.execute(
            "INSERT INTO pgbackend.redeliveries (subscription, position, key_hash, attempt, due_at, last_error) "
            "VALUES ('s', 1, 0, 1, now(), 'failed')"
        )
    await deleting
    await commit.close()
    await other.close()

    assert (await backend.status()).subscriptions == ()


async def test_deleting_ends_the_subscription_in_other_processes(log: Backend, database: str) -> None:
    catch = Catch()
    with Recorder() as recorder:
        async with Backend(database, **SOON) as other:
            await other.subscribe("s", catch)
            await recorder.wait("lease claimed", subscription="s")
            await log.delete_subscription("s")
            await recorder.wait("lease lost", subscription="s")
            await produce(log, "10")
            with pytest.raises(SubscriptionNotFoundError):
                await log.seek("s", "latest")

    assert catch.ids == []
