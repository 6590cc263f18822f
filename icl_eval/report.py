"""One self-contained HTML page about a run: scores, controls, training curves, example prompts, data, provenance.

Everything is inline (style, SVG, pictures as data URIs), so that the page can be kept, mailed and opened anywhere.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from markupsafe import Markup

from data_shards.page import template
from flamingo.files import write_text
from icl_eval import comparison
from icl_eval.charts import COLOURS, Interval, Series, interval_chart, line_chart, smooth
from icl_eval.diagnostics import CONTROL_SHOTS, CONTROLS, DIAGNOSTICS
from icl_eval.evaluation import Cell, Results
from icl_eval.examples import SHOWN, examples, thumbnail
from icl_eval.instructions import InstructionResults, Item
from icl_eval.metrics import Figure
from icl_eval.outcomes import BEST, MANY
from icl_eval.tasks import Task
from icl_eval.verdicts import in_words, one_answer

MARGIN = 0.05  # how far from chance a control may fall
EXAMPLES = 12
SHORT = 24  # letters of a text that stands under its picture, rather than beside it
EMBEDDED = ("glyphs", "digits")  # data sets whose episodes have the form of those that the embedded world trains on
NO_SHARES = ("cider", "captions", "mme")  # metrics whose headline is no share of the queries
OTHER_ORDERS = "the demonstrations in other orders"
CONTROL_NAMES = {
    "gates_at_zero": ("gates at zero", "no picture reaches the language model"),
    "labels_permuted": ("labels permuted", "one random permutation of the names or answers, identity included"),
    "images_swapped": ("pictures swapped", "the demonstrations' pictures are permuted over their places"),
    "random_query": ("random query", "the query's picture is one drawn at random"),
    "text_only": ("text only", "the demonstrations without their pictures"),
    "order_1": ("order 1", OTHER_ORDERS),
    "order_2": ("order 2", OTHER_ORDERS),
    "order_3": ("order 3", OTHER_ORDERS),
}


def write_report(
    path: str | Path,
    *,
    results: Results,
    training_log: Sequence[Mapping[str, float | None]] = (),
    account: Mapping[str, Any] | None = None,
    timings: Mapping[str, float] | None = None,
    title: str = "Few-shot evaluation",
    facts: Mapping[str, Any] | None = None,
    instructions: Mapping[str, InstructionResults] | None = None,
    items: Sequence[Item] = (),
) -> Path:
    """Write the page to `path`, whose folder must exist.

    Args:
        path: of the HTML file.
        results: of `evaluate`.
        training_log: rows of metrics.jsonl, each with `step`, and of `loss`, `loss/SOURCE`, `gate/NAME` and
            `learning_rate/GROUP` what it has; without rows the page has no training curves.
        account: what was trained on, shown as it is: label → number or text, or label → such a mapping. It should say
            how many documents and pictures, and how often a (class, name) pair recurs.
        timings: seconds by stage.
        title: heading of the page.
        facts: further label → text for the provenance table; mappings, such as a recipe, are folded away below it.
        instructions: what each model is called → its results of `evaluate_instructions`, for a section that has them
            side by side; without them there is no such section.
        items: that they were asked.

    Raises:
        FlamingoError: where `instructions` are not of the same items, or a data set is no longer there.
    """
    shots = sorted({cell.shots for cell in results.cells if cell.control is None})
    rows = [row for row in training_log if row.get("step") is not None]
    rows_of_facts, folded = _facts(results, facts or {})
    alike = _alike(results)
    page = template(__file__, "report.html").render(
        title=title,
        headline=_headline(results),
        tiles=_tiles(results, alike),
        embedded=any(task.dataset in EMBEDDED for task in results.tasks.values()),
        shots=shots,
        table=[_table_row(results, name, shots) for name in results.tasks],
        text_only=[cell.task for cell in results.cells if cell.zero_shot == "text_only"],
        ties=sum(cell.ties for cell in results.cells),
        alike=[f"{name} at {_shots_in_words(shots)}: {said}" for (name, shots), said in alike.items()],
        score_charts=_score_charts(results),
        figures=_further_figures(results, shots),
        details=_details(results),
        verdicts=[(name, each["verdict"]) for name, each in results.diagnostics.items()],
        controls=_control_charts(results),
        control_names=_control_names(results),
        control_shots=CONTROL_SHOTS,
        falling=[CONTROL_NAMES[name][0] for name in _controls(results) if name in CONTROLS],
        worst_control=_worst_control(results),
        margin=MARGIN,
        curves=_curves(rows),
        examples=examples(results, EXAMPLES),
        graded=[name for name, task in results.tasks.items() if not _is_share(task)],
        instructions=_instructions(instructions, items) if instructions else None,
        account=_flat(account or {}),
        timings=[(stage, _duration(seconds)) for stage, seconds in (timings or {}).items()],
        total=_duration(sum((timings or results.seconds).values())),
        facts=rows_of_facts,
        folded=folded,
        short=SHORT,
        many=MANY,
        best=BEST,
        shots_in_words=_shots_in_words,
        uri=_data_uri,
    )
    path = Path(path)
    write_text(path, page)
    return path


# -- scores ------------------------------------------------------------------------------------------------------------


def _ladders(results: Results) -> list[str]:
    """Tasks with more than one shot count: those that a line can be drawn of."""
    return [name for name in results.tasks if len(_plain(results, name)) > 1]


def _plain(results: Results, task: str) -> list[Cell]:
    return [cell for cell in results.cells if cell.task == task and cell.control is None]


def _main_cell(cells: Sequence[Cell]) -> Cell:
    """Of a task's plain cells the one that the cards at the top have: that which controls are compared with."""
    return next((cell for cell in cells if cell.shots == CONTROL_SHOTS), cells[-1])


