"""Each promise's judge, shown a made-up run that breaks it, and one that only looks as if it did."""

from dataclasses import replace

import pytest

from pgbackend.torture import verdict
from pgbackend.torture.evidence import Change, End, Letter, Offset, Stored
from pgbackend.torture.load import RETRY, SUBSCRIPTIONS, Terms, failures
from pgbackend.torture.records import Note
from pgbackend.torture.verdict import RULES, SECOND, Records, Verdict, judge

PLAIN = Terms(order="none", shards=1, concurrency=4, delay=0)
KEYED = Terms(order="key", shards=1, concurrency=4, delay=0)
STRICT = Terms(order="strict", shards=1, concurrency=1, delay=0)


class Story:
    """A run, told step by step. Everything goes well unless it is told otherwise."""

    def __init__(self, terms: Terms = PLAIN, name: str = "a") -> None:
        self.terms, self.name = terms, name
        self.now = 100 * SECOND
        self.produced: list[Note] = []
        self.log: list[Stored] = []
        self.changes: list[Change] = []
        self.notes: list[Note] = []
        self.letters: list[Letter] = []
        self.ended: list[str] = []
        self.unsettled: list[str] = []
        self.owner: str | None = None
        self.position = 0
        self.pending = "{}"
        self.epoch = 0
        self.serial = 0
        self.chaos("created", name)
        self.start("w1")
        self.start("w2")

    def wait(self, seconds: float) -> None:
        """Time passes, and the workers tick."""
        until = self.now + round(seconds * SECOND)
        while self.now + SECOND // 2 < until:
            self.now += SECOND // 2
            for place in ("w1", "w2"):
                if place not in self.silent:
                    self.note(place, "tick")
        self.now = until

    silent: frozenset[str] = frozenset()

    def note(self, place: str, mark: str, *fields: object) -> None:
        self.now += 1
        self.notes.append(Note(self.now, place, mark, [str(field) for field in fields]))

    def chaos(self, mark: str, *fields: object) -> None:
        self.note("chaos", mark, *fields)

    def start(self, place: str, generation: int = 1) -> None:
        self.note(place, "start", f"{place}.{generation}", 1)

    def send(self, number: int, *, mark: str = "p", first: int | None = None) -> None:
        self.now += 1
        fields = [str(number)] if first is None else [str(number), str(first)]
        self.produced.append(Note(self.now, "p", mark, fields))

    def outcome(self, mark: str, *numbers: int) -> None:
        self.now += 1
        self.produced.append(Note(self.now, "p", mark, [str(number) for number in numbers]))

    def store(self, number: int, position: int, lane: str = "-") -> None:
        self.log.append(Stored(position, f"p-{number}", lane))

    def produce(self, *numbers: int, lane: str = "-") -> None:
        """These are acknowledged, each at the position of its number."""
        for number in numbers:
            self.send(number)
            self.outcome("a", number)
            self.store(number, number, lane)

    def claim(self, place: str, *, position: int | None = None, pending: str = "{}", generation: int = 1) -> int:
        """The shard is taken over, as it stands or as it is told to stand."""
        before, self.epoch = self.epoch, self.epoch + 1
        if position is None:
            position = self.position
        self.changes.append(
            Change(self.name, 0, before, self.epoch, place, position, position, f"{place}.{generation}", pending)
        )
        self.note(place, "claim", self.name, 0, self.epoch)
        self.position = position
        return self.epoch

    def commit(self, place: str, position: int, pending: str = "{}", *, generation: int = 1) -> None:
        self.changes.append(
            Change(
                self.name, 0, self.epoch, self.epoch, place, self.position, position, f"{place}.{generation}", pending
            )
        )
        self.position = position

    def begin(self, place: str, position: int, *, attempt: int = 1, epoch: int | None = None, id_: str = "") -> int:
        self.serial += 1
        id_ = id_ or next((stored.id for stored in self.log if stored.position == position), "p-?")
        self.note(place, "b", self.serial, self.name, 0, epoch or self.epoch, position, attempt, id_)
        return self.serial

    def end(self, place: str, serial: int, *, ok: bool = True) -> None:
        self.note(place, "e", serial, "ok" if ok else "failed")

    def handle(self, place: str, *positions: int, epoch: int | None = None) -> None:
        for position in positions:
            self.end(place, self.begin(place, position, epoch=epoch))

    def verdict(self) -> Verdict:
        head = max((stored.position for stored in self.log), default=0)
        return judge(
            Records(
                produced=self.produced,
                log=sorted(self.log),
                changes=self.changes,
                notes=self.notes,
                end=End(
                    offsets=[Offset(self.name, 0, max(head, self.position), self.pending, self.epoch, self.owner)],
                    letters=self.letters,
                    unsettled=self.unsettled,
                    ended=self.ended,
                ),
                subscriptions={self.name: self.terms},
            )
        )

    def broken(self) -> list[str]:
        """The promises that were broken."""
        judged = self.verdict()
        return [rule for rule in RULES if judged.rulings[rule].violations]


