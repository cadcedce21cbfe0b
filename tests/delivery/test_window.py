import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pgbackend.delivery.window import Window
from pgbackend.log.ranges import RangeSet


class WindowMachine(RuleBasedStateMachine):
    """A window beside a naive model of it: for each position that was read, what is known about it."""

    @initialize(position=st.integers(0, 8), pending=st.sets(st.integers(1, 8)))
    def begin(self, position: int, pending: set[int]) -> None:
        held = {p for p in pending if p <= position}
        self.window = Window(position=position, pending=RangeSet.of(sorted(held)), max_events=9, max_bytes=90)
        self.state = {p: "hole" if p in held else "done" for p in range(1, position + 1)}
        self.handled: set[int] = set()
        self.read = position
        self.last_mark = position
        self.bridged: set[int] = set()
        """Gaps in front of what was put off: pending with it, also when they turn out to be dead."""

    def pick(self, state: str, number: int) -> int | None:
        found = sorted(p for p, s in self.state.items() if s == state)
        return found[number % len(found)] if found else None

    @rule(gap=st.integers(0, 3), is_hole=st.booleans(), wanted=st.booleans())
    def read_on(self, gap: int, is_hole: bool, wanted: bool) -> None:
        """The next event, perhaps behind missing positions that are dead or an open hole."""
        position = self.read + gap + 1
        if gap and is_hole:
            self.window.add_hole((self.read + 1, position))
        for missing in range(self.read + 1, position):
            self.state[missing] = "hole" if is_hole else "done"
        if wanted:
            self.window.open(position, 10)
        else:
            self.window.skip(position)
        self.state[position] = "flying" if wanted else "done"
        self.read = position

    @rule(gap=st.integers(0, 3), is_hole=st.booleans())
    def put_off_the_next(self, gap: int, is_hole: bool) -> None:
        """An event behind the end; dead positions in front of it may count as put off, too."""
        position = self.read + gap + 1
        if gap and is_hole:
            self.window.add_hole((self.read + 1, position))
            self.bridged.update(range(self.read + 1, position))
        self.window.put_off(position)
        for missing in range(self.read + 1, position):
            self.state[missing] = "hole" if is_hole else "put off"
        self.state[position] = "put off"
        self.read = position

    @rule(number=st.integers(0, 20))
    def put_off_what_fills_a_hole(self, number: int) -> None:
        position = self.pick("hole", number)
        if position is not None:
            self.window.put_off(position)
            self.state[position] = "put off"

    @rule(count=st.integers(1, 5))
    def read_a_run(self, count: int) -> None:
        positions = range(self.read + 1, self.read + 1 + count)
        self.window.open_run(positions, [10] * count)
        self.state.update(dict.fromkeys(positions, "flying"))
        self.read = positions[-1]

    @rule(count=st.integers(1, 3), is_hole=st.booleans())
    def account_for_an_empty_end(self, count: int, is_hole: bool) -> None:
        upto = self.read + count
        if is_hole:
            self.window.add_hole((self.read + 1, upto + 1))
        for position in range(self.read + 1, upto + 1):
            self.state[position] = "hole" if is_hole else "done"
        self.window.advance(upto)
        self.read = upto

    @rule(number=st.integers(0, 20), wanted=st.booleans())
    def fill_a_hole(self, number: int, wanted: bool) -> None:
        position = self.pick("hole", number)
        if position is not None:
            if wanted:
                self.window.open(position, 10)
            else:
                self.window.skip(position)
            self.state[position] = "flying" if wanted else "done"
            self.bridged.discard(position)

    @rule(number=st.integers(0, 20), width=st.integers(1, 3))
    def fill_holes_with_events_of_other_shards(self, number: int, width: int) -> None:
        position = self.pick("hole", number)
        if position is not None:
            late = [one for one in range(position, position + width) if self.state.get(one) == "hole"]
            self.window.skip_late(RangeSet.of(late))
            self.state.update(dict.fromkeys(late, "done"))
            self.bridged.difference_update(late)

    @rule(number=st.integers(0, 20), width=st.integers(1, 3))
    def close_a_hole(self, number: int, width: int) -> None:
        position = self.pick("hole", number)
        if position is not None:
            self.window.close_hole((position, position + width))
            for dead in range(position, position + width):
                if self.state.get(dead) == "hole":
                    self.state[dead] = "put off" if dead in self.bridged else "done"

    @rule(number=st.integers(0, 20))
    def settle(self, number: int) -> None:
        position = self.pick("flying", number)
        if position is not None:
            self.window.settle(position)
            self.state[position] = "done"
            self.handled.add(position)

    @rule(chosen=st.sets(st.integers(0, 8), min_size=1), is_committed=st.booleans())
    def settle_with_a_commit(self, chosen: set[int], is_committed: bool) -> None:
        settling = sorted({p for number in chosen if (p := self.pick("flying", number)) is not None})
        mark, pending = self.window.mark(settling)
        for position in settling if is_committed else ():
            self.window.settle(position)
            self.state[position] = "done"
            self.handled.add(position)
        if is_committed:
            self.check(mark, pending)

    @precondition(lambda self: hasattr(self, "window"))
    @invariant()
    def mark_tells_the_truth(self) -> None:
        self.check(*self.window.mark())

    def check(self, mark: int, pending: RangeSet) -> None:
        assert mark >= self.last_mark, "it went back"
        self.last_mark = mark
        unsettled = {p for p, state in self.state.items() if state != "done" and p <= mark}
        assert pending == RangeSet.of(sorted(unsettled)), "settled and unsettled are told apart"
        assert mark <= self.read
        assert all(position <= mark for position in self.handled), "handled, and yet dispatched again after a crash"
        if "flying" not in self.state.values():
            assert mark == self.read

    @precondition(lambda self: hasattr(self, "window"))
    @invariant()
    def counts_agree(self) -> None:
        flying = [p for p, state in self.state.items() if state == "flying"]
        assert len(self.window) == len(flying)
        assert self.window.bytes == 10 * len(flying)
        assert self.window.full == (len(flying) >= 9)
        for position, state in self.state.items():
            assert (position in self.window.holes) == (state == "hole"), position


WindowMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestWindowAgainstANaiveModel = WindowMachine.TestCase


def window(position: int = 0, *, events: int = 10, size: int = 100) -> Window:
    return Window(position=position, pending=RangeSet(), max_events=events, max_bytes=size)


def test_the_example_of_the_docstring() -> None:
    shown = window()
    shown.open_run(range(1, 10), [1] * 9)
    for position in (1, 2, 4, 6):
        shown.settle(position)

    assert shown.mark() == (6, RangeSet([(3, 4), (5, 6)]))


def test_what_fills_a_hole_below_the_mark_is_pending() -> None:
    shown = window(5)
    shown.add_hole((6, 7))
    shown.open(7, 1)
    shown.settle(7)
    assert shown.mark() == (7, RangeSet([(6, 7)]))
    shown.open(6, 1)

    assert shown.mark() == (7, RangeSet([(6, 7)]))
    shown.settle(6)
    assert shown.mark() == (7, RangeSet())


def test_one_event_always_fits_and_a_second_one_only_within_both_bounds() -> None:
    shown = window(size=100, events=2)
    assert shown.fits(10**9)
    shown.open(1, 60)
    assert shown.fits(40)
    assert not shown.fits(41)
    shown.open(2, 1)
    assert not shown.fits(1)


def test_an_event_is_settled_once() -> None:
    shown = window()
    shown.open(1, 1)
    shown.settle(1)
    shown.settle(1)

    with pytest.raises(KeyError):
        shown.mark()


def test_a_hole_that_reaches_into_what_was_read_is_added_for_the_rest_only() -> None:
    shown = window(5)
    shown.add_hole((3, 8))

    assert shown.holes == RangeSet([(6, 8)])


def test_what_is_gone_behind_where_a_shard_ends_is_none_of_its_concern() -> None:
    window = Window(position=5, pending=RangeSet([(2, 4)]), max_events=9, max_bytes=90)

    assert window.lose(20, 10) == []
    assert window.lose(3, 10) == [(3, 4), (6, 10)]
    assert list(window.holes) == [(2, 3)]


def test_only_what_was_read_once_is_lost_with_a_hole_that_closes() -> None:
    pending = RangeSet([(2, 6)])
    window = Window(position=9, pending=pending, seen=RangeSet([(3, 5)]), max_events=9, max_bytes=90)

    assert str(window.unseen(9)) == "{[2,3),[5,6)}"
    assert window.close_hole((1, 4)) == [(3, 4)]
    window.skip(4)
    assert window.close_hole((4, 6)) == []
    assert str(window.unseen(9)) == "{}"
