"""A run's curves as one local HTML page: `python -m train.curves RUN_DIR`; nobody needs an account to look.

It draws the plots of `train.metrics`, those of the W&B dashboard, from whatever `train.history` can read.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import ArgumentError, ArgumentParser
from markupsafe import Markup

from data_shards.page import template
from flamingo.errors import FlamingoError, command_line, plain_options
from flamingo.files import write_text
from icl_eval.charts import COLOURS, Series, line_chart, number
from train.history import Row, Run, read_run
from train.metrics import AXES, PLOTS, Plot, covers, defined

MOST_POINTS = 300
"""Of a line; where there are more, neighbours become their mean, with a band from the least to the largest of them."""
HEAT_COLUMNS, HEAT_ROWS = 60, 24
SUFFIXES = ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))


def write_page(run: Run, path: str | Path, title: str = "") -> Path:
    """Write the page of a run to `path`: everything is inline, so that it can be kept, mailed and opened anywhere."""
    sections: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for plot in PLOTS:
        sections[plot.section] += charts(run, plot)
    page = template(__file__, "curves.html").render(
        title=title or _name(run.source.resolve()),
        run=run,
        tiles=_tiles(run),
        sections={name: shown for name, shown in sections.items() if shown},
        queries=_by_query(run.generations),
        others=[name for name in run.names if name not in AXES and defined(name) is None],
    )
    path = Path(path)
    write_text(path, page)
    return path


def _name(source: Path) -> str:
    """What a run is called: its folder."""
    return source.parent.name if source.is_file() or source.name == "wandb" else source.name


def charts(run: Run, plot: Plot) -> list[dict[str, Any]]:
    """A plot as `title`, `unit`, and `svg` with its `legend`, or `heat`; [] where the run has nothing of it.

    Few-shot accuracy becomes a chart for each task.
    """
    about = {"unit": plot.unit}
    if plot.kind == "histogram":
        return [
            about | {"title": plot.title, "heat": heat, "axis": _x_label(run, plot.axis)[0]}
            for heat in (heat_map(run, pattern, plot.axis) for pattern in plot.metrics)
            if heat
        ]
    if plot.kind == "table":
        return []
    found = []
    for title, names in _split(plot, [name for name in run.names if plot.shows(name)]):
        label, per_unit = _x_label(run, plot.axis)
        lines = [_series(run, name, plot, place % COLOURS, per_unit) for place, name in enumerate(names)]
        svg = line_chart(lines, title=title, x_label=label, y_range=plot.bounds, size=(460, 260))
        legend = [(line.name, line.colour) for line in lines] if len(lines) > 1 or "/" in names[0] else []
        found.append(about | {"title": title, "svg": Markup(svg), "legend": legend})
    return found


def _split(plot: Plot, names: list[str]) -> list[tuple[str, list[str]]]:
    """(title, columns) of each chart of a plot."""
    if not names:
        return []
    if plot.metrics != ("fewshot/*",):
        return [(plot.title, names)]
    tasks: dict[str, list[str]] = defaultdict(list)
    for name in names:
        tasks[name.rpartition("/")[0]].append(name)
    return [(task.removeprefix("fewshot/"), members) for task, members in tasks.items()]


def _series(run: Run, name: str, plot: Plot, colour: int, per_unit: float) -> Series:
    """A line, thinned to what can be seen."""
    points = np.array([(x / per_unit, row[name]) for x, row in _along(run, plot.axis) if name in row])
    runs = np.array_split(points, min(len(points), MOST_POINTS))
    x, y = zip(*(part.mean(axis=0).tolist() for part in runs), strict=True)
    band = {"low": [], "high": []} if len(runs) == len(points) else {
        "low": [float(part[:, 1].min()) for part in runs],
        "high": [float(part[:, 1].max()) for part in runs],
    }  # fmt: skip
    return Series(_short(name, plot), x, y, colour, dots=len(runs) <= 30, **band)


def _short(name: str, plot: Plot) -> str:
    """What a column is called in its chart's legend: what its pattern leaves open."""
    if plot.metrics == ("fewshot/*",):
        return f"{name.rpartition('/')[2]} shots"
    pattern = next(pattern for pattern in plot.metrics if covers(pattern, name))
    return name.removeprefix(pattern[:-1]) if pattern.endswith("*") else "all" if len(plot.metrics) > 1 else name