def test_a_run_in_which_nothing_happens_to_anybody_keeps_every_promise() -> None:
    story = Story()
    story.produce(1, 2, 3)
    story.claim("w1")
    story.handle("w1", 1, 2, 3)
    story.commit("w1", 3)
    judged = story.verdict()
    assert judged.kept
    assert judged.tallies["a"].handled == 3
    assert judged.outcomes == {"acknowledged": 3}


# Nothing is lost.


def test_an_event_that_no_one_handled_is_lost() -> None:
    story = Story()
    story.produce(1, 2)
    story.claim("w1")
    story.handle("w1", 2)
    assert story.broken() == [verdict.LOST]
    assert "p-1 at 1" in story.verdict().rulings[verdict.LOST].evidence[0]


def test_an_event_that_was_begun_and_never_ended_is_lost() -> None:
    story = Story()
    story.produce(1)
    story.claim("w1")
    story.begin("w1", 1)
    assert story.broken() == [verdict.LOST]


def test_an_acknowledged_event_that_is_not_in_the_log_is_lost() -> None:
    story = Story()
    story.send(1)
    story.outcome("a", 1)
    assert story.broken() == [verdict.LOST]


def test_a_subscription_owes_what_was_acknowledged_after_it_was_created_and_nothing_older() -> None:
    story = Story(replace(PLAIN, midway=True))
    story.notes.clear()
    story.start("w1")
    story.produce(1)
    story.chaos("creating", "a")
    story.send(2)
    story.outcome("a", 2)
    story.store(2, 2)
    story.chaos("created", "a")
    story.claim("w1", position=1)
    assert story.broken() == []
    story.produce(3)
    assert story.broken() == [verdict.LOST]
    story.handle("w1", 2, 3)
    assert story.broken() == []
    story.handle("w1", 1)
    assert verdict.SEEN in story.broken()


# Nothing is seen, or stored, that must not be.


@pytest.mark.parametrize("outcome", ["r", "x"])
def test_what_was_refused_or_rolled_back_must_not_be_in_the_log(outcome: str) -> None:
    story = Story()
    story.send(1)
    story.outcome(outcome, 1)
    story.claim("w1")
    assert story.broken() == []
    story.store(1, 1)
    story.handle("w1", 1)
    assert story.broken() == [verdict.ONCE]


def test_what_is_not_in_the_log_must_not_be_handled() -> None:
    story = Story()
    story.send(1)
    story.outcome("x", 1)
    story.claim("w1")
    story.end("w1", story.begin("w1", 1, id_="p-1"))
    assert story.broken() == [verdict.SEEN]


def test_an_uncertain_event_may_be_in_the_log_once_and_not_twice() -> None:
    story = Story()
    story.send(1)
    story.outcome("u", 1)
    story.claim("w1")
    assert story.broken() == []
    story.store(1, 1)
    story.handle("w1", 1)
    assert story.broken() == []
    story.store(1, 2)
    story.handle("w1", 2)
    assert story.broken() == [verdict.ONCE]