def _alike(results: Results) -> dict[tuple[str, int], str]:
    """By task and shots: the answer that nearly all queries get, in words."""
    found = {(cell.task, cell.shots): (cell, one_answer(cell)) for cell in results.cells if cell.control is None}
    return {key: in_words(cell, answer) for key, (cell, answer) in found.items() if answer is not None}


def _controls(results: Results) -> list[str]:
    return [name for name in DIAGNOSTICS if any(cell.control == name for cell in results.cells)]


def _is_share(task: Task) -> bool:
    return task.metric not in NO_SHARES


def _falls_to_chance(task: Task) -> bool:
    """Whether a perfect model must be at chance under `CONTROLS`: in fast binding, where labels are independent."""
    return task.ways > 0 and task.chance is not None


def _headline(results: Results) -> str:
    ladders = [name for name in _ladders(results) if results.tasks[name].names == "fresh"]
    if not ladders:
        return ""
    name = "glyphs_5way" if "glyphs_5way" in ladders else ladders[0]
    cells, task = _plain(results, name), results.tasks[name]
    few, most = next(cell for cell in cells if cell.shots), _main_cell(cells)
    shown = "one picture" if few.shots == 1 else f"{few.shots} pictures"
    never = " that it had never seen" if task.dataset in EMBEDDED else ""
    after = f"; after {most.shots} pictures of each, in {most.value:.1%}" if most is not few else ""
    return (
        f"Shown {shown} of each of {task.ways} classes{never}, under invented names, the model named a new picture "
        f"right in {few.value:.1%} of {len(few.outcomes):,} episodes{after}. Guessing gives {task.chance:.0%}."
    )


def _shots_in_words(shots: int) -> str:
    return f"{shots} shot{'' if shots == 1 else 's'}"


