"""The fair share: even where possible, the same for all workers, and stable."""

from collections import Counter
from random import Random
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgbackend.subscriptions.sharing import Peer, ShardKey, share

A, B, C, D = (UUID(int=number) for number in range(1, 5))


def shards(count: int, name: str = "s", owner: UUID | None = None) -> dict[ShardKey, UUID | None]:
    return {(name, count, shard): owner for shard in range(count)}


def peer(id_: UUID, *subscriptions: str, asks: bool = True) -> Peer:
    return Peer(id_, frozenset(subscriptions or ("s",)), asks)


def loads(plan: dict[ShardKey, UUID]) -> dict[UUID, int]:
    return dict(Counter(plan.values()))


def test_free_shards_are_shared_evenly() -> None:
    assert loads(share(shards(8), [peer(A), peer(B), peer(C)])) == {A: 3, B: 3, C: 2}


def test_single_shards_of_many_subscriptions_are_shared_evenly() -> None:
    names = [f"s{number}" for number in range(6)]
    free = {key: owner for name in names for key, owner in shards(1, name).items()}
    assert loads(share(free, [peer(A, *names), peer(B, *names)])) == {A: 3, B: 3}


def test_a_worker_that_joins_gets_its_share_with_the_fewest_moves() -> None:
    plan = share(shards(8, owner=A), [peer(A), peer(B)])
    assert loads(plan) == {A: 4, B: 4}
    again = share({**plan}, [peer(A), peer(B), peer(C)])
    assert loads(again) == {A: 3, B: 3, C: 2}
    assert sum(plan[key] != again[key] for key in plan) == 2, "a shard moved without need"


def test_the_shards_of_a_dead_worker_are_shared_evenly() -> None:
    plan: dict[ShardKey, UUID | None] = dict(share(shards(9), [peer(A), peer(B), peer(C)]))
    left = {key: None if owner == C else owner for key, owner in plan.items()}
    after = share(left, [peer(A), peer(B)])
    assert sorted(loads(after).values()) == [4, 5]
    assert all(after[key] == owner for key, owner in plan.items() if owner != C)


def test_a_worker_that_does_not_ask_gets_no_owned_shard() -> None:
    assert loads(share(shards(4, owner=A), [peer(A), peer(B, asks=False)])) == {A: 4}


def test_a_difference_of_one_is_fair() -> None:
    owned: dict[ShardKey, UUID | None] = {("s", 3, 0): A, ("s", 3, 1): A, ("s", 3, 2): B}
    assert share(owned, [peer(A), peer(B)]) == owned


def test_no_worker_gets_a_shard_that_it_cannot_run() -> None:
    free = {**shards(4, "s"), **shards(2, "t"), **shards(1, "unknown")}
    plan = share(free, [peer(A, "s"), peer(B, "t")])
    assert plan == {**dict.fromkeys(shards(4, "s"), A), **dict.fromkeys(shards(2, "t"), B)}


def test_two_workers_without_a_common_subscription_balance_by_way_of_a_third() -> None:
    """A and C have no subscription in common. B runs those of both."""
    owned = {**shards(2, "s", A), **shards(1, "t", B)}
    peers = [peer(A, "s"), peer(B, "s", "t", asks=False), peer(C, "t")]
    assert loads(share(owned, peers)) == {A: 1, B: 1, C: 1}


def test_the_shards_of_an_unknown_owner_stay_with_it() -> None:
    owned = shards(4, owner=D)
    assert share(owned, [peer(A), peer(B)]) == owned


@st.composite
def _situations(draw: st.DrawFn) -> tuple[dict[ShardKey, UUID | None], list[Peer]]:
    names = ["s", "t", "u"]
    ids = [UUID(int=number + 1) for number in range(draw(st.integers(1, 5)))]
    peers = [Peer(id_, frozenset(draw(st.sets(st.sampled_from(names)))), asks=draw(st.booleans())) for id_ in ids]
    owners = {
        key: draw(st.sampled_from([None, *ids])) for name in names for key in shards(draw(st.integers(1, 6)), name)
    }
    return owners, peers


@given(_situations(), st.randoms())
def test_a_plan_is_deterministic_stable_and_even(
    situation: tuple[dict[ShardKey, UUID | None], list[Peer]], random: Random
) -> None:
    owners, peers = situation
    plan = share(owners, peers)

    shuffled = list(owners.items())
    random.shuffle(shuffled)
    assert share(dict(shuffled), random.sample(peers, len(peers))) == plan
    assert share({**plan}, peers) == plan, "a plan that was carried out leads to another one"
    by_id = {peer.id: peer for peer in peers}
    for key, worker in plan.items():
        assert owners[key] == worker or key[0] in by_id[worker].subscriptions
    load = Counter({peer.id: 0 for peer in peers})
    load.update(plan.values())
    for key, worker in plan.items():
        for other in peers:
            if other.asks and key[0] in other.subscriptions:
                assert load[worker] - load[other.id] < 2, "a shard could have brought two workers closer"
    for key, owner in owners.items():
        if owner is None:
            assert (key in plan) == any(key[0] in peer.subscriptions for peer in peers)


@pytest.mark.parametrize("workers", [1, 2, 7, 50])
def test_many_shards_are_shared_evenly_at_once(workers: int) -> None:
    peers = [peer(UUID(int=number + 1)) for number in range(workers)]
    counts = loads(share(shards(1000, owner=peers[0].id), peers)).values()
    assert max(counts) - min(counts) <= 1
