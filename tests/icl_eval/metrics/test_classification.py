"""Top-k, exact match and the area under the ROC curve."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from flamingo import FlamingoError
from icl_eval.metrics import METRICS
from icl_eval.metrics.classification import weighted_auc


def test_top_5_counts_the_first_five() -> None:
    """The sixth counted, or the fifth not."""
    ranking = list(range(10))
    assert METRICS["top5"]([ranking] * 3, [0, 4, 5]).tolist() == [1, 1, 0]
    assert METRICS["top1"](np.array([ranking] * 2), [0, 1]).tolist() == [1, 0]
    with pytest.raises(FlamingoError, match="prediction 0 ranks 3 candidates, expected at least 5"):
        METRICS["top5"]([[1, 2, 3]], [1])


def test_exact_match_ignores_case_spacing_and_a_last_full_stop() -> None:
    """An answer that counts as wrong for its capital letter, or any answer that merely begins like the right one."""
    assert METRICS["exact_match"](["A  red dog.", "a red", ""], [["x", "a red dog"]] * 3).tolist() == [1, 0, 0]
    assert METRICS["exact_match"](["a red dog ."], [["A red dog"]]).tolist() == [1]


def test_auc_is_that_of_scikit_learn_under_any_weights() -> None:
    """Ties that count in full or not at all, and weights that count for one class alone."""
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(8, size=60).astype(float), rng.random(60) < 0.3
    weights = rng.integers(4, size=(20, 60)).astype(float)
    expected = [roc_auc_score(positive, scores, sample_weight=row) for row in weights]
    assert weighted_auc(scores, positive)(weights)[:, 0] == pytest.approx(expected, abs=1e-12)


def test_auc_needs_both_classes_and_survives_draws_without_one() -> None:
    """NaN as an interval's end, for a draw that holds no positive query; a cell of one class given as 0.5."""
    score = METRICS["roc_auc"].score([0.1, 0.4, 0.35, 0.8], [0, 0, 0, 1])
    assert score.value == 1
    assert score.interval == (1, 1)
    assert score.per_item is None
    with pytest.raises(FlamingoError, match="all targets are 1, expected both classes"):
        METRICS["roc_auc"].score([0.1, 0.2], [1, 1])
    with pytest.raises(FlamingoError, match="target 1 is 2, expected 0 or 1"):
        METRICS["roc_auc"].score([0.1, 0.2], [1, 2])
    with pytest.raises(FlamingoError, match="prediction 1 is nan, expected a finite number"):
        METRICS["roc_auc"].score([0.1, float("nan")], [1, 0])
