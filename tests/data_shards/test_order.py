"""Order and mixture: pure, complete, and the same for every number of ranks."""

from __future__ import annotations

import pickle
import tracemalloc
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.order import MixtureOrder, Place, ShuffledOrder
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


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 5), block=st.integers(1, 5))
def test_the_inverse_finds_every_sample_of_every_epoch(sizes: list[int], seed: int, block: int) -> None:
    """Catches an inverse that forgets empty shards, the starts of blocks, or the epoch."""
    order, asked = ShuffledOrder(sizes, seed, block=block), ShuffledOrder(sizes, seed, block=block)
    positions = range(3 * order.samples)
    assert [asked.position(order(position)) for position in positions] == list(positions)
    for epoch, shard in ((0, 0), (2, len(sizes) - 1)):
        for index in range(sizes[shard]):
            assert asked(order.position(Place(epoch, shard, index))) == Place(epoch, shard, index)


@settings(max_examples=40, deadline=None)
@given(
    sizes=SIZES,
    batch=st.integers(1, 4),
    worlds=st.tuples(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8])),
)
def test_ranks_share_what_one_rank_would_use(sizes: list[int], batch: int, worlds: tuple[int, int]) -> None:
    """Catches an order that depends on the rank, at first and after a restart with another number of ranks."""
    step = 8 * batch

    def used(world: int, begin: int, end: int) -> list[Place]:
        ranks = [ShuffledOrder(sizes, 1, block=2) for _ in range(world)]
        return [ranks[position % world](position) for position in range(begin * step, end * step)]

    assert used(worlds[0], 0, 3) + used(worlds[1], 3, 6) == used(1, 0, 6)


def test_one_huge_block_stays_within_its_memory() -> None:
    """Catches permutations in 8 bytes a number, or more of them than is said."""
    samples = 400_000
    tracemalloc.start()
    order = ShuffledOrder([samples], 0)
    for epoch in range(3):
        assert order.position(order(epoch * samples + 5)) == epoch * samples + 5
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 8 * samples < peak <= 16 * samples


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
    for position in (0, 1, 999, 1499, 1500, 1501, 2777, 6499):
        assert mixture.used(position) == [sum(s == source for s, _ in drawn[:position]) for source in (0, 1)]
    again = MixtureOrder([1, 3], seed=2, starts=[0, 1500])
    assert [again(n) for n in reversed(range(6500))] == drawn[::-1]


@pytest.mark.parametrize(
    ("shares", "starts", "message"),
    [([1.0], [5], "starts at 0"), ([0.0, 0.0], None, "positive"), ([1.0, -1.0], None, "positive"),
     ([1.0, float("nan")], None, "positive"), ([1.0, float("inf")], None, "positive"),
     ([1.0, 1e-9], None, "never be used")],
)  # fmt: skip
def test_impossible_mixtures_are_refused(shares: list[float], starts: list[int] | None, message: str) -> None:
    """Catches a source that silently never comes."""
    with pytest.raises(FlamingoError, match=message):
        MixtureOrder(shares, 0, starts)
