"""Dates that Python cannot hold, and rows that the driver cannot decode: each harms only itself."""

from datetime import UTC, datetime, timedelta, timezone, tzinfo
from typing import Any

import asyncpg
import pytest

from pgbackend import Backend, ConfigError, Event, Retry
from pgbackend.facts import Recorder
from pgbackend.model import Order
from tests.support.backends import dead_letters, failed, settled
from tests.support.dispatchers import Catch
from tests.support.events import make_event
from tests.support.polling import eventually

SETTINGS: dict[str, Any] = {"commit_interval": 0.01, "poll_interval": 0.1, "hole_wait": 0.1}
DATED = """
    INSERT INTO pgbackend.events (id, source, type, recorded_at, data)
    VALUES ($1, 'test', 'test', $2::text::timestamptz, $3)"""
UNREADABLE = ["infinity", "-infinity", "20000-01-01 00:00:00+00", "0044-03-15 00:00:00+00 BC"]


@pytest.fixture
async def unchecked(sql: Any) -> None:
    """A log from before dates were checked."""
    await sql.execute("ALTER TABLE pgbackend.events DROP CONSTRAINT events_valid")


@pytest.mark.owner
@pytest.mark.parametrize("date", UNREADABLE)
async def test_the_log_refuses_dates_that_python_cannot_hold(sql: Any, date: str) -> None:
    with pytest.raises(asyncpg.CheckViolationError, match="not in the years 1 to 9999"):
        await sql.execute(DATED, "a", date, None)


@pytest.mark.owner
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("order", ["none", "key", "strict"])
async def test_an_event_that_cannot_be_read_becomes_a_dead_letter_and_the_others_are_delivered(
    database: str, sql: Any, order: Order
) -> None:
    for number, date in enumerate(UNREADABLE):
        await sql.execute(DATED, f"good{number}", "2026-01-01", None)
        await sql.execute(DATED, f"bad{number}", date, bytes(range(256)) * (number * 100))
    catch, other = Catch(), Catch()
    with Recorder() as recorder:
        async with Backend(database, **SETTINGS) as backend:
            await backend.subscribe("s", catch, start="earliest", order=order)
            await backend.produce(make_event("last"))
            await catch.has("good0", "good1", "good2", "good3", "last")
            found = await dead_letters(backend, 4)
            await settled(backend)
            (status,) = (await backend.status()).subscriptions
            await backend.subscribe("other", other, start="earliest")
            await other.has("last")
            both = await dead_letters(backend, 8)

    assert catch.ids == ["good0", "good1", "good2", "good3", "last"]
    assert [letter.event.id for letter in found] == ["bad0", "bad1", "bad2", "bad3"]
    assert [letter.event.data_bytes for letter in found] == [bytes(range(256)) * (n * 100) for n in range(4)]
    assert all("cannot be read" in letter.failure.error for letter in found)
    assert [[(entry.what, entry.error) for entry in letter.history] for letter in found] == [
        [("buried", letter.failure.error)] for letter in found
    ]
    assert {letter.subscription for letter in both} == {"s", "other"}
    assert (status.dead_letters, status.skipped) == (4, 0)
    assert len(recorder.all("event buried")) == 8
    dates = await sql.fetch("SELECT recorded_at::text AS date FROM pgbackend.dead_letters WHERE subscription = 's'")
    assert "infinity" in {row["date"] for row in dates}


@pytest.mark.owner
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("order", ["key", "strict"])
async def test_a_failed_event_that_can_no_longer_be_read_becomes_a_dead_letter(
    database: str, sql: Any, order: Order
) -> None:
    async with Backend(database, **SETTINGS) as backend:
        retry = Retry(attempts=5, delay=0.1, max_delay=60.0)
        await backend.subscribe("s", Catch(fails=lambda _: True), start="earliest", order=order, retry=retry)
        await backend.produce(make_event("bad"))
        await failed(backend)
    await sql.execute("UPDATE pgbackend.events SET recorded_at = 'infinity'")
    async with Backend(database, **SETTINGS) as backend:
        await backend.subscribe("s", Catch(), order=order)
        (letter,) = await dead_letters(backend, 1)
        await settled(backend)

    assert letter.event.id == "bad"
    assert "cannot be read" in letter.failure.error


@pytest.mark.owner
@pytest.mark.usefixtures("unchecked")
async def test_a_dead_letter_of_an_event_that_could_not_be_read_can_be_dispatched(database: str, sql: Any) -> None:
    await sql.execute(DATED, "bad", "infinity", b"data")
    got: list[tuple[str, bytes | None, datetime | None]] = []

    async def keep(event: Event) -> None:
        got.append((event.id, event.data_bytes, event.recorded_at))

    async with Backend(database, **SETTINGS) as backend:
        await backend.subscribe("s", keep, start="earliest")
        (letter,) = await dead_letters(backend, 1)
        assert await backend.redeliver(letter.id) == 1
        await dead_letters(backend, 0)

    assert got == [("bad", b"data", None)]