# Repeats.


def _killed(story: Story) -> None:
    """w1 has handled 1 and 2, of which 1 is settled, and is killed."""
    story.produce(1, 2)
    story.claim("w1")
    story.handle("w1", 1, 2)
    story.commit("w1", 1)
    story.wait(0.1)
    story.chaos("kill", "w1")


def test_a_repeat_after_a_kill_of_what_was_not_settled_is_counted() -> None:
    story = Story()
    _killed(story)
    story.claim("w2")
    story.handle("w2", 2)
    judged = story.verdict()
    assert judged.kept
    assert judged.tallies["a"].repeats == {"kill": 1}
    assert len(judged.takeovers) == 1


def test_a_repeat_of_what_was_settled_is_a_violation() -> None:
    story = Story()
    _killed(story)
    story.claim("w2")
    story.handle("w2", 1, 2)
    assert story.broken() == [verdict.REPEATS]


def test_the_first_dispatch_of_what_was_handed_over_is_no_repeat() -> None:
    story = Story()
    _killed(story)
    story.produce(3)
    story.claim("w2", position=3, pending="{[2,3)}")
    story.handle("w2", 2, 3)
    assert story.broken() == []


def test_what_is_pending_at_a_takeover_is_not_settled() -> None:
    story = Story()
    _killed(story)
    story.claim("w2", position=2, pending="{[1,2)}")
    story.handle("w2", 1)
    assert story.broken() == []


def test_a_repeat_without_a_cause_is_a_violation() -> None:
    story = Story()
    story.produce(1, 2)
    story.claim("w1")
    story.handle("w1", 1, 2)
    story.wait(20)
    story.claim("w2", position=1)
    story.handle("w2", 2)
    assert story.broken() == [verdict.REPEATS]


@pytest.mark.parametrize("blow", ["clock", "leave", "skipped"])
def test_what_costs_nobody_a_lease_is_no_cause(blow: str) -> None:
    story = Story()
    story.produce(1)
    story.claim("w1")
    story.handle("w1", 1)
    story.chaos(blow, "w1")
    story.claim("w2")
    story.handle("w2", 1)
    assert story.broken() == [verdict.REPEATS]


def test_a_blow_long_before_is_no_cause() -> None:
    story = Story()
    story.chaos("terminate", "w1")
    story.wait(20)
    story.produce(1)
    story.claim("w1")
    story.handle("w1", 1)
    story.claim("w2")
    story.handle("w2", 1)
    assert story.broken() == [verdict.REPEATS]


def test_the_same_attempt_twice_under_one_lease_is_a_violation_whatever_happened() -> None:
    story = Story()
    story.produce(1)
    story.claim("w1")
    story.chaos("terminate", "w1")
    story.handle("w1", 1, 1)
    assert story.broken() == [verdict.REPEATS]


def test_another_attempt_is_no_repeat() -> None:
    story = Story()
    story.produce(1)
    story.claim("w1")
    story.end("w1", story.begin("w1", 1), ok=False)
    story.end("w1", story.begin("w1", 1, attempt=2))
    judged = story.verdict()
    assert judged.kept
    assert judged.tallies["a"].retries == 1


# Fencing.


def test_a_commit_by_a_former_owner_is_a_violation() -> None:
    story = Story()
    _killed(story)
    story.claim("w2")
    story.handle("w2", 2)
    story.commit("w1", 2)
    assert story.broken() == [verdict.COMMITS]


def test_a_commit_by_the_process_that_had_the_place_before_is_a_violation() -> None:
    story = Story()
    _killed(story)
    story.start("w1", 2)
    story.claim("w1", generation=2)
    story.handle("w1", 2)
    story.commit("w1", 2, generation=1)
    assert story.broken() == [verdict.COMMITS]


def test_an_offset_that_goes_back_is_a_violation() -> None:
    story = Story()
    story.produce(1, 2)
    story.claim("w1")
    story.handle("w1", 1, 2)
    story.commit("w1", 2)
    story.commit("w1", 1)
    assert story.broken() == [verdict.COMMITS]


