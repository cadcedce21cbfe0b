from collections.abc import Generator
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pgbackend.log.fence import MAX_PENDING_RANGES, AppenderClock, Evidence, Fence
from pgbackend.log.ranges import RangeSet
from pgbackend.log.reader import Batch, Reader
from tests.support.simulated_log import HOLE_WAIT, Account, SimulatedLog

PAGE = 3


class Follower:
    """A reader and the subscription behind it, moved one step at a time."""

    def __init__(self, log: SimulatedLog, *, strict: bool) -> None:
        self.log = log
        self.account = Account(log, strict=strict)
        self.reader = log.reader(strict=strict)
        self._round: Generator[Any, None, Batch] | None = None
        self._was_visible = 0

    def step(self, *, prove: bool) -> bool:
        """One step of a round; whether that ended it."""
        if self._round is None:
            self._was_visible = max(self.log.visible, default=0)
            self._round = self.reader.read(prove=prove).__await__()
        try:
            self._round.send(None)
        except StopIteration as stop:
            self._round = None
            self._take(stop.value)
            return True
        return False

    def _take(self, batch: Batch) -> None:
        self.account.take(batch.positions, batch.opened, batch.closed, batch.upto)
        # A reader is held back only by an appender that is not overdue, or because evidence is missing.
        if not self.account.strict and batch.pause != 0.0 and self.reader.position < self._was_visible:
            blockers = [hole.blockers or frozenset() for hole in self.reader._fence._holes if not hole.passed]
            waited_for = {name for names in blockers for name in names}
            assert any(not self.log.clock.is_overdue(name, now=0) for name in waited_for), "it waits for no appender"

    def start_over(self) -> None:
        """Start from what the subscription knows, as after a crash or when a cursor begins a stream of its own."""
        if self._round is not None:
            self._round.close()
            self._round = None
        self.reader = self.log.reader(after=self.account.position, holes=self.account.holes, strict=self.account.strict)

    def finish(self) -> None:
        for _ in range(200):
            if self.step(prove=True) and self.account.position >= self.log.head and not self.account.holes:
                return
        raise AssertionError(f"held back at {self.account.position} of {self.log.head}: {self.account.holes}")


# (who, what): appenders act most of the time; otherwise readers step, time passes, or readers start again.
steps = st.lists(st.tuples(st.integers(0, 15), st.integers(0, 9)), max_size=150)


@settings(max_examples=400)
@given(steps)
@example([(9, 0), (9, 1), (9, 1), (9, 0), (8, 1), (8, 1), (8, 9), (0, 0), (0, 0), (0, 0), (0, 0), (9, 6), (9, 9)])
def test_no_interleaving_of_appenders_and_readers_loses_repeats_or_misorders_an_event(
    script: list[tuple[int, int]],
) -> None:
    log = SimulatedLog(page=PAGE)
    followers = [Follower(log, strict=False), Follower(log, strict=True), Follower(log, strict=False)]
    for who, what in script:
        if who < 5:
            followers[who % 3].step(prove=what % 2 == 0)
        elif who == 5:
            followers[what % 3].start_over()
        elif who == 6:
            log.now += what
        else:
            log.act(who, what)
    log.settle_down()
    for follower in followers:
        follower.finish()
    for follower in followers:
        follower.account.verify()


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=80), st.integers(1, 8))
def test_once_every_open_appender_is_overdue_nothing_visible_is_held_back(
    script: list[tuple[int, int]], waits: int
) -> None:
    log = SimulatedLog(page=PAGE)
    follower = Follower(log, strict=False)
    for who, what in script:
        log.act(who, what)
    while not follower.step(prove=True):
        pass
    # Each appender has been seen open by now: readers wait once for it, not once for each of its holes.
    log.now += HOLE_WAIT
    for _ in range(waits):
        for appender in log.transactions:
            if appender.locked and not appender.over and not appender.name.startswith("-1/"):
                log.draw(appender)
        log.append()
        for _ in range(100):
            if follower.step(prove=False) and follower.reader.position >= max(log.visible):
                break
        assert set(follower.account.seen) == set(log.visible)
    # Their late commits are still read.
    log.settle_down()
    follower.finish()
    follower.account.verify()


def finished(reader: Reader, *, prove: bool = False) -> Batch:
    """A round in which nothing else happens."""
    steps = reader.read(prove=prove).__await__()
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            batch: Batch = stop.value
            return batch


def test_an_appender_that_becomes_a_prepared_transaction_still_fills_its_hole() -> None:
    log = SimulatedLog()
    first = log.open_appender()
    log.append()
    reader = log.reader()
    finished(reader)
    assert finished(reader).positions == []

    first.name = "-1/77"
    assert finished(reader).positions == []
    log.commit_and_unlock(first)

    assert finished(reader).positions == [1, 2]


def test_a_hole_that_fills_with_more_than_a_page_is_read_to_its_end() -> None:
    log = SimulatedLog(page=PAGE)
    bulk = log.open_appender(4 * PAGE)
    log.append()
    account = Account(log)
    reader = log.reader()
    finished(reader)
    log.now += HOLE_WAIT
    for committed in (False, False, True, True, True, True, True, True):
        if committed and not bulk.over:
            log.commit_and_unlock(bulk)
        batch = finished(reader)
        account.take(batch.positions, batch.opened, batch.closed, batch.upto)
    account.verify()


