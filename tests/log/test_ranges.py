from collections.abc import Iterable
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from pgbackend.log.ranges import RangeSet

pairs = st.tuples(st.integers(0, 40), st.integers(0, 40))
sets = st.lists(pairs, max_size=12)


def plain(ranges: Iterable[tuple[int, int]]) -> set[int]:
    return {position for lower, upper in ranges for position in range(lower, upper)}


def is_tidy(ranges: RangeSet) -> bool:
    """In order, none empty, none touching the next."""
    found = list(ranges)
    return all(a < b for a, b in found) and all(x[1] < y[0] for x, y in pairwise(found))


@given(st.lists(st.tuples(st.booleans(), pairs), max_size=20))
def test_adding_and_removing_agree_with_a_set(steps: list[tuple[bool, tuple[int, int]]]) -> None:
    ranges, model = RangeSet(), set[int]()
    for adds, (lower, upper) in steps:
        if adds:
            ranges.add(lower, upper)
            model |= set(range(lower, upper))
        else:
            ranges.remove(lower, upper)
            model -= set(range(lower, upper))
        assert plain(ranges) == model
        assert is_tidy(ranges)
        assert ranges.count() == len(model)


@given(sets, st.integers(-1, 41))
def test_membership_discard_and_below_agree_with_a_set(given_ranges: list[tuple[int, int]], position: int) -> None:
    ranges, model = RangeSet(given_ranges), plain(given_ranges)

    assert (position in ranges) == (position in model)
    assert plain(ranges.below(position)) == {p for p in model if p <= position}
    assert is_tidy(ranges.below(position))
    assert ranges.copy().discard(position) == (position in model)
    ranges.discard(position)
    assert plain(ranges) == model - {position}


@given(sets, sets)
def test_union_agrees_with_a_set(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> None:
    union = RangeSet(one).union(RangeSet(other))

    assert plain(union) == plain(one) | plain(other)
    assert union == RangeSet.of(sorted(plain(one) | plain(other)))


@given(sets)
def test_ranges_survive_a_round_trip_through_text(given_ranges: list[tuple[int, int]]) -> None:
    ranges = RangeSet(given_ranges)

    assert RangeSet.parse(str(ranges)) == ranges
    assert RangeSet.parse("{}") == RangeSet()


@given(sets, pairs)
def test_changing_a_copy_leaves_the_original(given_ranges: list[tuple[int, int]], more: tuple[int, int]) -> None:
    ranges = RangeSet(given_ranges)
    before, part = list(ranges), ranges.below(20)
    ranges.copy().add(*more)
    part.add(*more)

    assert list(ranges) == before


def test_a_range_as_long_as_a_bulk_load_is_one_range() -> None:
    ranges = RangeSet([(1, 10**12)])
    ranges.remove(5 * 10**11, 5 * 10**11 + 1)

    assert len(ranges) == 2
    assert ranges.count() == 10**12 - 2
