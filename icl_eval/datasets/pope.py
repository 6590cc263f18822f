"""POPE (Li et al. 2023, arXiv 2305.10355): is an object on the image? Half of those asked for are not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from icl_eval.datasets import Example
from icl_eval.datasets.reading import LocalDataSet, json_lines

ANSWERS = ("yes", "no")


class Pope(LocalDataSet):
    """`coco_pope_{split}.json`, a line a question: `question_id`, `image`, `text`, `label`, yes or no.

    Splits differ in how the absent objects were chosen. Images are those of COCO's val2014.
    """

    splits = ("random", "popular", "adversarial")
    roots = ("", "../coco")
    files: ClassVar = {
        "coco_pope_*.json": "questions: random, popular, adversarial; or in coco/",
        "val2014/COCO_val2014_*.jpg": "images; or in ../coco/",
    }

    def read(self, split: str) -> Iterator[Example]:
        """An example for each question."""
        name = f"coco_pope_{split}.json"
        for entry in json_lines(self.first(name, f"coco/{name}")):
            label = entry.text("label")
            if label not in ANSWERS:
                raise entry.error("label", "yes or no")
            picture = f"val2014/{entry.text('image')}"
            yield Example(entry.name("question_id"), (picture,), entry.text("text"), (label,), label)

    def candidates(self) -> tuple[str, ...]:
        """Yes and no."""
        return ANSWERS