def _tiles(results: Results, alike: Mapping[tuple[str, int], str]) -> list[dict[str, Any]]:
    tiles: list[dict[str, Any]] = []
    for name, task in results.tasks.items():
        cell = _main_cell(_plain(results, name))
        factor, unit, form = (100, " %", "{:.1f}") if _is_share(task) else (1, "", "{:,.3f}")
        interval = cell.score.interval
        ends = "" if interval is None else " – ".join(form.format(factor * end) for end in interval) + unit
        chance = "" if task.chance is None else f"chance {factor * task.chance:.3g}{unit}"
        said = alike.get((name, cell.shots))
        shots = f"{cell.shots} per class" if task.ways else _shots_in_words(cell.shots)
        shots = shots if cell.shots else "no demonstrations"
        tiles.append(
            {
                "task": name,
                "score": form.format(factor * cell.value),
                "unit": unit,
                "about": [
                    f"{task.ways} ways, {shots}" if task.ways else f"{next(iter(cell.score.figures))}, {shots}",
                    *filter(None, (ends, chance, said and f"answers: {said}")),
                ],
            }
        )
    return tiles


def _shown(figure: Figure | None) -> tuple[str, str] | None:
    """A figure and its interval as a table has them."""
    if figure is None:
        return None
    return f"{figure.value:.3f}", "" if figure.interval is None else "{:.3f} – {:.3f}".format(*figure.interval)


def _table_row(results: Results, name: str, shots: Sequence[int]) -> dict[str, Any]:
    """The headline of a task by shots."""
    cells = {cell.shots: Figure(cell.value, cell.score.interval) for cell in _plain(results, name)}
    task = results.tasks[name]
    return {
        "task": name,
        "source": ", ".join(filter(None, (task.dataset, task.split, task.metric))),
        "cells": [_shown(cells.get(count)) for count in shots],
        "chance": "–" if task.chance is None else f"{task.chance:.3f}",
    }


def _further_figures(results: Results, shots: Sequence[int]) -> list[dict[str, Any]]:
    """Rows of all figures of the metrics that have several: task and figure by shots."""
    rows = []
    for name in results.tasks:
        cells = {cell.shots: cell.score.figures for cell in _plain(results, name)}
        figures = list(dict.fromkeys(figure for each in cells.values() for figure in each))
        if len(figures) > 1:
            rows += [
                {
                    "task": name,
                    "figure": figure,
                    "cells": [_shown(cells.get(count, {}).get(figure)) for count in shots],
                }
                for figure in figures
            ]
    return rows


def _details(results: Results) -> list[tuple[str, str]]:
    """How the figures of each task came about, as its first cell has it."""
    first = {name: _plain(results, name)[0].score for name in results.tasks}
    told = {name: "; ".join(f"{what}: {how}" for what, how in score.details.items()) for name, score in first.items()}
    return [(name, each) for name, each in told.items() if each]


def _score_charts(results: Results) -> list[dict[str, Any]]:
    """Scores against shots: shares of queries together, each other metric apart, as many lines as there are colours."""
    by_metric: dict[str, list[str]] = {}
    for name in _ladders(results):
        task = results.tasks[name]
        by_metric.setdefault("" if _is_share(task) else task.metric, []).append(name)
    return [
        _score_chart(results, metric, names[start : start + COLOURS])
        for metric, names in by_metric.items()
        for start in range(0, len(names), COLOURS)
    ]


def _score_chart(results: Results, metric: str, names: Sequence[str]) -> dict[str, Any]:
    """A chart of some tasks, with its legend; `metric`: on its own scale, "": shares."""
    shots = sorted({cell.shots for name in names for cell in _plain(results, name)})
    lines, tasks = [], [results.tasks[name] for name in names]
    colours = {name: place for place, name in enumerate(names)}
    for name in names:
        cells = _plain(results, name)
        x = [float(shots.index(cell.shots)) for cell in cells]
        ends = [cell.score.interval or (cell.value, cell.value) for cell in cells]
        lows, highs = zip(*ends, strict=True)
        lines.append(Series(name, x, [cell.value for cell in cells], colours[name], lows, highs, dots=True))
    about = metric or ("accuracy" if all(task.metric == "accuracy" for task in tasks) else "score")
    unit = "demonstrations per class" if all(task.ways for task in tasks) else "shots"
    chart = line_chart(
        lines,
        title=f"{about} against shots",
        x_label=unit,
        y_label=about,
        y_range=None if metric else (0.0, 1.0),
        x_names=[str(count) for count in shots],
        references=_chances(tasks),
        size=(560, 320),
    )
    return {"chart": Markup(chart), "legend": list(colours.items())}


