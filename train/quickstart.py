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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils import logging

from flamingo import FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo.errors import command_line
from icl_eval.diagnostics import CONTROLS
from icl_eval.evaluation import Results, evaluate, summary
from icl_eval.report import write_report
from icl_eval.run import identity as model_identity
from icl_eval.run import table
from icl_eval.tasks import load_task
from train.parallel import Processes, processes
from train.pretrain import make_glyphs, pretrain, write_text
from train.progress import Stages
from train.recipe import EMBEDDED, Recipe, from_command_line, packaged
from train.tracking import METRICS_FILE

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


def quickstart(recipe: Quickstart, group: Processes) -> None:
    """Run all stages; every process of the group calls this."""
    out = Path(recipe.out)
    names = [stage for stage in STAGES if recipe.from_scratch or stage != "backbones"]
    with Stages(names, enabled=group.is_main) as stages:
        if recipe.from_scratch:
            recipe = with_own_backbones(recipe, stages, group)
        with stages.run("shards"):
            account = make_glyphs(recipe, group)
            stages.note(str(recipe.path("{out}/shards")))
        with stages.run("pretraining"):
            model_folder = pretrain(recipe, group)
            stages.note(str(model_folder))
        if is_evaluated(out, model_folder, recipe):
            stages.keep("evaluation", str(out / "results.json"))
            stages.keep("report", str(out / "report.html"))
            return
        with stages.run("evaluation"):
            results = score(recipe, model_folder, stages)
        if not group.is_main:
            return
        results.save(out)
        seconds = total_seconds(out, stages)
        with stages.run("report"):
            write_report(
                out / "report.html",
                results=results,
                training_log=[json.loads(line) for line in (out / METRICS_FILE).read_text().splitlines()],
                account=account,
                timings=seconds,
                title=f"Quickstart, seed {recipe.seed}",
                facts={"recipe": recipe.as_dict()},
            )
        found = {"seed": recipe.seed, "episodes": recipe.episodes, "seconds": total_seconds(out, stages)}
        model = results.facts["model"]["sha256"]
        write_text(out / "summary.json", json.dumps({**found, **summary(results), "model": model}, indent=1) + "\n")
    Console().print(table(results))


@contextmanager
def helpers(recipe: Quickstart) -> Iterator[None]:
    """Start this command again as the other ranks, and make this process rank 0; under torchrun nothing is started.

    On a laptop one process a core is twice as fast as one process with as many threads: the layers are too small to be
    shared out. torchrun would do the same, but would bury a one-line error under its own.
    """
    world = min(recipe.processes, len(os.sched_getaffinity(0)), recipe.batch // recipe.micro_batch)
    if "RANK" in os.environ or world < 2:
        yield
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=str(world), RANK="0", LOCAL_RANK="0")
    torch.set_num_threads(1)
    command = [sys.executable, "-m", "train.quickstart", *sys.argv[1:]]
    others = []
    for rank in range(1, world):
        environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        with Path(recipe.out, f"rank{rank}.log").open("w") as log:
            others.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        yield
    except BaseException:
        for other in others:
            other.terminate()
        raise
    for other in others:
        other.wait()


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
        with stages.run("backbones"):
            if group.is_main:
                make_backbones(folder, seed=recipe.seed)
            group.wait()
    own = replace(recipe.model, vision=str(folder / "vision"), language=str(folder / "language"))
    return replace(recipe, model=own)


def score(recipe: Quickstart, model_folder: Path, stages: Stages) -> Results:
    """All tasks at all shots, and the controls."""
    model = FlamingoForConditionalGeneration.from_pretrained(model_folder).eval()
    processor = FlamingoProcessor.from_pretrained(model_folder)
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


def total_seconds(out: Path, stages: Stages) -> dict[str, float]:
    """Seconds of every stage, those of earlier starts of this run included."""
    path = out / "seconds.json"
    seconds = json.loads(path.read_text()) if path.exists() else {}
    seconds.update({stage: round(spent, 1) for stage, spent in stages.seconds.items()})
    write_text(path, json.dumps(seconds) + "\n")
    return seconds


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
