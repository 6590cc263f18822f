"""The command line: `flamingo-eval`, `python -m icl_eval`, `torchrun --nproc-per-node N -m icl_eval`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentError, ArgumentParser
from rich.box import SIMPLE
from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from safetensors import SafetensorError
from torch import distributed
from transformers.utils import logging as transformers_logging

from flamingo.configuration import FlamingoConfig
from flamingo.errors import FlamingoError, command_line, plain_options
from flamingo.files import read_object, sha256
from icl_eval import board, compare, listing
from icl_eval.diagnostics import CONTROL_SHOTS, CONTROLS, DIAGNOSTICS
from icl_eval.evaluation import evaluate, evaluate_answerer, prepared
from icl_eval.features import Features
from icl_eval.ledger import discard, rank_and_ranks
from icl_eval.report import write_report
from icl_eval.results import Cell, Results
from icl_eval.saved import RESULTS
from icl_eval.seeds import folder_of, write_seeds
from icl_eval.seeds import table as across_seeds
from icl_eval.show import write_prompts
from icl_eval.sources import Pool
from icl_eval.tasks import Task, available, load_task, needing_no_files
from icl_eval.weights_and_biases import record

WEIGHTS = ("*.safetensors", "*.bin")
REPORT = "report.html"
COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "tasks": listing.main,
    "compare": compare.main,
    "board": board.main,
}
"""What may stand in the place of options"""
PATIENCE = timedelta(days=7)
"""for which ranks wait for the slowest: half an hour, as torch has it, ends long ones; torchrun sees to the dead"""
_WIDE = Console(width=1000)
"""by which tables are measured"""


@dataclass
class Options:
    """Score a Flamingo on few-shot tasks.

    Attributes:
        model: folder of a saved Flamingo, or of any image-text-to-text model of transformers (one query at a time).
        out: folder for results.json, predictions.jsonl and report.html. A killed evaluation goes on from there.
        data: folder in which the folders of data sets are; empty: FLAMINGO_EVAL_DATA, or the present folder.
        shots: demonstrations, such as 0,1,4, in fast binding of each way; empty: each task's own.
        queries: of a cell; unset: each task's own number.
        batch_size: queries of a batch; scores do not depend on it.
        seed: of all draws; unset: each task's own.
        seeds: several, such as 0,1,2: results in a folder for each, and means and standard deviations over them.
        split: held-out split to use instead of each task's own: "validation" while designs are being chosen.
        zero_shot: what stands before a query at 0 shots, "honest" (nothing) or "text_only" (two demonstrations without
            pictures, as in the papers); unset: each task's own.
        controls: also run the controls, under which scores must fall to chance.
        diagnostics: run the controls and more, and say in words what the demonstrations contribute.
        show: write the exact prompts of so many queries of each task as pages, and evaluate nothing.
        cache: folder for features of pictures; empty: FLAMINGO_CACHE, or flamingo-icl among the user's caches.
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
    seeds: str = ""
    split: str | None = None
    zero_shot: str | None = None
    controls: bool = False
    diagnostics: bool = False
    show: int = 0
    cache: str = ""
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
    parser.add_argument(
        "--task",
        action="append",
        help="name or YAML file, may be repeated; without it the embedded ones, which need no data "
        f"({', '.join(needing_no_files())}); known: {known}",
    )
    try:
        parsed = parser.parse_args(plain_options(sys.argv[1:] if arguments is None else arguments))
    except ArgumentError as error:
        raise FlamingoError(str(error)) from None
    given = parsed.pop("task")
    names = needing_no_files() if given is None else [name for each in given for name in each.split(",") if name]
    return Options(**vars(parsed)), names


def parse_numbers(option: str, text: str) -> list[int] | None:
    """Text such as "0,1,4" → [0, 1, 4]; "" → None.

    Raises:
        FlamingoError: anything else; it names the option.
    """
    if not text:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise FlamingoError(f"{option} {text}: expected whole numbers from 0, such as 0,1,4")
    return [int(part) for part in parts]


