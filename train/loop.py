"""The training loop, on one screen, and its named steps.

Legend: B rows of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BatchFeature

from data_shards.loader import MicroBatches
from flamingo.processing import IGNORED
from train.checkpoint import Checkpoints, TrainingState
from train.flops import OperationCounter, peak_flops
from train.memory import announce
from train.meter import Meter, Update
from train.optim import clip_gradients, squared_norms
from train.parallel import Processes, without_synchronisation
from train.progress import Progress
from train.recipe import Run
from train.skipped import Skipped
from train.tracking import METRICS_FILE, Tracker, read_rows

NO_INPUTS = ("sources", "keys")
"""What a batch holds beside the model's arguments."""


class Preemption(Protocol):
    """Who knows that this machine is wanted back (`train.preemption`)."""

    def requested(self) -> bool:
        """Whether the run is to save and end after this step; all processes ask, and get the same answer."""


class Evaluations(Protocol):
    """What is measured while training (`train.evaluations`)."""

    def run(self, step: int) -> None:
        """Measure the model after `step`; all processes call this."""


def run(
    recipe: Run,
    state: TrainingState,
    model: nn.Module,
    data: MicroBatches,
    batches: Iterator[BatchFeature],
    checkpoints: Checkpoints,
    tracker: Tracker,
    progress: Progress,
    processes: Processes,
    *,
    preemption: Preemption | None = None,
    evaluations: Evaluations | None = None,
) -> None:
    """Train from `state.step` to the last step, or until the machine is wanted back.

    Args:
        model: `state.model` as `parallel.prepare` returned it.
        batches: this rank's.
        preemption: where it asks for the end, the state is saved and this returns before the last step.
        evaluations: run every `recipe.evaluation.every` steps.
    """
    accumulation = recipe.batch // (recipe.micro_batch * processes.world)
    weights = [source.loss_weight for source in recipe.data.sources.values()]
    meter = start_meter(recipe, state, processes)
    skipped = Skipped(processes, Path(recipe.out), recipe.non_finite_limit)
    skipped.resume(state.step)
    announce(state.model, recipe, processes)
    model.train()
    for step in range(state.step + 1, recipe.steps + 1):
        micro_batches = fetch(batches, accumulation, meter, state)
        draw_anew(recipe.seed, step, processes.rank)  # now: a loader that begins draws a number too
        accumulate_gradients(model, micro_batches, torch.tensor(weights), processes, meter)
        rates = {group["name"]: float(group["lr"]) for group in state.optimizer.param_groups}
        update = update_parameters(state, meter, recipe.optimizer.clip, processes)
        meter.end(update)
        skipped.note(step, update.skipped, meter.shares, [batch["keys"] for batch in micro_batches])
        state.step, samples = step, step * recipe.batch
        progress.update(step, update.loss, rates["plain"], meter.rates())
        checkpoints.watch()
        ends = preemption is not None and preemption.requested()
        saves = ends or due(step, recipe.save_every, recipe.steps)
        if saves or due(step, recipe.tracking.log_every, recipe.steps):
            state.faults.settle(data.used(samples))
            row = meter.report(state, update, weights)
            row |= {f"learning_rate/{group}": rate for group, rate in rates.items()}
            row |= {f"samples/{name}": float(used) for name, used in data.used(samples).items()}
            row |= {f"epoch/{name}": epochs for name, epochs in data.epochs(samples).items()}
            row |= state.faults.row(recipe.data.sources)
            tracker.log(step, {**row, "skipped_steps": float(skipped.steps), "samples": float(samples)})
        if evaluations is not None and not ends and due(step, recipe.evaluation.every, recipe.steps):
            evaluations.run(step)
        if saves:
            checkpoints.save(state)
        if ends:
            return


