"""Checkpoints: beside the training, whole or absent, the newest good one, any number of processes, full disks."""

from __future__ import annotations

import ctypes
import errno
import json
import logging
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from flamingo import FlamingoError
from tests.train.runs import STEPS, at_step, forked, losses, recipe_of, saved, stop
from train import checkpoint
from train.checkpoint import Checkpoints, TrainingState, fault_of, read_record
from train.faults import Faults
from train.parallel import Processes
from train.pretrain import pretrain
from train.recipe import ParallelRecipe, Recipe

LONGER = 24
"""steps of a run whose number of processes changes after four: twenty more are compared"""


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """An uninterrupted run, all of whose checkpoints stay."""
    out = folder / "whole"
    pretrain(recipe_of(folder, out, keep_checkpoints=1, keep_every=4), Processes())
    return out


@pytest.fixture(scope="module")
def longer(folder: Path) -> Path:
    """An uninterrupted run of twice the steps."""
    out = folder / "longer"
    pretrain(recipe_of(folder, out, steps=LONGER), Processes())
    return out


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    """The uninterrupted run, to be damaged; without its model, so that starting it again would go on."""
    return Path(shutil.copytree(whole, tmp_path / "run", ignore=shutil.ignore_patterns("model")))


def small_state(folder: Path) -> TrainingState:
    """A state of one parameter, for what does not depend on the model."""
    model = nn.Linear(3, 1)
    optimizer = AdamW(model.parameters())
    schedule = LambdaLR(optimizer, lambda _: 1.0)
    return TrainingState(model, optimizer, schedule, Faults(Processes(), folder, 1.0))  # type: ignore[arg-type]


def test_a_checkpoint_says_what_it_is(whole: Path, folder: Path) -> None:
    """Catches a state of which nobody can say later which code, recipe, data or backbones made it."""
    record = read_record(whole / "checkpoints" / "step-000012")
    assert record["step"] == STEPS and record["recipe"] == json.loads(
        json.dumps(recipe_of(folder, whole, keep_checkpoints=1, keep_every=4).as_dict())
    )
    assert record["made_by"].keys() >= {"commit", "versions"} and "torch" in record["made_by"]["versions"]
    assert set(record["identity"]["backbones"]) == {"vision", "language"} and record["identity"]["tokenizer"]
    assert record["identity"]["sources"].keys() == {"pairs", "pages"} == record["documents"].keys()
    assert record["faults"] == {"counts": {}, "examples": []} and record["processes"] == 1
    assert set(record["files"]) == {".metadata", "__0_0.distcp"}


def test_the_newest_and_every_nth_stay(whole: Path, folder: Path, tmp_path: Path) -> None:
    """Catches a disk that fills with checkpoints, and milestones that are removed."""
    assert saved(whole) == [4, 8, 12]
    pretrain(recipe_of(folder, tmp_path, save_every=2, keep_checkpoints=2, keep_every=6), Processes())
    assert saved(tmp_path) == [6, 10, 12]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        f"step-{step:06d}" for step in (6, 10, 12)
    ]


def remove_tensors(path: Path) -> None:
    (path / "__0_0.distcp").unlink()


def cut_tensors(path: Path) -> None:
    file = path / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    data = bytearray((path / "__0_0.distcp").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "__0_0.distcp").write_bytes(data)


def remove_record(path: Path) -> None:
    (path / "run.json").unlink()


