"""Tracking: the metrics file, W&B beside it, and that neither ever stops a training."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
import wandb
from PIL import Image

from flamingo import FlamingoError
from train.history import inspect, read_run
from train.metrics import METRICS, PLOTS, Metric, Plot, check_plots, covers, defined, regular_expression
from train.tracking import GENERATIONS_FILE, METRICS_FILE, Generation, Tracker, read_curves, read_rows

START = {"project": "test", "name": "run"}
GATES = {"gate/attention.0": 0.1, "gate/attention.1": -0.4, "gate/feed_forward.0": math.nan}


def generation(generated: str = "dog", colour: str = "red") -> Generation:
    shown = Image.new("RGB", (8, 6), colour)
    return Generation("task", 1, "task/0", shown, "<image>cat<image>", shown, "dog", generated, generated == "dog")


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test may find a real key."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture(autouse=True, scope="module")
def _own_service() -> Iterator[None]:
    """Leave no W&B process to tests that start processes: they would use it, instead of one of their own."""
    yield
    wandb.teardown()


class FakeRun:
    """Stands for a W&B run; `breaks` names the method that raises."""

    id = "fake"

    def __init__(self, breaks: str = "") -> None:
        self.breaks, self.rows, self.exit_code = breaks, [], None

    def define_metric(self, *_: object, **__: object) -> None:
        self._maybe("define_metric")

    def log(self, row: dict) -> None:
        self._maybe("log")
        self.rows.append(row)

    def finish(self, exit_code: int) -> None:
        self._maybe("finish")
        self.exit_code = exit_code

    def _maybe(self, method: str) -> None:
        if method == self.breaks:
            raise RuntimeError(f"no {method}\ntoday")


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modes in which W&B was started, without starting it."""
    started: list[str] = []
    monkeypatch.setattr(wandb, "init", lambda **given: started.append(given["mode"]) or FakeRun())
    return started


def history(out: Path) -> list[dict]:
    """The rows of the one offline run under `out`, read by W&B's own reader."""
    (record,) = out.glob("wandb/offline-run-*/*.wandb")
    return [each["history"]["item"] for each in inspect(record) if each["type"] == "history"]


def test_rows_go_to_the_file_and_to_wandb(tmp_path: Path) -> None:
    """A metric that reaches only one of the two records, or W&B files outside the run's folder."""
    with Tracker(tmp_path, **START, mode="offline", config={"seed": 3}) as tracker:
        tracker.log(1, {"loss": 2.5, "samples": 32.0})
        tracker.log(2, {"loss": 1.5, "samples": 64.0})
        assert tracker.run_id
    assert read_curves(tmp_path / METRICS_FILE) == {"loss": [(1, 2.5), (2, 1.5)], "samples": [(1, 32.0), (2, 64.0)]}
    assert [(row["step"], row["loss"], row["samples"]) for row in history(tmp_path)] == [(1, 2.5, 32), (2, 1.5, 64)]


def test_a_killed_run_keeps_its_rows(tmp_path: Path) -> None:
    """Rows that wait in a buffer when the process is killed: W&B's default keeps 15 s of them, a file object 8 kB."""
    script = (
        "import os, sys, time; from pathlib import Path; from train.tracking import Tracker\n"
        "tracker = Tracker(Path(sys.argv[1]), project='test', name='run', mode='offline')\n"
        "[tracker.log(step, {'loss': 7000.25 + step}) for step in range(1, 6)]\n"
        "time.sleep(2)\n"
        "os.kill(os.getpid(), 9)"
    )
    wandb.teardown()
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [step for step, _ in read_curves(tmp_path / METRICS_FILE)["loss"]] == [1, 2, 3, 4, 5]
    assert [row["loss"] for row in history(tmp_path)] == [7000.25 + step for step in range(1, 6)]


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path: Path, modes: list[str]) -> None:
    """A curve that has steps 3 and 4 twice after a resume from step 2, or half a line in its midst."""
    with Tracker(tmp_path, **START) as tracker:
        for step in (1, 2, 3, 4):
            tracker.log(step, {"loss": float(step)})
    path = tmp_path / METRICS_FILE
    path.write_text(path.read_text() + '{"step": 5, "lo')
    with Tracker(tmp_path, **START, start_step=2) as tracker:
        tracker.log(3, {"loss": 30.0})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 2.0},
        {"step": 3, "loss": 30.0},
    ]
    assert [each.name for each in tmp_path.iterdir()] == [METRICS_FILE]


