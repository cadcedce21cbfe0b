"""`Backend.redact`: one event's data is gone from the log's tables, and subscriptions skip it on record."""

import asyncio
from typing import Any

import asyncpg
import pytest
from cloudevents.core.v1.event import CloudEvent

from pgbackend import Backend, DatabaseError, Event, EventNotFoundError, Reject, Retry
from pgbackend.cli.options import LogAddress
from pgbackend.cli.reading import reading
from pgbackend.facts import Recorder
from pgbackend.model import Order
from tests.support.backends import dead_letters, failed, produce, running, settled
from tests.support.databases import connected
from tests.support.dispatchers import Catch
from tests.support.events import make_event
from tests.support.polling import eventually

ORDERS: tuple[Order, ...] = ("none", "key", "strict")
LATE = Retry(attempts=9, delay=600.0)
SECRET = b"somebody's secret"


def secret(id_: str, size: int = 1) -> CloudEvent:
    attributes = {
        "id": id_, "source": "test", "type": "test", "datacontenttype": "text/plain", "subject": "Somebody",
        "partitionkey": "somebody@example.org", "dataschema": "https://example.org/Somebody", "name": "Somebody",
    }  # fmt: skip
    return CloudEvent(attributes, SECRET * size)


async def skipped(backend: Backend, count: int = 1) -> None:
    status = await settled(backend)
    assert status.skipped == count


@pytest.mark.parametrize("size", [1, 200_000], ids=["small", "toasted"])
async def test_nothing_but_the_required_attributes_is_left_of_a_redacted_event(database: str, size: int) -> None:
    async def reject(event: Event) -> None:
        raise Reject("no", details={"name": "Somebody"} if event.id == "it" else None)

    async with running(database, max_event_bytes=1 << 23) as backend:
        await backend.subscribe("s", reject)
        await backend.produce_many([make_event("before"), secret("it", size), make_event("behind")])
        await dead_letters(backend, 3)

        done = await backend.redact(2)

        assert (done.position, done.dead_letters, done.unsettled) == (2, 1, ())
        assert done.tables == ("pgbackend.events_0", "pgbackend.dead_letters")
        again = await backend.redact(2)
        assert (again.redacted_at, again.redacted_by, again.dead_letters) == (done.redacted_at, done.redacted_by, 0)
        assert len(await dead_letters(backend, 2)) == 2
    async with connected(database) as connection:
        row = await connection.fetchrow("SELECT * FROM pgbackend.events WHERE position = 2")
        assert row is not None
        assert {name: value for name, value in row.items() if value is not None} == {
            "position": 2, "recorded_at": row["recorded_at"], "specversion": "1.0", "id": "it", "source": "test",
            "type": "test", "extensions": "{}", "data_encoding": "redacted",
        }  # fmt: skip
        for table in ("events", "dead_letters", "kept_events", "redeliveries", "skipped"):
            rows = await connection.fetchval(
                f"SELECT coalesce(string_agg(one::text, ' '), '') FROM pgbackend.{table} AS one"
            )
            assert "omebody" not in rows
            assert SECRET.hex() not in rows


@pytest.mark.parametrize("order", ORDERS)
async def test_a_subscription_that_has_not_read_it_skips_it_on_record(database: str, order: Order) -> None:
    catch = Catch()
    async with running(database) as backend:
        await backend.subscribe("s", catch, order=order)
        await backend.unsubscribe("s")
        await backend.produce_many([make_event("1"), secret("2"), make_event("3"), secret("4")])
        assert (await backend.redact(2)).unsettled == ("s",)
        await backend.redact(4)
        with Recorder() as recorder:
            await backend.subscribe("s", catch, order=order)
            await skipped(backend, 2)
            assert {fields["ranges"] for fields in recorder.all("events skipped")} <= {
                "{[2,3),[4,5)}",
                "{[2,3)}",
                "{[4,5)}",
            }

    assert catch.ids == ["1", "3"]


