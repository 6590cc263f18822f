"""`flamingo-quickstart`: from nothing to a few-shot score: shards → pretraining → tuning → evaluation → report.

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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich import get_console
from transformers.utils import logging

from flamingo.errors import FlamingoError, command_line
from flamingo.files import write_text
from icl_eval.comparison import comparison_table
from icl_eval.diagnostics import CONTROLS
from icl_eval.evaluation import Progress, Results, evaluate, summary
from icl_eval.instructions import InstructionResults, Item, evaluate_instructions, load_instructions
from icl_eval.report import write_report
from icl_eval.run import identity as model_identity
from icl_eval.run import load, table
from icl_eval.tasks import load_task
from train.parallel import Processes, processes
from train.pretrain import made_once, make_glyphs, make_instructions, pretrain
from train.progress import Stages
from train.recipe import EMBEDDED, Recipe, TuneRecipe, from_command_line, packaged
from train.tracking import METRICS_FILE, read_rows
from train.tune import tune

TASKS = ("glyphs_5way", "glyphs_2way", "scripts_5way", "digits_5way", "digits_2way", "naming")
KEPT = ("glyphs_5way", "naming")
"""tasks that the tuned model is asked too: what pretraining taught is to stay"""
STAGES = ("backbones", "shards", "pretraining", "instructions", "tuning", "evaluation", "report")
UNTUNED, TUNED = "untuned", "tuned"


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
    tuning: str = "package:train/recipes/embedded_tune.yaml"
    """recipe that the pretrained model is tuned by on instructions; empty: it is not tuned"""
    tuning_steps: int | None = None
    """instead of that recipe's steps"""
    instructions: int = 200
    """held-out instructions of each kind that both models are asked"""

    def check(self, processes: int = 1) -> None:
        """As `Recipe.check`, for what the quickstart adds too."""
        super().check(processes)
        positive = {name: getattr(self, name) for name in ("episodes", "processes", "eval_batch", "instructions")}
        positive["tuning_steps"] = 1 if self.tuning_steps is None else self.tuning_steps
        for name, number in positive.items():
            if number < 1:
                raise FlamingoError(f"{name}={number}: expected a positive number")
        if (tuning := self.tune_recipe()) is not None:
            tuning.check(processes)

    def tune_recipe(self) -> TuneRecipe | None:
        """The recipe of tuning, in a folder within this run's; None where there is none.

        Raises:
            FlamingoError: where its file is missing or wrong.
        """
        if not self.tuning:
            return None
        file = packaged(self.tuning) if self.tuning.startswith("package:") else self.tuning
        recipe = from_command_line(TuneRecipe, [f"--config={file}"])
        steps = recipe.steps if self.tuning_steps is None else self.tuning_steps
        return replace(recipe, out=str(Path(self.out, TUNED)), seed=self.seed, steps=steps, tracking=self.tracking)


def quickstart(recipe: Quickstart, group: Processes) -> None:
    """Run all stages; every process of the group calls this."""
    out, tuning = Path(recipe.out), recipe.tune_recipe()
    left_out = {"backbones": not recipe.from_scratch, "instructions": tuning is None, "tuning": tuning is None}
    names = [stage for stage in STAGES if not left_out.get(stage)]
    with Stages(names, enabled=group.is_main) as stages:
        if recipe.from_scratch:
            recipe = with_own_backbones(recipe, stages, group)
        with timed(stages, "shards", out, group):
            account = make_glyphs(recipe, group)
            stages.note(str(recipe.path("{out}/shards")))
        with timed(stages, "pretraining", out, group):
            models = {UNTUNED: pretrain(recipe, group)}
            stages.note(str(models[UNTUNED]))
        if tuning is not None:
            models[TUNED] = tuned(recipe, tuning, stages, group)
        if is_evaluated(out, models, recipe):
            stages.keep("evaluation", str(out / "results.json"))
            stages.keep("report", str(out / "report.html"))
            return
        with timed(stages, "evaluation", out, group, anew=True):
            scores = score(recipe, models, stages, group)
        if not group.is_main:
            return
        with timed(stages, "report", out, group, anew=True):
            report(recipe, scores, account)
        write_text(out / "summary.json", json.dumps(summarised(recipe, scores), indent=1) + "\n")
    get_console().print(table(scores.tasks[UNTUNED]))
    if scores.instructions:
        get_console().print(comparison_table(scores.instructions))


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


