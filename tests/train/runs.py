"""Short runs that tests interrupt: a recipe over tiny backbones, and processes forked from the test's own."""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data_shards.shards import write_shards
from tests.tiny import document, save_backbones
from train import pretrain as module
from train.parallel import Processes
from train.progress import Progress
from train.recipe import DataRecipe, ModelRecipe, OptimizerRecipe, ParallelRecipe, Recipe, SourceRecipe, TrackingRecipe

STEPS, BATCH = 12, 8
SECONDS = 60
"""how long a process may take"""


def prepare_folder(folder: Path) -> Path:
    """Tiny backbones and two sources of shards."""
    save_backbones(folder)
    for number, name in enumerate(("pairs", "pages")):
        documents = (document(100 * number + n, 1 + 2 * number * (n % 2), key=f"{name}{n}") for n in range(23))
        write_shards(documents, folder / name, max_samples=5)
    return folder


def recipe_of(folder: Path, out: Path, **fields: Any) -> Recipe:
    """A run of a second or two; every step is logged."""
    sources = {name: SourceRecipe(str(folder / name)) for name in ("pairs", "pages")}
    sources["pages"].start_step = 2
    shape = dict(cross_attention_heads=2, cross_attention_head_dim=8, resampler_depth=1, resampler_latents=4,
                 resampler_heads=2, resampler_head_dim=8)  # fmt: skip
    settings: dict[str, Any] = dict(
        steps=STEPS,
        batch=BATCH,
        micro_batch=2,
        save_every=4,
        model=ModelRecipe(str(folder / "vision"), str(folder / "language"), **shape),  # type: ignore[arg-type]
        data=DataRecipe(sources, workers=0),
        optimizer=OptimizerRecipe(learning_rate=1e-3, gate_factor=20.0, warmup_steps=3, schedule="cosine"),
        parallel=ParallelRecipe(timeout=30),
        tracking=TrackingRecipe("disabled", log_every=1),
    )
    return Recipe(out=str(out), **{**settings, **fields})


def rows(out: Path) -> list[dict[str, Any]]:
    """What a run logged."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[str]:
    """The loss of every step, to the bit; no step is missing or there twice."""
    found = rows(out)
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    return [repr(row["loss"]) for row in found]


def saved(out: Path) -> list[int]:
    """Steps of the checkpoints that stand there."""
    return sorted(int(path.name.removeprefix("step-")) for path in (out / "checkpoints").glob("step-*"))


def at_step(step: int, action: Callable[[], None]) -> None:
    """In this process, from now on: do something when a run has computed a step."""

    class Acting(Progress):
        def update(self, now: int, *arguments: Any, **named: Any) -> None:
            super().update(now, *arguments, **named)
            if now == step:
                action()

    module.Progress = Acting  # type: ignore[misc]


class PurposeError(Exception):
    """What a test stops a run with."""


def stop() -> None:
    """End a run in the middle of a step."""
    raise PurposeError("enough")


def forked(function: Callable[[Processes], Any], world: int = 1) -> list[tuple[int, Any]]:
    """Run a function in `world` processes forked from this one: each's exit code, and what it returned or raised."""
    context = multiprocessing.get_context("fork")
    said = [context.SimpleQueue() for _ in range(world)]
    meeting = Path(tempfile.mkdtemp()) / "meeting"

    def run(rank: int) -> None:
        if world > 1:
            dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=world)
        try:
            said[rank].put(function(Processes(rank, world)))
        except Exception as error:  # noqa: BLE001 - the test judges it
            said[rank].put(f"{type(error).__name__}: {error}")

    started = [context.Process(target=run, args=(rank,)) for rank in range(world)]
    for each in started:
        each.start()
    for each in started:
        each.join(SECONDS)
        if each.is_alive():
            each.kill()
            each.join()
    return [
        (each.exitcode or 0, None if queue.empty() else queue.get()) for each, queue in zip(started, said, strict=True)
    ]
