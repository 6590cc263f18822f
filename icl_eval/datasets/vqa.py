"""Questions with the answers of ten annotators: VQAv2, OK-VQA, TextVQA and VizWiz, which differ in names of files.

The VQA format (visualqa.org/download): a file with `questions` (`question_id`, `image_id`, `question`), one with
`annotations` (`question_id`, `answers`, each with its `answer`). TextVQA and VizWiz have formats of their own, too,
with questions and answers in one file; OpenFlamingo's evaluation carries both in the VQA format.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import ClassVar, NamedTuple

from flamingo.errors import FlamingoError
from icl_eval.datasets import Example
from icl_eval.datasets.reading import Entry, LocalDataSet, json_entries

RAW_ANSWERS = "raw_answers"
"""field of OK-VQA's examples: their answers before stemming, a line each, in the same order"""


@dataclass(frozen=True)
class Files:
    """The files of one split.

    Attributes:
        questions: file of the questions.
        annotations: file of the answers; empty where they are not published.
        picture: an image's path, as a format of its `image_id`.
    """

    questions: str
    annotations: str
    picture: str


class Answers(NamedTuple):
    """What annotators said to one question, and the fields that come of it."""

    texts: tuple[str, ...] = ()
    fields: Mapping[str, str] = {}


class Vqa(LocalDataSet):
    """A data set in the VQA format."""

    layout: ClassVar[Mapping[str, Files]]

    def read(self, split: str) -> Iterator[Example]:
        """An example for each question; answers are found by `question_id`, whatever their order."""
        files = self.layout[split]
        answers = self._annotations(files)
        for entry in json_entries(self.folder / files.questions, "questions"):
            given = answers.pop(entry.name("question_id"), None) if files.annotations else Answers()
            if given is None:
                raise entry.error("question_id", f"a question that {files.annotations} answers")
            yield Example(
                self.identifier(entry),
                (self.picture(entry, files),),
                entry.text("question"),
                given.texts,
                fields=given.fields,
            )
        if answers:
            place = self.folder / files.annotations
            raise FlamingoError(f"{place}: question_id {next(iter(answers))}, expected a question of {files.questions}")

    def identifier(self, entry: Entry) -> str:
        """Id of a question."""
        return entry.name("question_id")

    def picture(self, entry: Entry, files: Files) -> str:
        """Path of a question's image."""
        padded = ":" in files.picture
        image_id = entry.number("image_id") if padded else entry.name("image_id")
        return sys.intern(files.picture.format(image_id))

    def answers(self, entry: Entry) -> Answers:
        """The answers of an annotation."""
        return Answers(_interned(answer.name("answer") for answer in entry.entries("answers")))

    def _annotations(self, files: Files) -> dict[str, Answers]:
        found: dict[str, Answers] = {}
        if files.annotations:
            for entry in json_entries(self.folder / files.annotations, "annotations"):
                question_id = entry.name("question_id")
                if question_id in found:
                    raise entry.error("question_id", "one annotation a question")
                found[question_id] = self.answers(entry)
        return found


def _interned(texts: Iterable[str]) -> tuple[str, ...]:
    """Most of the answers to 10⁵ questions are the same few."""
    return tuple(map(sys.intern, texts))


def _coco(questions: str, annotations: str, images: str) -> Files:
    return Files(questions, annotations, f"{images}/COCO_{images}_{{:012d}}.jpg")


class VqaV2(Vqa):
    """VQAv2 (Goyal et al. 2017, arXiv 1612.00837) on COCO's images, which may also lie in the folder `coco` beside."""

    layout: ClassVar = {
        "train": _coco(
            "v2_OpenEnded_mscoco_train2014_questions.json", "v2_mscoco_train2014_annotations.json", "train2014"
        ),
        "val": _coco("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json", "val2014"),
        "test-dev": _coco("v2_OpenEnded_mscoco_test-dev2015_questions.json", "", "test2015"),
        "test": _coco("v2_OpenEnded_mscoco_test2015_questions.json", "", "test2015"),
    }
    splits = tuple(layout)
    roots = ("", "../coco")
    files: ClassVar = {
        "v2_OpenEnded_mscoco_*_questions.json": "questions: train2014, val2014; test-dev2015, test2015 without answers",
        "v2_mscoco_*_annotations.json": "answers: train2014, val2014",
        "train2014/COCO_train2014_*.jpg": "images of train; or in ../coco/",
        "val2014/COCO_val2014_*.jpg": "images of val; or in ../coco/",
        "test2015/COCO_test2015_*.jpg": "images of test-dev and test; or in ../coco/",
    }


