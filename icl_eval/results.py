"""What an evaluation found: cells, each a number of the table, with all that is needed to make it again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flamingo.files import whole, write_text
from icl_eval.engine import TIE
from icl_eval.metrics import Score
from icl_eval.outcomes import Outcome
from icl_eval.saved import PREDICTIONS, RESULTS
from icl_eval.tasks import Task

SCHEMA = 2


@dataclass(frozen=True)
class Cell:
    """One number of the table: a task at some shots, plain or under a control.

    Attributes:
        task, shots, control: which.
        score: all figures of the task's metric.
        ties: queries whose best candidates were tied.
        outcomes: of all queries, in their order; in memory, or read from a file when they are asked for.
        zero_shot: how the prompts at 0 shots begin, as `Task.zero_shot`; None at others.
    """

    task: str
    shots: int
    control: str | None
    score: Score
    ties: int
    outcomes: Sequence[Outcome] = field(repr=False)
    zero_shot: str | None = None

    @property
    def value(self) -> float:
        """The metric's headline."""
        return self.score.value

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95 % interval; NaN where there is none."""
        return self.score.interval or (float("nan"), float("nan"))


@dataclass
class Results:
    """All cells of an evaluation and what is needed to make it again.

    Attributes:
        tasks: the tasks as they were run, by name.
        cells: in order of tasks, plain ones by shots, then controls.
        seed: of each task's draws.
        seconds: spent on each task since the last start.
        facts: versions, commit, machine, and what the caller adds (model, recipe).
        diagnostics: by task: what its demonstrations contribute; see `icl_eval.verdicts`.
        data: the folder of data sets that was given, for whoever shows the pictures; see `load_pool`.
    """

    tasks: dict[str, Task]
    cells: list[Cell]
    seed: dict[str, int]
    seconds: dict[str, float]
    facts: dict[str, Any] = field(default_factory=dict)
    diagnostics: dict[str, dict[str, Any]] = field(default_factory=dict)
    data: str | Path | None = None

    def cell(self, task: str, shots: int, control: str | None = None) -> Cell:
        """The cell of `task` at `shots` under `control`.

        Raises:
            KeyError: it was not run.
        """
        for cell in self.cells:
            if (cell.task, cell.shots, cell.control) == (task, shots, control):
                return cell
        raise KeyError((task, shots, control))

    def as_dict(self) -> dict[str, Any]:
        """Everything but the single outcomes, as plain data: results.schema.json."""
        return {
            "schema": SCHEMA,
            "tie_nats": TIE,
            "facts": self.facts,
            "seeds": self.seed,
            "seconds": self.seconds,
            "tasks": {name: task.definition() for name, task in self.tasks.items()},
            "cells": [_cell_as_dict(cell) for cell in self.cells],
            **({"diagnostics": self.diagnostics} if self.diagnostics else {}),
            "predictions": PREDICTIONS,
        }

    def save(self, folder: str | Path) -> Path:
        """Write `results.json` and `predictions.jsonl`, a line for each outcome; returns the former's path."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with whole(folder / PREDICTIONS) as unfinished, unfinished.open("w", encoding="utf-8") as lines:
            for cell in self.cells:
                about = {"task": cell.task, "shots": cell.shots, "control": cell.control}
                values = cell.score.per_item
                for place, outcome in enumerate(cell.outcomes):
                    value = None if values is None else float(values[place])
                    line = {**about, **_outcome_as_dict(outcome), "value": value}
                    lines.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")
        path = folder / RESULTS
        write_text(path, json.dumps(self.as_dict(), indent=1, ensure_ascii=False) + "\n")
        return path


def identity_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """What is evaluated, of what `Results.as_dict` gives: equal for evaluations that must come to the same.

    What says most of how two differ stands first.
    """
    facts = {name: fact for name, fact in content.get("facts", {}).items() if name not in ("commit", "machine")}
    tasks = {name: {**task, "file": ""} for name, task in content.get("tasks", {}).items()}
    cells = [[cell.get(key) for key in ("task", "shots", "control")] for cell in content.get("cells", ())]
    return {"schema": content.get("schema"), "tasks": tasks, "facts": facts, "cells": cells}


def _cell_as_dict(cell: Cell) -> dict[str, Any]:
    about: dict[str, Any] = {"task": cell.task, "shots": cell.shots, "control": cell.control}
    if cell.zero_shot is not None:
        about["zero_shot"] = cell.zero_shot
    return {**about, **cell.score.as_dict(), "ties": cell.ties}


def _outcome_as_dict(outcome: Outcome) -> dict[str, Any]:
    """Without what it does not have; JSON knows no −inf."""
    left_out = {name for name in ("group", "generated") if getattr(outcome, name) is None}
    if not outcome.candidates:
        left_out |= {"candidates", "scores", "tied"}
    scores = [score if math.isfinite(score) else None for score in outcome.scores]
    return {key: value for key, value in (vars(outcome) | {"scores": scores}).items() if key not in left_out}


def outcome_of(line: Mapping[str, Any]) -> Outcome:
    """From a line of `predictions.jsonl`."""
    scores = [-math.inf if score is None else score for score in line.get("scores", ())]
    return Outcome.of({**line, "scores": scores})


def summary(results: Results) -> dict[str, Any]:
    """The parts `tasks`, `controls` and `chance` of the quickstart's summary.json: scores by task and shots."""
    tasks: dict[str, dict[str, float]] = {}
    controls: dict[str, dict[str, float]] = {}
    for cell in results.cells:
        if cell.control is None:
            tasks.setdefault(cell.task, {})[str(cell.shots)] = cell.value
        else:
            controls.setdefault(cell.control, {})[cell.task] = cell.value
    return {"tasks": tasks, "controls": controls, "chance": {name: task.chance for name, task in results.tasks.items()}}
