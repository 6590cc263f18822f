"""Run by torchrun in two processes: trains tiny models under DDP and FSDP2 and compares them with one process.

    torchrun --standalone --nproc-per-node 2 tests/train/parallel_cases.py BACKBONES OUT quick|full

BACKBONES has a folder of backbones for each family. OUT gets `results.json`, which `test_parallel.py` reads.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import cycle, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn
from transformers import BatchFeature
from transformers.utils import logging

from flamingo import (
    Document,
    FlamingoError,
    FlamingoForConditionalGeneration,
    FlamingoProcessor,
    Image,
    Video,
    from_backbones,
)
from tests.tiny import document
from train import loop
from train.checkpoint import TrainingState
from train.faults import Faults
from train.meter import Meter, Update
from train.optim import build_optimizer, build_schedule
from train.parallel import Processes, gathered, prepare, processes, whole, without_synchronisation
from train.recipe import DataRecipe, OptimizerRecipe, ParallelRecipe, Recipe, SourceRecipe, TrackingRecipe
from train.skipped import SKIPPED_FILE

FAMILIES = ("llama", "opt", "gpt_neox", "lfm2")
STEPS, CUTS = 10, 3
"""steps of training, and how many ways there are in which media are spread over the processes"""
WEIGHTS = torch.tensor([0.2, 1.0])
OPTIMIZER = OptimizerRecipe(learning_rate=1e-3, gate_factor=5.0, warmup_steps=3, clip=0.5)
ALONE = Processes()


@dataclass(frozen=True)
class Case:
    """One way to share out the same training."""

    family: str
    kind: str
    checkpointing: bool = False
    accumulation: int = 1
    dtype: str = "float32"
    offload: bool = False
    vision: bool = False
    """whether the tower trains too"""
    videos: bool = False
    """whether the second process has videos, of different lengths, while the first has images"""

    @property
    def name(self) -> str:
        """For the names of tests."""
        return "-".join(str(value) for value in asdict(self).values())


FULL = [Case(*each) for each in product(FAMILIES, ("ddp", "fsdp"), (False, True), (1, 4), ("float32", "float64"))]
QUICK = [
    Case("llama", "ddp", False, 4, "float64"),
    Case("llama", "fsdp", True, 4, "float32"),
    Case("llama", "fsdp", False, 1, "float64", offload=True),
    Case("opt", "ddp", True, 1, "float32"),
    Case("opt", "fsdp", False, 4, "float64"),
    Case("gpt_neox", "fsdp", True, 1, "float64"),
    Case("gpt_neox", "ddp", False, 1, "float32"),
    Case("lfm2", "ddp", True, 4, "float32"),
    Case("lfm2", "fsdp", True, 4, "float64"),
    Case("llama", "ddp", False, 1, "float64", vision=True),
    Case("llama", "fsdp", True, 4, "float64", vision=True),
    Case("llama", "ddp", False, 1, "float64", videos=True),
    Case("llama", "fsdp", True, 4, "float64", vision=True, videos=True),
]
CASES = {"quick": QUICK, "full": FULL}


class Runs:
    """Trains models of the families, each from the same start."""

    def __init__(self, backbones: Path, group: Processes):
        self.backbones, self.group = backbones, group
        self.built = cache(self._build)
        self.alone = cache(self._alone)

    def _build(
        self, family: str, vision: bool = False, videos: bool = False
    ) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
        shape = dict(cross_attention_heads=2, cross_attention_head_dim=8, resampler_depth=1, resampler_latents=4,
                     resampler_heads=2, resampler_head_dim=8)  # fmt: skip
        torch.manual_seed(0)
        model, processor = from_backbones(
            self.backbones / family / "vision",
            self.backbones / family / "language",
            freeze_vision=not vision,
            resampler_max_frames=3 * videos,
            **shape,
        )
        with torch.no_grad():
            for block in model.cross_attention:
                block.attn_gate.fill_(0.8)
                block.ff_gate.fill_(0.5)
        return model, processor

    def state(
        self,
        family: str,
        dtype: str,
        recipe: ParallelRecipe,
        group: Processes,
        *,
        vision: bool = False,
        videos: bool = False,
    ) -> tuple[TrainingState, nn.Module]:
        """A fresh model, made parallel, with its optimizer."""
        model = copy.deepcopy(self.built(family, vision, videos)[0]).to(getattr(torch, dtype))
        prepared = prepare(model, recipe, group)
        optimizer = build_optimizer(model, OPTIMIZER)
        faults = Faults(group, Path(), 1.0)
        return TrainingState(model, optimizer, build_schedule(optimizer, OPTIMIZER, STEPS), faults), prepared.train()

    def micro_batches(
        self, family: str, step: int, rank: int, accumulation: int, *, videos: bool = False
    ) -> list[BatchFeature]:
        """Those of one of two processes: four documents of two sources, at times without any medium.

        Where media are missing texts are short, so that supervised tokens are spread unevenly too.
        """
        text_only = step % CUTS == 1 - rank  # at step 0 in rank 1, at step 1 in rank 0, at step 2 in none
        documents = [
            document(8000 + 100 * step + 10 * rank + number, 0 if text_only else 1 + number % 3) for number in range(4)
        ]
        if videos and rank == 1:
            documents = list(map(moving, documents))
        size = 4 // accumulation
        batches = []
        for start in range(0, 4, size):
            batch = self.built(family)[1](documents=documents[start : start + size], padding_side="right")
            sources = torch.tensor([(rank + number) % 2 for number in range(start, start + size)])
            keys = [each.key for each in documents[start : start + size]]
            batches.append(BatchFeature({**batch, "sources": sources, "keys": keys, "faults": []}))
        return batches

    def train(
        self,
        state: TrainingState,
        prepared: nn.Module,
        batches: Callable[[int], list[BatchFeature]],
        group: Processes,
    ) -> tuple[list[dict[str, Tensor]], list[Update]]:
        """Gradients of each cut at the start, then what became of every step."""
        meter = Meter(group, ("pairs", "web"))

        def accumulate(step: int) -> None:
            micro_batches = [BatchFeature(dict(batch)) for batch in batches(step)]
            loop.accumulate_gradients(prepared, micro_batches, WEIGHTS, group, meter)

        gradients, updates = [], []
        for cut in range(CUTS):
            accumulate(cut)
            trained = [(name, each) for name, each in state.model.named_parameters() if each.requires_grad]
            gradients.append({name: whole(each.grad).clone() for name, each in trained if each.grad is not None})
            assert len(gradients[-1]) == len(trained), "a parameter without a gradient"
            state.optimizer.zero_grad(set_to_none=True)
        for step in range(STEPS):
            accumulate(step)
            updates.append(loop.update_parameters(state, meter, OPTIMIZER.clip, group))
        return gradients, updates

    def _alone(
        self, family: str, dtype: str, vision: bool = False, videos: bool = False
    ) -> tuple[list[dict[str, Tensor]], list[Update]]:
        """The same training in one process, of all micro-batches."""
        state, prepared = self.state(family, dtype, ParallelRecipe(), ALONE, vision=vision, videos=videos)
        return self.train(
            state,
            prepared,
            lambda step: [
                batch for rank in (0, 1) for batch in self.micro_batches(family, step, rank, 1, videos=videos)
            ],
            ALONE,
        )

    def compare(self, case: Case) -> dict[str, Any]:
        """How far a case is from one process."""
        recipe = ParallelRecipe(
            case.kind,
            activation_checkpointing=case.checkpointing,
            cpu_offload=case.offload,  # type: ignore[arg-type]
        )
        state, prepared = self.state(
            case.family, case.dtype, recipe, self.group, vision=case.vision, videos=case.videos
        )
        gradients, updates = self.train(
            state,
            prepared,
            lambda step: self.micro_batches(case.family, step, self.group.rank, case.accumulation, videos=case.videos),
            self.group,
        )
        reference, alone = self.alone(case.family, case.dtype, case.vision, case.videos)
        worst, culprit = max(
            (far(found[name], wanted[name], largest(wanted)), name)
            for found, wanted in zip(gradients, reference, strict=True)
            for name in wanted
        )
        pairs = list(zip(updates, alone, strict=True))
        return {
            "gradients": worst,
            "culprit": culprit,
            "losses": max(abs(one.loss - other.loss) for one, other in pairs),
            "norms": max(abs(one.norms[g] / other.norms[g] - 1) for one, other in pairs[:1] for g in other.norms),
            "read": all((one.tokens, one.images) == (other.tokens, other.images) for one, other in pairs),
            "learns": alone[0].loss - alone[-1].loss,
        }


def moving(still: Document) -> Document:
    """The same with a video in place of each picture: of two, three and five frames, more than have embeddings."""
    frames = cycle((2, 3, 5))
    segments = (Video((part,) * next(frames)) if isinstance(part, Image) else part for part in still.segments)
    return replace(still, segments=tuple(segments))


def far(found: Tensor, wanted: Tensor, most: float) -> float:
    """max|a − b| / max|b|; of a gradient that only rounding keeps from zero (a key's bias), a millionth of `most`."""
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6 * most))


