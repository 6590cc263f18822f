"""Order and mixture: pure, complete, and the same for every number of ranks."""

from __future__ import annotations

import pickle
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.order import MixtureOrder, ShuffledOrder
from flamingo import FlamingoError

SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 0)


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 5), block=st.integers(1, 5))
def test_every_sample_once_an_epoch(sizes: list[int], seed: int, block: int) -> None:
    """Catches samples that are skipped or repeated at the borders of shards, blocks and epochs."""
    order = ShuffledOrder(sizes, seed, block=block)
    everything = {(shard, index) for shard, size in enumerate(sizes) for index in range(size)}
    for epoch in range(3):
        places = [order(epoch * order.samples + n) for n in range(order.samples)]
        assert {place.epoch for place in places} == {epoch}
        assert {(place.shard, place.index) for place in places} == everything


def test_a_position_does_not_depend_on_what_was_asked_before() -> None:
    """Catches state: a resumed run asks for position 70 first."""
    sizes = [7, 13, 1, 20, 9]
    asked = ShuffledOrder(sizes, 3, block=2)
    everything = [asked(n) for n in range(150)]
    assert [ShuffledOrder(sizes, 3, block=2)(n) for n in reversed(range(150))] == everything[::-1]


def test_orders_travel_to_workers() -> None:
    """Catches caches that cannot be pickled, which breaks workers where processes are spawned."""
    order, mixture = ShuffledOrder([7, 13], 3, block=1), MixtureOrder([1, 3], 2, [0, 9])
    places, draws = [order(n) for n in range(40)], [mixture(n) for n in range(40)]
    order, mixture = pickle.loads(pickle.dumps((order, mixture)))
    assert ([order(n) for n in range(40)], [mixture(n) for n in range(40)]) == (places, draws)


def test_epochs_and_seeds_differ_and_reading_stays_local() -> None:
    """Catches a shuffle that repeats itself, or that jumps between all shards."""
    sizes = [50] * 8
    order = ShuffledOrder(sizes, 0, block=2)
    first, second = ([order(epoch * 400 + n) for n in range(400)] for epoch in (0, 1))
    assert [(p.shard, p.index) for p in first] != [(p.shard, p.index) for p in second]
    other = ShuffledOrder(sizes, 1, block=2)
    assert [other(n) for n in range(400)] != first
    for begin in range(0, 400, 100):
        assert len({place.shard for place in first[begin : begin + 100]}) == 2
    assert first[:50] != sorted(first[:50], key=lambda place: (place.shard, place.index))


def test_mixture_keeps_shares_and_counts_each_source_without_gaps() -> None:
    """Catches shares that drift, and positions of a source that are skipped or used twice, also across phases."""
    mixture = MixtureOrder([1, 3], seed=2, starts=[0, 1500])
    drawn = [mixture(n) for n in range(6500)]
    assert {source for source, _ in drawn[:1500]} == {0}
    assert Counter(source for source, _ in drawn[1500:5500]) == {0: 1000, 1: 3000}
    for source in (0, 1):
        assert [rank for s, rank in drawn if s == source] == list(range(sum(s == source for s, _ in drawn)))
    again = MixtureOrder([1, 3], seed=2, starts=[0, 1500])
    assert [again(n) for n in reversed(range(6500))] == drawn[::-1]


@pytest.mark.parametrize(
    ("shares", "starts", "message"),
    [([1.0], [5], "starts at 0"), ([0.0, 0.0], None, "positive"), ([1.0, -1.0], None, "positive"),
     ([1.0, 1e-9], None, "never be used")],
)  # fmt: skip
def test_impossible_mixtures_are_refused(shares: list[float], starts: list[int] | None, message: str) -> None:
    """Catches a source that silently never comes."""
    with pytest.raises(FlamingoError, match=message):
        MixtureOrder(shares, 0, starts)
