"""Made-up runs of the plan "bank": each breaks one rule, or only looks like it."""

import pytest

from pgbackend.torture.applications.bank import ACCOUNTS, CLOSED, OPENING, Applied, Balance, transfer
from pgbackend.torture.audit import Letter
from pgbackend.torture.records import Note
from pgbackend.torture.verdict.bank import BankRecords, judge_bank
from pgbackend.torture.verdict.rulings import (
    BALANCES,
    COMMITS,
    EFFECTS,
    KEYS,
    LETTERS,
    LOST,
    MOMENTS,
    ONCE,
    REST,
    Verdict,
)
from tests.torture.verdict.story import KEYED, Story
from tests.torture.verdict.story import broken as broken_by

TO_CLOSED = 55
"""The number of an event whose transfer goes to the closed account."""


class BankStory:
    """A bank with one shard. Everything goes well unless it is told otherwise."""

    def __init__(self) -> None:
        self.story = Story(KEYED)
        self.applied: list[Applied] = []
        self.balances = dict.fromkeys(ACCOUNTS, OPENING)
        self.moments: list[Note] = []
        self.story.claim("w1")
        self.moment("a:total", 40_000, 40_000)

    def order(self, *numbers: int) -> None:
        """Transfers are acknowledged, with one key."""
        self.story.produce(*numbers, lane="p")

    def make(self, number: int, *, position: int | None = None, declined: bool = False) -> None:
        """A transfer is made, noted and committed."""
        id_ = f"p-{number}"
        self.applied.append(Applied("a", number if position is None else position, id_, declined, number))
        if not declined:
            self.move(number)

    def move(self, number: int) -> None:
        """Its money moves."""
        source, target, amount = transfer(f"p-{number}")
        self.balances[source] -= amount
        self.balances[target] += amount

    def moment(self, what: str, found: int, wanted: int) -> None:
        self.story.now += 1
        self.moments.append(Note(self.story.now, "moments", "moment", [what, str(found), str(wanted)]))

    def verdict(self) -> Verdict:
        balances = [Balance("a", account, balance) for account, balance in self.balances.items()]
        return judge_bank(
            BankRecords(run=self.story.records(), moments=self.moments, applied=self.applied, balances=balances)
        )

    def broken(self) -> list[str]:
        return broken_by(self.verdict())


def test_a_run_in_which_each_transfer_is_made_once_keeps_every_promise() -> None:
    bank = BankStory()
    bank.order(1, 2)
    bank.make(1)
    bank.make(2)
    assert bank.verdict().outcome == "kept"
    assert bank.verdict().table[1] == ("a", "2", "2", "0", "0", "40,000")


def test_an_acknowledged_transfer_that_is_never_made_is_lost() -> None:
    bank = BankStory()
    bank.order(1, 2)
    bank.make(1)
    assert bank.broken() == [LOST]
    bank.make(2)
    assert bank.broken() == []


def test_an_acknowledged_transfer_that_is_not_in_the_log_is_lost() -> None:
    bank = BankStory()
    bank.story.send(1)
    bank.story.outcome("acknowledged", 1)
    assert bank.broken() == [LOST]


def test_a_transfer_that_is_made_twice_is_found_though_all_accounts_agree() -> None:
    bank = BankStory()
    bank.order(1)
    bank.make(1)
    assert bank.broken() == []
    bank.make(1)
    assert bank.broken() == [EFFECTS]


def test_a_transfer_that_is_declined_and_then_made_is_found() -> None:
    bank = BankStory()
    bank.order(1)
    bank.make(1, declined=True)
    assert bank.broken() == []
    bank.make(1)
    assert bank.broken() == [EFFECTS]


def test_a_transfer_that_nobody_produced_must_not_be_made() -> None:
    bank = BankStory()
    bank.order(1)
    bank.make(1)
    bank.make(2)
    assert bank.broken() == [EFFECTS]


def test_a_transfer_must_not_be_made_as_the_event_at_another_position() -> None:
    bank = BankStory()
    bank.order(1, 2)
    bank.make(1)
    bank.make(2, position=1)
    assert bank.broken() == [EFFECTS]


def test_an_uncertain_transfer_is_made_once_if_it_is_in_the_log_and_else_not() -> None:
    bank = BankStory()
    bank.story.send(1)
    bank.story.outcome("uncertain", 1)
    assert bank.broken() == []
    bank.story.store(1, 1)
    assert bank.broken() == [LOST]
    bank.make(1)
    assert bank.broken() == []
    bank.make(1)
    assert bank.broken() == [EFFECTS]


