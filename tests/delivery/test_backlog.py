from collections import defaultdict
from dataclasses import replace
from uuid import UUID, uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pgbackend.codec.event import Event
from pgbackend.delivery.backlog import Backlog, Carried
from pgbackend.delivery.delivery import Delivery, Origin
from pgbackend.model import Failure, Order
from tests.support.events import log_row

FAILURE = Failure(error="no", attempts=1, details={})


def event(position: int, key: str | None = None) -> Event:
    row = list(log_row(position))
    row[8] = key
    return Event(tuple(row))


def carried(
    attempt: int = 1, *, due_at: float = 0.0, failure: Failure | None = None, started_by: UUID | None = None
) -> Carried:
    return Carried(attempt=attempt, due_at=due_at, failure=failure, started_by=started_by)


def take(backlog: Backlog) -> Delivery | None:
    """The delivery that a deliverer would take next from a target that is up."""
    if backlog.given_up:
        return backlog.given_up.popleft()
    if backlog.retries:
        return backlog.retries.popleft()
    return Delivery(backlog.ready.popleft()) if backlog.ready else None


class BacklogMachine(RuleBasedStateMachine):
    """No event gets lost or doubled, and each lane hands out one event at a time, in log order."""

    @initialize(order=st.sampled_from(["none", "key", "strict"]), behind=st.sets(st.integers(1, 12), max_size=4))
    def begin(self, order: Order, behind: set[int]) -> None:
        self.order = order
        behind = behind if order != "none" else set()
        self.backlog = Backlog(order=order, carried={position: carried(due_at=5.0) for position in behind})
        self.now = 0.0
        self.added: dict[int, Event] = {}
        self.at_work: dict[int, Delivery] = {}
        self.groups: list[list[Event]] = []
        self.gone: set[int] = set()
        self.seen: dict[object, list[int]] = defaultdict(list)

    def lane(self, one: Event) -> object:
        return {"none": None, "key": one.key, "strict": ""}[self.order]

    @rule(key=st.sampled_from([None, "a", "b"]), undecided=st.booleans())
    def add(self, key: str | None, undecided: bool) -> None:
        position = len(self.added) + 1
        self.added[position] = event(position, key)
        if undecided:
            self.backlog.undecided.add(position)
        self.backlog.add(self.added[position])

    @rule()
    def take(self) -> None:
        if (delivery := take(self.backlog)) is not None:
            position = delivery.event.position
            assert position not in self.at_work
            lane = self.lane(delivery.event)
            assert lane is None or lane not in self.busy_lanes()
            self.at_work[position] = delivery
            self.seen[lane].append(position)

    def busy_lanes(self) -> list[object]:
        grouped = [one for group in self.groups for one in group]
        return [self.lane(one) for one in (*grouped, *(delivery.event for delivery in self.at_work.values()))]

    @rule(most=st.integers(1, 6))
    def take_group(self, most: int) -> None:
        is_full = self.backlog.has_group(most)
        group = self.backlog.take_group(most)
        assert len(group) <= most
        assert group == sorted(group, key=lambda one: one.position)
        # Behind an event that the filter has not decided on, a lane gives no more.
        assert len(group) == most or not is_full or self.backlog.undecided
        busy = self.busy_lanes()
        assert not [one for one in group if self.lane(one) is not None and self.lane(one) in busy]
        if group:
            self.groups.append(group)

    @precondition(lambda self: self.groups)
    @rule(number=st.integers(0, 9), handled=st.integers(0, 6), fails=st.booleans())
    def finish_group(self, number: int, handled: int, fails: bool) -> None:
        group = self.groups.pop(number % len(self.groups))
        for one in group[:handled]:
            self.see(one)
            self.gone.add(one.position)
            self.backlog.leave(one)
        rest = group[handled:]
        if fails and rest:
            bad, *rest = rest
            self.see(bad)
            held = [one for one in rest if self.lane(one) is not None and self.lane(one) == self.lane(bad)]
            self.backlog.hold_back(held)
            rest = [one for one in rest if one not in held]
            self.backlog.put_later(Delivery(bad.with_delivery(attempt=2)), self.now + 3.0)
        self.backlog.put_back_group(rest)

    def see(self, one: Event) -> None:
        self.seen[self.lane(one)].append(one.position)

    @precondition(lambda self: self.at_work)
    @rule(data=st.data(), how=st.sampled_from(["leave", "put back", "later"]))
    def finish(self, data: st.DataObject, how: str) -> None:
        position = data.draw(st.sampled_from(sorted(self.at_work)))
        delivery = self.at_work.pop(position)
        if how == "leave":
            self.gone.add(position)
            self.backlog.leave(delivery.event)
        elif how == "put back":
            self.backlog.put_back(delivery)
        else:
            retry = replace(delivery, event=delivery.event.with_delivery(attempt=delivery.event.attempt + 1))
            self.backlog.put_later(retry, self.now + 3.0)

    @rule(seconds=st.floats(0.5, 4.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.backlog.promote(self.now)

    @rule()
    def hasten(self) -> None:
        waiting = self.backlog.waiting()
        assert not waiting.keys() & self.at_work.keys()
        self.backlog.hasten(waiting, self.now)
        assert (self.backlog.next_due() or self.now) <= self.now

    @rule(refused=st.sets(st.integers(1, 20), max_size=5))
    def sift(self, refused: set[int]) -> None:
        parked, removed = self.backlog.sift(lambda one: one.position not in refused)
        for delivery in removed:
            self.backlog.leave(delivery.event)
        left = {one.position for one in parked} | {delivery.event.position for delivery in removed}
        grouped = {one.position for group in self.groups for one in group}
        assert left <= refused - self.at_work.keys() - self.gone - grouped
        assert len(parked) + len(removed) == len(left)
        self.gone |= left

    @invariant()
    def lanes_keep_log_order(self) -> None:
        if not hasattr(self, "order"):
            return
        for lane, positions in self.seen.items():
            if lane is not None:
                assert positions == sorted(positions)

    def teardown(self) -> None:
        if not hasattr(self, "order"):
            return
        for position in list(self.at_work):
            self.gone.add(position)
            self.backlog.leave(self.at_work.pop(position).event)
        for one in [one for group in self.groups for one in group]:
            self.gone.add(one.position)
            self.backlog.leave(one)
        self.backlog.promote(float("inf"))
        while (delivery := take(self.backlog)) is not None:
            assert delivery.event.position not in self.gone
            self.gone.add(delivery.event.position)
            self.backlog.leave(delivery.event)
            self.backlog.promote(float("inf"))
        assert self.gone == set(self.added)


TestBacklog = BacklogMachine.TestCase
TestBacklog.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_an_event_that_failed_under_a_former_owner_comes_when_it_is_due_with_its_attempts() -> None:
    backlog = Backlog(order="key", carried={1: carried(2, due_at=10.0, started_by=uuid4())})
    backlog.add(event(1, "k"))
    backlog.add(event(2, "k"))

    assert not backlog
    assert backlog.next_due() == 10.0
    backlog.promote(9.9)
    assert not backlog
    backlog.promote(10.0)
    delivery = take(backlog)
    assert delivery is not None
    assert (delivery.event.position, delivery.event.attempt, delivery.suspect) == (1, 4, True)
    backlog.leave(delivery.event)
    assert [one.position for one in backlog.ready] == [2]


def test_an_event_that_may_have_killed_its_process_waits_for_a_report_and_not_for_its_time() -> None:
    backlog = Backlog(order="key", carried={1: carried(started_by=uuid4()), 2: carried(3, due_at=9.0)})
    backlog.put_later(Delivery(event(3), started_by=uuid4()), 9.0)
    backlog.put_later(Delivery(event(4).with_delivery(attempt=2)), 9.0)

    assert backlog.waiting() == {2: 3, 4: 1}
    backlog.hasten({2, 4}, 1.0)
    backlog.add(event(2))
    backlog.promote(1.0)
    assert [delivery.event.position for delivery in backlog.retries] == [4, 2]


def test_what_was_given_up_under_a_former_owner_waits_for_the_dead_letter_dispatcher() -> None:
    backlog = Backlog(order="strict", carried={1: carried(0, failure=FAILURE)})
    backlog.add(event(1))
    backlog.promote(0.0)

    assert [delivery.event.failure for delivery in backlog.given_up] == [FAILURE]


def test_forgotten_events_of_a_former_owner_are_named_once() -> None:
    backlog = Backlog(order="key", carried={position: carried() for position in (1, 4, 9)})

    assert sorted(backlog.forget_carried(3, 10)) == [4, 9]
    assert backlog.forget_carried(3, 10) == []
    assert list(backlog.carried) == [1]


@pytest.mark.parametrize(("retry", "expected"), [(True, 12), (False, 3)])
def test_a_probe_is_the_retry_with_most_attempts_left_or_the_newest_event(*, retry: bool, expected: int) -> None:
    backlog = Backlog(order="none", carried={})
    backlog.add_run([event(1), event(2), event(3)])
    for position, attempt in ((11, 3), (12, 2), (13, 4)):
        backlog.put(Delivery(event(position).with_delivery(attempt=attempt), Origin.REDELIVERY))

    delivery = backlog.take_probe(retry=retry)
    assert delivery is not None
    assert delivery.event.position == expected


def test_a_dead_letter_that_was_sent_again_passes_any_filter() -> None:
    backlog = Backlog(order="none", carried={})
    backlog.put(Delivery(event(1), Origin.LETTER, letter=7))
    backlog.put_later(Delivery(event(2), Origin.REDELIVERY), 5.0)

    parked, removed = backlog.sift(lambda _: False)

    assert parked == []
    assert [delivery.event.position for delivery in removed] == [2]
    assert backlog.retries[0].letter == 7
    assert backlog.next_due() is None


@given(undecided=st.sets(st.integers(1, 9)))
def test_an_event_that_the_filter_did_not_decide_on_is_dispatched_by_itself(undecided: set[int]) -> None:
    backlog = Backlog(order="none", carried={})
    backlog.undecided |= undecided
    for position in range(1, 10):
        backlog.add(event(position))

    assert {delivery.event.position for delivery in backlog.retries} == undecided
    assert {one.position for one in backlog.ready} == set(range(1, 10)) - undecided
