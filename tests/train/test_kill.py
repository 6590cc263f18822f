"""Runs that are killed and started again: the losses are those of a run that was not, to the bit.

The long form, with real processes and the embedded recipe, is `make kill-test` (`train/killtest.py`).
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint.filesystem as files

from tests.train.runs import at_step, forked, losses, recipe_of, saved
from train import checkpoint
from train.parallel import Processes
from train.pretrain import pretrain


@pytest.fixture(scope="module")
def wholes(folder: Path) -> dict[int, Path]:
    """Uninterrupted runs, by the number of processes."""
    outs = {world: folder / f"whole-{world}" for world in (1, 2)}
    for world, out in outs.items():
        assert forked(lambda processes, out=out: done(recipe_of(folder, out), processes), world) == [(0, None)] * world
    return outs


def done(recipe: Any, processes: Processes) -> None:
    """Run to the end, and return what a queue can carry."""
    pretrain(recipe, processes)


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def once_saved(out: Path, step: int, action: Callable[[], None]) -> Callable[[], None]:
    """The action, after the save of a step is complete."""

    def acts() -> None:
        while step not in saved(out):
            time.sleep(0.005)
        action()

    return acts


def dies_between_tensors() -> None:
    written, write = [], files._write_item

    def writes(*arguments: Any) -> Any:
        written.append(1)
        if len(written) == 20:
            die()
        return write(*arguments)

    files._write_item = writes


def dies_before_the_mark() -> None:
    checkpoint._write_durably = die


def dies_within_the_mark() -> None:
    def half(path: Path, text: str) -> None:
        path.write_text(text[: len(text) // 2])
        die()

    checkpoint._write_durably = half


def dies_before_the_name() -> None:
    checkpoint.os.replace = die  # type: ignore[assignment]


def dies_among_the_old() -> None:
    checkpoint.shutil.rmtree = die  # type: ignore[assignment]


INSIDE = [dies_between_tensors, dies_before_the_mark, dies_within_the_mark, dies_before_the_name, dies_among_the_old]


@pytest.mark.parametrize("dies", [*INSIDE, die], ids=lambda dies: dies.__name__)
def test_a_killed_run_equals_an_uninterrupted_one(
    folder: Path, wholes: dict[int, Path], tmp_path: Path, dies: Callable[[], None]
) -> None:
    """Catches half a checkpoint that is taken for one, and a state that lacks something: moments, schedule, place."""

    def run(processes: Processes) -> None:
        at_step(7, once_saved(tmp_path, 4, dies))  # there, or in the next save, that of step 8
        done(recipe_of(folder, tmp_path, keep_checkpoints=1), processes)

    assert forked(run) == [(-signal.SIGKILL, None)]
    assert saved(tmp_path) == ([8] if dies is dies_among_the_old else [4])
    pretrain(recipe_of(folder, tmp_path, keep_checkpoints=1), Processes())
    assert losses(tmp_path) == losses(wholes[1])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000012"]


@pytest.mark.parametrize(
    ("step", "dies"),
    [(7, dies_between_tensors), (7, die), (11, dies_between_tensors)],  # at 11: in the last save, after the loop
    ids=lambda value: getattr(value, "__name__", value),
)
def test_one_killed_process_ends_the_other(
    folder: Path, wholes: dict[int, Path], tmp_path: Path, step: int, dies: Callable[[], None]
) -> None:
    """Catches a process that waits for one that is gone or says so by a traceback, and half a save taken for one."""
    last = step - 3

    def run(processes: Processes) -> None:
        if processes.rank == 1:
            at_step(step, once_saved(tmp_path, last, dies))
        done(recipe_of(folder, tmp_path), processes)

    start = time.monotonic()
    (code, said), (other, _) = forked(run, world=2)
    assert other == -signal.SIGKILL and code == 0
    assert said.startswith("FlamingoError: process 0 of 2, after step ") and "another process is gone" in said
    assert time.monotonic() - start < 25 and saved(tmp_path) == list(range(4, last + 1, 4))
    again = tmp_path / "again"
    shutil.copytree(tmp_path, again)
    for world in (2, 1):
        out = tmp_path if world == 2 else again
        assert forked(lambda processes, out=out: done(recipe_of(folder, out), processes), world) == [(0, None)] * world
    assert losses(tmp_path) == losses(wholes[2])
    assert [float(loss) for loss in losses(again)] == pytest.approx([float(x) for x in losses(wholes[2])], abs=1e-6)