def test_a_run_from_the_start_has_a_fresh_curve(tmp_path: Path, modes: list[str]) -> None:
    """Rows of an abandoned run, an evaluation at step 0 among them, showing up in the next one's curves."""
    for loss in (1.0, 2.0):
        with Tracker(tmp_path, **START) as tracker:
            tracker.log(0, {"loss": loss})
    assert read_curves(tmp_path / METRICS_FILE) == {"loss": [(0, 2.0)]}


def test_values_without_a_name_in_json(tmp_path: Path, modes: list[str]) -> None:
    """`NaN` in the file, at which a browser's JSON parser stops, and with it the report."""
    with Tracker(tmp_path, **START) as tracker:
        tracker.log(1, {"loss": float("nan"), "norm": float("inf"), "rate": 1.0})
    (line,) = (tmp_path / METRICS_FILE).read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "loss": None, "norm": None, "rate": 1.0}
    assert read_curves(tmp_path / METRICS_FILE) == {"rate": [(1, 1.0)]}


def test_rows_of_one_step_are_joined(tmp_path: Path, modes: list[str]) -> None:
    """A score logged after the loss of its step hiding the loss."""
    with Tracker(tmp_path, **START) as tracker:
        tracker.log(1, {"loss": 1.0})
        tracker.log(1, {"accuracy": 0.5})
    assert read_curves(tmp_path / METRICS_FILE) == {"loss": [(1, 1.0)], "accuracy": [(1, 0.5)]}


@pytest.mark.parametrize(
    "environment,netrc,expected",
    [
        ({}, "", "offline"),
        ({"WANDB_API_KEY": "k" * 40}, "", "online"),
        ({}, "machine api.wandb.ai login user password kkk", "online"),
        ({}, "machine example.org login user password kkk", "offline"),
        ({"WANDB_BASE_URL": "https://example.org"}, "machine example.org login user password kkk", "online"),
        ({}, "no netrc at all", "offline"),
        ({"WANDB_API_KEY": "k" * 40, "WANDB_MODE": "offline"}, "", "offline"),
    ],
)
def test_auto_is_online_only_with_a_key(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, modes: list[str], environment: dict, netrc: str, expected: str
) -> None:
    """A newcomer without an account asked for a key in the middle of `make quickstart`; a key that is not seen."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "netrc").write_text(netrc)
    Tracker(tmp_path / "out", **START).finish()
    assert modes == [expected]


def test_auto_follows_a_disabled_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, modes: list[str]) -> None:
    """`WANDB_MODE=disabled` ignored; the metrics file going with it."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with Tracker(tmp_path, **START) as tracker:
        tracker.log(1, {"loss": 1.0})
    assert modes == []
    assert read_curves(tmp_path / METRICS_FILE) == {"loss": [(1, 1.0)]}


def test_other_ranks_write_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, modes: list[str]) -> None:
    """Every rank of a large run opening a W&B run of its own, and all appending to one metrics file."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    with Tracker(tmp_path / "out", **START) as tracker:
        tracker.log(1, {"loss": 1.0})
    assert modes == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("breaks", ["init", "define_metric", "log", "finish"])
def test_wandb_never_stops_a_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, breaks: str
) -> None:
    """An exception out of W&B that ends a run of a week, or one warning a step for the rest of it."""

    def init(**_: object) -> FakeRun:
        if breaks == "init":
            raise RuntimeError("no init today")
        return FakeRun(breaks)

    monkeypatch.setattr(wandb, "init", init)
    with caplog.at_level(logging.WARNING, logger="train.tracking"), Tracker(tmp_path, **START) as tracker:
        for step in (1, 2, 3):
            tracker.log(step, {"loss": float(step)})
    assert len(caplog.records) == 1
    assert f"RuntimeError: no {breaks} today" in caplog.messages[0]
    assert read_curves(tmp_path / METRICS_FILE) == {"loss": [(1, 1.0), (2, 2.0), (3, 3.0)]}


def test_an_unreachable_server_leaves_an_offline_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A compute node without a network losing the run because the user has a key."""
    run, started = FakeRun(), []

    def init(*, mode: str, **_: object) -> FakeRun:
        started.append(mode)
        if mode == "online":
            raise wandb.errors.CommError("no route")
        return run

    monkeypatch.setattr(wandb, "init", init)
    with Tracker(tmp_path, **START, mode="online") as tracker:
        tracker.log(1, {"loss": 1.0})
    assert started == ["online", "offline"]
    assert run.rows == [{"loss": 1.0, "step": 1}]