def largest(tensors: dict[str, Tensor]) -> float:
    """Of all elements."""
    return max(float(each.abs().max()) for each in tensors.values())


def half_precision(runs: Runs, kind: str) -> dict[str, Any]:
    """Training in bfloat16 over frozen backbones that are stored in it."""
    recipe = ParallelRecipe(kind, precision="bfloat16", frozen_in_bfloat16=True)  # type: ignore[arg-type]
    state, prepared = runs.state("llama", "float32", recipe, runs.group)
    _, updates = runs.train(
        state, prepared, lambda step: runs.micro_batches("llama", step, runs.group.rank, 1), runs.group
    )
    moments = [value for each in state.optimizer.state.values() for value in each.values()]
    return {
        "losses": [update.loss for update in updates],
        "float32": [update.loss for update in runs.alone("llama", "float32")[1]],
        "frozen": sorted({str(each.dtype) for each in state.model.parameters() if not each.requires_grad}),
        "trained": sorted({str(each.dtype) for each in state.model.parameters() if each.requires_grad}),
        "moments": sorted({str(each.dtype) for each in moments}),
    }


def not_finite(runs: Runs, kind: str, out: Path, *, steps: int, bad: set[int], spoil: str) -> dict[str, Any]:
    """`loop.run` where one process meets what is not finite in the steps `bad`."""
    folder = out / f"{kind}-{spoil}-{len(bad)}"
    recipe = Recipe(
        out=str(folder), steps=steps, batch=8, micro_batch=2, non_finite_limit=3, optimizer=OPTIMIZER,
        data=DataRecipe({"pairs": SourceRecipe("", loss_weight=0.2), "web": SourceRecipe("")}),
        tracking=TrackingRecipe("disabled", log_every=1), parallel=ParallelRecipe(kind),  # type: ignore[arg-type]
    )  # fmt: skip
    if runs.group.is_main:
        folder.mkdir()
    runs.group.wait()
    state, prepared = runs.state("llama", "float32", recipe.parallel, runs.group)
    state.faults = Faults(runs.group, folder, 1.0)

    def batches() -> Iterator[BatchFeature]:
        for step in range(1, steps + 1):
            for number, batch in enumerate(runs.micro_batches("llama", 2, runs.group.rank, 2)):
                if step in bad and runs.group.rank == 1 and number == 1:
                    if spoil == "pixels":
                        batch["pixel_values"] = batch["pixel_values"] * float("nan")
                    else:
                        batch["spoilt"] = True
                yield batch

    class Spoilt(nn.Module):
        """A model whose loss is infinite where the batch says so, and its gradient is not."""

        def __init__(self) -> None:
            super().__init__()
            self.model = prepared

        def forward(self, spoilt: bool = False, **inputs: Any) -> Any:
            made = self.model(**inputs)
            if spoilt:
                made.sample_losses = made.sample_losses + torch.inf
            return made

    rows, sums = [], []

    def log(step: int, row: dict[str, float]) -> None:
        rows.append(row)
        trained = (each.detach() for each in state.model.parameters() if each.requires_grad)
        sums.append(sum(float(whole(each).double().sum()) for each in trained))

    error = None
    data: Any = SimpleNamespace(used=lambda position: {}, epochs=lambda position: {})
    progress: Any = SimpleNamespace(update=lambda *figures: None)
    nothing: Any = SimpleNamespace(save=lambda state: None, watch=lambda: None)
    tracker: Any = SimpleNamespace(log=log)
    model = Spoilt() if spoil == "loss" else prepared
    try:
        loop.run(recipe, state, model, data, batches(), nothing, tracker, progress, runs.group)
    except FlamingoError as raised:
        error = str(raised)
    written = folder / SKIPPED_FILE
    return {
        "error": error,
        "step": state.step,
        "rows": rows,
        "sums": sums,
        "written": [json.loads(line) for line in written.read_text().splitlines()] if runs.group.is_main else [],
        "moments": [float(each["step"]) for each in state.optimizer.state.values()][:1],
    }


