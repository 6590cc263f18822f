"""Intervals in which a figure would fall with other queries, and the spread over seeds.

The percentile bootstrap (Efron & Tibshirani 1993, chapter 13): queries are drawn anew with replacement, and the figure
is computed again. A draw is a row of weights, how often each query was drawn; so a figure is a function of weights, and
for most figures a thousand draws are one matrix product. R resamples, Q queries, K figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from flamingo.errors import FlamingoError

RESAMPLES = 2000
LEVEL = 0.95
_CELLS = 1 << 22  # weights held at once: bounds the memory to some 100 MB for any number of queries

Figures = Callable[[np.ndarray], np.ndarray]
"""Weights (R, Q) → (R, K): the figures under each row of weights; NaN where one is undefined."""


def draws(units: int, *, resamples: int = RESAMPLES, seed: int = 0, width: int = 0) -> Iterator[np.ndarray]:
    """How often each of `units` is drawn in each resample: rows (r, units) float64, `resamples` of them in all.

    So few at a time that as many rows of `width` numbers are held easily too. The rows depend on (units, seed) alone,
    not on how they are cut into blocks.
    """
    rng = np.random.default_rng(seed)
    block = max(1, _CELLS // max(units, width))
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = rng.integers(units, size=(rows, units)) + units * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * units).reshape(rows, units).astype(np.float64)


def swaps(
    queries: int, member: np.ndarray | None = None, *, resamples: int = RESAMPLES, seed: int = 0
) -> Iterator[np.ndarray]:
    """Fair coins, one for each query, or for each group by `member`, see `members`: rows (r, queries) of 0.0 and 1.0.

    `resamples` of them in all, as many at a time as are held easily.
    """
    rng = np.random.default_rng(seed)
    units = queries if member is None else int(member.max()) + 1
    block = max(1, _CELLS // (2 * queries))
    for start in range(0, resamples, block):
        coins = rng.integers(2, size=(min(block, resamples - start), units)).astype(np.float64)
        yield coins if member is None else coins[:, member]


def bootstrap(
    figures: Figures,
    queries: int,
    *,
    groups: Sequence[object] | None = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> np.ndarray:
    """Intervals of figures of any kind: (K, 2), lower and upper ends.

    Args:
        figures: see `Figures`.
        queries: Q.
        groups: see `resampled`.
        level: share of the resampled figures inside the interval.
        resamples: how often the queries are drawn anew.
        seed: of those draws.

    Resamples in which a figure is undefined (an AUC of one class alone) do not count towards its interval.
    """
    rows = resampled(figures, queries, groups=groups, resamples=resamples, seed=seed)
    return percentiles(rows, level)


def resampled(
    figures: Figures,
    queries: int,
    *,
    groups: Sequence[object] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> np.ndarray:
    """Figures of any kind in each resample: (R, K).

    Args:
        figures: see `Figures`.
        queries: Q.
        groups: of each query, what it hangs together with (its picture); whole groups are drawn, since queries about
            one picture are no independent evidence. None: each query by itself.
        resamples: R, how often the queries are drawn anew.
        seed: of those draws.
    """
    if groups is None:
        rows = [figures(weights) for weights in draws(queries, resamples=resamples, seed=seed)]
    else:
        member = members(groups, queries)
        units = int(member.max()) + 1
        blocks = draws(units, resamples=resamples, seed=seed, width=queries)
        rows = [figures(weights[:, member]) for weights in blocks]
    return np.concatenate(rows)


def percentiles(rows: np.ndarray, level: float = LEVEL) -> np.ndarray:
    """(R, K) resampled figures → (K, 2) ends of the interval that holds `level` of them; NaN is left out."""
    tail = (1 - level) / 2
    return np.nanquantile(rows, [tail, 1 - tail], axis=0).T


def bootstrap_interval(
    values: np.ndarray,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
    groups: Sequence[object] | None = None,
) -> tuple[float, float]:
    """Percentile bootstrap of the mean over episodes.

    Args:
        values: (Q,) one value for each episode.
        level: share of the resampled means inside the interval.
        resamples: how often the episodes are drawn anew, with replacement.
        seed: of those draws.
        groups: see `resampled`.

    Returns:
        Lower and upper end, in the unit of `values`.
    """
    (interval,) = bootstrap(
        weighted_mean(values), len(values), groups=groups, level=level, resamples=resamples, seed=seed
    )
    return float(interval[0]), float(interval[1])


def weighted_mean(values: np.ndarray) -> Figures:
    """The means of values (Q,) or (Q, K), as a function of weights."""
    columns = values.reshape(len(values), -1).astype(np.float64)
    return lambda weights: weights @ columns / weights.sum(axis=1, keepdims=True)


def over_seeds(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n − 1) of one figure over runs of different seeds; None for a single run.

    Raises:
        FlamingoError: no values.
    """
    if not len(values):
        raise FlamingoError("over_seeds: no values, expected the figure of at least one seed")
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else None


def members(groups: Sequence[object], queries: int) -> np.ndarray:
    """The group of each query as a number from 0: (Q,) int.

    Raises:
        FlamingoError: not as many groups as queries.
    """
    if len(groups) != queries:
        raise FlamingoError(f"groups: {len(groups)}, expected one for each of {queries} queries")
    return np.unique(np.array([str(group) for group in groups]), return_inverse=True)[1]
