"""`flamingo-eval compare A B [C …]`: do runs really differ? Paired tests over the same queries.

Every run is compared with the first. Where each query is right or wrong by itself the test is McNemar's, exact (McNemar
1947): of the queries that one run alone gets right, is the share of either run's a half? For figures of any other kind
(captions, areas under curves), and where several queries ask about one picture, it is a randomisation test
(`icl_eval.metrics.paired`). Intervals of differences come of a bootstrap that draws the queries anew for both runs at
once: they are narrower than the runs' own intervals suggest, since hard queries are hard for both. Beside p stands p
by Holm's correction for the number of tests (1979).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flamingo.errors import FlamingoError
from flamingo.files import write_text
from icl_eval.ledger import written
from icl_eval.metrics import METRICS
from icl_eval.metrics.bootstrap import LEVEL, RESAMPLES, percentiles, resampled
from icl_eval.metrics.metric import Metric, Prepared
from icl_eval.metrics.paired import SIGNIFICANT, Difference, of_scores, of_values, randomisation_p
from icl_eval.saved import Key, Predictions, SavedResults, named, parse

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

SCHEMA = 1
MCNEMAR, RANDOMISATION = "McNemar, exact", "paired randomisation"
ROUNDED = 1e-4
"""How far a figure may move by the rounding of the scores in predictions.jsonl."""
NOT_COMPARED = ("file", "shots")
"""Keys of a task that may differ without a word."""


@dataclass
class CompareOptions:
    """Compare runs over the same queries by paired tests, each with the first."""

    json: str | None = None
    """file for the figures as JSON"""
    other_prompts: bool = False
    """compare even where the runs were asked the same queries by different prompts, such as other demonstrations"""
    shared_queries: bool = False
    """compare over the queries that all runs have, where some have more"""
    controls: bool = False
    """compare the cells under controls too"""
    resamples: int = RESAMPLES
    """of the bootstrap, and draws of the randomisation test"""
    seed: int = 0
    """of both"""


@dataclass(frozen=True)
class Change:
    """By how much a figure differs: `value` and `first` of the two runs, the difference, and its interval or None."""

    first: float
    value: float
    difference: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Row:
    """One run against the first in one cell.

    Attributes:
        task, shots, control: the cell.
        run: which run is compared with the first.
        queries: that both were asked.
        figures: of the metric, the headline first.
        test: `MCNEMAR` or `RANDOMISATION`, of the headline.
        p: of the headline, two-sided; `p_holm`: corrected for all tests of the comparison.
        only_first, only_run: queries that one of them alone got right; None where queries are not right or wrong.
    """

    task: str
    shots: int
    control: str | None
    run: str
    queries: int
    figures: Mapping[str, Change]
    test: str
    p: float
    p_holm: float
    only_first: int | None = None
    only_run: int | None = None

    @property
    def headline(self) -> tuple[str, Change]:
        """The metric's first figure and its name."""
        return next(iter(self.figures.items()))


@dataclass(frozen=True)
class Comparison:
    """All rows, and what a reader has to know of them.

    Attributes:
        runs: the results by label, the first the one that others are compared with.
        rows: by run, then in the order of the first run's cells.
        notes: which cells were left out, in what tasks differ.
        settings: level, resamples and seed of the bootstrap.
    """

    runs: Mapping[str, SavedResults]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    settings: Mapping[str, float] = field(default_factory=dict)

    @property
    def first(self) -> str:
        """Label of the run that the others are compared with."""
        return next(iter(self.runs))

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        runs = {
            label: {"folder": str(run.folder.resolve()), "model": run.facts.get("model"), "commit": run.facts["commit"]}
            for label, run in self.runs.items()
        }
        return {
            "schema": SCHEMA,
            "first": self.first,
            "runs": runs,
            "bootstrap": dict(self.settings),
            "rows": [asdict(row) for row in self.rows],
            "notes": list(self.notes),
        }

    def table(self) -> Group:
        """A table for each run that is compared with the first; bold where p_holm < `SIGNIFICANT`."""
        from rich.console import Group
        from rich.text import Text

        others = list(self.runs)[1:]
        tables = [_table(self.first, label, [row for row in self.rows if row.run == label]) for label in others]
        return Group(*tables, *map(Text, (*self._legend(), *self.notes)))

    def _legend(self) -> list[str]:
        tests = f"{len(self.rows)} test{'' if len(self.rows) == 1 else 's'}"
        return [
            f"below p, as corrected for {tests} (Holm); bold below {SIGNIFICANT}",
            f"p is McNemar's, exact, where it says how many each run alone gets right, else of a {RANDOMISATION}",
        ]