@pytest.mark.parametrize("order", ORDERS)
async def test_an_event_that_waits_to_be_tried_again_is_skipped_by_the_next_owner(database: str, order: Order) -> None:
    catch = Catch(fails=lambda event: event.id == "2")
    async with running(database) as backend:
        await backend.subscribe("s", catch, order=order, retry=LATE)
        await backend.produce_many([make_event("1"), secret("2"), make_event("3")])
        await failed(backend)
        if order != "none":
            # Its event is in the memory of the worker.
            await backend.unsubscribe("s")
        done = await backend.redact(2)
        assert (done.unsettled, done.tables) == (("s",), ("pgbackend.events_0", "pgbackend.redeliveries"))
        assert [(event.error, event.history) async for event in backend.waiting("s")] == [("(redacted)", ())]
        if order != "none":
            await backend.subscribe("s", catch, order=order, retry=LATE)
        await skipped(backend)
        assert not await dead_letters(backend)

    assert catch.attempts.count("2") == 1
    assert sorted(catch.ids) == ["1", "3"]


async def test_a_redacted_event_in_a_range_that_nobody_has_read_is_on_record(database: str) -> None:
    catch = Catch()
    async with running(database) as backend:
        await backend.subscribe("s", catch)
        await backend.unsubscribe("s")
        await backend.produce_many([make_event("1"), secret("2"), make_event("3"), make_event("4")])
        # Everything below is pending then, and counts as a hole until it is read.
        await backend.skip("s", 4)
        await backend.redact(2)
        await backend.subscribe("s", catch)
        await skipped(backend)

    assert catch.ids == ["1", "3"]


async def test_each_shard_goes_on_behind_a_redacted_event_also_with_another_number_of_shards(database: str) -> None:
    catch = Catch()
    async with running(database) as backend:
        await backend.subscribe("s", catch, shards=3, order="key")
        await backend.unsubscribe("s")
        await backend.produce_many(
            [secret(str(number)) if number % 5 == 0 else make_event(str(number)) for number in range(1, 31)]
        )
        await backend.redact(10)
        await backend.reshard("s", 2)
        await backend.redact(20)
        await backend.subscribe("s", catch, shards=2, order="key")
        await skipped(backend, 2)

    assert sorted(catch.positions) == [number for number in range(1, 31) if number not in (10, 20)]


async def test_a_skip_and_a_redaction_at_once_leave_no_copy_and_hold_up_nothing(database: str) -> None:
    async with running(database) as backend, running(database) as other:
        catch = Catch()
        await backend.subscribe("s", catch, order="strict")
        await backend.unsubscribe("s")
        for position in range(1, 11, 2):
            await backend.produce_many([secret("it"), make_event("next")])
            done = await asyncio.gather(backend.skip("s", position), other.redact(position), return_exceptions=True)
            assert all(not isinstance(one, BaseException) or isinstance(one, EventNotFoundError) for one in done), done
        await backend.subscribe("s", catch, order="strict")
        await settled(backend)
        assert not await dead_letters(backend)

    assert catch.ids == ["next"] * 5


async def test_a_copy_that_a_worker_makes_at_the_same_time_is_deleted_too(database: str) -> None:
    async with running(database) as backend:
        await backend.subscribe("s", Catch())
        await backend.produce(secret("it"))
        await settled(backend)
        async with connected(database) as worker, connected(database) as observer:
            await worker.execute("BEGIN")
            await worker.execute("SELECT pgbackend.bury_skipped('s', 1)")
            redacting = asyncio.create_task(backend.redact(1))

            async def waits() -> bool:
                return bool(await observer.fetch("SELECT FROM pg_locks WHERE NOT granted"))

            await eventually("the redaction waits for the worker", waits)
            await worker.execute("COMMIT")
        assert (await redacting).dead_letters == 1
        assert not await dead_letters(backend)


async def test_a_redaction_gives_up_when_another_transaction_keeps_its_lock(database: str) -> None:
    async with running(database) as backend:
        await backend.produce(secret("it"))
        async with connected(database) as holder:
            await holder.execute("BEGIN")
            await holder.execute("LOCK TABLE pgbackend.dead_letters IN ROW EXCLUSIVE MODE")
            with pytest.raises(DatabaseError, match="was not redacted: for a second") as caught:
                await backend.redact(1)
            assert caught.value.sqlstate == "55P03"
        assert (await backend.redact(1)).position == 1


