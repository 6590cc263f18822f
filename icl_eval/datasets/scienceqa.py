"""ScienceQA (Lu et al. 2022, arXiv 2209.09513): questions of school science with choices, about half with an image."""

from __future__ import annotations

from collections.abc import Iterator
from string import ascii_uppercase
from typing import ClassVar

from icl_eval.datasets import Example
from icl_eval.datasets.reading import Entry, LocalDataSet, json_object

WITH_IMAGE = "_image"
"""ending of a split's name that leaves the questions without an image out"""
_SPLITS = ("train", "val", "test", "trainval", "minitrain", "minival", "minitest")


class ScienceQa(LocalDataSet):
    """`problems.json` by id, `pid_splits.json` with the ids of each split, and `images/{split}/{id}/image.png`.

    Each published split has a second one, as "test_image": its questions with an image ("IMG" in the paper). Templates
    may name the fields `choices` ("(A) … (B) …"), `letter` (of the right one), `hint`, `lecture` and `solution`.
    """

    splits = tuple(split + ending for split in _SPLITS for ending in ("", WITH_IMAGE))
    files: ClassVar = {
        "problems.json": "all questions",
        "pid_splits.json": "which are in which split",
        "images/*/*/image.png": "images: split of the question, its id; or without images/",
    }
    roots = ("images", "")

    def read(self, split: str) -> Iterator[Example]:
        """An example for each question, in the order of `pid_splits.json`."""
        problems = json_object(self.folder / "problems.json")
        published = split.removesuffix(WITH_IMAGE)
        for identifier in json_object(self.folder / "pid_splits.json").texts(published):
            example = self._example(identifier, problems.mapping(identifier))
            if example.media or published == split:
                yield example

    def _example(self, identifier: str, problem: Entry) -> Example:
        choices, right = problem.texts("choices"), problem.number("answer")
        if len(set(choices)) != len(choices):
            raise problem.error("choices", "choices that differ")
        if not 0 <= right < len(choices):
            raise problem.error("answer", f"0 to {len(choices) - 1}, a place among the choices")
        picture = problem.text("image", "")
        letters = ascii_uppercase[: len(choices)]
        return Example(
            identifier,
            (f"{problem.text('split')}/{identifier}/{picture}",) if picture else (),
            problem.text("question"),
            (choices[right],),
            choices[right],
            choices,
            {
                "choices": " ".join(f"({letter}) {choice}" for letter, choice in zip(letters, choices, strict=True)),
                "letter": letters[right],
                **{key: problem.text(key, "") for key in ("hint", "lecture", "solution")},
            },
        )
