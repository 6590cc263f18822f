"""Few-shot evaluation of one model on some tasks: episodes → prompts → scores → results."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import distributed

from flamingo.errors import FlamingoError
from flamingo.files import whole, write_text
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.processing import FlamingoProcessor
from icl_eval.demonstrations import Episode, check_shots, draw_episode
from icl_eval.diagnostics import CONTROL_SHOTS, CONTROLS, Prompt, plain, under_control
from icl_eval.engine import TIE, Chunk, Engine, Ladder, Query
from icl_eval.metrics import METRICS, bootstrap_interval
from icl_eval.sources import Pool, load_pool
from icl_eval.tasks import HELD_OUT, Task, load_task

SCHEMA = 1
PACKAGES = ("flamingo-icl", "torch", "transformers", "tokenizers", "numpy", "pillow")

T = TypeVar("T")
Progress = Callable[[str, int, int], None]
"""Called with a task's name, and how many of its queries are done and there are (all shots and controls)."""


@dataclass(frozen=True)
class Outcome:
    """What a model was asked in one query of a cell, and what it answered.

    Attributes:
        query_id: names the query within its task; the same for all shots and controls.
        query: id of the picture that is asked about.
        demonstrations: ids of the demonstrations' pictures, in order; `labels`: their labels.
        candidates: the labels to choose among; `scores`: the log-likelihood of each, in nats.
        target, prediction: indices into `candidates`.
        tied: whether the two best scores are at most `TIE` apart; then the first of the best is the prediction.
        prompt: SHA-256 of the rendered prompt and of the ids of its pictures, 16 hexadecimal digits.
    """

    query_id: str
    query: str
    demonstrations: tuple[str, ...]
    labels: tuple[str, ...]
    candidates: tuple[str, ...]
    scores: tuple[float, ...]
    target: int
    prediction: int
    tied: bool
    prompt: str


@dataclass(frozen=True)
class Cell:
    """One number of the table: a task at some shots per way, plain or under a control."""

    task: str
    shots: int
    control: str | None
    score: float
    interval: tuple[float, float]
    ties: int
    outcomes: tuple[Outcome, ...] = field(repr=False)


@dataclass
class Results:
    """All cells of an evaluation and what is needed to make it again.

    Attributes:
        tasks: the tasks as they were run, by name.
        cells: in order of tasks, plain ones by shots, then controls.
        seed: of each task's draws.
        seconds: spent on each task.
        facts: versions, commit, machine, and what the caller adds (model, recipe).
    """

    tasks: dict[str, Task]
    cells: list[Cell]
    seed: dict[str, int]
    seconds: dict[str, float]
    facts: dict[str, Any] = field(default_factory=dict)

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
        """Everything but the single outcomes, as plain data."""
        cells = [
            {
                "task": cell.task,
                "shots": cell.shots,
                "control": cell.control,
                self.tasks[cell.task].metric: cell.score,
                "interval_95": list(cell.interval),
                "episodes": len(cell.outcomes),
                "ties": cell.ties,
            }
            for cell in self.cells
        ]
        return {
            "schema": SCHEMA,
            "tie_nats": TIE,
            "facts": self.facts,
            "seeds": self.seed,
            "seconds": self.seconds,
            "tasks": {name: task.definition() for name, task in self.tasks.items()},
            "cells": cells,
            "predictions": "predictions.jsonl",
        }

    def save(self, folder: str | Path) -> Path:
        """Write `results.json` and `predictions.jsonl`, a line for each outcome; returns the former's path."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with whole(folder / "predictions.jsonl") as unfinished, unfinished.open("w", encoding="utf-8") as lines:
            for cell in self.cells:
                about = {"task": cell.task, "shots": cell.shots, "control": cell.control}
                for outcome in cell.outcomes:
                    scores = [round(score, 6) for score in outcome.scores]
                    line = {**about, **vars(outcome), "scores": scores}
                    lines.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")
        path = folder / "results.json"
        write_text(path, json.dumps(self.as_dict(), indent=1, ensure_ascii=False) + "\n")
        return path


def summary(results: Results) -> dict[str, Any]:
    """The parts `tasks`, `controls` and `chance` of the quickstart's summary.json: scores by task and shots."""
    tasks: dict[str, dict[str, float]] = {}
    controls: dict[str, dict[str, float]] = {}
    for cell in results.cells:
        if cell.control is None:
            tasks.setdefault(cell.task, {})[str(cell.shots)] = cell.score
        else:
            controls.setdefault(cell.control, {})[cell.task] = cell.score
    return {"tasks": tasks, "controls": controls, "chance": {name: task.chance for name, task in results.tasks.items()}}