def tuned(recipe: Quickstart, tuning: TuneRecipe, stages: Stages, group: Processes) -> Path:
    """Write the instructions, those that are held out too, and tune on them: the folder of the tuned model."""
    with timed(stages, "instructions", Path(recipe.out), group):
        make_instructions(tuning, group)
        hold_out_instructions(recipe, group)
        stages.note(str(held_out(recipe)))
    with timed(stages, "tuning", Path(recipe.out), group):
        folder = tune(tuning, group)
        stages.note(str(folder))
    return folder


def held_out(recipe: Quickstart) -> Path:
    """Where the held-out instructions are."""
    return Path(recipe.out, "held_out_instructions")


def hold_out_instructions(recipe: Quickstart, group: Processes) -> None:
    """Write the held-out instructions where they are not there yet."""
    from data_shards.glyphs.instructions import write_held_out_instructions

    def make() -> dict[str, Any]:
        return write_held_out_instructions(
            held_out(recipe), recipe.instructions, seed=recipe.seed, processes=recipe.processes
        )

    made_once(held_out(recipe), {"seed": recipe.seed, "instructions": recipe.instructions}, make, group)


@dataclass
class Scores:
    """What the models of a run scored, by their names.

    Attributes:
        tasks: the pretrained model on all tasks, the tuned one on those of `KEPT`.
        instructions: both on the held-out instructions `items`; empty where nothing was tuned.
    """

    tasks: dict[str, Results] = field(default_factory=dict)
    instructions: dict[str, InstructionResults] = field(default_factory=dict)
    items: list[Item] = field(default_factory=list)


def score(recipe: Quickstart, models: dict[str, Path], stages: Stages, group: Processes) -> Scores:
    """The pretrained model at all tasks, shots and controls; where there is a tuned one, both on the instructions."""
    scores = Scores(items=load_instructions(held_out(recipe)) if TUNED in models else [])
    common: dict[str, Any] = {"batch_size": recipe.eval_batch, "seed": recipe.seed}
    for name, folder in models.items():
        model, processor = load(str(folder), str(group.device))
        facts = {"model": model_identity(str(folder))}
        tasks, controls = (TASKS, CONTROLS) if name == UNTUNED else (KEPT, ())
        scores.tasks[name] = evaluate(
            model,
            processor,
            [load_task(task) for task in tasks],
            controls=controls,
            queries=recipe.episodes,
            progress=noting(stages),
            facts=facts,
            **common,
        )
        if scores.items:
            found = evaluate_instructions(
                model, processor, scores.items, progress=noting(stages, f"{name}, "), **common
            )
            found.facts |= facts
            scores.instructions[name] = found
    return scores


def noting(stages: Stages, about: str = "") -> Progress:
    """Shows how far an evaluation is."""
    return lambda task, done, total: stages.note(f"{about}{task}: {done} of {total} queries")


def report(recipe: Quickstart, scores: Scores, account: dict[str, Any]) -> None:
    """Write all results and the page that shows them."""
    out = Path(recipe.out)
    for name, results in scores.tasks.items():
        results.save(out if name == UNTUNED else out / name)
    for name, found in scores.instructions.items():
        found.save(out, f"instructions_{name}")
    write_report(
        out / "report.html",
        results=scores.tasks[UNTUNED],
        training_log=read_rows(out / METRICS_FILE),
        account=account,
        timings=read_seconds(out),
        title=f"Quickstart, seed {recipe.seed}",
        facts={"recipe": recipe.as_dict()},
        instructions=scores.instructions,
        items=scores.items,
    )


def summarised(recipe: Quickstart, scores: Scores) -> dict[str, Any]:
    """The content of summary.json: which run it is, how long it took, and all scores."""
    found: dict[str, Any] = {
        **asked(recipe),
        "seconds": read_seconds(Path(recipe.out)),
        **summary(scores.tasks[UNTUNED]),
        "models": {name: each.facts["model"]["sha256"] for name, each in scores.tasks.items()},
    }
    if TUNED in scores.tasks:
        found["tasks_tuned"] = summary(scores.tasks[TUNED])["tasks"]
        found["instructions"] = {name: each.summary() for name, each in scores.instructions.items()}
    return found


def asked(recipe: Quickstart) -> dict[str, Any]:
    """What of the recipe its scores depend on, beside the models."""
    return {"seed": recipe.seed, "episodes": recipe.episodes, "instructions_of_a_kind": recipe.instructions}


def is_evaluated(out: Path, models: dict[str, Path], recipe: Quickstart) -> bool:
    """Whether an earlier start evaluated these very models as the recipe asks, to the end."""
    path = out / "summary.json"
    if not path.exists():
        return False
    found = json.loads(path.read_text())
    wanted = asked(recipe) | {
        "models": {name: model_identity(str(folder))["sha256"] for name, folder in models.items()}
    }
    return all(found.get(name) == value for name, value in wanted.items())


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