def test_who_was_not_hit_must_not_be_at_work_beside_the_new_owner() -> None:
    story = Story()
    story.produce(1)
    former = story.claim("w1")
    serial = story.begin("w1", 1)
    story.wait(0.1)
    story.claim("w2", position=1)
    story.end("w1", serial)
    assert former == 1
    assert story.broken() == [verdict.OWNER]


def test_who_was_stopped_may_finish_what_it_had_begun() -> None:
    story = Story()
    story.produce(1)
    story.claim("w1")
    serial = story.begin("w1", 1)
    _sleep_through_a_takeover(story)
    story.end("w1", serial)
    judged = story.verdict()
    assert judged.kept
    assert judged.finished_beside == 1


def _sleep_through_a_takeover(story: Story) -> None:
    """w1 is stopped, w2 takes the shard with everything in it settled, w1 goes on."""
    story.chaos("stop", "w1")
    story.silent = frozenset({"w1"})
    story.wait(5)
    story.claim("w2", position=9)
    story.wait(1)
    story.chaos("continue", "w1")
    story.silent = frozenset()


def test_who_wakes_may_begin_one_event_and_not_two() -> None:
    story = Story()
    story.produce(1, 2)
    epoch = story.claim("w1")
    _sleep_through_a_takeover(story)
    story.handle("w1", 1, epoch=epoch)
    judged = story.verdict()
    assert judged.begun_waking == 1
    assert not judged.rulings[verdict.OWNER].violations
    story.handle("w1", 2, epoch=epoch)
    assert story.broken() == [verdict.OWNER]


def test_who_has_long_been_awake_may_begin_nothing() -> None:
    story = Story()
    story.produce(1)
    epoch = story.claim("w1")
    _sleep_through_a_takeover(story)
    story.wait(2)
    story.handle("w1", 1, epoch=epoch)
    assert story.broken() == [verdict.OWNER]


def test_who_has_not_heard_that_its_connection_is_gone_may_go_on_for_a_moment() -> None:
    story = Story()
    story.produce(1, 2, 3)
    epoch = story.claim("w1")
    story.chaos("cut", "w1")
    story.claim("w2", position=9)
    story.handle("w1", 1, 2, epoch=epoch)
    judged = story.verdict()
    assert not judged.rulings[verdict.OWNER].violations
    assert judged.begun_unaware == 2
    story.wait(2)
    story.handle("w1", 3, epoch=epoch)
    assert verdict.OWNER in story.broken()


def test_who_has_heard_that_its_connection_is_gone_may_begin_nothing() -> None:
    story = Story()
    story.produce(1, 2, 3)
    epoch = story.claim("w1")
    story.chaos("cut", "w1")
    story.note("w1", "presence")
    story.claim("w2", position=9)
    story.handle("w1", 1, epoch=epoch)
    judged = story.verdict()
    assert judged.begun_waking == 1, "it may have been just about to"
    story.handle("w1", 2, epoch=epoch)
    assert story.broken() == [verdict.LOST, verdict.OWNER]


def test_handling_without_a_lease_is_a_violation() -> None:
    story = Story()
    story.produce(1)
    story.claim("w1")
    story.handle("w2", 1)
    assert story.broken() == [verdict.OWNER]


def test_a_claim_that_was_noted_after_it_was_lost_again_changes_no_owner() -> None:
    story = Story()
    story.produce(1)
    story.claim("w2")
    story.changes.append(Change("a", 0, 1, 3, "w2", 0, 0, "w2.1", "{}"))
    story.note("w2", "claim", "a", 0, 3)
    story.note("w1", "claim", "a", 0, 2)
    story.handle("w2", 1, epoch=3)
    assert story.broken() == []


# Order.


