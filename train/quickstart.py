"""`flamingo-quickstart`: from nothing to a few-shot score: shards → pretraining → evaluation → report.

Everything of a run is in its folder. Run again, it keeps what is finished and goes on with the rest; with another seed
it first moves the folder's run aside.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich import get_console
from transformers.utils import logging

from flamingo.errors import FlamingoError, command_line
from flamingo.files import write_text
from icl_eval.diagnostics import CONTROLS
from icl_eval.evaluation import Results, evaluate, summary
from icl_eval.report import write_report
from icl_eval.run import identity as model_identity
from icl_eval.run import load, table
from icl_eval.tasks import load_task
from train.parallel import Processes, processes
from train.pretrain import make_glyphs, pretrain
from train.progress import Stages
from train.recipe import EMBEDDED, Recipe, from_command_line, packaged
from train.tracking import METRICS_FILE, read_rows

TASKS = ("glyphs_5way", "glyphs_2way", "scripts_5way", "digits_5way", "digits_2way", "naming")
STAGES = ("backbones", "shards", "pretraining", "evaluation", "report")


@dataclass
class Quickstart(Recipe):
    """A pretraining recipe, and what happens around it."""

    out: str = "runs/quickstart"
    """folder of the run"""
    from_scratch: bool = False
    """train the two frozen backbones anew instead of taking those of the package (minutes more)"""
    episodes: int = 1000
    """queries of each cell of the evaluation"""
    processes: int = 2
    """processes that train and evaluate, at most one a core; the losses do not depend on it"""
    eval_batch: int = 128
    """queries that are evaluated at once; scores do not depend on it"""

    def check(self, processes: int = 1) -> None:
        """As `Recipe.check`, for what the quickstart adds too."""
        super().check(processes)
        for name in ("episodes", "processes", "eval_batch"):
            if getattr(self, name) < 1:
                raise FlamingoError(f"{name}={getattr(self, name)}: expected a positive number")


def quickstart(recipe: Quickstart, group: Processes) -> None:
    """Run all stages; every process of the group calls this."""
    out = Path(recipe.out)
    names = [stage for stage in STAGES if recipe.from_scratch or stage != "backbones"]
    with Stages(names, enabled=group.is_main) as stages:
        if recipe.from_scratch:
            recipe = with_own_backbones(recipe, stages, group)
        with timed(stages, "shards", out, group):
            account = make_glyphs(recipe, group)
            stages.note(str(recipe.path("{out}/shards")))
        with timed(stages, "pretraining", out, group):
            model_folder = pretrain(recipe, group)
            stages.note(str(model_folder))
        if is_evaluated(out, model_folder, recipe):
            stages.keep("evaluation", str(out / "results.json"))
            stages.keep("report", str(out / "report.html"))
            return
        with timed(stages, "evaluation", out, group, anew=True):
            results = score(recipe, model_folder, stages, group)
        if not group.is_main:
            return
        results.save(out)
        with timed(stages, "report", out, group, anew=True):
            write_report(
                out / "report.html",
                results=results,
                training_log=read_rows(out / METRICS_FILE),
                account=account,
                timings=read_seconds(out),
                title=f"Quickstart, seed {recipe.seed}",
                facts={"recipe": recipe.as_dict()},
            )
        found = {"seed": recipe.seed, "episodes": recipe.episodes, "seconds": read_seconds(out)}
        model = results.facts["model"]["sha256"]
        write_text(out / "summary.json", json.dumps({**found, **summary(results), "model": model}, indent=1) + "\n")
    get_console().print(table(results))


@contextmanager
def helpers(recipe: Quickstart) -> Iterator[None]:
    """Start this command again as the other ranks, and make this process rank 0; under torchrun nothing is started.

    On a laptop one process a core is twice as fast as one process with as many threads: the layers are too small to be
    shared out. torchrun would do the same, but would bury a one-line error under its own.

    Raises:
        FlamingoError: where another rank failed; it names its log.
    """
    places = torch.cuda.device_count() if torch.cuda.is_available() else cores()
    world = min(recipe.processes, places, recipe.batch // recipe.micro_batch)
    if "RANK" in os.environ or world < 2:
        yield
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=str(world), RANK="0", LOCAL_RANK="0")
    torch.set_num_threads(1)
    command = [sys.executable, "-m", "train.quickstart", *sys.argv[1:]]
    others = {}
    for rank in range(1, world):
        environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        log = Path(recipe.out, f"rank{rank}.log")
        with log.open("w") as file:
            others[log] = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    try:
        yield
        for other in others.values():
            other.wait(timeout=60)
    except Exception as error:
        for log, other in others.items():
            if other.poll():  # it failed first: what this rank raised is only what followed
                last = (log.read_text().strip().splitlines() or ["nothing"])[-1]
                raise FlamingoError(f"{log}: another process ended with {other.returncode}: {last}") from error
        raise
    finally:
        for log, other in others.items():
            if other.poll() is None:
                other.kill()
                other.wait()
            if other.returncode == 0:
                log.unlink(missing_ok=True)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_room(out: Path, identity: dict[str, Any]) -> None:
    """Move a run of another seed aside, and note down whose folder this is."""
    record = out / "quickstart.json"
    if record.exists() and (found := json.loads(record.read_text())) != identity:
        number, aside = 0, out.with_name(f"{out.name}-seed{found.get('seed')}")
        while aside.exists():
            number += 1
            aside = out.with_name(f"{out.name}-seed{found.get('seed')}-{number}")
        os.replace(out, aside)
        print(f"{out} held the run of {found}: moved to {aside}")
    out.mkdir(parents=True, exist_ok=True)
    write_text(record, json.dumps(identity) + "\n")


def with_own_backbones(recipe: Quickstart, stages: Stages, group: Processes) -> Quickstart:
    """The recipe over backbones made in the run's folder; made once."""
    from data_shards.glyphs.backbones import make_backbones

    folder = Path(recipe.out) / "backbones"
    if (folder / "SHA256SUMS").exists():
        stages.keep("backbones", str(folder))
    else:
        with timed(stages, "backbones", Path(recipe.out), group):
            if group.is_main:
                threads = torch.get_num_threads()
                torch.set_num_threads(cores())  # the other processes only wait
                make_backbones(folder, seed=recipe.seed)
                torch.set_num_threads(threads)
            group.wait()
    own = replace(recipe.model, vision=str(folder / "vision"), language=str(folder / "language"))
    return replace(recipe, model=own)