def load(folder: str, device: str) -> tuple[Any, Any]:
    """The model and processor saved in `folder`.

    Raises:
        FlamingoError: it is no folder, has no weights, or is no Flamingo.
    """
    from flamingo import FlamingoForConditionalGeneration, FlamingoProcessor

    path, expected = Path(folder), "expected a folder with a saved Flamingo or another image-text-to-text model"
    if not path.is_dir():
        raise FlamingoError(f"--model {folder}: {expected}")
    if not (path / "config.json").is_file():
        raise FlamingoError(f"--model {folder}: no config.json, {expected}")
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


def table(results: Results, width: int = 80) -> Group:
    """Scores against shots, and under the controls where they were run, each with its 95 % interval.

    Shots that do not fit side by side in `width` columns of text come in several blocks.
    """
    shots = sorted({cell.shots for cell in results.cells if cell.control is None})
    parts: list[Table | str] = []
    for blocks in range(1, len(shots) + 1):
        parts = [_scores(results, list(map(int, some))) for some in np.array_split(shots, blocks)]
        if all(_WIDE.measure(part).maximum <= width for part in parts):
            break
    controlled = [cell for cell in results.cells if cell.control is not None]
    if controlled:
        under = _table(f"under controls, at {CONTROL_SHOTS} shots", ["task", "control"], ["score", "chance"])
        for cell in controlled:
            under.add_row(cell.task, cell.control, _shown(cell), _chance(results.tasks[cell.task]))
        parts.append(under)
    if any(cell.ties for cell in results.cells):
        parts.append("* tied queries went to the first label; results.json counts them")
    return Group(*(line for part in parts for line in (part, "")))


def _scores(results: Results, shots: Sequence[int]) -> Table:
    """A block of the table of scores: the tasks that have any at some shots."""
    plain = {(cell.task, cell.shots): cell for cell in results.cells if cell.control is None}
    shown = _table("score by shots", ["task"], [*map(str, shots), "chance"])
    for name, task in results.tasks.items():
        row = [plain.get((name, count)) for count in shots]
        if any(row):
            shown.add_row(f"{name}\n[dim]{task.metric}[/dim]", *map(_shown, row), _chance(task))
    return shown


def _table(title: str, texts: Sequence[str], numbers: Sequence[str]) -> Table:
    shown = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE, padding=0, show_edge=False)
    for heading in texts:
        shown.add_column(heading, overflow="fold")
    for heading in numbers:  # numbers are never cut: where room is short, names go onto further lines
        shown.add_column(heading, justify="right", no_wrap=True, style="dim" if heading == "chance" else None)
    return shown


def _chance(task: Task) -> str:
    return "" if task.chance is None else f"{task.chance:.3f}"


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    text = f"{cell.value:.3f}{'*' if cell.ties else ''}"
    if cell.score.interval is None:
        return text
    low, high = (f"{end:.3f}".removeprefix("0") for end in cell.score.interval)
    return f"{text}\n[dim]{low}–{high}[/dim]"