def due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every so many steps, and at the last, happens now; 0: never."""
    return every > 0 and (step % every == 0 or step == last)


def start_meter(recipe: Run, state: TrainingState, processes: Processes) -> Meter:
    """A meter that goes on from the last row of the log: there is one at every step that has a checkpoint."""
    counts = OperationCounter(state.model) if peak_flops(processes.device) is not None else None
    rows = read_rows(Path(recipe.out) / METRICS_FILE) if state.step else []
    tokens = max((row.get("tokens") or 0 for row in rows if row["step"] <= state.step), default=0)
    return Meter(processes, tuple(recipe.data.sources), int(tokens), counts)


def draw_anew(seed: int, step: int, rank: int) -> None:
    """Seed torch for a step, so that dropout does not depend on what was drawn before a restart."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))


def fetch(batches: Iterator[BatchFeature], accumulation: int, meter: Meter, state: TrainingState) -> list[BatchFeature]:
    """The micro-batches of the next step: all of them, because the loss of each needs the token counts of all."""
    meter.begin()
    micro_batches = [next(batches) for _ in range(accumulation)]
    meter.fetched()
    for batch in micro_batches:
        state.faults.note(state.step + 1, batch.pop("faults"))
    return micro_batches


def accumulate_gradients(
    model: nn.Module, micro_batches: list[BatchFeature], weights: Tensor, processes: Processes, meter: Meter
) -> None:
    """Gradients of L = Σ over sources s of w_s · (summed negative log-likelihood of s) / (supervised tokens of s).

    The tokens are those of the whole step over all processes, counted before the first backward; the average over
    processes that DDP and FSDP2 take is undone. So the gradient does not depend on how the step is cut.
    """
    meter.saw(micro_batches)
    tokens = torch.zeros(len(weights), dtype=torch.float64, device=processes.device)
    for batch in micro_batches:
        tokens.index_add_(0, batch["sources"].to(tokens.device), supervised_tokens(batch).to(tokens))
    per_token = weights.to(tokens) / processes.sum(tokens).clamp(min=1)
    losses, shares = torch.zeros_like(tokens), []
    for number, batch in enumerate(micro_batches):
        inputs = BatchFeature({name: value for name, value in batch.items() if name not in NO_INPUTS})
        sources = batch["sources"].to(processes.device)
        with without_synchronisation(model, skip=number < len(micro_batches) - 1):
            sample_losses = model(**inputs.to(processes.device)).sample_losses
            share = (sample_losses * per_token[sources].to(sample_losses)).sum()
            (share * processes.world).backward()
        losses.index_add_(0, sources, sample_losses.detach().to(losses))
        shares.append(share.detach())
    meter.count(losses, tokens, torch.stack(shares))


def supervised_tokens(batch: BatchFeature) -> Tensor:
    """(B,) tokens of each row that the model is asked to foretell: not the first one of a row or a packed document."""
    foretold = batch["labels"][:, 1:] != IGNORED
    if "documents" in batch:
        foretold &= batch["documents"][:, 1:] == batch["documents"][:, :-1]
    return foretold.sum(dim=1)


def update_parameters(state: TrainingState, meter: Meter, clip: float, processes: Processes) -> Update:
    """Clip by the global norm and step, unless loss or gradient are not finite; the schedule goes on in any case.

    All processes decide alike: what they decide on is added up over them, and read from the device at once.
    """
    optimizer = state.optimizer
    own = torch.cat([meter.loss[None], meter.seen, squared_norms(optimizer, processes.world).to(meter.seen.device)])
    loss, tokens, images, *squares = processes.sum(own.double()).tolist()
    norm, finite = math.sqrt(sum(squares)), all(map(math.isfinite, (loss, *squares)))
    if finite:
        clip_gradients(optimizer, clip, norm)
        optimizer.step()
    state.schedule.step()
    optimizer.zero_grad(set_to_none=True)
    names = (group["name"] for group in optimizer.param_groups)
    norms = dict(zip(names, map(math.sqrt, squares), strict=True))
    return Update(loss, int(tokens), int(images), norms, norm, skipped=not finite)
