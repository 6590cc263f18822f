"""One self-contained HTML page about a run: scores, controls, training curves, example prompts, data, provenance.

Everything is inline (style, SVG, pictures as data URIs), so that the page can be kept, mailed and opened anywhere.
"""

from __future__ import annotations

import base64
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from data_shards.page import template
from flamingo.files import write_text
from icl_eval import comparison
from icl_eval.charts import COLOURS, Interval, Series, interval_chart, line_chart, smooth
from icl_eval.diagnostics import CONTROL_SHOTS, CONTROLS
from icl_eval.evaluation import Cell, Outcome, Results
from icl_eval.instructions import InstructionResults, Item
from icl_eval.sources import load_pool

MARGIN = 0.05  # how far from chance a control may fall
EXAMPLES = 12
MOST_PICTURES = 6  # demonstrations of an example prompt
SUFFIXES = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"RIFF": "webp", b"GIF8": "gif"}
CONTROL_NAMES = {
    "gates_at_zero": ("gates at zero", "no picture reaches the language model"),
    "labels_permuted": ("labels permuted", "one random permutation of the names, identity included"),
    "images_swapped": ("pictures swapped", "the demonstrations' pictures are permuted over their places"),
    "random_query": ("random query", "the query's picture is one of a random way"),
}


@dataclass(frozen=True)
class Example:
    """A prompt as it is shown: demonstrations as (picture, label), the query, and the candidates with their shares."""

    about: str
    right: bool
    demonstrations: tuple[tuple[str, str], ...]
    query: str
    answer: str
    prediction: str
    candidates: tuple[tuple[str, float], ...]


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
        FlamingoError: where `instructions` are not of the same items.
    """
    shots = sorted({cell.shots for cell in results.cells if cell.control is None})
    rows = [row for row in training_log if row.get("step") is not None]
    rows_of_facts, folded = _facts(results, facts or {})
    page = template(__file__, "report.html").render(
        title=title,
        headline=_headline(results),
        tiles=_tiles(results),
        shots=shots,
        table=[_table_row(results, name, shots) for name in results.tasks],
        ties=sum(cell.ties for cell in results.cells),
        accuracy=_accuracy_chart(results),
        legend=[(name, place % COLOURS) for place, name in enumerate(_ladders(results))],
        controls=_control_charts(results),
        control_names=[CONTROL_NAMES[control] for control in _controls(results)],
        control_shots=CONTROL_SHOTS,
        worst_control=_worst_control(results),
        margin=MARGIN,
        curves=_curves(rows),
        examples=examples(results),
        instructions=_instructions(instructions, items) if instructions else None,
        account=_flat(account or {}),
        timings=[(stage, _duration(seconds)) for stage, seconds in (timings or {}).items()],
        total=_duration(sum((timings or results.seconds).values())),
        facts=rows_of_facts,
        folded=folded,
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


def _controls(results: Results) -> list[str]:
    return [name for name in CONTROLS if any(cell.control == name for cell in results.cells)]


def _headline(results: Results) -> str:
    ladders = _ladders(results)
    if not ladders:
        return ""
    name = "glyphs_5way" if "glyphs_5way" in ladders else ladders[0]
    cells, ways = _plain(results, name), results.tasks[name].ways
    once, most = next((cell for cell in cells if cell.shots), cells[-1]), cells[-1]
    seen = "once" if once.shots == 1 else f"{once.shots} times"
    return (
        f"Shown each of {ways} classes it had never seen {seen}, under invented names, the model named a new picture "
        f"right in {once.score:.1%} of {len(once.outcomes):,} episodes; after {most.shots} pictures of each, in "
        f"{most.score:.1%}. Guessing gives {results.tasks[name].chance:.0%}."
    )


def _tiles(results: Results) -> list[dict[str, str]]:
    tiles = []
    for name, task in results.tasks.items():
        cells = _plain(results, name)
        cell = next((cell for cell in cells if cell.shots == CONTROL_SHOTS), cells[-1])
        low, high = cell.interval
        shots = "no demonstrations" if cell.shots == 0 else f"{cell.shots} per class"
        tiles.append(
            {
                "task": name,
                "score": f"{100 * cell.score:.1f}",
                "about": f"{task.ways} ways, {shots}",
                "interval": f"{100 * low:.1f} – {100 * high:.1f}, chance {100 * task.chance:.3g}",
            }
        )
    return tiles


def _table_row(results: Results, name: str, shots: Sequence[int]) -> dict[str, Any]:
    cells = {cell.shots: cell for cell in _plain(results, name)}
    shown = [
        None if n not in cells else (f"{cells[n].score:.3f}", "{:.3f} – {:.3f}".format(*cells[n].interval))
        for n in shots
    ]
    task = results.tasks[name]
    return {"task": name, "source": f"{task.source}, {task.split}", "cells": shown, "chance": f"{task.chance:.3f}"}


def _accuracy_chart(results: Results) -> Markup:
    ladders = _ladders(results)
    if not ladders:
        return Markup()
    shots = sorted({cell.shots for name in ladders for cell in _plain(results, name)})
    lines = []
    for place, name in enumerate(ladders):
        cells = _plain(results, name)
        x = [float(shots.index(cell.shots)) for cell in cells]
        lows, highs = zip(*(cell.interval for cell in cells), strict=True)
        lines.append(Series(name, x, [cell.score for cell in cells], place % COLOURS, lows, highs, dots=True))
    ways = {results.tasks[name].ways: results.tasks[name].chance for name in ladders}
    return Markup(
        line_chart(
            lines,
            title="accuracy against shots per way",
            x_label="demonstrations per class",
            y_range=(0.0, 1.0),
            x_names=[str(count) for count in shots],
            references=[(f"chance, {count} ways", chance) for count, chance in sorted(ways.items())],
            size=(760, 380),
        )
    )


def _control_charts(results: Results) -> list[tuple[str, Markup]]:
    charts = []
    for place, name in enumerate(_ladders(results)):
        found = {cell.control: cell for cell in results.cells if cell.task == name and cell.control}
        if not found:
            continue
        plain = next((cell for cell in _plain(results, name) if cell.shots == CONTROL_SHOTS), None)
        rows = [] if plain is None else [Interval("as it is", plain.score, *plain.interval, strong=True)]
        rows += [Interval(CONTROL_NAMES[c][0], found[c].score, *found[c].interval) for c in CONTROLS if c in found]
        chart = interval_chart(
            rows, title=f"controls of {name}", chance=results.tasks[name].chance, margin=MARGIN, colour=place % COLOURS
        )
        charts.append((name, Markup(chart)))
    return charts


def _worst_control(results: Results) -> str:
    away = [
        (abs(cell.score - results.tasks[cell.task].chance), cell) for cell in results.cells if cell.control is not None
    ]
    if not away:
        return ""
    distance, cell = max(away, key=lambda each: each[0])
    verdict = "within" if distance <= MARGIN else "NOT within"
    return (
        f"The farthest from chance is {CONTROL_NAMES[cell.control or ''][0]} on {cell.task}: {cell.score:.3f}, "
        f"{distance:.3f} away, {verdict} the margin of {MARGIN}."
    )


# -- training ----------------------------------------------------------------------------------------------------------


def _curves(rows: Sequence[Mapping[str, float | None]]) -> list[dict[str, Any]]:
    """Charts of the training log, each with its legend."""
    curves = []
    for heading, prefix, unit in (
        ("Loss", "loss", "nats per supervised token"),
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


# -- examples ----------------------------------------------------------------------------------------------------------


def examples(results: Results, count: int = EXAMPLES) -> list[Example]:
    """Prompts to look at: half of them wrong where there are as many, taken from all tasks in turn."""
    wrong: dict[str, list[Outcome]] = defaultdict(list)
    right: dict[str, list[Outcome]] = defaultdict(list)
    for name in results.tasks:
        for outcome in _example_cell(results, name).outcomes:
            (right if outcome.prediction == outcome.target else wrong)[name].append(outcome)
    chosen = list(_in_turn(wrong))[: count // 2]
    chosen += list(_in_turn(right))[: count - len(chosen)]
    pools = {name: load_pool(results.tasks[name]) for name in {name for name, _ in chosen}}
    places = {name: {item.id: index for index, item in enumerate(pool.items)} for name, pool in pools.items()}

    def pictures(name: str, ids: Sequence[str]) -> list[str]:
        return [_data_uri(image.data) for image in pools[name].images([places[name][each] for each in ids])]

    return [_example(results, name, o, pictures(name, [*o.demonstrations, o.query])) for name, o in chosen]


def _example_cell(results: Results, task: str) -> Cell:
    ways = results.tasks[task].ways
    short = [cell for cell in _plain(results, task) if cell.shots * ways <= MOST_PICTURES]
    return max(short or _plain(results, task)[:1], key=lambda cell: cell.shots)


def _in_turn(by_task: Mapping[str, list[Outcome]]) -> Iterator[tuple[str, Outcome]]:
    for place in range(max((len(each) for each in by_task.values()), default=0)):
        yield from ((name, each[place]) for name, each in by_task.items() if place < len(each))


def _example(results: Results, task: str, outcome: Outcome, pictures: list[str]) -> Example:
    shots = len(outcome.demonstrations) // results.tasks[task].ways
    scores = np.array(outcome.scores)
    shares = np.exp(scores - scores.max())
    shares /= shares.sum()
    best = sorted(range(len(shares)), key=lambda place: -shares[place])
    order = sorted({*best[:5], outcome.target}, key=best.index)
    return Example(
        about=f"{outcome.query_id}, {f'{shots} per class' if shots else 'no demonstrations'}",
        right=outcome.prediction == outcome.target,
        demonstrations=tuple(zip(pictures[:-1], outcome.labels, strict=True)),
        query=pictures[-1],
        answer=outcome.candidates[outcome.target],
        prediction=outcome.candidates[outcome.prediction],
        candidates=tuple((outcome.candidates[place], float(shares[place])) for place in order),
    )


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
        "uri": _data_uri,
    }


def _data_uri(data: bytes) -> str:
    suffix = next((suffix for start, suffix in SUFFIXES.items() if data.startswith(start)), "png")
    return f"data:image/{suffix};base64,{base64.b64encode(data).decode()}"


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
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {seconds % 60:.0f} s"
