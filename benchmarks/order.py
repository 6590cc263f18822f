"""How long does it take to find out what stands at a position of a large data set, and what does that hold in memory?

Samples are synthetic: 5,000 shards of 2,000, as a real set would have them, and the worst case, one shard of them all.
"""

from __future__ import annotations

import argparse
import statistics
import time
import tracemalloc
from collections.abc import Sequence

import numpy as np
from _record import publish

from data_shards.order import ShuffledOrder

SEEKS = 5
"""random positions, each asked of an order that was never asked before, as a resumed run does"""


def seek_seconds(sizes: Sequence[int]) -> list[float]:
    """From nothing to the sample at a position, and back from the sample to its position."""
    generator = np.random.default_rng(0)
    seconds = []
    for position in generator.integers(0, 10 * sum(sizes), SEEKS).tolist():
        start = time.perf_counter()
        order = ShuffledOrder(sizes, seed=0)
        place = order(position)
        seconds.append(time.perf_counter() - start)
        assert order.position(place) == position
    return seconds


def positions_per_second(sizes: Sequence[int], positions: int) -> float:
    """One position after the other, from the start of the second epoch."""
    order = ShuffledOrder(sizes, seed=0)
    order(order.samples)
    start = time.perf_counter()
    for position in range(order.samples, order.samples + positions):
        order(position)
    return positions / (time.perf_counter() - start)


def bytes_per_sample(sizes: Sequence[int]) -> float:
    """Largest memory of both directions over three epochs, where old and new permutations meet."""
    tracemalloc.start()
    order = ShuffledOrder(sizes, seed=0)
    for epoch in range(3):
        order.position(order(epoch * order.samples))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak / order.samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the samples")
    parser.add_argument("--json", help="also write the figures here")
    arguments = parser.parse_args()
    samples = 1_000_000 if arguments.quick else 10_000_000
    figures: dict[str, float | str] = {"samples": samples}
    for name, sizes in (("shards of 2,000", [2000] * (samples // 2000)), ("one shard", [samples])):
        seconds = seek_seconds(sizes)
        figures[f"{name}: seek, median seconds"] = statistics.median(seconds)
        figures[f"{name}: seek, worst seconds"] = max(seconds)
        figures[f"{name}: positions per second"] = positions_per_second(sizes, samples // 100)
        figures[f"{name}: bytes per sample"] = bytes_per_sample(sizes)
    publish(figures, arguments.json)


if __name__ == "__main__":
    main()