@pytest.mark.parametrize(("terms", "rule"), [(KEYED, verdict.KEYS), (STRICT, verdict.STRICT)], ids=["key", "strict"])
def test_a_later_event_before_an_earlier_one_is_a_violation(terms: Terms, rule: str) -> None:
    story = Story(terms)
    story.produce(1, 2, lane="k")
    story.claim("w1")
    story.handle("w1", 2, 1)
    assert story.broken() == [rule]


@pytest.mark.parametrize(("terms", "rule"), [(KEYED, verdict.KEYS), (STRICT, verdict.STRICT)], ids=["key", "strict"])
def test_two_events_of_a_lane_at_once_are_a_violation(terms: Terms, rule: str) -> None:
    story = Story(terms)
    story.produce(1, 2, lane="k")
    story.claim("w1")
    first, second = story.begin("w1", 1), story.begin("w1", 2)
    story.end("w1", first)
    story.end("w1", second)
    assert story.broken() == [rule]


@pytest.mark.parametrize(("terms", "rule"), [(KEYED, verdict.KEYS), (STRICT, verdict.STRICT)], ids=["key", "strict"])
def test_a_failed_event_holds_up_those_behind_it(terms: Terms, rule: str) -> None:
    story = Story(terms)
    story.produce(1, 2, lane="k")
    story.claim("w1")
    story.end("w1", story.begin("w1", 1), ok=False)
    story.handle("w1", 2)
    story.end("w1", story.begin("w1", 1, attempt=2))
    assert story.broken() == [rule]


def test_events_of_different_keys_and_without_one_pass_each_other() -> None:
    story = Story(KEYED)
    story.produce(1, lane="k")
    story.produce(2, lane="l")
    story.produce(3, 4)
    story.claim("w1")
    story.handle("w1", 4, 2, 3, 1)
    assert story.broken() == []


def test_after_a_takeover_a_key_begins_again_at_what_was_not_settled() -> None:
    story = Story(KEYED)
    story.produce(1, 2, lane="k")
    story.claim("w1")
    story.handle("w1", 1, 2)
    story.chaos("kill", "w1")
    story.claim("w2")
    story.handle("w2", 1, 2)
    assert story.broken() == []
    story.start("w1", 2)
    story.chaos("kill", "w2")
    story.claim("w1", generation=2)
    story.handle("w1", 2, 1)
    assert story.broken() == [verdict.KEYS]


def _late(story: Story, seconds: float, *, told: bool = True) -> None:
    """2 is handled before 1, whose transaction was open for so long."""
    story.send(1, mark="i", first=1)
    story.produce(2, lane="k")
    story.claim("w1")
    story.handle("w1", 2)
    story.wait(seconds)
    if told:
        story.outcome("a", 1)
    story.store(1, 1, "k")
    story.handle("w1", 1)


def test_an_event_whose_transaction_was_open_for_long_may_come_late() -> None:
    story = Story(KEYED)
    _late(story, 0.5)
    judged = story.verdict()
    assert judged.kept
    assert judged.tallies["a"].late == 1


def test_an_event_of_which_nobody_knows_when_it_was_committed_may_come_late() -> None:
    story = Story(KEYED)
    _late(story, 0.01, told=False)
    assert story.broken() == []


def test_an_event_whose_transaction_was_short_must_not_come_late() -> None:
    story = Story(KEYED)
    _late(story, 0.01)
    assert story.broken() == [verdict.KEYS]


def test_in_strict_order_nothing_may_come_late() -> None:
    story = Story(STRICT)
    _late(story, 0.5)
    assert story.broken() == [verdict.STRICT]


def test_what_was_acknowledged_before_the_other_was_sent_must_not_come_late() -> None:
    story = Story(KEYED)
    story.send(1, mark="i", first=1)
    story.wait(0.5)
    story.outcome("a", 1)
    story.store(1, 1, "k")
    story.produce(2, lane="k")
    story.claim("w1")
    story.handle("w1", 2, 1)
    assert story.broken() == [verdict.KEYS]


# Dead letters.