@pytest.mark.owner
@pytest.mark.usefixtures("unchecked")
async def test_more_than_a_page_of_events_that_cannot_be_read_does_not_stop_the_reader(database: str, sql: Any) -> None:
    await sql.execute(
        "INSERT INTO pgbackend.events (id, source, type, recorded_at) "
        "SELECT n, 'test', 'test', CASE WHEN n <= 1200 THEN timestamptz 'infinity' ELSE now() END "
        "FROM generate_series(1, 1250) AS n"
    )
    catch = Catch()
    async with Backend(database, **SETTINGS) as backend:
        await backend.subscribe("s", catch, start="earliest", shards=2)
        await catch.has(*(str(number) for number in range(1201, 1251)))
        await settled(backend)
        (status,) = (await backend.status()).subscriptions

    assert len(catch.ids) == 50
    assert (status.dead_letters, status.skipped) == (1200, 0)


@pytest.mark.owner
@pytest.mark.usefixtures("unchecked")
async def test_a_late_event_that_cannot_be_read_is_found_in_its_hole(database: str) -> None:
    catch = Catch()
    producer = await asyncpg.connect(database)
    async with Backend(database, **SETTINGS) as backend:
        await backend.subscribe("s", catch)
        await producer.execute("BEGIN")
        await producer.execute(DATED, "bad", "infinity", None)
        await producer.execute(DATED, "late", "2026-01-01", None)
        await backend.produce(make_event("a"))
        await catch.has("a")
        await producer.execute("COMMIT")
        await catch.has("late")
        (letter,) = await dead_letters(backend, 1)
        await settled(backend)
    await producer.close()

    assert letter.event.id == "bad"


@pytest.mark.owner
@pytest.mark.usefixtures("unchecked")
async def test_places_are_found_by_date_among_unreadable_dates(database: str, sql: Any) -> None:
    for number, date in enumerate([*UNREADABLE, "2026-01-01 00:00:00+00"]):
        await sql.execute(DATED, str(number), date, None)
    catch = Catch()
    async with Backend(database, **SETTINGS) as backend:
        await backend.subscribe("s", catch, start=datetime(2025, 1, 1, tzinfo=UTC))
        await catch.has("4")
        await backend.status()


class _Broken(tzinfo):
    def utcoffset(self, _: datetime | None) -> timedelta:
        raise RuntimeError("no such zone")

    def tzname(self, _: datetime | None) -> str:
        return "nowhere"

    def dst(self, _: datetime | None) -> None:
        return None


NO_DATES = [
    datetime(2026, 1, 1),  # noqa: DTZ001 - that is the point
    datetime.max,  # noqa: DTZ901 - the same
    datetime.min,  # noqa: DTZ901 - the same
    datetime.max.replace(tzinfo=timezone(timedelta(hours=-5))),
    datetime.min.replace(tzinfo=timezone(timedelta(hours=5))),
    datetime(2026, 1, 1, tzinfo=_Broken()),
]


@pytest.mark.parametrize("date", NO_DATES, ids=["naive", "max", "min", "behind max", "before min", "broken zone"])
async def test_a_date_that_cannot_be_stored_is_refused_at_once(backend: Backend, date: datetime) -> None:
    await backend.subscribe("there", Catch())
    with pytest.raises(ConfigError, match=r"start of 's' is datetime"):
        await backend.subscribe("s", Catch(), start=date)
    with pytest.raises(ConfigError, match=r"end of 's' is datetime"):
        await backend.subscribe("s", Catch(), end=date)
    with pytest.raises(ConfigError, match="to seek"):
        await backend.seek("there", date)
    with pytest.raises(ConfigError, match="end of 'there'"):
        await backend.alter_subscription("there", order="none", end=date, start="latest")
    with pytest.raises(ConfigError, match="start of 'there'"):
        await backend.alter_subscription("there", order="none", end=None, start=date)


@pytest.mark.parametrize(
    "place", [-1, 1 << 63, True, 1.5, "first", b"latest", None, (1,), pytest.param(10**5000, id="huge")]
)
async def test_an_invalid_place_is_refused_at_once(backend: Backend, place: Any) -> None:
    await backend.subscribe("there", Catch())
    with pytest.raises(ConfigError, match="expected"):
        await backend.subscribe("s", Catch(), start=place)
    with pytest.raises(ConfigError, match="expected"):
        await backend.seek("there", place)
    if place is not None:
        with pytest.raises(ConfigError, match="expected"):
            await backend.subscribe("s", Catch(), end=place)


@pytest.mark.parametrize("letter", [0, -1, 1 << 63, True, "1"])
async def test_an_invalid_dead_letter_id_is_refused(backend: Backend, letter: Any) -> None:
    with pytest.raises(ConfigError, match="dead letter"):
        await backend.redeliver(letter)


async def test_the_first_and_last_dates_mean_always_and_never(database: str) -> None:
    first, last = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
    catch = Catch()
    async with Backend(database, **SETTINGS) as backend:
        await backend.produce(make_event("before"))
        await backend.subscribe("s", catch, start=first, end=last)
        await backend.produce(make_event("after"))
        await catch.has("before", "after")
        await backend.seek("s", first)

        async def came_again() -> bool:
            return len(catch.ids) == 4

        await eventually("they come again", came_again)
        await backend.unsubscribe("s")
        await backend.subscribe("s", catch, end=last)
        await backend.alter_subscription("s", order="key", end=None, start=last)
        (status,) = (await backend.status()).subscriptions
    assert not status.complete
