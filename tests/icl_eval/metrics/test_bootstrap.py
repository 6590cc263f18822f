"""Intervals and spreads, and what every metric has in common."""

from __future__ import annotations

import json

import numpy as np
import pytest

from flamingo import FlamingoError
from icl_eval.metrics import METRICS, bootstrap_interval, over_seeds
from icl_eval.metrics import bootstrap as module
from icl_eval.metrics.metric import TAKES


def test_intervals_hold_the_true_mean_as_often_as_they_say() -> None:
    """Intervals too narrow by a factor (a standard deviation instead of an error of the mean) or too wide."""
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(200):
        low, high = bootstrap_interval((rng.random(100) < 0.7).astype(float), resamples=400, seed=seed)
        held += low <= 0.7 <= high
    assert 0.90 <= held / 200 <= 0.99


def test_intervals_do_not_depend_on_the_blocks_of_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draw that depends on how much memory was allowed for: intervals of old results could not be made again."""
    values = np.random.default_rng(1).random(37)
    whole = bootstrap_interval(values, seed=3)
    drawn = np.random.default_rng(3).integers(37, size=(2000, 37))
    assert whole == pytest.approx(np.quantile(values[drawn].mean(axis=1), [0.025, 0.975]), abs=1e-12)
    monkeypatch.setattr(module, "_CELLS", 500)
    assert bootstrap_interval(values, seed=3) == pytest.approx(whole, abs=1e-12)


def test_queries_about_one_picture_are_drawn_together() -> None:
    """Six questions about a picture taken for six pictures: intervals too narrow by √6."""
    values = np.repeat((np.random.default_rng(0).random(50) < 0.5).astype(float), 6)
    groups = np.repeat(np.arange(50), 6).tolist()
    narrow, wide = bootstrap_interval(values), bootstrap_interval(values, groups=groups)
    assert (wide[1] - wide[0]) / (narrow[1] - narrow[0]) == pytest.approx(6**0.5, rel=0.1)
    assert wide == pytest.approx(bootstrap_interval(values[::6]), abs=1e-12)
    with pytest.raises(FlamingoError, match="groups: 2, expected one for each of 300"):
        bootstrap_interval(values, groups=["a", "b"])


def test_spread_over_seeds() -> None:
    """The standard deviation of the runs at hand instead of that of runs to come; 0 for a single run."""
    assert over_seeds([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert over_seeds([0.5]) == (0.5, None)
    with pytest.raises(FlamingoError, match="no values"):
        over_seeds([])


def test_one_query_has_no_interval() -> None:
    """A single answer, or one picture's questions, given as certain: the same is drawn every time."""
    score = METRICS["accuracy"].score([1], [1])
    assert (score.value, score.interval) == (1.0, None) and "one of them" in score.details["interval"]
    assert METRICS["accuracy"].score([1, 0], [1, 1], groups=["a", "a"]).interval is None
    assert METRICS["accuracy"].score([1, 0], [1, 1], groups=["a", "b"]).interval == (0, 1)


EXAMPLES = {
    "accuracy": ([0, 1, 1], [0, 1, 0]),
    "top1": ([[0, 1], [1, 0], [1, 0]], [0, 1, 0]),
    "top5": ([range(5), range(1, 6), range(5)], [0, 0, 4]),
    "exact_match": (["a", "b", "c"], [["a"], ["x"], ["c"]]),
    "roc_auc": ([0.1, 0.9, 0.4], [0, 1, 1]),
    "cider": (["a dog runs", "a cat", "two birds"], [["the dog runs"], ["a cat sits"], ["birds"]]),
    "captions": (["a dog runs", "a cat", "two birds"], [["the dog runs"], ["a cat sits"], ["birds"]]),
    "vqa_accuracy": (["a", "b", "c"], [["a", "x", "a"], ["x", "b"], ["c", "c"]]),
    "vqa_accuracy_open_flamingo": (["a", "b", "c"], [["a", "x", "a"], ["x", "b"], ["c", "c"]]),
    "ok_vqa_accuracy": (["dogs", "b", "c"], [[("dogs", "dog"), ("x", "x")], ["b", "b"], ["c", "d"]]),
    "pope": (["yes", "no", "no"], ["yes", "no", "yes"]),
    "mme": (["yes", "no", "no", "no"], ["yes", "yes", "no", "no"]),
}


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_gives_plain_figures_from_its_queries(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A metric whose figure is not that of its queries, that keeps no record, or that breaks results.json."""
    monkeypatch.setattr("shutil.which", lambda _: None)  # METEOR takes seconds
    metric = METRICS[name]
    predictions, targets = EXAMPLES[name]
    groups = [place // 2 for place in range(len(predictions))] if metric.grouped else None
    score = metric.score(predictions, targets, groups=groups, resamples=50, seed=1)
    again = metric.score(predictions, targets, groups=groups, resamples=50, seed=1)
    assert metric.name == name
    assert metric.takes in TAKES
    assert score.as_dict() == again.as_dict() == json.loads(json.dumps(score.as_dict(), allow_nan=False))
    assert "50 draws" in score.details["interval"]
    assert (score.value, score.interval) == next(iter(score.figures.values()))
    if score.per_item is None:
        with pytest.raises(FlamingoError, match="a single query has no value"):
            metric(predictions, targets)
    else:
        assert score.per_item.mean() == pytest.approx(score.value)
        assert metric(predictions, targets).tolist() == score.per_item.tolist()
    unresampled = metric.score(predictions, targets, groups=groups, resamples=0)
    assert all(figure.interval is None for figure in unresampled.figures.values())


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_refuses_what_it_cannot_score(name: str) -> None:
    """Predictions paired with other queries' targets; the mean of no queries; a number where text is due."""
    predictions, targets = EXAMPLES[name]
    with pytest.raises(FlamingoError, match="1 targets, expected as many of both"):
        METRICS[name].score(predictions, targets[:1], groups=["a"] * len(predictions))
    with pytest.raises(FlamingoError, match="at least one"):
        METRICS[name]([], [])
    if METRICS[name].takes == "index":
        with pytest.raises(FlamingoError, match="prediction 1 is '1', expected an index"):
            METRICS[name]([0, "1", 1], targets)
    if METRICS[name].takes in ("index", "ranking"):
        with pytest.raises(FlamingoError, match="target 2 is None, expected an index"):
            METRICS[name](predictions, [*targets[:2], None])
    if METRICS[name].takes == "score":
        with pytest.raises(FlamingoError, match="prediction 0 is 'x', expected a finite number"):
            METRICS[name].score(["x"], [1])
    if METRICS[name].takes == "text":
        with pytest.raises(FlamingoError, match="prediction 0 is 3, expected text"):
            METRICS[name]([3], targets[:1])
