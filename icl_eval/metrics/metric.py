"""What a metric is: from the answers to a cell's queries to figures, their intervals, and how they came about."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np

from flamingo.errors import FlamingoError
from icl_eval.metrics.bootstrap import LEVEL, RESAMPLES, Figures, bootstrap

TAKES = {
    "index": "the index of the chosen candidate",
    "ranking": "indices of candidates, the best first",
    "score": "a number, larger for the positive class",
    "text": "generated text",
}
"""What a prediction of one query can be."""


class Figure(NamedTuple):
    """A number and its bootstrap interval; no interval where resampling the queries cannot give one: see `score`."""

    value: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Score:
    """What a metric says of a cell.

    Attributes:
        metric: name of the metric.
        figures: all its figures by name, the headline first.
        per_item: (Q,) the headline's value of each query, where it has one.
        queries: Q.
        details: how the figures came about, and what is missing and why: tokenizer, rules, versions.
    """

    metric: str
    figures: Mapping[str, Figure]
    per_item: np.ndarray | None = field(repr=False)
    queries: int
    details: Mapping[str, str]

    @property
    def value(self) -> float:
        """The headline."""
        return next(iter(self.figures.values())).value

    @property
    def interval(self) -> tuple[float, float] | None:
        """The headline's."""
        return next(iter(self.figures.values())).interval

    def as_dict(self) -> dict[str, Any]:
        """Everything but the values of single queries, as plain data."""
        figures = {
            name: {"value": figure.value, "interval": None if figure.interval is None else list(figure.interval)}
            for name, figure in self.figures.items()
        }
        return {"metric": self.metric, "queries": self.queries, "figures": figures, "details": dict(self.details)}


@dataclass(frozen=True)
class Prepared:
    """The answers to a cell, ready to be scored under any weights of its queries.

    Attributes:
        names: of the K figures, the headline first.
        figures: weights (R, Q) → (R, K).
        per_item: (Q,) the headline's value of each query, where it has one.
        whole: further figures that only the queries as they are give, without an interval.
        details: see `Score`.
    """

    names: tuple[str, ...]
    figures: Figures
    per_item: np.ndarray | None = None
    whole: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, str] = field(default_factory=dict)


Prepare = Callable[[Sequence[Any], Sequence[Any], Sequence[Any] | None], Prepared]
"""Predictions, targets and groups, Q of each (groups may be None) → `Prepared`."""


@dataclass(frozen=True)
class Metric:
    """A metric by its name.

    Attributes:
        name: as tasks give it.
        takes: what a prediction is, a key of `TAKES`.
        targets: what a target is, in words.
        prepare: see `Prepare`.
        grouped: whether it cannot do without groups (the picture of each query).
    """

    name: str
    takes: str
    targets: str
    prepare: Prepare
    grouped: bool = False

    def __call__(self, predictions: Sequence[Any], targets: Sequence[Any]) -> np.ndarray:
        """The headline's value of each query: (Q,), of which it is the mean.

        Raises:
            FlamingoError: a single query has no value under this metric, or the input is not of its kind.
        """
        per_item = self.prepared(predictions, targets).per_item
        if per_item is None:
            raise FlamingoError(f"metric {self.name}: a single query has no value; expected a call of `score`")
        return per_item

    def score(
        self,
        predictions: Sequence[Any],
        targets: Sequence[Any],
        *,
        groups: Sequence[Any] | None = None,
        level: float = LEVEL,
        resamples: int = RESAMPLES,
        seed: int = 0,
    ) -> Score:
        """All figures of a cell.

        Args:
            predictions: Q of the kind `takes`.
            targets: Q of the kind `targets`.
            groups: of each query, the picture that it asks about: see `resampled` in bootstrap.py.
            level: of the intervals.
            resamples: of the bootstrap; 0: no intervals. None either where there is but one query or group.
            seed: of the bootstrap's draws.

        Raises:
            FlamingoError: the input is not of this metric's kind; the query's place is named.
        """
        if self.grouped and groups is None:
            raise FlamingoError(f"metric {self.name}: no groups, expected the picture of each query")
        prepared = self.prepared(predictions, targets, groups)
        queries = len(predictions)
        values = prepared.figures(np.ones((1, queries)))[0]
        intervals: list[tuple[float, float] | None] = [None] * len(values)
        units = queries if groups is None else len(set(map(str, groups)))
        if resamples and units > 1:  # a single one is drawn every time, as if its value were certain
            found = bootstrap(
                prepared.figures, queries, groups=groups, level=level, resamples=resamples, seed=seed
            ).tolist()
            intervals = [(low, high) for low, high in found]
        figures = {
            name: Figure(float(value), interval)
            for name, value, interval in zip(prepared.names, values, intervals, strict=True)
        }
        figures |= {name: Figure(value, None) for name, value in prepared.whole.items()}
        unit = "queries" if groups is None else "groups of queries"
        drawn = f"percentile bootstrap, {resamples} draws of {unit}, level {level}"
        details = {**prepared.details, "interval": drawn if units > 1 else f"none: {unit}, but one of them"}
        return Score(self.name, figures, prepared.per_item, queries, details)

    def prepared(
        self, predictions: Sequence[Any], targets: Sequence[Any], groups: Sequence[Any] | None = None
    ) -> Prepared:
        """The answers to a cell, checked, ready to be scored under any weights of its queries.

        Raises:
            FlamingoError: the input is not of this metric's kind; the query's place is named.
        """
        if len(predictions) != len(targets) or not len(predictions):
            found = f"{len(predictions)} predictions and {len(targets)} targets"
            raise FlamingoError(f"metric {self.name}: {found}, expected as many of both, and at least one")
        for place, prediction in enumerate(predictions):
            if self.takes == "text" and not isinstance(prediction, str):
                raise FlamingoError(f"metric {self.name}: prediction {place} is {prediction!r}, expected text")
            if self.takes == "score" and not (isinstance(prediction, Real) and math.isfinite(prediction)):
                raise FlamingoError(
                    f"metric {self.name}: prediction {place} is {prediction!r}, expected a finite number"
                )
            if self.takes == "index" and not isinstance(prediction, Integral):
                raise FlamingoError(f"metric {self.name}: prediction {place} is {prediction!r}, expected an index")
        if self.takes in ("index", "ranking"):
            for place, target in enumerate(targets):
                if not isinstance(target, Integral):
                    raise FlamingoError(f"metric {self.name}: target {place} is {target!r}, expected an index")
        return self.prepare(predictions, targets, groups)


def string_lists(metric: str, targets: Sequence[Any]) -> None:
    """Check that every target is a list of texts.

    Raises:
        FlamingoError: the first that is not, by its place.
    """
    for place, target in enumerate(targets):
        listed = isinstance(target, Sequence) and not isinstance(target, str) and len(target) > 0
        if not listed or not all(isinstance(text, str) for text in target):
            raise FlamingoError(f"metric {metric}: target {place} is {target!r}, expected a list of texts")
