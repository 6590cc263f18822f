"""What a run recorded, read back: from `metrics.jsonl`, or from the files that W&B leaves where it is offline.

W&B's files are one folder for each time that a run was started; they are joined by step: what a later start computed
again takes the place of what an earlier one had.
"""

from __future__ import annotations

import base64
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flamingo.errors import FlamingoError
from train.metrics import AXES, defined
from train.tracking import GENERATIONS_FILE, METRICS_FILE, read_rows

Row = dict[str, float]


@dataclass(frozen=True)
class Difference:
    """A metric that a later start computed again and found to be another."""

    step: int
    metric: str
    first: float
    second: float


@dataclass
class Run:
    """What a run recorded.

    Attributes:
        source: the file or folder that it was read from.
        rows: one a step, ascending, each with `step`; numbers that are not finite are left out.
        generations: columns of `train.tracking.Generation`, and `step`; pictures are data URIs, None where lost.
        starts: how often the run was started or resumed, as far as `source` knows.
        repeated: steps that were computed more than once.
        differences: of metrics that should have repeated themselves and did not.
    """

    source: Path
    rows: list[Row]
    generations: list[dict[str, Any]] = field(default_factory=list)
    starts: int = 1
    repeated: list[int] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """All columns but `step`, in natural order."""
        return sorted({name for row in self.rows for name in row} - {"step"}, key=_natural)


def read_run(path: str | Path) -> Run:
    """Read a run.

    Args:
        path: a `metrics.jsonl`, a folder with one, a `.wandb` file, or a folder with W&B's files (`wandb`, or one of
            the folders in it).

    Raises:
        FlamingoError: where nothing of this kind is there.
    """
    path = Path(path)
    metrics = path / METRICS_FILE if path.is_dir() else path
    if metrics.is_file() and metrics.suffix == ".jsonl":
        return _read_metrics(metrics)
    if path.is_file():
        found = [path]
    else:
        patterns = ("*.wandb", "*run-*/*.wandb", "wandb/*run-*/*.wandb")
        found = sorted({each.resolve() for pattern in patterns for each in path.glob(pattern)}, key=_started)
    if not found:
        raise FlamingoError(f"{path}: expected {METRICS_FILE}, a .wandb file, or a folder that holds one; found none")
    return _joined(path, [_read_wandb(each) for each in found])


def _read_metrics(path: Path) -> Run:
    run = Run(path, _by_step(read_rows(path)))
    for row in read_rows(path.with_name(GENERATIONS_FILE)):
        pictures = {key: _data_uri(path.parent / row[key]) for key in ("demonstrations", "picture") if row.get(key)}
        run.generations.append(row | pictures)
    return run


def _by_step(rows: Iterable[dict[str, Any]]) -> list[Row]:
    """One row a step, ascending, of finite numbers."""
    joined: dict[int, Row] = {}
    for row in rows:
        numbers = {
            key: float(value)
            for key, value in row.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        }
        step = int(row["step"])
        joined[step] = joined.get(step, {}) | numbers | {"step": step}
    return [joined[step] for step in sorted(joined)]


# -- W&B's files -------------------------------------------------------------------------------------------------------


def _started(path: Path) -> tuple[str, str]:
    """What orders the files of several starts: the time in their folder's name."""
    found = re.search(r"run-(\d{8}_\d{6})", path.parent.name)
    return found.group(1) if found else "", path.name


def inspect(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a `.wandb` file, as W&B's own reader prints them; a file that a kill cut short ends early.

    Raises:
        FlamingoError: where there is not one.
    """
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None and reader.stderr is not None
        empty = True
        for line in reader.stdout:
            if line.startswith("{"):
                empty = False
                yield json.loads(line)
        said = reader.stderr.read().strip().splitlines()
    if empty:
        raise FlamingoError(f"{path}: expected W&B's record of a run: {said[-1] if said else 'it is empty'}")


def _read_wandb(path: Path) -> Run:
    """One start of a run."""
    rows, tables, places = [], {}, {}
    for record in inspect(path):
        if record["type"] == "artifact":
            artifact = record["artifact"]
            contents = artifact.get("manifest", {}).get("contents", [])
            places[artifact.get("client_id")] = {each["path"]: each.get("local_path", "") for each in contents}
        elif record["type"] == "history" and "step" in (item := record["history"]["item"]):
            rows.append({key: value for key, value in item.items() if not key.startswith("_")})
            if address := item.get("generations.artifact_path"):
                tables[int(item["step"])] = address
    names = ("generations.", "gates/")  # tables and histograms: their parts are no metrics
    plain = [{key: value for key, value in row.items() if not key.startswith(names)} for row in rows]
    run = Run(path, _by_step(plain))
    for step, address in tables.items():
        client, _, name = address.partition("://")[2].partition("/")
        run.generations += _read_table(step, name, places.get(client, {}), path.parent.parent)
    return run


def _read_table(step: int, name: str, places: dict[str, str], folder: Path) -> list[dict[str, Any]]:
    """A table with its pictures, which W&B keeps aside until they are sent; [] where they are no longer there."""

    def found(name: str) -> Path:
        """Where a part lies; the run's folder may have been moved since."""
        place = Path(places.get(name, ""))
        return place if place.is_file() else folder / "artifacts" / "staging" / place.name

    try:
        table = json.loads(found(name).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return []

    def shown(value: Any) -> Any:
        return _data_uri(found(value["path"])) if isinstance(value, dict) and "path" in value else value

    columns = table["columns"]
    return [{"step": step} | {c: shown(v) for c, v in zip(columns, row, strict=True)} for row in table["data"]]


def _joined(source: Path, starts: Sequence[Run]) -> Run:
    """One run of its starts in order of time: each goes on from its first step, and replaces what was there after."""
    whole = Run(source, [], starts=len(starts))
    for start in starts:
        if not start.rows:
            continue
        first = start.rows[0]["step"]
        again = {row["step"]: row for row in start.rows}
        for row in (row for row in whole.rows if row["step"] in again):
            whole.repeated.append(int(row["step"]))
            whole.differences += _differences(row, again[row["step"]])
        whole.rows = [row for row in whole.rows if row["step"] < first] + start.rows
        whole.generations = [each for each in whole.generations if each["step"] < first] + start.generations
    return whole


def _differences(first: Row, second: Row) -> Iterator[Difference]:
    for name in sorted(first.keys() & second.keys()):
        metric = defined(name)
        if (name in AXES or (metric and metric.repeats)) and first[name] != second[name]:
            yield Difference(int(first["step"]), name, first[name], second[name])


def _data_uri(path: Path) -> str | None:
    """A PNG file, None where it is lost."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" if path.is_file() else None


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts block 10 after block 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
