"""VL-ICL's folders as released."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flamingo.errors import FlamingoError
from icl_eval.datasets import Example, load_dataset
from icl_eval.datasets.checking import problems
from tests.icl_eval.datasets.published import picture, write_json


@pytest.mark.parametrize("name, folder", [("clevr_counting", "clevr"), ("textocr", "textocr")])
def test_counting_and_reading(name: str, folder: str, tmp_path: Path) -> None:
    """Images not found, since their paths begin with the folder's own name; numbers that are no answers."""
    entry = {"id": 4, "image": [f"{folder}/query/4.png"], "question": "shape: cube", "answer": 3}
    write_json(tmp_path / folder / "query.json", [entry])
    write_json(
        tmp_path / folder / "support.json", [{"image": f"{folder}/support/0.png", "question": "q", "answer": "a"}]
    )
    for place in ("query/4.png", "support/0.png"):
        picture(tmp_path / folder / place)
    dataset = load_dataset(name, tmp_path)
    assert dataset.examples("query") == (Example("4", ("query/4.png",), "shape: cube", ("3",), "3"),)
    assert dataset.examples("support") == (Example("0", ("support/0.png",), "q", ("a",), "a"),)
    assert problems(name, tmp_path) == []


@pytest.mark.parametrize("name, images", [("operator_induction", 1), ("operator_induction_interleaved", 2)])
def test_operator_induction(name: str, images: int, tmp_path: Path) -> None:
    """Support answers under another operator than the one they are marked with; one of two images lost."""
    paths = [f"{name}/{number}.png" for number in range(images)]
    entry = {
        "id": "7",
        "image": paths,
        "question": "What is the result?",
        "operator": ["+", "-", "x"],
        "answer": [7, 3, 10],
    }
    write_json(tmp_path / name / "support.json", [entry])
    write_json(tmp_path / name / "query.json", [{**entry, "operator": "x", "answer": 10}])
    dataset = load_dataset(name, tmp_path)
    support = dataset.examples("support")
    assert [(example.id, example.answers, example.fields["operator"]) for example in support] == [
        ("7/+", ("7",), "+"),
        ("7/-", ("3",), "-"),
        ("7/x", ("10",), "x"),
    ]
    (query,) = dataset.examples("query")
    assert query.fields == {"operator": "x"} and query.answers == ("10",)
    assert query.media == support[0].media == tuple(f"{number}.png" for number in range(images))


@pytest.mark.parametrize(
    "split, change, message",
    [
        ("support", {"answer": [7, 3]}, r"support\.json: \[0\]: answer: \[7, 3\], expected one under each of \+, -, x"),
        ("query", {"operator": "/", "answer": 3}, r"query\.json: \[0\]: operator: '/', expected one of \+, -, x"),
        ("query", {"operator": "+"}, r"query\.json: \[0\]: answer: \[7, 3, 10\], expected a text"),
    ],
)
def test_operator_induction_refuses_others(split: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Answers that are paired with the wrong operators because one is missing."""
    entry = {"image": ["operator_induction/1.png"], "question": "?", "operator": ["+"], "answer": [7, 3, 10]}
    write_json(tmp_path / "operator_induction" / f"{split}.json", [{**entry, **change}])
    with pytest.raises(FlamingoError, match=message):
        load_dataset("operator_induction", tmp_path).examples(split)


def episode(number: int) -> dict[str, Any]:
    names = ["dax", "perpo"] if number else ["blick", "slation"]
    support = {
        name: {"images": [f"open_mi/support/{number}_{name}_{place}.jpg" for place in range(2)], "caption": "This is"}
        for name in names
    }
    return {
        "id": number, "image": [f"open_mi/query/{number}.jpg"], "question": "This is a", "answer": names[1],
        "classes": names, "support": support,
    }  # fmt: skip


def test_open_miniimagenet(tmp_path: Path) -> None:
    """Support of one query that serves another, in which the same name means something else."""
    write_json(tmp_path / "open_mi" / "query.json", [episode(0), episode(1)])
    dataset = load_dataset("open_miniimagenet", tmp_path)
    assert dataset.examples("query")[1] == Example(
        "1", ("query/1.jpg",), "This is a", ("perpo",), "perpo", ("dax", "perpo"), {"episode": "1"}
    )
    support = dataset.examples("support")
    assert len(support) == 8
    assert support[5] == Example(
        "1/dax/1", ("support/1_dax_1.jpg",), "This is a", ("dax",), "dax", ("dax", "perpo"), {"episode": "1"}
    )
    write_json(tmp_path / "open_mi" / "query.json", [episode(0), {**episode(1), "answer": "blick"}])
    with pytest.raises(FlamingoError, match=r"query\.json: \[1\]: answer: 'blick', expected one of its classes"):
        dataset.examples("query")
    write_json(tmp_path / "open_mi" / "query.json", [{**episode(0), "classes": ["blick", "slation", "dax"]}])
    with pytest.raises(FlamingoError, match=r"\[0\]: support: dax: no such key"):
        dataset.examples("support")
