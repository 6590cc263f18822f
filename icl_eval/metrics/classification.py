"""Classification: accuracy, and the interval in which it would fall with other episodes."""

from __future__ import annotations

import numpy as np


def accuracy(predictions: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """predictions, targets (Q,) → (Q,) 1.0 where a query is answered right, else 0.0."""
    return (predictions == targets).astype(np.float64)


def bootstrap_interval(
    values: np.ndarray, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap of the mean over episodes (Efron & Tibshirani 1993, chapter 13).

    Args:
        values: (Q,) one value for each episode.
        level: share of the resampled means inside the interval.
        resamples: how often the episodes are drawn anew, with replacement.
        seed: of those draws.

    Returns:
        Lower and upper end, in the unit of `values`.
    """
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for start in range(0, resamples, 500):  # bounds the memory: 500 × Q indices at once
        drawn = rng.integers(len(values), size=(min(500, resamples - start), len(values)))
        means[start : start + len(drawn)] = values[drawn].mean(axis=1)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
