"""The whole thread, in small: shards → training → saved model → few-shot evaluation → report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flamingo import FlamingoForConditionalGeneration

SMALL = [
    *("--steps", "24", "--data.glyphs.naming", "300", "--data.glyphs.episodes", "600", "--episodes", "12"),
    *("--data.sources.episodes.start_step", "4", "--optimizer.warmup_steps", "4", "--tracking.mode", "disabled"),
]


def quickstart(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`flamingo-quickstart`, cut short."""
    return subprocess.run(
        [sys.executable, "-m", "train.quickstart", "--out", str(out), *SMALL, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "WANDB_MODE": "offline"},
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small quickstart."""
    out = tmp_path_factory.mktemp("run") / "quickstart"
    done = quickstart(out)
    assert done.returncode == 0, done.stderr
    return out


def test_train_save_load_evaluate(run: Path) -> None:
    """Catches a stage that does not fit the next, and a summary that lacks what the issue promises."""
    summary = json.loads((run / "summary.json").read_text())
    assert {"seed", "seconds", "tasks", "controls", "chance"} <= set(summary)
    assert set(summary["seconds"]) == {"shards", "pretraining", "evaluation", "report"}
    assert set(summary["tasks"]["glyphs_5way"]) == {"0", "1", "2", "4", "8"} and set(summary["tasks"]["naming"]) == {
        "0"
    }
    assert summary["chance"]["digits_5way"] == pytest.approx(0.2)
    episode_tasks = {"glyphs_5way", "glyphs_2way", "digits_5way", "digits_2way"}
    assert len(summary["controls"]) == 4 and all(episode_tasks <= set(tasks) for tasks in summary["controls"].values())
    FlamingoForConditionalGeneration.from_pretrained(run / "model")
    recipe = json.loads(json.loads((run / "results.json").read_text())["facts"]["model"]["recipe"])
    assert recipe["steps"] == 24 and recipe["data"]["glyphs"]["naming"] == 300
    report = (run / "report.html").read_text()
    assert report.count("data:image/png;base64") >= 12 and "http" + "://" not in report.replace("http://www.w3.org", "")
    assert not list(run.rglob("*unfinished*"))


def test_the_readme_example_runs(run: Path, capsys: pytest.CaptureFixture) -> None:
    """Catches an example that no longer fits the code."""
    readme = Path(__file__).parents[2] / "README.md"
    example = readme.read_text().split("```python\n")[1].split("```")[0]
    exec(example.replace("runs/quickstart/model", str(run / "model")), {})
    assert "<image>" in capsys.readouterr().out


def test_running_again_keeps_what_is_there(run: Path) -> None:
    """Catches a second start that trains or evaluates again, and one that mixes seeds in one folder."""
    before = (run / "summary.json").read_bytes()
    done = quickstart(run)
    assert done.returncode == 0 and done.stdout.count("kept") >= 2, done.stdout + done.stderr
    assert (run / "summary.json").read_bytes() == before
    done = quickstart(run, "--seed", "1", "--steps", "2", "--episodes", "2")
    assert done.returncode == 0 and "moved to" in done.stdout, done.stderr
    assert json.loads((run / "summary.json").read_text())["seed"] == 1
    assert (run.with_name("quickstart-seed0") / "summary.json").read_bytes() == before


def test_a_wrong_key_is_one_line(tmp_path: Path) -> None:
    """Catches a traceback where a user mistypes."""
    done = quickstart(tmp_path / "x", "--stepz", "3")
    assert (
        done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("error: ") and "stepz" in done.stderr
    )
    assert "Traceback" not in done.stderr and not (tmp_path / "x").exists()