def test_waiting_for_a_prepared_transaction_counts_from_its_old_name() -> None:
    clock = AppenderClock(hole_wait=1.0)
    clock.observe(["3/1", "4/1"], now=0.0)
    clock.observe(["4/1", "-1/9"], now=0.9)

    assert clock.is_overdue("-1/9", now=1.0)


def test_waiting_for_an_appender_counts_from_when_it_was_first_seen() -> None:
    clock = AppenderClock(hole_wait=1.0)
    clock.observe(["3/1"], now=5.0)
    clock.observe(["3/1"], now=5.9)

    assert not clock.is_overdue("3/1", now=5.95)
    assert clock.is_overdue("3/1", now=6.0)
    assert not clock.is_overdue("3/2", now=99.0), "never seen: the next evidence says whether it is open"


def test_evidence_proves_nothing_about_positions_drawn_after_it() -> None:
    fence = Fence()
    fence.apply_evidence(Evidence(4, frozenset(), None))
    fence.add_missing(3, 7)

    assert fence.remove_dead() == []
    assert fence.needs_evidence
    fence.apply_evidence(Evidence(6, frozenset(), None))
    assert fence.remove_dead() == [(3, 7)]


def test_evidence_proves_nothing_about_adopted_holes_above_it() -> None:
    fence = Fence([(5, 9)])
    fence.apply_evidence(Evidence(7, frozenset(), None))

    assert fence.remove_dead() == []
    assert fence.needs_evidence


def test_evidence_covers_pages_that_are_read_after_it() -> None:
    fence = Fence()
    fence.apply_evidence(Evidence(9, frozenset({"3/1"}), None))
    fence.add_missing(3, 7)
    fence.apply_evidence(Evidence(12, frozenset({"3/2"}), None))

    assert fence.remove_dead() == [(3, 7)], "3/2 came after position 6 was drawn"


def test_an_event_in_the_middle_of_a_hole_leaves_both_ends_open() -> None:
    fence = Fence([(3, 8)])

    assert fence.fill([5]) == [5]
    assert fence.ranges() == RangeSet([(3, 5), (6, 8)])


def test_known_holes_are_not_adopted_twice() -> None:
    fence = Fence([(3, 6)])
    fence.adopt([(1, 4), (5, 9)])

    assert len(fence) == 3
    assert fence.ranges() == RangeSet([(1, 9)])


def test_adopting_many_holes_takes_one_step_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """4,000 took ten seconds, in which the whole process stood still."""
    holes = [(2 * number, 2 * number + 1) for number in range(500)]
    fence = Fence(holes)
    removed = 0
    remove = RangeSet.remove

    def counted(ranges: RangeSet, lower: int, upper: int) -> None:
        nonlocal removed
        removed += 1
        remove(ranges, lower, upper)

    monkeypatch.setattr(RangeSet, "remove", counted)
    fence.adopt(holes)

    assert len(fence) == 500
    assert removed <= 500


def test_a_reader_passes_no_more_holes_than_an_offset_can_carry() -> None:
    clock = AppenderClock(hole_wait=0.0)
    clock.observe(["3/1"], now=0.0)
    fence = Fence()
    fence.apply_evidence(Evidence(10**6, frozenset({"3/1"}), None))
    for number in range(MAX_PENDING_RANGES + 10):
        fence.add_missing(2 * number + 1, 2 * number + 2)

    assert len(fence.pass_overdue(clock, now=1.0)) == MAX_PENDING_RANGES
    assert fence.barrier == 2 * MAX_PENDING_RANGES + 1
    assert fence.fill([1]) == [1]
    assert len(fence.pass_overdue(clock, now=1.0)) == 1, "reading goes on as holes are resolved"


def test_a_reader_that_waits_for_minutes_keeps_reading() -> None:
    log = SimulatedLog()
    log.open_appender()
    log.append()
    reader = log.reader(strict=True)
    waits = [finished(reader).pause or 0.0 for _ in range(5000)]

    assert max(waits) <= 0.025
    assert waits[1:] == sorted(waits[1:])


def test_a_strict_reader_passes_no_hole() -> None:
    clock = AppenderClock(hole_wait=0.0)
    clock.observe(["3/1"], now=0.0)
    fence = Fence([(1, 2)], strict=True)
    fence.apply_evidence(Evidence(9, frozenset({"3/1"}), None))
    fence.add_missing(5, 6)

    assert fence.pass_overdue(clock, now=99.0) == []
    assert fence.barrier == 1


def test_a_transaction_that_fills_several_pages_is_read_to_its_end_before_later_events() -> None:
    """After its first page no appender holds its hole open any more, and it is still to be read to its end."""
    log = SimulatedLog(page=PAGE)
    bulk = log.open_appender(3 * PAGE)
    log.append()
    reader = log.reader()
    seen: list[int] = []
    assert finished(reader).positions == []
    log.commit_and_unlock(bulk)
    for _ in range(4):
        seen += finished(reader).positions

    assert seen == sorted(log.visible)
