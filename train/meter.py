"""What a step of the loop counts, and the rows of the log that are made of it.

Legend: M micro-batches of a step of this process, S sources.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from train.checkpoint import TrainingState
from train.flops import OperationCounter, peak_flops
from train.parallel import Processes


@dataclass(frozen=True)
class Update:
    """What became of a step, the same in all processes.

    Attributes:
        loss: of the step, weighted over sources.
        tokens, images: that the model read.
        norms: of each group's gradient, before clipping; `norm`: of all of them together.
        skipped: whether loss or gradient were not finite, so that nothing changed.
    """

    loss: float
    tokens: int
    images: int
    norms: Mapping[str, float]
    norm: float
    skipped: bool


@dataclass
class Meter:
    """Counts between two rows of the log.

    What is counted in a step stays on the device: `update_parameters` reads it together with the gradient's norm, and
    the losses of sources are read when a row is due.
    """

    processes: Processes
    sources: tuple[str, ...]
    tokens: int = 0
    """read by the model since the first step, over all processes"""
    operations: OperationCounter | None = None
    """where MFU is wanted and the device's peak is known"""
    shares: Tensor = field(init=False)
    """(M,) this process's share of the last step's loss, by micro-batches"""
    seen: Tensor = field(init=False)
    """(2,) tokens and images of this process in the last step"""
    _step: tuple[Tensor, Tensor] = field(init=False)
    _losses: Tensor = field(init=False)
    _tokens: Tensor = field(init=False)
    _sums: dict[str, float] = field(init=False)
    _began: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._losses, self._tokens = torch.zeros(2, len(self.sources), dtype=torch.float64)
        self._sums = dict.fromkeys(("seconds", "waited", "tokens", "images", "operations"), 0.0)

    @property
    def loss(self) -> Tensor:
        """() this process's share of the last step's loss; the shares add up to it."""
        return self.shares.sum()

    def begin(self) -> None:
        """Start the clock of a step."""
        self._began = time.perf_counter()

    def fetched(self) -> None:
        """Note that the step's data are here: the time so far was spent waiting for them."""
        self._sums["waited"] += time.perf_counter() - self._began

    def saw(self, micro_batches: Iterable[Mapping[str, Any]]) -> None:
        """Count a step's tokens and images."""
        tokens, images = torch.zeros((), device=self.processes.device), 0
        for inputs in micro_batches:
            tokens = tokens + (inputs["documents" if "documents" in inputs else "attention_mask"] > 0).sum()
            images += inputs["pixel_values"].shape[0] * inputs["pixel_values"].shape[1]
            if self.operations is not None:
                self._sums["operations"] += self.operations(inputs)
        self.seen = torch.stack([tokens, torch.full_like(tokens, images)])

    def count(self, losses: Tensor, tokens: Tensor, shares: Tensor) -> None:
        """Note a step's (S,) summed losses of this process, (S,) tokens of all processes and (M,) shares."""
        self._step, self.shares = (losses, tokens), shares

    def end(self, update: Update) -> None:
        """Add the step to the row, its losses only if it was not skipped."""
        self._sums["seconds"] += time.perf_counter() - self._began
        self._sums["tokens"] += update.tokens
        self._sums["images"] += update.images
        self.tokens += update.tokens
        if not update.skipped:
            self._losses, self._tokens = (
                sums.to(each) + each for sums, each in zip((self._losses, self._tokens), self._step, strict=True)
            )

    def rates(self) -> dict[str, float]:
        """Tokens and images a second over all processes, and the share of time that waited for data, in steps alone.

        What stands between steps, evaluation and checkpoints, is not in them.
        """
        seconds = max(self._sums["seconds"], 1e-9)
        rates = {
            "tokens_per_second": self._sums["tokens"] / seconds,
            "images_per_second": self._sums["images"] / seconds,
            "data_wait_share": self._sums["waited"] / seconds,
        }
        if self.operations is not None and (peak := peak_flops(self.processes.device)) is not None:
            rates["mfu"] = self._sums["operations"] / seconds / peak
        return rates

    def report(self, state: TrainingState, update: Update, weights: Sequence[float]) -> dict[str, float]:
        """The columns of a row that are measured, over the steps since the last row; starts the next.

        All processes call this.

        Args:
            weights: of the sources' losses.
        """
        losses = self.processes.sum(self._losses.to(self.processes.device))
        tokens = self._tokens.tolist()
        found = {
            name: (weight, loss / count)
            for name, weight, loss, count in zip(self.sources, weights, losses.tolist(), tokens, strict=True)
            if count
        }
        row = {
            "loss": sum(weight * mean for weight, mean in found.values()) if found else float("nan"),
            **{f"loss/{name}": mean for name, (_, mean) in found.items()},
            "gradient_norm": update.norm,
            **{f"gradient_norm/{group}": norm for group, norm in update.norms.items()},
            **{f"gate/{name}": float(value) for name, value in state.model.gates().items()},
            **self.rates(),
            "memory_gb": self.processes.most(peak_memory(self.processes.device) / 1e9),
            "tokens": float(self.tokens),
        }
        self._clear()
        return row


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU since the last call; on a CPU, that the process ever took."""
    if device.type == "cuda":
        most = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return most
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
