"""Classification: accuracy, top-k, exact match, area under the ROC curve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from flamingo.errors import FlamingoError
from icl_eval.metrics.bootstrap import Figures, weighted_mean
from icl_eval.metrics.metric import Metric, Prepared, string_lists


def accuracy(predictions: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """predictions, targets (Q,) → (Q,) 1.0 where a query is answered right, else 0.0."""
    return (np.asarray(predictions) == np.asarray(targets)).astype(np.float64)


def top_k(rankings: Sequence[Sequence[int]], targets: Sequence[int], k: int) -> np.ndarray:
    """Rankings, Q of at least k candidates each, the best first; targets (Q,) → (Q,) 1.0 where it is among the first k.

    Raises:
        FlamingoError: a ranking of fewer than k candidates.
    """
    for place, ranking in enumerate(rankings):
        if len(ranking) < k:
            raise FlamingoError(f"top-{k}: prediction {place} ranks {len(ranking)} candidates, expected at least {k}")
    found = [target in ranking[:k] for ranking, target in zip(map(list, rankings), targets, strict=True)]
    return np.array(found, dtype=np.float64)


def exact_match(predictions: Sequence[str], targets: Sequence[Sequence[str]]) -> np.ndarray:
    """(Q,) 1.0 where a prediction is one of its target's texts, whatever their case, spacing and last full stop."""
    accepted = [{_plain(text) for text in target} for target in targets]
    found = [_plain(prediction) in texts for prediction, texts in zip(predictions, accepted, strict=True)]
    return np.array(found, dtype=np.float64)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def weighted_auc(scores: np.ndarray, positive: np.ndarray) -> Figures:
    """Area under the ROC curve: the chance that a positive query scores above a negative one, ties counting half.

    The same number as `sklearn.metrics.roc_auc_score(positive, scores, sample_weight=weights)`, for all rows of weights
    at once; NaN under weights that leave a class out.

    Args:
        scores: (Q,).
        positive: (Q,) bool.
    """
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) > 0])  # of each run of equal scores

    def figures(weights: np.ndarray) -> np.ndarray:
        sorted_weights, sorted_positive = weights[:, order], positive[order]
        above = np.add.reduceat(sorted_weights * sorted_positive, starts, axis=1)
        below = np.add.reduceat(sorted_weights * ~sorted_positive, starts, axis=1)
        won = (above * (np.cumsum(below, axis=1) - below / 2)).sum(axis=1)
        pairs = above.sum(axis=1) * below.sum(axis=1)
        return np.divide(won, pairs, out=np.full(len(won), np.nan), where=pairs > 0)[:, None]

    return figures


def mean_metric(
    name: str, takes: str, targets: str, values: Callable[[Any, Any], np.ndarray], **details: str
) -> Metric:
    """A metric that is the mean of one value a query: `values(predictions, targets)` → (Q,)."""

    def prepare(predictions: Sequence[Any], wanted: Sequence[Any], _: Sequence[Any] | None) -> Prepared:
        if takes == "text":
            string_lists(name, wanted)
        per_item = values(predictions, wanted)
        return Prepared((name,), weighted_mean(per_item), per_item, details=details)

    return Metric(name, takes, targets, prepare)


def _prepare_auc(predictions: Sequence[Any], targets: Sequence[Any], _: Sequence[Any] | None) -> Prepared:
    for place, target in enumerate(targets):
        if target not in (0, 1):
            raise FlamingoError(f"metric roc_auc: target {place} is {target!r}, expected 0 or 1")
    positive = np.asarray(targets).astype(bool)
    if positive.all() or not positive.any():
        raise FlamingoError(f"metric roc_auc: all targets are {targets[0]!r}, expected both classes")
    return Prepared(("roc_auc",), weighted_auc(np.asarray(predictions, dtype=np.float64), positive))


_INDEX = "the index of the right candidate"
ACCURACY = mean_metric("accuracy", "index", _INDEX, accuracy)
TOP_1 = mean_metric("top1", "ranking", _INDEX, partial(top_k, k=1))
TOP_5 = mean_metric("top5", "ranking", _INDEX, partial(top_k, k=5))
EXACT_MATCH = mean_metric(
    "exact_match", "text", "all right answers", exact_match, rules="case, spacing and a last full stop are ignored"
)
ROC_AUC = Metric("roc_auc", "score", "1 for the positive class, else 0", _prepare_auc)