async def test_only_a_dead_letter_or_a_copy_is_left_and_is_redacted(database: str, sql: Any) -> None:
    async with running(database) as backend:
        await backend.subscribe("s", Catch(fails=lambda _: True), retry=LATE)
        await backend.produce_many([secret("1"), secret("2")])
        await failed(backend, 2)
        await backend.skip("s", 2)
        await backend.unsubscribe("s")
        await sql.execute("INSERT INTO pgbackend.kept_events SELECT * FROM pgbackend.stored_events WHERE position = 1")
        await sql.execute("DELETE FROM pgbackend.events")

        assert (await backend.redact(1)).tables == ("pgbackend.kept_events", "pgbackend.redeliveries")
        assert (await backend.redact(2)).tables == ("pgbackend.dead_letters",)
        with pytest.raises(EventNotFoundError, match="There is nothing at position 3"):
            await backend.redact(3)
        assert await sql.fetchval("SELECT count(*) FROM pgbackend.redactions") == 2
        await backend.subscribe("s", Catch(), retry=LATE)
        await skipped(backend)


async def test_a_redacted_event_cannot_be_skipped_and_its_position_says_so(backend: Backend) -> None:
    await backend.subscribe("s", Catch())
    await produce(backend, "1")
    await backend.redact(1)

    with pytest.raises(EventNotFoundError, match="is redacted"):
        await backend.skip("s", 1)


async def test_an_export_leaves_a_redacted_event_out(
    database: str, backend: Backend, capsys: pytest.CaptureFixture[str]
) -> None:
    await backend.produce_many([make_event("1"), secret("2"), make_event("3")])
    await backend.redact(2)
    log = LogAddress(dsn=database, listen_dsn=None, schema="pgbackend", directory=None)
    found = []
    async with reading(log, "earliest", end="latest", wanted=None, strict=True) as events:
        while not events.is_done:
            found += await events.next()

    assert [event.id for event in found] == ["1", "3"]
    assert "Positions 2 to 2 were removed from the log, or redacted." in capsys.readouterr().err


async def test_a_redaction_that_stays_open_delays_others_as_an_open_appender_does(database: str) -> None:
    catch = Catch()
    async with running(database) as backend, connected(database) as operator:
        await backend.subscribe("s", catch)
        await backend.produce(secret("1"))
        await catch.has("1")
        await settled(backend)
        await operator.execute("BEGIN")
        await operator.execute("SELECT pgbackend.redact(1)")
        (appender,) = (await backend.status()).appenders
        assert appender.pid == operator.get_server_pid()
        async with connected(database) as producer:
            await producer.execute("SELECT nextval('pgbackend.events_position_seq')")
        # Behind a hole: it waits for `hole_wait`, which is short here, and not for the end of that transaction.
        await produce(backend, "3")
        await catch.has("3")
        await operator.execute("ROLLBACK")
        await settled(backend)

    assert catch.ids == ["1", "3"]


async def test_a_redaction_leaves_the_check_of_events_on(database: str) -> None:
    async with connected(database) as connection, connection.transaction():
        await connection.execute("INSERT INTO pgbackend.events (id, source, type) VALUES ('1', '/s', 't')")
        await connection.execute("SELECT pgbackend.redact(1)")
        with pytest.raises(asyncpg.CheckViolationError):
            await connection.execute("INSERT INTO pgbackend.events (id, source, type) VALUES ('', '/s', 't')")


async def test_no_producer_can_make_an_event_that_looks_redacted(database: str) -> None:
    async with connected(database) as connection:
        with pytest.raises(asyncpg.CheckViolationError):
            await connection.execute(
                "INSERT INTO pgbackend.events (id, source, type, data_encoding) VALUES ('1', '/s', 't', 'redacted')"
            )
