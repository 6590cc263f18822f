"""Runs read back, from W&B's offline files and from metrics.jsonl, and the page that is drawn of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import wandb

from flamingo import FlamingoError
from tests.train.runs import BATCH, STEPS, at_step, forked, recipe_of
from train.curves import charts, heat_map, main, write_page
from train.history import Run, inspect, read_run
from train.metrics import METRICS, PLOTS, covers
from train.parallel import Processes
from train.pretrain import pretrain
from train.recipe import EvaluationRecipe, TrackingRecipe
from train.tracking import METRICS_FILE, Tracker

EVALUATION = EvaluationRecipe(every=5, tasks=["digits_2way"], shots=[0, 1], queries=4, generations=1, batch=4)
GPU_ALONE = {"mfu"}


@pytest.fixture(autouse=True, scope="module")
def _no_account(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "RANK"):
            patch.delenv(name, raising=False)
        patch.setenv("NETRC", str(tmp_path_factory.mktemp("home") / "netrc"))
        wandb.teardown()  # a process that is forked would talk to the W&B process of its parent
        yield
        wandb.teardown()


def kill_all() -> None:
    """What a node that goes down does: W&B's own process ends with this one, and nothing is said."""
    time.sleep(0.5)  # longer than W&B may keep a row to itself
    listing = subprocess.run(["ps", "-o", "pid=,comm=", "--ppid", str(os.getpid())], capture_output=True, text=True)
    cores = [int(line.split()[0]) for line in listing.stdout.splitlines() if "wandb-core" in line]
    assert len(cores) == (int(dist.get_rank() == 0)), "rank 0 alone has one"
    for core in cores:
        os.kill(core, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def trained(folder: Path, out: Path, before: Callable[[], None] = lambda: None) -> Callable[[Processes], str]:
    """A function that trains with W&B offline."""

    def train(processes: Processes) -> str:
        torch.set_num_threads(1)
        before()
        recipe = recipe_of(folder, out, tracking=TrackingRecipe("offline", log_every=1), evaluation=EVALUATION)
        pretrain(recipe, processes)
        return "done"

    return train


@pytest.fixture(scope="module")
def killed_and_resumed(folder: Path) -> Path:
    """Two processes, killed after the eleventh step with a checkpoint of the eighth, and started again."""
    out = folder / "out"
    assert [code for code, _ in forked(trained(folder, out, lambda: at_step(11, kill_all)), 2)] == [-9, -9]
    assert forked(trained(folder, out), 2) == [(0, "done"), (0, "done")]
    return out


def test_each_start_makes_one_folder(killed_and_resumed: Path) -> None:
    """A folder of W&B for every rank; a second run on the page for every start."""
    folders = list(killed_and_resumed.glob("wandb/*run-*"))
    assert len(folders) == 2
    assert len({folder.name.rpartition("-")[2] for folder in folders}) == 1


def test_no_step_is_missing_and_those_computed_twice_agree(killed_and_resumed: Path) -> None:
    """Rows that waited in W&B's memory when the machine went down; a resumed run whose losses are others."""
    run = read_run(killed_and_resumed / "wandb")
    assert [row["step"] for row in run.rows] == list(range(1, STEPS + 1))
    assert run.starts == 2 and run.repeated == [9, 10] and run.differences == []
    assert all(row["samples"] == row["step"] * BATCH for row in run.rows)


def test_both_records_say_the_same(killed_and_resumed: Path) -> None:
    """A metric that reaches W&B alone, or metrics.jsonl alone, or rounded."""
    ours, theirs = read_run(killed_and_resumed), read_run(killed_and_resumed / "wandb")
    assert ours.rows == theirs.rows
    assert ours.generations == theirs.generations and len(ours.generations) == 3  # at steps 5, 10 and the last
    assert all(each["picture"].startswith("data:image/png;base64,") for each in theirs.generations)


def test_every_metric_is_there_and_defined(killed_and_resumed: Path) -> None:
    """A metric of the list that nobody records, or one recorded that W&B draws against nothing."""
    files = sorted(killed_and_resumed.glob("wandb/*/*.wandb"))
    records = [record for path in files for record in inspect(path)]
    defined = {
        each.get("name") or each["glob_name"]: each.get("step_metric")
        for each in (record["metric"] for record in records if record["type"] == "metric")
    }
    assert {metric.name: metric.axis for metric in METRICS}.items() <= defined.items()
    columns = {key for record in records if record["type"] == "history" for key in record["history"]["item"]}
    columns = {key for key in columns if not key.startswith("_")}
    for metric in METRICS:
        if metric.name not in GPU_ALONE:
            assert any(covers(metric.name, name.partition("._")[0].partition(".")[0]) or covers(metric.name, name)
                       for name in columns), metric.name  # fmt: skip
    stray = {name for name in columns if not any(covers(pattern, name) for pattern in defined)}
    assert {name for name in stray if not name.startswith("generations.")} == set()
    assert {"loss/pairs", "loss/pages", "gate/attention.0", "gates/attention.bins", "gates/feed_forward.values",
            "fewshot/digits_2way/0", "generations.path", "faults/pairs"} <= columns  # fmt: skip


def test_a_moved_folder_keeps_its_pictures(killed_and_resumed: Path, tmp_path: Path) -> None:
    """Pictures lost because W&B writes down where they were on another machine."""
    shutil.copytree(killed_and_resumed / "wandb", tmp_path / "elsewhere")
    aside = killed_and_resumed / "wandb" / "artifacts"
    aside.rename(aside.with_name("aside"))
    try:
        run = read_run(tmp_path / "elsewhere")
    finally:
        aside.with_name("aside").rename(aside)
    assert run.generations == read_run(killed_and_resumed).generations


class Strict(HTMLParser):
    """Fails on a tag that is not closed in its order; notes what a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def checked(page: str) -> str:
    """The page, if it is well formed, runs no script and loads nothing."""
    parser = Strict()
    parser.feed(page)
    assert parser.open == []
    assert all(address.startswith("data:") for address in parser.loads)
    assert "<script" not in page and "nan" not in "".join(re.findall(r'points="[^"]*"', page))
    return page


def test_the_page_shows_every_plot(killed_and_resumed: Path, tmp_path: Path) -> None:
    """A plot of the dashboard that the page lacks; a page that needs a network, or a font, or a script."""
    run = read_run(killed_and_resumed / "wandb")
    page = checked(write_page(run, tmp_path / "curves.html").read_text())
    for plot in PLOTS:
        if plot.kind != "table" and any(plot.shows(name) for name in run.names):
            assert all(f"<h3>{chart['title']} " in page for chart in charts(run, plot)), plot.title
    assert page.count("<polyline") >= 12 and page.count('class="cell"') >= 2
    assert "2 starts joined by step" in page and "2 steps were computed more than once" in page
    assert "their figures agree" in page
    assert page.count("data:image/png;base64,") == 2
    assert "digits_2way/000000" in page and "&lt;image&gt;" in page
    ours = write_page(read_run(killed_and_resumed), tmp_path / "ours.html").read_text()
    assert [line for line in ours.splitlines() if "polyline" in line] == [
        line for line in page.splitlines() if "polyline" in line
    ]


def test_the_command(
    killed_and_resumed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A folder that holds no run ending in a traceback; the page written somewhere else."""
    for words, code in (
        ([str(killed_and_resumed), "--out", str(tmp_path / "x.html"), "--title", "A <run>"], 0),
        ([str(tmp_path / "nothing")], 2),
        ([], 2),
    ):
        monkeypatch.setattr(sys, "argv", ["curves", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == code
    assert "<h1>A &lt;run&gt;</h1>" in (tmp_path / "x.html").read_text()
    assert "expected metrics.jsonl, a .wandb file, or a folder" in capsys.readouterr().err


def logged(folder: Path, rows: list[dict[str, Any]]) -> Run:
    folder.mkdir(exist_ok=True)
    (folder / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_run(folder)


def test_figures_that_differ_are_named(tmp_path: Path) -> None:
    """A run that is not exact after a resume, of which the page says nothing; or one blamed for its speed."""
    for start, loss in (((1, 2, 3), 0.5), ((3, 4), 0.25)):
        with Tracker(tmp_path, project="p", name="n", mode="offline") as tracker:
            for step in start:
                tracker.log(step, {"loss": loss, "tokens_per_second": step + loss, "samples": 8.0 * step})
        time.sleep(1.1)  # W&B names folders by the second
    run = read_run(tmp_path / "wandb")
    assert [(each.step, each.metric, each.first, each.second) for each in run.differences] == [(3, "loss", 0.5, 0.25)]
    assert [row["loss"] for row in run.rows] == [0.5, 0.5, 0.25, 0.25]
    assert "1 figures of them differ" in write_page(run, tmp_path / "x.html").read_text()


def test_a_start_replaces_what_was_there_after_its_first_step(tmp_path: Path) -> None:
    """Steps of an abandoned continuation left at the end of a curve."""
    for steps in ((1, 2, 3, 4, 5), (3,)):
        with Tracker(tmp_path, project="p", name="n", mode="offline", start_step=steps[0] - 1) as tracker:
            for step in steps:
                tracker.log(step, {"loss": 1.0})
        time.sleep(1.1)
    assert [row["step"] for row in read_run(tmp_path / "wandb").rows] == [1, 2, 3]
    assert [row["step"] for row in read_run(tmp_path).rows] == [1, 2, 3]


def test_what_is_no_record_is_named(tmp_path: Path) -> None:
    """An empty page of a file that is damaged from its first byte on."""
    (tmp_path / "run-x.wandb").write_bytes(b"not a record")
    with pytest.raises(FlamingoError, match=r"run-x.wandb: expected W&B's record"):
        read_run(tmp_path / "run-x.wandb")


def test_long_runs_are_thinned_and_numbers_that_are_none_left_out(tmp_path: Path) -> None:
    """A page of 100,000 points a line; a spike that thinning hides; NaN in a path, at which a browser stops drawing."""
    rows = [{"step": n, "loss": 100.0 if n == 501 else 1.0, "tokens": 1e6 * n} for n in range(1, 3001)]
    rows[10]["loss"] = None
    run = logged(tmp_path, rows)
    (loss, *_) = [chart for plot in PLOTS for chart in charts(run, plot)]
    line = re.search(r'<polyline[^>]*points="([^"]*)"', loss["svg"])
    assert line is not None and len(line.group(1).split()) == 300
    assert 'class="band' in loss["svg"] and ">100<" in loss["svg"] and "tokens seen, millions" in loss["svg"]


def test_what_is_not_known_is_mentioned(tmp_path: Path) -> None:
    """A column of one's own that silently never shows."""
    run = logged(tmp_path, [{"step": 1, "loss": 1.0, "my/column": 3.0}])
    page = checked(write_page(run, tmp_path / "x.html").read_text())
    assert "Recorded and not drawn: my/column." in page


def test_histograms_count_every_gate(tmp_path: Path) -> None:
    """Blocks counted in the wrong bin, or a closed model (all gates equal) that divides by zero."""
    closed = logged(tmp_path / "a", [{"step": 1, "gate/attention.0": 0.0, "gate/attention.1": 0.0}])
    heat = heat_map(closed, "gates/attention", "samples")
    assert heat is not None and heat["cells"] == [(0, 0, 1.0)]
    rows = [{"step": n, **{f"gate/attention.{b}": 0.1 * b for b in range(11)}} for n in (1, 2)]
    heat = heat_map(logged(tmp_path / "b", rows), "gates/attention", "samples")
    assert heat is not None and heat["columns"] == 2
    assert sum(share for column, _, share in heat["cells"] if column == 1) == pytest.approx(1.0)
    assert min(row for _, row, _ in heat["cells"]) == 0 and max(row for _, row, _ in heat["cells"]) == 23
    assert heat_map(closed, "gates/feed_forward", "samples") is None
