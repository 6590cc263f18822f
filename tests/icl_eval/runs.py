"""Result folders as `flamingo-eval` writes them, made up for tests of what reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from icl_eval.metrics import METRICS

VERSIONS = {"python": "3.11.7", "flamingo-icl": "0.1.0", "torch": "2.8.0"}


def lines_of(
    predictions: Sequence[Any],
    targets: Sequence[Any],
    *,
    task: str = "cats",
    shots: int = 1,
    control: str | None = None,
    **fields: Sequence[Any],
) -> list[dict[str, Any]]:
    """Lines of a cell; `fields` are further ones, a value a query."""
    return [
        {
            "task": task,
            "shots": shots,
            "control": control,
            "query_id": f"{task}/{number:06d}",
            "query": f"photo-{number}",
            "demonstrations": [f"photo-{number + each + 1}" for each in range(shots)],
            "prompt": f"{number:08x}{shots:08x}",
            "prediction": prediction,
            "target": target,
            **{name: values[number] for name, values in fields.items()},
        }
        for number, (prediction, target) in enumerate(zip(predictions, targets, strict=True))
    ]


def write_run(
    folder: Path,
    lines: Sequence[Mapping[str, Any]],
    *,
    metric: str | Mapping[str, str] = "accuracy",
    facts: Mapping[str, Any] | None = None,
    tasks: Mapping[str, Mapping[str, Any]] | None = None,
    **more: Any,
) -> Path:
    """Write a folder of results whose figures are those of the lines; `tasks`: further fields of tasks by name."""
    folder.mkdir(parents=True)
    cells: dict[tuple[str, int, str | None], list[Mapping[str, Any]]] = {}
    for line in lines:
        cells.setdefault((line["task"], line["shots"], line["control"]), []).append(line)
    metrics = {key[0]: metric if isinstance(metric, str) else metric[key[0]] for key in cells}
    content = {
        "schema": 2,
        "tie_nats": 1e-4,
        "facts": {"versions": VERSIONS, "commit": "c0ffee", **(facts or {})},
        "seeds": dict.fromkeys(metrics, 0),
        "seconds": dict.fromkeys(metrics, 1.5),
        "tasks": {
            name: {"name": name, "version": 1, "metric": kind, "split": "test", **(tasks or {}).get(name, {})}
            for name, kind in metrics.items()
        },
        "cells": [_cell(key, several, metrics[key[0]]) for key, several in cells.items()],
        "predictions": "predictions.jsonl",
        **more,
    }
    (folder / "results.json").write_text(json.dumps(content))
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _cell(key: tuple[str, int, str | None], lines: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    score = METRICS[metric].score(
        [line["prediction"] for line in lines],
        [line["target"] for line in lines],
        groups=[line["group"] for line in lines] if "group" in lines[0] else None,
    )
    return {**dict(zip(("task", "shots", "control"), key, strict=True)), **score.as_dict(), "ties": 0}
