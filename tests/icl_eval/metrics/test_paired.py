"""Randomisation tests: right for few queries, for groups, and where two runs are alike."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from icl_eval.metrics import METRICS
from icl_eval.metrics import bootstrap as module
from icl_eval.metrics.paired import of_scores, of_values, randomisation_p

AUC = METRICS["roc_auc"]


def test_p_is_the_share_of_all_signs() -> None:
    """A one-sided p, one from a bootstrap (0 for four gains), or ties by rounding that do not count."""
    rng = np.random.default_rng(0)
    for gains in (np.full(4, 0.1), rng.normal(0.5, 1, size=6), np.array([0.3, -0.1, 0.2, 0.0]), np.zeros(3)):
        sums = [abs(np.dot(signs, gains)) for signs in product((1, -1), repeat=len(gains))]
        expected = np.mean(np.array(sums) >= abs(gains.sum()) - 1e-9)
        found = randomisation_p(of_values(np.zeros(len(gains)), gains), len(gains), resamples=20000)
        assert found == pytest.approx(expected, abs=0.015)
    assert randomisation_p(of_values(np.zeros(200), np.ones(200)), 200, resamples=99) == 0.01, "never 0"


def test_answers_about_one_picture_are_exchanged_together() -> None:
    """Six questions about a picture that count as six pictures."""
    difference = of_values(np.zeros(12), np.ones(12))
    assert randomisation_p(difference, 12) < 0.01
    assert randomisation_p(difference, 12, groups=["a"] * 6 + ["b"] * 6) == pytest.approx(0.5, abs=0.05)


def test_draws_do_not_depend_on_their_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A p that depends on how much memory was allowed for."""
    difference = of_values(np.zeros(9), np.random.default_rng(1).normal(0.3, 1, 9))
    whole = [randomisation_p(difference, 9, groups=groups) for groups in (None, list("aabbccdde"))]
    monkeypatch.setattr(module, "_CELLS", 500)
    assert [randomisation_p(difference, 9, groups=groups) for groups in (None, list("aabbccdde"))] == whole


def test_alike_runs_differ_as_often_as_p_says() -> None:
    """A test of areas under curves that finds differences between runs of equal worth, or of other scales alone."""
    rng = np.random.default_rng(0)
    found = []
    for seed in range(200):
        targets = np.arange(40) % 2
        one, two = rng.normal(size=(2, 40)) + targets
        found.append(randomisation_p(of_scores(AUC, one, 10 * two + 100, targets), 40, resamples=199, seed=seed))
    assert 0.01 <= np.mean(np.array(found) <= 0.05) <= 0.09
    assert 0.4 <= np.mean(found) <= 0.6
    assert randomisation_p(of_scores(AUC, one, 10 * one, targets), 40) == 1.0
    assert randomisation_p(of_scores(AUC, -targets * 1.0, targets * 5.0, targets), 40) == pytest.approx(1 / 2001)
