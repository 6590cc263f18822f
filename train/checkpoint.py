"""Training states: written beside the training, whole or not at all, and resumed from the newest good one.

A checkpoint is a folder `checkpoints/step-000500` of torch.distributed.checkpoint with what trains, the optimizer and
the schedule, and `run.json`: the step, the faults so far, the recipe, the commit, the identity of what the run reads,
and size and SHA-256 of every file. It is written under another name, `run.json` last, and renamed when it is complete.
The data need no state of their own: their position is the step.

Tensors are saved by name, whatever holds them: DDP, FSDP2 or one process, and any number of processes, resume them all.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from flamingo import FlamingoForConditionalGeneration
from flamingo.errors import FlamingoError
from flamingo.files import sha256
from flamingo.trained import PARTS
from train.faults import Faults
from train.parallel import Processes

logger = logging.getLogger(__name__)

ALONE = "torch.distributed is disabled"
"""How a warning begins that one process needs no group."""
warnings.filterwarnings("ignore", message=ALONE)  # here, because writers are threads, which share all filters

FOLDER = "checkpoints"
RECORD = "run.json"
"""The mark of a complete checkpoint: the last file that is written."""
PREEMPTED = "PREEMPTED"
"""In `checkpoints` where a run was interrupted and saved, until it goes on."""
_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)
_LAST_SECONDS = 20.0
"""How long a run that ends in an error waits for a checkpoint that is being written."""


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
        """What trains, Flamingo's own frozen rows, and the optimizer, as torch.distributed.checkpoint saves them."""
        trained, optimizer = get_state_dict(self.model, self.optimizer, options=_TRAINED)
        model = own_tensors(self.model) | trained
        return {"model": model, "optimizer": optimizer, "schedule": self.schedule.state_dict()}

    def load(self, tensors: dict[str, Any]) -> None:
        """The inverse of `tensors`."""
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=tensors["model"],
            optim_state_dict=tensors["optimizer"],
            options=_TRAINED,
        )
        self.schedule.load_state_dict(tensors["schedule"])


def own_tensors(model: FlamingoForConditionalGeneration) -> dict[str, Any]:
    """Name → tensor of what Flamingo adds to its backbones, frozen or not."""
    tensors = get_model_state_dict(model)
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(tuple(PARTS.values()))}


