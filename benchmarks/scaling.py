"""How do tokens a second grow with processes, and what do checkpoints and tracking cost?

    python benchmarks/scaling.py [--quick] [--json FILE] [--processes 1,2,8]

The embedded recipe is trained by torchrun: on GPUs by NCCL, one a process, else by Gloo, one core a process. A run of
one process and one of more have the same micro-batches, so that the ratio of their tokens a second, over the number of
processes, is what sharing the work costs. Saves and rows of the log are timed where the training waits for them, and
related to the steps between two at the recipe's own frequency; what a save does meanwhile, in the background, shows in
the steps after it beside the others, and is added.

At the end training steps of one shape, with batches like those of `training_step.py`, beside the peak: of the GPU's
maker (MFU; the 3B shape), or on a CPU of one large matrix product (OPT-125M's).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _models import SHAPES, Place
from _record import publish
from training_step import TOKENS, Trainee
from transformers.utils import logging

from train.checkpoint import Checkpoints
from train.flops import OperationCounter, peak_flops
from train.parallel import processes
from train.pretrain import pretrain
from train.progress import Progress
from train.recipe import EMBEDDED, Recipe, from_command_line, packaged
from train.tracking import Tracker, read_rows

SAVE_EVERY = 20
"""Steps between two saves here; the costs are related to the recipe's own frequency."""
AFTER = 3
"""Steps after a save that are set beside the others."""
WARM_UP = 5
"""Steps that are not timed."""


class Clock:
    """Notes when calls begin and end."""

    def __init__(self) -> None:
        self.calls: dict[str, list[tuple[float, float]]] = {"save": [], "log": [], "step": []}

    def watch(self, kind: type, method: str, name: str) -> None:
        """Time a method of a class from here on."""
        original: Callable[..., Any] = getattr(kind, method)

        @wraps(original)
        def timed(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*args, **options)
            finally:
                self.calls[name].append((start, time.perf_counter()))

        setattr(kind, method, timed)


def worker(words: list[str]) -> None:
    """One process of a run; the main one prints what its clock noted."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    clock = Clock()
    for kind, method, name in ((Checkpoints, "save", "save"), (Tracker, "log", "log"), (Progress, "update", "step")):
        clock.watch(kind, method, name)
    recipe = from_command_line(Recipe, words, default=packaged(EMBEDDED))
    with processes() as group:
        pretrain(recipe, group)
        if group.is_main:
            print("\n" + json.dumps(clock.calls), flush=True)


def run(folder: Path, number: int, steps: int) -> dict[str, float]:
    """Figures of a run of `number` processes."""
    out = folder / f"{number}"
    options: dict[str, Any] = {
        "out": out, "steps": steps, "save_every": SAVE_EVERY, "tracking.mode": "offline", "tracking.log_every": 5,
        "data.glyphs.folder": folder / "shards", "data.glyphs.naming": 800, "data.glyphs.episodes": 800,
        **{f"data.sources.{name}.shards": folder / "shards" / name for name in ("naming", "episodes")},
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"}
    command = [*launcher, __file__, "--worker", *words]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"a run of {number} processes stopped; its error stands above")
    calls = json.loads(done.stdout.strip().splitlines()[-1])
    rows = read_rows(out / "metrics.jsonl")[1:]  # the first has what is done once
    return {"tokens": median(row["tokens_per_second"] for row in rows), **costs(calls)}


def costs(calls: dict[str, list[list[float]]]) -> dict[str, float]:
    """Seconds of a step without saves and rows, of a save, of a row, and of steps after saves over those of others."""
    waits, saves = calls["save"] + calls["log"], calls["save"][:-1]  # the last one is waited for: the run is over
    ends = [end for _, end in calls["step"]]
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for number, (before, after) in enumerate(pairwise(ends)):
        waited = sum(end - start for start, end in waits if before <= start < after)
        recently = any(ends[max(0, number + 1 - AFTER)] <= start < after for start, _ in saves)
        if number >= WARM_UP:
            seconds[recently].append(after - before - waited)
    return {
        "step": median(seconds[False]),
        "save": median(end - start for start, end in saves),
        "log": median(end - start for start, end in calls["log"][1:]),
        "beside": median(seconds[True]) / median(seconds[False]),
    }


def utilisation(place: Place, rounds: int) -> dict[str, float]:
    """Operations a second of training steps, and their share of the peak."""
    trainee = Trainee("ours", place, TOKENS if place.shape is not SHAPES["tiny"] else TOKENS // 4)
    operations = OperationCounter(trainee.model)({name: value.cpu() for name, value in trainee.batch.items()})
    trainee.step()
    rate = operations / median(trainee.step() for _ in range(rounds))
    peak = peak_flops(torch.device(place.device, 0)) if place.device == "cuda" else None
    share = {"MFU": rate / peak} if peak else {"share of a matrix product's rate": rate / trainee.matmul_peak()}
    return {"TFLOP/s": rate / 1e12, **share}


def main() -> None:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps, a tiny shape: shows that it runs")
    parser.add_argument("--json", help="where to keep the results")
    parser.add_argument("--processes", default="1,2", help="of the runs; others are related to the first")
    options = parser.parse_args()
    numbers = [int(word) for word in options.processes.split(",")]
    steps = 2 * SAVE_EVERY + 10 if options.quick else 8 * SAVE_EVERY
    recipe = from_command_line(Recipe, [], default=packaged(EMBEDDED))
    figures: dict[str, float | str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        runs = {number: run(Path(temporary), number, steps) for number in numbers}
    for number, found in runs.items():
        label = f"{number} process{'es' * (number > 1)}"
        figures[f"tokens/s {label}"] = found["tokens"]
        figures[f"step seconds {label}"] = found["step"]
        figures[f"save seconds {label}"] = found["save"]
        figures[f"row seconds {label}"] = found["log"]
        beside = AFTER * max(found["beside"] - 1, 0.0) * found["step"]
        saving = (found["save"] + beside) / (recipe.save_every * found["step"])
        figures[f"checkpoints % of step time {label}"] = 100 * saving
        figures[f"tracking % of step time {label}"] = 100 * found["log"] / (recipe.tracking.log_every * found["step"])
        figures[f"step after a save / other steps {label}"] = found["beside"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = "tiny" if options.quick else "3b" if device == "cuda" else "125m"
    place = Place(SHAPES[name], device, torch.bfloat16 if device == "cuda" else torch.float32)
    figures.update(
        {f"{measure} {name}": value for measure, value in utilisation(place, 2 if options.quick else 5).items()}
    )
    for number in numbers[1:]:
        growth = runs[number]["tokens"] / runs[numbers[0]]["tokens"]
        figures[f"scaling efficiency {number} beside {numbers[0]}"] = growth * numbers[0] / number
    publish(figures, options.json)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2:])
    else:
        main()