def _chances(tasks: Sequence[Task]) -> list[tuple[str, float]]:
    """Lines at what guessing gives, each value once."""
    names: dict[float, str] = {}
    for task in tasks:
        if task.chance is not None:
            names.setdefault(round(task.chance, 4), f"chance, {task.ways} ways" if task.ways else "chance")
    return sorted(((name, chance) for chance, name in names.items()), key=lambda each: each[1])


# -- controls ----------------------------------------------------------------------------------------------------------


def _control_names(results: Results) -> list[tuple[str, str]]:
    """The controls that were run, those of one kind together, each with what it changes."""
    names: dict[str, list[str]] = {}
    for name, about in (CONTROL_NAMES[control] for control in _controls(results)):
        names.setdefault(about, []).append(name)
    return [(", ".join(each), about) for about, each in names.items()]


def _control_charts(results: Results) -> list[tuple[str, Markup]]:
    charts = []
    for place, (name, task) in enumerate(results.tasks.items()):
        found = {cell.control: cell for cell in results.cells if cell.task == name and cell.control}
        if not found:
            continue
        plain = next((cell for cell in _plain(results, name) if cell.shots == CONTROL_SHOTS), None)
        rows = [] if plain is None else [_interval("as it is", plain, strong=True)]
        rows += [_interval(CONTROL_NAMES[each][0], found[each]) for each in DIAGNOSTICS if each in found]
        chart = interval_chart(
            rows,
            title=f"controls of {name}",
            x_label=next(iter(next(iter(found.values())).score.figures)),
            chance=task.chance,
            margin=MARGIN if _falls_to_chance(task) else 0.0,
            colour=place % COLOURS,
            most=1.0 if _is_share(task) else None,
        )
        charts.append((name, Markup(chart)))
    return charts


def _interval(name: str, cell: Cell, *, strong: bool = False) -> Interval:
    return Interval(name, cell.value, *(cell.score.interval or (cell.value, cell.value)), strong=strong)


def _worst_control(results: Results) -> str:
    """How far from chance the farthest control is, of those that must be at chance.

    It is an alarm only where the whole interval lies beyond the margin: few queries are far from chance by chance.
    """
    away = []
    for cell in results.cells:
        task = results.tasks[cell.task]
        if cell.control in CONTROLS and _falls_to_chance(task) and task.chance is not None:
            low, high = _ends(cell)
            away.append((max(low - task.chance, task.chance - high), abs(cell.value - task.chance), low, high, cell))
    if not away:
        return ""
    alarm = max(each[0] for each in away) > MARGIN
    _, distance, low, high, cell = max(away, key=itemgetter(0 if alarm else 1))
    if distance <= MARGIN:
        verdict = f"within the margin of {MARGIN}"
    elif alarm:
        verdict = f"NOT within the margin of {MARGIN}, nor is any of its interval ({low:.3f} – {high:.3f})"
    else:
        verdict = (
            f"which is no sign of a leak: {len(cell.outcomes):,} queries cannot tell it from the margin of {MARGIN}, "
            f"which its interval ({low:.3f} – {high:.3f}) reaches"
        )
    return (
        f"The farthest from chance is {CONTROL_NAMES[cell.control or ''][0]} on {cell.task}: {cell.value:.3f}, "
        f"{distance:.3f} away, {verdict}."
    )


