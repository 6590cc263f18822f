"""The command line: `flamingo-eval`, `python -m icl_eval`, `torchrun --nproc-per-node N -m icl_eval`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, ArgumentParser
from rich.box import SIMPLE
from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from safetensors import SafetensorError
from torch import distributed
from transformers.utils import logging as transformers_logging

from flamingo.errors import FlamingoError, command_line, plain_options
from flamingo.files import sha256
from icl_eval import board, compare
from icl_eval.diagnostics import CONTROL_SHOTS, CONTROLS
from icl_eval.evaluation import RESULTS, Cell, Results, evaluate
from icl_eval.report import write_report
from icl_eval.tasks import available, load_task, needing_no_files
from icl_eval.weights_and_biases import record

WEIGHTS = ("*.safetensors", "*.bin")
REPORT = "report.html"
COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"compare": compare.main, "board": board.main}
"""What stands in the place of options, over folders of results"""


@dataclass
class Options:
    """Score a Flamingo on few-shot tasks.

    Attributes:
        model: folder of a saved Flamingo.
        out: folder for results.json, predictions.jsonl and report.html. A killed evaluation goes on from there.
        data: folder in which the folders of data sets are; empty: FLAMINGO_EVAL_DATA, or the present folder.
        shots: demonstrations, such as 0,1,4, in fast binding of each way; empty: each task's own.
        queries: of a cell; unset: each task's own number.
        batch_size: queries of a batch; scores do not depend on it.
        seed: of all draws; unset: each task's own.
        split: held-out split to use instead of each task's own: "validation" while designs are being chosen.
        controls: also run the controls, under which scores must fall to chance.
        wandb: keep scores, and answers with their pictures, in Weights & Biases too; offline without a key.
        wandb_project: where.
        device: "cpu", "cuda", or "auto".
    """

    model: str
    out: str
    data: str = ""
    shots: str = ""
    queries: int | None = None
    batch_size: int = 128
    seed: int | None = None
    split: str | None = None
    controls: bool = False
    wandb: bool = False
    wandb_project: str = "flamingo-eval"
    device: str = "auto"


def parse(arguments: list[str] | None = None) -> tuple[Options, list[str]]:
    """Options and task names of a command line.

    Raises:
        FlamingoError: an argument that is unknown, missing or malformed.
    """
    parser = ArgumentParser(
        prog="flamingo-eval",
        description="Score a Flamingo on few-shot tasks. Other commands, each with its own --help: "
        + ", ".join(COMMANDS),
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_class_arguments(Options)
    known = ", ".join(available())
    parser.add_argument("--task", action="append", help=f"name or YAML file, may be repeated; known: {known}")
    try:
        parsed = parser.parse_args(plain_options(sys.argv[1:] if arguments is None else arguments))
    except ArgumentError as error:
        raise FlamingoError(str(error)) from None
    names = [name for each in parsed.pop("task") or [] for name in each.split(",") if name]
    return Options(**vars(parsed)), names or needing_no_files()


def parse_shots(text: str) -> list[int] | None:
    """Text such as "0,1,4" → [0, 1, 4]; "" → None.

    Raises:
        FlamingoError: anything else.
    """
    if not text:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise FlamingoError(f"--shots {text}: expected whole numbers from 0, such as 0,1,4")
    return [int(part) for part in parts]


def load(folder: str, device: str) -> tuple[Any, Any]:
    """The model and processor saved in `folder`.

    Raises:
        FlamingoError: it is no folder, has no weights, or is no Flamingo.
    """
    from flamingo import FlamingoForConditionalGeneration, FlamingoProcessor

    path = Path(folder)
    if not path.is_dir():
        raise FlamingoError(f"--model {folder}: expected a folder with a saved Flamingo")
    if not (path / "config.json").is_file():
        raise FlamingoError(f"--model {folder}: no config.json, expected a folder with a saved Flamingo")
    if not any(next(path.glob(pattern), None) for pattern in WEIGHTS):
        raise FlamingoError(f"--model {folder}: no weights (model.safetensors) in this folder")
    try:
        model, found = FlamingoForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        processor = FlamingoProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise FlamingoError(f"--model {folder}: not loadable as a Flamingo: {error}") from None
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found[kind]:
            raise FlamingoError(f"--model {folder}: {kind.replace('_', ' ')} in its weights: {sorted(found[kind])[:3]}")
    return model.eval().to(device), processor


def identity(folder: str) -> dict[str, Any]:
    """What tells one saved model from another: SHA-256 of its weights, and the recipe where one is kept with it."""
    path = Path(folder)
    files = {file.name: sha256(file) for pattern in WEIGHTS for file in sorted(path.glob(pattern))}
    recipes = [place / name for place in (path, path.parent) for name in ("recipe.yaml", "recipe.json")]
    recipe = next((file for file in recipes if file.is_file()), None)
    return {
        "folder": str(path.resolve()),
        "sha256": files,
        "recipe": None if recipe is None else recipe.read_text(encoding="utf-8"),
    }


def table(results: Results) -> Group:
    """Accuracy against shots, and under the controls where they were run, each with its 95 % interval."""
    cells = {(cell.task, cell.shots, cell.control): cell for cell in results.cells}
    shots = sorted({cell.shots for cell in results.cells if cell.control is None})
    parts: list[Table | str] = [
        _table(results, "accuracy by shots per way", [(str(n), (n, None)) for n in shots], cells)
    ]
    controls = [name for name in CONTROLS if any(cell.control == name for cell in results.cells)]
    if controls:
        columns = [(name.replace("_", " "), (CONTROL_SHOTS, name)) for name in controls]
        parts.append(_table(results, f"controls at {CONTROL_SHOTS} shots: expected at chance", columns, cells))
    if any(cell.ties for cell in results.cells):
        parts.append("* tied queries went to the first label; results.json counts them")
    return Group(*parts)


def _table(
    results: Results,
    title: str,
    columns: Sequence[tuple[str, tuple[int, str | None]]],
    cells: dict[tuple[str, int, str | None], Cell],
) -> Table:
    shown = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE, pad_edge=False, collapse_padding=True
    )
    shown.add_column("task", no_wrap=True)
    for heading, _ in columns:
        shown.add_column(heading, justify="right")
    shown.add_column("chance", justify="right", style="dim")
    for name, task in results.tasks.items():
        row = [cells.get((name, *key)) for _, key in columns]
        if any(row):
            shown.add_row(name, *map(_shown, row), "" if task.chance is None else f"{task.chance:.3f}")
    return shown


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    low, high = (f"{end:.3f}".removeprefix("0") for end in cell.interval)
    return f"{cell.value:.3f}{'*' if cell.ties else ''}\n[dim]{low}–{high}[/dim]"


@contextmanager
def ranks() -> Iterator[int]:
    """Join the process group under torchrun; alone, nothing is set up. Yields the rank."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0
        return
    distributed.init_process_group("gloo")
    try:
        yield distributed.get_rank()
    finally:
        distributed.destroy_process_group()