def compare(
    runs: Mapping[str, SavedResults],
    *,
    other_prompts: bool = False,
    shared_queries: bool = False,
    controls: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Compare each run with the first, in all cells that all runs have.

    Args:
        runs: results by label, two at least.
        other_prompts: allow the same queries to have been asked by different prompts.
        shared_queries: leave out queries that not all runs have.
        controls: also compare cells under controls.
        resamples: of the bootstrap, and draws of the randomisation test.
        seed: of both.

    Raises:
        FlamingoError: fewer than two runs; no cell in common; another metric, other queries or prompts than allowed;
            predictions that do not give the figures of results.json. It names the cell and the query.
    """
    if len(runs) < 2:
        raise FlamingoError(f"compare: {len(runs)} run, expected at least two")
    if resamples < 1:
        raise FlamingoError(f"compare: resamples: {resamples}, expected at least 1")
    first, *_ = runs.values()
    wanted = [key for key in first.cells if controls or key[2] is None]
    keys = [key for key in wanted if all(key in run.cells for run in runs.values())]
    if not keys:
        raise FlamingoError(f"compare: {', '.join(runs)} have no cell in common, expected a task at the same shots")
    tasks = {key[0]: None for key in keys}
    notes = [*_left_out(runs, keys, controls), *(note for task in tasks for note in _task_notes(runs, task))]
    predictions = {label: Predictions(run) for label, run in runs.items()}
    rows = []
    for key in keys:
        lines = {label: each.cell(key) for label, each in predictions.items()}
        seeds = {label: run.seeds.get(key[0]) for label, run in runs.items()}
        lines = same_queries(key, lines, seeds, other_prompts=other_prompts, shared_queries=shared_queries)
        (_, base), *others = [(label, _answers(runs[label], key, lines[label])) for label in runs]
        rows += [_row(key, label, base, other, resamples, seed) for label, other in others]
    rows.sort(key=lambda row: list(runs).index(row.run))
    settings = {"level": LEVEL, "resamples": resamples, "seed": seed}
    return Comparison(runs, tuple(_corrected(rows)), tuple(notes), settings)


# -- what may be compared ----------------------------------------------------------------------------------------------


def _left_out(runs: Mapping[str, SavedResults], keys: Sequence[Key], controls: bool) -> list[str]:
    """Cells that not all runs have."""
    notes = []
    for label, run in runs.items():
        alone = [named(key) for key in run.cells if key not in keys and (controls or key[2] is None)]
        if alone:
            notes.append(f"not in every run, though in {label}: {', '.join(alone)}")
    return notes


def _task_notes(runs: Mapping[str, SavedResults], task: str) -> list[str]:
    """In what the task differs between runs.

    Raises:
        FlamingoError: in its metric.
    """
    (first, expected), *others = [(label, run.tasks[task]) for label, run in runs.items()]
    notes = []
    for label, found in others:
        if found["metric"] != expected["metric"]:
            metrics = f"{found['metric']} in {label}, {expected['metric']} in {first}"
            raise FlamingoError(f"{task}: metric: {metrics}, expected the same")
        keys = [key for key in {**expected, **found} if key not in NOT_COMPARED]
        changed = [key for key in keys if found.get(key) != expected.get(key)]
        told = [f"{key}: {found.get(key)!r} in {label}, {expected.get(key)!r} in {first}" for key in changed]
        notes += [f"{task}: {each}" for each in told]
    return notes


Lines = list[dict[str, Any]]


def same_queries(
    key: Key,
    lines: Mapping[str, Lines],
    seeds: Mapping[str, int | None],
    *,
    other_prompts: bool = False,
    shared_queries: bool = False,
) -> dict[str, Lines]:
    """The predictions of a cell by run, of the same queries in the same order.

    Args:
        key: the cell, for messages.
        lines: of each run, by `query_id`.
        seeds: of each run, of the task, for messages.
        other_prompts, shared_queries: see `compare`.

    Raises:
        FlamingoError: the runs were not asked the same, in more than is allowed.
    """
    advice = _advice(seeds)
    named_queries = {label: {line["query_id"] for line in several} for label, several in lines.items()}
    shared = set.intersection(*named_queries.values())
    for label, queries in named_queries.items():
        if queries != shared and not shared_queries:
            example = min(queries - shared)
            raise FlamingoError(
                f"{named(key)}: not every run has query {example} of {label}, expected the same queries; "
                + (advice or "--shared_queries leaves out the others")
            )
    if not shared:
        raise FlamingoError(f"{named(key)}: the runs have no query in common" + (advice and f"; {advice}"))
    kept = {label: [line for line in several if line["query_id"] in shared] for label, several in lines.items()}
    (first, expected), *others = kept.items()
    for label, several in others:
        for found, wanted in zip(several, expected, strict=True):
            about = f"{named(key)}: query {wanted['query_id']}"
            # Names of candidates may stand in another order in another prompt; what is asked about may not change.
            if found["query"] != wanted["query"] or _truth(found) != _truth(wanted):
                why = f"; {advice}" if advice else " (another data set)"
                raise FlamingoError(f"{about} is another one in {label} than in {first}{why}")
            if found["prompt"] != wanted["prompt"] and not other_prompts:
                raise FlamingoError(
                    f"{about} was asked by another prompt in {label} than in {first}, expected the same prompts; "
                    "--other_prompts compares them nevertheless"
                )
    return kept


def _advice(seeds: Mapping[str, int | None]) -> str:
    """What to do where runs have other queries because they have other seeds; "" where they do not."""
    if len(set(seeds.values())) == 1:
        return ""
    told = ", ".join(f"{seed} in {label}" for label, seed in seeds.items())
    return (
        f"queries are drawn by the seed ({told}): compare runs of the same seed, or, where the task has queries of its "
        "own, those that all runs have: --shared_queries true --other_prompts true"
    )


def _truth(line: Mapping[str, Any]) -> Any:
    """What is right, whatever its place among the candidates."""
    right = line.get("right")
    return right if right is not None and isinstance(line["target"], int) else line["target"]


@dataclass(frozen=True)
class Answers:
    """A run's answers to a cell: as they are, under its metric, and the pictures that they hang together by."""

    metric: Metric
    predictions: list[Any]
    targets: list[Any]
    prepared: Prepared
    groups: list[str] | None

    @property
    def queries(self) -> int:
        """How many."""
        return len(self.predictions)


def _answers(results: SavedResults, key: Key, lines: Lines) -> Answers:
    """The answers to a cell under its metric.

    Raises:
        FlamingoError: they do not give the figure in results.json.
    """
    score = results.cells[key].score
    if score.metric not in METRICS:
        known = ", ".join(METRICS)
        raise FlamingoError(f"{results.folder}: {named(key)}: metric {score.metric!r}, expected one of {known}")
    groups = [line["group"] for line in lines if line.get("group") is not None]
    if groups and len(groups) < len(lines):
        raise FlamingoError(f"{results.folder}: {named(key)}: some predictions have no group, expected all or none")
    predictions, targets = [line["prediction"] for line in lines], [line["target"] for line in lines]
    metric = METRICS[score.metric]
    prepared = metric.prepared(predictions, targets, groups or None)
    found = float(prepared.figures(np.ones((1, len(lines))))[0, 0])
    if len(lines) == score.queries and abs(found - score.value) > ROUNDED:
        raise FlamingoError(
            f"{results.folder}: {named(key)}: predictions.jsonl gives {found:.6f}, results.json {score.value:.6f}: "
            "expected files of one evaluation"
        )
    return Answers(metric, predictions, targets, prepared, groups or None)


# -- tests -------------------------------------------------------------------------------------------------------------


def _row(key: Key, run: str, one: Answers, two: Answers, resamples: int, seed: int) -> Row:
    """`two`, of the run of that name, against `one`, of the first run."""
    first, other, groups = one.prepared, two.prepared, one.groups

    def difference(weights: np.ndarray) -> np.ndarray:
        return other.figures(weights) - first.figures(weights)

    drawn = resampled(difference, one.queries, groups=groups, resamples=resamples, seed=seed)
    every = np.ones((1, one.queries))
    columns = zip(first.names, first.figures(every)[0], other.figures(every)[0], percentiles(drawn), strict=True)
    several = one.queries > 1 if groups is None else len(set(groups)) > 1  # of one, all draws are the same
    figures = {
        name: _change(before, after, (float(low), float(high)) if several else None)
        for name, before, after, (low, high) in columns
    }
    shared = [name for name in first.whole if name in other.whole]
    figures |= {name: _change(first.whole[name], other.whole[name], None) for name in shared}
    alone = right_alone(first, other) if groups is None or len(set(groups)) == len(groups) else None
    if alone is not None:
        p = mcnemar_p(*alone)
        return Row(*key, run, one.queries, figures, MCNEMAR, p, p, *alone)
    p = randomisation_p(_swapped(one, two), one.queries, groups=groups, resamples=resamples, seed=seed)
    return Row(*key, run, one.queries, figures, RANDOMISATION, p, p)


def _swapped(one: Answers, two: Answers) -> Difference:
    """How much the headline differs where answers are exchanged."""
    first, other = one.prepared.per_item, two.prepared.per_item
    if first is not None and other is not None:
        return of_values(first, other)
    return of_scores(one.metric, one.predictions, two.predictions, one.targets)


def _change(first: float, value: float, interval: tuple[float, float] | None) -> Change:
    return Change(float(first), float(value), float(value - first), interval)


def right_alone(first: Prepared, other: Prepared) -> tuple[int, int] | None:
    """How many queries either of two runs alone gets right; None where queries are not right or wrong.

    Where all values are 0 they may be captions', and neither test finds a difference.
    """
    one, two = first.per_item, other.per_item
    if one is None or two is None or not np.isin([one, two], (0.0, 1.0)).all() or not np.any([one, two]):
        return None
    return int((one > two).sum()), int((two > one).sum())


def mcnemar_p(only_first: int, only_other: int) -> float:
    """McNemar's exact test, two-sided: p of so uneven a split of the queries that one run alone gets right."""
    from scipy.special import bdtr

    return min(1.0, 2 * float(bdtr(min(only_first, only_other), only_first + only_other, 0.5)))


def holm(p: Sequence[float]) -> list[float]:
    """p values corrected for their number by Holm's step-down procedure, in the order given."""
    order = sorted(range(len(p)), key=lambda place: p[place])
    corrected, largest = [0.0] * len(p), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[place]))
        corrected[place] = largest
    return corrected


