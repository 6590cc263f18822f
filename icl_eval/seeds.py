"""The spread of scores over seeds of the draws: each seed's results in a folder of its own, and their means."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from flamingo.files import write_text
from icl_eval.metrics import over_seeds
from icl_eval.results import Results

FILE = "seeds.json"


def folder_of(out: str | Path, seed: int) -> Path:
    """Where the results of a seed are."""
    return Path(out) / f"seed-{seed}"


def across(runs: Mapping[int, Results]) -> dict[str, Any]:
    """Mean and standard deviation (n - 1) of every figure of every cell, as plain data.

    Args:
        runs: by seed, of the same tasks and cells.
    """
    first = next(iter(runs.values()))
    cells = []
    for place, cell in enumerate(first.cells):
        same = [results.cells[place] for results in runs.values()]
        figures = {}
        for name in cell.score.figures:
            mean, std = over_seeds([each.score.figures[name].value for each in same])
            figures[name] = {"mean": mean, "std": std}
        about = {"task": cell.task, "shots": cell.shots, "control": cell.control, "metric": cell.score.metric}
        cells.append({**about, "figures": figures})
    return {"seeds": list(runs), "folders": [folder_of("", seed).name for seed in runs], "cells": cells}


def write_seeds(out: str | Path, runs: Mapping[int, Results]) -> Path:
    """Write `seeds.json`; returns its path."""
    path = Path(out) / FILE
    write_text(path, json.dumps(across(runs), indent=1, ensure_ascii=False) + "\n")
    return path


def table(runs: Mapping[int, Results]) -> Table:
    """The headline of every cell: mean ± standard deviation over the seeds."""
    shown = Table(
        title=f"mean ± standard deviation over seeds {', '.join(map(str, runs))}",
        title_justify="left",
        title_style="bold",
        box=SIMPLE,
        pad_edge=False,
    )
    for heading in ("task", "shots", "control", "metric", "score"):
        shown.add_column(heading, justify="right" if heading == "score" else "left")
    for cell in across(runs)["cells"]:
        name, figure = next(iter(cell["figures"].items()))
        spread = "" if figure["std"] is None else f" ± {figure['std']:.3f}"
        shown.add_row(cell["task"], str(cell["shots"]), cell["control"] or "", name, f"{figure['mean']:.3f}{spread}")
    return shown
