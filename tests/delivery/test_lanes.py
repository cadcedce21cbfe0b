from collections import defaultdict, deque
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from pgbackend.codec.event import Event
from pgbackend.delivery.lanes import Lanes, sift


def event(position: int, key: str | None) -> Event:
    return Event(("1.0", "i", "/s", "t", None, None, None, None, key, "{}", None, None, position))


@given(
    keys=st.lists(st.sampled_from(["a", "b", None]), min_size=1, max_size=30),
    chance=st.randoms(use_true_random=False),
    single=st.booleans(),
)
def test_one_of_a_lane_is_out_at_a_time_and_all_come_in_their_order(
    keys: list[str | None], chance: Random, single: bool
) -> None:
    lanes = Lanes(single=single)
    events = [event(number, key) for number, key in enumerate(keys)]
    out = [one for one in events if lanes.enter(one)]
    seen: dict[object, list[int]] = defaultdict(list)
    while out:
        lane_of = [("all" if single else one.key) for one in out if single or one.key is not None]
        assert len(lane_of) == len(set(lane_of)), "two of one lane"
        done = out.pop(chance.randrange(len(out)))
        seen["all" if single else done.key].append(done.position)
        following = lanes.leave(done)
        if following is not None:
            out.append(following)

    assert sum(map(len, seen.values())) == len(events)
    assert all(positions == sorted(positions) for lane, positions in seen.items() if lane is not None)


def test_what_is_not_wanted_any_more_is_taken_out_and_the_next_one_moves_up() -> None:
    lanes = Lanes(single=False)
    first, second, third = event(1, "k"), event(2, "k"), event(3, "k")
    assert [lanes.enter(one) for one in (first, second, third)] == [True, False, False]

    assert lanes.sift(lambda one: one is not second) == [second]
    assert lanes.leave(first) is third
    assert lanes.leave(third) is None
    assert lanes.enter(first), "the lane is free"


def test_a_sifted_queue_keeps_its_order() -> None:
    queue = deque(event(number, None) for number in range(6))

    assert [one.position for one in sift(queue, lambda one: one.position % 2 == 0)] == [1, 3, 5]
    assert [one.position for one in queue] == [0, 2, 4]