class OkVqa(Vqa):
    """OK-VQA (Marino et al. 2019, arXiv 1906.00067), annotations 1.1: answers are stems, raw ones in a field."""

    layout: ClassVar = {
        "train": _coco("OpenEnded_mscoco_train2014_questions.json", "mscoco_train2014_annotations.json", "train2014"),
        "val": _coco("OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json", "val2014"),
    }
    splits = tuple(layout)
    roots = ("", "../coco")
    files: ClassVar = {
        "OpenEnded_mscoco_*_questions.json": "questions: train2014, val2014",
        "mscoco_*_annotations.json": "answers: train2014, val2014",
        "train2014/COCO_train2014_*.jpg": "images of train; or in ../coco/",
        "val2014/COCO_val2014_*.jpg": "images of val; or in ../coco/",
    }

    def answers(self, entry: Entry) -> Answers:
        """The answers of an annotation, with what was said before it was stemmed."""
        given = entry.entries("answers")
        raw = "\n".join(" ".join(answer.name("raw_answer").split()) for answer in given)
        return Answers(_interned(answer.name("answer") for answer in given), {RAW_ANSWERS: raw})


def raw_and_stemmed(example: Example) -> tuple[tuple[str, str], ...]:
    """What the metric ok_vqa_accuracy compares with: (raw answer, stemmed answer) of each annotator."""
    return tuple(zip(example.fields[RAW_ANSWERS].split("\n"), example.answers, strict=True))


class TextVqa(Vqa):
    """TextVQA 0.5.1 (Singh et al. 2019, arXiv 1904.08920), in its own format or in the VQA format."""

    layout: ClassVar = {
        "train": Files("train_questions_vqa_format.json", "train_annotations_vqa_format.json", "train_images/{}.jpg"),
        "val": Files("val_questions_vqa_format.json", "val_annotations_vqa_format.json", "train_images/{}.jpg"),
        "test": Files("test_questions_vqa_format.json", "", "test_images/{}.jpg"),
    }
    splits = tuple(layout)
    files: ClassVar = {
        "TextVQA_0.5.1_*.json": "questions and answers: train, val; test without answers",
        "*_questions_vqa_format.json": "instead: questions",
        "*_annotations_vqa_format.json": "instead: answers",
        "train_images/*.jpg": "images of train and val",
        "test_images/*.jpg": "images of test",
    }

    def read(self, split: str) -> Iterator[Example]:
        """An example for each question."""
        path = self.folder / f"TextVQA_0.5.1_{split}.json"
        if not path.exists():
            yield from super().read(split)
            return
        for entry in json_entries(path, "data"):
            answers = _interned(entry.texts("answers")) if "answers" in entry.values else ()
            picture = self.picture(entry, self.layout[split])
            yield Example(self.identifier(entry), (picture,), entry.text("question"), answers)


class VizWiz(Vqa):
    """VizWiz-VQA (Gurari et al. 2018, arXiv 1802.08218), in its own format or in the VQA format.

    Its own gives questions no id. There is one question an image, so the image's name is the id, in both formats.
    """

    layout: ClassVar = {
        "train": Files("train_questions_vqa_format.json", "train_annotations_vqa_format.json", "train/{}"),
        "val": Files("val_questions_vqa_format.json", "val_annotations_vqa_format.json", "val/{}"),
        "test": Files("test_questions_vqa_format.json", "", "test/{}"),
    }
    splits = tuple(layout)
    files: ClassVar = {
        "Annotations/*.json": "questions and answers: train, val; test without answers",
        "*_questions_vqa_format.json": "instead: questions",
        "*_annotations_vqa_format.json": "instead: answers",
        "*/VizWiz_*.jpg": "images of train, val and test, a folder each",
    }

    def read(self, split: str) -> Iterator[Example]:
        """An example for each question."""
        path = self.folder / "Annotations" / f"{split}.json"
        if not path.exists():
            yield from super().read(split)
            return
        for entry in json_entries(path):
            name = entry.text("image")
            answers = self.answers(entry).texts if "answers" in entry.values else ()
            picture = self.layout[split].picture.format(name)
            yield Example(PurePosixPath(name).stem, (picture,), entry.text("question"), answers)

    def identifier(self, entry: Entry) -> str:
        """The image's name, without its ending."""
        return PurePosixPath(entry.text("image_id")).stem
