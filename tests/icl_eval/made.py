"""Data sets and answerers made on the spot, for tests of what stands around a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from flamingo.document import Image
from icl_eval.datasets import Example
from tests.tiny import picture


class Made:
    """A data set of given examples; a medium "7-b" shows the content 7."""

    files: ClassVar[dict[str, str]] = {}
    splits = ("train", "test")

    def __init__(self, train: Sequence[Example], test: Sequence[Example] = (), candidates: tuple[str, ...] = ()):
        self.own = {"train": tuple(train), "test": tuple(test)}
        self._candidates = candidates

    def examples(self, split: str) -> Sequence[Example]:
        return self.own[split]

    def candidates(self) -> tuple[str, ...]:
        return self._candidates

    def medium(self, name: str) -> Image:
        return Image(name.partition("-")[0].encode(), name)


class Stub:
    """Answers without a model: the first candidate, or the number of demonstrations; notes how much it is asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def rank(self, library, ladders, *, normalise="sum", top_k=None, progress=None):
        self.asked.append(len(ladders))
        if progress is not None:
            progress(sum(len(ladder.queries) for ladder in ladders))
        return [[-np.arange(len(query.answers), dtype=float) for query in ladder.queries] for ladder in ladders]

    def generate(self, library, ladders, *, max_new_tokens, beams=1, length_penalty=1.0, progress=None):
        self.asked.append(len(ladders))
        return [[str(query.after) for query in ladder.queries] for ladder in ladders]


def write_own(folder: Path, train: int = 24, test: int = 14) -> Path:
    """Questions of one's own in `folder`/quiz: pictures of four colours, some of which recur; returns `folder`."""
    quiz = folder / "quiz"
    quiz.mkdir(parents=True)
    rng = np.random.default_rng(0)
    words = ("ba", "nili", "pu", "zozo")
    for split, count in (("train", train), ("test", test)):
        lines = []
        for number in range(count):
            content = int(rng.integers(100)) if number % 5 else number % 3  # the same pictures in both splits
            name = f"{split}{number}.png"
            (quiz / name).write_bytes(picture(content).data)
            word = words[content % 4]
            line = {"id": f"{split}{number}", "image": name, "question": "abc"[: 1 + number % 3], "answer": word}
            lines.append(json.dumps({**line, "label": word, "candidates": words}))
        (quiz / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


QUIZ = """
name: {name}
version: 1
dataset: quiz
split: test
support: train
template: "<image>{{question}}:{{answer}}"
separator: "\\n"
shots: [0, 1, 3]
demonstrations: random
zero_shot: text_only
"""


def write_task(folder: Path, name: str = "quiz", **keys: object) -> Path:
    """A task on what `write_own` writes."""
    import yaml

    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(QUIZ.format(name=name)) | keys))
    return path