FLAKY = SUBSCRIPTIONS["flaky"]
DOOMED = next(n for n in range(1, 1000) if failures("flaky", FLAKY, f"p-{n}") >= RETRY.attempts)
FINE = next(n for n in range(1, 1000) if failures("flaky", FLAKY, f"p-{n}") == 0)


def _flaky(number: int) -> Story:
    story = Story(replace(FLAKY, shards=1), "flaky")
    # The numbers below it are nobody's.
    for earlier in range(number):
        story.send(earlier)
        story.outcome("x", earlier)
    story.produce(number)
    story.claim("w1")
    return story


def test_what_always_fails_must_become_a_dead_letter() -> None:
    story = _flaky(DOOMED)
    for attempt in range(1, RETRY.attempts + 1):
        story.end("w1", story.begin("w1", DOOMED, attempt=attempt), ok=False)
    assert story.broken() == [verdict.LOST, verdict.LETTERS]
    story.letters.append(Letter("flaky", f"p-{DOOMED}", RETRY.attempts))
    assert story.broken() == []


def test_a_dead_letter_that_was_given_up_too_early_is_a_violation() -> None:
    story = _flaky(DOOMED)
    story.end("w1", story.begin("w1", DOOMED), ok=False)
    story.letters.append(Letter("flaky", f"p-{DOOMED}", 1))
    assert story.broken() == [verdict.LETTERS]


def test_a_dead_letter_of_an_event_that_does_not_fail_is_a_violation() -> None:
    story = _flaky(FINE)
    story.handle("w1", FINE)
    story.letters.append(Letter("flaky", f"p-{FINE}", RETRY.attempts))
    assert story.broken() == [verdict.LETTERS]


@pytest.mark.parametrize("times", [RETRY.attempts - 1, RETRY.attempts])
def test_what_was_at_work_whenever_its_process_was_killed_may_be_taken_for_what_killed_it(times: int) -> None:
    story = _flaky(FINE)
    for attempt in range(times):
        place, other = ("w1", "w2") if attempt % 2 == 0 else ("w2", "w1")
        story.begin(place, FINE)
        story.chaos("kill", place)
        story.start(place, attempt + 2)
        story.claim(other, generation=1 if attempt == 0 else attempt + 1)
    story.letters.append(Letter("flaky", f"p-{FINE}", RETRY.attempts))
    assert story.broken() == ([] if times == RETRY.attempts else [verdict.LETTERS])


@pytest.mark.parametrize("committed", [False, True])
def test_what_was_handled_and_not_committed_whenever_its_process_was_killed_is_no_other(*, committed: bool) -> None:
    story = _flaky(FINE)
    for attempt in range(RETRY.attempts):
        place, other = ("w1", "w2") if attempt % 2 == 0 else ("w2", "w1")
        story.end(place, story.begin(place, FINE, attempt=attempt + 1))
        if committed:
            story.commit(place, FINE, generation=max(attempt, 1))
        story.chaos("kill", place)
        story.start(place, attempt + 2)
        story.claim(other, generation=1 if attempt == 0 else attempt + 1)
    story.letters.append(Letter("flaky", f"p-{FINE}", RETRY.attempts))
    assert (verdict.LETTERS in story.broken()) == committed


def test_a_dead_letter_of_nothing_is_a_violation() -> None:
    story = _flaky(FINE)
    story.handle("w1", FINE)
    story.letters.append(Letter("flaky", "p-4711", RETRY.attempts))
    assert story.broken() == [verdict.LETTERS]


# The end.


def test_what_does_not_come_to_rest_is_a_violation() -> None:
    def calm() -> Story:
        story = Story()
        story.produce(1)
        story.claim("w1")
        story.handle("w1", 1)
        return story

    assert calm().broken() == []
    stuck = calm()
    stuck.unsettled.append("a/0 at 0 of 1")
    dead = calm()
    dead.ended.append("w1.1 ended by itself with status 1")
    owned = calm()
    owned.owner = "somebody"
    pending = calm()
    pending.pending = "{[1,2)}"
    for story in (stuck, dead, owned, pending):
        assert story.broken() == [verdict.REST]
