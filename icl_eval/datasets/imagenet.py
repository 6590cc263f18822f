"""ImageNet (Russakovsky et al. 2015) and any other images in a folder or tar with a folder for each class."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import ClassVar

from flamingo.document import Image
from flamingo.errors import FlamingoError
from icl_eval.datasets import Example
from icl_eval.datasets.reading import LocalDataSet, Tree, json_object, open_tree

_WNID = re.compile(r"n\d{8}")
_NAMES = ("classnames.txt", "LOC_synset_mapping.txt", "synset_words.txt", "imagenet_class_index.json")


class ImageNet(LocalDataSet):
    """Images `{split}/{class}/*`, in a folder, zip or tar; classes are WordNet ids, or names.

    The names of WordNet ids come from one of four files: `classnames.txt` ("n01440764 tench", commas and all), Kaggle's
    `LOC_synset_mapping.txt` or `synset_words.txt` ("n01440764 tench, Tinca tinca", of which the first name is taken),
    or Keras's `imagenet_class_index.json`. Two classes may share a name, and then are one class to whoever ranks names.
    Folders that are names stand for themselves, "_" as space.
    """

    splits = ("train", "val", "test")
    files: ClassVar = {
        "{train,val}/*/*.JPEG": "images: split, class; or {split}.tar or {split}.zip of them",
        "classnames.txt": f"names of the classes; or {', '.join(_NAMES[1:])}; not where the folders are names",
    }

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._trees: dict[str, Tree] = {}

    def read(self, split: str) -> Iterator[Example]:
        """An example for each image: classes sorted, then files, as torchvision's ImageFolder has them."""
        tree = self._tree(split)
        for name in tree.names():
            parts = PurePosixPath(name).parts
            if len(parts) < 2:
                raise FlamingoError(f"{self.folder}/{split}: image {name}, expected it in a folder of its class")
            label = self._name(parts[-2], f"{self.folder}/{split}: {name}")
            short = "/".join(parts[-2:])
            yield Example(short, (f"{split}/{name}",), answers=(label,), label=label, fields={"class": parts[-2]})

    def candidates(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their file; without one, those of the first split that is there."""
        if self._names:
            return tuple(dict.fromkeys(self._names.values()))
        there = [split for split in self.splits if any((self.folder / place).exists() for place in _places(split))]
        labels = (example.answers[0] for example in self.read(there[0] if there else self.splits[0]))
        return tuple(dict.fromkeys(labels))

    def medium(self, name: str) -> Image:
        """See `DataSet`."""
        split, _, file = name.partition("/")
        return Image(self._tree(split).read(file), name)

    def _tree(self, split: str) -> Tree:
        if split not in self._trees:
            self._trees[split] = open_tree(self.first(*_places(split)))
        return self._trees[split]

    @cached_property
    def _names(self) -> dict[str, str]:
        """WordNet id → name, where there is a file of them."""
        path = next((self.folder / name for name in _NAMES if (self.folder / name).exists()), None)
        if path is None:
            return {}
        return dict(_index_names(path) if path.suffix == ".json" else _line_names(path))

    def _name(self, folder: str, place: str) -> str:
        if folder in self._names:
            return self._names[folder]
        if self._names or _WNID.fullmatch(folder):
            raise FlamingoError(f"{place}: class {folder}, expected one that {' or '.join(_NAMES)} names")
        return folder.replace("_", " ")


def _places(split: str) -> tuple[str, ...]:
    return split, f"{split}.tar", f"{split}.zip"


def _index_names(path: Path) -> Iterator[tuple[str, str]]:
    """WordNet ids and names of Keras's index, `{"0": ["n01440764", "tench"], …}`, in the order of its numbers."""
    index = json_object(path)
    for number in sorted(index.values, key=lambda number: (len(number), number)):
        pair = index.texts(number)
        if len(pair) != 2:
            raise index.error(number, "a WordNet id and a name")
        yield pair[0], pair[1].replace("_", " ")


def _line_names(path: Path) -> Iterator[tuple[str, str]]:
    """WordNet ids and names of a file that has one a line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FlamingoError(f"{path}: expected a WordNet id and a name a line ({error})") from error
    for number, line in enumerate(filter(str.strip, lines), 1):
        wnid, _, name = line.strip().partition(" ")
        if not _WNID.fullmatch(wnid) or not name.strip():
            raise FlamingoError(f"{path}: entry {number}: {line!r:.80}, expected a WordNet id and a name")
        yield wnid, (name if path.name == _NAMES[0] else name.split(",")[0]).strip()