def _ends(cell: Cell) -> tuple[float, float]:
    """Of the interval; where all queries are alike, resampling gives a single point, and the rule of three more."""
    low, high = cell.score.interval or (cell.value, cell.value)
    more = 3 / len(cell.outcomes) if low == high else 0.0
    return max(0.0, low - more), min(1.0, high + more)


# -- training ----------------------------------------------------------------------------------------------------------


def _curves(rows: Sequence[Mapping[str, float | None]]) -> list[dict[str, Any]]:
    """Charts of the training log, each with its legend."""
    curves = []
    for heading, prefix, unit in (
        ("Loss", "loss", "nats per supervised token, running mean"),
        ("Gates", "gate/", "tanh of each gate: how far it is open"),
        ("Learning rate", "learning_rate", "by group of parameters"),
    ):
        names = sorted({key for row in rows for key in row if key.startswith(prefix)})
        lines = []
        for place, name in enumerate(names):
            points = [(float(row["step"] or 0), float(row[name] or 0)) for row in rows if row.get(name) is not None]
            if not points:
                continue
            x, y = map(list, zip(*_thinned(points), strict=True))
            y = smooth(y, max(1, len(y) // 100)) if prefix == "loss" else y
            lines.append(Series(name.removeprefix(prefix).lstrip("/") or "total", x, y, place % COLOURS))
        if lines:
            chart = line_chart(lines, title=heading, x_label="step", size=(440, 240))
            legend = [(line.name, line.colour) for line in lines]
            curves.append({"heading": heading, "unit": unit, "chart": Markup(chart), "legend": legend})
    return curves


def _thinned(points: list[tuple[float, float]], most: int = 600) -> list[tuple[float, float]]:
    """At most about `most` points: means of runs of neighbours."""
    run = math.ceil(len(points) / most)
    parts = (points[start : start + run] for start in range(0, len(points), run))
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


# -- instructions ------------------------------------------------------------------------------------------------------


def _instructions(runs: comparison.Runs, items: Sequence[Item]) -> dict[str, Any]:
    """What the template draws of models side by side."""
    comparison.check_alike(runs)
    first = next(iter(runs.values()))
    tables = [
        ("accuracy of ranked answers", comparison.accuracy_rows(runs), "chance"),
        (f"under controls, {comparison.EVERY_KIND}", comparison.control_rows(runs), ""),
        (f"free answers, {comparison.EVERY_KIND}", comparison.free_rows(runs), " "),
    ]
    return {
        "shots": first.shots,
        "items": len(items),
        "charts": [(kind, Markup(chart)) for kind, chart in comparison.charts(runs)],
        "legend": comparison.legend(runs),
        "tables": [table for table in tables if table[1]],
        "controls": [comparison.CONTROL_NAMES[name] for name in first.controls],
        "examples": comparison.examples(runs, items),
    }


def _data_uri(data: bytes) -> str:
    picture = thumbnail(data)
    kind = next(kind for start, kind in SHOWN.items() if picture.startswith(start))
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


# -- provenance --------------------------------------------------------------------------------------------------------


def _flat(mapping: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    """Nested mappings as rows of (label, text)."""
    rows = []
    for key, value in mapping.items():
        label = f"{before}{key}".replace("_", " ")
        rows += _flat(value, f"{label} · ") if isinstance(value, Mapping) else [(label, _text(value))]
    return rows


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


def _facts(results: Results, facts: Mapping[str, Any]) -> tuple[list[tuple[str, str]], list[tuple[str, Any]]]:
    """Rows of the provenance table, and what is folded away below it: every fact that is a mapping of its own."""
    known = {
        "evaluation seeds": ", ".join(f"{name} {seed}" for name, seed in results.seed.items()),
        **{name: value for name, value in results.facts.items() if name != "commit"},
        "commit": results.facts.get("commit") or "not a git checkout",
        **facts,
    }
    rows = [(name.replace("_", " "), _text(value)) for name, value in known.items() if not isinstance(value, Mapping)]
    return rows, [(name, _flat(value)) for name, value in known.items() if isinstance(value, Mapping)]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
