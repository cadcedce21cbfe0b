import time

from pgbackend.delivery.outcomes import Buried, Finished, LetterDelivered, LetterFailed, Scheduled, outcome_key
from pgbackend.delivery.shard import Mark, Shard
from pgbackend.delivery.window import Window
from pgbackend.log.ranges import RangeSet
from pgbackend.model import Epoch, Failure, Position
from pgbackend.subscriptions.leases import Lease
from pgbackend.subscriptions.pauses import PauseState
from pgbackend.subscriptions.presence import Tenure


def make_shard(*, position: int = 0, pending: str = "{}") -> Shard:
    ranges = RangeSet.parse(pending)
    lease = Lease(
        subscription="billing", shard=1, shards=2, epoch=Epoch(7), until=None, position=Position(position),
        pending=ranges, holes=ranges, place=(0, 1), complete=False, crashes=0, head=0, order="none",
        start_position=None, start_at=None, end_position=None, end_at=None,
        pause=PauseState(None, None),
    )  # fmt: skip
    return Shard(
        lease=lease,
        window=Window(position=position, pending=ranges, max_events=10, max_bytes=1000),
        tenure=Tenure(),
        on_change=lambda _: None,
    )


def scheduled(position: int, attempt: int = 1) -> Scheduled:
    return Scheduled(position=position, attempt=attempt, delay=1.0, error="no", failure=None)


def handle(shard: Shard, *positions: int) -> None:
    for position in positions:
        shard.window.open(position, 1)
        shard.window.settle(position)


def collected(shard: Shard) -> Mark:
    mark = shard.take_mark()
    assert mark is not None
    return mark


def test_nothing_is_committed_that_the_row_says_already() -> None:
    shard = make_shard(position=5, pending="{[3,4)}")

    assert shard.take_mark() is None


def test_what_was_settled_is_collected_once_it_is_confirmed_no_more() -> None:
    shard = make_shard()
    handle(shard, 1, 2)
    mark = collected(shard)
    assert (mark.position, mark.pending, mark.complete) == (2, "{}", False)
    shard.confirm(mark, (0, 2))

    assert shard.take_mark() is None
    assert shard.place == (0, 2)


def test_a_commit_that_failed_is_collected_again_with_its_outcomes() -> None:
    shard = make_shard()
    handle(shard, 1)
    shard.record(scheduled(1))
    shard.restore(collected(shard))

    assert collected(shard).outcomes == {("event", 1): scheduled(1)}


def test_what_happened_after_a_failed_commit_counts_more_than_what_it_said() -> None:
    shard = make_shard()
    shard.record(scheduled(1))
    shard.record(scheduled(2))
    mark = collected(shard)
    shard.record(Finished(position=1))
    shard.restore(mark)

    assert collected(shard).outcomes == {("event", 1): Finished(position=1), ("event", 2): scheduled(2)}


def test_of_several_outcomes_of_an_event_the_last_one_counts() -> None:
    shard = make_shard()
    for outcome in (scheduled(1), scheduled(1, attempt=2), Buried(position=1, failure=Failure(error="x", attempts=2))):
        shard.record(outcome)

    assert [type(outcome) for outcome in collected(shard).outcomes.values()] == [Buried]


def test_an_event_and_a_letter_of_the_same_number_are_two_things() -> None:
    failed = LetterFailed(letter=1, attempt=1, delay=None, error="x", details={})

    assert outcome_key(scheduled(1)) == outcome_key(Finished(position=1)) == ("event", 1)
    assert outcome_key(LetterDelivered(letter=1)) == outcome_key(failed) == ("letter", 1)


def test_completion_is_committed_though_the_position_is_the_same() -> None:
    shard = make_shard(position=5)
    shard.finish()

    assert collected(shard).complete


def test_it_dispatches_only_within_its_tenure() -> None:
    shard = make_shard()
    assert not shard.may_dispatch()
    shard.tenure.valid_until = time.monotonic() + 60
    assert shard.may_dispatch()
    shard.lose()
    assert not shard.may_dispatch()
