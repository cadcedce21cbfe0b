"""Judges a run of the plan "bank": each transfer is made once or not at all, and no money appears or vanishes."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from pgbackend.torture.applications.bank import ACCOUNTS, CLOSED, OPENING, Applied, Balance, transfer
from pgbackend.torture.records import Note
from pgbackend.torture.verdict.effects import check_effects, check_order, check_run
from pgbackend.torture.verdict.events import Events
from pgbackend.torture.verdict.judge import Records
from pgbackend.torture.verdict.rulings import BALANCES, BANK_RULES, LETTERS, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class BankRecords:
    """Everything that a run left behind."""

    run: Records
    moments: Iterable[Note]
    applied: Iterable[Applied]
    """In the order in which the transfers were noted."""
    balances: Iterable[Balance]


def judge_bank(records: BankRecords) -> Verdict:
    """The verdict on a run."""
    verdict = Verdict.by(BANK_RULES)
    events = check_run(records.run, records.moments, verdict)
    verdict.doubts = sum(note.kind == "doubt" for note in records.run.notes)
    applied, balances = list(records.applied), list(records.balances)
    verdict.table.append(("bank", "transfers", "in transactions", "declined", "dead letters", "total"))
    for name, terms in records.run.subscriptions.items():
        mine = [one for one in applied if one.subscription == name]
        letters = {letter.id for letter in records.run.state.letters if letter.subscription == name}
        check_effects(name, mine, events, letters, verdict)
        if terms.order == "key":
            check_order(mine, events, verdict)
        _check_letters(name, letters, events, verdict)
        accounts = {one.account: one.balance for one in balances if one.subscription == name}
        _check_balances(name, mine, accounts, verdict)
        transactions, declined = len({one.transaction for one in mine}), sum(one.declined for one in mine)
        figures = (len(mine), transactions, declined, len(letters), sum(accounts.values()))
        verdict.table.append((name, *(f"{figure:,}" for figure in figures)))
    return verdict


def _check_letters(name: str, letters: set[str], events: Events, verdict: Verdict) -> None:
    """Check that exactly the transfers to the closed account have a dead letter."""
    ruling = verdict.rulings[LETTERS]
    for position, id_ in events.stored():
        ruling.checked += 1
        is_closed = transfer(id_).target == CLOSED
        if is_closed and id_ not in letters:
            ruling.violated(f"{id_} at {position} goes to a closed account, and has no dead letter in {name}")
        elif id_ in letters and not is_closed:
            ruling.violated(f"{id_} at {position} goes to an open account, and has a dead letter in {name}")


def _check_balances(name: str, applied: Iterable[Applied], accounts: dict[str, int], verdict: Verdict) -> None:
    """Check the balances against the transfers that were noted. Each of these counts as often as it was noted."""
    ruling = verdict.rulings[BALANCES]
    expected = Counter(dict.fromkeys(ACCOUNTS, OPENING))
    for one in applied:
        if not one.declined:
            order = transfer(one.id)
            expected[order.source] -= order.amount
            expected[order.target] += order.amount
    for account in sorted({*expected, *accounts}):
        ruling.checked += 1
        found = accounts.get(account)
        if found != expected[account]:
            ruling.violated(f"{account} of {name} has {found}, and its transfers make {expected[account]}")
        elif found < 0:
            ruling.violated(f"{account} of {name} has {found}")
