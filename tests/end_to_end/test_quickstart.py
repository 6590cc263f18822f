"""The whole thread, in small: shards → training → saved model → few-shot evaluation → report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flamingo import FlamingoForConditionalGeneration
from train.recipe import packaged

SMALL = [
    *("--steps", "24", "--data.glyphs.naming", "300", "--data.glyphs.episodes", "600", "--episodes", "12"),
    *("--data.sources.episodes.start_step", "4", "--optimizer.warmup_steps", "4", "--tracking.mode", "disabled"),
    *("--tuning_steps", "4", "--instructions", "4"),
]


def small_tuning(folder: Path) -> Path:
    """The packaged recipe of tuning, with few instructions."""
    recipe = yaml.safe_load(packaged("package:train/recipes/embedded_tune.yaml").read_text())
    queries = recipe["data"]["instructions"]["queries"]
    recipe["data"]["instructions"]["queries"] = dict.fromkeys(queries, 20)
    path = folder / "tune.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def quickstart(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`flamingo-quickstart`, cut short."""
    out.parent.mkdir(exist_ok=True)
    tuning = ["--tuning", str(small_tuning(out.parent))]
    return subprocess.run(
        [sys.executable, "-m", "train.quickstart", "--out", str(out), *SMALL, *tuning, *arguments],
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
    stages = {"shards", "pretraining", "instructions", "tuning", "evaluation", "report"}
    assert set(summary["seconds"]) == stages
    assert set(summary["tasks"]["glyphs_5way"]) == {"0", "1", "2", "4", "8"} and set(summary["tasks"]["naming"]) == {
        "0"
    }
    assert summary["chance"]["digits_5way"] == pytest.approx(0.2)
    episode_tasks = {"glyphs_5way", "glyphs_2way", "digits_5way", "digits_2way"}
    assert len(summary["controls"]) == 4 and all(episode_tasks <= set(tasks) for tasks in summary["controls"].values())
    for name in ("untuned", "tuned"):
        assert set(summary["instructions"][name]) == {"0", "1", "2", "4"}
        assert (run / f"instructions_{name}.json").exists()
    assert set(summary["tasks_tuned"]) == {"glyphs_5way", "naming"}
    for folder in (run / "model", run / "tuned" / "model"):
        FlamingoForConditionalGeneration.from_pretrained(folder)
    recipe = json.loads(json.loads((run / "results.json").read_text())["facts"]["model"]["recipe"])
    assert recipe["steps"] == 24 and recipe["data"]["glyphs"]["naming"] == 300
    report = (run / "report.html").read_text()
    assert "untuned" in report and "LA_NAMING" in report
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
    done = quickstart(run, "--seed", "1", "--steps", "2", "--episodes", "2", "--tuning", "")
    assert done.returncode == 0 and "moved to" in done.stdout, done.stderr
    summary = json.loads((run / "summary.json").read_text())
    assert summary["seed"] == 1 and "instructions" not in summary and "tuning" not in summary["seconds"]
    assert (run.with_name("quickstart-seed0") / "summary.json").read_bytes() == before


def test_a_wrong_key_is_one_line(tmp_path: Path) -> None:
    """Catches a traceback where a user mistypes."""
    done = quickstart(tmp_path / "x", "--stepz", "3")
    assert (
        done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("error: ") and "stepz" in done.stderr
    )
    assert "Traceback" not in done.stderr and not (tmp_path / "x").exists()