def evaluate(
    model: FlamingoForConditionalGeneration,
    processor: FlamingoProcessor,
    tasks: Sequence[str | Path | Task],
    *,
    shots: Sequence[int] | None = None,
    controls: Sequence[str] = (),
    episodes: int | None = None,
    batch_size: int = 128,
    seed: int | None = None,
    split: str | None = None,
    progress: Progress | None = None,
) -> Results:
    """Score `model` on `tasks`. Under torch.distributed the ranks share the queries, and each returns all results.

    Args:
        model: any Flamingo; it is put into evaluation mode for the time being.
        processor: the model's.
        tasks: names, paths of YAML files, or tasks.
        shots: instead of each task's own; a task that knows 0 shots only keeps to it.
        controls: of `icl_eval.diagnostics.CONTROLS`, at `CONTROL_SHOTS` per way, for tasks with demonstrations.
        episodes: queries of a cell, instead of each task's own number.
        batch_size: queries of a batch; scores do not depend on it beyond 1e-5.
        seed: of all draws, instead of each task's own.
        split: instead of each task's own held-out split ("validation", to choose designs without touching the test
            classes); a split that is not held out stays.
        progress: see `Progress`; called on every rank.

    Raises:
        FlamingoError: what is wrong with a task or an argument, in one line.
    """
    prepared = [
        _prepare(load_task(task) if not isinstance(task, Task) else task, shots, episodes, seed, split)
        for task in tasks
    ]
    if len({task.name for task in prepared}) < len(prepared):
        raise FlamingoError(f"tasks: expected different names, got {', '.join(task.name for task in prepared)}")
    for control in controls:
        if control not in CONTROLS:
            raise FlamingoError(f"controls: {control!r}, expected some of {', '.join(CONTROLS)}")
    pools = {task.name: _checked_pool(task, controls) for task in prepared}
    results = Results({task.name: task for task in prepared}, [], {task.name: task.seed for task in prepared}, {})
    results.facts = provenance()
    with evaluating(model):
        engine = Engine(model, processor, batch_size=batch_size)
        for task in prepared:
            start = time.perf_counter()
            results.cells += _run_task(engine, task, pools[task.name], controls, progress)
            results.seconds[task.name] = time.perf_counter() - start
    return results


def _prepare(
    task: Task, shots: Sequence[int] | None, episodes: int | None, seed: int | None, split: str | None
) -> Task:
    if shots is not None and any(task.shots):
        task = replace(task, shots=tuple(sorted(set(shots))))
    if episodes is not None:
        if episodes < 1:
            raise FlamingoError(f"episodes: {episodes}, expected at least 1")
        task = replace(task, episodes=episodes)
    if seed is not None:
        task = replace(task, seed=seed)
    if split is not None and task.split in HELD_OUT:
        task = replace(task, split=split)
    return task


def _checked_pool(task: Task, controls: Sequence[str]) -> Pool:
    pool = load_pool(task)
    for count in task.shots:
        check_shots(task, pool, count)
    if any(task.shots) and controls:
        check_shots(task, pool, CONTROL_SHOTS + ("random_query" in controls))
    return pool


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for the time being."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


# -- one task ----------------------------------------------------------------------------------------------------------

CellKey = tuple[int, str | None]


def _run_task(engine: Engine, task: Task, pool: Pool, controls: Sequence[str], progress: Progress | None) -> list[Cell]:
    episodes = [draw_episode(task, pool, task.seed, number) for number in share(task.episodes)]
    asked: list[CellKey] = [(count, None) for count in task.shots]
    if any(task.shots):
        asked += [(CONTROL_SHOTS, control) for control in controls]

    done = 0

    def advance(queries: int) -> None:
        nonlocal done
        done += queries
        if progress is not None:
            progress(task.name, done, len(episodes) * len(asked))

    found: dict[CellKey, list[Outcome]] = {}
    for keys in _sharing_demonstrations(asked):
        prompts = [[_prompt(episode, key, task.seed) for key in keys] for episode in episodes]
        ladders = [_ladder(task, episode, row) for episode, row in zip(episodes, prompts, strict=True)]
        shut = engine.model.gates_closed() if keys[0][1] == "gates_at_zero" else nullcontext()
        with shut:
            scores = engine.rank(pool, ladders, normalise=task.normalise, progress=advance)
        for column, key in enumerate(keys):
            rows = zip(episodes, prompts, scores, strict=True)
            found[key] = [_outcome(task, pool, episode, row[column], each[column]) for episode, row, each in rows]
    return [_cell(task, key, gathered(found[key], lambda outcome: outcome.query_id)) for key in asked]