def cut_record(path: Path) -> None:
    text = (path / "run.json").read_text()
    (path / "run.json").write_text(text[: len(text) // 2])


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (remove_tensors, "__0_0.distcp: FileNotFoundError"),
    (cut_tensors, "__0_0.distcp has bytes"),
    (flip_a_bit, "__0_0.distcp has sha256"),
    (remove_record, "run.json is missing: the checkpoint was never completed"),
    (cut_record, "run.json: expected step, identity and files"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
def test_a_damaged_checkpoint_is_passed_over_aloud(
    copied: Path, whole: Path, folder: Path, damage: Callable[[Path], None], reason: str, caplog: Any
) -> None:
    """Catches a run that resumes from garbage, or that silently loses steps."""
    damage(copied / "checkpoints" / "step-000012")
    assert reason in str(fault_of(copied / "checkpoints" / "step-000012"))
    with caplog.at_level(logging.WARNING, logger="train.checkpoint"):
        pretrain(recipe_of(folder, copied), Processes())
    (message,) = caplog.messages
    assert "step-000012: " in message and reason in message and "step-000008" not in message
    assert losses(copied) == losses(whole)
    assert fault_of(copied / "checkpoints" / "step-000012") is None, "replaced by a good one"


def test_no_good_checkpoint_is_an_error(copied: Path, folder: Path) -> None:
    """Catches a run of a week that begins anew because its disk has a fault."""
    for step, (damage, _) in zip((4, 8, 12), DAMAGES, strict=False):
        damage(copied / "checkpoints" / f"step-{step:06d}")
    with pytest.raises(FlamingoError, match=r"no checkpoint is good .*step-000012: .*step-000008: .*step-000004: "):
        pretrain(recipe_of(folder, copied), Processes())


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a save that blocks, tensors that change while they are written, and two saves at once."""
    may_write, writing, save = threading.Event(), [], dcp.save

    def waits(*arguments: Any, **named: Any) -> Any:
        writing.append(1)
        assert len(writing) == 1, "one at a time"
        assert may_write.wait(20)
        result = save(*arguments, **named)
        writing.pop()
        return result

    monkeypatch.setattr(checkpoint.dcp, "save", waits)
    state = small_state(tmp_path)
    weight = state.model.weight  # type: ignore[union-attr]
    with Checkpoints(tmp_path, {}, Processes()) as checkpoints, torch.no_grad():
        weight.fill_(1)
        state.step = 1
        checkpoints.save(state)
        weight.fill_(2)
        checkpoints.watch()
        assert saved(tmp_path) == [] and checkpoints.newest() is None
        threading.Timer(0.3, may_write.set).start()
        state.step = 2
        checkpoints.save(state)
        assert saved(tmp_path) == [1], "the second waits for the first"
        weight.fill_(3)
    assert saved(tmp_path) == [1, 2]
    for step in (2, 1):
        other = small_state(tmp_path)
        assert Checkpoints(tmp_path, {}, Processes()).resume(other)
        assert other.model.weight.tolist() == [[step] * 3]  # type: ignore[union-attr, operator]
        shutil.rmtree(tmp_path / "checkpoints" / f"step-{step:06d}")


def test_what_is_left_of_a_save_is_removed(copied: Path, folder: Path) -> None:
    """Catches leftovers that are taken for a state, or that fill the disk."""
    left = copied / "checkpoints" / ".step-000099.unfinished"
    shutil.copytree(copied / "checkpoints" / "step-000012", left)
    pretrain(recipe_of(folder, copied), Processes())
    assert not left.exists() and saved(copied) == [4, 8, 12]


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["write", "seal", "commit"])
def test_a_save_that_fails_stops_all_processes_at_one_step(folder: Path, tmp_path: Path, where: str) -> None:
    """Catches one process that stops while the others wait for it, and an error that nobody hears of."""

    def fails() -> None:
        while not (tmp_path / "checkpoints" / "step-000004").exists():
            time.sleep(0.01)
        if where == "write":
            torch.distributed.checkpoint.filesystem._write_item = full_disk  # type: ignore[assignment]
        else:
            setattr(checkpoint, {"seal": "_seal", "commit": "_write_durably"}[where], full_disk)

    def run(processes: Processes) -> Any:
        if processes.rank == int(where != "commit"):  # the main one commits, alone
            at_step(7, fails)
        pretrain(recipe_of(folder, tmp_path), processes)

    (code, said), (other_code, other) = forked(run, world=2)
    assert (code, other_code) == (0, 0) and said == other
    assert said.startswith("FlamingoError: ") and "step-000008: this checkpoint could not be written: " in said
    assert "No space left on device" in said and "the last good one is step-000004" in said
    assert saved(tmp_path) == [4] and fault_of(tmp_path / "checkpoints" / "step-000004") is None
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000004"], "the room is given back"
    assert len(losses(tmp_path)) < STEPS


def test_writers_wait_as_long_for_each_other_as_the_recipe_says(tmp_path: Path) -> None:
    """Catches a host that is gone during a save and holds the others up for torch's half hour."""

    def run(processes: Processes) -> bool:
        checkpoints = Checkpoints(tmp_path, {}, replace(processes, timeout=timedelta(seconds=2)))
        start = time.monotonic()
        if processes.rank == 1:
            time.sleep(8)
        else:
            with pytest.raises(RuntimeError):
                checkpoints._all_said(None)
        return time.monotonic() - start < 6

    assert forked(run, world=2) == [(0, True), (0, False)]


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A disk of so many bytes at `folder`.

    Raises:
        PermissionError: where this process may not mount one.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()):
        raise PermissionError(os.strerror(ctypes.get_errno()))
    try:
        yield
    finally:
        assert libc.umount2(os.fsencode(folder), 2) == 0


def test_a_full_disk_leaves_the_last_good_checkpoint(folder: Path, whole: Path, tmp_path: Path) -> None:
    """Catches a full disk that costs the run: the last state gone with the one that did not fit."""
    size = sum(file.stat().st_size for file in (whole / "checkpoints" / "step-000004").iterdir())
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        with small_disk(disk, int(1.6 * size)):
            with pytest.raises(FlamingoError, match=r"step-000008: .*No space left.*step-000004"):
                pretrain(recipe_of(folder, disk / "run"), Processes())
            assert saved(disk / "run") == [4]
            shutil.copytree(disk / "run", tmp_path / "run")
    except PermissionError as error:
        pytest.skip(f"a small disk cannot be mounted here: {error}")
    pretrain(recipe_of(folder, tmp_path / "run"), Processes())
    assert losses(tmp_path / "run") == losses(whole)


def test_files_that_may_not_grow_leave_the_last_good_checkpoint(folder: Path, whole: Path, tmp_path: Path) -> None:
    """As a full disk, for machines where none can be mounted: the limit of a file's size stands for it."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    def run(processes: Processes) -> Any:
        at_step(5, limit)
        pretrain(recipe_of(folder, tmp_path), processes)

    ((code, said),) = forked(run)
    assert code == 0 and "step-000008: this checkpoint could not be written: " in said
    assert "the last good one is step-000004" in said and saved(tmp_path) == [4]
    pretrain(recipe_of(folder, tmp_path), Processes())
    assert losses(tmp_path) == losses(whole)


def full_parameters(out: Path) -> dict[str, torch.Tensor]:
    """Tensors of the model that a run left."""
    return load_file(out / "model" / "model.safetensors")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((1, "ddp", 0), (2, "ddp", 0)),
        ((2, "ddp", 0), (1, "ddp", 0)),
        ((2, "ddp", 0), (2, "fsdp", 1)),
        ((2, "fsdp", 1), (2, "ddp", 2)),
        ((2, "fsdp", 0), (1, "ddp", 0)),
    ],
    ids=lambda kind: "-".join(map(str, kind)),
)
def test_other_processes_kinds_and_workers_go_on(
    folder: Path, longer: Path, tmp_path: Path, before: tuple[int, str, int], after: tuple[int, str, int]
) -> None:
    """Catches a state that only those can read who wrote it, and optimizer states that are given to other tensors."""
    for steps, (world, kind, workers) in ((4, before), (LONGER, after)):
        recipe = recipe_of(folder, tmp_path, steps=LONGER, parallel=ParallelRecipe(kind, timeout=30))  # type: ignore[arg-type]
        recipe.data.workers = workers

        def run(processes: Processes, recipe: Recipe = recipe, steps: int = steps) -> Any:
            if steps < LONGER:
                at_step(steps + 1, stop)
            pretrain(recipe, processes)

        assert forked(run, world) == [(0, "PurposeError: enough" if steps < LONGER else None)] * world
        assert saved(tmp_path) == ([4] if steps < LONGER else [20, 24])
    curves = [[float(loss) for loss in losses(out)] for out in (tmp_path, longer)]
    assert curves[0] == pytest.approx(curves[1], abs=1e-6)
    expected, found = full_parameters(longer), full_parameters(tmp_path)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=1e-4, msg=name)
