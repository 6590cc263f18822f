"""`make kill-test`: runs of the embedded recipe, killed at random moments and resumed, against uninterrupted ones.

Every loss of a resumed run must be that of the uninterrupted run, to the bit. Half of the runs are one process that is
killed and started again; half are two under torchrun, of which one is killed and torchrun starts both again by itself.
Then runs change their number of processes: the samples stay the same, and the losses, for twenty steps, to 1e-6.

Moments are random but drawn from a seed. A kill "inside a save" counts only where the unfinished checkpoint lies there
before and after the signal.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml
from rich import get_console
from rich.table import Table
from transformers.utils import logging

from data_shards.glyphs.documents import write_world_shards
from data_shards.loader import rank_batches
from flamingo.errors import FlamingoError, command_line
from train.checkpoint import FOLDER, all_checkpoints, being_written, path_of, step_of
from train.pretrain import build_model, micro_batches, open_sources
from train.recipe import EMBEDDED, Recipe, from_command_line, packaged
from train.tracking import METRICS_FILE, read_rows

ATTEMPTS = 5
"""How often a run is killed that is to be killed inside a save."""
POLL_SECONDS = {True: 0.001, False: 0.05}
"""Between two looks at a run: for its saves, which are short, and for its steps."""
LIMIT_SECONDS = 300.0
"""How long one run may take, kills included."""
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
"""Of the processes that are started."""
COMPARED_STEPS = 20
CLOSE = 1e-6
"""How far apart losses of the same micro-batches may be, when they are added up in another order."""


@dataclass
class Options:
    """What is run."""

    runs: int = 20
    """killed runs, half of them of two processes"""
    inside: int = 6
    """how many of them are killed inside a save, at least"""
    steps: int = 150
    """steps of a run"""
    save_every: int = 10
    """steps between two checkpoints"""
    batch: int = 4
    """sequences of a step"""
    micro_batch: int = 2
    """sequences of a forward pass; half of batch, as in the recipe"""
    seed: int = 0
    """of the moments"""
    at_once: int = 2
    """processes that compute at the same time: as many as there are cores"""
    recipe: str | None = None
    """file of the recipe; default: the embedded one"""
    out: str | None = None
    """folder that keeps all runs; default: one that is removed"""


@dataclass
class Run:
    """One run, its kills, and what came of it."""

    folder: Path
    world: int
    inside: bool = False
    seed: int = 0
    kills: list[str] = field(default_factory=list)
    """what was killed and when, in words"""
    differs: str | None = None
    """the first difference from the uninterrupted run"""
    seconds: float = 0.0


def kill_test(options: Options, folder: Path) -> bool:
    """Run everything in a folder, print tables, and return whether all is as it must be."""
    console = get_console()
    start = time.monotonic()
    recipe = write_recipe(options, folder)
    references = {world: Run(folder / f"whole-{world}", world) for world in (1, 2)}
    for reference in references.values():
        go_on(reference, recipe)
    console.print(f"uninterrupted: {', '.join(f'{each.seconds:.0f} s' for each in references.values())}")
    runs = plan(options, folder)
    for world in (1, 2):
        at_once = max(1, options.at_once // world)
        with ThreadPoolExecutor(at_once) as pool:
            own = [run for run in runs if run.world == world]
            for run in pool.map(lambda run: killed(run, recipe, options), own):
                run.differs = difference(run.folder, references[run.world].folder, options.steps)
                console.print(f"{run.folder.name}: {'; '.join(run.kills)}: {run.differs or 'equal'}")
    switched = [switch(folder, recipe, options, references, worlds) for worlds in ((2, 1), (1, 2))]
    console.print(table(runs))
    console.print(switch_table(switched))
    equal = sum(run.differs is None for run in runs)
    inside = sum("inside a save" in kill for run in runs for kill in run.kills)
    print(f"runs equal to the uninterrupted one: {equal} of {len(runs)}")
    print(f"kills inside a save: {inside}")
    print(f"seconds: {time.monotonic() - start:.0f}")
    return equal == len(runs) and inside >= options.inside and all(each.good for each in switched)


def write_recipe(options: Options, folder: Path) -> Path:
    """The recipe of all runs, with data that all share; returns its file."""
    recipe = from_command_line(
        Recipe, ["--config", options.recipe] if options.recipe else [], default=packaged(EMBEDDED)
    )
    if (glyphs := recipe.data.glyphs) is not None:
        samples = options.steps * options.batch
        write_world_shards(folder / "shards", seed=recipe.seed, naming=samples, episodes=samples, processes=2)
        recipe.data.glyphs = None
        for source in recipe.data.sources.values():
            source.shards = source.shards.replace(glyphs.folder, "{out}/shards").replace("{out}", str(folder))
            source.start_step = min(source.start_step, options.steps // 5)
    for name in ("steps", "save_every", "batch", "micro_batch"):
        setattr(recipe, name, getattr(options, name))
    recipe.tracking.log_every, recipe.tracking.mode, recipe.evaluation.every = 1, "disabled", 0
    recipe.optimizer.warmup_steps = min(recipe.optimizer.warmup_steps, options.steps // 10)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(recipe.as_dict())), sort_keys=False), encoding="utf-8")
    return path


def plan(options: Options, folder: Path) -> list[Run]:
    """Half of the runs of one process, half of two; a few more than asked for are killed inside a save."""
    inside = min(options.runs, options.inside + 2)
    return [
        Run(folder / f"run-{number:02d}", 1 + number % 2, number < inside, options.seed * 1000 + number)
        for number in range(options.runs)
    ]


# -- one run -----------------------------------------------------------------------------------------------------------


def command(run: Run, recipe: Path) -> list[str]:
    """`python -m train.pretrain`, or torchrun with restarts."""
    launcher = ["-m", "train.pretrain"]
    if run.world > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={run.world}", "--max-restarts=9"]
        launcher = [*torchrun, *launcher]
    return [sys.executable, *launcher, "--config", str(recipe), "--out", str(run.folder)]


def started(run: Run, recipe: Path) -> subprocess.Popen[bytes]:
    """The run, begun or resumed; what it says is in `output.log`."""
    run.folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **ENVIRONMENT}
    with (run.folder / "output.log").open("ab") as log:
        return subprocess.Popen(command(run, recipe), stdout=log, stderr=log, env=environment)


def go_on(run: Run, recipe: Path, process: subprocess.Popen[bytes] | None = None) -> None:
    """Start, unless it is running, and wait for the end.

    Raises:
        FlamingoError: where it does not end well, or not in time.
    """
    start = time.monotonic()
    process = process or started(run, recipe)
    try:
        code: int | None = process.wait(LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun takes its workers with it
        code = None
    if code != 0:
        last = (run.folder / "output.log").read_text(errors="replace").strip().splitlines()[-5:]
        raise FlamingoError(f"{run.folder}: ended with {code}: {' / '.join(last)}")
    run.seconds += time.monotonic() - start


def killed(run: Run, recipe: Path, options: Options) -> Run:
    """Run to the end, killed at a random moment; where that is to be inside a save: again, until it was inside one."""
    start, drawn = time.monotonic(), random.Random(run.seed)
    process = started(run, recipe)
    every, room = options.save_every, options.save_every * (ATTEMPTS if run.inside else 1)
    step = drawn.randrange(every, options.steps - room)
    for _ in range(ATTEMPTS):
        step = (step // every + 1) * every if run.inside else step
        wait_until(saving if run.inside else computed, run, step, process)
        time.sleep(drawn.uniform(0, 0.002 if run.inside else 0.1))
        process, inside = kill(process, run, drawn.randrange(run.world), recipe)
        if inside or not run.inside:
            break
    go_on(run, recipe, process)
    run.seconds = time.monotonic() - start
    return run


def kill(process: subprocess.Popen[bytes], run: Run, rank: int, recipe: Path) -> tuple[subprocess.Popen[bytes], bool]:
    """Kill one process, and start a single one again; torchrun starts its workers again by itself.

    Returns:
        The run's process, and whether a save was under way before and after.
    """
    before = unfinished(run)
    os.kill(process.pid if run.world == 1 else worker(process.pid, rank), signal.SIGKILL)
    inside = bool(before and before == unfinished(run))
    place = "inside a save" if inside else "between saves"
    run.kills.append(f"{'the process' if run.world == 1 else f'worker {rank}'} at step {last_step(run)}, {place}")
    if run.world == 1:
        process.wait()
        process = started(run, recipe)
    return process, inside


def worker(torchrun: int, rank: int) -> int:
    """The process id of one of torchrun's workers (on Linux)."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == torchrun and f"\0RANK={rank}\0".encode() in b"\0" + (folder / "environ").read_bytes():
                return int(folder.name)
        except OSError:  # it is gone
            continue
    raise FlamingoError(f"torchrun {torchrun} has no worker {rank}")


