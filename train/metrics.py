"""What a run records and how it is looked at: one list for the tracker, the W&B dashboard and the local page.

A name may end with `*`, which stands for any text: `loss/*` is `loss/SOURCE` for every source.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from flamingo.errors import FlamingoError

AXES = {"step": "optimizer steps", "samples": "sequences seen", "tokens": "tokens seen"}
"""Columns that others are drawn against, with their labels."""


@dataclass(frozen=True)
class Metric:
    """A column of the log, or all columns of a pattern.

    Attributes:
        name: exact, or with a trailing `*`.
        meaning: what is measured, with its unit.
        axis: a key of `AXES`: what W&B draws it against by itself.
        repeats: whether a step that is computed again, after an interruption, has the same value again.
    """

    name: str
    meaning: str
    axis: str = "samples"
    repeats: bool = True


METRICS = (
    Metric("loss", "negative log-likelihood, nats per supervised token, weighted over sources", "tokens"),
    Metric("loss/*", "the same of each source, unweighted", "tokens"),
    Metric("fewshot/*", "accuracy of TASK/SHOTS on held-out classes, 0 to 1"),
    Metric("generations", "answers in the model's own words, with their pictures: a table"),
    Metric("gate/*", "tanh of each gate: how far it is open"),
    Metric("gates/*", "the same as a histogram over blocks"),
    Metric("gradient_norm", "global norm before clipping"),
    Metric("gradient_norm/*", "the same of each group of parameters"),
    Metric("learning_rate/*", "of each group of parameters"),
    Metric("tokens_per_second", "tokens read a second, over all processes", repeats=False),
    Metric("images_per_second", "images read a second, over all processes", repeats=False),
    Metric("mfu", "share of the GPUs' peak operations that the model's own need, 0 to 1", repeats=False),
    Metric("memory_gb", "largest memory held by a process, 10⁹ bytes", repeats=False),
    Metric("data_wait_share", "share of time spent waiting for data, 0 to 1", repeats=False),
    Metric("skipped_steps", "steps skipped for a loss or gradient that was not finite, since the first step"),
    Metric("faults/*", "samples replaced, by source and by reason, since the first step"),
    Metric("samples/*", "sequences of each source seen"),
    Metric("epoch/*", "how often each source was gone through"),
)
"""All that is tracked, but for the axes."""


@dataclass(frozen=True)
class Plot:
    """One chart, on the dashboard and on the local page alike.

    Attributes:
        section: heading that it stands under.
        title: of the chart.
        unit: of what is drawn.
        metrics: names, or patterns, of the columns drawn in it.
        axis: a key of `AXES`.
        bounds: of the other axis; None: those of the points.
        kind: lines, a histogram over time, or a table of generations.
    """

    section: str
    title: str
    unit: str
    metrics: tuple[str, ...]
    axis: str = "samples"
    bounds: tuple[float, float] | None = None
    kind: Literal["lines", "histogram", "table"] = "lines"

    def shows(self, name: str) -> bool:
        """Whether a column is drawn in it."""
        return any(covers(pattern, name) for pattern in self.metrics)


PLOTS = (
    Plot("Loss", "Loss", "nats per supervised token", ("loss", "loss/*"), "tokens"),
    Plot("Loss", "Loss against sequences", "nats per supervised token", ("loss", "loss/*")),
    Plot("Few-shot", "Few-shot accuracy", "held-out classes, by task and shots", ("fewshot/*",), bounds=(0.0, 1.0)),
    Plot("Few-shot", "Generations", "answers in the model's own words", ("generations",), kind="table"),
    Plot("Gates", "Attention gates", "tanh, by block", ("gate/attention.*",)),
    Plot("Gates", "Feed-forward gates", "tanh, by block", ("gate/feed_forward.*",)),
    Plot("Gates", "Attention gates, histogram", "tanh, over blocks", ("gates/attention",), kind="histogram"),
    Plot("Gates", "Feed-forward gates, histogram", "tanh, over blocks", ("gates/feed_forward",), kind="histogram"),
    Plot("Optimisation", "Gradient norm", "before clipping", ("gradient_norm", "gradient_norm/*")),
    Plot("Optimisation", "Learning rate", "by group of parameters", ("learning_rate/*",)),
    Plot("Optimisation", "Skipped steps", "loss or gradient not finite", ("skipped_steps",)),
    Plot("Speed", "Tokens a second", "over all processes", ("tokens_per_second",)),
    Plot("Speed", "Images a second", "over all processes", ("images_per_second",)),
    Plot("Speed", "Model FLOPs utilisation", "share of the GPUs' peak", ("mfu",)),
    Plot("Speed", "Memory", "10⁹ bytes, largest of a process", ("memory_gb",)),
    Plot("Speed", "Waiting for data", "share of time", ("data_wait_share",)),
    Plot("Data", "Faults", "samples replaced, by source and reason", ("faults/*",)),
    Plot("Data", "Mixture", "sequences seen, by source", ("samples/*",)),
    Plot("Data", "Epochs", "how often each source was gone through", ("epoch/*",)),
)
"""In the order in which they are looked at."""


def covers(pattern: str, name: str) -> bool:
    """Whether a name, or all names of a narrower pattern, belong to `pattern`."""
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern


def defined(name: str) -> Metric | None:
    """The metric that a column, or a pattern of columns, belongs to; None for one that is not tracked."""
    return next((metric for metric in METRICS if covers(metric.name, name)), None)


def regular_expression(patterns: Iterable[str]) -> str:
    """What exactly the columns of some patterns match."""
    parts = (re.escape(each[:-1]) + ".*" if each.endswith("*") else re.escape(each) for each in patterns)
    return f"^({'|'.join(parts)})$"


def check_plots(plots: Iterable[Plot] = PLOTS) -> None:
    """Refuse charts that would stay empty, and metrics that nobody would see.

    Raises:
        FlamingoError: it names the chart or the metric.
    """
    plots = tuple(plots)
    for plot in plots:
        for name in plot.metrics:
            if defined(name) is None:
                raise FlamingoError(f"plot {plot.title!r}: expected metrics that the tracker defines, found {name!r}")
        if plot.axis not in AXES:
            raise FlamingoError(f"plot {plot.title!r}: axis {plot.axis!r}, expected one of {', '.join(AXES)}")
    for metric in METRICS:
        if not any(covers(metric.name, name) for plot in plots for name in plot.metrics):
            raise FlamingoError(f"metric {metric.name!r}: expected in at least one plot")