@contextmanager
def progress_bars(shown: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each task, on stderr, from its first report on."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bars = Progress(*columns, console=Console(stderr=True))
    started: dict[str, TaskID] = {}

    def progress(task: str, done: int, total: int) -> None:
        if shown:
            bars.start()
            if task not in started:
                started[task] = bars.add_task(task, total=total)
            bars.update(started[task], completed=done)

    try:
        yield progress
    finally:
        if started:
            bars.stop()


@command_line
def main() -> None:
    """Entry point of `flamingo-eval`."""
    words = sys.argv[1:]
    if words and words[0] in COMMANDS:
        COMMANDS[words[0]](words[1:])
        return
    options, names = parse()
    tasks, shots = [load_task(name) for name in names], parse_shots(options.shots)
    transformers_logging.disable_progress_bar()
    with ranks() as rank, progress_bars(shown=rank == 0) as progress:
        model, processor = load(options.model, _device(options.device))
        results = evaluate(
            model,
            processor,
            tasks,
            shots=shots,
            controls=CONTROLS if options.controls else (),
            queries=options.queries,
            data=options.data or None,
            batch_size=options.batch_size,
            seed=options.seed,
            split=options.split,
            out=options.out,
            facts={"model": identity(options.model)},
            progress=progress,
        )
    if rank == 0:
        console = Console()
        console.print(table(results))
        for path in (Path(options.out, RESULTS), write_report(Path(options.out, REPORT), results=results)):
            console.print(str(path), soft_wrap=True)
        if options.wandb and (run := record(results, options.out, project=options.wandb_project)):
            console.print(f"W&B run {run} of {options.wandb_project}")


def _device(name: str) -> str:
    if name == "auto":
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    return name