def wait_until(reached: Callable[[Run, int], bool], run: Run, step: int, process: subprocess.Popen[bytes]) -> None:
    """Wait for a moment of a run that is running.

    Raises:
        FlamingoError: where it ends before.
    """
    while not reached(run, step):
        if process.poll() is not None:
            raise FlamingoError(f"{run.folder}: ended with {process.returncode} before step {step}; see output.log")
        time.sleep(POLL_SECONDS[reached is saving])


def saving(run: Run, step: int) -> bool:
    """Whether the save of a step has begun."""
    path = path_of(run.folder, step)
    return being_written(path).exists() or path.exists()


def computed(run: Run, step: int) -> bool:
    """Whether a step is done."""
    return last_step(run) >= step


def unfinished(run: Run) -> list[Path]:
    """Saves that are under way."""
    return sorted((run.folder / FOLDER).glob(being_written(Path("step-*")).name))


def last_step(run: Run) -> int:
    """The last step that was logged."""
    return max((row["step"] for row in read_rows(run.folder / METRICS_FILE)), default=0)


# -- what came of it ---------------------------------------------------------------------------------------------------


def curve(folder: Path) -> dict[int, float]:
    """Step → logged loss."""
    return {row["step"]: row["loss"] for row in read_rows(folder / METRICS_FILE)}


