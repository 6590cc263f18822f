"""What is wrong with a data set's folder, told before an evaluation is started on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_shards.sources.reading import image_header
from flamingo.document import Image
from flamingo.errors import FlamingoError
from icl_eval.datasets import DataSet, folder_of, load_dataset

MEDIA = 64
"""media of a split that are read, evenly spread over it"""


def problems(name: str, root: Path, splits: Sequence[str] = (), media: int = MEDIA) -> list[str]:
    """What is wrong with a data set, as lines that name files; empty where an evaluation can begin.

    All of each split's texts are read, and some of its media, of which no pixel is decoded.

    Args:
        name: of the data set, as tasks have it.
        root: the folder in which the folders of data sets are.
        splits: those that a task uses; () for all that the data set may have.
        media: how many of a split are read.

    Raises:
        FlamingoError: there is no such data set, known or in `root`.
    """
    dataset = load_dataset(name, root)
    folder = folder_of(name, root)
    if dataset.files and not folder.is_dir():
        expected = "; ".join(f"{pattern} ({what})" for pattern, what in dataset.files.items())
        return [f"{folder}: no such folder, expected {expected}"]
    return [line for split in splits or dataset.splits for line in _problems(dataset, split, media)]


def _problems(dataset: DataSet, split: str, media: int) -> list[str]:
    found: list[str] = []
    try:
        names = [name for example in dataset.examples(split) for name in example.media]
    except FlamingoError as error:
        return [str(error)]
    names = list(dict.fromkeys(names))
    chosen = [names[place * len(names) // media] for place in range(media)] if len(names) > media else names
    for name in chosen:
        try:
            medium = dataset.medium(name)
        except FlamingoError as error:
            found.append(str(error))
            continue
        if isinstance(medium, Image) and image_header(medium.data) is None:
            found.append(f"{name} of split {split!r}: {len(medium.data)} bytes, expected an image file")
    return found
