"""Two runs over the same queries: could the difference of a figure be chance?

The randomisation test (Fisher 1935; Noreen 1989): if the runs were alike, it would be chance which answer to a query is
whose. So the answers are exchanged at random, query by query, and p is the share of draws that differ as much as what
was found. Unlike a share of bootstrap draws it is right for few queries too: of three that all improve, p is 1/4. R
draws, Q queries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from icl_eval.metrics.bootstrap import RESAMPLES, members, swaps
from icl_eval.metrics.metric import Metric

Difference = Callable[[np.ndarray], np.ndarray]
"""Swaps (R, Q), 1 where two runs' answers to a query are exchanged, else 0 → (R,): how much then a figure differs."""
SIGNIFICANT = 0.05
"""p below which a difference is called one."""
_ROUNDING = 1e-9  # differences that are as large but for the order of summation


def of_values(first: np.ndarray, other: np.ndarray) -> Difference:
    """Of a mean of values of single queries, each (Q,)."""
    gains = np.asarray(other - first, dtype=np.float64)
    return lambda swapped: (1 - 2 * swapped) @ gains / len(gains)


def of_scores(metric: Metric, first: Sequence[float], other: Sequence[float], targets: Sequence[Any]) -> Difference:
    """Of the headline of a metric that takes scores and depends on their order alone, such as an area under a curve.

    Ranks are exchanged, not scores, since the runs' scores need not be of one scale (Venkatraman & Begg 1996).

    Args:
        metric: it takes scores.
        first, other: (Q,) the runs' scores.
        targets: (Q,).
    """
    from scipy.stats import rankdata

    both = metric.prepared([*rankdata(first), *rankdata(other)], [*targets, *targets])

    def difference(swapped: np.ndarray) -> np.ndarray:
        chosen = np.hstack([swapped, 1 - swapped])  # those that count as the other run's
        return both.figures(chosen)[:, 0] - both.figures(1 - chosen)[:, 0]

    return difference


def randomisation_p(
    difference: Difference,
    queries: int,
    *,
    groups: Sequence[object] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> float:
    """p of a difference, two-sided; what was found counts as one draw, so it is never 0 (Phipson & Smyth 2010).

    Args:
        difference: see `Difference`.
        queries: Q.
        groups: of each query, what it hangs together with; the answers to a whole group are exchanged at once.
        resamples: R.
        seed: of the draws.
    """
    member = None if groups is None else members(groups, queries)
    found = abs(difference(np.zeros((1, queries)))[0])
    as_large = 0
    for drawn in swaps(queries, member, resamples=resamples, seed=seed):
        as_large += int((np.abs(difference(drawn)) >= found - _ROUNDING).sum())
    return (1 + as_large) / (1 + resamples)