def difference(folder: Path, whole: Path, steps: int) -> str | None:
    """The first step whose loss is not that of the uninterrupted run, to the bit; no step may be missing."""
    found, expected = curve(folder), curve(whole)
    for step in range(1, steps + 1):
        if repr(found.get(step)) != repr(expected[step]):
            return f"step {step}: loss {found.get(step)!r}, uninterrupted {expected[step]!r}"
    return None


@dataclass
class Switch:
    """A run that changed its number of processes."""

    worlds: tuple[int, int]
    step: int
    """the step from which it was resumed"""
    same_samples: bool
    near: float
    """largest difference of a loss from the uninterrupted run in the next `COMPARED_STEPS` steps"""
    far: float
    """largest difference in all later steps"""

    @property
    def good(self) -> bool:
        """Whether it is as it must be; what happens later is only reported."""
        return self.same_samples and self.near <= CLOSE


def switch(folder: Path, recipe: Path, options: Options, references: dict[int, Run], worlds: tuple[int, int]) -> Switch:
    """Run with one number of processes up to half the steps, and with another to the end."""
    run = Run(folder / f"switch-{worlds[0]}-{worlds[1]}", worlds[0])
    process = started(run, recipe)
    wait_until(computed, run, options.steps // 2, process)
    for rank in range(run.world if run.world > 1 else 0):
        os.kill(worker(process.pid, rank), signal.SIGKILL)
    process.kill()
    process.wait()
    run.world = worlds[1]
    step = step_of(all_checkpoints(run.folder)[-1])
    go_on(run, recipe)
    found, expected = curve(run.folder), curve(references[worlds[0]].folder)
    apart = {each: abs(found[each] - expected[each]) for each in range(1, options.steps + 1)}
    near = max(apart[each] for each in range(1, step + COMPARED_STEPS + 1))
    far = max((apart[each] for each in range(step + COMPARED_STEPS + 1, options.steps + 1)), default=0.0)
    return Switch(worlds, step, samples_are_the_same(recipe, step), near, far)


def samples_are_the_same(recipe: Path, step: int) -> bool:
    """Whether one process reads, in order, what two read together, in the steps after a switch."""
    own = from_command_line(Recipe, ["--config", str(recipe)])
    _, processor = build_model(own)
    data = micro_batches(own, open_sources(own), processor, own.model.media_attention)

    def keys(rank: int, world: int) -> list[list[str]]:
        batches = rank_batches(data, batch=own.batch, start_step=step, steps=COMPARED_STEPS, rank=rank, world=world)
        return [batch["keys"] for batch in batches]

    together = [micro_batch for both in zip(keys(0, 2), keys(1, 2), strict=True) for micro_batch in both]
    return keys(0, 1) == together


def table(runs: list[Run]) -> Table:
    """One line a killed run."""
    shown = Table("run", "processes", "killed", "losses", "seconds", title="killed and resumed", title_justify="left")
    for run in runs:
        losses = run.differs or "equal to the bit"
        shown.add_row(run.folder.name, str(run.world), "\n".join(run.kills), losses, f"{run.seconds:.0f}")
    return shown


def switch_table(switches: list[Switch]) -> Table:
    """One line a run that changed its number of processes."""
    head = ("processes", "from step", "samples", f"losses, {COMPARED_STEPS} steps", "losses, later")
    shown = Table(*head, title="other numbers of processes: largest differences", title_justify="left")
    for each in switches:
        samples = "the same" if each.same_samples else "others"
        shown.add_row(
            f"{each.worlds[0]} → {each.worlds[1]}", str(each.step), samples, f"{each.near:.1e}", f"{each.far:.1e}"
        )
    return shown


@command_line
def main() -> None:
    """Entry point of `python -m train.killtest`."""
    logging.disable_progress_bar()
    options = from_command_line(Options, description=__doc__)
    with kept_or_temporary(options.out) as folder:
        good = kill_test(options, folder)
    raise SystemExit(not good)


@contextmanager
def kept_or_temporary(out: str | None) -> Iterator[Path]:
    """The folder, or one that is removed at the end."""
    if out is None:
        with TemporaryDirectory() as name:
            yield Path(name)
    elif Path(out).exists():
        raise FlamingoError(f"--out {out}: expected a folder that does not exist yet")
    else:
        yield Path(out)


if __name__ == "__main__":
    main()
