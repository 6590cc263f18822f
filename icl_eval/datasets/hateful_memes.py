"""Hateful Memes (Kiela et al. 2020, arXiv 2005.04790): is a meme hateful? Its words are the field `text`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from icl_eval.datasets import Example
from icl_eval.datasets.reading import LocalDataSet, json_lines

ANSWERS = ("no", "yes")


class HatefulMemes(LocalDataSet):
    """`{split}.jsonl`, a line a meme: `id`, `img`, `text`, and `label`, 1 for hateful (which test does not have)."""

    splits = ("train", "dev", "dev_seen", "dev_unseen", "test", "test_seen", "test_unseen")
    files: ClassVar = {
        "*.jsonl": "memes of train, dev (or dev_seen, dev_unseen) and test (or test_seen, test_unseen)",
        "img/*.png": "their images",
    }

    def read(self, split: str) -> Iterator[Example]:
        """An example for each meme."""
        for entry in json_lines(self.folder / f"{split}.jsonl"):
            label = None
            if "label" in entry.values:
                number = entry.number("label")
                if number not in (0, 1):
                    raise entry.error("label", "0 or 1")
                label = ANSWERS[number]
            yield Example(
                entry.name("id"),
                (entry.text("img"),),
                answers=() if label is None else (label,),
                label=label,
                fields={"text": entry.text("text")},
            )

    def candidates(self) -> tuple[str, ...]:
        """No, then yes: the positive class is the last."""
        return ANSWERS
