"""Hateful Memes, POPE, ScienceQA and NLVR: questions with a few answers to choose among."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flamingo.errors import FlamingoError
from icl_eval.datasets import Example, load_dataset
from icl_eval.datasets.checking import problems
from tests.icl_eval.datasets.published import picture, write_json, write_lines


def test_hateful_memes(tmp_path: Path) -> None:
    """Labels the wrong way round, for which the area under the curve is mirrored; words of the meme that are lost."""
    rows = [
        {"id": 42953, "img": "img/42953.png", "label": 1, "text": "its their character"},
        {"id": "01235", "img": "img/01235.png", "label": 0, "text": "don't be afraid"},
    ]
    write_lines(tmp_path / "hateful_memes" / "dev_seen.jsonl", rows)
    write_lines(tmp_path / "hateful_memes" / "test.jsonl", [{"id": 1, "img": "img/1.png", "text": "a"}])
    dataset = load_dataset("hateful_memes", tmp_path)
    assert dataset.candidates() == ("no", "yes")
    assert dataset.examples("dev_seen") == (
        Example("42953", ("img/42953.png",), "", ("yes",), "yes", fields={"text": "its their character"}),
        Example("01235", ("img/01235.png",), "", ("no",), "no", fields={"text": "don't be afraid"}),
    )
    assert dataset.examples("test") == (Example("1", ("img/1.png",), fields={"text": "a"}),)


@pytest.mark.parametrize("label", [2, "1", None])
def test_hateful_memes_refuses_other_labels(label: Any, tmp_path: Path) -> None:
    """A label that counts as not hateful because it is not 1."""
    rows = [{"id": 1, "img": "img/1.png", "label": label, "text": "a"}]
    write_lines(tmp_path / "hateful_memes" / "dev.jsonl", rows)
    with pytest.raises(FlamingoError, match=r"dev\.jsonl:1: label: .*expected"):
        load_dataset("hateful_memes", tmp_path).examples("dev")


@pytest.mark.parametrize("place", ["coco_pope_popular.json", "coco/coco_pope_popular.json"])
def test_pope(place: str, tmp_path: Path) -> None:
    """A split of another file, or images that are not COCO's."""
    row = {"question_id": 3, "image": "COCO_val2014_000000016631.jpg", "text": "Is there a dog?", "label": "no"}
    write_lines(tmp_path / "pope" / place, [row])
    dataset = load_dataset("pope", tmp_path)
    name = "val2014/COCO_val2014_000000016631.jpg"
    assert dataset.examples("popular") == (Example("3", (name,), "Is there a dog?", ("no",), "no"),)
    assert dataset.candidates() == ("yes", "no")
    write_lines(tmp_path / "pope" / place, [{**row, "label": "No"}])
    with pytest.raises(FlamingoError, match=r"popular\.json:1: label: 'No', expected yes or no"):
        dataset.examples("popular")


def science(**change: Any) -> dict[str, Any]:
    problem = {
        "question": "Which is a solid?", "choices": ["milk", "rock", "air"], "answer": 1, "hint": "", "image": None,
        "task": "closed choice", "grade": "grade2", "subject": "natural science", "lecture": "Solids keep their shape.",
        "solution": "A rock is a solid.", "split": "test",
    }  # fmt: skip
    return {**problem, **change}


def write_science(folder: Path, **problems: Any) -> None:
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", {"test": list(problems), "train": []})


def test_scienceqa(tmp_path: Path) -> None:
    """A right choice by the wrong index, questions without an image among those with one, images not found."""
    write_science(tmp_path / "scienceqa", **{"9": science(), "4": science(image="image.png", answer=0)})
    dataset = load_dataset("scienceqa", tmp_path)
    without, with_image = dataset.examples("test")
    assert (without.id, without.media, without.label, without.answers) == ("9", (), "rock", ("rock",))
    assert without.candidates == ("milk", "rock", "air")
    assert without.fields["choices"] == "(A) milk (B) rock (C) air" and without.fields["letter"] == "B"
    assert dataset.examples("test_image") == (with_image,)
    assert with_image.media == ("test/4/image.png",) and with_image.label == "milk"
    for folder, level in (("", 1), ("images/", 2)):
        data = picture(tmp_path / "scienceqa" / f"{folder}test/4/image.png", level)
        assert dataset.medium("test/4/image.png").data == data  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"answer": 3}, r"problems\.json: 9: answer: 3, expected 0 to 2"),
        ({"answer": -1}, r"problems\.json: 9: answer: -1, expected 0 to 2"),
        ({"choices": ["a", "a"]}, r"problems\.json: 9: choices: \['a', 'a'\], expected choices that differ"),
    ],
)
def test_scienceqa_refuses_other_problems(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    """A problem without a right choice, or with two that are the same text."""
    write_science(tmp_path / "scienceqa", **{"9": science(**change)})
    with pytest.raises(FlamingoError, match=message):
        load_dataset("scienceqa", tmp_path).examples("test")


def test_scienceqa_needs_every_problem_of_a_split(tmp_path: Path) -> None:
    """Ids of a split that are left out because no problem has them."""
    write_science(tmp_path / "scienceqa", **{"9": science()})
    write_json(tmp_path / "scienceqa" / "pid_splits.json", {"test": ["9", "10"]})
    with pytest.raises(FlamingoError, match=r"problems\.json: 10: no such key, expected an object"):
        load_dataset("scienceqa", tmp_path).examples("test")


def sentence(identifier: str, label: str = "true") -> dict[str, Any]:
    return {"sentence": "There is a box.", "label": label, "identifier": identifier, "directory": "2", "evals": {}}


@pytest.mark.parametrize("layout", ["dev.json images", "dev/dev.json dev/images/2"])
def test_nlvr_in_both_layouts(layout: str, tmp_path: Path) -> None:
    """The release's folders, or images all in one, that are not found; the picture of another order of boxes."""
    file, images = layout.split()
    write_lines(tmp_path / "nlvr" / file, [sentence("15-0"), sentence("15-1", "false")])
    for name in ("dev-15-0-1.png", "dev-15-0-5.png", "dev-15-1-0.png", "dev-115-0-0.png"):
        picture(tmp_path / "nlvr" / images / name)
    dataset = load_dataset("nlvr", tmp_path)
    assert dataset.examples("dev") == (
        Example("15-0", (f"{images}/dev-15-0-1.png",), "There is a box.", ("true",), "true"),
        Example("15-1", (f"{images}/dev-15-1-0.png",), "There is a box.", ("false",), "false"),
    )
    assert problems("nlvr", tmp_path, ["dev"]) == []
    (tmp_path / "nlvr" / images / "dev-15-1-0.png").unlink()
    with pytest.raises(FlamingoError, match=r"dev\.json:2: identifier: '15-1', expected an image dev-15-1-0\.png"):
        dataset.examples("dev")


def test_real_nlvr(real_data: Path) -> None:
    """Sentences with another's label or picture: the counts are the release's."""
    examples = load_dataset("nlvr", real_data).examples("dev")
    assert len(examples) == 989 and sum(example.label == "true" for example in examples) == 547
    assert examples[0].question == "Each grey box contains atleast one yellow object touching the edge"
    assert examples[0].media == ("images/dev-1572-0-0.png",)
    assert problems("nlvr", real_data, ["dev"], media=1000) == []