def _corrected(rows: Sequence[Row]) -> list[Row]:
    return [replace(row, p_holm=p) for row, p in zip(rows, holm([row.p for row in rows]), strict=True)]


# -- what a person sees ------------------------------------------------------------------------------------------------


def _table(first: str, run: str, rows: Sequence[Row]) -> Table:
    from rich.box import SIMPLE
    from rich.markup import escape
    from rich.table import Table

    shown = Table(
        title=escape(f"{run} against {first}"),
        title_justify="left",
        title_style="bold",
        box=SIMPLE,
        pad_edge=False,
        collapse_padding=True,
    )
    shown.add_column("task", no_wrap=True)
    for heading in ("shots", "queries", escape(first), escape(run), "difference", "right alone", "p"):
        shown.add_column(heading, justify="right", no_wrap=heading == "difference")
    for row in rows:
        name, change = row.headline
        about = "\n".join([escape(row.task), f"[dim]{escape(name)}[/dim]", *([row.control] if row.control else [])])
        difference = f"{change.difference:+.3f}\n[dim]{_interval(change)}[/dim]"
        alone = "–" if row.only_first is None else f"{row.only_first} to {row.only_run}"
        p = f"{_p(row.p)}\n[dim]{_p(row.p_holm)}[/dim]"
        style = "bold" if row.p_holm < SIGNIFICANT else None
        values = [f"{change.first:.3f}", f"{change.value:.3f}"]
        shown.add_row(about, str(row.shots), f"{row.queries:,}", *values, difference, alone, p, style=style)
    return shown


def _interval(change: Change) -> str:
    return "" if change.interval is None else "{:+.3f}…{:+.3f}".format(*change.interval)


def _p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def main(words: Sequence[str]) -> None:
    """`flamingo-eval compare A B [C …]`."""
    from rich import get_console

    runs, options = parse("compare", words, CompareOptions)
    found = compare(
        runs,
        other_prompts=options.other_prompts,
        shared_queries=options.shared_queries,
        controls=options.controls,
        resamples=options.resamples,
        seed=options.seed,
    )
    get_console().print(found.table())
    if options.json is not None:
        with written(Path(options.json)):
            write_text(Path(options.json), json.dumps(found.as_dict(), indent=1, ensure_ascii=False) + "\n")