def evaluating(runs: Runs) -> dict[str, Any]:
    """A model that is shared out, used by each process on its own, and trained on."""
    state, prepared = runs.state("llama", "float32", ParallelRecipe("fsdp"), runs.group)
    batch = runs.micro_batches("llama", 0, runs.group.rank, 1)[0]
    inputs = {name: value for name, value in batch.items() if name not in ("sources", "keys", "faults")}
    prepared(**inputs).loss.backward()
    model, processor = runs.built("llama")
    prompt = processor(documents=[document(5, 2)])
    with gathered(state.model), torch.no_grad():
        # Another number of calls in each process.
        made = [state.model.eval().generate(**prompt, max_new_tokens=3).tolist() for _ in range(1 + runs.group.rank)]
    state.model.train()
    state.optimizer.zero_grad()
    prepared(**inputs).loss.backward()
    return {"generated": made[0], "alone": model.eval().generate(**prompt, max_new_tokens=3).tolist()}


def unsynchronised(runs: Runs, kind: str) -> list[float | None]:
    """What each parameter's gradient adds up to in this process, before the last micro-batch of a step."""
    state, prepared = runs.state("llama", "float32", ParallelRecipe(kind), runs.group)  # type: ignore[arg-type]
    batch = runs.micro_batches("llama", 2, runs.group.rank, 1)[0]
    inputs = {name: value for name, value in batch.items() if name not in ("sources", "keys", "faults")}
    with without_synchronisation(prepared, skip=True):
        prepared(**inputs).loss.backward()
    trained = (each for each in state.model.parameters() if each.requires_grad)
    return [None if each.grad is None else float(each.grad.sum()) for each in trained]


def main(backbones: Path, out: Path, which: str) -> None:
    """Run all cases and write what both processes found."""
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    with processes(60) as group:
        runs = Runs(backbones, group)
        found: dict[str, Any] = {case.name: runs.compare(case) for case in CASES[which]}
        if which == "quick":
            for kind in ("ddp", "fsdp"):
                found[f"half-{kind}"] = half_precision(runs, kind)
                found[f"unsynchronised-{kind}"] = unsynchronised(runs, kind)
                for spoil, bad in (("pixels", {2}), ("loss", {2}), ("pixels", {2, 4, 5, 6})):
                    name = f"{spoil}-{len(bad)}-{kind}"
                    found[name] = not_finite(runs, kind, out, steps=8, bad=bad, spoil=spoil)
            found["evaluating"] = evaluating(runs)
        everyone = group.gather(found)
        if group.is_main:
            (out / "results.json").write_text(json.dumps(everyone))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