def _along(run: Run, axis: str) -> Iterator[tuple[float, Row]]:
    """Rows with their place on an axis. A row without one stands where the one before it stands; steps if none has."""
    if not any(axis in row for row in run.rows):
        axis = "step"
    place = 0.0
    for row in run.rows:
        place = row.get(axis, place)
        yield place, row


def _x_label(run: Run, axis: str) -> tuple[str, float]:
    """Label of an axis, and how many of what it counts are one on it."""
    label = AXES[axis if any(axis in row for row in run.rows) else "step"]
    most = max((x for x, _ in _along(run, axis)), default=0.0)
    for size, name in SUFFIXES:
        if most >= 10 * size:
            return f"{label}, {name}", size
    return label, 1.0


def heat_map(run: Run, name: str, axis: str) -> dict[str, Any] | None:
    """How `gates/KIND` is spread over its blocks, along the run; from the single gates, which all sources have.

    Returns:
        `cells`: (column, row from below, share of the column's gates), `columns`, `rows`, and the ends of both axes as
        text: `left`, `right`, `low`, `high`. None where there are no gates.
    """
    before = f"gate/{name.removeprefix('gates/')}."
    places = [(x, [value for key, value in row.items() if key.startswith(before)]) for x, row in _along(run, axis)]
    places = [(x, values) for x, values in places if values]
    if not places:
        return None
    every = [value for _, values in places for value in values]
    low, high = min(every), max(*every, min(every) + 1e-3)
    columns = [part for part in np.array_split(np.arange(len(places)), min(len(places), HEAT_COLUMNS)) if len(part)]
    cells = []
    for column, part in enumerate(columns):
        counts, _ = np.histogram([value for place in part for value in places[place][1]], HEAT_ROWS, (low, high))
        cells += [(column, row, count / counts.sum()) for row, count in enumerate(counts.tolist()) if count]
    _, per_unit = _x_label(run, axis)
    ends = {"left": places[0][0] / per_unit, "right": places[-1][0] / per_unit, "low": low, "high": high}
    return {"cells": cells, "columns": len(columns), "rows": HEAT_ROWS} | {k: number(v) for k, v in ends.items()}


def _tiles(run: Run) -> list[tuple[str, str]]:
    """(what, figure) at the head of the page."""
    last = {name: row[name] for row in run.rows for name in row}
    tiles = [("steps", f"{int(last['step']):,}")] if "step" in last else []
    tiles += [(AXES[axis], f"{int(last[axis]):,}") for axis in ("samples", "tokens") if axis in last]
    tiles += [("loss", number(last["loss"]))] if "loss" in last else []
    best = [(value, name) for name, value in last.items() if covers("fewshot/*", name)]
    if best:
        value, name = max(best)
        task, _, shots = name.removeprefix("fewshot/").rpartition("/")
        tiles.append((f"{task}, {shots} shots", f"{100 * value:.1f} %"))
    speeds = sorted(row["tokens_per_second"] for row in run.rows if "tokens_per_second" in row)
    tiles += [("tokens a second, median", f"{speeds[len(speeds) // 2]:,.0f}")] if speeds else []
    tiles += [("steps skipped", f"{int(last['skipped_steps']):,}")] if "skipped_steps" in last else []
    return tiles


def _by_query(generations: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each query once, with `answers`: what the model said at every step."""
    queries: dict[str, dict[str, Any]] = {}
    for each in generations:
        query = queries.setdefault(f"{each['query']} {each['shots']}", each | {"answers": []})
        query["answers"].append((each["step"], each["generated"], each["right"]))
    return list(queries.values())


@command_line
def main() -> None:
    """Entry point of `python -m train.curves`."""
    parser = ArgumentParser(prog="python -m train.curves", description=__doc__, exit_on_error=False)
    parser.add_argument("run", help="folder of a run, its metrics.jsonl, or W&B's folder or file")
    parser.add_argument("--out", default="curves.html", help="HTML file to write")
    parser.add_argument("--title", default="", help="heading of the page")
    try:
        options = parser.parse_args(plain_options(sys.argv[1:]))
    except ArgumentError as error:
        raise FlamingoError(" ".join(str(error).split())) from error
    print(write_page(read_run(options.run), options.out, options.title))


if __name__ == "__main__":
    main()
