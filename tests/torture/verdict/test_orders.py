"""Made-up runs of the plan "orders": each breaks one rule, or only looks like it."""

from dataclasses import replace

import pytest

from pgbackend.torture.applications.orders import Bill, Order
from pgbackend.torture.audit import Letter
from pgbackend.torture.records import Note
from pgbackend.torture.verdict.orders import OrderRecords, judge_orders
from pgbackend.torture.verdict.rulings import EFFECTS, KEYS, LETTERS, LOST, MOMENTS, ONCE, PAIRS, SEEN, Verdict
from tests.torture.verdict.story import KEYED, PLAIN, Story
from tests.torture.verdict.story import broken as broken_by


class Shop:
    """A shop whose subscription "a" handles events, and whose subscription "b" writes bills."""

    def __init__(self) -> None:
        self.story = Story()
        self.orders: list[Order] = []
        self.bills: list[Bill] = []
        self.moments = [Note(self.story.now, "moments", "moment", ["orders_without_event", "0", "0"])]
        self.story.claim("w1")

    def order(self, *numbers: int) -> None:
        """Orders are acknowledged with their events."""
        for number in numbers:
            self.story.produce(number, lane="p")
            self.orders.append(Order(f"p-{number}"))

    def deliver(self, *numbers: int) -> None:
        """The events are handled and billed."""
        self.story.handle("w1", *numbers)
        self.bill(*numbers)

    def bill(self, *numbers: int, ordered: bool = True) -> None:
        self.bills.extend(Bill("b", number, f"p-{number}", ordered) for number in numbers)

    def verdict(self) -> Verdict:
        subscriptions = {"a": PLAIN, "b": replace(KEYED, transactional=True)}
        run = replace(self.story.records(), subscriptions=subscriptions)
        return judge_orders(OrderRecords(run=run, moments=self.moments, bills=self.bills, orders=self.orders))

    def broken(self) -> list[str]:
        return broken_by(self.verdict())


def test_a_run_in_which_orders_and_events_agree_keeps_every_promise() -> None:
    shop = Shop()
    shop.order(1, 2)
    shop.deliver(1, 2)
    assert shop.verdict().outcome == "kept"
    assert shop.verdict().table[1:] == [("a", "2", "0"), ("b", "2", "0")]


def test_an_order_without_its_event_is_found() -> None:
    shop = Shop()
    shop.order(1)
    shop.deliver(1)
    shop.story.send(2)
    shop.story.outcome("uncertain", 2)
    assert shop.broken() == []
    shop.orders.append(Order("p-2"))
    assert shop.broken() == [PAIRS]


def test_an_event_without_its_order_is_found() -> None:
    shop = Shop()
    shop.story.send(1)
    shop.story.outcome("uncertain", 1)
    shop.story.store(1, 1)
    shop.deliver(1)
    assert shop.broken() == [PAIRS]
    shop.orders.append(Order("p-1"))
    assert shop.broken() == []


def test_an_order_that_is_there_twice_is_found() -> None:
    shop = Shop()
    shop.order(1)
    shop.deliver(1)
    shop.orders.append(Order("p-1"))
    assert shop.broken() == [PAIRS]


def test_an_acknowledged_order_that_is_gone_with_its_event_is_lost() -> None:
    shop = Shop()
    shop.story.send(1)
    shop.story.outcome("acknowledged", 1)
    assert shop.broken() == [LOST]


@pytest.mark.parametrize("outcome", ["refused", "rolled-back"])
def test_an_order_that_was_rolled_back_must_not_be_there_with_its_event(outcome: str) -> None:
    shop = Shop()
    shop.story.send(1)
    shop.story.outcome(outcome, 1)
    assert shop.broken() == []
    shop.story.store(1, 1)
    shop.orders.append(Order("p-1"))
    shop.deliver(1)
    assert shop.broken() == [ONCE]


def test_an_event_that_is_in_the_log_twice_is_found() -> None:
    shop = Shop()
    shop.order(1)
    shop.deliver(1)
    shop.story.store(1, 2)
    shop.story.handled("w1", shop.story.dispatch("w1", 2))
    assert shop.broken() == [ONCE]


def test_an_event_that_is_billed_and_never_handled_is_lost() -> None:
    shop = Shop()
    shop.order(1)
    shop.bill(1)
    shop.story.dispatch("w1", 1)
    assert shop.broken() == [LOST]
    shop.story.handle("w1", 1)
    assert shop.broken() == []


def test_an_event_that_is_handled_and_never_billed_is_lost() -> None:
    shop = Shop()
    shop.order(1)
    shop.story.handle("w1", 1)
    assert shop.broken() == [LOST]


def test_an_event_may_be_handled_again_and_must_not_be_billed_again() -> None:
    shop = Shop()
    shop.order(1)
    shop.deliver(1)
    shop.story.handle("w1", 1)
    assert shop.broken() == []
    assert shop.verdict().table[1] == ("a", "1", "1")
    shop.bill(1)
    assert shop.broken() == [EFFECTS]


def test_a_bill_must_not_be_written_before_the_order_is_there() -> None:
    shop = Shop()
    shop.order(1)
    shop.story.handle("w1", 1)
    shop.bill(1, ordered=False)
    assert shop.broken() == [EFFECTS]


def test_bills_of_a_key_are_written_in_log_order() -> None:
    shop = Shop()
    shop.order(1, 2)
    shop.deliver(2, 1)
    assert shop.broken() == [KEYS]


def test_an_event_that_is_not_in_the_log_must_not_be_dispatched() -> None:
    shop = Shop()
    shop.order(1)
    shop.deliver(1)
    shop.story.handled("w1", shop.story.dispatch("w1", 2, id_="p-2"))
    assert shop.broken() == [SEEN]


def test_one_moment_at_which_they_disagree_breaks_the_promise() -> None:
    shop = Shop()
    shop.moments.append(Note(shop.story.now, "moments", "moment", ["events_without_order", "1", "0"]))
    assert shop.broken() == [MOMENTS]


def test_a_dead_letter_breaks_the_promise_because_no_handler_fails() -> None:
    shop = Shop()
    shop.order(1)
    shop.deliver(1)
    shop.story.letters.append(Letter("a", "p-1", 4))
    assert shop.broken() == [LETTERS]
