import asyncio
from dataclasses import replace
from typing import Any, cast
from uuid import UUID, uuid4

import pytest

from pgbackend import Event, Retry
from pgbackend.delivery.care import Care, WorkerCare
from pgbackend.delivery.delivery import Delivery
from pgbackend.delivery.gate import Gate
from pgbackend.delivery.outcomes import Finished, Scheduled
from pgbackend.delivery.redelivery import Redelivery, Start
from pgbackend.delivery.registration import Registration
from pgbackend.delivery.shard import Mark, Shard
from pgbackend.delivery.window import Window
from pgbackend.errors import DatabaseError
from pgbackend.log.ranges import RangeSet
from pgbackend.subscriptions.presence import Tenure
from tests.delivery.test_shard import make_shard
from tests.support.events import log_row
from tests.support.handling import make_handling

ME, OTHER = uuid4(), uuid4()


async def committed() -> None: ...


def make_care(
    *,
    crashes: int,
    window_events: int = 3,
    alone: asyncio.Lock | None = None,
    commit: Any = committed,
    rows: Any = None,
    grace: float = 5.0,
    **handling: Any,
) -> Care:
    lease = replace(make_shard().lease, crashes=crashes)
    tenure = Tenure()
    tenure.valid_until = float("inf")
    window = Window(position=0, pending=RangeSet(), max_events=window_events, max_bytes=1000)
    shard = Shard(lease=lease, window=window, tenure=tenure, on_change=lambda _: None)
    registration = Registration("s", make_handling(retry=Retry(delay=2.0), **handling))
    common = WorkerCare(ME, cast("Redelivery", rows), commit, grace, alone or asyncio.Lock())
    return Care(shard, registration, Gate(), common)


def delivery(attempt: int = 1, *, started_by: UUID | None = None) -> Delivery:
    return Delivery(Event(log_row(7), attempt), started_by=started_by)


def test_care_starts_with_the_second_crash_and_ends_after_a_window_of_events() -> None:
    assert not make_care(crashes=1).active
    care = make_care(crashes=2)
    for _ in range(3):
        assert care.active
        care.survived()
    assert not care.active


@pytest.mark.parametrize(
    ("handling", "enough"),
    [({"concurrency": 3}, 6), ({"concurrency": 3, "batch": 2}, 12), ({"transactional": True}, 2),
     ({"transactional": True, "batch": 5}, 10)],
    ids=str,
)  # fmt: skip
def test_with_slow_events_care_ends_after_twice_as_many_as_a_shard_has_at_work(
    monkeypatch: pytest.MonkeyPatch, handling: dict[str, Any], enough: int
) -> None:
    monkeypatch.setattr("pgbackend.delivery.care._ENOUGH", -1.0)
    care = make_care(crashes=2, window_events=1000, **handling)
    for _ in range(enough):
        assert care.active
        care.survived()
    assert not care.active


def test_a_suspect_needs_care_wherever_it_turns_up() -> None:
    care = make_care(crashes=0)

    assert not care.covers(delivery())
    assert care.covers(delivery(started_by=OTHER))


