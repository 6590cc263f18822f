"""Training states: written whole or not at all, resumed from the newest.

A checkpoint is a folder `checkpoints/step-000500` of torch.distributed.checkpoint with what trains, the optimizer and
the schedule, and `run.json` with the step, the faults so far and the identity of what the run reads. It is written
under another name and renamed when it is complete. The data need no state of their own: their position is the step.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from flamingo import FlamingoForConditionalGeneration
from flamingo.errors import FlamingoError
from train.faults import Faults
from train.parallel import Processes

OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)


@dataclass
class TrainingState:
    """What a checkpoint holds."""

    model: FlamingoForConditionalGeneration
    optimizer: AdamW
    schedule: LambdaLR
    faults: Faults
    step: int = 0
    run_id: str | None = None
    """the tracker's, so that a resumed run goes on in the same curves"""

    def tensors(self) -> dict[str, Any]:
        """Trained parameters and optimizer, as torch.distributed.checkpoint saves them."""
        model, optimizer = get_state_dict(self.model, self.optimizer, options=OPTIONS)
        return {"model": model, "optimizer": optimizer, "schedule": self.schedule.state_dict()}

    def load(self, tensors: dict[str, Any]) -> None:
        """The inverse of `tensors`."""
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=tensors["model"],
            optim_state_dict=tensors["optimizer"],
            options=OPTIONS,
        )
        self.schedule.load_state_dict(tensors["schedule"])


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: of the run; they are in its `checkpoints`.
        identity: what must be equal for a resumed run to be the same run: data, tokenizer, seed, batch, model.
        keep: how many of the newest stay.
    """

    folder: Path
    identity: dict[str, Any]
    processes: Processes
    keep: int = 2

    @staticmethod
    @contextmanager
    def _quiet() -> Iterator[None]:
        """Without torch's warning that a single process needs no process group."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield

    def newest(self) -> Path | None:
        """The newest complete checkpoint."""
        complete = [path for path in self._all() if (path / "run.json").exists()]
        return complete[-1] if complete else None

    def _all(self) -> list[Path]:
        """All checkpoints by step."""
        return sorted((self.folder / "checkpoints").glob("step-*"), key=lambda path: int(path.name.partition("-")[2]))

    def save(self, state: TrainingState) -> None:
        """Write a checkpoint of `state.step`; all processes call this."""
        path = self.folder / "checkpoints" / f"step-{state.step:06d}"
        unfinished = path.with_name(f".{path.name}.unfinished")
        if self.processes.is_main:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.processes.wait()
        with self._quiet():
            dcp.save(state.tensors(), checkpoint_id=unfinished, no_dist=self.processes.world == 1)
        if self.processes.is_main:
            record = {
                "step": state.step,
                "run_id": state.run_id,
                "faults": state.faults.state(),
                "identity": self.identity,
            }
            (unfinished / "run.json").write_text(json.dumps(record, indent=1) + "\n")
            shutil.rmtree(path, ignore_errors=True)
            os.replace(unfinished, path)
            for old in self._all()[: -self.keep]:
                shutil.rmtree(old)
        self.processes.wait()

    def resume(self, state: TrainingState, *, anyway: bool = False) -> bool:
        """Load the newest checkpoint into `state`, where there is one.

        Raises:
            FlamingoError: where data or recipe differ from the checkpoint's and `anyway` is not set.
        """
        path = self.newest()
        if path is None:
            state.faults.resume(0, {})
            return False
        try:
            record = json.loads((path / "run.json").read_text())
            step, saved = int(record["step"]), dict(record["identity"])
        except (ValueError, KeyError, TypeError) as error:
            raise FlamingoError(f"{path / 'run.json'}: expected step and identity of a checkpoint") from error
        different = [
            key for key in sorted(saved.keys() | self.identity.keys()) if saved.get(key) != self.identity.get(key)
        ]
        if different and not anyway:
            key = different[0]
            raise FlamingoError(
                f"{path}: {key} was {saved.get(key)}, now {self.identity.get(key)}; "
                "give another --out, or --resume_anyway true"
            )
        tensors = state.tensors()
        with self._quiet():
            dcp.load(tensors, checkpoint_id=path, no_dist=self.processes.world == 1)
        state.load(tensors)
        state.step, state.run_id = step, record.get("run_id")
        state.faults.resume(step, record.get("faults", {}))
        return True
