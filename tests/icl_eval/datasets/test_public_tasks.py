"""The tasks of published data sets, as data: every name in them is one that the code knows."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
import yaml

from icl_eval import tasks
from icl_eval.datasets import DATASETS, load_dataset
from icl_eval.metrics import METRICS

FOLDER = tasks.FOLDER
FILES = sorted(path for path in FOLDER.glob("*.yaml") if path.stem not in tasks.needing_no_files())
TASKS = [path.stem for path in FILES if not path.stem.startswith("_")]
KEYS = set(
    "name version dataset split support template separator mode shots demonstrations ensemble zero_shot normalise "
    "metric generate inverted queries seed ways names within".split()
)
FIELDS = {"hateful_memes": {"text"}, "scienceqa": {"choices"}}
TAKES = {"generate": {"text"}, "rank": {"index", "ranking", "score"}}


def load(name: str) -> dict[str, Any]:
    """A task with what it includes; its own keys count."""
    content = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    included = content.pop("include", None)
    return {**(load(included) if included else {}), **content}


def test_all_published_data_sets_have_a_task() -> None:
    """A reader that no task uses, or a task that was lost."""
    used = {load(f"{name}.yaml")["dataset"] for name in TASKS}
    assert used == set(DATASETS) - {"glyphs", "digits"}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_fits_its_data_set(name: str) -> None:
    """A misspelled key, split, metric or field, a metric of another kind of prediction, a chunk that asks nothing."""
    task = load(f"{name}.yaml")
    assert task["name"] == name and set(task) <= KEYS
    assert {"version", "dataset", "split", "support", "template", "separator", "mode", "shots", "metric"} <= set(task)
    dataset = load_dataset(task["dataset"], Path("no folder"))
    assert task["split"] in dataset.splits and task["support"] in dataset.splits
    assert METRICS[task["metric"]].takes in TAKES[task["mode"]]
    assert ("generate" in task) == (task["mode"] == "generate")
    assert task["mode"] == "generate" or task["normalise"] in ("sum", "mean")
    assert task["demonstrations"] in ("random", "fixed", "balanced", "rices")
    assert task["zero_shot"] in ("honest", "text_only")
    fields = {field for _, field, _, _ in string.Formatter().parse(task["template"]) if field is not None}
    answer = "answer" if task["mode"] == "generate" else "label"
    assert answer in fields and fields <= {answer, "question"} | FIELDS.get(task["dataset"], set())
    assert task["template"].endswith(f":{{{answer}}}") or task["template"].endswith(f">{{{answer}}}")
    assert task["template"].startswith("<image>")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_task_is_short_and_says_what_it_is(path: Path) -> None:
    """A task that is no longer read at a glance."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 30 and lines[0].startswith("# ") and max(map(len, lines)) <= 120


@pytest.mark.parametrize(
    "name, template, tokens",
    [
        ("coco_captions", "<image>Output:{answer}", 20),
        ("flickr30k", "<image>Output:{answer}", 20),
        ("vqav2", "<image>Question:{question} Short answer:{answer}", 5),
        ("okvqa", "<image>Question:{question} Short answer:{answer}", 5),
        ("vizwiz", "<image>Question:{question} Short answer:{answer}", 5),
        ("textvqa", "<image>Question:{question} Short answer:{answer}", 10),
        ("coco_captions_otter", "<image>User: What does the image describe? GPT:<answer>{answer}", 20),
        ("vqav2_otter", "<image>User: {question} Please answer in short words. GPT:<answer>{answer}", 5),
    ],
)
def test_prompts_and_decoding_are_the_published_ones(name: str, template: str, tokens: int) -> None:
    """A prompt or a length under which scores cannot be compared with OpenFlamingo's or Otter's."""
    task = load(f"{name}.yaml")
    assert task["template"] == template
    keep = "first_caption" if task["metric"] == "cider" else "short_answer"
    assert task["generate"] == {"max_new_tokens": tokens, "beams": 3, "length_penalty": 0, "keep": keep}
    assert task["separator"] == ("" if name.endswith("otter") else "\n")
    assert task["zero_shot"] == "text_only"
