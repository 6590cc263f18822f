"""Steps whose loss or gradient is not finite: all processes skip them together, and say which samples they were."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from flamingo.errors import FlamingoError
from train.parallel import Processes
from train.tracking import drop_rows_after

SKIPPED_FILE = "skipped.jsonl"


@dataclass
class Skipped:
    """The skipped steps of a run.

    Args:
        processes: of the run.
        folder: of the run; its `skipped.jsonl` gets a line a micro-batch of each skipped step, from the main process.
        limit: steps in a row after which the run ends.
        steps: how many were skipped so far, as the main process knows.
    """

    processes: Processes
    folder: Path
    limit: int
    steps: int = 0
    _in_a_row: int = 0

    def resume(self, step: int) -> None:
        """Go on after `step`; what was written down of later steps comes again."""
        if self.processes.is_main:
            self.steps = len({row["step"] for row in drop_rows_after(self.folder / SKIPPED_FILE, step)})

    def note(self, step: int, skipped: bool, losses: Tensor, keys: Sequence[Sequence[str]]) -> None:
        """Note a step; of a skipped one, write down the samples. All processes call this, and agree on `skipped`.

        Args:
            losses: (M,) this process's share of the loss, by micro-batches.
            keys: of the samples in each of them.

        Raises:
            FlamingoError: in all processes, where so many steps in a row were skipped as there may be.
        """
        if not skipped:
            self._in_a_row = 0
            return
        own = [
            {
                "step": step,
                "rank": self.processes.rank,
                "loss": loss if math.isfinite(loss) else None,
                "keys": list(micro_batch),
            }
            for loss, micro_batch in zip(losses.tolist(), keys, strict=True)
        ]
        everyone = self.processes.gather(own)
        path = self.folder / SKIPPED_FILE
        if self.processes.is_main:
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for rows in everyone for row in rows)
        self.steps += 1
        self._in_a_row += 1
        if self._in_a_row >= self.limit:
            raise FlamingoError(
                f"step {step}: loss or gradient were not finite in {self._in_a_row} steps in a row "
                f"(non_finite_limit={self.limit}); {path} names their samples, loss null where it was theirs"
            )
