"""VQA accuracy: the official normalisation with its habits, and the official script itself, item by item."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from flamingo import FlamingoError
from icl_eval.metrics import METRICS
from icl_eval.metrics.stems import stem
from icl_eval.metrics.vqa import normalise, ok_vqa_accuracy, vqa_accuracy


@pytest.mark.parametrize(
    ("answer", "normalised"),
    [
        ("The  Dog\n", "dog"),
        ("a an the", ""),
        ("Two dogs, one cat", "2 dogs 1 cat"),
        ("none", "0"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("couldnt've couldn'tve couldntve", "couldn't've couldn't've couldntve"),
        ("somebody'd", "somebodyd"),
        ("Im", "im"),  # the script's entry for it is in upper case, and never met
        ("girl's", "girl's"),
        ("2:50 p.m.", "2:50 pm"),
        ("3.5", "3.5"),
        ("3.", "3"),
        ("100,978", "100978"),
        ("red/white", "red white"),
        ("red/ white", "red white"),
        ("red /white t-shirt", "red white t shirt"),
        ("1,000 t-shirts", "1000 tshirts"),  # a comma between digits makes all punctuation vanish
        ("a-", ""),
        ("." * 40 + "x", "." * 8 + "x"),
    ],
)
def test_answers_are_normalised_as_the_official_script_does(answer: str, normalised: str) -> None:
    """A rule left out or applied in another order: numbers before articles before contractions, punctuation first."""
    assert normalise(answer) == normalised


def test_each_annotator_is_left_out_once() -> None:
    """min(matches / 3, 1) without leaving one out: 3 of 10 would then count in full."""
    answers = ["cat"] * 3 + ["dog"] * 7
    found = vqa_accuracy(["cat", "dog", "Dog.", "cow"], [answers] * 4)
    assert found.tolist() == pytest.approx([0.9, 1, 1, 0])


def test_where_all_annotators_agree_the_script_compares_answers_as_they_are() -> None:
    """The script's habit unified away, or OpenFlamingo's departure from it mistaken for it."""
    answers = [["yes"] * 10]
    for name, expected in (("vqa_accuracy", 0), ("vqa_accuracy_open_flamingo", 1)):
        assert METRICS[name](["Yes."], answers).tolist() == [expected]
        assert METRICS[name](["yes\n"], answers).tolist() == [1]


def official(annotations: list[dict], answers: dict[int, str]) -> dict[int, float]:
    """Accuracies by OpenFlamingo's copy of the official script, which normalises unanimous answers too."""
    package = importlib.util.find_spec("open_flamingo")
    if package is None:
        pytest.skip("the script to compare with comes with open_flamingo")
    path = Path(package.submodule_search_locations[0]) / "eval" / "vqa_metric.py"
    spec = importlib.util.spec_from_file_location("vqa_metric", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    evaluation = script.VQAEval(None, None, n=15)
    evaluation.vqa = SimpleNamespace(qa={each["question_id"]: each for each in copy.deepcopy(annotations)})
    evaluation.vqaRes = SimpleNamespace(qa={number: {"answer": answer} for number, answer in answers.items()})
    evaluation.evaluate(list(answers))
    return {number: accuracy / 100 for number, accuracy in evaluation.evalQA.items()}


MADE = {
    "as given": lambda answer: answer,
    "in upper case, as a sentence": lambda answer: answer.upper() + ".",
    "with an article": lambda answer: f"The {answer}\n",
    "numbers in words": lambda answer: " ".join(
        dict(zip("0123456789", "none one two three four five six seven eight nine".split(), strict=True)).get(
            word, word
        )
        for word in answer.split()
    ),
    "joined by hyphens": lambda answer: answer.replace(" ", "-"),
    "in brackets": lambda answer: f"({answer}) !",
    "without apostrophes": lambda answer: answer.replace("'", ""),
    "with a number": lambda answer: f"1,234 {answer}",
    "another": lambda answer: answer + " x",
}


@pytest.mark.parametrize("way", MADE)
def test_real_answers_score_as_by_the_official_script(real_data: Path, way: str) -> None:
    """Any departure from the script on real questions, seen item by item."""
    content = json.loads((real_data / "textvqa_val" / "val_annotations_vqa_format.json").read_text())
    annotations = content["annotations"]
    targets = [[answer["answer"] for answer in annotation["answers"]] for annotation in annotations]
    said = [MADE[way](answers[place % len(answers)]) for place, answers in enumerate(targets)]
    numbers = [annotation["question_id"] for annotation in annotations]
    expected = official(annotations, dict(zip(numbers, said, strict=True)))
    found = METRICS["vqa_accuracy_open_flamingo"](said, targets)
    assert len(found) == 500
    assert found == pytest.approx([expected[number] for number in numbers], abs=1e-12)

    def as_they_are(answers, prediction):
        return float(answers[0].strip() == prediction.replace("\n", " ").strip())

    by_script = [
        as_they_are(answers, prediction) if len({answer.strip() for answer in answers}) == 1 else expected[number]
        for number, answers, prediction in zip(numbers, targets, said, strict=True)
    ]
    assert METRICS["vqa_accuracy"](said, targets) == pytest.approx(by_script, abs=1e-12)


@pytest.mark.parametrize(
    ("answer", "stemmed"),
    [
        ("Surfing", "surf"),
        ("riding horses", "ride horse"),
        ("running", "run"),
        ("skateboarding", "skateboard"),
        ("eating", "eat"),
        ("falling", "fall"),
        ("driving", "drive"),
        ("dancing", "dance"),
        ("decorating", "decorate"),
        ("tasting", "taste"),
        ("king ring spring", "king ring spring"),
        ("berries", "berry"),
        ("benches boxes dishes", "bench box dish"),
        ("men women children", "man woman child"),
        ("bus glass tennis", "bus glass tennis"),
        ("glasses jeans pants skis lenses", "glass jean pant ski lens"),
        ("adding creating", "add create"),
        ("firefighters buildings sickness elevators", "firefight build sick elev"),  # so in the annotations
        ("farmer's hat", "farmer hat"),
        ("morning", "morn"),
    ],
)
def test_stems(answer: str, stemmed: str) -> None:
    """Plurals and -ing forms that OK-VQA's stemmed answers would never equal."""
    assert stem(answer) == stemmed


def test_ok_vqa_takes_the_annotators_own_stems() -> None:
    """A prediction that an annotator gave word for word, and that counts as wrong since our stem of it differs."""
    answers = [("elevators", "elev")] * 5 + [("stairs", "stair")] * 5
    assert ok_vqa_accuracy("Elevators", answers) == 1
    assert ok_vqa_accuracy("stair", answers) == 1
    assert ok_vqa_accuracy("ladder", answers) == 0
    assert METRICS["ok_vqa_accuracy"](["surfing"], [["surf"] * 4 + ["wave"] * 6]).tolist() == [1]


def test_a_single_annotator_cannot_be_left_out() -> None:
    """A task with one answer a question, all of whose accuracies would be 0."""
    for name in ("vqa_accuracy", "ok_vqa_accuracy"):
        with pytest.raises(FlamingoError, match="target 0 .* at least two annotators"):
            METRICS[name](["yes"], [["yes"]])