def _sharing_demonstrations(asked: Sequence[CellKey]) -> list[list[CellKey]]:
    """Cells whose prompts are nested in one another, shots ascending; the others each alone."""
    nested = sorted((key for key in asked if key[1] in (None, "random_query")), key=lambda key: key[0])
    return [nested, *([key] for key in asked if key not in nested)]


def _prompt(episode: Episode, key: CellKey, seed: int) -> Prompt:
    count, control = key
    return plain(episode, count) if control is None else under_control(episode, count, control, seed)


def _ladder(task: Task, episode: Episode, prompts: Sequence[Prompt]) -> Ladder:
    longest = prompts[-1]  # they come in order of their shots
    shown = zip(longest.images, longest.labels, strict=True)
    answers = tuple(task.answer_text(name).removeprefix(task.prompt_text) for name in episode.names)
    return Ladder(
        tuple(Chunk((image, task.answer_text(label))) for image, label in shown),
        tuple(Query(len(prompt.images), Chunk((prompt.query, task.prompt_text)), answers) for prompt in prompts),
        episode.query_id,
    )


def _outcome(task: Task, pool: Pool, episode: Episode, prompt: Prompt, scores: np.ndarray) -> Outcome:
    prediction, tied = decide(scores)
    demonstrations = tuple(pool.items[index].id for index in prompt.images)
    query = pool.items[prompt.query].id
    rendered = "".join(f"<image>{task.answer_text(label)}<|endofchunk|>" for label in prompt.labels)
    shown = "\n".join((rendered + "<image>" + task.prompt_text, *demonstrations, query))
    return Outcome(
        query_id=episode.query_id,
        query=query,
        demonstrations=demonstrations,
        labels=prompt.labels,
        candidates=prompt.candidates,
        scores=tuple(scores.tolist()),
        target=episode.target,
        prediction=prediction,
        tied=tied,
        prompt=hashlib.sha256(shown.encode()).hexdigest()[:16],
    )


def _cell(task: Task, key: CellKey, outcomes: list[Outcome]) -> Cell:
    targets = [outcome.target for outcome in outcomes]
    values = METRICS[task.metric]([outcome.prediction for outcome in outcomes], targets)
    ties = sum(outcome.tied for outcome in outcomes)
    interval = bootstrap_interval(values, seed=task.seed)
    return Cell(task.name, key[0], key[1], float(values.mean()), interval, ties, tuple(outcomes))


# -- what every evaluation has in common -------------------------------------------------------------------------------


def decide(scores: np.ndarray) -> tuple[int, bool]:
    """The first of the candidates whose scores are at most `TIE` below the best, and whether there are several."""
    best = scores >= scores.max() - TIE
    return int(best.argmax()), bool(best.sum() > 1)


def share(count: int) -> range:
    """Which of `count` queries are this rank's."""
    rank, ranks = (distributed.get_rank(), distributed.get_world_size()) if _distributed() else (0, 1)
    return range(rank, count, ranks)


def gathered(own: list[T], place: Callable[[T], Any]) -> list[T]:
    """The outcomes of all ranks, in order of `place`."""
    if not _distributed():
        return own
    shares: list[list[T]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(shares, own)
    return sorted((outcome for share in shares for outcome in share), key=place)


def _distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()


# -- where results come from -------------------------------------------------------------------------------------------


def provenance() -> dict[str, Any]:
    """Versions of the packages, the commit of the code (None outside of a checkout), and the machine."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "versions": versions,
        "commit": _commit(),
        "machine": {"platform": platform.platform(), "threads": torch.get_num_threads()},
    }


def _commit() -> str | None:
    def git(*command: str) -> str:
        folder = str(Path(__file__).parent)
        done = subprocess.run(["git", "-C", folder, *command], capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None