@dataclass
class Checkpoints:
    """The checkpoints of one run. All processes make one, and call each of its methods together.

    While one is written, in a thread of its own, training goes on; there is one at a time. As a context manager it
    waits at the end for the last.

    Args:
        folder: of the run; they are in its `checkpoints`.
        identity: what must be equal for a resumed run to be the same run: data, tokenizer, seed, batch, model.
        keep: how many of the newest stay.
        keep_every: those of every so many steps stay too; 0: none.
        about: what else `run.json` says: recipe, commit.
    """

    folder: Path
    identity: dict[str, Any]
    processes: Processes
    keep: int = 2
    keep_every: int = 0
    about: Mapping[str, Any] = field(default_factory=dict)
    _writer: _Writer | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        # The writers talk among themselves: a group of its own keeps their words apart from the training's. It does not
        # take the other group's timeout over.
        self._group = (
            dist.new_group(backend="gloo", timeout=self.processes.timeout) if self.processes.world > 1 else None
        )
        self._stager = BlockingAsyncStager(cache_staged_state_dict=self.processes.device.type == "cuda")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None:
            self.finish()
        elif self._writer is not None:  # others may be gone: no word with them
            self._writer.join(_LAST_SECONDS)
            if self._writer.fault or self._writer.is_alive():
                logger.warning("%s was not written: %s", self._writer.path, self._writer.fault or "took too long")

    # -- writing -------------------------------------------------------------------------------------------------------

    def save(self, state: TrainingState) -> None:
        """Begin to write a checkpoint of `state.step`, as it is now.

        Raises:
            FlamingoError: in all processes, where the one before could not be written.
        """
        self.finish()
        tensors = self._stager.stage(state.tensors())
        record = {"step": state.step, "run_id": state.run_id, "faults": state.faults.state()}
        record |= {"identity": self.identity, "processes": self.processes.world, **self.about}
        self._writer = _Writer(path_of(self.folder, state.step), tensors, json.dumps(record, indent=1), self)
        self._writer.start()

    def watch(self) -> None:
        """Look, at the end of a step, whether a save has failed. It costs next to nothing while none is under way.

        Raises:
            FlamingoError: in all processes, where it has; it names the path and the reason, and the last good one.
        """
        if self._writer is None:
            return
        alive = self._writer.is_alive()  # first: a writer notes its fault before it ends
        failed = self._writer.fault is not None
        running, faults = self.processes.sum(
            torch.tensor([int(alive), int(failed)], device=self.processes.device)
        ).tolist()
        if faults:
            writer = self._writer
            writer.join()
            raise FlamingoError(self._explain(writer))
        if not running:
            self._writer = None

    def finish(self) -> None:
        """Wait until what is being written is there.

        Raises:
            FlamingoError: as `watch`.
        """
        if self._writer is not None:
            self._writer.join()
        self.watch()

    def _explain(self, writer: _Writer) -> str:
        """Why a checkpoint was not written: the same words in all processes."""
        self._writer = None
        fault = next(fault for fault in self._all_said(writer.fault) if fault)
        newest = self.newest()
        last = f"the last good one is {newest.name}, from which the run can go on" if newest else "there is none before"
        return f"{writer.path}: this checkpoint could not be written: {fault}; {last}"

    def _all_said(self, own: str | None) -> list[str | None]:
        """What each process has to say."""
        said: list[str | None] = [own] * self.processes.world
        if self.processes.world > 1:
            dist.all_gather_object(said, own, group=self._group)
        return said

    def _write(self, path: Path, tensors: dict[str, Any], record: str) -> None:
        """In the writer's thread: write all files, then the mark, then take the name, then remove what is old."""
        unfinished = being_written(path)
        dcp.save(tensors, storage_writer=_Files(unfinished), process_group=self._group, no_dist=self._group is None)
        files = self._seal_all(unfinished)
        if self.processes.is_main:
            _write_durably(unfinished / RECORD, json.dumps(json.loads(record) | {"files": files}, indent=1) + "\n")
            _discard(path)
            os.replace(unfinished, path)
            _sync(path.parent)
            self._remove_old(path)

    def _seal_all(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Size and SHA-256 of all files; each process reads what it wrote.

        Raises:
            FlamingoError: in all processes, where a process cannot read what it wrote, or the main one does not see it.
        """
        rank = self.processes.rank
        try:
            names = [f"__{rank}_*", *([".metadata"] if rank == 0 else [])]
            own = {path.name: _seal(path) for name in names for path in sorted(folder.glob(name))}
            said = json.dumps({"files": own})
        except OSError as error:
            said = json.dumps({"fault": _reason(error)})
        files: dict[str, dict[str, Any]] = {}
        for each in (json.loads(words or "{}") for words in self._all_said(said)):
            if "fault" in each:
                raise FlamingoError(each["fault"])
            files |= each.get("files", {})
        if self.processes.is_main and (unseen := [name for name in files if not (folder / name).exists()]):
            raise FlamingoError(f"{unseen[0]} of another process is not there; expected a folder that all hosts share")
        return files

    def _remove_old(self, newest: Path) -> None:
        """Keep what is to be kept of the complete ones up to the newest."""
        complete = [path for path in complete_checkpoints(self.folder) if step_of(path) <= step_of(newest)]
        for path in complete[: -self.keep]:
            if not (self.keep_every and step_of(path) % self.keep_every == 0):
                _discard(path)

    # -- reading -------------------------------------------------------------------------------------------------------

    def newest(self) -> Path | None:
        """The newest complete checkpoint."""
        return next(reversed(complete_checkpoints(self.folder)), None)

    def resume(self, state: TrainingState, *, anyway: bool = False) -> bool:
        """Load the newest good checkpoint into `state`, where there is one; say which damaged ones are passed over.

        Raises:
            FlamingoError: where data or recipe differ from the checkpoint's and `anyway` is not set; where there are
                checkpoints and none is good; it names each with its fault.
        """
        path = self._newest_good()
        if path is None:
            state.faults.resume(0, {})
            return False
        record = read_record(path)
        self._compare(path, record["identity"], anyway)
        tensors = state.tensors()
        load(tensors, path, self._group)
        state.load(tensors)
        state.step, state.run_id = int(record["step"]), record.get("run_id")
        state.faults.resume(state.step, record.get("faults", {}))
        return True

    def _newest_good(self) -> Path | None:
        """The newest checkpoint in which no process finds a fault; what a save left unfinished is removed."""
        if self.processes.is_main:
            for left in (self.folder / FOLDER).glob(".step-*"):
                shutil.rmtree(left)
            (self.folder / FOLDER / PREEMPTED).unlink(missing_ok=True)
        self.processes.wait()
        faults = {}
        for path in reversed(all_checkpoints(self.folder)):
            own = fault_of(path, rank=self.processes.rank, world=self.processes.world)
            fault = next((said for said in self._all_said(own) if said), None)
            if fault is None:
                break
            faults[path.name] = fault
        else:
            path = None
        said = "; ".join(f"{name}: {fault}" for name, fault in faults.items())
        if path is None and faults:
            raise FlamingoError(f"{self.folder / FOLDER}: no checkpoint is good ({said}); move it away to begin anew")
        if faults and self.processes.is_main:
            logger.warning("%s: damaged checkpoints are passed over (%s)", self.folder / FOLDER, said)
        return path

    def _compare(self, path: Path, saved: dict[str, Any], anyway: bool) -> None:
        """Stop where another run is to go on from here."""
        own = self.identity
        different = [key for key in sorted(saved.keys() | own.keys()) if saved.get(key) != own.get(key)]
        if different and not anyway:
            key = different[0]
            raise FlamingoError(
                f"{path}: {key} was {saved.get(key)}, now {own.get(key)}; give another --out, or --resume_anyway true"
            )


class _Files(FileSystemWriter):
    """Files that say why they cannot be written: torch.save covers a full disk with an error of its own zip format."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """As the base class.

        Raises:
            OSError: what the system said first, if it said anything.
        """
        try:
            return super().write_data(plan, planner)
        except Exception as error:  # noqa: BLE001 - it is raised again, or what caused it
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise cause or error from None


class _Writer(threading.Thread):
    """Writes one checkpoint. A daemon: where another process is gone for good, this one must be able to end."""

    def __init__(self, path: Path, tensors: Any, record: str, checkpoints: Checkpoints):
        super().__init__(name=f"writes {path.name}", daemon=True)
        self.path = path
        self.fault: str | None = None
        self._job = (path, tensors, record)
        self._checkpoints = checkpoints

    def run(self) -> None:
        """Write; what goes wrong is noted for `Checkpoints.watch`, and what was written so far is removed."""
        try:
            self._checkpoints._write(*self._job)
        except BaseException as error:  # noqa: BLE001 - it is raised again in the main thread, in all processes
            self.fault = _reason(error)
            if self._checkpoints.processes.is_main:
                shutil.rmtree(being_written(self.path), ignore_errors=True)  # a full disk gets its room back
        finally:
            del self._job


def all_checkpoints(folder: Path) -> list[Path]:
    """All checkpoints of a run's folder by step, damaged ones among them."""
    found = (path for path in (folder / FOLDER).glob("step-*") if path.name.removeprefix("step-").isdigit())
    return sorted(found, key=step_of)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Those of a run's folder that have their mark, by step."""
    return [path for path in all_checkpoints(folder) if (path / RECORD).exists()]


def path_of(folder: Path, step: int) -> Path:
    """The checkpoint of a step, in a run's folder."""
    return folder / FOLDER / f"step-{step:06d}"


def being_written(path: Path) -> Path:
    """The name that a checkpoint has until it is complete."""
    return path.with_name(f".{path.name}.unfinished")


def step_of(path: Path) -> int:
    """The step of a checkpoint, from its name."""
    return int(path.name.removeprefix("step-"))


def newest_record(folder: Path) -> dict[str, Any]:
    """The `run.json` of the newest complete checkpoint of a run's folder.

    Raises:
        FlamingoError: where there is none.
    """
    complete = complete_checkpoints(folder)
    if not complete:
        raise FlamingoError(f"{folder / FOLDER}: expected a checkpoint")
    return read_record(complete[-1])


def fault_of(path: Path, *, rank: int = 0, world: int = 1) -> str | None:
    """What is wrong with a checkpoint, if anything; of `world` readers each reads its share of the files."""
    try:
        files = read_record(path)["files"]
    except FlamingoError as error:
        return str(error)
    for name in sorted(files)[rank::world]:
        try:
            found = _seal(path / name)
        except OSError as error:
            return f"{name}: {_reason(error)}"
        if found != files[name]:
            parts = [
                f"{key} {found[key]}, expected {files[name][key]}" for key in found if found[key] != files[name][key]
            ]
            return f"{name} has {parts[0]}"
    return None


def read_record(path: Path) -> dict[str, Any]:
    """The `run.json` of a checkpoint.

    Raises:
        FlamingoError: where it is missing, or is not what this module writes.
    """
    file = path / RECORD
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if not {"step", "identity", "files"} <= record.keys():
            raise ValueError("a part is missing")
    except FileNotFoundError:
        raise FlamingoError(f"{file} is missing: the checkpoint was never completed") from None
    except (OSError, ValueError, AttributeError) as error:
        raise FlamingoError(f"{file}: expected step, identity and files of a checkpoint ({error})") from error
    return record


def load(tensors: dict[str, Any], path: Path, group: dist.ProcessGroup | None = None) -> None:
    """Fill `tensors` in place from a checkpoint that any number of processes wrote.

    Raises:
        FlamingoError: where it cannot be read, or a tensor is missing or of another shape.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=ALONE)
            dcp.load(tensors, checkpoint_id=path, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        raise FlamingoError(f"{path}: cannot be loaded: {_reason(error)}") from error


def load_model(model: FlamingoForConditionalGeneration, path: Path) -> None:
    """Put what a checkpoint trained into a model over the same backbones.

    Raises:
        FlamingoError: as `load`.
    """
    tensors = own_tensors(model) | get_model_state_dict(model, options=_TRAINED)
    load({"model": tensors}, path)
    set_model_state_dict(model, tensors, options=StateDictOptions(strict=False))


def _discard(path: Path) -> None:
    """Remove a checkpoint under another name, so that half of one never stands under its own."""
    if path.exists():
        gone = path.with_name(f".{path.name}.removed")
        os.replace(path, gone)
        shutil.rmtree(gone)


def _seal(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    _sync(path.parent)


def _sync(folder: Path) -> None:
    """Names too are to survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: BaseException) -> str:
    """One line: of what failed in several processes, the first."""
    if isinstance(error, CheckpointException):
        rank, (cause, _) = min(error.failures.items())
        return f"process {rank}: {_reason(cause)}"
    if isinstance(error, FlamingoError):
        return str(error)
    return " ".join(f"{type(error).__name__}: {error}".split())