async def test_events_wait_to_be_alone_no_longer_than_there_is_care(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgbackend.delivery.care._LONGEST", 0.0)
    alone = asyncio.Lock()
    care = make_care(crashes=2, alone=alone)
    await alone.acquire()

    async with care.alone(delivery()) as is_alone:
        assert not is_alone
    assert not care.active


async def test_a_suspect_waits_to_be_alone_though_care_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgbackend.delivery.care._LONGEST", 0.0)
    alone = asyncio.Lock()
    care = make_care(crashes=2, alone=alone)
    await alone.acquire()

    async def wait() -> bool:
        async with care.alone(delivery(started_by=OTHER)) as is_alone:
            return is_alone

    waiting = asyncio.create_task(wait())
    await asyncio.sleep(0)
    alone.release()
    assert await waiting


async def test_a_suspect_that_cannot_be_alone_soon_gives_its_deliverer_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgbackend.delivery.care.EXAMINE_AGAIN", 0.01)
    alone = asyncio.Lock()
    care = make_care(crashes=2, alone=alone)
    await alone.acquire()

    async with care.alone(delivery(started_by=OTHER)) as is_alone:
        assert not is_alone
    assert care.active, "the other events still need care"


async def test_the_start_of_an_attempt_is_committed_before_the_dispatch() -> None:
    commits: list[list[Any]] = []

    async def commit() -> None:
        commits.append(list(care._shard.outcomes.values()))

    care = make_care(crashes=2, commit=commit)
    assert await care.record_start(delivery(attempt=3))

    ((outcome,),) = commits
    assert isinstance(outcome, Scheduled)
    assert (outcome.position, outcome.attempt, outcome.started_by) == (7, 2, ME)
    assert outcome.steps == (), "nothing has failed yet"


async def test_an_attempt_that_killed_its_process_is_in_the_history_once_though_its_successor_is_taken_back() -> None:
    care = make_care(crashes=2)
    suspect = delivery(attempt=3, started_by=OTHER)
    ids = set()
    for _ in range(2):
        assert await care.record_start(suspect)
        care.take_back(suspect)
        (outcome,) = care._shard.outcomes.values()
        assert isinstance(outcome, Scheduled)
        ids |= {step.id for step in outcome.steps}
        assert {(step.what, step.attempt, step.error) for step in outcome.steps} == {
            ("failed", 2, "ProcessDied: the process that was handling it ended without a word")
        }

    assert len(ids) == 1


async def test_a_start_is_taken_back_when_the_shard_stops_before_it_is_committed() -> None:
    async def commit() -> None:
        care._gate.stop()
        raise DatabaseError("no answer")

    care = make_care(crashes=2, commit=commit)
    assert not await care.record_start(delivery(attempt=3, started_by=OTHER))

    (outcome,) = care._shard.outcomes.values()
    assert isinstance(outcome, Scheduled)
    assert (outcome.attempt, outcome.started_by) == (1, OTHER), "as it was: one attempt, and one that nobody reported"


class Rows:
    """The row that `find_start` finds, and the report."""

    def __init__(self, start: Start | None = None, *, failures: int = 0) -> None:
        """`failures`: how many reports fail first."""
        self.start = start
        self.reported: list[int] = []
        self._failures = failures

    async def find_start(self, *_: object) -> Start | None:
        return self.start

    async def report_survival(self, worker: UUID, subscription: str, delivery: Delivery) -> None:
        assert (worker, subscription) == (ME, make_shard().lease.subscription)
        if self._failures:
            self._failures -= 1
            raise DatabaseError("no answer")
        self.reported.append(delivery.event.position)


def start(
    *, started_by: UUID | None = OTHER, overdue: float = 0.0, connected: bool = False, server_age: float = 1000.0
) -> Start:
    return Start(attempt=2, started_by=started_by, overdue=overdue, connected=connected, server_age=server_age)


async def examined(found: Start | None) -> Delivery | None:
    return await make_care(crashes=2, rows=Rows(found), grace=0.0).examine(delivery(attempt=4, started_by=OTHER))


async def test_the_attempt_of_a_process_that_died_counts() -> None:
    one = await examined(start())

    assert one is not None
    assert (one.event.attempt, one.suspect) == (4, True)


async def test_an_attempt_that_a_living_process_lost_does_not_count() -> None:
    one = await examined(start(started_by=None))

    assert one is not None
    assert (one.event.attempt, one.suspect) == (3, False)


async def test_this_process_is_no_suspect_of_its_own() -> None:
    one = await examined(start(started_by=ME))

    assert one is not None
    assert (one.event.attempt, one.suspect) == (3, False)


@pytest.mark.parametrize(("overdue", "waits"), [(1.0, True), (61.0, False)])
async def test_a_suspect_waits_a_minute_for_a_process_that_is_frozen(*, overdue: float, waits: bool) -> None:
    one = await examined(start(connected=True, overdue=overdue))

    assert (one is None) is waits


async def test_a_worker_has_a_lease_to_come_back_after_the_claim_the_servers_start_and_its_connections_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr("pgbackend.delivery.care.monotonic", lambda: now)
    rows = Rows(start())
    care = make_care(crashes=2, rows=rows, grace=5.0)

    async def waits() -> bool:
        return await care.examine(delivery(attempt=4, started_by=OTHER)) is None

    now += 4.9
    assert await waits(), "the shard was claimed just now"
    now += 0.2
    assert not await waits()
    rows.start = start(server_age=4.9)
    assert await waits(), "the server was started just now"
    rows.start = start(connected=True)
    assert await waits()
    now += 4.9
    rows.start = start()
    assert await waits(), "the connection was there just now"
    now += 0.2
    assert not await waits()


def mark(care: Care) -> Mark:
    taken = care._shard.take_mark()
    assert taken is not None
    return taken


async def test_a_shard_that_is_given_up_reports_the_attempts_whose_end_is_not_on_record() -> None:
    rows = Rows(failures=2)
    care = make_care(crashes=2, rows=rows)
    await care.record_start(delivery())
    care.committed(mark(care))
    await care.report_survival()
    assert rows.reported == [7]

    await care.report_survival()
    assert rows.reported == [7], "once"


async def test_an_attempt_whose_answer_to_the_start_was_lost_is_reported() -> None:
    async def commit() -> None:
        care._gate.stop()
        raise DatabaseError("no answer")

    rows = Rows()
    care = make_care(crashes=2, rows=rows, commit=commit)
    assert not await care.record_start(delivery())
    await care.report_survival()

    assert rows.reported == [7]


async def test_an_attempt_that_started_after_a_mark_was_taken_is_reported() -> None:
    rows = Rows()
    care = make_care(crashes=2, rows=rows)
    care._shard.record(Scheduled(position=7, attempt=1, delay=0.0, error="", failure=None))
    taken = mark(care)
    await care.record_start(delivery(attempt=2))
    care.committed(taken)
    await care.report_survival()

    assert rows.reported == [7]


@pytest.mark.parametrize("recorded", [True, False])
async def test_only_a_dispatch_with_care_that_ends_the_process_counts_as_an_attempt(recorded: bool) -> None:
    rows = Rows()
    care = make_care(crashes=2, rows=rows)
    await care.record_start(delivery())
    care.process_ends(replace(delivery(), recorded=recorded))
    await care.report_survival()

    assert rows.reported == ([] if recorded else [7])


async def test_an_attempt_whose_end_is_on_record_is_not_reported() -> None:
    rows = Rows()
    care = make_care(crashes=2, rows=rows)
    await care.record_start(delivery())
    care.committed(mark(care))
    care._shard.record(Finished(position=7))
    care.committed(mark(care))
    await care.report_survival()

    assert rows.reported == []
