"""The training loop, on one screen, and its named steps.

Legend: B rows of a micro-batch, S sources.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import BatchFeature

from data_shards.loader import MicroBatches
from flamingo.processing import IGNORED
from train.checkpoint import Checkpoints, TrainingState
from train.parallel import Processes, without_synchronisation
from train.progress import Progress
from train.recipe import Recipe
from train.tracking import Tracker


class Preemption(Protocol):
    """Who knows that this machine is wanted back (`train.preemption`)."""

    def requested(self) -> bool:
        """Whether the run is to save and end after this step; all processes ask, and get the same answer."""


class Evaluations(Protocol):
    """What is measured while training (`train.evaluations`)."""

    def run(self, step: int) -> None:
        """Measure the model after `step`; all processes call this."""


def run(
    recipe: Recipe,
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
    weights = torch.tensor([source.loss_weight for source in recipe.data.sources.values()])
    meter = Meter(processes, tuple(recipe.data.sources))
    model.train()
    for step in range(state.step + 1, recipe.steps + 1):
        micro_batches = fetch(batches, accumulation, meter, state)
        accumulate_gradients(model, micro_batches, weights, processes, meter)
        rates = {group["name"]: float(group["lr"]) for group in state.optimizer.param_groups}
        norm = update_parameters(state, recipe.optimizer.clip)
        state.step, samples = step, step * recipe.batch
        progress.update(step, meter.loss, rates["plain"], meter.rates())
        ends = preemption is not None and preemption.requested()
        logs, saves = (due(step, every, recipe.steps) for every in (recipe.tracking.log_every, recipe.save_every))
        saves |= ends
        if logs or saves:
            state.faults.settle(data.used(samples))
        if logs:
            tracker.log(step, meter.report(state, norm, rates, samples, data.epochs(samples)))
        if evaluations is not None and recipe.evaluation.every and due(step, recipe.evaluation.every, recipe.steps):
            evaluations.run(step)
        if saves:
            checkpoints.save(state)
        if ends:
            return


def due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every so many steps, and at the last, happens now."""
    return step % every == 0 or step == last


def fetch(batches: Iterator[BatchFeature], accumulation: int, meter: Meter, state: TrainingState) -> list[BatchFeature]:
    """The micro-batches of the next step: all of them, because the loss of each needs the token counts of all."""
    start = time.perf_counter()
    micro_batches = [next(batches) for _ in range(accumulation)]
    meter.waited(time.perf_counter() - start)
    for batch in micro_batches:
        state.faults.note(state.step + 1, batch.pop("faults"))
    return micro_batches


def accumulate_gradients(
    model: nn.Module, micro_batches: list[BatchFeature], weights: Tensor, processes: Processes, meter: Meter
) -> None:
    """Gradients of L = Σ over sources s of w_s · (summed negative log-likelihood of s) / (supervised tokens of s).

    The tokens are those of the whole step over all processes, counted before the first backward; DDP's average over
    processes is undone. So the gradient does not depend on how the step is cut.
    """
    tokens = torch.zeros(len(weights), device=processes.device)
    for batch in micro_batches:
        tokens.index_add_(0, batch["sources"].to(tokens.device), supervised_tokens(batch).to(tokens))
    processes.sum(tokens)
    per_token = weights.to(tokens) * processes.world / tokens.clamp(min=1)
    losses = torch.zeros_like(tokens)
    for number, batch in enumerate(micro_batches):
        sources = batch.pop("sources").to(processes.device)
        batch.pop("keys")
        inputs = batch.to(processes.device)
        with without_synchronisation(model, skip=number < len(micro_batches) - 1):
            sample_losses = model(**inputs).sample_losses
            (sample_losses * per_token[sources]).sum().backward()
        losses.index_add_(0, sources, sample_losses.detach())
        meter.saw(inputs)
    meter.count(losses, tokens, weights)


def supervised_tokens(batch: BatchFeature) -> Tensor:
    """(B,) tokens of each row that the model is asked to foretell: not the first one of a row or a packed document."""
    foretold = batch["labels"][:, 1:] != IGNORED
    if "documents" in batch:
        foretold &= batch["documents"][:, 1:] == batch["documents"][:, :-1]
    return foretold.sum(dim=1)


def update_parameters(state: TrainingState, clip: float) -> Tensor:
    """Clip, step, advance the schedule, and return the gradient's norm before clipping."""
    trained = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.clip_grad_norm_(trained, clip)
    state.optimizer.step()
    state.schedule.step()
    state.optimizer.zero_grad(set_to_none=True)
    return norm


@dataclass
class Meter:
    """Counts between two rows of the log. Sums over processes are taken when a row is due, not at every step."""

    processes: Processes
    sources: tuple[str, ...]
    loss: float = float("nan")
    """this process's share of the last step's loss, for the progress bar"""
    _losses: Tensor = field(init=False)
    _tokens: Tensor = field(init=False)
    _weights: Tensor = field(init=False)
    _seen: dict[str, float] = field(default_factory=dict)
    _started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._losses = torch.zeros(len(self.sources), device=self.processes.device)
        self._tokens = torch.zeros(len(self.sources), device=self.processes.device)
        self._seen = {"tokens": 0.0, "images": 0.0, "waited": 0.0}
        self._started = time.perf_counter()

    def waited(self, seconds: float) -> None:
        """Add time spent waiting for data."""
        self._seen["waited"] += seconds

    def saw(self, inputs: BatchFeature) -> None:
        """Add a micro-batch's tokens and images."""
        self._seen["tokens"] += int((inputs["documents" if "documents" in inputs else "attention_mask"] > 0).sum())
        self._seen["images"] += inputs["pixel_values"].shape[0] * inputs["pixel_values"].shape[1]

    def count(self, losses: Tensor, tokens: Tensor, weights: Tensor) -> None:
        """Add a step's (S,) summed losses of this process and (S,) tokens of all processes."""
        self._losses += losses
        self._tokens += tokens
        self._weights = weights.to(tokens)
        self.loss = float((self._weights * losses * self.processes.world / tokens.clamp(min=1)).sum())

    def rates(self) -> dict[str, float]:
        """Tokens and images a second over all processes, and the share of time that waited for data."""
        seconds = max(time.perf_counter() - self._started, 1e-9)
        return {
            "tokens_per_second": self._seen["tokens"] * self.processes.world / seconds,
            "images_per_second": self._seen["images"] * self.processes.world / seconds,
            "data_wait_share": self._seen["waited"] / seconds,
        }

    def report(
        self,
        state: TrainingState,
        norm: Tensor,
        learning_rates: dict[str, float],
        samples: int,
        epochs: dict[str, float],
    ) -> dict[str, float]:
        """One row of the log, over the steps since the last row; starts the next. All processes call this."""
        losses = self.processes.sum(self._losses.clone())
        mean = (losses / self._tokens.clamp(min=1)).tolist()
        row = {
            "loss": sum(float(weight) * each for weight, each in zip(self._weights, mean, strict=True)),
            **{
                f"loss/{name}": each
                for name, each, tokens in zip(self.sources, mean, self._tokens.tolist(), strict=True)
                if tokens
            },
            "gradient_norm": float(norm),
            **{f"learning_rate/{group}": rate for group, rate in learning_rates.items()},
            **{f"gate/{name}": float(value) for name, value in state.model.gates().items()},
            **self.rates(),
            **{f"epoch/{name}": each for name, each in epochs.items()},
            **state.faults.row(self.sources),
            "samples": float(samples),
        }
        self._clear()
        return row