def score(recipe: Quickstart, model_folder: Path, stages: Stages, group: Processes) -> Results:
    """All tasks at all shots, and the controls."""
    model, processor = load(str(model_folder), str(group.device))
    results = evaluate(
        model,
        processor,
        [load_task(name) for name in TASKS],
        controls=CONTROLS,
        episodes=recipe.episodes,
        batch_size=recipe.eval_batch,
        seed=recipe.seed,
        progress=lambda task, done, total: stages.note(f"{task}: {done} of {total} queries"),
    )
    results.facts["model"] = model_identity(str(model_folder))
    return results


def is_evaluated(out: Path, model_folder: Path, recipe: Quickstart) -> bool:
    """Whether an earlier start evaluated this very model as the recipe asks, to the end."""
    path = out / "summary.json"
    if not path.exists():
        return False
    found = json.loads(path.read_text())
    return found["model"] == model_identity(str(model_folder))["sha256"] and found["episodes"] == recipe.episodes


@contextmanager
def timed(stages: Stages, name: str, out: Path, group: Processes, *, anew: bool = False) -> Iterator[None]:
    """Run a stage and add its seconds to those of earlier starts of this run; `anew`: they begin again."""
    start = time.monotonic()
    try:
        with stages.run(name):
            yield
    finally:
        if group.is_main:
            seconds = read_seconds(out)
            before = 0.0 if anew else seconds.get(name, 0.0)
            seconds[name] = round(before + time.monotonic() - start, 1)
            write_text(out / "seconds.json", json.dumps(seconds) + "\n")


def read_seconds(out: Path) -> dict[str, float]:
    """Seconds of every stage so far."""
    path = out / "seconds.json"
    return json.loads(path.read_text()) if path.exists() else {}


@command_line
def main() -> None:
    """Entry point of `flamingo-quickstart`."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    recipe = from_command_line(Quickstart, default=packaged(EMBEDDED), description=__doc__)
    recipe.check()
    if "RANK" not in os.environ:
        make_room(Path(recipe.out), {"seed": recipe.seed, "from_scratch": recipe.from_scratch})
    with helpers(recipe), processes() as group:
        quickstart(recipe, group)
        if group.is_main:
            out = Path(recipe.out)
            print(f"report:  {out / 'report.html'}\nsummary: {out / 'summary.json'}\nmodel:   {out / 'model'}")


if __name__ == "__main__":
    main()
