"""NLVR (Suhr et al. 2017): is a sentence true of three drawn boxes?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import ClassVar

from icl_eval.datasets import Example
from icl_eval.datasets.reading import LocalDataSet, json_lines, open_tree

ANSWERS = ("true", "false")


class Nlvr(LocalDataSet):
    """`{split}.json`, a line a sentence: `identifier`, `sentence`, `label`; images `{split}-{identifier}-{0…5}.png`.

    The six images of a sentence show its boxes in different orders; the first that is there is taken. The release keeps
    each split in a folder of its name; split and images may also lie in the data set's folder itself.
    """

    splits = ("train", "dev", "test")
    files: ClassVar = {
        "*.json": "sentences: train, dev, test; or in a folder of that name",
        "images/**/*-*-*.png": "their images; or in the split's folder",
    }

    def read(self, split: str) -> Iterator[Example]:
        """An example for each sentence."""
        path = self.first(f"{split}.json", f"{split}/{split}.json")
        images = path.parent / "images"
        pictures: dict[str, list[str]] = defaultdict(list)
        for name in open_tree(images).names():
            pictures[PurePosixPath(name).stem.rpartition("-")[0]].append(name)
        for entry in json_lines(path):
            label = entry.text("label")
            if label not in ANSWERS:
                raise entry.error("label", "true or false")
            identifier = entry.text("identifier")
            found = pictures.get(f"{split}-{identifier}")
            if found is None:
                raise entry.error("identifier", f"an image {split}-{identifier}-0.png (or 1 to 5) in {images}")
            picture = (images.relative_to(self.folder) / found[0]).as_posix()
            yield Example(identifier, (picture,), entry.text("sentence"), (label,), label)

    def candidates(self) -> tuple[str, ...]:
        """True and false."""
        return ANSWERS
