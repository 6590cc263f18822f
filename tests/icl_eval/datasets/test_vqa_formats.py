"""VQAv2, OK-VQA, TextVQA and VizWiz as published, and real questions of TextVQA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flamingo.errors import FlamingoError
from icl_eval.datasets import Example, load_dataset
from icl_eval.datasets.vqa import raw_and_stemmed
from icl_eval.metrics import METRICS
from tests.icl_eval.datasets.published import picture, write_json


def question(number: int, image_id: Any, text: str = "What is it?") -> dict[str, Any]:
    return {"image_id": image_id, "question": text, "question_id": number}


def annotation(number: int, *answers: str, **more: Any) -> dict[str, Any]:
    given = [{"answer": text, "answer_confidence": "yes", "answer_id": n} for n, text in enumerate(answers, 1)]
    return {"question_id": number, "answers": given, "multiple_choice_answer": answers[0], **more}


def write_vqa(folder: Path, questions: str, annotations: str, rows: list[Any], answers: list[Any]) -> None:
    write_json(folder / questions, {"info": {}, "task_type": "Open-Ended", "questions": rows, "license": {}})
    write_json(folder / annotations, {"info": {}, "annotations": answers})


def test_vqav2(tmp_path: Path) -> None:
    """Answers of another question where the two files differ in order; images of the other split; COCO's folder."""
    for split in ("train", "val"):
        rows = [question(4580250, 458025), question(4580251, 9)]
        write_vqa(
            tmp_path / "vqav2",
            f"v2_OpenEnded_mscoco_{split}2014_questions.json",
            f"v2_mscoco_{split}2014_annotations.json",
            rows,
            [annotation(4580251, "no", "no"), annotation(4580250, "net", "Net", "net")],
        )
    dataset = load_dataset("vqav2", tmp_path)
    for split in ("train", "val"):
        name = f"{split}2014/COCO_{split}2014_000000458025.jpg"
        examples = dataset.examples(split)
        assert examples[0] == Example("4580250", (name,), "What is it?", ("net", "Net", "net"))
        assert examples[1].answers == ("no", "no")
    data = picture(tmp_path / "coco" / "val2014" / "COCO_val2014_000000458025.jpg", 1)
    assert dataset.medium("val2014/COCO_val2014_000000458025.jpg").data == data  # type: ignore[union-attr]
    own = picture(tmp_path / "vqav2" / "val2014" / "COCO_val2014_000000458025.jpg", 2)
    assert dataset.medium("val2014/COCO_val2014_000000458025.jpg").data == own  # type: ignore[union-attr]


def test_vqav2_test_has_no_answers(tmp_path: Path) -> None:
    """Splits of the challenge server, whose answers are not published, that cannot be read."""
    write_json(tmp_path / "vqav2" / "v2_OpenEnded_mscoco_test-dev2015_questions.json", {"questions": [question(1, 2)]})
    (example,) = load_dataset("vqav2", tmp_path).examples("test-dev")
    assert example == Example("1", ("test2015/COCO_test2015_000000000002.jpg",), "What is it?")


@pytest.mark.parametrize(
    "answers, message",
    [
        ([annotation(1, "a")], r"questions\[1\]: question_id: 2, expected a question that v2_mscoco_val2014"),
        ([annotation(n, "a") for n in (1, 2, 3)], r"annotations\.json: question_id 3, expected a question of v2_Open"),
        ([annotation(n, "a") for n in (1, 2, 2)], r"annotations\[2\]: question_id: 2, expected one annotation a"),
    ],
)
def test_questions_and_answers_belong_together(answers: list[Any], message: str, tmp_path: Path) -> None:
    """Questions without answers, or answers without a question, that are left out."""
    write_vqa(
        tmp_path / "vqav2",
        "v2_OpenEnded_mscoco_val2014_questions.json",
        "v2_mscoco_val2014_annotations.json",
        [question(1, 1), question(2, 2)],
        answers,
    )
    with pytest.raises(FlamingoError, match=message):
        load_dataset("vqav2", tmp_path).examples("val")


