"""SIGTERM and SIGUSR1: all processes save at one step and end; a run that goes on loses nothing."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.train.runs import STEPS, at_step, forked, losses, recipe_of, saved, stop
from train import checkpoint, preemption
from train.killtest import ENVIRONMENT, worker
from train.parallel import Processes
from train.preemption import EXIT_CODE, Preemption
from train.pretrain import main, pretrain


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def write_recipe(recipe: Any, path: Path) -> Path:
    path.write_text(yaml.safe_dump(json.loads(json.dumps(recipe.as_dict())), sort_keys=False))
    return path


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_ends_with_85(folder: Path, whole: Path, tmp_path: Path, number: int) -> None:
    """Catches a machine that is given back with the work of hours, and a scheduler that takes the end for success."""
    recipe = write_recipe(recipe_of(folder, tmp_path / "run"), tmp_path / "recipe.yaml")

    def run(processes: Processes) -> None:
        at_step(6, send(number))
        sys.argv = ["flamingo-pretrain", "--config", str(recipe)]
        main()

    assert forked(run) == [(EXIT_CODE, None)]
    assert EXIT_CODE == 85 and saved(tmp_path / "run") == [4, 6], "at the very step"
    note = tmp_path / "run" / "checkpoints" / "PREEMPTED"
    assert note.read_text() == "6\n" and not (tmp_path / "run" / "model").exists()
    pretrain(recipe_of(folder, tmp_path / "run"), Processes())
    assert losses(tmp_path / "run") == losses(whole) and not note.exists()


def test_a_second_signal_does_not_cut_the_save_short(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a step that ends between two signals of one request, so that the second kills the process as it saves."""

    def run(processes: Processes) -> None:
        save = checkpoint.dcp.save

        def saves(*arguments: Any, **named: Any) -> Any:
            time.sleep(0.6)  # by then the loop has returned, and waits for this thread
            send(signal.SIGTERM)()
            time.sleep(0.2)
            return save(*arguments, **named)

        def first() -> None:
            monkeypatch.setattr(checkpoint.dcp, "save", saves)
            send(signal.SIGTERM)()

        at_step(6, first)
        pretrain(recipe_of(folder, tmp_path), processes)

    assert forked(run) == [(EXIT_CODE, None)]
    assert saved(tmp_path) == [4, 6]


def test_a_signal_to_one_process_ends_all_at_one_step(folder: Path, tmp_path: Path) -> None:
    """Catches processes that save different steps, of which no state can be made."""

    def run(processes: Processes) -> None:
        if processes.rank == 1:
            at_step(6, send(signal.SIGUSR1))
        pretrain(recipe_of(folder, tmp_path), processes)

    assert forked(run, world=2) == [(EXIT_CODE, None)] * 2
    assert saved(tmp_path) == [4, 6] and len(losses(tmp_path)) == 6


@pytest.mark.slow  # failed once, in a whole run beside other work, and never alone: see LOG.md
def test_a_signal_to_everyone_spares_those_who_read(folder: Path, tmp_path: Path) -> None:
    """Catches a reader that dies of the job's signal and takes the run along, before its state is saved."""

    def signal_all() -> None:
        readers = [process.pid for process in multiprocessing.active_children()]
        assert len(readers) == 2
        subprocess.run(["kill", "-TERM", *map(str, readers)], check=True)  # torch lets readers go at a parent's word
        time.sleep(0.2)
        send(signal.SIGTERM)()

    def run(processes: Processes) -> None:
        at_step(6, signal_all)
        recipe = recipe_of(folder, tmp_path, steps=200)
        recipe.data.workers = 2
        pretrain(recipe, processes)

    assert forked(run) == [(EXIT_CODE, None)]
    assert saved(tmp_path) == [4, 6]


def test_a_signal_in_the_last_step_changes_nothing(folder: Path, whole: Path, tmp_path: Path) -> None:
    """Catches a finished run that leaves no model."""

    def run(processes: Processes) -> None:
        at_step(STEPS, send(signal.SIGTERM))
        pretrain(recipe_of(folder, tmp_path), processes)

    assert forked(run) == [(0, None)]
    assert losses(tmp_path) == losses(whole) and (tmp_path / "model").exists()


def test_signals_close_together_are_one_and_a_later_one_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a scheduler that signals everyone twice and so prevents the save, and a run that cannot be stopped."""

    def twice(processes: Processes) -> bool:
        with Preemption(processes) as asked:
            assert not asked.requested()
            send(signal.SIGTERM)()
            send(signal.SIGTERM)()
            return asked.requested()

    assert forked(twice) == [(0, True)]
    monkeypatch.setattr(preemption, "SAME_SECONDS", 0.0)
    assert forked(twice) == [(-signal.SIGTERM, None)]


def test_handlers_are_put_back() -> None:
    """Catches a program that cannot be ended any more after it has trained, and one that cannot train in a thread."""
    mine = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        before = [signal.getsignal(number) for number in preemption.SIGNALS]
        with Preemption(Processes()):
            assert all(callable(signal.getsignal(number)) for number in preemption.SIGNALS)
        assert [signal.getsignal(number) for number in preemption.SIGNALS] == before
    finally:
        signal.signal(signal.SIGUSR1, mine)
    said = []

    def in_a_thread() -> None:
        with Preemption(Processes()) as asked:
            said.append(asked.requested())

    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    assert said == [False]


def wait_until(holds: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 90) -> None:
    """Wait for something that a running process does."""
    limit = time.monotonic() + seconds
    while not holds():
        assert process.poll() is None and time.monotonic() < limit, process.communicate(timeout=5)
        time.sleep(0.02)


@pytest.mark.timeout(200)
def test_torchrun_restarts_after_a_kill_and_saves_at_sigterm(folder: Path, tmp_path: Path) -> None:
    """Catches a job that waits for a dead worker, restarts from nothing, or loses steps when torchrun is signalled."""
    settings = dict(steps=500, save_every=10, parallel=recipe_of(folder, tmp_path).parallel)
    recipe = recipe_of(folder, tmp_path / "run", **settings)
    path = write_recipe(recipe, tmp_path / "recipe.yaml")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    environment = {**os.environ, **ENVIRONMENT}
    process = subprocess.Popen(
        [*launcher, "-m", "train.pretrain", "--config", str(path)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip
    out = tmp_path / "run"

    wait_until(lambda: 10 in saved(out), process)
    os.kill(worker(process.pid, 1), signal.SIGKILL)
    wait_until(lambda: max(saved(out), default=0) >= 30, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, "torchrun's own"
    (resumed,) = set(re.findall(r"resumed from step (\d+) of 500", output))
    assert int(resumed) >= 10 and int(resumed) % 10 == 0
    last = int((out / "checkpoints" / "PREEMPTED").read_text())
    assert max(saved(out)) == last and len(losses(out)) == last, "not a step lost"
    assert f"preempted: saved at step {last}" in output

    for where in (out, tmp_path / "whole"):

        def run(processes: Processes, where: Path = where) -> None:
            at_step(last + 5, stop)
            pretrain(recipe_of(folder, where, **settings), processes)

        assert forked(run, 2) == [(0, "PurposeError: enough")] * 2
    assert len(losses(out)) == last + 4 and losses(out) == losses(tmp_path / "whole"), "as if it had never stopped"