@contextmanager
def ranks() -> Iterator[int]:
    """Join the process group under torchrun; alone, nothing is set up. Yields the rank."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0
        return
    distributed.init_process_group("gloo", timeout=PATIENCE)
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
            bars.update(started[task], completed=done, total=total)  # of another seed more may have been there

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
    settings = _settings(options)
    seeds = _seeds(options)
    if options.data and not Path(options.data).is_dir():
        raise FlamingoError(f"--data {options.data}: no such folder")
    tasks = [load_task(name) for name in names]
    transformers_logging.disable_progress_bar()
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        transformers_logging.set_verbosity_error()
    with ranks() as rank, progress_bars(shown=rank == 0) as progress:
        if options.show < 0:
            raise FlamingoError(f"--show {options.show}: expected a number of queries")
        if options.show:
            if rank_and_ranks()[1] > 1:
                raise FlamingoError(f"--show {options.show}: expected a single process")
            model, processor = load(options.model, _device(options.device))
            print(*_shown_prompts(options, model, processor, tasks, settings), sep="\n")
            return
        scored = _scoring(options)
        facts = {"model": identity(options.model)}
        runs = {
            seed: scored(
                tasks,
                seed=seed,
                out=_out(options, seed),
                facts=facts,
                progress=progress,
                keep=len(seeds) > 1,
                **settings,
            )
            for seed in seeds
        }
        if len(seeds) > 1:  # until here a killed evaluation went on with the answers to all of them
            for seed in seeds:
                discard(_out(options, seed))
    if rank == 0:
        for seed, results in runs.items():
            _report(options, results, _out(options, seed))
        if len(runs) > 1:
            by_seed = {int(seed): results for seed, results in runs.items() if seed is not None}
            Console().print(across_seeds(by_seed))
            Console().print(str(write_seeds(options.out, by_seed)), soft_wrap=True)


def _scoring(options: Options) -> Callable[..., Results]:
    """What scores the model of a folder on tasks: `evaluate` for ours, `evaluate_answerer` for somebody else's."""
    device, config = _device(options.device), Path(options.model) / "config.json"
    if not config.is_file() or read_object(config).get("model_type") == FlamingoConfig.model_type:
        model, processor = load(options.model, device)
        return partial(evaluate, model, processor, batch_size=options.batch_size, cache=options.cache or None)
    from icl_eval.peers.image_text_to_text import ImageTextToText

    try:
        peer = ImageTextToText.from_pretrained(options.model)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        said = " ".join(str(error).split()).partition(". ")[0]  # names of all models that there are may follow
        raise FlamingoError(
            f"--model {options.model}: neither a Flamingo nor another model of transformers: {said}"
        ) from None
    peer.model.to(device)
    if (options.controls or options.diagnostics) and rank_and_ranks()[0] == 0:
        print("gates_at_zero is left out of the controls: this model has no gates", file=sys.stderr)

    def similarity(pool: Pool) -> Features:
        return Features(None, None, pool, options.cache or None, device)

    def scored(tasks: Sequence[Task], *, controls: Sequence[str], **how: Any) -> Results:
        controls = [name for name in controls if name != "gates_at_zero"]
        # It answers one query at a time: nothing is gained by asking more, and less is lost when it is killed.
        return evaluate_answerer(peer, tasks, controls=controls, similarity=similarity, window=1, **how)

    return scored


def _settings(options: Options) -> dict[str, Any]:
    """What `evaluate` and `write_prompts` run tasks with, of the options."""
    controls = DIAGNOSTICS if options.diagnostics else CONTROLS if options.controls else ()
    return {
        "shots": parse_numbers("--shots", options.shots),
        "controls": controls,
        "queries": options.queries,
        "split": options.split,
        "zero_shot": options.zero_shot,
        "data": options.data or None,
    }


def _seeds(options: Options) -> list[int | None]:
    seeds = parse_numbers("--seeds", options.seeds)
    if seeds is None:
        return [options.seed]
    if options.seed is not None or len(set(seeds)) < len(seeds):
        raise FlamingoError(f"--seeds {options.seeds}: expected different numbers, and no --seed beside them")
    return list(seeds)


def _out(options: Options, seed: int | None) -> Path:
    return folder_of(options.out, seed) if options.seeds and seed is not None else Path(options.out)


def _shown_prompts(
    options: Options, model: Any, processor: Any, tasks: Sequence[Task], settings: Mapping[str, Any]
) -> list[Path]:
    """Pages of the exact prompts, which are those of the first seed."""
    how = {name: each for name, each in settings.items() if name not in ("controls", "data")}
    where = {"controls": settings["controls"], "data": settings["data"], "cache": options.cache or None}
    run = [prepared(task, seed=_seeds(options)[0], **how) for task in tasks]
    return [page for task in run for page in write_prompts(model, processor, task, options.show, options.out, **where)]


def _report(options: Options, results: Results, out: Path) -> None:
    console = Console()
    console.print(table(results, console.width))
    for name, found in results.diagnostics.items():
        console.print(f"[bold]{name}[/bold] {found['verdict']}")
    page = write_report(out / REPORT, results=results)
    for path in (out / RESULTS, page):
        console.print(str(path), soft_wrap=True)
    if options.wandb and (run := record(results, out, project=options.wandb_project)):
        console.print(f"W&B run {run} of {options.wandb_project}, with files in {out / 'wandb'}", soft_wrap=True)


def _device(name: str) -> str:
    """The device of this rank.

    Raises:
        FlamingoError: there is none of this name.
    """
    found = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    if found == "cuda":
        found = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        said = " ".join(str(error).split())
        raise FlamingoError(f"--device {name}: expected cpu, cuda or auto ({said:.100})") from None
    return found