def test_a_refused_transfer_must_not_be_in_the_log() -> None:
    bank = BankStory()
    bank.story.send(1)
    bank.story.outcome("refused", 1)
    assert bank.broken() == []
    bank.story.store(1, 1)
    bank.make(1)
    assert bank.broken() == [ONCE]


def test_a_balance_must_be_what_its_transfers_make_of_it() -> None:
    bank = BankStory()
    bank.order(1)
    bank.make(1)
    assert bank.broken() == []
    # Money moves once more, without a note.
    bank.move(1)
    assert bank.broken() == [BALANCES]


def test_half_a_transfer_is_found() -> None:
    bank = BankStory()
    bank.order(1)
    bank.make(1, declined=True)
    bank.balances[transfer("p-1").source] -= transfer("p-1").amount
    assert bank.broken() == [BALANCES]


def test_an_account_that_is_gone_is_found() -> None:
    bank = BankStory()
    del bank.balances[ACCOUNTS[0]]
    assert bank.broken() == [BALANCES]


def test_a_balance_of_zero_is_allowed_and_a_negative_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = BankStory()
    bank.order(2)
    bank.make(2)
    amount = transfer("p-2").amount
    for opening, rules in ((amount, []), (amount - 1, [BALANCES])):
        monkeypatch.setattr("pgbackend.torture.verdict.bank.OPENING", opening)
        bank.balances = dict.fromkeys(ACCOUNTS, opening)
        bank.move(2)
        assert bank.broken() == rules


def test_a_transfer_to_the_closed_account_has_a_dead_letter_and_no_effect() -> None:
    assert transfer(f"p-{TO_CLOSED}").target == CLOSED
    bank = BankStory()
    bank.order(TO_CLOSED)
    assert bank.broken() == [LOST, LETTERS]
    bank.story.letters.append(Letter("a", f"p-{TO_CLOSED}", 1))
    assert bank.broken() == []
    bank.make(TO_CLOSED, declined=True)
    assert bank.broken() == [EFFECTS]


def test_a_transfer_that_can_be_made_must_not_become_a_dead_letter() -> None:
    bank = BankStory()
    bank.order(1)
    bank.story.letters.append(Letter("a", "p-1", 15))
    assert bank.broken() == [LETTERS]


def test_a_transfer_must_not_be_made_behind_one_that_was_sent_after_its_acknowledgement() -> None:
    bank = BankStory()
    bank.order(1, 2)
    bank.make(2)
    bank.make(1)
    assert bank.broken() == [KEYS]


def test_transfers_that_were_under_way_at_once_may_be_made_in_any_order() -> None:
    bank = BankStory()
    for number in (1, 2):
        bank.story.send(number)
        bank.story.store(number, number, "p")
    bank.story.outcome("acknowledged", 1, 2)
    bank.make(2)
    bank.make(1)
    assert bank.broken() == []


def test_transfers_of_different_keys_may_be_made_in_any_order() -> None:
    bank = BankStory()
    bank.story.produce(1, lane="p")
    bank.story.produce(2, lane="q")
    bank.make(2)
    bank.make(1)
    assert bank.broken() == []


def test_one_moment_with_another_total_breaks_the_promise_though_it_is_right_at_the_end() -> None:
    bank = BankStory()
    bank.moment("a:total", 39_997, 40_000)
    bank.moment("a:total", 40_000, 40_000)
    assert bank.broken() == [MOMENTS]
    assert "a:total was 39997 instead of 40000" in bank.verdict().rulings[MOMENTS].evidence[0]


def test_a_run_without_moments_proves_nothing() -> None:
    bank = BankStory()
    bank.moments.clear()
    assert bank.broken() == [MOMENTS]


def test_a_former_owner_must_not_commit() -> None:
    bank = BankStory()
    bank.order(1)
    bank.make(1)
    bank.story.commit("w1", 1)
    assert bank.broken() == []
    bank.story.claim("w2")
    bank.story.commit("w1", 1)
    assert bank.broken() == [COMMITS]


def test_something_that_is_not_settled_breaks_the_promise() -> None:
    bank = BankStory()
    bank.story.unsettled.append("a/0 at 0 of 1")
    assert bank.broken() == [REST]


def test_a_stall_of_the_machine_excuses_nothing() -> None:
    bank = BankStory()
    bank.order(1)
    bank.story.stall_machine(5)
    assert bank.verdict().outcome == "broken"
    bank.make(1)
    assert bank.verdict().outcome == "kept"
    assert bank.verdict().stalls
