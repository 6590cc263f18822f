"""Which sample is used at which position: pure functions of seed and position, independent of ranks and workers.

Positions count the samples that a run uses, from 0, across epochs. A rank or a worker only decides who computes a
position, never what stands there, so that a run resumes from one integer with any number of either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np

from flamingo.errors import FlamingoError

SHARDS_AT_ONCE = 16
"""Shards whose samples are shuffled together, and which are therefore read at one time."""
_PIECE = 1 << 16


@dataclass(frozen=True)
class Place:
    """Where a sample is: its shard, its index in it, and the epoch in which it is used."""

    epoch: int
    shard: int
    index: int


class ShuffledOrder:
    """An endless order over shards in which every sample occurs exactly once an epoch.

    In each epoch the shards are shuffled and taken in blocks of `block` shards, whose samples are shuffled together:
    reading stays local, and what is held is one block's permutation and its inverse: 8 bytes a sample of the block,
    12 while the next is drawn.

    Args:
        sizes: number of samples of each shard; some may be empty.
        seed: of the shuffling.
        block: shards of a block.

    Raises:
        FlamingoError: where there is no sample.
    """

    def __init__(self, sizes: Sequence[int], seed: int, *, block: int = SHARDS_AT_ONCE):
        if not len(sizes) or min(sizes) < 0 or sum(sizes) == 0:
            raise FlamingoError(f"shard sizes {list(sizes)[:5]}: expected at least one sample")
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.seed, self.block = seed, block
        self.samples = int(self.sizes.sum())
        self._epoch = lru_cache(maxsize=2)(self._shuffle_shards)
        self._block = lru_cache(maxsize=1)(self._shuffle_block)
        self._ranks = lru_cache(maxsize=2)(self._rank_shards)
        self._inverse = lru_cache(maxsize=1)(self._invert_block)

    def __reduce__(self) -> tuple[Any, ...]:
        """Workers get the arguments; caches stay here."""
        return partial(ShuffledOrder, block=self.block), (self.sizes.tolist(), self.seed)

    def __call__(self, position: int) -> Place:
        """The sample at a position ≥ 0."""
        epoch, within = divmod(position, self.samples)
        shards, starts = self._epoch(epoch)
        block = int(np.searchsorted(starts, within, side="right")) - 1
        drawn = int(self._block(epoch, block)[within - starts[block]])
        members = shards[block * self.block : (block + 1) * self.block]
        ends = np.cumsum(self.sizes[members])
        shard = int(np.searchsorted(ends, drawn, side="right"))
        return Place(epoch, int(members[shard]), drawn - int(ends[shard] - self.sizes[members[shard]]))

    def position(self, place: Place) -> int:
        """The position at which a sample is used in an epoch; the inverse of calling the order."""
        shards, starts = self._epoch(place.epoch)
        block, among = divmod(int(self._ranks(place.epoch)[place.shard]), self.block)
        before = int(self.sizes[shards[block * self.block : block * self.block + among]].sum())
        within = int(starts[block]) + int(self._inverse(place.epoch, block)[before + place.index])
        return place.epoch * self.samples + within

    def _shuffle_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of shards, and the position within the epoch at which each block starts."""
        shards = np.random.default_rng([self.seed, epoch]).permutation(len(self.sizes))
        ends = np.cumsum(self.sizes[shards])
        last = np.minimum(np.arange(self.block, len(shards) + self.block, self.block), len(shards)) - 1
        return shards, np.concatenate(([0], ends[last][:-1]))

    def _shuffle_block(self, epoch: int, block: int) -> np.ndarray:
        shards, _ = self._epoch(epoch)
        samples = int(self.sizes[shards[block * self.block : (block + 1) * self.block]].sum())
        drawn = np.arange(samples, dtype=np.int32)  # in place: `permutation` draws the same in twice the memory
        np.random.default_rng([self.seed, epoch, block]).shuffle(drawn)
        return drawn

    def _rank_shards(self, epoch: int) -> np.ndarray:
        """Where in the epoch's order of shards each shard is."""
        return np.argsort(self._epoch(epoch)[0])

    def _invert_block(self, epoch: int, block: int) -> np.ndarray:
        """Where in the block's order each of its samples is."""
        drawn = self._block(epoch, block)
        inverse = np.empty_like(drawn)
        for begin in range(0, len(drawn), _PIECE):  # no second array of the block's size
            piece = drawn[begin : begin + _PIECE]
            inverse[piece] = np.arange(begin, begin + len(piece), dtype=np.int32)
        return inverse


