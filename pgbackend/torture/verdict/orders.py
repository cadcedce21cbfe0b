"""Judges a run of the plan "orders": the table of orders and the events about them agree, and each is delivered."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from pgbackend.torture.applications.orders import Bill, Order
from pgbackend.torture.records import Note
from pgbackend.torture.verdict.effects import check_effects, check_order, check_run
from pgbackend.torture.verdict.events import Events
from pgbackend.torture.verdict.judge import Records
from pgbackend.torture.verdict.rulings import EFFECTS, LETTERS, LOST, ORDER_RULES, PAIRS, SEEN, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderRecords:
    """Everything that a run left behind."""

    run: Records
    moments: Iterable[Note]
    bills: Iterable[Bill]
    """In the order in which they were written."""
    orders: Iterable[Order]


def judge_orders(records: OrderRecords) -> Verdict:
    """The verdict on a run."""
    verdict = Verdict.by(ORDER_RULES)
    events = check_run(records.run, records.moments, verdict)
    _check_pairs(Counter(order.id for order in records.orders), events, verdict)
    bills = list(records.bills)
    handled = _check_dispatches(records.run, events, verdict)
    verdict.table.append(("subscription", "events handled", "again"))
    for name, terms in records.run.subscriptions.items():
        if terms.transactional:
            mine = [bill for bill in bills if bill.subscription == name]
            check_effects(name, mine, events, (), verdict)
            check_order(mine, events, verdict)
            _check_bills(mine, verdict)
            handled[name] = Counter(bill.id for bill in mine)
        else:
            _check_handled(name, handled[name], events, verdict)
        verdict.table.append((name, f"{len(handled[name]):,}", f"{handled[name].total() - len(handled[name]):,}"))
    _check_letters(records.run, verdict)
    return verdict


def _check_pairs(orders: Counter[str], events: Events, verdict: Verdict) -> None:
    """Check that orders and events agree exactly, and that what was acknowledged is there."""
    pairs, lost = verdict.rulings[PAIRS], verdict.rulings[LOST]
    stored = {id_: position for position, id_ in events.stored()}
    for id_ in sorted({*orders, *stored}):
        pairs.checked += 1
        if id_ not in orders:
            pairs.violated(f"event {id_} is in the log at {stored[id_]}, and there is no such order")
        elif id_ not in stored:
            pairs.violated(f"order {id_} is there, and no such event is in the log")
        elif orders[id_] > 1:
            pairs.violated(f"order {id_} is there {orders[id_]} times")
    for id_, sent in events.sent():
        if sent.acknowledged:
            lost.checked += 1
            if id_ not in orders:
                lost.violated(f"order {id_} was acknowledged, and is not there")


def _check_dispatches(run: Records, events: Events, verdict: Verdict) -> dict[str, Counter[str]]:
    """Check that handlers saw only what is in the log. Returns how often each subscription handled each event."""
    seen = verdict.rulings[SEEN]
    handled: dict[str, Counter[str]] = {name: Counter() for name in run.subscriptions}
    at_work: dict[tuple[str, str], tuple[str, str]] = {}
    for note in run.notes:
        if note.kind == "dispatch":
            serial, subscription, _, _, position, _, id_ = note.fields
            seen.checked += 1
            if events.id_at(int(position)) != id_:
                seen.violated(f"this event is not in the log there: {note}")
            at_work[note.place, serial] = subscription, id_
        elif note.kind == "handled" and (ended := at_work.pop((note.place, note.fields[0]), None)) is not None:
            handled[ended[0]][ended[1]] += 1
        elif note.kind == "doubt":
            verdict.doubts += 1
    return handled


def _check_handled(name: str, handled: Counter[str], events: Events, verdict: Verdict) -> None:
    lost = verdict.rulings[LOST]
    for position, id_ in events.stored():
        lost.checked += 1
        if id_ not in handled:
            lost.violated(f"{name} did not handle {id_} at {position}")


def _check_bills(bills: Iterable[Bill], verdict: Verdict) -> None:
    """Check that the order was there when its event was handled."""
    for bill in bills:
        if not bill.ordered:
            verdict.rulings[EFFECTS].violated(f"{bill} was written before its order was there")


def _check_letters(run: Records, verdict: Verdict) -> None:
    """Check that there are no dead letters: no handler fails."""
    ruling = verdict.rulings[LETTERS]
    ruling.checked += 1
    for letter in run.state.letters:
        ruling.violated(f"no event fails: {letter}")