def test_okvqa_has_raw_and_stemmed_answers(tmp_path: Path) -> None:
    """Answers that the metric cannot pair with their raw forms, or a raw answer with a line break that shifts them."""
    given = [
        {"answer_id": 1, "raw_answer": "pony tail", "answer": "pony tail", "answer_confidence": "yes"},
        {"answer_id": 2, "raw_answer": "riding\nhorses", "answer": "ride hors", "answer_confidence": "yes"},
    ]
    write_vqa(
        tmp_path / "okvqa",
        "OpenEnded_mscoco_val2014_questions.json",
        "mscoco_val2014_annotations.json",
        [question(2971475, 297147)],
        [{"question_id": 2971475, "image_id": 297147, "answers": given}],
    )
    (example,) = load_dataset("okvqa", tmp_path).examples("val")
    assert example.media == ("val2014/COCO_val2014_000000297147.jpg",)
    assert example.answers == ("pony tail", "ride hors")
    assert raw_and_stemmed(example) == (("pony tail", "pony tail"), ("riding horses", "ride hors"))
    assert METRICS["ok_vqa_accuracy"](["pony tail"], [raw_and_stemmed(example)])[0] > 0


def test_textvqa_in_both_formats(tmp_path: Path) -> None:
    """The released format and OpenFlamingo's that make different examples, so that draws differ with the download."""
    answers = ["dakota", "Dakota digital"]
    own = {"question": "What brand?", "image_id": "003a8ae2ef43b901", "question_id": 34602, "answers": answers,
           "image_classes": ["Camera"], "set_name": "val"}  # fmt: skip
    write_json(tmp_path / "a" / "textvqa" / "TextVQA_0.5.1_val.json", {"dataset_name": "textvqa", "data": [own]})
    write_vqa(
        tmp_path / "b" / "textvqa",
        "val_questions_vqa_format.json",
        "val_annotations_vqa_format.json",
        [question(34602, "003a8ae2ef43b901", "What brand?")],
        [annotation(34602, *answers)],
    )
    expected = (Example("34602", ("train_images/003a8ae2ef43b901.jpg",), "What brand?", tuple(answers)),)
    assert load_dataset("textvqa", tmp_path / "a").examples("val") == expected
    assert load_dataset("textvqa", tmp_path / "b").examples("val") == expected


def test_vizwiz_in_both_formats(tmp_path: Path) -> None:
    """The released format, without ids, and OpenFlamingo's that make different examples."""
    name = "VizWiz_val_00000000.jpg"
    given = annotation(0, "unanswerable", "laptop screen")["answers"]
    own = {"image": name, "question": "What is it?", "answers": given, "answer_type": "other", "answerable": 1}
    write_json(tmp_path / "a" / "vizwiz" / "Annotations" / "val.json", [own])
    write_json(tmp_path / "a" / "vizwiz" / "Annotations" / "test.json", [{"image": "t_1.jpg", "question": "?"}])
    write_vqa(
        tmp_path / "b" / "vizwiz",
        "val_questions_vqa_format.json",
        "val_annotations_vqa_format.json",
        [question(0, name)],
        [annotation(0, "unanswerable", "laptop screen")],
    )
    expected = (Example("VizWiz_val_00000000", (f"val/{name}",), "What is it?", ("unanswerable", "laptop screen")),)
    assert load_dataset("vizwiz", tmp_path / "a").examples("val") == expected
    assert load_dataset("vizwiz", tmp_path / "b").examples("val") == expected
    assert load_dataset("vizwiz", tmp_path / "a").examples("test") == (Example("t_1", ("test/t_1.jpg",), "?"),)


def test_real_questions_of_textvqa(real_data: Path) -> None:
    """Real files that are read otherwise than the official script reads them: answers of all ten, in their order."""
    examples = load_dataset("textvqa", real_data).examples("val")
    assert len(examples) == 500 and {len(example.answers) for example in examples} == {10}
    first = examples[0]
    assert (first.id, first.question) == ("34602", "what is the brand of this camera?")
    assert first.answers[:4] == ("nous les gosses", "dakota", "clos culombu", "dakota digital")
    assert first.media == ("train_images/003a8ae2ef43b901.jpg",)