class MixtureOrder:
    """Which source gives which position, when each source has a share of the samples from some position on.

    A source with `start` > 0 is silent before that position; shares are relative to the sources that are active. In
    every 1,000 positions of a phase each source has exactly its share, rounded to a thousandth, in a seeded order.
    """

    BLOCK = 1000

    def __init__(self, shares: Sequence[float], seed: int, starts: Sequence[int] | None = None):
        self.seed, self._arguments = seed, (list(shares), seed, starts)
        starts = list(starts) if starts is not None else [0] * len(shares)
        if min(starts, default=1) != 0:
            raise FlamingoError(f"sources start at {starts}: expected at least one that starts at 0")
        self._begins = sorted(set(starts))
        active = np.array([[share * (start <= begin) for share, start in zip(shares, starts, strict=True)]
                           for begin in self._begins])  # fmt: skip
        if not np.isfinite(active).all() or (active < 0).any() or (active.sum(axis=1) <= 0).any():
            raise FlamingoError(f"shares {list(shares)}: expected positive numbers")
        self._block = lru_cache(maxsize=4)(self._shuffle_block)
        self._counts = np.array([_apportion(row / row.sum(), self.BLOCK) for row in active])
        if ((self._counts == 0) & (active > 0)).any():
            raise FlamingoError(f"shares {list(shares)}: a share of less than {1 / self.BLOCK} would never be used")
        self._used = np.zeros_like(self._counts)  # of each source, before each phase
        for phase in range(1, len(self._begins)):
            length = self._begins[phase] - self._begins[phase - 1]
            self._used[phase] = self._used[phase - 1] + self._within(phase - 1, length)

    def __reduce__(self) -> tuple[Any, ...]:
        """Workers get the arguments; caches stay here."""
        return MixtureOrder, self._arguments

    def __call__(self, position: int) -> tuple[int, int]:
        """(source, how many positions before this one were that source's)."""
        phase = self._phase(position)
        block, within = divmod(position - self._begins[phase], self.BLOCK)
        source, rank = self._block(phase, block)
        chosen = int(source[within])
        return chosen, int(self._used[phase, chosen] + block * self._counts[phase, chosen] + rank[within])

    def used(self, position: int) -> list[int]:
        """How many of the positions before this one each source has given."""
        phase = self._phase(position)
        return (self._used[phase] + self._within(phase, position - self._begins[phase])).tolist()

    def _phase(self, position: int) -> int:
        return int(np.searchsorted(self._begins, position, side="right")) - 1

    def _within(self, phase: int, length: int) -> np.ndarray:
        blocks, rest = divmod(length, self.BLOCK)
        source, _ = self._block(phase, blocks)
        return blocks * self._counts[phase] + np.bincount(source[:rest], minlength=self._counts.shape[1])

    def _shuffle_block(self, phase: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The source of each of a block's positions, and its rank among that source's in the block."""
        sources = np.repeat(np.arange(self._counts.shape[1]), self._counts[phase])
        sources = np.random.default_rng([self.seed, phase, block]).permutation(sources)
        rank = np.empty_like(sources)
        for source in range(self._counts.shape[1]):
            where = sources == source
            rank[where] = np.arange(where.sum())
        return sources, rank


def _apportion(shares: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers that add up to `total`, by largest remainders."""
    exact = shares * total
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    return counts