def test_resuming_online_continues_the_same_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A resumed run that starts a new page in W&B."""
    given = SimpleNamespace()
    monkeypatch.setattr(wandb, "init", lambda **arguments: setattr(given, "all", arguments) or FakeRun())
    Tracker(tmp_path, **START, mode="online", resume_id="abc").finish()
    assert (given.all["id"], given.all["resume"]) == ("abc", "allow")


def test_a_training_that_fails_is_marked_as_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A crashed run shown as finished."""
    run = FakeRun()
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    with pytest.raises(KeyError), Tracker(tmp_path, **START):
        raise KeyError
    assert run.exit_code == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk without room")
def test_a_full_disk_does_not_stop_a_training(
    tmp_path: Path, modes: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """ENOSPC at a line of metrics ending the run; the checkpoint is where a full disk must be an error."""
    with Tracker(tmp_path, **START) as tracker, Path("/dev/full").open("a", buffering=1) as full:
        tracker._file = full
        tracker.log(2, {"loss": 1.0})
        tracker.log(3, {"loss": 1.0})
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "No space left" in caplog.messages[0]


def test_generations_are_kept_with_their_pictures(tmp_path: Path, modes: list[str]) -> None:
    """Pictures written again at every evaluation, or rows of a step that is computed again standing there twice."""
    with Tracker(tmp_path, **START) as tracker:
        for step in (2, 4, 6):
            tracker.log(step, {"fewshot/task/1": 0.5}, [generation(), generation("cat")])
    with Tracker(tmp_path, **START, start_step=4) as tracker:
        tracker.log(6, {}, [generation("cow", "blue")])
    rows = read_rows(tmp_path / GENERATIONS_FILE)
    assert [(row["step"], row["generated"], row["right"]) for row in rows] == [
        (2, "dog", True), (2, "cat", False), (4, "dog", True), (4, "cat", False), (6, "cow", False),
    ]  # fmt: skip
    assert len(list((tmp_path / "generations").iterdir())) == 2
    assert Image.open(tmp_path / rows[0]["picture"]).getpixel((0, 0)) == (255, 0, 0)
    assert read_run(tmp_path).generations[-1]["picture"].startswith("data:image/png")


def test_wandb_gets_histograms_and_tables_within_the_runs_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Gates of one value that make a histogram impossible, and end the record; pictures left in the user's home."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("WANDB_DATA_DIR", raising=False)
    out = tmp_path / "out"
    with Tracker(out, **START, mode="offline") as tracker:
        tracker.log(1, GATES | {"samples": 8.0}, [generation()])
        tracker.log(2, GATES | {"samples": 16.0})
    assert "WANDB_DATA_DIR" not in os.environ
    assert not list(home.rglob("*.png")) and not list(home.rglob("artifacts"))
    items = history(out)
    assert [sum(item["gates/attention.values"]) for item in items] == [2, 2]
    assert len(items[0]["gates/attention.bins"]) == 41 and items[0]["gates/attention.bins"][0] == -1
    assert "gates/feed_forward.values" not in items[0]
    assert items[0]["generations.nrows"] == 1 and "generations.nrows" not in items[1]
    assert read_run(out / "wandb").generations == read_run(out).generations


def test_a_wandb_process_that_dies_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A run that ends, or waits for ever, because the process that W&B runs beside it was killed for memory."""
    script = (
        "import os, signal, subprocess, sys, time; from pathlib import Path; from train.tracking import Tracker\n"
        "with Tracker(Path(sys.argv[1]), project='test', name='run', mode='offline') as tracker:\n"
        "    tracker.log(1, {'loss': 1.0}); time.sleep(1)\n"
        "    children = subprocess.run(['ps', '-o', 'pid=,comm=', '--ppid', str(os.getpid())], capture_output=True)\n"
        "    (core,) = [line for line in children.stdout.decode().splitlines() if 'wandb-core' in line]\n"
        "    os.kill(int(core.split()[0]), signal.SIGKILL); time.sleep(1)\n"
        "    [tracker.log(step, {'loss': 1.0}) for step in range(2, 6)]\n"
    )
    wandb.teardown()
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], timeout=60, capture_output=True, text=True)
    assert done.returncode == 0 and time.monotonic() - start < 40
    assert done.stderr.count("W&B stopped recording") == 1
    assert [step for step, _ in read_curves(tmp_path / METRICS_FILE)["loss"]] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in read_run(tmp_path / "wandb").rows] == [1]


@pytest.mark.parametrize("part", ["Table", "Image", "Histogram"])
def test_a_part_of_wandb_that_breaks_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, modes: list[str], caplog: pytest.LogCaptureFixture, part: str
) -> None:
    """A table that W&B refuses after a week of training."""

    def breaks(*_: object, **__: object) -> None:
        raise ValueError("not today")

    monkeypatch.setattr(wandb, part, breaks)
    with Tracker(tmp_path, **START) as tracker:
        for step in (1, 2):
            tracker.log(step, GATES, [generation()])
    assert [record.getMessage() for record in caplog.records if record.name == "train.tracking"] == [
        "W&B stopped recording; metrics.jsonl goes on: ValueError: not today"
    ]
    assert [row["step"] for row in read_rows(tmp_path / GENERATIONS_FILE)] == [1, 2]


def test_a_disk_that_refuses_pictures_stops_nothing(
    tmp_path: Path, modes: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A folder that cannot be made, where a full disk must be an error of checkpoints alone."""
    (tmp_path / "generations").write_text("in the way")
    with Tracker(tmp_path, **START) as tracker:
        tracker.log(1, {"loss": 1.0}, [generation()])
        tracker.log(2, {"loss": 1.0})
    assert "generations of step 1 are not in" in caplog.text
    assert [step for step, _ in read_curves(tmp_path / METRICS_FILE)["loss"]] == [1, 2]


def test_a_folder_that_cannot_be_made_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A read-only place for the run; there the checkpoint says so, and not a tracker's traceback."""
    (tmp_path / "out").write_text("in the way")
    with Tracker(tmp_path / "out", **START, mode="offline") as tracker:
        tracker.log(1, {"loss": 1.0}, [generation()])
    assert "the run has no metrics file" in caplog.text


def test_every_metric_is_drawn_and_every_plot_has_one() -> None:
    """A plot of a metric that was renamed, which stays empty; a metric that nobody ever sees."""
    check_plots()
    with pytest.raises(FlamingoError, match="'Old'.*'perplexity'"):
        check_plots([*PLOTS, Plot("Loss", "Old", "", ("perplexity",))])
    with pytest.raises(FlamingoError, match="axis 'time'"):
        check_plots([*PLOTS, Plot("Loss", "Loss", "", ("loss",), axis="time")])
    with pytest.raises(FlamingoError, match="metric 'generations'"):
        check_plots([plot for plot in PLOTS if plot.kind != "table"])


def test_names_belong_to_their_pattern() -> None:
    """`gates/attention` taken for a gate, `losses` for a loss, or an expression that matches more than it says."""
    assert covers("gate/*", "gate/attention.*") and not covers("gate/*", "gates/attention")
    assert defined("losses") is None and defined("loss/a/b") == Metric(
        "loss/*", "the same of each source, unweighted", "tokens"
    )
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    expression = re.compile(regular_expression(["loss", "gate/attention.*"]))
    assert expression.match("loss") and expression.match("gate/attention.10")
    assert not expression.match("loss/naming") and not expression.match("gate/attentionX1")
