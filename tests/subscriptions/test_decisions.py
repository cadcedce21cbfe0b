"""The decisions of `altering` and `resharding`, on a model of the log: every event is owed exactly once."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from random import Random

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pgbackend.log.ranges import RangeSet
from pgbackend.model import Order
from pgbackend.subscriptions import altering, resharding
from pgbackend.subscriptions.definitions import Definition
from pgbackend.subscriptions.shards import Change, Key, OffsetRow, Stored, StoredShard

OWNED = "owned"


@dataclass
class Position:
    """One position of the log. An event is visible, an open hole may become one, and a dead hole never does."""

    key_hash: int
    state: str


class Subscription(RuleBasedStateMachine):
    """One subscription whose shards work, fail and wait, while calls change it."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[Position] = []
        self.definition = Definition(name="s", order="none", shards=1, end_position=None, end_at=None)
        self.rows: dict[Key, OffsetRow] = {(1, 0): row(1, 0)}
        self.redeliveries: set[int] = set()
        self.handled: list[int] = []
        self.seen: set[int] = set()
        """Events that their shard has read."""

    # The log, and the workers.

    @initialize(shards=st.integers(1, 4), order=st.sampled_from(["none", "key"]), random=st.randoms())
    def create(self, shards: int, order: Order, random: Random) -> None:
        self.definition = replace(self.definition, shards=shards, order=order)
        self.rows = {(shards, shard): row(shards, shard) for shard in range(shards)}
        self.append(random)

    @rule(randoms=st.lists(st.randoms(), min_size=1, max_size=4))
    def go_on(self, randoms: list[Random]) -> None:
        for random in randoms:
            for step in (self.append, self.end_appenders, self.work):
                if random.random() < 0.8:
                    step(random)
            if random.random() < 0.8:
                self.switch()

    def append(self, random: Random) -> None:
        count = random.randint(1, 8)
        self.log += [Position(random.randint(0, 11), random.choice(["event", "event", "open"])) for _ in range(count)]

    def end_appenders(self, random: Random) -> None:
        for one in self.log:
            if one.state == "open" and random.random() < 0.5:
                one.state = random.choice(["event", "dead"])

    def work(self, random: Random) -> None:
        """Workers claim the shards, get somewhere, commit and release them."""
        for key in self.claimable():
            if random.random() < 0.7:
                self.look_at_pending(random, key)
            if random.random() < 0.7:
                self.read_on(random, key)
            if random.random() < 0.7:
                self.try_again(random, key)
            if self.is_ordered and random.random() < 0.4:
                self.fail_above_the_offset(random, key)

    def look_at_pending(self, random: Random, key: Key) -> None:
        shard = self.rows[key]
        pending, holes = shard.pending.copy(), shard.holes.copy()
        for position in positions(shard.pending):
            state = self.log[position - 1].state
            if state == "open" or position > self.end_of(shard):
                continue
            pending.discard(position)
            holes.discard(position)
            if state == "event" and self.belongs(position, key):
                self.deliver(random, position, pending)
        self.rows[key] = replace(shard, pending=pending, holes=holes)

    def read_on(self, random: Random, key: Key) -> None:
        shard = self.rows[key]
        upto = max(shard.position, min(shard.position + random.randint(1, 12), self.end_of(shard)))
        pending, holes = shard.pending.copy(), shard.holes.copy()
        for position in range(shard.position + 1, upto + 1):
            state = self.log[position - 1].state
            if state == "open":
                pending.add(position, position + 1)
                holes.add(position, position + 1)
            elif state == "event" and self.belongs(position, key):
                self.deliver(random, position, pending)
        self.rows[key] = replace(shard, position=upto, pending=pending, holes=holes)

    def try_again(self, random: Random, key: Key) -> None:
        shard = self.rows[key]
        pending = shard.pending.copy()
        for position in sorted(self.redeliveries):
            is_due = position in pending or not self.is_ordered
            if self.belongs(position, key) and is_due and random.random() < 0.5:
                self.redeliveries.discard(position)
                pending.discard(position)
                self.handle(position)
        self.rows[key] = replace(shard, pending=pending)

    def fail_above_the_offset(self, random: Random, key: Key) -> None:
        """Others of the window hold the offset back: in order a failure stays above it, with a row for its attempts."""
        shard = self.rows[key]
        for position in range(shard.position + 1, self.end_of(shard) + 1):
            is_mine = self.log[position - 1].state == "event" and self.belongs(position, key)
            if is_mine and random.random() < 0.3:
                self.redeliveries.add(position)
                self.seen.add(position)

    def deliver(self, random: Random, position: int, pending: RangeSet) -> None:
        self.seen.add(position)
        outcome = random.choice(["handled", "failed", "at work"])
        if outcome == "failed" or (position in self.redeliveries and self.is_ordered):
            self.redeliveries.add(position)
            if self.is_ordered:
                pending.add(position, position + 1)
        elif outcome == "at work":
            pending.add(position, position + 1)
        else:
            self.handle(position)

    def handle(self, position: int) -> None:
        assert position not in self.handled, f"{position} was handled twice"
        self.handled.append(position)

    # Changes.

    @rule(order=st.sampled_from(["none", "key", "strict"]), end=st.none() | st.none() | st.integers(1, 30))
    def alter(self, order: Order, end: int | None) -> None:
        if order == "strict" and self.definition.shards > 1:
            order = "none"
        wanted = replace(self.definition, order=order, end_position=end)
        self.apply(altering.alter(self.stored(), wanted, self.waiting()))

    @rule(shards=st.integers(1, 5))
    def reshard(self, shards: int) -> None:
        if shards == self.definition.shards or (self.definition.order == "strict" and shards > 1):
            return
        change = resharding.reshard(self.stored(), shards)
        assert change is not None
        self.apply(change)

    def switch(self) -> None:
        stored = self.stored()
        if not resharding.can_switch(stored):
            return
        old, new = len(stored.old), len(stored.current)
        events: dict[Key, RangeSet] = {}
        for position in positions(resharding.find_doubtful(stored)):
            if position <= len(self.log) and self.log[position - 1].state == "event":
                key_hash = self.log[position - 1].key_hash
                events.setdefault((key_hash % old, key_hash % new), RangeSet()).add(position, position + 1)
        self.apply(resharding.switch(stored, events))
        assert all(one.until is None for one in self.rows.values())

    def apply(self, change: Change) -> None:
        """As the statement `swap_shards` does."""
        self.definition = change.definition
        self.rows = {key: one for key, one in self.rows.items() if one.shards != change.removed}
        self.rows |= {one.key: one for one in change.written}
        if change.drops_redeliveries_above is not None:
            self.redeliveries = {one for one in self.redeliveries if one <= change.drops_redeliveries_above}

    # Properties that must hold.

    @invariant()
    def every_event_is_owed_once_until_it_is_handled(self) -> None:
        for position, one in enumerate(self.log, 1):
            if one.state != "event":
                continue
            owed = [str(self.owner(position))] if self.reads(self.owner(position), position) else []
            if position in self.redeliveries and not self.is_ordered:
                owed.append("redelivery")
            assert len(owed) == (position not in self.handled), f"{position} is owed by {owed}"

    @invariant()
    def an_open_hole_is_awaited_by_every_shard_that_may_get_its_event(self) -> None:
        for position, one in enumerate(self.log, 1):
            if one.state == "open":
                assert all(self.reads(key, position) for key in self.regime(position))

    @invariant()
    def holes_are_what_is_pending_and_was_never_seen(self) -> None:
        """Otherwise a dead hole would be reported as a lost event, or a lost event be taken for a dead hole."""
        for one in self.rows.values():
            assert not one.holes.difference(one.pending)
            for position in positions(one.pending):
                is_event = self.log[position - 1].state == "event"
                assert is_event or position in one.holes
                if is_event and self.owner(position) == one.key and position in self.seen:
                    assert position not in one.holes

    @invariant()
    def pending_is_at_or_below_the_offset_and_that_below_the_barrier(self) -> None:
        barrier = self.stored().barrier
        for one in self.rows.values():
            assert all(upper - 1 <= one.position for _, upper in one.pending)
            if barrier is not None:
                assert one.until in (None, barrier)
                assert one.position <= barrier
                assert one.until is not None or not one.pending, "a shard that waits owes nothing yet"

    @invariant()
    def what_is_kept_of_a_failed_event_in_order_is_about_one_that_is_owed(self) -> None:
        for position in self.redeliveries:
            assert position not in self.handled

    @invariant()
    def the_shards_are_those_of_the_definition(self) -> None:
        current = [one for one in self.rows.values() if one.until is None]
        assert {one.key for one in current} == {(len(current), shard) for shard in range(self.definition.shards)}

    # The model as rows.

    @property
    def is_ordered(self) -> bool:
        return self.definition.order != "none"

    def claimable(self) -> list[Key]:
        """By the rules of the statement `claim`, and the old shards that a worker has not released yet."""
        old = [key for key, one in self.rows.items() if one.until is not None]
        return old or list(self.rows)

    def belongs(self, position: int, key: Key) -> bool:
        shards, shard = key
        return self.log[position - 1].key_hash % shards == shard

    def end_of(self, shard: OffsetRow) -> int:
        """The last position that the shard may read now."""
        end = self.definition.end_position
        return min(one for one in (len(self.log), shard.until, end and end - 1) if one is not None)

    def regime(self, position: int) -> list[Key]:
        """The shards that share the events at this position."""
        barrier = max((one.until for one in self.rows.values() if one.until is not None), default=0)
        is_old = position <= barrier
        return [one.key for one in self.rows.values() if (one.until is not None) == is_old]

    def owner(self, position: int) -> Key:
        shards = len(self.regime(position))
        return shards, self.log[position - 1].key_hash % shards

    def reads(self, key: Key, position: int) -> bool:
        return position > self.rows[key].position or position in self.rows[key].pending

    def stored(self) -> Stored:
        shards = [StoredShard(row=one, epoch=1, version="1", free=True) for one in self.rows.values()]
        return Stored(definition=self.definition, version="1", incarnation=None, shards=shards)

    def waiting(self) -> Mapping[Key, RangeSet]:
        return {
            key: RangeSet.of(one for one in sorted(self.redeliveries) if self.belongs(one, key)) for key in self.rows
        }


def row(shards: int, shard: int) -> OffsetRow:
    return OffsetRow(shards=shards, shard=shard, position=0, pending=RangeSet(), holes=RangeSet())


def positions(ranges: RangeSet) -> list[int]:
    return [position for lower, upper in ranges for position in range(lower, upper)]


TestSubscription = Subscription.TestCase
TestSubscription.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    # Shrinking takes minutes.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
